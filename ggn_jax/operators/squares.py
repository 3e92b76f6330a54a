"""The GGN's diagonal of one batch: sums of squares over vectors and examples, by layers or by examples."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import check_choice, check_count, check_sampling, compute_dtype
from ggn_jax._draws import example_keys
from ggn_jax._sharding import compiler_sharded
from ggn_jax._supported import check_exact
from ggn_jax._unbatched import batch_axes, map_batched
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.chunked import sum_chunked
from ggn_jax.kronecker.diagonal import compute_diagonal
from ggn_jax.layers.run import vmap_examples
from ggn_jax.operators.batches import without_reduction
from ggn_jax.operators.problem import Problem


class DiagonalMaker:
    """How the GGN's diagonal of a batch is computed, with checked options."""

    def __init__(self, mc_samples: Any, key: Any, vector_chunk_size: Any, method: Any):
        check_choice("method", method, ("layers", "data"))
        self._compute = _by_layers if method == "layers" else _by_examples
        self._chunk_size = check_count("vector_chunk_size", vector_chunk_size)
        self._mc_samples, self._key = check_sampling(mc_samples, key, wanted_by="GGNDiagonalLinearOperator")
        self.fisher_type = FisherType.MC if self._mc_samples else FisherType.TYPE2

    @property
    def draws(self) -> bool:
        """Whether targets are drawn."""
        return self._key is not None

    def check(self, problem: Problem) -> None:
        """Refuse a loss or model that this cannot be computed for."""
        if not self._mc_samples:
            check_exact(problem.loss)
        problem.check_examples()
        problem.check_curvature()

    def __call__(self, problem: Problem, start: int) -> PyTree[Array]:
        """The entries for a batch whose first example is number `start` of all."""
        keys = None if self._key is None else example_keys(self._key, start, problem.outputs.shape[0])
        entries: PyTree[Array] = self._compute(problem, keys, self._mc_samples, self._chunk_size)
        return entries


@jax.jit
def unreduced(problem: Problem, entries: PyTree[Array]) -> tuple[PyTree[Array], Array]:
    """The entries without the loss's reduction, so that they can be added up, and the divisor of its mean."""
    r = problem.reduction()
    return without_reduction(entries, r), 1 / r


_like_parameters = partial(compiler_sharded, like=lambda problem, *_: problem.params)
_by_layers = jax.jit(_like_parameters(compute_diagonal), static_argnames=("mc_samples", "vector_chunk_size"))


@partial(jax.jit, static_argnames=("mc_samples", "vector_chunk_size"))
@_like_parameters
def _by_examples(problem: Problem, keys: Array | None, mc_samples: int, vector_chunk_size: int) -> PyTree[Array]:
    num_coupled = problem.num_coupled
    num = mc_samples or num_coupled * math.prod(problem.outputs.shape[1:])

    def example(terms_at: Any, inputs: PyTree, operand: Any, *keys: Array) -> PyTree[Array]:
        """The sum over vectors of squared gradients of one example: a batch of one, or of coupled examples."""
        outputs, vjp = jax.vjp(lambda params: problem.model_fn(params, inputs), problem.params)
        terms = terms_at(outputs, operand)
        drawn = terms.sampled_gradients(*keys, num) / math.sqrt(num) if keys else None

        def squared(index: Array) -> PyTree[Array]:
            if drawn is not None:
                vector = drawn[index]
            else:
                unit = (jnp.arange(num) == index).astype(outputs.dtype).reshape(outputs.shape)
                vector = terms.product("sqrt_mv", unit)
            # In 16 bits, squares underflow long before gradients do.
            return jax.tree.map(lambda g: g.astype(compute_dtype(g.dtype)) ** 2, vjp(vector.astype(outputs.dtype))[0])

        def squares(indices: Array) -> PyTree[Array]:
            return jax.tree.map(lambda s: jnp.sum(s, axis=0), vmap_examples(squared)(indices))

        return sum_chunked(squares, num, vector_chunk_size)

    def chunk(terms_at: Any, *data: PyTree) -> PyTree[Array]:
        data = map_batched(lambda x: x.reshape(-1, num_coupled, *x.shape[1:]), data)
        squares = vmap_examples(partial(example, terms_at), batch_axes(data))(*data)
        return jax.tree.map(lambda s: jnp.sum(s, axis=0), squares)

    total = problem.sum_over_chunks(chunk, *(() if keys is None else (keys,)))
    return jax.tree.map(lambda s, p: s.astype(p.dtype), total, problem.params)
