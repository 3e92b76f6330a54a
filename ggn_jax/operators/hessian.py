"""The Hessian of the loss in the parameters."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from ggn_jax._sharding import vary_like
from ggn_jax.layers.jaxprs import is_reverse_only
from ggn_jax.loss import Loss
from ggn_jax.operators.base import register, vectors_like
from ggn_jax.operators.jacobian import double_vjp_errors_explained
from ggn_jax.operators.passes import DataLinearOperator
from ggn_jax.operators.problem import Problem, make_problem


class HessianLinearOperator(DataLinearOperator):
    """The Hessian of a batch's loss in the parameters, by forward-over-reverse differentiation (Pearlmutter 1994).

    For a model that has reverse-mode derivatives only (`jax.custom_vjp`) it is computed by reverse-over-reverse.

    Symmetric, in general not positive semi-definite: solve with `lineax.GMRES`, `lineax.LSMR` or a dense solver, not
    with CG.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`. With `chunk_size` it must treat examples
            independently (no batch normalisation in training mode), which is checked on two examples outside of `jit`.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Inputs may be a pytree of arrays and of PRNG keys (one for each example, for
            dropout); every leading axis is the batch's, except in `ggn_jax.Unbatched` inputs. Targets must be given.
        chunk_size: how many examples to process at once; None (default) for all. For a sharded batch it counts the
            examples of all devices together: pass a multiple of their number, and each device processes some of its
            own.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> loss = ggn_jax.CrossEntropyLoss()
        >>> hessian = HessianLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, chunk_size=4)
        >>> hessian.as_matrix().shape
        (6, 6)

    References:
        - Pearlmutter (1994), *Fast exact multiplication by the Hessian*, Neural Computation 6(1).
    """

    problem: Problem

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batch: tuple[PyTree, Any],
        *,
        chunk_size: int | None = None,
        has_aux: bool = False,
    ):
        self.problem = make_problem(model_fn, loss, params, batch, chunk_size, has_aux=has_aux)
        self.problem.check_chunks()

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return vectors_like(self.problem.params)

    def _details(self) -> dict[str, Any]:
        return {"loss": self.problem.loss, "outputs": self.problem.outputs}

    def _mv(self, v: PyTree[Array]) -> PyTree[Array]:
        problem = self.problem
        v = vary_like(v, problem.params)

        def product(terms_at: Any, inputs: PyTree, operand: Any) -> PyTree[Array]:
            def value(params: PyTree[Array]) -> Array:
                return terms_at(problem.model_fn(params, inputs), operand).loss_value()

            gradient = jax.grad(value)
            if not problem.reverse_only:
                return jax.jvp(gradient, (problem.params,), (v,))[1]
            with double_vjp_errors_explained():
                # The gradient may have reverse-only rules as well, if a rule calls the function that it belongs to.
                if not is_reverse_only(jax.make_jaxpr(gradient)(problem.params)):
                    return jax.jvp(gradient, (problem.params,), (v,))[1]
                return jax.vjp(gradient, problem.params)[1](v)[0]

        return problem.sum_over_chunks(product)


register(HessianLinearOperator)
