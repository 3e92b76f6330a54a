"""Conjugate gradients on blocks, in matrix form: all groups of a block at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax.kronecker.linalg import norm, safe_max_abs

STEPS = 100
TOLERANCE = 100  # times the dtype's resolution


def refined(mv: Callable[[Array], Array], preconditioner: Any, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
    """`K^-1 M` for a positive definite `K`, with a preconditioner whose `mv` is close to its inverse.

    At most `STEPS` steps, or until each group's residual is below `TOLERANCE * eps` times the norm of its vector.
    Derivatives are those of the solution, and not of the iterations: they are solved for in the same way.
    """
    precondition = jax.lax.stop_gradient(preconditioner).mv
    solved: Array = jax.lax.custom_linear_solve(
        mv, m, lambda mv, m: _conjugate_gradients(mv, precondition, m), symmetric=True
    )
    return solved


def _conjugate_gradients(mv: Callable[[Array], Array], precondition: Callable[[Array], Array], m: Array) -> Array:
    # Scaled to 1, so that squares of small entries do not underflow. All groups go on until the last one is solved.
    size = safe_max_abs(m, (1, 2))[:, None, None]
    m = m / size
    least = TOLERANCE * jnp.finfo(m.dtype).eps * norm(m, (1, 2))

    def inner(x: Array, y: Array) -> Array:
        return jnp.sum(x * y, axis=(1, 2), keepdims=True)

    def over(x: Array, y: Array) -> Array:
        return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)

    def unsolved(state: Any) -> Array:
        step, _, r, _, _ = state
        return (step < STEPS) & jnp.any(norm(r, (1, 2)) > least)

    def advance(state: Any) -> Any:
        step, x, r, p, rz = state
        kp = mv(p)
        length = over(rz, inner(p, kp))
        x, r = x + length * p, r - length * kp
        z = precondition(r)
        new = inner(r, z)
        return step + 1, x, r, z + over(new, rz) * p, new

    z = precondition(m)
    start = jnp.zeros((), jnp.int32), jnp.zeros_like(m), m, z, inner(m, z)
    return jax.lax.while_loop(unsolved, advance, start)[1] * size
