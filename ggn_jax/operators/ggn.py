"""The generalized Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from ggn_jax._checks import check_sampling
from ggn_jax._draws import example_keys
from ggn_jax._fusion import fusion_boundary
from ggn_jax._sharding import explicit_mesh, vary_like
from ggn_jax._supported import check_exact
from ggn_jax.fisher_type import FisherType
from ggn_jax.loss import Loss
from ggn_jax.operators.base import (
    SymmetricLinearOperator,
    check_vector,
    register,
    vectors_like,
)
from ggn_jax.operators.jacobian import Jacobian
from ggn_jax.operators.passes import DataLinearOperator
from ggn_jax.operators.problem import Problem, make_problem
from ggn_jax.terms import Terms


class GGNLinearOperator(DataLinearOperator):
    """The generalized Gauss-Newton matrix (GGN) `J^T H J` of a batch's loss in the parameters (Schraudolph 2002).

    `J` is the Jacobian of the model's outputs in the parameters, `H` the Hessian of the loss in the outputs: both of
    the whole batch, so reduction, class weights, masks and smoothing are exact. For losses that are a log-likelihood of
    the exponential family it is the Fisher matrix (Martens 2020). Positive semi-definite.

    A product is one linearisation of the model (forward), one tangent, the closed-form product with `H`, and one
    cotangent: about 5/3 of a gradient for matrix-multiplication models. Inside a solver, `lineax.linearise(operator)`
    keeps the linearisation for all products.

    lineax's `CG` takes `p^T A p <= 100 eps P (r^T z)` for a breakdown and returns NaN. In float32 with P = 10,000
    parameters that is any curvature below 0.1: pass `options={"preconditioner": diagonal.damped(x).inverse(scale=1e3)}`
    (`GGNDiagonalLinearOperator`), whose scale changes this threshold and nothing else.

    Where the model has reverse-mode derivatives only (`jax.custom_vjp`, as fused attention), the tangent is the
    derivative of the cotangent, transposed: this requires a rule that can be differentiated itself.

    With `mc_samples`, `H` is replaced by its Monte-Carlo estimate from sampled gradients: unbiased, and with the same
    samples for every product and every `chunk_size`.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`. With `chunk_size` it must treat examples
            independently (no batch normalisation in training mode), which is checked on two examples outside of `jit`.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Inputs may be a pytree of arrays and of PRNG keys (one for each example, for
            dropout); every leading axis is the batch's, except in `ggn_jax.Unbatched` inputs. Targets may be None where
            the loss's curvature and weights depend on none (no class weights, no `pos_weight`): nothing is ignored
            then.
        mc_samples: the number of Monte-Carlo samples; 0 (default) for the exact matrix.
        key: a PRNG key for `mc_samples`; ignored without.
        chunk_size: how many examples to process at once; None (default) for all. For a sharded batch it counts the
            examples of all devices together: pass a multiple of their number, and each device processes some of its
            own.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax, jax.numpy as jnp, lineax as lx
        >>> import ggn_jax
        >>> def model_fn(params, x):
        ...     return jnp.tanh(x @ params["w"]) @ params["v"]
        >>> params = {"w": jnp.ones((2, 3)) / 2, "v": jnp.ones((3, 4)) / 3}
        >>> batch = jnp.ones((8, 2)), jnp.arange(8) % 4
        >>> ggn = GGNLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), params, batch)
        >>> gradient = jax.grad(lambda params: ggn_jax.CrossEntropyLoss()(model_fn(params, batch[0]), batch[1]))(params)
        >>> step = lx.linear_solve(ggn.damped(0.1), gradient, lx.CG(rtol=1e-4, atol=1e-4)).value
        >>> ggn.as_matrix().shape
        (18, 18)

    References:
        - Schraudolph (2002), *Fast curvature matrix-vector products for second-order gradient descent*, Neural
          Computation 14(7).
        - Martens (2020), *New insights and perspectives on the natural gradient method*:
          https://arxiv.org/abs/1412.1193
    """

    problem: Problem
    key: Array | None
    start: Array
    """The number of the first example, for sampling."""
    mc_samples: int = eqx.field(static=True)

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batch: tuple[PyTree, Any],
        *,
        mc_samples: int = 0,
        key: Any = None,
        chunk_size: int | None = None,
        has_aux: bool = False,
    ):
        mc_samples, key = check_sampling(mc_samples, key, wanted_by="GGNLinearOperator")
        fisher_type = FisherType.MC if mc_samples else FisherType.TYPE2
        self.problem = make_problem(model_fn, loss, params, batch, chunk_size, fisher_type, has_aux=has_aux)
        if not mc_samples:
            check_exact(loss)
        self.problem.check_chunks()
        self.problem.check_curvature()
        self.key, self.start, self.mc_samples = key, jnp.zeros((), jnp.int32), mc_samples

    def _for_batch(self, inputs: PyTree[Array], targets: Array, start: int) -> Self:
        operator = super()._for_batch(inputs, targets, start)
        return eqx.tree_at(lambda op: op.start, operator, jnp.asarray(start, jnp.int32))

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return vectors_like(self.problem.params)

    def _details(self) -> dict[str, Any]:
        return {"loss": self.problem.loss, "outputs": self.problem.outputs, "mc_samples": self.mc_samples}

    def _mv(self, v: PyTree[Array]) -> PyTree[Array]:
        problem = self.problem
        v = vary_like(v, problem.params)

        def product(terms_at: Any, inputs: PyTree, operand: Any, *keys: Array) -> PyTree[Array]:
            jacobian = Jacobian.of(problem, inputs)
            return jacobian.vjp(self._curve(terms_at(jacobian.outputs, operand), keys, jacobian.jvp(v)))

        return problem.sum_over_chunks(product, *self._keys())

    def _keys(self) -> tuple[Array, ...]:
        if self.key is None:
            return ()
        return (example_keys(self.key, self.start, self.problem.outputs.shape[0]),)

    def _curve(self, terms: Terms, keys: tuple[Array, ...], tangent: Array) -> Array:
        """The loss Hessian times `tangent`."""
        # Else XLA fuses the model's last matrix product with the loss's reductions, which is slow on CPUs.
        tangent = fusion_boundary(tangent)
        if not keys:
            return terms.product("mv", tangent)
        vectors = terms.sampled_gradients(keys[0], self.mc_samples)
        # Each example has its own vectors, of its outputs: the inner products are for each example.
        axes = tuple(range(2, vectors.ndim))
        inner = jnp.sum(vectors * tangent.astype(vectors.dtype)[None], axis=axes, keepdims=True)
        return jnp.mean(inner * vectors, axis=0).astype(terms.dtype)


register(GGNLinearOperator, positive_semidefinite=True)


class LinearisedGGNLinearOperator(SymmetricLinearOperator):
    """`GGNLinearOperator` with its linearisation kept; made by `lineax.linearise`."""

    operator: GGNLinearOperator
    jacobian: Jacobian

    def __init__(self, operator: GGNLinearOperator):
        self.operator, self.jacobian = operator, Jacobian.of(operator.problem, operator.problem.inputs)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.in_structure()

    def _details(self) -> dict[str, Any]:
        return self.operator._details()

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """The product with `vector`, a pytree like the parameters."""
        check_vector(self, vector)
        problem = self.operator.problem
        vector = vary_like(vector, problem.params)

        def product(terms_at: Any, inputs: PyTree, operand: Any, *keys: Array) -> PyTree[Array]:
            terms = terms_at(self.jacobian.outputs, operand)
            return self.jacobian.vjp(self.operator._curve(terms, keys, self.jacobian.jvp(vector)))

        return problem.sum_over_chunks(product, *self.operator._keys())


register(LinearisedGGNLinearOperator, positive_semidefinite=True)


@lx.linearise.register(GGNLinearOperator)
def _linearise(operator: GGNLinearOperator) -> lx.AbstractLinearOperator:
    """The same products from one linearisation.

    With chunks, which are for saving memory, the operator itself; and so on a mesh with explicit axes, on which the
    model can only run inside `mv`.
    """
    as_it_is = operator.problem.chunk_size is not None or explicit_mesh(operator.problem) is not None
    return operator if as_it_is else LinearisedGGNLinearOperator(operator)
