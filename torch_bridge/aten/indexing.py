"""Entries read and written at indices."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from torch_bridge.aten.dtypes import align, as_dtype
from torch_bridge.aten.registry import UnsupportedResult, aten

# Indices out of range raise in torch, which a compiled program cannot: floating results are NaN there.
FILL = "fill"


@aten("embedding")
def embedding(
    weight: Array, indices: Array, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Array:
    """Rows of a table; that of `padding_idx` has no gradient."""
    if scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq=True is not a gradient of a function: leave it out")
    rows = jnp.take(weight, _valid_rows(weight, indices), axis=0, mode=FILL)
    if padding_idx < 0:
        return rows
    return jnp.where((indices == padding_idx)[..., None], jax.lax.stop_gradient(rows), rows)


def _valid_rows(weight: Array, indices: Array) -> Array:
    """Row numbers, one past the last for those that torch refuses: JAX would count negative ones from the end.

    As int32: the given dtype may be too narrow for the number past the last.
    """
    rows = weight.shape[0]
    return jnp.where((indices < 0) | (indices >= rows), rows, indices).astype(jnp.int32)


@aten("embedding_bag")
def embedding_bag(
    weight: Array,
    indices: Array,
    offsets: Array,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sums, means or maxima (modes 0, 1, 2) of the rows of each bag; entries of `padding_idx` do not count."""
    if scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq=True is not a gradient of a function: leave it out")
    starts = offsets[:-1] if include_last_offset else offsets
    number = starts.shape[0]
    bags = jnp.searchsorted(starts, jnp.arange(indices.shape[0], dtype=starts.dtype), side="right").astype(int) - 1
    if padding_idx is not None and padding_idx >= 0:
        bags = jnp.where(indices == padding_idx, number, bags)  # past the last bag, and dropped
    rows = jnp.take(weight, _valid_rows(weight, indices), axis=0, mode=FILL)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    counts = jnp.zeros(number, int).at[bags].add(1, mode="drop")[:, None]
    if mode == 2:
        members = bags[None] == jnp.arange(number)[:, None]
        found = jnp.argmax(jnp.where(members[..., None], rows[None], -jnp.inf), axis=1)
        total = jnp.where(counts > 0, jnp.take_along_axis(rows, found, axis=0), 0)
    else:
        total = jnp.zeros((number, weight.shape[1]), weight.dtype).at[bags].add(rows, mode="drop")
        total = total / jnp.maximum(counts, 1).astype(total.dtype) if mode == 1 else total
    return total, *(UnsupportedResult("an embedding bag") for _ in range(3))


def _align_indices(x: Array, indices: Sequence[Array | None]) -> tuple[Any, ...]:
    for index in indices:
        if index is not None and index.dtype == bool:
            raise NotImplementedError(
                "a mask as index makes a result whose size depends on data: use torch.where, or masked_fill"
            )
    arrays = [index for index in indices if index is not None]
    aligned = iter(align(*arrays) if arrays else [])
    return tuple(slice(None) if index is None else next(aligned) for index in indices)


@aten("index")
def index(x: Array, indices: Sequence[Array | None]) -> Array:
    return x.at[_align_indices(x, indices)].get(mode=FILL)


@aten("index_put", "_unsafe_index_put")
def index_put(x: Array, indices: Sequence[Array | None], values: Array, accumulate: bool = False) -> Array:
    if (
        not accumulate
        and len(indices) == 1
        and indices[0] is not None
        and indices[0].dtype == bool
        and values.size == 1
    ):
        mask = indices[0].reshape(*indices[0].shape, *[1] * (x.ndim - indices[0].ndim))
        return jnp.where(mask, values.reshape((1,) * x.ndim), x)
    selected = x.at[_align_indices(x, indices)]
    shape = jax.eval_shape(lambda: selected.get()).shape
    values = jnp.broadcast_to(values.reshape((1,) * (len(shape) - values.ndim) + values.shape), shape)
    return selected.add(values, mode="drop") if accumulate else selected.set(values, mode="drop")


@aten("index_select")
def index_select(x: Array, dim: int, index: Array) -> Array:
    return jnp.take(x, index.reshape(-1), axis=dim, mode=FILL) if x.ndim else x


@aten("gather")
def gather(x: Array, dim: int, index: Array, *, sparse_grad: bool = False) -> Array:
    return x.at[_indices_along(index, dim)].get(mode=FILL) if x.ndim else x


def _indices_along(index: Array, dim: int) -> tuple[Array, ...]:
    """The indices of `gather` and `scatter`: the given ones along one axis, each entry's own along the others."""
    dim %= index.ndim
    grid = [jax.lax.broadcasted_iota(index.dtype, index.shape, axis) for axis in range(index.ndim)]
    return tuple(index if axis == dim else own for axis, own in enumerate(grid))


def _source(source: Any, index: Array, x: Array) -> Array:
    if not isinstance(source, jax.Array) or not source.ndim:
        return jnp.broadcast_to(as_dtype(source, x.dtype).reshape((1,) * index.ndim), index.shape)
    return source[tuple(slice(size) for size in index.shape)]


@aten("scatter")
def scatter(x: Array, dim: int, index: Array, source: Any, *, reduce: str | None = None) -> Array:
    selected, source = x.at[_indices_along(index, dim)], _source(source, index, x)
    if reduce is None:
        return selected.set(source, mode="drop")
    return selected.add(source, mode="drop") if reduce == "add" else selected.mul(source, mode="drop")


@aten("scatter_add")
def scatter_add(x: Array, dim: int, index: Array, source: Array) -> Array:
    return scatter(x, dim, index, source, reduce="add")


@aten("scatter_reduce")
def scatter_reduce(x: Array, dim: int, index: Array, source: Array, reduce: str, *, include_self: bool = True) -> Array:
    methods = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
    source = _source(source, index, x)
    indices = _indices_along(index, dim)
    touched = jnp.zeros(x.shape, jnp.int32).at[indices].add(1, mode="drop")
    if reduce == "mean":
        total = scatter_reduce(x, dim, index, source, "sum", include_self=include_self)
        count = touched + (1 if include_self else (touched == 0).astype(touched.dtype))
        return total / count.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else total // count
    if not include_self:
        limits = jnp.finfo(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype)
        neutral = {"sum": 0, "prod": 1, "amax": limits.min, "amin": limits.max}[reduce]
        start = jnp.where(touched > 0, as_dtype(neutral, x.dtype), x)
    else:
        start = x
    return getattr(start.at[indices], methods[reduce])(source, mode="drop")


@aten("index_add")
def index_add(x: Array, dim: int, index: Array, source: Array, *, alpha: Any = 1) -> Array:
    indices = (*[slice(None)] * (dim % x.ndim), index)
    return x.at[indices].add(source * as_dtype(alpha, source.dtype), mode="drop")


@aten("index_copy")
def index_copy(x: Array, dim: int, index: Array, source: Array) -> Array:
    return x.at[(*[slice(None)] * (dim % x.ndim), index)].set(source, mode="drop")


@aten("index_fill")
def index_fill(x: Array, dim: int, index: Array, value: Any) -> Array:
    return x.at[(*[slice(None)] * (dim % x.ndim), index)].set(as_dtype(value, x.dtype), mode="drop")


@aten("select_scatter")
def select_scatter(x: Array, source: Array, dim: int, index: int) -> Array:
    return x.at[(*[slice(None)] * (dim % x.ndim), index)].set(source)


@aten("slice_scatter")
def slice_scatter(
    x: Array, source: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    dim %= x.ndim
    if slice(start, end, step).indices(x.shape[dim]) == (0, x.shape[dim], 1):
        return source
    return x.at[(*[slice(None)] * dim, slice(start, end, step))].set(source)


@aten("one_hot")
def one_hot(x: Array, num_classes: int = -1) -> Array:
    if num_classes < 0:
        raise NotImplementedError("the number of classes depends on data: pass num_classes")
    return jax.nn.one_hot(x, num_classes, dtype=x.dtype)


@aten("sort")
def sort(x: Array, dim: int = -1, descending: bool = False) -> tuple[Array, Array]:
    order = argsort(x, dim, descending)
    return jnp.take_along_axis(x, order, axis=dim), order


@aten("argsort")
def argsort(x: Array, dim: int = -1, descending: bool = False) -> Array:
    return jnp.argsort(x, axis=dim, descending=descending).astype(int)


@aten("topk")
def topk(x: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Array, Array]:
    order = argsort(x, dim, largest)
    order = jax.lax.slice_in_dim(order, 0, k, axis=dim % x.ndim)
    return jnp.take_along_axis(x, order, axis=dim), order


@aten("take")
def take(x: Array, index: Array) -> Array:
    return x.reshape(-1).at[index].get(mode=FILL)


@aten("take_along_dim")
def take_along_dim(x: Array, indices: Array, dim: int | None = None) -> Array:
    if dim is None:
        return take(x, indices.reshape(-1))
    return jnp.take_along_axis(x, indices, axis=dim, mode=FILL)


@aten("msort")
def msort(x: Array) -> Array:
    return sort(x, 0)[0]


@aten("index_reduce")
def index_reduce(x: Array, dim: int, index: Array, source: Array, reduce: str, *, include_self: bool = True) -> Array:
    dim %= x.ndim
    indices = jnp.broadcast_to(index.reshape([-1 if i == dim else 1 for i in range(x.ndim)]), source.shape)
    return scatter_reduce(x, dim, indices, source, reduce, include_self=include_self)


@aten("histc")
def histc(x: Array, bins: int = 100, min: Any = 0, max: Any = 0) -> Array:
    """Without a derivative, as in torch. The last bin has its upper end."""
    if min == max:
        raise NotImplementedError("its range depends on data: pass min and max")
    x = jax.lax.stop_gradient(x).reshape(-1)
    indices = jnp.where(x == max, bins - 1, jnp.floor((x - min) * (bins / (max - min))).astype(int))
    counted = (x >= min) & (x <= max)
    return jnp.zeros(bins, x.dtype).at[jnp.where(counted, indices, bins)].add(1, mode="drop")


@aten("searchsorted.Tensor")
def searchsorted(
    boundaries: Array,
    x: Array,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Array | None = None,
) -> Array:
    """Positions in one row of boundaries, or in a row for each row of `x`."""
    if sorter is not None:
        boundaries = jnp.take_along_axis(boundaries, sorter, axis=-1)
    find = functools.partial(jnp.searchsorted, side="right" if right or side == "right" else "left")
    rows = boundaries.reshape(-1, boundaries.shape[-1])
    found = find(rows[0], x) if boundaries.ndim == 1 else jax.vmap(find)(rows, x.reshape(len(rows), -1))
    return found.reshape(x.shape).astype(jnp.int32 if out_int32 else int)


@aten("bucketize.Tensor")
def bucketize(x: Array, boundaries: Array, *, out_int32: bool = False, right: bool = False) -> Array:
    found = jnp.searchsorted(boundaries, x, side="right" if right else "left")
    return found.astype(jnp.int32 if out_int32 else int)
