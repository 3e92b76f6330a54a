"""Sums and other reductions over axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from torch_bridge.aten.dtypes import as_floating, is_floating, safe_sqrt, wide, widened
from torch_bridge.aten.registry import aten

# The names and defaults of arguments are those of the operators' schemas.

Dims = int | Sequence[int] | None


def axes_of(x: Array, dim: Dims) -> tuple[int, ...]:
    """The axes of an argument `dim`; None or an empty list are all of them."""
    if not x.ndim:
        return ()
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.ndim))
    return tuple(d % x.ndim for d in dims)


def _cast(x: Array, dtype: Any) -> Array:
    return x if dtype is None else x.astype(dtype)


@aten("sum")
def sum_(x: Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    x = _cast(x, dtype)
    x = x.astype(int) if not is_floating(x.dtype) and dtype is None else x
    return jnp.sum(wide(x), axis=axes_of(x, dim), keepdims=keepdim).astype(x.dtype)


@aten("mean")
def mean(x: Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    x = _cast(x, dtype)
    return jnp.mean(wide(x), axis=axes_of(x, dim), keepdims=keepdim).astype(x.dtype)


@aten("prod")
def prod(x: Array, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    x = _cast(x, dtype)
    return jnp.prod(wide(x), axis=axes_of(x, dim), keepdims=keepdim).astype(x.dtype)


@aten("cumsum")
def cumsum(x: Array, dim: int, *, dtype: Any = None) -> Array:
    x = _cast(x, dtype)
    return jnp.cumsum(x, axis=dim, dtype=x.dtype) if x.ndim else x


@aten("cumprod")
def cumprod(x: Array, dim: int, *, dtype: Any = None) -> Array:
    x = _cast(x, dtype)
    return jnp.cumprod(x, axis=dim, dtype=x.dtype) if x.ndim else x


@aten("diff")
def diff(x: Array, n: int = 1, dim: int = -1, prepend: Array | None = None, append: Array | None = None) -> Array:
    return jnp.diff(x, n, dim, prepend, append)


@aten("all")
def all_(x: Array, dim: Dims = None, keepdim: bool = False) -> Array:
    return jnp.all(x, axis=axes_of(x, dim), keepdims=keepdim)


@aten("any")
def any_(x: Array, dim: Dims = None, keepdim: bool = False) -> Array:
    return jnp.any(x, axis=axes_of(x, dim), keepdims=keepdim)


@aten("count_nonzero")
def count_nonzero(x: Array, dim: Dims = None) -> Array:
    return jnp.count_nonzero(x, axis=axes_of(x, dim)).astype(int)


@aten("nansum")
def nansum(x: Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return sum_(jnp.where(jnp.isnan(x), 0, x), dim, keepdim, dtype=dtype)


@aten("nanmean")
def nanmean(x: Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    number = jnp.sum(~jnp.isnan(x), axis=axes_of(x, dim), keepdims=keepdim)
    total = nansum(x, dim, keepdim, dtype=dtype)
    return total / number.astype(total.dtype)


@aten("logcumsumexp")
@widened
def logcumsumexp(x: Array, dim: int) -> Array:
    return lax.associative_scan(jnp.logaddexp, x, axis=dim % x.ndim) if x.ndim else x


@aten("cummax")
def cummax(x: Array, dim: int) -> tuple[Array, Array]:
    return _running_extremum(x, dim, jnp.greater_equal)


@aten("cummin")
def cummin(x: Array, dim: int) -> tuple[Array, Array]:
    return _running_extremum(x, dim, jnp.less_equal)


def _running_extremum(x: Array, dim: int, is_better: Any) -> tuple[Array, Array]:
    """The best so far and its index: the last of equal ones, and NaN from the first NaN on."""
    if not x.ndim:
        return x, jnp.zeros((), int)
    indices = lax.broadcasted_iota(jnp.asarray(0).dtype, x.shape, dim % x.ndim)

    def later(a: Any, b: Any) -> Any:
        taken = is_better(b[0], a[0]) | (b[0] != b[0])
        return jnp.where(taken, b[0], a[0]), jnp.where(taken, b[1], a[1])

    _, found = lax.associative_scan(later, (lax.stop_gradient(x), indices), axis=dim % x.ndim)
    return jnp.take_along_axis(x, found, axis=dim), found


@aten("median.dim")
def median_along(x: Array, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    """The lower one of two; NaN if there is one."""
    if not x.ndim:
        return x, jnp.zeros((), int)
    order = jnp.argsort(x, axis=dim).astype(int)
    index = lax.slice_in_dim(order, (x.shape[dim] - 1) // 2, (x.shape[dim] + 1) // 2, axis=dim % x.ndim)
    if is_floating(x.dtype):
        absent = jnp.any(jnp.isnan(x), axis=dim, keepdims=True)
        index = jnp.where(absent, jnp.argmax(jnp.isnan(x), axis=dim, keepdims=True), index)
    return _take_picked(x, index, dim, keepdim)


@aten("median")
def median(x: Array) -> Array:
    """The lower one of two; entries that are equal share the derivative."""
    value = lax.stop_gradient(median_along(x.reshape(-1), 0)[0])
    if not is_floating(x.dtype):
        return value
    # The value is a constant, plus 0 whose derivative is spread evenly over the entries that are equal to it.
    equal = x == value
    share = jnp.where(equal, x, 0).sum() / jnp.maximum(jnp.sum(equal), 1).astype(x.dtype)
    return value + (share - lax.stop_gradient(share))


@aten("kthvalue")
def kthvalue(x: Array, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    if not x.ndim:
        return x, jnp.zeros((), int)
    order = jnp.argsort(x, axis=dim).astype(int)
    return _take_picked(x, lax.slice_in_dim(order, k - 1, k, axis=dim % x.ndim), dim, keepdim)


@aten("quantile")
def quantile(
    x: Array, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Array:
    return jnp.quantile(x, jnp.asarray(q, x.dtype), axis=dim, keepdims=keepdim, method=interpolation)


@aten("aminmax")
def aminmax(x: Array, *, dim: int | None = None, keepdim: bool = False) -> tuple[Array, Array]:
    axes = () if dim is None else dim
    return amin(x, axes, keepdim), amax(x, axes, keepdim)


@aten("amax")
def amax(x: Array, dim: Dims = (), keepdim: bool = False) -> Array:
    """Entries that are equal share the derivative."""
    return jnp.max(x, axis=axes_of(x, dim), keepdims=keepdim)


@aten("amin")
def amin(x: Array, dim: Dims = (), keepdim: bool = False) -> Array:
    return jnp.min(x, axis=axes_of(x, dim), keepdims=keepdim)


@aten("argmax")
def argmax(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return jnp.argmax(x, axis=dim if x.ndim else None, keepdims=keepdim).astype(int)


@aten("argmin")
def argmin(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return jnp.argmin(x, axis=dim if x.ndim else None, keepdims=keepdim).astype(int)


@aten("max")
def max_(x: Array, dim: int | None = None, keepdim: bool = False) -> Any:
    """Along an axis, the first of equal entries has the derivative; they share it of the whole's maximum."""
    if dim is None:
        return jnp.max(x)
    indices = argmax(x, dim, keepdim=True)
    return _take_picked(x, indices, dim, keepdim)


@aten("min")
def min_(x: Array, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return jnp.min(x)
    indices = argmin(x, dim, keepdim=True)
    return _take_picked(x, indices, dim, keepdim)


def _take_picked(x: Array, indices: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    if not x.ndim:  # torch has axis 0 of a number
        return x, indices
    values = jnp.take_along_axis(x, indices, axis=dim)
    return (values, indices) if keepdim else (jnp.squeeze(values, dim), jnp.squeeze(indices, dim))


def _variance(x: Array, first: Any, second: Any, correction: Any, keepdim: bool) -> Array:
    """The overloads are `(unbiased)`, `(dim, unbiased, keepdim)` and `(dim, *, correction, keepdim)`."""
    if isinstance(first, bool):
        first, second = None, first
    if isinstance(second, bool):
        correction = int(second)
    axes = axes_of(x, first)
    number = math.prod(x.shape[axis] for axis in axes)
    centred = x - jnp.mean(x, axis=axes, keepdims=True)
    divisor = max(number - (1 if correction is None else correction), 0)
    return jnp.sum(jnp.abs(centred) ** 2, axis=axes, keepdims=keepdim) / divisor


@aten("var")
def var(x: Array, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None) -> Array:
    return _variance(wide(x), dim, unbiased, correction, keepdim).astype(x.dtype)


@aten("std")
def std(x: Array, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None) -> Array:
    return safe_sqrt(_variance(wide(x), dim, unbiased, correction, keepdim)).astype(x.dtype)


def _mean_over(x: Array, dim: Any, keepdim: bool) -> Array:
    return mean(x, None if isinstance(dim, bool) else dim, keepdim)


@aten("var_mean")
def var_mean(
    x: Array, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Array, Array]:
    return var(x, dim, unbiased, keepdim, correction=correction), _mean_over(x, dim, keepdim)


@aten("std_mean")
def std_mean(
    x: Array, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Array, Array]:
    return std(x, dim, unbiased, keepdim, correction=correction), _mean_over(x, dim, keepdim)


@aten("logsumexp", "special_logsumexp")
@widened
def logsumexp(x: Array, dim: Dims, keepdim: bool = False) -> Array:
    return jax.scipy.special.logsumexp(x, axis=axes_of(x, dim), keepdims=keepdim)


@aten("norm")
def norm(x: Array, p: Any = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


@aten("linalg_vector_norm")
def vector_norm(x: Array, ord: Any = 2, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    """With derivative 0 at 0."""
    x = as_floating(_cast(x, dtype))
    size, axes = jnp.abs(wide(x)), axes_of(x, dim)
    if ord == math.inf:
        result = jnp.max(size, axis=axes, keepdims=keepdim)
    elif ord == -math.inf:
        result = jnp.min(size, axis=axes, keepdims=keepdim)
    elif ord == 0:
        result = jnp.sum(size != 0, axis=axes, keepdims=keepdim)
    elif ord == 1:
        result = jnp.sum(size, axis=axes, keepdims=keepdim)
    elif ord == 2:
        result = safe_sqrt(jnp.sum(size * size, axis=axes, keepdims=keepdim))
    else:
        total = jnp.sum(size**ord, axis=axes, keepdims=keepdim)
        zero = total == 0
        result = jnp.where(zero, 0, jnp.where(zero, 1, total) ** (1 / ord))
    return result.astype(x.dtype)
