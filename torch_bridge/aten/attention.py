"""Scaled dot-product attention."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from torch_bridge.aten.dropout import keep
from torch_bridge.aten.dtypes import align, wide
from torch_bridge.aten.registry import aten


@aten("scaled_dot_product_attention")
def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_key: Array | None = None,
) -> Array:
    """`softmax(Q K^T scale + mask) V`, with dropout of the softmax; a query that may attend to nothing gets zeros.

    `query` is `[..., heads, L, E]`, `key` and `value` `[..., heads, S, E]`, with fewer heads if `enable_gqa`.
    """
    if enable_gqa:
        key, value = (jnp.repeat(a, query.shape[-3] // a.shape[-3], axis=-3) for a in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = wide(jnp.matmul(query, jnp.swapaxes(key, -1, -2))) * scale
    allowed = None
    if is_causal:
        allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if attn_mask is not None and attn_mask.dtype == bool:
        allowed = attn_mask if allowed is None else jnp.logical_and(*align(allowed, attn_mask))
    elif attn_mask is not None:
        scores, added = align(scores, wide(attn_mask))
        scores = scores + added.astype(scores.dtype)
    if allowed is not None:
        scores, allowed = align(scores, allowed)
        scores = jnp.where(allowed, scores, -jnp.inf)
    # If all scores are minus infinity, softmax would be NaN, and so would its derivative behind a single `where`.
    nothing = jnp.all(scores == -jnp.inf, axis=-1, keepdims=True)
    weights = jnp.where(nothing, 0, jax.nn.softmax(jnp.where(nothing, 0, scores), axis=-1))
    weights = keep(weights, dropout_p, True, weights.shape, dropout_key)
    return jnp.matmul(weights.astype(value.dtype), value)
