"""Gram matrices of a model's Jacobian: curvature in function space."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import errors_prefixed
from ggn_jax._sharding import compiler_sharded
from ggn_jax._supported import check_exact
from ggn_jax.fisher_type import FisherType
from ggn_jax.layers.check import check_independent
from ggn_jax.layerwise.batches import BatchesGramLinearOperator
from ggn_jax.layerwise.space import Function, Functions, FunctionSpaceLinearOperator, matrix, product, solve
from ggn_jax.loss import Loss
from ggn_jax.losses import MSELoss
from ggn_jax.objective import Objective, array_weights, parts_of
from ggn_jax.operators.base import check_vector, register, vectors_like
from ggn_jax.operators.batches import check_unbatched
from ggn_jax.operators.outputs import with_linearisation
from ggn_jax.operators.problem import Problem, make_problem

T = TypeVar("T")


class GramLinearOperator(FunctionSpaceLinearOperator):
    """The matrix `J J^T` of a model's Jacobian `J`, or `S^T J J^T S` with a loss's square root `S`.

    It acts on arrays `[N, *out]`.

    With the loss it has the eigenvalues of the GGN `J^T S S^T J` other than 0 (`GGNLinearOperator`), so that a solve
    with the damped GGN, `solve_ggn`, is one of the size of the outputs, cheaper where there are fewer outputs than
    parameters:

    ```
    (J^T S S^T J + D)^-1 v = D^-1 (v - J^T S (S^T J D^-1 J^T S + I)^-1 S^T J D^-1 v)
    ```

    Without a loss, `J J^T` is the empirical neural tangent kernel (Jacot et al. 2018). `from_objective` makes it for
    the outputs of several functions.

    `centred=True` subtracts the mean over examples from the rows of `J`, for each entry of an output: `S^T C J J^T C S`
    with `C = I - 1 1^T / N`, and the matrix in parameters that `solve_ggn` solves with is the covariance
    `J^T C S S^T C J`. For `log |psi|` of samples it is stochastic reconfiguration, whose kernel trick this is (minSR;
    Chen & Heyl 2024).

    Products need no matrix: one linearisation of the model, a cotangent and a tangent. `as_matrix` is made of sums over
    layers of `(a a^T) o (g g^T)`, `a` a layer's inputs and `g` the gradients of each output in the layer's outputs,
    wherever that takes less than the rows of `J`: no gradient of an example in the parameters is formed there.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`. For `as_matrix` and `solve_ggn`, and with
            `chunk_size`, it must treat examples independently, which is checked outside of `jit`.
        params: the parameters, a pytree of floating arrays.
        inputs: a batch of inputs, perhaps a pytree, whose leading axes are the batch's.
        loss: a `Loss`, whose `S` is that of the whole batch; None (default) for `J J^T`. With a `JointLoss`, vectors
            are `[N, K]`, all outputs of an example.
        targets: the batch's targets; None (default) where the loss's curvature depends on none.
        centred: whether to subtract the mean over examples from `J`; False by default.
        chunk_size: how many examples to process at once; None (default) for all.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x, y = {"w": jnp.ones((20, 3)) / 20}, jnp.eye(8, 20), jnp.arange(8) % 3
        >>> model_fn, loss = lambda p, x: jnp.tanh(x @ p["w"]), ggn_jax.CrossEntropyLoss()
        >>> gram = GramLinearOperator(model_fn, params, x, loss=loss, targets=y)
        >>> gram.as_matrix().shape
        (24, 24)
        >>> step = gram.solve_ggn(params, damping=0.1)
        >>> ggn = ggn_jax.GGNLinearOperator(model_fn, loss, params, (x, y))
        >>> bool(jnp.allclose(ggn.damped(0.1).mv(step)["w"], params["w"], atol=1e-5))
        True

    References:
        - Jacot, Gabriel and Hongler (2018), *Neural tangent kernel: convergence and generalization in neural networks*:
          https://arxiv.org/abs/1806.07572
        - Chen and Heyl (2024), *Empowering deep neural quantum states through efficient optimization*:
          https://arxiv.org/abs/2302.01941
    """

    functions: tuple[Function, ...]
    several: bool = eqx.field(static=True)
    """Whether vectors are tuples, with an array for each function."""

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        params: PyTree[Array],
        inputs: PyTree[Array],
        *,
        loss: Loss | None = None,
        targets: Any = None,
        centred: bool = False,
        chunk_size: int | None = None,
        has_aux: bool = False,
    ):
        if loss is None and targets is not None:
            raise ValueError("targets are for a loss: pass loss=... as well, or leave them out for J J^T.")
        self.functions = (_function(model_fn, loss, params, (inputs, targets), None, centred, chunk_size, has_aux),)
        self.several = False

    @classmethod
    def from_batches(
        cls,
        model_fn: Callable[[PyTree, PyTree], Array],
        params: PyTree[Array],
        batches: Iterable[Any],
        *,
        loss: Loss | None = None,
        centred: bool = False,
        chunk_size: int | None = None,
        has_aux: bool = False,
        progress: bool = False,
    ) -> BatchesGramLinearOperator:
        """Make the operator of an iterable of batches, whose outputs follow each other, as if they were one batch.

        One batch is held at a time, and, for all batches together, only what has the outputs' size: outputs and
        targets, which the first pass collects, vectors, and the dense matrix where it is made. A product takes two
        passes, by `J^T` and by `J`; `as_matrix` takes one for each batch, with the rows of that and the columns of
        those after it, and `solve_ggn` two more. All run on the host, outside of `jit` only.

        Args:
            model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`. It must treat examples independently,
                which is checked on the first batch.
            params: the parameters, a pytree of floating arrays.
            batches: an iterable of `(inputs, targets)` that yields the same data in each pass, in the same order; sizes
                may differ.
            loss: a `Loss` without weights for single examples, whose mean is over the terms of all batches; None
                (default) for `J J^T`, which ignores targets.
            centred: whether to subtract the mean over all examples from the rows of `J`; False by default.
            chunk_size: how many examples of a batch to process at once; None (default) for all.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
            progress: whether to show a bar for each pass (needs tqdm); False by default.

        Returns:
            A `BatchesGramLinearOperator`.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them and the batch; for an
                iterator, for no batch at all, for outputs of different shapes, and for passes over different data.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, loss = {"w": jnp.ones((20, 3)) / 20}, ggn_jax.CrossEntropyLoss()
            >>> batches = [(jnp.eye(n, 20), jnp.arange(n) % 3) for n in (8, 8, 5)]
            >>> model_fn = lambda p, x: jnp.tanh(x @ p["w"])
            >>> gram = ggn_jax.GramLinearOperator.from_batches(model_fn, params, batches, loss=loss)
            >>> gram.as_matrix().shape, gram.solve_ggn(params, damping=0.1)["w"].shape
            ((63, 63), (20, 3))
        """

        def make(inputs: PyTree, targets: Any) -> Problem:
            problem = _function(model_fn, loss, params, (inputs, targets), None, centred, chunk_size, has_aux).problem
            check_unbatched(problem)
            return problem

        return BatchesGramLinearOperator(make, loss, batches, centred, progress)

    @classmethod
    def from_objective(
        cls,
        objective: Objective,
        params: PyTree[Array],
        batches: Any,
        *,
        centred: bool = False,
        chunk_size: int | None = None,
        has_aux: bool = False,
    ) -> Self:
        """Make the operator of all functions of an objective, each with the root of its loss and of its weight.

        Vectors are tuples, with an array like its outputs for each function. With `X = (sqrt(w_k) J_k^T S_k)_k`, side
        by side, it is `X^T X`, and `solve_ggn` solves with `X X^T = sum_k w_k J_k^T H_k J_k`, the objective's GGN.
        Inner products between two functions use the layers that both lay out alike, as within one function.

        Args:
            objective: an `Objective`: a sum of functions of the same parameters, each with a weight.
            params: the parameters, a pytree of floating arrays.
            batches: a list with a batch `(inputs, targets)` for each function; they may differ in size.
            centred: whether to subtract, in each function, the mean over its examples from the rows of `J`; False by
                default.
            chunk_size: how many examples to process at once; None (default) for all.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.

        Returns:
            The operator.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them, and for a number of
                batches that differs from that of the functions.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, loss = {"w": jnp.ones((20, 1)) / 20}, ggn_jax.MSELoss()
            >>> value, slope = (lambda p, x: jnp.tanh(x @ p["w"])), (lambda p, x: 1 - jnp.tanh(x @ p["w"]) ** 2)
            >>> objective = ggn_jax.Objective(value, loss) + 0.5 * ggn_jax.Objective(slope, loss)
            >>> batches = [(jnp.eye(n, 20), jnp.zeros((n, 1))) for n in (8, 3)]
            >>> gram = ggn_jax.GramLinearOperator.from_objective(objective, params, batches)
            >>> gram.as_matrix().shape, gram.solve_ggn(params, damping=0.1)["w"].shape
            ((11, 11), (20, 1))
        """
        functions = []
        weights = array_weights(objective) if isinstance(objective, Objective) else []
        for i, (term, batch, _) in enumerate(parts_of(objective, batches, None)):
            with errors_prefixed(f"batches[{i}]: "):
                args = term.model_fn, term.loss, params, tuple(batch) if isinstance(batch, list) else batch
                functions.append(_function(*args, weights[i], centred, chunk_size, has_aux))
        made = object.__new__(cls)
        object.__setattr__(made, "functions", tuple(functions))
        object.__setattr__(made, "several", True)
        return made

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shape and dtype of the outputs, `[N, *out]`, or a tuple of them, one for each function."""
        return self._like([f.problem.outputs for f in self.functions])

    def _details(self) -> dict[str, Any]:
        first = self.functions[0]
        loss = {"loss": first.problem.loss} if first.with_loss else {}
        return {**({"functions": len(self.functions)} if self.several else loss), "centred": first.centred}

    def _like(self, parts: Sequence[T]) -> PyTree[T]:
        """A vector of an array for each function."""
        return tuple(parts) if self.several else parts[0]

    def mv(self, vector: PyTree[Float[Array, "N *out"]]) -> PyTree[Float[Array, "N *out"]]:
        """Compute the product with a vector.

        Args:
            vector: an array like the outputs, `[N, *out]`, or a tuple of one for each function.

        Returns:
            An array, or a tuple of arrays, like `vector`.
        """
        check_vector(self, vector, "output")
        return _product(self, vector)

    def as_matrix(self) -> Float[Array, "K K"]:
        """Compute the dense matrix.

        Returns:
            An array `[K, K]`, with rows and columns in the order of the outputs' entries (C order).
        """
        self._check_independent()
        return _dense(self)

    def _params(self) -> PyTree[jax.ShapeDtypeStruct]:
        return vectors_like(self.functions[0].problem.params)

    def _solve(self, v: PyTree[Array], number: Array, damping: PyTree[Array] | None) -> PyTree[Array]:
        self._check_independent()
        return _solve(self, v, number, damping)

    def _check_independent(self) -> None:
        way_out = "use products with the operator, which take such a model"
        for f in self.functions:
            problem = f.problem
            check_independent(problem.model_fn, problem.params, problem.inputs, problem.outputs.dtype, way_out)


def _function(
    model_fn: Any, loss: Any, params: Any, batch: Any, weight: Any, centred: Any, chunk_size: Any, has_aux: bool
) -> Function:
    """One function, after all checks."""
    if not isinstance(centred, bool):
        raise TypeError(f"centred must be True or False; got {centred!r}.")
    if loss is not None:
        check_exact(loss)
    chosen = MSELoss() if loss is None else loss
    problem = make_problem(model_fn, chosen, params, batch, chunk_size, FisherType.TYPE2, has_aux=has_aux)
    problem.check_chunks()
    problem.check_curvature()
    return Function(problem, None, weight, loss is not None, centred)


register(GramLinearOperator, positive_semidefinite=True)


@lx.linearise.register(GramLinearOperator)
def _linearise(operator: GramLinearOperator) -> GramLinearOperator:
    kept = tuple(with_linearisation(f) for f in operator.functions)
    return eqx.tree_at(lambda op: op.functions, operator, kept)


@jax.jit
@partial(compiler_sharded, like=lambda operator, u: u)
def _product(operator: GramLinearOperator, u: PyTree[Array]) -> PyTree[Array]:
    return operator._like(product(Functions(operator.functions), jax.tree.leaves(u)))


@eqx.filter_jit
@compiler_sharded
def _dense(operator: GramLinearOperator) -> Float[Array, "K K"]:
    """In the dtype of the outputs; made in at least float32."""
    outputs = [f.problem.outputs.dtype for f in operator.functions]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*outputs)
    return matrix(Functions(operator.functions)).astype(dtype)


@eqx.filter_jit
@partial(compiler_sharded, like=lambda operator, *_: operator._params())
def _solve(
    operator: GramLinearOperator, v: PyTree[Array], number: Array, damping: PyTree[Array] | None
) -> PyTree[Array]:
    return solve(Functions(operator.functions), v, number, damping)
