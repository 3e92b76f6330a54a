"""Factorisations of stacks of symmetric matrices, with derivatives; norms that neither overflow nor underflow.

On CPUs, LAPACK is called in a loop (`map_sequentially`), which JAX cannot differentiate. So derivatives are given here,
as products of matrices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ggn_jax._fusion import max_abs
from ggn_jax._precision import full_precision
from ggn_jax.kronecker.inverse import inverse_by_cholesky

RESOLUTION = 4
"""Eigenvalues below `RESOLUTION * eps * largest` count as zero: for zeros, LAPACK returns up to `eps * largest`.

The bound does not grow with the matrix: measured up to size 1500, the rounding does not either, and real spectra have
eigenvalues just above it that a larger bound would lose."""


def zero_below_resolution(
    values: Float[Array, "*shape"], axes: tuple[int, ...] = (-1,), squares: bool = False
) -> Float[Array, "*shape"]:
    """Eigenvalues of positive semi-definite matrices, those below the resolution set to 0; NaN and infinity stay.

    For sums of squares (EKFAC's) the bound is squared: it is what is squared that is known to the resolution.
    """
    bound = RESOLUTION * jnp.finfo(values.dtype).eps
    least = (bound**2 if squares else bound) * jnp.max(values, axis=axes, keepdims=True, initial=0)
    return jnp.where((values <= least) & jnp.isfinite(least), 0, values)


def safe_max_abs(x: Float[Array, "..."], axes: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """`max |x|`, safe to divide by: 1 if all is 0 or anything is not finite; a constant for derivatives."""
    size = jax.lax.stop_gradient(max_abs(x, axes))
    return jnp.where((size > 0) & jnp.isfinite(size), size, 1)


def norm(x: Float[Array, "..."], axes: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The 2-norm, without overflow or underflow of the squares; its derivative at 0 is 0."""
    size = safe_max_abs(x, axes)
    total = jnp.sum((x / (size if axes is None else jnp.expand_dims(size, axes))) ** 2, axis=axes)
    return size * jnp.sqrt(jnp.where(total > 0, total, 1)) * jnp.where(total > 0, 1, total)


def map_sequentially(fn: Callable[..., PyTree[Array]], *stacks: PyTree[Array]) -> PyTree[Array]:
    """`vmap(fn)(*stacks)`; on CPUs in a loop.

    There, the LAPACK calls of a batch share XLA's threads, and with jaxlib 0.10 two such batches at a time deadlock on
    a machine with two cores. A loop takes about as long.
    """

    def loop(*stacks: PyTree[Array]) -> PyTree[Array]:
        return jax.lax.map(lambda members: fn(*members), stacks)

    # Else an outer `vmap` would make a batch of calls again.
    sequential = jax.custom_batching.sequential_vmap(loop)
    return jax.lax.platform_dependent(*stacks, cpu=sequential, default=jax.vmap(fn))


def batched(fn: Callable[[Array], tuple[Array, ...]], matrices: Sequence[Float[Array, "G d d"]]) -> list[Any]:
    """`fn` of each matrix `[d, d]`, batched over all matrices of one size."""
    by_size = BySize(matrices)
    parts = [map_sequentially(fn, joined) for joined in by_size.joined]
    columns = [by_size.split(column) for column in zip(*parts, strict=True)]
    return list(zip(*columns, strict=True))


class BySize:
    """Stacks `[G, ...]`, joined by size and dtype, so that a program has one operation for each size."""

    def __init__(self, stacks: Sequence[Float[Array, "G ..."]]):
        sizes: dict[Any, list[int]] = {}
        for i, x in enumerate(stacks):
            sizes.setdefault((x.shape[1:], x.dtype), []).append(i)
        self.members = list(sizes.values())
        self.lengths = [x.shape[0] for x in stacks]
        self.joined = [jnp.concatenate([stacks[i] for i in members]) for members in self.members]

    @property
    def group_ranges(self) -> list[range]:
        """The groups of each stack, as a range of all groups: of the joined stacks one after the other."""
        order = [i for members in self.members for i in members]
        ends = np.cumsum([self.lengths[i] for i in order])
        return [range(end - self.lengths[i], end) for i, end in sorted(zip(order, ends.tolist(), strict=True))]

    def split(self, joined: Sequence[Float[Array, "G ..."]]) -> list[Float[Array, "G ..."]]:
        """Results for the joined stacks as results for each stack."""
        found: dict[int, Array] = {}
        for members, x in zip(self.members, joined, strict=True):
            start = 0
            for i in members:
                found[i] = x[start : start + self.lengths[i]]
                start += self.lengths[i]
        return [found[i] for i in range(len(found))]


@jax.custom_jvp
def eigh(matrices: list[Float[Array, "G d d"]]) -> list[tuple[Array, Array]]:
    """Eigenvalues `[G, d]`, ascending, and eigenvectors `[G, d, d]` of symmetric matrices.

    Derivatives: `dl_i = q_i^T dX q_i` and `dQ = Q (q_i^T dX q_j / (l_j - l_i))`, without pairs of eigenvalues that are
    equal but for rounding, whose eigenvectors have no derivative. A function that does not depend on the choice of
    eigenvectors still gets its right first derivative if it uses eigenvalues only, or if the pairs left out are of the
    null space of positive semi-definite matrices that stay so: there, `q_i^T dX q_j = 0`.
    """
    return [tuple(found) for found in batched(lambda x: tuple(jnp.linalg.eigh(x)), matrices)]


@eigh.defjvp
def _eigh_jvp(primals: Any, tangents: Any) -> Any:
    found = eigh(*primals)
    changes = []
    for (values, q), dx in zip(found, tangents[0], strict=True):
        inside = rotated(dx, q)
        gaps = values[:, None, :] - values[:, :, None]
        least = RESOLUTION * jnp.finfo(values.dtype).eps * max_abs(values, 1)[:, None, None]
        distinct = jnp.abs(gaps) > least
        rotation = jnp.where(distinct, inside / jnp.where(distinct, gaps, 1), 0)
        changes.append((jnp.diagonal(inside, axis1=1, axis2=2), jnp.einsum("gij,gjk->gik", q, rotation)))
    return found, changes


def rotated(x: Float[Array, "G d d"], q: Float[Array, "G d d"]) -> Float[Array, "G d d"]:
    """`Q^T X Q` of the symmetric part of `X`."""
    x = jnp.einsum("gji,gjk,gkl->gil", q, x, q)
    return (x + jnp.swapaxes(x, 1, 2)) / 2


def rotated_precisely(x: Float[Array, "G d d"], q: Float[Array, "G d d"]) -> Float[Array, "G d d"]:
    """`rotated` in full precision, for what is factorised."""
    x = matmul_precisely(full_precision(partial(jnp.einsum, "gji,gjk->gik"), q, x), q)
    return (x + jnp.swapaxes(x, 1, 2)) / 2


def matmul_precisely(x: Float[Array, "G l m"], y: Float[Array, "G m n"]) -> Float[Array, "G l n"]:
    return full_precision(jnp.matmul, x, y)


@jax.custom_jvp
def inverses(matrices: list[Float[Array, "G d d"]]) -> list[Float[Array, "G d d"]]:
    """The inverses of positive definite matrices, from Cholesky factors; `dX^-1 = -X^-1 dX X^-1`."""
    return [found[0] for found in batched(lambda x: (inverse_by_cholesky(x),), matrices)]


@inverses.defjvp
def _inverses_jvp(primals: Any, tangents: Any) -> Any:
    found = inverses(*primals)
    return found, [-rotated(dx, x) for x, dx in zip(found, tangents[0], strict=True)]
