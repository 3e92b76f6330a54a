"""Sums over indices, a chunk of them at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._sums import sum_sequentially


def sum_chunked(fn: Callable[[Array], PyTree], num: int, chunk_size: int) -> PyTree:
    """The sum of `fn(indices)` over `num` indices, in chunks of at most `chunk_size` and about equal size."""
    if not num:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, jnp.arange(1)))
    chunks = -(-num // chunk_size)
    size = -(-num // chunks)
    if chunks == 1:
        return fn(jnp.arange(num))
    even = num // size * size
    rest = jnp.arange(even, num) if even < num else None
    return sum_sequentially(fn, jnp.arange(even).reshape(-1, size), rest)
