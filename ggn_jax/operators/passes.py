"""Curvature of data that do not fit in memory: products that go over an iterable of batches."""

from collections.abc import Callable, Iterable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ggn_jax._keywords import check_names, keywords_of
from ggn_jax._sharding import compiler_sharded
from ggn_jax.loss import Loss
from ggn_jax.objective import Objective
from ggn_jax.operators.base import (
    COLUMN_BATCH_SIZE,
    CurvatureLinearOperator,
    SymmetricLinearOperator,
    check_vector,
    register,
    vectors_like,
)
from ggn_jax.operators.batches import (
    check_iterable,
    check_on_host,
    check_unbatched,
    with_reduction,
    without_reduction,
)
from ggn_jax.operators.problem import Problem
from ggn_jax.operators.unordered_passes import UnorderedPasses
from ggn_jax.operators.weighted import WeightedSumLinearOperator, of_terms


class DataLinearOperator(CurvatureLinearOperator):
    """An operator of one batch, whose products are sums over examples; `from_batches` makes one of many batches."""

    problem: eqx.AbstractVar[Problem]

    def _for_batch(self, inputs: PyTree[Array], targets: Array, start: int) -> Self:
        """The operator for another batch of the same shapes, whose first example is number `start` of all."""
        return eqx.tree_at(lambda op: (op.problem.inputs, op.problem.targets), self, (inputs, targets))

    @classmethod
    def from_objective(
        cls, objective: Objective, params: PyTree[Array], batches: Any, *, key: Any = None, **options: Any
    ) -> WeightedSumLinearOperator:
        """Make the operator of an objective: the weighted sum of those of its functions.

        Args:
            objective: an `Objective`: a sum of functions of the same parameters, each with a weight.
            params: the parameters, a pytree of floating arrays.
            batches: a list with a batch `(inputs, targets)` for each function; they may differ in size.
            key: a PRNG key for sampling; function `k` gets `jax.random.fold_in(key, k)`. Needed only where something is
                sampled.
            **options: further keyword arguments of the constructor: `chunk_size` and `has_aux`; `mc_samples` for the
                GGN; `per` for the empirical Fisher.

        Returns:
            A `WeightedSumLinearOperator`.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them, and for a number of
                batches that differs from that of the functions.
        """
        operators, weights = of_terms(cls, objective, params, batches, key, options)
        return WeightedSumLinearOperator(tuple(operators), tuple(weights))

    @classmethod
    def from_batches(
        cls,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batches: Iterable[Any],
        *,
        progress: bool = False,
        **options: Any,
    ) -> "BatchesLinearOperator":
        """Make the operator of an iterable of batches, as if they were one batch.

        Each product goes over the batches once, on the host, and holds one of them at a time; `as_matrix` takes 32
        columns in a pass. Batches may differ in size; a function is compiled for each shape. A mean is over the terms
        of all batches. What is sampled for an example depends on its place in the whole.

        As its products are made on the host, it works outside of `jit` only, where lineax's iterative solvers run:
        solve with SciPy's, `scipy.sparse.linalg.cg(operator.damped(d).to_scipy(), flat)`.

        Args:
            model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
            loss: a `Loss` without weights for single examples.
            params: the parameters, a pytree of floating arrays.
            batches: an iterable of `(inputs, targets)`, NumPy or JAX arrays, that can be repeated: a list, or a loader,
                but no generator. It must yield the same data in each pass, which is checked by comparing two of them;
                the order matters only where something is sampled.
            progress: whether to show a bar for each pass (needs tqdm); False by default.
            **options: further keyword arguments of the constructor: `chunk_size` and `has_aux`; `mc_samples` and `key`
                for the GGN; `per` for the empirical Fisher.

        Returns:
            A `BatchesLinearOperator`.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them and the batch; for an
                iterator (which cannot be repeated), for no batch at all, and for passes over different data.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.CrossEntropyLoss()
            >>> batches = [(jnp.ones((n, 2)), jnp.arange(n) % 3) for n in (8, 8, 5)]
            >>> ggn = ggn_jax.GGNLinearOperator.from_batches(lambda p, x: x @ p["w"], loss, params, batches)
            >>> ggn.mv(params)["w"].shape
            (2, 3)
        """
        check_names("from_batches", options, [*keywords_of(cls), "progress"])
        check_iterable(batches, "each product goes over the batches")

        def make(inputs: PyTree, targets: Any) -> DataLinearOperator:
            return cls(model_fn, loss, params, (inputs, targets), **options)  # type: ignore[call-arg, arg-type]

        passes = _Products(make, batches, progress)
        return BatchesLinearOperator(passes, vectors_like(params), lx.is_positive_semidefinite(passes.first))


class _Products:
    """Products that go over batches, and add up what each contributes."""

    def __init__(self, make: Callable[[PyTree, Any], DataLinearOperator], batches: Iterable[Any], progress: bool):
        def checked(inputs: PyTree, targets: Any) -> DataLinearOperator:
            operator = make(inputs, targets)
            check_unbatched(operator.problem)
            if self._passes.first is None:
                operator.problem.check_batches()
            return operator

        self._passes = UnorderedPasses(checked, lambda operator: operator.problem, batches, progress)
        self.first = self._passes.peek()
        """The operator of the first batch."""

    def product(self, vectors: PyTree[Float[Array, "K ..."]]) -> PyTree[Float[Array, "K ..."]]:
        """The products of the operator of all batches with these vectors, in one pass."""

        def contribution(operator: DataLinearOperator, problem: Problem, start: int) -> PyTree[Array]:
            return _contribution(operator._for_batch(problem.inputs, problem.targets, start), vectors)

        total = self._passes.sum_over_batches(contribution, "products")
        result: PyTree[Array] = _finish_products(self.first.problem, total, vectors)
        return result


class BatchesLinearOperator(SymmetricLinearOperator):
    """A curvature matrix of many batches, whose products go over all of them; made by `from_batches`.

    It works outside of `jit` only: see `GGNLinearOperator.from_batches`.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, batches = {"w": jnp.ones((2, 3))}, [(jnp.ones((n, 2)), jnp.arange(n) % 3) for n in (8, 5)]
        >>> loss = ggn_jax.CrossEntropyLoss()
        >>> hessian = ggn_jax.HessianLinearOperator.from_batches(lambda p, x: x @ p["w"], loss, params, batches)
        >>> type(hessian).__name__, hessian.as_matrix().shape
        ('BatchesLinearOperator', (6, 6))
    """

    passes: _Products = eqx.field(static=True)
    structure: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    positive_semidefinite: bool = eqx.field(static=True)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.structure

    def mv(self, vector: PyTree[Any]) -> PyTree[Array]:
        """Compute the product with a vector, in one pass over the batches.

        Args:
            vector: a pytree of arrays like the parameters.

        Returns:
            A pytree of arrays like the parameters.

        Raises:
            ValueError, TypeError: for a vector whose structure, shapes or dtypes differ from the parameters', and under
                `jit`.
        """
        check_vector(self, vector)
        stacked = jax.tree.map(lambda v: jnp.asarray(v)[None], vector)
        return jax.tree.map(lambda v: v[0], self._products(stacked))

    def _dense(self, leaves: tuple[int, ...]) -> Float[Array, "d d"]:
        """A pass for each 32 columns."""
        shapes, tree = jax.tree.flatten(self.structure)
        zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes]
        with jax.numpy_dtype_promotion("standard"):  # parameters may have several dtypes
            flat, unravel = ravel_pytree([zeros[leaf] for leaf in leaves])

            def given(e: Array) -> PyTree[Array]:
                wanted = dict(zip(leaves, unravel(e), strict=True))
                return jax.tree.unflatten(tree, [wanted.get(i, zero) for i, zero in enumerate(zeros)])

            def wanted(product: PyTree[Array]) -> Array:
                found = jax.tree.leaves(product)
                return ravel_pytree([found[leaf] for leaf in leaves])[0]

            unit = jnp.eye(flat.size, dtype=flat.dtype)
            starts = range(0, flat.size, COLUMN_BATCH_SIZE)
            parts = [self._products(jax.vmap(given)(unit[start : start + COLUMN_BATCH_SIZE])) for start in starts]
            return jnp.concatenate([jax.vmap(wanted)(part) for part in parts])

    def _products(self, vectors: PyTree[Array]) -> PyTree[Array]:
        check_on_host(vectors)
        return self.passes.product(vectors)


register(BatchesLinearOperator)
lx.is_positive_semidefinite.register(BatchesLinearOperator, lambda operator: operator.positive_semidefinite)


@jax.jit
@compiler_sharded
def _contribution(operator: DataLinearOperator, vectors: PyTree[Array]) -> dict[str, Any]:
    """What a batch contributes to the products, without the reduction."""
    problem = operator.problem
    r = problem.reduction()
    try:
        products = jax.vmap(operator._mv)(vectors)
    except NotImplementedError:  # JAX cannot map `jax.lax.ragged_dot`
        products = jax.lax.map(operator._mv, vectors)
    return {
        "products": without_reduction(products, r),
        "divisor": 1 / r,
    }


@jax.jit
def _finish_products(problem: Problem, total: dict[str, Any], like: PyTree[Array]) -> PyTree[Array]:
    dtypes = jax.tree.map(lambda x: x.dtype, like)
    return with_reduction(problem.loss.reduction, total["products"], total["divisor"], dtypes)
