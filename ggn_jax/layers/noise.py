"""Pseudo-random numbers for checks: the same at each call, and twenty times faster to compile than those of a PRNG."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32


def hash_bits(shape: tuple[int, ...], number: int = 0) -> UInt32[Array, "..."]:
    """32 bits for each entry, different for each `number`: a hash of its index, by multiplications and shifts."""
    x = jax.lax.iota(np.uint32, math.prod(shape)) + np.uint32((number * 0x9E3779B9 + 1) % 2**32)
    for factor in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35):
        x = x * np.uint32(factor)
        x ^= x >> np.uint32(15)
    return x.reshape(shape)


def noise(shape: tuple[int, ...], dtype: Any, number: int = 0) -> Float[Array, "..."]:
    """Uniform between -1 and 1."""
    return hash_bits(shape, number).astype(dtype) * jnp.asarray(2.0**-31, dtype) - jnp.ones((), dtype)
