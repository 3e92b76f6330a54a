"""Products with the Jacobian of a model's outputs in its parameters, and with its transpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._sharding import vary_like
from ggn_jax.operators.problem import Problem


class Jacobian(eqx.Module):
    """`J` at a problem's parameters, for some inputs: one linearisation, forward or reverse."""

    outputs: Array
    params: PyTree[Array]
    linear: Callable[..., Any]
    """`v -> J v`, or `u -> (J^T u,)` for a model that has reverse-mode derivatives only."""
    reverse_only: bool = eqx.field(static=True)

    @classmethod
    def of(cls, problem: Problem, inputs: PyTree) -> "Jacobian":
        make = jax.vjp if problem.reverse_only else jax.linearize
        outputs, linear = make(lambda params: problem.model_fn(params, inputs), problem.params)
        return cls(outputs, problem.params, linear, problem.reverse_only)

    def jvp(self, v: PyTree[Array]) -> Array:
        """`J v`."""
        if not self.reverse_only:
            return self.linear(v)
        # Two VJPs: `v -> J v` is the transpose of the derivative of the linear map `u -> J^T u`. That is the same at
        # every `u`, but for 0, where a rule written by hand may skip a division.
        somewhere = vary_like(jnp.ones_like(self.outputs), self.outputs)
        with double_vjp_errors_explained():
            return jax.vjp(self.vjp, somewhere)[1](v)[0]

    def vjp(self, u: Array) -> PyTree[Array]:
        """`J^T u`."""
        transpose = self.linear if self.reverse_only else jax.linear_transpose(self.linear, self.params)
        return transpose(u)[0]


@contextmanager
def double_vjp_errors_explained() -> Iterator[None]:
    """Explain the alternatives, if a user's derivative rule cannot be differentiated itself."""
    try:
        yield
    except Exception as error:
        raise NotImplementedError(
            f"model_fn has a jax.custom_vjp whose bwd rule cannot be differentiated itself ({error}), which products"
            " with the GGN and the Hessian need. KFACLinearOperator, EKFACLinearOperator, GGNDiagonalLinearOperator and"
            " EFLinearOperator do not, nor does kfac with numbers or schedules as learning rate and damping."
            " Or use a function that JAX can differentiate twice: with a rule of jax.custom_jvp, or as"
            " jax.nn.dot_product_attention(..., implementation='xla')."
        ) from error
