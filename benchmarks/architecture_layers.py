"""Layers of the architectures: each has a function that makes its parameters, and one that applies them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import ggn_jax

Params = dict[str, Any]


class Problem(NamedTuple):
    """A model, its loss, and the shapes of a batch."""

    init: Callable[[jax.Array], Params]
    model_fn: Callable[[Params, Any], jax.Array]
    loss: ggn_jax.Loss
    inputs: Any
    targets: jax.ShapeDtypeStruct
    classes: int = 2
    """Integers in inputs and targets are below it."""


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.result_type(float))


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def split(key: jax.Array, number: int) -> Any:
    """Keys, one after the other."""
    return iter(jax.random.split(key, number))


def dense_init(key: jax.Array, inputs: int, out: int, bias: bool = True, scale: float = 1.0) -> Params:
    kernel = jax.random.normal(key, (inputs, out)) * scale / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(out)} if bias else {"kernel": kernel}


def dense(p: Params, x: jax.Array) -> jax.Array:
    x = x @ p["kernel"]
    return x + p["bias"] if "bias" in p else x


def conv_init(key: jax.Array, size: int, inputs: int, out: int, bias: bool = True) -> Params:
    kernel = jax.random.normal(key, (size, size, inputs, out)) * (2 / (size * size * inputs)) ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(out)} if bias else {"kernel": kernel}


def conv(p: Params, x: jax.Array, stride: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["kernel"], (stride, stride), "SAME", dimension_numbers=numbers)
    return x + p["bias"] if "bias" in p else x


def norm_init(width: int, scale: float = 1.0) -> Params:
    return {"scale": jnp.full(width, scale), "bias": jnp.zeros(width)}


def fixed_norm(p: Params, x: jax.Array) -> jax.Array:
    """Batch normalisation whose running statistics are still those of the start: mean 0, variance 1."""
    return x * (1 + 1e-5) ** -0.5 * p["scale"] + p["bias"]


def standardise(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    mean, var = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-5)


def layer_norm(p: Params, x: jax.Array) -> jax.Array:
    return standardise(x, (-1,)) * p["scale"] + p["bias"]


def group_norm(p: Params, x: jax.Array, groups: int) -> jax.Array:
    n, h, w, c = x.shape
    return standardise(x.reshape(n, h, w, groups, c // groups), (1, 2, 4)).reshape(x.shape) * p["scale"] + p["bias"]


def rms_norm(p: Params, x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["scale"]


def attention_init(key: jax.Array, width: int) -> Params:
    keys = split(key, 2)
    return {"qkv": dense_init(next(keys), width, 3 * width), "out": dense_init(next(keys), width, width)}


def attention(p: Params, x: jax.Array, heads: int, causal: bool = False) -> jax.Array:
    """Over the positions of `x [N, T, width]`, with one kernel for queries, keys and values."""
    n, t, width = x.shape
    q, k, v = jnp.moveaxis(dense(p["qkv"], x).reshape(n, t, 3, heads, -1), 2, 0)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    return dense(p["out"], mixed.reshape(n, t, width))
