"""Function space of an iterable of batches: only one batch is held at a time, and arrays of the size of the outputs."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ggn_jax._sharding import compiler_sharded
from ggn_jax.layerwise.dots import OutputGradients, gradients, inner_products
from ggn_jax.layerwise.space import (
    FunctionSpace,
    FunctionSpaceLinearOperator,
    Outputs,
    Root,
    Shapes,
    inverse_roots,
    matrix,
    product,
    solve,
)
from ggn_jax.operators.base import check_vector, register
from ggn_jax.operators.batches import check_on_host
from ggn_jax.operators.ordered_passes import OrderedPasses
from ggn_jax.operators.outputs import BatchesJacobianLinearOperator, map_over_chunks
from ggn_jax.operators.problem import Problem


class BatchesSpace(FunctionSpace):
    """The outputs of all data of an iterable of batches."""

    jacobian: BatchesJacobianLinearOperator
    root: Root

    def shapes(self) -> Shapes:
        return [self.jacobian.passes.outputs]

    def roots(self) -> list[Root]:
        return [self.root]

    def jvp(self, v: PyTree[Array]) -> Outputs:
        return [self.jacobian.mv(v)]

    def vjp(self, us: Outputs) -> PyTree[Array]:
        return self.jacobian.vjp(us[0])

    def gram(self, damping: PyTree[Array] | None) -> Float[Array, "K K"]:
        """One pass for each batch: its gradients are kept, and multiplied with those of each batch after it."""
        passes = self.jacobian.passes
        starts = [0, *passes.ends[:-1]]
        found: dict[tuple[int, int], Array] = {}

        def blocks(row: int) -> Callable[[Problem, int], tuple[()]]:
            kept: list[OutputGradients] = []

            def contribution(problem: Problem, start: int) -> tuple[()]:
                # Batches before this row were multiplied with it in their own pass: the matrix is symmetric.
                if start >= starts[row]:
                    own = _gradients(problem, damping)
                    kept.append(own) if not kept else None
                    found[row, starts.index(start)] = _inner_products(kept[0], own, problem.chunk_size)
                return ()

            return contribution

        numbers = range(len(starts))
        for row in numbers:
            passes.sum_over_batches(blocks(row), f"rows of batch {row}")
        return jnp.block([[found[k, m] if k <= m else found[m, k].T for m in numbers] for k in numbers])


class BatchesGramLinearOperator(FunctionSpaceLinearOperator):
    """The matrix `J J^T`, or `S^T J J^T S`, of the outputs of many batches; made by `GramLinearOperator.from_batches`.

    It works outside of `jit` only.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> batches = [(jnp.ones((n, 2)), None) for n in (8, 5)]
        >>> gram = ggn_jax.GramLinearOperator.from_batches(lambda p, x: x @ p, jnp.ones((2, 3)), batches)
        >>> type(gram).__name__, gram.mv(jnp.ones((13, 3))).shape
        ('BatchesGramLinearOperator', (13, 3))
    """

    space: BatchesSpace

    def __init__(
        self,
        make: Callable[[PyTree, Any], Problem],
        loss: Any,
        batches: Iterable[Any],
        centred: bool,
        progress: bool,
    ):
        outputs: list[Array] = []
        targets: list[Any] = []

        def collect(problem: Problem, start: int) -> tuple[()]:
            if loss is not None:
                outputs.append(_outputs(problem))
                targets.append(problem.targets)
            return ()

        passes = OrderedPasses(make, batches, with_targets=loss is not None, progress=progress, contribution=collect)
        root = Root(None, centred)
        if loss is not None:
            whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *targets)
            root = _root(passes.loss, jnp.concatenate(outputs), whole, centred)
        self.space = BatchesSpace(BatchesJacobianLinearOperator(passes), root)

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """Return the shape and dtype of the outputs of all batches, `[N, *out]`."""
        return self.space.shapes()[0]

    def _params(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.space.jacobian.in_structure()

    def _details(self) -> dict[str, Any]:
        passes, root = self.space.jacobian.passes, self.space.root
        return {**({} if root.terms is None else {"loss": passes.loss}), "centred": root.centred}

    def mv(self, vector: Float[Array, "N *out"]) -> Float[Array, "N *out"]:
        """Compute the product with a vector, in two passes over the batches.

        Args:
            vector: an array like the outputs of all batches, `[N, *out]`.

        Returns:
            An array like the outputs.
        """
        check_vector(self, vector, "output")
        check_on_host(vector)
        return product(self.space, [jnp.asarray(vector)])[0]

    def as_matrix(self) -> Float[Array, "K K"]:
        """Compute the dense matrix, in one pass for each batch.

        Returns:
            An array `[K, K]`, with rows and columns in the order of the outputs' entries (C order).
        """
        return matrix(self.space).astype(self.in_structure().dtype)

    def _solve(self, v: PyTree[Array], number: Array, damping: PyTree[Array] | None) -> PyTree[Array]:
        check_on_host((v, number, damping))
        return solve(self.space, jax.tree.map(jnp.asarray, v), number, damping)


register(BatchesGramLinearOperator, positive_semidefinite=True)


@jax.jit
@compiler_sharded
def _outputs(problem: Problem) -> Float[Array, "N *out"]:
    return map_over_chunks(problem, partial(problem.model_fn, problem.params))


@eqx.filter_jit
@compiler_sharded
def _root(loss: Any, outputs: Array, targets: Any, centred: bool) -> Root:
    return Root.of(loss, outputs, targets, centred)


@jax.jit
@compiler_sharded
def _gradients(problem: Problem, damping: PyTree[Array] | None) -> OutputGradients:
    return gradients([problem], inverse_roots(damping, problem.params))[0]


@partial(jax.jit, static_argnames="chunk_size")
@compiler_sharded
def _inner_products(one: OutputGradients, many: OutputGradients, chunk_size: int | None) -> Float[Array, "K L"]:
    return inner_products(one, many, chunk_size)
