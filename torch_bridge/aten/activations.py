"""Activation functions, with torch's derivatives at their kinks: JAX's own versions may have others there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from torch_bridge.aten.dtypes import align, as_dtype, widened
from torch_bridge.aten.registry import aten

# The names and defaults of arguments are those of the operators' schemas.


@aten("hardtanh")
def hardtanh(x: Array, min_val: Any = -1, max_val: Any = 1) -> Array:
    """Constant, with derivative 0, at the bounds as well."""
    low, high = as_dtype(min_val, x.dtype), as_dtype(max_val, x.dtype)
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x))


@aten("relu6")
def relu6(x: Array) -> Array:
    return hardtanh(x, 0, 6)


@aten("threshold")
def threshold(x: Array, threshold: Any, value: Any) -> Array:
    return jnp.where(x <= as_dtype(threshold, x.dtype), as_dtype(value, x.dtype), x)


@aten("leaky_relu")
def leaky_relu(x: Array, negative_slope: Any = 0.01) -> Array:
    return jnp.where(x > 0, x, x * as_dtype(negative_slope, x.dtype))


@aten("rrelu")
def rrelu(x: Array, lower: Any = 1 / 8, upper: Any = 1 / 3, training: bool = False, generator: Any = None) -> Array:
    if training:
        raise NotImplementedError("its slopes are random in training mode: use train=False")
    return leaky_relu(x, (lower + upper) / 2)


@aten("prelu")
def prelu(x: Array, weight: Array) -> Array:
    shape = [1] * x.ndim
    if x.ndim > 1:
        shape[1] = weight.size
    return jnp.where(x > 0, x, x * (weight.reshape(shape) if x.ndim else weight.reshape(())))


@aten("elu")
@widened
def elu(x: Array, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Array:
    below = jnp.expm1(jnp.where(x > 0, 0, x) * input_scale) * alpha
    return jnp.where(x > 0, x, below) * scale


@aten("selu")
def selu(x: Array) -> Array:
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@aten("celu")
def celu(x: Array, alpha: Any = 1.0) -> Array:
    return elu(x, alpha, 1, 1 / alpha)


@aten("gelu")
@widened
def gelu(x: Array, *, approximate: str = "none") -> Array:
    if approximate == "tanh":
        return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2)))


@aten("silu")
@widened
def silu(x: Array) -> Array:
    return x * jax.nn.sigmoid(x)


@aten("mish")
@widened
def mish(x: Array) -> Array:
    return x * jnp.tanh(jax.nn.softplus(x))


@aten("softplus")
@widened
def softplus(x: Array, beta: Any = 1, threshold: Any = 20) -> Array:
    # The inner `where` keeps `exp` from overflowing where its result is not used: 0 times infinity in the derivative.
    scaled = x * beta
    linear = scaled > threshold
    return jnp.where(linear, x, jnp.log1p(jnp.exp(jnp.where(linear, 0, scaled))) / beta)


@aten("hardsigmoid")
@widened
def hardsigmoid(x: Array) -> Array:
    return jnp.where(x <= -3, 0, jnp.where(x >= 3, 1, (x + 3) / 6))


@aten("hardswish")
@widened
def hardswish(x: Array) -> Array:
    return jnp.where(x <= -3, 0, jnp.where(x >= 3, x, x * (x + 3) / 6))


@aten("hardshrink")
def hardshrink(x: Array, lambd: Any = 0.5) -> Array:
    return jnp.where(jnp.abs(x) <= as_dtype(lambd, x.dtype), jnp.zeros_like(x), x)


@aten("softshrink")
def softshrink(x: Array, lambd: Any = 0.5) -> Array:
    lambd = as_dtype(lambd, x.dtype)
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, jnp.zeros_like(x)))


@aten("log_sigmoid")
@widened
def log_sigmoid(x: Array) -> Array:
    return jax.nn.log_sigmoid(x)


@aten("glu")
def glu(x: Array, dim: int = -1) -> Array:
    a, b = jnp.split(x, 2, axis=dim)
    return a * widened(jax.nn.sigmoid)(b)


@aten("softmax", "_softmax", "special_softmax")
def softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    return _over_axis(jax.nn.softmax, x, dim, dtype)


@aten("log_softmax", "_log_softmax", "special_log_softmax")
def log_softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    return _over_axis(jax.nn.log_softmax, x, dim, dtype)


def _over_axis(fn: Any, x: Array, dim: int, dtype: Any) -> Array:
    # `_softmax` has a bool in place of the dtype: whether half precision is computed in float32. Here it always is.
    x = x if dtype is None or isinstance(dtype, bool) else x.astype(dtype)
    return widened(fn)(x, axis=dim) if x.ndim else fn(x[None])[0]


@aten("cosine_similarity")
def cosine_similarity(x: Array, y: Array, dim: int = 1, eps: float = 1e-8) -> Array:
    x, y = align(x, y)
    x, y = jnp.broadcast_arrays(x, y)
    norms = [jnp.sqrt(jnp.maximum(jnp.sum(a * a, axis=dim), eps * eps)) for a in (x, y)]
    return jnp.sum(x * y, axis=dim) / (norms[0] * norms[1])
