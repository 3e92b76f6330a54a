"""Pooling and resizing."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from torch_bridge.aten.dtypes import is_floating, wide
from torch_bridge.aten.linear import per_axis
from torch_bridge.aten.reductions import max_
from torch_bridge.aten.registry import aten

MAX_WINDOW_SIZE = 32  # a larger window is not compared entry by entry, since that would make a large program


class Windows:
    """The windows of a pooling along one axis."""

    def __init__(self, size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool):
        self.size, self.kernel, self.stride, self.padding, self.dilation = size, kernel, stride, padding, dilation
        rest = size + 2 * padding - dilation * (kernel - 1) - 1
        self.count = (-(-rest // stride) if ceil_mode else rest // stride) + 1
        if ceil_mode and (self.count - 1) * stride >= size + padding:
            self.count -= 1  # a window must start inside the input, or in the padding in front of it

    @property
    def pads(self) -> tuple[int, int, int]:
        """What `lax.pad` must add or cut, so that exactly these windows fit."""
        reach = (self.count - 1) * self.stride + self.dilation * (self.kernel - 1) + 1
        return self.padding, reach - self.size - self.padding, 0

    @property
    def offset_ranges(self) -> list[tuple[int, int]]:
        """For each offset in a window, where in the padded input the first and the last window have it."""
        last = (self.count - 1) * self.stride
        return [(i * self.dilation, i * self.dilation + last) for i in range(self.kernel)]

    def counts(self, include_padding: bool) -> np.ndarray:
        """The number of entries that each window's average is over."""
        starts = np.arange(self.count) * self.stride - self.padding
        ends = np.minimum(starts + self.kernel, self.size + self.padding)
        return ends - starts if include_padding else np.minimum(ends, self.size) - np.maximum(starts, 0)


def _windows(x: Array, rank: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> list[Windows]:
    stride = kernel if stride is None or not per_axis(stride, 1) else stride
    kernels, strides, pads, dilations = (per_axis(value, rank) for value in (kernel, stride, padding, dilation))
    sizes = x.shape[x.ndim - rank :]
    axes = zip(sizes, kernels, strides, pads, dilations, strict=True)
    return [Windows(size, k, s, p, d, ceil) for size, k, s, p, d in axes]


def _padded(x: Array, windows: list[Windows], fill: Any) -> Array:
    pads = [(0, 0, 0)] * (x.ndim - len(windows)) + [w.pads for w in windows]
    return lax.pad(x, jnp.asarray(fill, x.dtype), pads)


def _gather_windows(x: Array, axis: int, indices: np.ndarray) -> Array:
    """`[..., count, kernel, ...]` in place of an axis."""
    return jnp.take(x, jnp.asarray(indices), axis=axis)


def _window_entries(x: Array, windows: list[Windows]) -> list[Array]:
    """For each offset in a window (in C order), the entry of a padded input that each window has there."""
    lead, axes = x.shape[: x.ndim - len(windows)], [w.offset_ranges for w in windows]
    ends = [[index[-1] + 1 for index in axis] for axis in axes]
    starts = [[index[0] for index in axis] for axis in axes]
    strides = [*(1 for _ in lead), *(w.stride for w in windows)]
    corners = zip(itertools.product(*starts), itertools.product(*ends), strict=True)
    return [lax.slice(x, (*(0 for _ in lead), *start), (*lead, *end), strides) for start, end in corners]


def _is_larger(x: Array, y: Array) -> Array:
    """Whether torch takes a later entry `y` as the maximum instead of `x`: NaN wins, and of equal ones the first."""
    return (y > x) | jnp.isnan(y) if is_floating(x.dtype) else y > x


def _maxima(x: Array, windows: list[Windows], with_indices: bool = False) -> tuple[Array, ...]:
    """The maximum of each window of a padded input, and its index in the flattened image.

    Padding is never the maximum, even if all entries of the image are the lowest number.
    """
    lead = [1] * (x.ndim - len(windows))
    entries, indices = (
        _window_entries(x, windows),
        [index.reshape(*lead, *index.shape) for index in _image_indices(windows)],
    )
    each: list[tuple[Array, ...]] = [(entry,) for entry in entries]
    if with_indices:
        each = [(entry, jnp.asarray(index)) for entry, index in zip(entries, indices, strict=True)]
    best, inside = each[0], indices[0] >= 0
    for later, index in zip(each[1:], indices[1:], strict=True):
        larger, is_inside = _is_larger(best[0], later[0]), index >= 0
        if not inside.all():
            larger |= ~inside
        if not is_inside.all():
            larger &= is_inside
        best = tuple(jnp.where(larger, y, x) for x, y in zip(best, later, strict=True))
        inside = inside | is_inside
    return tuple(jnp.broadcast_to(found, best[0].shape) for found in best)


def _image_indices(windows: list[Windows]) -> list[np.ndarray]:
    """The indices in the flattened image of what `_window_entries` returns; -1 for padding."""
    sizes = [w.size for w in windows]
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    found = []
    for starts in itertools.product(*(w.offset_ranges for w in windows)):
        axes = [
            np.arange(first, last + 1, w.stride) - w.padding for (first, last), w in zip(starts, windows, strict=True)
        ]
        grid = np.meshgrid(*axes, indexing="ij")
        inside = np.logical_and.reduce([(x >= 0) & (x < size) for x, size in zip(grid, sizes, strict=True)])
        found.append(np.where(inside, sum(x * stride for x, stride in zip(grid, strides, strict=True)), -1))
    return found


@aten("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(
    x: Array, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Array:
    """Of equal entries, the first in a window has the derivative.

    A window's entries are compared one after the other: on a CPU, XLA's own derivative of a maximum over windows takes
    longer than all else in a small convolutional net, and this one a tenth of that.
    """
    x, windows = _for_maxima(x, kernel, stride, padding, dilation, ceil_mode)
    if math.prod(w.kernel for w in windows) > MAX_WINDOW_SIZE and all(w.dilation == 1 for w in windows):
        lead = [1] * (x.ndim - len(windows))
        sizes, strides = [*lead, *(w.kernel for w in windows)], [*lead, *(w.stride for w in windows)]
        return lax.reduce_window(x, _lowest(x), lax.max, sizes, strides, "VALID")
    return _maxima(x, windows)[0]


def _for_maxima(
    x: Array, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Array, list[Windows]]:
    """The input, padded with the lowest number, and its windows."""
    rank = len(per_axis(kernel, 1)) if not isinstance(kernel, int) else x.ndim - 2
    windows = _windows(x, rank, kernel, stride, padding, dilation, ceil_mode)
    return _padded(x, windows, _lowest(x)), windows


def _lowest(x: Array) -> np.ndarray:
    return np.asarray(-np.inf if is_floating(x.dtype) else jnp.iinfo(x.dtype).min, x.dtype)


@aten(*[f"max_pool{rank}d_with_indices" for rank in (1, 2, 3)])
def max_pool_with_indices(
    x: Array, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> tuple[Array, Array]:
    """The maxima, and their indices in the flattened image."""
    values = max_pool(x, kernel, stride, padding, dilation, ceil_mode)
    padded, windows = _for_maxima(lax.stop_gradient(x), kernel, stride, padding, dilation, ceil_mode)
    return values, _maxima(padded, windows, with_indices=True)[1]


@aten("max_unpool2d")
def max_unpool2d(x: Array, indices: Array, output_size: Sequence[int]) -> Array:
    return _unpooled(x, indices, output_size)


@aten("max_unpool3d")
def max_unpool3d(
    x: Array, indices: Array, output_size: Sequence[int], stride: Any = None, padding: Any = None
) -> Array:
    return _unpooled(x, indices, output_size)


def _unpooled(x: Array, indices: Array, output_size: Sequence[int]) -> Array:
    """Zeros, with each entry at its index; if windows share an index, one of them has the derivative."""
    lead = x.shape[: x.ndim - len(output_size)]
    rows, indices = x.reshape(math.prod(lead), -1), indices.reshape(math.prod(lead), -1)
    empty = jnp.zeros((len(rows), math.prod(output_size)), x.dtype)
    filled = empty.at[jnp.arange(len(rows))[:, None], indices].set(rows)
    return filled.reshape(*lead, *output_size)


@aten("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    x: Array,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    rank = len(per_axis(kernel, 1)) if not isinstance(kernel, int) else x.ndim - 2
    windows = _windows(x, rank, kernel, stride, padding, 1, ceil_mode)
    padded = _padded(wide(x), windows, 0)
    lead = [1] * (x.ndim - rank)
    sizes, strides = [*lead, *(w.kernel for w in windows)], [*lead, *(w.stride for w in windows)]
    total = lax.reduce_window(padded, np.zeros((), padded.dtype), lax.add, sizes, strides, "VALID")
    if divisor_override:
        return (total / divisor_override).astype(x.dtype)
    counts = math.prod(
        w.counts(count_include_pad).reshape(*lead, *(-1 if i == j else 1 for j in range(rank)))
        for i, w in enumerate(windows)
    )
    return (total / jnp.asarray(counts, total.dtype)).astype(x.dtype)


def _adaptive(size: int, count: int) -> list[tuple[int, int]]:
    """The first and last place (excluded) of each of `count` parts of an axis, as even as torch makes them."""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


@aten("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(x: Array, output_size: Sequence[int]) -> Array:
    y = wide(x)
    for i, count in enumerate(output_size):
        axis = x.ndim - len(output_size) + i
        size = x.shape[axis]
        if size % count == 0:
            y = jnp.mean(y.reshape(*y.shape[:axis], count, size // count, *y.shape[axis + 1 :]), axis=axis + 1)
        else:
            weights = np.zeros((count, size))
            for row, (start, end) in enumerate(_adaptive(size, count)):
                weights[row, start:end] = 1 / (end - start)
            y = _along_axis(weights, y, axis)
    return y.astype(x.dtype)


@aten("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(x: Array, output_size: Sequence[int]) -> tuple[Array, Array]:
    """The maxima, and their indices as in `max_pool_with_indices`."""
    sizes = x.shape[x.ndim - len(output_size) :]
    indices = jnp.broadcast_to(jnp.arange(math.prod(sizes)).reshape(sizes), x.shape)
    for i in reversed(range(len(output_size))):  # the last axis first, so that the first maximum in C order is found
        axis = x.ndim - len(output_size) + i
        parts = _adaptive(x.shape[axis], output_size[i])
        longest = max(end - start for start, end in parts)
        # A shorter part repeats its last entry, of which the first is found.
        members = np.stack([np.minimum(np.arange(start, start + longest), end - 1) for start, end in parts])
        x, found = max_(_gather_windows(x, axis, members), axis + 1, keepdim=True)
        indices = jnp.take_along_axis(_gather_windows(indices, axis, members), found, axis=axis + 1).squeeze(axis + 1)
        x = x.squeeze(axis + 1)
    return x, indices


def _along_axis(weights: np.ndarray, x: Array, axis: int) -> Array:
    """`weights @ x` along one axis."""
    return jnp.moveaxis(jnp.tensordot(x, jnp.asarray(weights, x.dtype), ((axis,), (1,))), -1, axis)


def _sizes(x: Array, output_size: Any, factors: Any) -> list[tuple[int, float]]:
    """The new length of each spatial axis, and how many old entries there are to a new one."""
    rank = x.ndim - 2
    old = x.shape[2:]
    if factors is not None:
        new = [int(size * factor) for size, factor in zip(old, factors, strict=True)]
        return [(n, 1 / factor) for n, factor in zip(new, factors, strict=True)]
    return [(n, size / n) for n, size in zip(per_axis(output_size, rank), old, strict=True)]


def _nearest(x: Array, output_size: Any, factors: Any, offset: float) -> Array:
    for i, (new, scale) in enumerate(_sizes(x, output_size, factors)):
        # In float32, as torch computes them.
        indices = np.floor((np.arange(new, dtype=np.float32) + np.float32(offset)) * np.float32(scale)).astype(int)
        x = jnp.take(x, jnp.asarray(np.minimum(indices, x.shape[i + 2] - 1)), axis=i + 2)
    return x


@aten(*[f"upsample_nearest{rank}d.vec" for rank in (1, 2, 3)])
def upsample_nearest(x: Array, output_size: Any, scale_factors: Any) -> Array:
    return _nearest(x, output_size, scale_factors, 0.0)


@aten(*[f"_upsample_nearest_exact{rank}d.vec" for rank in (1, 2, 3)])
def upsample_nearest_exact(x: Array, output_size: Any, scale_factors: Any) -> Array:
    return _nearest(x, output_size, scale_factors, 0.5)


def _sources(size: int, new: int, scale: float, align_corners: bool) -> np.ndarray:
    """Where between the old entries each new one lies."""
    if align_corners:
        return np.arange(new) * ((size - 1) / (new - 1) if new > 1 else 0.0)
    return (np.arange(new) + 0.5) * scale - 0.5


@aten("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec")
def upsample_linear(x: Array, output_size: Any, align_corners: bool, scale_factors: Any) -> Array:
    y = wide(x)
    for i, (new, scale) in enumerate(_sizes(x, output_size, scale_factors)):
        size = x.shape[i + 2]
        source = np.maximum(_sources(size, new, scale, align_corners), 0)
        low = np.minimum(source.astype(int), size - 1)
        weights, rows = np.zeros((new, size)), np.arange(new)
        np.add.at(weights, (rows, low), 1 - (source - low))
        np.add.at(weights, (rows, np.minimum(low + 1, size - 1)), source - low)
        y = _along_axis(weights, y, i + 2)
    return y.astype(x.dtype)


@aten("upsample_bicubic2d.vec")
def upsample_bicubic(x: Array, output_size: Any, align_corners: bool, scale_factors: Any) -> Array:
    y, a = wide(x), -0.75
    for i, (new, scale) in enumerate(_sizes(x, output_size, scale_factors)):
        size = x.shape[i + 2]
        source = _sources(size, new, scale, align_corners)
        low = np.floor(source).astype(int)
        weights, rows = np.zeros((new, size)), np.arange(new)
        for tap in range(-1, 3):
            d = np.abs(source - low - tap)
            near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            np.add.at(weights, (rows, np.clip(low + tap, 0, size - 1)), np.where(d <= 1, near, far))
        y = _along_axis(weights, y, i + 2)
    return y.astype(x.dtype)
