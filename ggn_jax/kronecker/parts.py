"""Sums over indices, a few of them at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._sharding import vary_like


def sum_in_parts(fn: Callable[[Array], PyTree], num: int, at_once: int) -> PyTree:
    """The sum of `fn(indices)` over `num` indices, in parts of about equal size."""
    if not num:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, jnp.arange(1)))
    parts = -(-num // at_once)
    size = -(-num // parts)
    even = num // size
    if even <= 1:
        total = fn(jnp.arange(min(size, num)))
    else:
        shapes = jax.eval_shape(fn, jnp.arange(size))
        start = jax.tree.map(lambda s: vary_like(jnp.zeros(s.shape, s.dtype), s), shapes)
        indices = jnp.arange(even * size).reshape(even, size)
        total, _ = jax.lax.scan(lambda t, i: (jax.tree.map(jnp.add, t, fn(i)), None), start, indices)
    rest = num - max(even, 1) * size
    return jax.tree.map(jnp.add, total, fn(jnp.arange(num - rest, num))) if rest > 0 else total
