"""Linear maps between the parameters and a model's outputs."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import compute_dtype, errors_prefixed
from ggn_jax._repr import fields
from ggn_jax._sharding import compiler_sharded, explicit_mesh, vary_like
from ggn_jax.fisher_type import FisherType
from ggn_jax.losses import MSELoss
from ggn_jax.objective import Objective, parts_of
from ggn_jax.operators.base import check_vector, map_in_batches, register, vectors_like
from ggn_jax.operators.batches import check_on_host, refuse_mask
from ggn_jax.operators.examples import unpack_batch
from ggn_jax.operators.jacobian import Jacobian
from ggn_jax.operators.ordered_passes import OrderedPasses
from ggn_jax.operators.problem import Problem, make_problem
from ggn_jax.operators.rectangular import AbstractJacobian, StackedJacobianLinearOperator


class Linearised(eqx.Module):
    """A model at a problem's parameters and inputs: its outputs, and products with its Jacobian, chunk by chunk."""

    problem: Problem
    jacobian: Jacobian | None
    """The linearisation, kept unless there are chunks: these are for saving memory, which it would take."""

    @classmethod
    def of(cls, problem: Problem) -> "Linearised":
        return cls(problem, Jacobian.of(problem, problem.inputs) if problem.chunks() is None else None)

    def outputs(self) -> Float[Array, "N *out"]:
        if self.jacobian is not None:
            return self.jacobian.outputs
        return map_over_chunks(self.problem, partial(self.problem.model_fn, self.problem.params))

    def jvp(self, v: PyTree[Array]) -> Float[Array, "N *out"]:
        """`J v`."""
        problem = self.problem
        v = vary_like(v, problem.params)
        if self.jacobian is not None:
            return self.jacobian.jvp(v)
        return map_over_chunks(problem, lambda inputs: Jacobian.of(problem, inputs).jvp(v))

    def vjp(self, u: Float[Array, "N *out"]) -> PyTree[Array]:
        """`J^T u`."""
        if self.jacobian is not None:
            return self.jacobian.vjp(u)

        def contribution(terms_at: Any, inputs: PyTree, operand: Any, u: Array) -> PyTree[Array]:
            return Jacobian.of(self.problem, inputs).vjp(u)

        return self.problem.sum_over_chunks(contribution, u)


def map_over_chunks(problem: Problem, fn: Callable[[PyTree], PyTree[Array]]) -> PyTree[Array]:
    """`fn(inputs)` for the whole batch, chunk by chunk; its results have examples as first axis."""
    chunks = problem.chunks()
    if chunks is None:
        return fn(problem.inputs)

    take = chunks.take_fn(problem.inputs)
    parts = jax.lax.map(lambda places: fn(take(places)), chunks.even)
    return chunks.concatenate(parts, None if chunks.rest is None else fn(take(chunks.rest)))


class JacobianLinearOperator(AbstractJacobian):
    """The Jacobian `J` of a model's outputs in its parameters: from pytrees like these to `[N, *out]`.

    Products use forward-mode differentiation, and those with the transpose, `jacobian.T`, reverse mode; a model that
    has reverse-mode derivatives only works, too. `lineax.linearise(jacobian)` keeps the linearisation for several
    products. For least squares, use `lineax.linear_solve(jacobian, residuals, lineax.LSMR(...))`; for products of `J`
    with itself see `GramLinearOperator` (outputs) and `GGNLinearOperator` (parameters).

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`. With `chunk_size` it must treat examples
            independently (no batch normalisation in training mode), which is checked on two examples outside of `jit`.
        params: the parameters, a pytree of floating arrays.
        inputs: a batch of inputs, perhaps a pytree, whose leading axes are the batch's.
        chunk_size: how many examples to process at once; None (default) for all.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> jacobian = JacobianLinearOperator(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
        >>> jacobian.mv(params).shape, jacobian.T.mv(jnp.ones((8, 3)))["w"].shape, jacobian.as_matrix().shape
        ((8, 3), (2, 3), (24, 6))
    """

    problem: Problem
    linearisation: Linearised | None

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        params: PyTree[Array],
        inputs: PyTree[Array],
        *,
        chunk_size: int | None = None,
        has_aux: bool = False,
    ):
        args = model_fn, MSELoss(), params, (inputs, None), chunk_size, FisherType.TYPE2
        self.problem = make_problem(*args, has_aux=has_aux)
        self.problem.check_chunks()
        self.linearisation = None

    @classmethod
    def from_batches(
        cls,
        model_fn: Callable[[PyTree, PyTree], Array],
        params: PyTree[Array],
        batches: Iterable[Any],
        *,
        chunk_size: int | None = None,
        has_aux: bool = False,
        progress: bool = False,
    ) -> "BatchesJacobianLinearOperator":
        """Make the Jacobian for an iterable of batches, whose outputs follow each other: `[N, *out]` of all.

        Each product goes over the batches once, on the host, and holds one of them at a time; so do all rows of
        `as_matrix`. Making it takes one pass, which counts examples and calls no model. It works outside of `jit` only.

        Args:
            model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`. It must treat examples independently,
                which is checked on the first batch.
            params: the parameters, a pytree of floating arrays.
            batches: an iterable of `(inputs, targets)` that can be repeated: a list, or a loader, but no generator.
                Targets are ignored, and may be None. It must yield the same data in each pass, in the same order. Sizes
                may differ.
            chunk_size: how many examples of a batch to process at once; None (default) for all.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
            progress: whether to show a bar for each pass (needs tqdm); False by default.

        Returns:
            A `BatchesJacobianLinearOperator`.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them and the batch; for an
                iterator, for no batch at all, for outputs of different shapes, and for passes over different data.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, batches = {"w": jnp.ones((2, 3))}, [(jnp.ones((n, 2)), None) for n in (8, 8, 5)]
            >>> jacobian = ggn_jax.JacobianLinearOperator.from_batches(lambda p, x: x @ p["w"], params, batches)
            >>> jacobian.mv(params).shape, jacobian.T.mv(jnp.ones((21, 3)))["w"].shape
            ((21, 3), (2, 3))
        """

        def make(inputs: PyTree, targets: Any) -> Problem:
            return cls(model_fn, params, inputs, chunk_size=chunk_size, has_aux=has_aux).problem

        return BatchesJacobianLinearOperator(OrderedPasses(make, batches, with_targets=False, progress=progress))

    @classmethod
    def from_objective(
        cls,
        objective: Objective,
        params: PyTree[Array],
        batches: Any,
        *,
        chunk_size: int | None = None,
        has_aux: bool = False,
    ) -> StackedJacobianLinearOperator:
        """Make the Jacobians of an objective's functions, one under the other: `J v` is a tuple of one for each.

        Losses, weights and targets are ignored: with those, the objective's GGN is `sum_k w_k J_k^T H_k J_k`
        (`GGNLinearOperator.from_objective`), and the products of the rows are `GramLinearOperator.from_objective`.

        Args:
            objective: an `Objective`: a sum of functions of the same parameters, each with a weight.
            params: the parameters, a pytree of floating arrays.
            batches: a list with a batch `(inputs, targets)` for each function; they may differ in size, and targets may
                be None.
            chunk_size: how many examples to process at once; None (default) for all.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.

        Returns:
            A `StackedJacobianLinearOperator`.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them, and for a number of
                batches that differs from that of the functions.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, loss = {"w": jnp.ones((2, 1))}, ggn_jax.MSELoss()
            >>> slope = lambda p, x: jnp.ones((len(x), 1)) @ p["w"].T
            >>> objective = ggn_jax.Objective(lambda p, x: x @ p["w"], loss) + 0.5 * ggn_jax.Objective(slope, loss)
            >>> batches = [(jnp.ones((8, 2)), None), (jnp.ones((3, 2)), None)]
            >>> jacobian = ggn_jax.JacobianLinearOperator.from_objective(objective, params, batches)
            >>> [part.shape for part in jacobian.mv(params)], jacobian.as_matrix().shape
            ([(8, 1), (3, 2)], (14, 2))
        """
        made = []
        for i, (term, batch, _) in enumerate(parts_of(objective, batches, None)):
            (inputs, _), mask = unpack_batch(f"batches[{i}]", batch)
            with errors_prefixed(f"batches[{i}]: "):
                refuse_mask(mask)
                made.append(cls(term.model_fn, params, inputs, chunk_size=chunk_size, has_aux=has_aux))
        return StackedJacobianLinearOperator(tuple(made))

    @classmethod
    def _of_problem(cls, problem: Problem) -> Self:
        """The Jacobian of a problem whose arguments have been checked."""
        made = object.__new__(cls)
        object.__setattr__(made, "problem", problem)
        object.__setattr__(made, "linearisation", None)
        return made

    def __repr__(self) -> str:
        return fields(self, params=self.problem.params, outputs=self.problem.outputs)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the parameters."""
        return vectors_like(self.problem.params)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """Return the shape and dtype of the outputs, `[N, *out]`."""
        return self.problem.outputs

    def mv(self, vector: PyTree[Array]) -> Float[Array, "N *out"]:
        """Compute `J v`.

        Args:
            vector: `v`, a pytree of arrays like the parameters.

        Returns:
            An array like the outputs, `[N, *out]`.
        """
        check_vector(self, vector)
        return _jvp(self, vector)

    def vjp(self, u: Float[Array, "N *out"]) -> PyTree[Array]:
        return _vjp(self, u)

    def as_matrix(self) -> Float[Array, "K P"]:
        """Compute the dense matrix.

        Returns:
            An array `[K, P]`, whose rows are outputs in C order, and columns those of
            `jax.flatten_util.ravel_pytree(params)`.
        """
        return _dense_jacobian(self)

    def _linearised(self) -> Linearised:
        """The model's linearisation, kept by `lineax.linearise` or made now."""
        return Linearised.of(self.problem) if self.linearisation is None else self.linearisation


class BatchesJacobianLinearOperator(AbstractJacobian):
    """The Jacobian of the outputs of many batches; made by `JacobianLinearOperator.from_batches`.

    It works outside of `jit` only.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> batches = [(jnp.ones((n, 2)), None) for n in (8, 5)]
        >>> jacobian = ggn_jax.JacobianLinearOperator.from_batches(lambda p, x: x @ p, jnp.ones((2, 3)), batches)
        >>> type(jacobian).__name__, jacobian.as_matrix().shape
        ('BatchesJacobianLinearOperator', (39, 6))
    """

    passes: OrderedPasses = eqx.field(static=True)

    def __repr__(self) -> str:
        return fields(self, params=self.passes.params, outputs=self.passes.outputs)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the parameters."""
        return vectors_like(self.passes.params)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """Return the shape and dtype of the outputs of all batches, `[N, *out]`."""
        return self.passes.outputs

    def mv(self, vector: PyTree[Array]) -> Float[Array, "N *out"]:
        """Compute `J v`, in one pass over the batches.

        Args:
            vector: `v`, a pytree of arrays like the parameters.

        Returns:
            An array like the outputs of all batches, `[N, *out]`.
        """
        check_vector(self, vector)
        check_on_host(vector)
        return jnp.concatenate(self._rows(lambda jacobian: jacobian.mv(vector)))

    def vjp(self, u: Float[Array, "N *out"]) -> PyTree[Array]:
        """Compute `J^T u`, in one pass over the batches.

        Args:
            u: an array like the outputs of all batches, `[N, *out]`.

        Returns:
            A pytree of arrays like the parameters.
        """
        check_on_host(u)
        u = jnp.asarray(u)

        def contribution(problem: Problem, start: int) -> PyTree[Array]:
            found = JacobianLinearOperator._of_problem(problem).vjp(u[start : start + problem.outputs.shape[0]])
            return jax.tree.map(lambda x: x.astype(compute_dtype(x.dtype)), found)

        total = self.passes.sum_over_batches(contribution, "products")
        return jax.tree.map(lambda x, like: x.astype(like.dtype), total, self.passes.params)

    def as_matrix(self) -> Float[Array, "K P"]:
        """Compute the dense matrix, in one pass over the batches.

        Returns:
            An array `[K, P]`, whose rows are outputs in C order, and columns those of
            `jax.flatten_util.ravel_pytree(params)`.
        """
        return jnp.concatenate(self._rows(lambda jacobian: jacobian.as_matrix()))

    def _rows(self, rows: Callable[[JacobianLinearOperator], Array]) -> list[Array]:
        parts: list[Array] = []
        self.passes.sum_over_batches(
            lambda problem, start: parts.append(rows(JacobianLinearOperator._of_problem(problem))), "rows"
        )
        return parts


@jax.jit
@partial(compiler_sharded)
def _jvp(operator: JacobianLinearOperator, v: PyTree[Array]) -> Array:
    return operator._linearised().jvp(v)


@jax.jit
@partial(compiler_sharded, like=lambda operator, u: operator.in_structure())
def _vjp(operator: JacobianLinearOperator, u: Array) -> PyTree[Array]:
    return operator._linearised().vjp(u)


@jax.jit
@compiler_sharded
def _dense_jacobian(operator: JacobianLinearOperator) -> Float[Array, "K P"]:
    linearised, outputs = operator._linearised(), operator.problem.outputs
    zeros = jax.tree.map(jnp.zeros_like, operator.problem.params)
    with jax.numpy_dtype_promotion("standard"):  # parameters may have several dtypes
        flat, unravel = ravel_pytree(zeros)
        count = int(np.prod(outputs.shape))

        def row(u: Array) -> Array:
            return ravel_pytree(linearised.vjp(u.reshape(outputs.shape)))[0].astype(outputs.dtype)

        def column(v: Array) -> Array:
            return linearised.jvp(unravel(v)).reshape(-1)

        # Reverse mode makes rows, forward mode columns: whichever are fewer.
        if count <= flat.size:
            return map_in_batches(row, jnp.eye(count, dtype=outputs.dtype))
        return map_in_batches(column, jnp.eye(flat.size, dtype=flat.dtype)).T


register(JacobianLinearOperator, symmetric=False)
register(BatchesJacobianLinearOperator, symmetric=False)


def with_linearisation(operator: Any) -> Any:
    """An operator with its linearisation kept; without chunks only, and not on a mesh with explicit axes."""
    problem: Problem = operator.problem
    if operator.linearisation is not None or problem.chunks() is not None or explicit_mesh(problem) is not None:
        return operator
    return eqx.tree_at(lambda op: op.linearisation, operator, Linearised.of(problem), is_leaf=lambda leaf: leaf is None)


lx.linearise.register(JacobianLinearOperator, with_linearisation)
