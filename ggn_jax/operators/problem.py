"""A model, its parameters, a loss and a batch: checked once, and summed over chunks of the batch."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._checks import Examples, are_known, check_count, check_coupled, check_outputs
from ggn_jax._frozen import Frozen
from ggn_jax._fusion import max_abs
from ggn_jax._hints import check_model_fn, model_errors_explained, params_hint, tensor_hint
from ggn_jax._model import Model
from ggn_jax._outputs import split_outputs
from ggn_jax._repr import fields
from ggn_jax._sharding import compiler_sharded, sharding_errors_explained, vary_alike, vary_like
from ggn_jax._sums import sum_sequentially
from ggn_jax._supported import check_supported, stand_in_targets
from ggn_jax._unbatched import map_batched, unwrap
from ggn_jax.fisher_type import FisherType
from ggn_jax.joint import JointLoss, errors_name_output, flatten_problem
from ggn_jax.layers.check import COUPLED_WAY_OUT, NUM_CHECKED_EXAMPLES, check_independent
from ggn_jax.layers.jaxprs import is_reverse_only, nonlinear_functions
from ggn_jax.likelihood import LikelihoodLoss, indefinite_error
from ggn_jax.loss import Loss
from ggn_jax.losses import MSELoss
from ggn_jax.operators.examples import as_batch
from ggn_jax.terms import check_values, split_terms, term_positions


class Problem(eqx.Module):
    """`loss(model_fn(params, inputs), targets)`, checked, as a pytree; made by `make_problem`."""

    model_fn: Model
    loss: Loss
    params: PyTree[Array]
    inputs: PyTree[Array]
    targets: Any
    """An array, or a dict of them for a `JointLoss`."""
    outputs: jax.ShapeDtypeStruct = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)
    coupled: bool = eqx.field(static=True)
    """Whether examples depend on each other: the batch is one example."""
    reverse_only: bool = eqx.field(static=True)
    """Whether the model has no derivatives in forward mode."""

    def __repr__(self) -> str:
        return fields(self, params=self.params, loss=self.loss, inputs=self.inputs, outputs=self.outputs)

    def reduction(self) -> Float[Array, ""]:
        """The factor `r` of the terms' sum; infinite for the mean of no term."""
        return self._terms_at_zeros().reduction_factor

    def any_term_counts(self) -> Bool[Array, ""]:
        """Whether any term counts, and not all targets are ignored."""
        return max_abs(self._terms_at_zeros().scale) != 0

    def _terms_at_zeros(self) -> Any:
        """The terms at outputs of 0, for what does not depend on the outputs."""
        zeros = jnp.zeros(self.outputs.shape, self.outputs.dtype)
        return split_terms(self.loss, zeros, self.targets, batch=True)

    def nonlinear_functions(self) -> set[str]:
        """The names of the model's functions of single entries, and of its draws."""
        model_fn = self.model_fn.at(self.inputs)
        return nonlinear_functions(compiler_sharded(_trace)(model_fn, self.params, self.inputs).value[0])

    def sum_over_chunks(self, fn: Callable[..., PyTree], *per_datum: Any) -> PyTree[Array]:
        """The sum over chunks of the batch of `fn(terms_at, inputs, operand, *per_datum)`.

        `terms_at(outputs, operand)` are the loss's terms for the chunk's outputs; the reduction is that of the whole
        batch, and whatever the loss holds per example is cut along with the data.

        A chunk has a few examples of each segment of the batch. If the batch is sharded, each segment is on one device,
        so that all devices work on every chunk, and nothing is sent.
        """
        # The reduction does not depend on the outputs' values.
        zeros = jnp.zeros(self.outputs.shape, self.outputs.dtype)
        whole = split_terms(self.loss, zeros, self.targets, batch=True)
        fn = partial(fn, whole.part)
        data = (self.inputs, whole.operand, *per_datum)
        chunks = self.chunks()
        if chunks is None:
            return fn(*data)
        take = chunks.take_fn(data)
        return sum_sequentially(lambda indices: fn(*take(indices)), chunks.even, chunks.rest)

    def chunks(self) -> "Chunks | None":
        """How the batch is cut into chunks; None if it is one chunk."""
        size = self.outputs.shape[0]
        if self.chunk_size is None or self.chunk_size >= size:
            return None
        return Chunks(size, *_segments_of(size, self.chunk_size))

    @property
    def num_coupled(self) -> int:
        """How many examples share a backward pass."""
        return self.outputs.shape[0] if self.coupled else 1

    def check_chunks(self) -> None:
        """Refuse a model whose examples depend on each other, if the batch is cut into chunks."""
        if self.chunk_size is not None and self.chunks() is not None:
            # Ignored outputs may be NaN, and more examples than a chunk might not fit in memory.
            args = self.model_fn, self.params, self.inputs, self.outputs.dtype
            few = min(NUM_CHECKED_EXAMPLES, max(2, self.chunk_size))
            check_independent(*args, "leave chunk_size out", examples=few, allow_nan=True)

    def check_batches(self) -> None:
        """Refuse a model whose examples depend on each other, for several batches."""
        args = self.model_fn, self.params, self.inputs, self.outputs.dtype
        check_independent(*args, "pass all data as one batch", allow_nan=True)

    def check_examples(self) -> None:
        """Refuse a model whose examples depend on each other, unless they may."""
        if not self.coupled:
            check_independent(self.model_fn, self.params, self.inputs, self.outputs.dtype, COUPLED_WAY_OUT)

    def check_curvature(self) -> None:
        """Refuse a user's loss whose Hessians are indefinite, though it declares otherwise, if values are known."""
        if isinstance(self.loss, JointLoss):
            for name, problem in _problems_of_heads(self).items():
                with errors_name_output(name):
                    problem.check_curvature()
        if not isinstance(self.loss, LikelihoodLoss) or self.loss.curvature != "hessian":
            return
        if not are_known(self):
            return
        count = int(_count_indefinite(self))
        if count:
            number = math.prod(term_positions(self.loss, self.outputs, True))
            raise indefinite_error(self.loss, f"{count} of {number} terms of this batch")


class Chunks(NamedTuple):
    """A batch of `segments` equal parts, cut into chunks of `per_segment` examples of each segment."""

    size: int
    segments: int
    per_segment: int

    @property
    def length(self) -> int:
        """The length of a segment."""
        return self.size // self.segments

    @property
    def even(self) -> Int[Array, "chunks each"]:
        """The indices within a segment of each chunk, but for a smaller last one."""
        return jnp.arange(self.length - self.length % self.per_segment).reshape(-1, self.per_segment)

    @property
    def rest(self) -> Int[Array, " few"] | None:
        """The indices of the last chunk, if it is smaller."""
        left = self.length % self.per_segment
        return jnp.arange(self.length - left, self.length) if left else None

    def take_fn(self, data: PyTree[Array]) -> Callable[[Int[Array, " each"]], PyTree[Array]]:
        """A function from indices to the examples at these indices of each segment."""
        segments = map_batched(lambda x: x.reshape(self.segments, self.length, *x.shape[1:]), data)

        def take(indices: Array) -> PyTree[Array]:
            chunk = map_batched(lambda x: jax.lax.dynamic_slice_in_dim(x, indices[0], len(indices), axis=1), segments)
            return map_batched(lambda x: x.reshape(-1, *x.shape[2:]), chunk)

        return take

    def concatenate(self, parts: PyTree[Array], rest: PyTree[Array] | None) -> PyTree[Array]:
        """Rows for examples, from all chunks `[chunks, rows, ...]` and the rest, in the order of the batch."""

        def whole(x: Array, *rest: Array) -> Array:
            segments = jnp.moveaxis(x.reshape(len(x), self.segments, self.per_segment, *x.shape[2:]), 0, 1)
            pieces = [segments.reshape(self.segments, -1, *x.shape[2:])]
            pieces += [y.reshape(self.segments, -1, *y.shape[1:]) for y in rest]
            return jnp.concatenate(pieces, axis=1).reshape(self.size, *x.shape[2:])

        return jax.tree.map(whole, parts, *(() if rest is None else (rest,)))


class WeightedProblems(eqx.Module):
    """`sum_k weights[k] problems[k]`, of the same parameters."""

    problems: list[Problem]
    weights: list[Array]

    @property
    def params(self) -> PyTree[Array]:
        return self.problems[0].params


def _problems_of_heads(problem: Problem) -> dict[str, Problem]:
    """For a `JointLoss`, a problem for each output."""
    loss: Any = problem.loss
    heads = loss._heads(jax.ShapeDtypeStruct(problem.outputs.shape, problem.outputs.dtype))

    def one(name: str, head: Loss, outputs: jax.ShapeDtypeStruct) -> Problem:
        model = Model(jax.tree_util.Partial(_output, problem.model_fn, Frozen((name, loss._shapes))))
        rest = problem.params, problem.inputs, problem.targets[name], outputs
        return Problem(model, head, *rest, problem.chunk_size, problem.coupled, problem.reverse_only)

    return {name: one(name, *pair) for name, pair in heads.items()}


def _output(model_fn: Any, which: Frozen, params: PyTree, inputs: PyTree) -> Array:
    name, shapes = which.thaw()
    return split_outputs(model_fn(params, inputs), dict(shapes))[name]


@eqx.filter_jit
@compiler_sharded
def _count_indefinite(problem: Problem) -> Array:
    loss: Any = problem.loss

    def count(terms_at: Any, inputs: PyTree, operand: Any) -> Array:
        terms = terms_at(problem.model_fn(problem.params, inputs), operand)
        indefinite = terms.map(loss._indefiniteness) < 0
        return jnp.sum(indefinite & (terms.scale != 0), dtype=jnp.int32)

    return problem.sum_over_chunks(count)


def _segments_of(size: int, chunk_size: int) -> tuple[int, int]:
    """The number of segments of a batch, and how many examples of each are in a chunk.

    Tracing does not tell how a batch is sharded. This number suits all cases in which its examples are sharded over a
    divisor of the number of devices, and chunks are not smaller than that.
    """
    common = math.gcd(size, jax.device_count())
    segments = max(number for number in range(1, min(common, chunk_size) + 1) if common % number == 0)
    return segments, chunk_size // segments


def _chunk_sizes(size: int, chunk_size: int | None) -> set[int]:
    """The sizes of the chunks of a batch."""
    if chunk_size is None or chunk_size >= size:
        return {size}
    segments, per_segment = _segments_of(size, chunk_size)
    return {segments * per_segment, size % (segments * per_segment)} - {0}


class _ClosedOver(eqx.Module):
    """A model function with the traced values it closes over as leaves, for the inputs' shapes it is used with."""

    by_shapes: dict[tuple[tuple[int, ...], ...], Frozen]

    @classmethod
    def of(cls, model_fn: Any, params: PyTree, inputs: Iterable[PyTree]) -> "_ClosedOver":
        return cls({_shapes(x): Frozen(eqx.filter_closure_convert(model_fn, params, x)) for x in inputs})

    def __call__(self, params: PyTree, inputs: PyTree) -> Any:
        return self.by_shapes[_shapes(inputs)].thaw()(params, inputs)


def _first(count: int, x: Array) -> Array:
    return x[:count]


def _shapes(tree: PyTree) -> tuple[tuple[int, ...], ...]:
    return tuple(x.shape for x in jax.tree.leaves(tree))


class _Traced(eqx.Module):
    value: Any = eqx.field(static=True)  # not an array, and so not sharded


def _trace(model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree) -> _Traced:
    """The model's jaxpr, and the shapes of its outputs."""
    return _Traced(jax.make_jaxpr(model_fn, return_shape=True)(params, inputs))


def _check_params(params: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"params must hold at least one array; got an empty pytree.{params_hint(params)}")
    for path, leaf in leaves:
        if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            got = leaf.dtype if isinstance(leaf, jax.Array) else type(leaf).__name__
            convert = "Convert it with jnp.asarray, or close" if isinstance(leaf, np.ndarray) else "Close"
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be a floating JAX array; got {got}. {convert} model_fn over"
                f" what is not a parameter.{tensor_hint(leaf)}{params_hint(params)}"
            )


def _without_targets(loss: Loss, outputs: jax.ShapeDtypeStruct, fisher_type: FisherType | None) -> tuple[Loss, Any]:
    """A loss and targets for a batch that has none."""
    if fisher_type is FisherType.FORWARD_ONLY:
        # Forward-only uses neither, but needs to know whether any term counts.
        loss, fisher_type = MSELoss(reduction=loss.reduction), FisherType.TYPE2
    return loss, stand_in_targets(loss, outputs, fisher_type, batch=True)


def make_problem(
    model_fn: Callable[[PyTree, PyTree], Array],
    loss: Any,
    params: Any,
    batch: Any,
    chunk_size: int | None = None,
    fisher_type: FisherType | None = None,
    *,
    has_aux: bool = False,
    examples: Examples = "independent",
) -> Problem:
    """Check everything that an operator is made of.

    Targets may be None if vectors of `fisher_type` do not depend on them; that is None for what needs targets anyway.

    Raises TypeError or ValueError, naming the argument, for parameters that are not floating arrays, a batch that is
    not `(inputs, targets)` with one common leading axis, model outputs that are not one array `[N, *out]`, and targets
    that the loss does not take; NotImplementedError for a loss that is not supported.
    """
    check_model_fn(model_fn)
    check_supported(loss)
    if chunk_size is not None:
        chunk_size = check_count("chunk_size", chunk_size)
    coupled = check_coupled(examples, chunk_size)
    _check_params(params)
    inputs, targets, size = as_batch(batch)
    params, inputs, targets, loss, model_fn = vary_alike(params, inputs, targets, loss, model_fn)

    with sharding_errors_explained(), model_errors_explained(params, inputs):
        model_fn, loss = flatten_problem(model_fn, loss, params, inputs, has_aux)
        jaxpr, outputs = compiler_sharded(_trace)(Model(model_fn, has_aux).at(inputs), params, inputs).value
    if not isinstance(outputs, jax.ShapeDtypeStruct):
        raise TypeError(
            f"model_fn must return one array [N, *out]; got {jax.tree.structure(outputs)}. Pass a function that takes"
            " the outputs out of it, or has_aux=True if it returns (outputs, aux)."
        )
    outputs = jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)
    check_outputs("the outputs of model_fn", outputs)
    if outputs.shape[:1] != (size,):
        raise ValueError(f"model_fn must return an array [N, *out] with N = {size}; got shape {outputs.shape}.")
    if isinstance(targets, Mapping) and not isinstance(loss, JointLoss):
        raise TypeError(f"targets must be one array for {type(loss).__name__}; got a dict, which is for a JointLoss.")
    if targets is None:
        loss, targets = _without_targets(loss, outputs, fisher_type)
        targets = vary_like(targets, inputs)
    loss.check_shapes(outputs, targets, True)
    check_values(loss, outputs, targets, True)
    if not are_known(list(jaxpr.consts)):
        # model_fn closes over tracers. Solvers keep the operator beyond the trace that these belong to, so they must be
        # visible as leaves.
        parts = _chunk_sizes(size, chunk_size) | (set() if coupled else {1})  # layers are found on one example
        cut = [map_batched(partial(_first, n), inputs) for n in parts]
        model_fn = _ClosedOver.of(model_fn, params, map(unwrap, cut))
    elif not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model_fn)):
        model_fn = jax.tree_util.Partial(model_fn)  # a plain function: static, compared by identity
    model, reverse_only = Model(model_fn, has_aux), is_reverse_only(jaxpr)
    return Problem(model, loss, params, inputs, targets, outputs, chunk_size, coupled, reverse_only)
