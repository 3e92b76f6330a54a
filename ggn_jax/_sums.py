"""Sums of many summands, computed one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax._sharding import vary_like


def sum_sequentially(fn: Callable[[Any], PyTree[Array]], parts: PyTree[Array], rest: Any = None) -> PyTree[Array]:
    """The sum of `fn(part)` over the leading axis of `parts`, and of `fn(rest)`, which may have another size.

    It has the dtypes of `fn`, but is added up in at least float32: 16-bit sums stop growing after a few hundred terms.
    """
    structure = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))

    def add(total: PyTree[Array], part: Any) -> tuple[PyTree[Array], None]:
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, fn(part)), None

    start = jax.tree.map(lambda s: vary_like(jnp.zeros(s.shape, _wide(s.dtype)), s), structure)
    total, _ = jax.lax.scan(add, start, parts)
    if rest is not None:
        total, _ = add(total, rest)
    return jax.tree.map(lambda t, s: t.astype(s.dtype), total, structure)


def _wide(dtype: Any) -> Any:
    return compute_dtype(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype
