"""Normalisation, computed in at least float32."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from torch_bridge.aten.dtypes import align, safe_sqrt, wide
from torch_bridge.aten.registry import UnsupportedResult, aten


def _normalise(x: Array, axes: Sequence[int], eps: float) -> Array:
    x = wide(x)
    centred = x - jnp.mean(x, axis=tuple(axes), keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=tuple(axes), keepdims=True) + eps)


def _apply_affine(x: Array, weight: Array | None, bias: Array | None, dtype: Any) -> Array:
    """Scale and shift, then cast: the parameters meet wide data, so that they are found as scales and shifts."""
    x = x if weight is None else x * wide(align(weight, x)[0])
    x = x if bias is None else x + wide(align(bias, x)[0])
    return x.astype(dtype)


def _on_channels(parameter: Array | None, x: Array) -> Array | None:
    return None if parameter is None else parameter.reshape(1, -1, *[1] * (x.ndim - 2))


@aten("layer_norm")
def layer_norm(
    x: Array,
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Array:
    axes = range(x.ndim - len(normalized_shape), x.ndim)
    return _apply_affine(_normalise(x, axes, eps), weight, bias, x.dtype)


@aten("native_layer_norm")
def native_layer_norm(x: Array, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Array]:
    return (layer_norm(x, shape, weight, bias, eps),)


@aten("rms_norm")
def rms_norm(x: Array, shape: Sequence[int], weight: Array | None = None, eps: float | None = None) -> Array:
    eps = float(jnp.finfo(wide(x).dtype).eps) if eps is None else eps
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    y = wide(x)
    return _apply_affine(y * lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + eps), weight, None, x.dtype)


@aten("group_norm")
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Array:
    grouped = x.reshape(x.shape[0], num_groups, -1)
    y = _normalise(grouped, (2,), eps).reshape(x.shape)
    return _apply_affine(y, _on_channels(weight, x), _on_channels(bias, x), x.dtype)


@aten("instance_norm")
def instance_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Array:
    if not use_input_stats:
        return batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps)
    if running_mean is not None:
        raise NotImplementedError("it changes its running statistics in training mode: use train=False")
    y = _normalise(x, range(2, x.ndim), eps)
    return _apply_affine(y, _on_channels(weight, x), _on_channels(bias, x), x.dtype)


@aten("batch_norm")
def batch_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Array:
    if training and running_mean is not None:
        raise NotImplementedError(
            "batch normalisation changes its running statistics in training mode: use train=True, which returns the new"
            " ones, train=False, or track_running_stats=False"
        )
    if training or running_mean is None or running_var is None:
        y = _normalise(x, (0, *range(2, x.ndim)), eps)
    else:
        mean, var = (wide(p.reshape(1, -1, *[1] * (x.ndim - 2))) for p in (running_mean, running_var))
        y = (wide(x) - mean) * lax.rsqrt(var + eps)
    return _apply_affine(y, _on_channels(weight, x), _on_channels(bias, x), x.dtype)


@aten("_native_batch_norm_legit_functional")
def batch_norm_functional(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array,
    running_var: Array,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, ...]:
    """The result and, last, the new running statistics, with Bessel's correction as in torch."""
    saved = UnsupportedResult("the batch's statistics"), UnsupportedResult("the batch's statistics")
    if not training:
        y = batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps)
        return y, *saved, running_mean, running_var
    count = x.size // x.shape[1]
    if count == 1:
        raise ValueError(
            "batch normalisation in training mode requires more than one value per channel: pass a batch of several"
            " examples, and examples='coupled' where ggn_jax calls the model."
        )
    axes = (0, *range(2, x.ndim))
    # Running statistics are not differentiated, in torch either.
    values = lax.stop_gradient(wide(x))
    new = jnp.mean(values, axes), jnp.var(values, axes, ddof=1)
    means = [(1 - momentum) * wide(old) + momentum * n for old, n in zip((running_mean, running_var), new, strict=True)]
    y = batch_norm(x, weight, bias, None, None, True, momentum, eps)
    return y, *saved, means[0].astype(running_mean.dtype), means[1].astype(running_var.dtype)


@aten("_native_batch_norm_legit_no_training")
def batch_norm_no_training(
    x: Array, weight: Any, bias: Any, running_mean: Array, running_var: Array, momentum: float, eps: float
) -> tuple[Array]:
    return (batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps),)


@aten("_native_batch_norm_legit.no_stats")
def batch_norm_no_stats(x: Array, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> tuple[Array]:
    return (batch_norm(x, weight, bias, None, None, training, momentum, eps),)


def _norm_except(v: Array, dim: int) -> Array:
    axes = tuple(axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim)
    return safe_sqrt(jnp.sum(wide(v) ** 2, axis=axes, keepdims=dim != -1))


@aten("_weight_norm")
def weight_norm(v: Array, g: Array, dim: int = 0) -> Array:
    norm = _norm_except(v, dim)
    return (wide(v) * (wide(g) / align(norm, g)[0])).astype(v.dtype)


@aten("_weight_norm_interface")
def weight_norm_interface(v: Array, g: Array, dim: int = 0) -> tuple[Array]:
    return (weight_norm(v, g, dim),)


@aten("norm_except_dim")
def norm_except_dim(v: Array, pow: int = 2, dim: int = 0) -> Array:
    if pow != 2:
        raise NotImplementedError(f"only the norm of order 2 is supported; got {pow}")
    return _norm_except(v, dim).astype(v.dtype)
