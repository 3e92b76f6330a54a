"""The inverse of a positive definite matrix from its Cholesky factor, in full precision.

On CPUs, triangular matrices are inverted and multiplied recursively, in halves: a third of the operations of a solve
against the identity and a dense product. On GPUs two triangular solves are faster, and a product in full
precision takes XLA seconds to compile, for each shape.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MIN_SPLIT_SIZE = 1280  # smaller matrices are not split, nor are the halves of one of size 2,049


def inverse_by_cholesky(x: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`x^-1 = L^-T L^-1` with `x = L L^T`."""
    root = jax.lax.linalg.cholesky(x)
    return jax.lax.platform_dependent(root, cuda=inverse_by_solves, rocm=inverse_by_solves, default=inverse_by_halves)


def inverse_by_solves(root: Float[Array, "d d"]) -> Float[Array, "d d"]:
    eye = jnp.eye(root.shape[0], dtype=root.dtype)
    inverse = jax.lax.linalg.triangular_solve(root, eye, left_side=True, lower=True)
    return jax.lax.linalg.triangular_solve(root, inverse, left_side=True, lower=True, transpose_a=True)


def inverse_by_halves(root: Float[Array, "d d"]) -> Float[Array, "d d"]:
    return _lower_gram(_lower_inverse(root))


def _lower_inverse(root: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Of a lower triangular matrix: `[[a, 0], [b, c]]^-1 = [[a^-1, 0], [-c^-1 b a^-1, c^-1]]`."""
    size, half = root.shape[0], root.shape[0] // 2
    if size <= MIN_SPLIT_SIZE:
        eye = jnp.eye(size, dtype=root.dtype)
        return jax.lax.linalg.triangular_solve(root, eye, left_side=True, lower=True)
    a, c = _lower_inverse(root[:half, :half]), _lower_inverse(root[half:, half:])
    b = -_product(c, _product(root[half:, :half], a))
    return jnp.block([[a, jnp.zeros_like(b.T)], [b, c]])


def _lower_gram(root: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`L^T L` of a lower triangular `L = [[a, 0], [b, c]]`."""
    size, half = root.shape[0], root.shape[0] // 2
    if size <= MIN_SPLIT_SIZE:
        return _product(root.T, root)
    a, b, c = root[:half, :half], root[half:, :half], root[half:, half:]
    corner = _product(c.T, b)
    return jnp.block([[_lower_gram(a) + _product(b.T, b), corner.T], [corner, _lower_gram(c)]])


def _product(x: Float[Array, "l m"], y: Float[Array, "m n"]) -> Float[Array, "l n"]:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)  # accelerators may take fewer bits by default
