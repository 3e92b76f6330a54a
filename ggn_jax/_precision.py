"""Products in full single precision, on platforms that round float32 unless told otherwise.

On NVIDIA GPUs, "default" rounds to TensorFloat-32, of 11 bits, and "highest" takes XLA seconds to compile for each
shape. `jax.lax.DotAlgorithmPreset` has algorithms in between, but they are errors on GPUs older than Ampere. So there,
numbers are split in two parts that TensorFloat-32 holds, and three default products add up to one of 22 bits. Where the
default is full precision, on older GPUs, that is right as well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TF32_EXPONENT_BITS, TF32_MANTISSA_BITS = 8, 10


def full_precision(product: Callable[..., Array], x: Float[Array, "..."], y: Float[Array, "..."]) -> Array:
    """`product(x, y, precision=...)`, a matrix product such as `jnp.matmul`, without rounding float32 to fewer bits."""

    def highest(x: Array, y: Array) -> Array:
        return product(x, y, precision="highest")

    def split(x: Array, y: Array) -> Array:
        (x, small_x), (y, small_y) = _split(x), _split(y)
        small = product(x, small_y, precision="default") + product(small_x, y, precision="default")
        return product(x, y, precision="default") + small

    if jnp.result_type(x, y) != jnp.float32:  # no platform rounds float64, nor narrower ones further
        return product(x, y, precision="default")
    return jax.lax.platform_dependent(x, y, cuda=split, rocm=split, default=highest)


def _split(x: Float[Array, "..."]) -> tuple[Array, Array]:
    """What TensorFloat-32 holds of `x`, and the rest; what it cannot hold, infinity for one, is left whole."""
    near = jax.lax.reduce_precision(x, TF32_EXPONENT_BITS, TF32_MANTISSA_BITS)
    holds = jnp.isfinite(near)
    return jnp.where(holds, near, x), jnp.where(holds, x - near, 0)
