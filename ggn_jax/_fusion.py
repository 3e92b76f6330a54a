"""Boundaries for the compiler's fusion."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def fusion_boundary(x: Array) -> Array:
    """`x` itself, computed by itself.

    XLA's CPU compiler fuses a network's matrix products with the reductions of the loss that follow, into code that is
    several times slower than both; its optimization barrier is gone by then. Rounding to the precision that `x` has is
    the identity, and not fused.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def stack_scalars(parts: Sequence[Shaped[Array, ""]]) -> Shaped[Array, " n"]:
    """The numbers as one vector in memory, to be reduced.

    XLA turns the reduction of a concatenation into a chain over all of its parts, and its CPU compiler copies that
    chain into every fusion that reads the result: a program of `n` parts and `n` readers grows as `n^2`.
    """
    stacked: Array = jax.lax.optimization_barrier(jnp.stack(parts))
    return stacked


def max_abs(x: Shaped[Array, "..."], axis: int | Sequence[int] | None = None) -> Shaped[Array, "..."]:
    """`max |x|`, NaN where there is one: finite if all is, 0 if all is.

    XLA's CPU compiler takes thirty times longer to build a reduction of truth values, which it cuts into windows.
    """
    found: Array = jnp.max(jnp.abs(x), axis=axis if axis is None or isinstance(axis, int) else tuple(axis), initial=0)
    return found


def seal(x: Shaped[Array, ""]) -> Shaped[Array, ""]:
    """`x` itself, a number that many arrays are computed from.

    XLA's CPU compiler copies cheap arithmetic into every fusion that reads its result; a reduction is not copied.
    """
    found: Array = jnp.max(stack_scalars([x, x]))
    return found


def split_rows(x: Shaped[Array, "k ..."]) -> list[Shaped[Array, "..."]]:
    """`[x[0], x[1], ...]`, so that what is done with each row compiles to one program for all of them on a CPU.

    XLA's CPU compiler generates code once for fusions that are equal. Slices at constant places are not; slices at a
    counter that the compiler cannot see through are.
    """

    def counted(x: Array) -> list[Array]:
        row, rows = seal(jnp.zeros((), jnp.int32)), []
        for _ in range(x.shape[0]):
            rows.append(jax.lax.dynamic_index_in_dim(x, row, keepdims=False))
            row = seal(row + 1)
        return rows

    found: list[Array] = jax.lax.platform_dependent(x, cpu=counted, default=list)
    return found
