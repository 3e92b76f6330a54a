"""Gram matrices of a model's Jacobian: curvature in function space."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import compute_dtype, is_concrete
from ggn_jax._sharding import compiler_sharded
from ggn_jax._supported import check_exact
from ggn_jax.fisher_type import FisherType
from ggn_jax.layers.check import check_independent
from ggn_jax.layerwise.dots import dense_gram
from ggn_jax.loss import Loss
from ggn_jax.losses import MSELoss
from ggn_jax.operators.base import SymmetricLinearOperator, check_number, check_vector, register, vectors_like
from ggn_jax.operators.outputs import Linearised, with_linearisation
from ggn_jax.operators.problem import Problem, make_problem
from ggn_jax.terms import Terms, split_terms


class GramLinearOperator(SymmetricLinearOperator):
    r"""`J J^T` of a model's Jacobian `J`, or `S^T J J^T S` with a loss's square root `S`; on arrays `[N, *out]`.

    With the loss it has the eigenvalues of the GGN `J^T S S^T J` other than 0 (`GGNLinearOperator`), so that a solve
    with the damped GGN is one of the size of the outputs: cheaper where there are fewer outputs than parameters,

    ```
    (J^T S S^T J + d I)^-1 v = (v - J^T S (S^T J J^T S + d I)^-1 S^T J v) / d
    ```

    which is `solve_ggn`. Without a loss, `J J^T` is the empirical neural tangent kernel (Jacot et al. 2018).

    `centred=True` subtracts the mean over examples from the rows of `J`, for each entry of an output: `S^T C J J^T C S`
    with `C = I - 1 1^T / N`, and the matrix in parameters that `solve_ggn` solves with is the covariance `J^T C S S^T C
    J`. For `log |psi|` of samples it is stochastic reconfiguration, whose kernel trick this is (minSR; Chen & Heyl
    2024).

    Products need no matrix: one linearisation of the model, a cotangent and a tangent. `as_matrix` is made of sums over
    layers of `(a a^T) o (g g^T)`, `a` a layer's inputs and `g` the gradients of each output in the layer's outputs,
    wherever that takes less than the rows of `J`: no gradient of an example in the parameters is formed there.

    **Arguments:**

    - `model_fn`, `params`, `inputs`, `chunk_size`, `has_aux`: as for `JacobianLinearOperator`. For `as_matrix` and
      `solve_ggn` the model must treat examples independently, which is checked outside of `jit`.
    - `loss`, `targets`: a `Loss` and a batch of targets; `S` is that of the loss of the whole batch. Targets may be
      None where its curvature depends on none. With a `JointLoss`, vectors are `[N, K]`, all outputs of an example.
    - `centred`: whether to subtract the mean over examples from `J`.

    **Raises:** ValueError, TypeError or NotImplementedError for arguments that do not fit, naming them.

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
    """

    problem: Problem
    kept: Linearised | None
    with_loss: bool = eqx.field(static=True)
    centred: bool = eqx.field(static=True)

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
        if not isinstance(centred, bool):
            raise TypeError(f"centred must be True or False; got {centred!r}.")
        if loss is not None:
            check_exact(loss)
        chosen = MSELoss() if loss is None else loss
        args = model_fn, chosen, params, (inputs, targets), chunk_size, FisherType.TYPE2
        self.problem = make_problem(*args, has_aux=has_aux)
        self.problem.check_chunks()
        self.problem.check_curvature()
        self.with_loss, self.centred, self.kept = loss is not None, centred, None

    def in_structure(self) -> jax.ShapeDtypeStruct:
        return self.problem.outputs

    def _details(self) -> dict[str, Any]:
        loss = {"loss": self.problem.loss} if self.with_loss else {}
        return {**loss, "centred": self.centred}

    def mv(self, vector: Float[Array, "N *out"]) -> Float[Array, "N *out"]:
        """The product with `vector`, an array like the outputs."""
        check_vector(self, vector, "output")
        return _product(self, vector)

    def as_matrix(self) -> Float[Array, "K K"]:
        """The dense matrix, rows and columns in the order of the outputs' entries (C order)."""
        self._check_independent()
        return _dense(self).astype(self.problem.outputs.dtype)

    def solve_ggn(self, vector: PyTree[Array], damping: Any) -> PyTree[Array]:
        """`(J^T S S^T J + damping I)^-1 vector`, by a Cholesky factorisation of the size of the outputs.

        `J^T J` without a loss, and of the centred Jacobian with `centred`. In float32, choose `damping` well above 1e-6
        times the largest eigenvalue; what is left of `vector` is divided by it.

        Args:
            vector: a pytree like the parameters.
            damping: a number above 0.

        Returns:
            A pytree like the parameters.

        Raises:
            ValueError: for a vector that is not like the parameters, or a damping that is not above 0.
        """
        damping = check_number("damping", damping)
        if is_concrete(damping) and not damping > 0:
            raise ValueError(f"damping must be above 0; got {damping}.")
        check_vector(lx.IdentityLinearOperator(vectors_like(self.problem.params)), vector)
        self._check_independent()
        return _solve(self, vector, damping)

    def _check_independent(self) -> None:
        problem, way_out = self.problem, "use products with the operator, which take such a model"
        check_independent(problem.model_fn, problem.params, problem.inputs, problem.outputs.dtype, way_out)

    def _linearised(self) -> Linearised:
        return Linearised.of(self.problem) if self.kept is None else self.kept

    def _root(self, outputs: Array) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """`u -> C S u` and `u -> S^T C u`."""
        problem = self.problem
        terms: Terms | None = None
        if self.with_loss:
            terms = split_terms(problem.loss, outputs, problem.targets, batch=True)

        def centre(u: Array) -> Array:
            return u - jnp.mean(u, axis=0, keepdims=True) if self.centred else u

        def right(u: Array) -> Array:
            return centre(u if terms is None else terms.product("sqrt_mv", u))

        def left(u: Array) -> Array:
            return centre(u) if terms is None else terms.product("sqrt_rmv", centre(u))

        return right, left


register(GramLinearOperator, positive_semidefinite=True)
lx.linearise.register(GramLinearOperator, with_linearisation)


@jax.jit
@partial(compiler_sharded, like=lambda operator, u: u)
def _product(operator: GramLinearOperator, u: Array) -> Array:
    linearised = operator._linearised()
    right, left = operator._root(linearised.outputs())
    return left(linearised.jvp(linearised.vjp(right(u))))


@eqx.filter_jit
@compiler_sharded
def _dense(operator: GramLinearOperator) -> Float[Array, "K K"]:
    """In at least float32."""
    return _matrix(operator, operator._linearised())


def _matrix(operator: GramLinearOperator, linearised: Linearised) -> Float[Array, "K K"]:
    gram = dense_gram(operator.problem)
    if operator.with_loss or operator.centred:
        _, left = operator._root(linearised.outputs())
        shape = operator.problem.outputs.shape
        for _ in range(2):  # a symmetric matrix, from both sides
            gram = jax.vmap(lambda row: left(row.reshape(shape)).reshape(-1))(gram).astype(gram.dtype).T
    return gram


@eqx.filter_jit
@partial(compiler_sharded, like=lambda operator, v, damping: vectors_like(operator.problem.params))
def _solve(operator: GramLinearOperator, v: PyTree[Array], damping: Array) -> PyTree[Array]:
    linearised = operator._linearised()
    right, left = operator._root(linearised.outputs())
    gram = _matrix(operator, linearised)
    wide, outputs = compute_dtype(gram.dtype), operator.problem.outputs
    damped = gram + damping.astype(wide) * jnp.eye(len(gram), dtype=wide)
    inner = left(linearised.jvp(v)).reshape(-1).astype(wide)
    found = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped, lower=True), inner)
    back = linearised.vjp(right(found.reshape(outputs.shape).astype(outputs.dtype)))
    return jax.tree.map(lambda x, y: (x - y) / damping.astype(x.dtype), v, back)
