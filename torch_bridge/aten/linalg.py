"""Linear algebra, without results that are not unique, such as eigenvectors."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from torch_bridge.aten.reductions import vector_norm
from torch_bridge.aten.registry import aten


@aten("linalg_vecdot")
def vecdot(x: Array, y: Array, *, dim: int = -1) -> Array:
    return jnp.sum(jnp.conj(x) * y, axis=dim)


@aten("trace")
def trace(x: Array) -> Array:
    return jnp.trace(x)


@aten("kron")
def kron(x: Array, y: Array) -> Array:
    return jnp.kron(x, y)


@aten("linalg_multi_dot", "chain_matmul")
def multi_dot(matrices: Sequence[Array]) -> Array:
    return functools.reduce(jnp.matmul, matrices)


@aten("matrix_exp", "linalg_matrix_exp")
def matrix_exp(x: Array) -> Array:
    fn = jax.scipy.linalg.expm
    for _ in range(x.ndim - 2):
        fn = jax.vmap(fn)
    return fn(x)


@aten("linalg_matrix_power", "matrix_power")
def matrix_power(x: Array, n: int) -> Array:
    return jnp.linalg.matrix_power(x, n)


@aten("linalg_inv", "inverse")
def inv(x: Array) -> Array:
    return jnp.linalg.inv(x)


@aten("linalg_det", "det")
def det(x: Array) -> Array:
    return jnp.linalg.det(x)


@aten("linalg_slogdet", "slogdet")
def slogdet(x: Array) -> tuple[Array, Array]:
    sign, value = jnp.linalg.slogdet(x)
    return sign, value


@aten("logdet")
def logdet(x: Array) -> Array:
    sign, value = jnp.linalg.slogdet(x)
    return jnp.where(sign < 0, jnp.nan, value)


@aten("linalg_cholesky", "cholesky")
def cholesky(x: Array, upper: bool = False) -> Array:
    return jnp.linalg.cholesky(x, upper=upper, symmetrize_input=True)


@aten("cholesky_solve")
def cholesky_solve(x: Array, factor: Array, upper: bool = False) -> Array:
    return jax.scipy.linalg.cho_solve((factor, not upper), x)


@aten("linalg_solve")
def solve(a: Array, b: Array, *, left: bool = True) -> Array:
    if b.ndim == a.ndim - 1 and b.shape == a.shape[:-1]:
        return jnp.linalg.solve(a, b[..., None])[..., 0]
    if left:
        return jnp.linalg.solve(a, b)
    return jnp.linalg.solve(a.mT, b.mT).mT


@aten("linalg_solve_triangular")
def solve_triangular(a: Array, b: Array, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Array:
    shape = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(x, (*shape, *x.shape[-2:])) for x in (a, b))
    return jax.lax.linalg.triangular_solve(a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular)


@aten("linalg_eigvalsh")
def eigvalsh(x: Array, UPLO: str = "L") -> Array:  # noqa: N803  # the schema's name
    """The eigenvalues of the matrix given by one triangle, with the derivative in both triangles, as in torch."""
    lower = jnp.tril(x if UPLO.upper() == "L" else jnp.conj(x.mT))
    value, even = lower + jnp.conj(jnp.tril(lower, -1)).mT, (x + jnp.conj(x.mT)) / 2
    return jnp.linalg.eigvalsh(jax.lax.stop_gradient(value - even) + even)


@aten("linalg_svdvals")
def svdvals(x: Array, *, driver: str | None = None) -> Array:
    return jnp.linalg.svdvals(x)


@aten("linalg_qr")
def qr(x: Array, mode: str = "reduced") -> tuple[Array, Array]:
    if mode != "reduced":
        raise NotImplementedError(f"only mode='reduced' is supported; got {mode!r}")
    q, r = jnp.linalg.qr(x)
    return q, r


@aten("linalg_householder_product", "orgqr")
def householder_product(x: Array, tau: Array) -> Array:
    """The first columns of the product of reflections `I - tau v v^H`; `v` is 1, then a column below the diagonal."""
    rows = jnp.arange(x.shape[-2])
    q = jnp.broadcast_to(jnp.eye(x.shape[-2], x.shape[-1], dtype=x.dtype), x.shape)
    for i in reversed(range(tau.shape[-1])):
        v = jnp.where(rows == i, jnp.ones((), x.dtype), jnp.where(rows > i, x[..., i], 0))[..., None]
        q = q - tau[..., i, None, None] * v * jnp.sum(jnp.conj(v) * q, axis=-2, keepdims=True)
    return q


@aten("linalg_matrix_norm")
def matrix_norm(
    x: Array, ord: Any = "fro", dim: Sequence[int] = (-2, -1), keepdim: bool = False, *, dtype: Any = None
) -> Array:
    x = x if dtype is None else x.astype(dtype)
    if ord == "fro":
        return vector_norm(x, 2, dim, keepdim)
    return jnp.linalg.norm(x, ord if isinstance(ord, str) else float(ord), tuple(dim), keepdim)


@aten("linalg_norm")
def norm(x: Array, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    if ord is None:
        return vector_norm(x, 2, dim, keepdim, dtype=dtype)
    axes = [dim] if isinstance(dim, int) else list(range(x.ndim) if dim is None else dim)
    if len(axes) == 2:
        return matrix_norm(x, ord, axes, keepdim, dtype=dtype)
    return vector_norm(x, ord, axes, keepdim, dtype=dtype)


@aten("block_diag")
def block_diag(matrices: Sequence[Array]) -> Array:
    return jax.scipy.linalg.block_diag(*matrices)
