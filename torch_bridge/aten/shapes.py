"""Views and copies, which move entries. Each is the JAX primitive that `ggn_jax` follows parameters through."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from torch_bridge.aten.dtypes import align, as_dtype, result_dtype
from torch_bridge.aten.registry import aten

# The names and defaults of arguments are those of the operators' schemas.


@aten("alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "resolve_conj", "resolve_neg", "view.dtype")
def alias(x: Array, dtype: Any = None) -> Array:
    if dtype is not None and dtype != x.dtype:
        raise NotImplementedError("it reads bits as another dtype: use x.to(dtype)")
    return x


@aten("detach", "detach_copy")
def detach(x: Array) -> Array:
    return lax.stop_gradient(x)


@aten("to.dtype", "to.dtype_layout", "_to_copy")
def to_dtype(x: Array, dtype: Any = None) -> Array:
    return x if dtype is None else x.astype(dtype)


@aten("to.device")
def to_device(x: Array, device: Any = None, dtype: Any = None) -> Array:
    return to_dtype(x, dtype)


@aten("to.other", "type_as")
def type_as(x: Array, other: Array) -> Array:
    return x.astype(other.dtype)


@aten("copy")
def copy(x: Array, source: Array) -> Array:
    return jnp.broadcast_to(align(x, source.astype(x.dtype))[1], x.shape)


@aten("view", "reshape", "_unsafe_view", "view_copy")
def view(x: Array, shape: Sequence[int]) -> Array:
    return x.reshape(tuple(shape))


@aten("view_as", "reshape_as")
def view_as(x: Array, other: Array) -> Array:
    return x.reshape(other.shape)


@aten("flatten")
def flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    if not x.ndim:
        return x.reshape(1)
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


@aten("unflatten")
def unflatten(x: Array, dim: int, sizes: Sequence[int]) -> Array:
    dim %= x.ndim
    known = math.prod(size for size in sizes if size != -1)
    filled = [x.shape[dim] // known if size == -1 else size for size in sizes]
    return x.reshape(*x.shape[:dim], *filled, *x.shape[dim + 1 :])


@aten("squeeze", "squeeze_copy")
def squeeze(x: Array, dim: int | Sequence[int] | None = None) -> Array:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return jnp.squeeze(x, tuple(d % x.ndim for d in dims if x.ndim and x.shape[d] == 1))


@aten("unsqueeze", "unsqueeze_copy")
def unsqueeze(x: Array, dim: int) -> Array:
    return jnp.expand_dims(x, dim)


@aten("expand", "broadcast_to", "expand_copy")
def expand(x: Array, size: Sequence[int], *, implicit: bool = False) -> Array:
    new = len(size) - x.ndim
    kept = [x.shape[i - new] if wanted == -1 else wanted for i, wanted in enumerate(size)]
    return jnp.broadcast_to(x.reshape((1,) * new + x.shape), tuple(kept))


@aten("expand_as")
def expand_as(x: Array, other: Array) -> Array:
    return expand(x, other.shape)


@aten("permute", "permute_copy")
def permute(x: Array, dims: Sequence[int]) -> Array:
    return jnp.transpose(x, tuple(dims))


@aten("transpose", "swapaxes", "swapdims", "transpose_copy")
def transpose(x: Array, a: int, b: int) -> Array:
    return jnp.swapaxes(x, a, b) if x.ndim else x


@aten("t", "numpy_T", "t_copy")
def reverse_axes(x: Array) -> Array:
    return x.T


@aten("mT")
def matrix_transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


@aten("movedim", "moveaxis")
def movedim(x: Array, source: Any, destination: Any) -> Array:
    return jnp.moveaxis(x, source, destination)


@aten("select", "select_copy")
def select(x: Array, dim: int, index: int) -> Array:
    return lax.index_in_dim(x, index, dim % x.ndim, keepdims=False)


@aten("slice", "slice_copy")
def slice_(x: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    dim %= x.ndim
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    return lax.slice_in_dim(x, first, max(first, last), step, dim)


@aten("narrow", "narrow_copy")
def narrow(x: Array, dim: int, start: int, length: int) -> Array:
    start = start % x.shape[dim] if start < 0 else start
    return lax.slice_in_dim(x, start, start + length, axis=dim % x.ndim)


@aten("split_with_sizes", "split.sizes", "split_with_sizes_copy")
def split_with_sizes(x: Array, sizes: Sequence[int], dim: int = 0) -> tuple[Array, ...]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(narrow(x, dim, end - size, size) for end, size in zip(ends, sizes, strict=True))


@aten("split", "split_copy", "unsafe_split")
def split(x: Array, size: int, dim: int = 0) -> tuple[Array, ...]:
    length = x.shape[dim]
    starts = range(0, length, size) if length else [0]
    return split_with_sizes(x, [min(size, length - start) for start in starts], dim)


@aten("chunk", "unsafe_chunk")
def chunk(x: Array, chunks: int, dim: int = 0) -> tuple[Array, ...]:
    return split(x, max(1, -(-x.shape[dim] // chunks)), dim)


@aten("tensor_split.sections", "tensor_split.indices")
def tensor_split(x: Array, sections: int | Sequence[int], dim: int = 0) -> tuple[Array, ...]:
    return tuple(jnp.array_split(x, sections if isinstance(sections, int) else list(sections), dim))


for _name, _axis in {"hsplit": 1, "vsplit": 0, "dsplit": 2}.items():
    aten(_name)(lambda x, sections, axis=_axis: tensor_split(x, sections, min(axis, x.ndim - 1)))


@aten("unbind", "unbind_copy")
def unbind(x: Array, dim: int = 0) -> tuple[Array, ...]:
    return tuple(select(x, dim, i) for i in range(x.shape[dim]))


@aten("cat", "concat", "concatenate")
def cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    dtype = result_dtype(*tensors)
    # torch lets an empty tensor of one axis be concatenated with anything.
    kept = [x for x in tensors if x.shape != (0,)] or tensors
    return jnp.concatenate([as_dtype(x, dtype) for x in kept], axis=dim)


@aten("stack")
def stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    dtype = result_dtype(*tensors)
    return jnp.stack([as_dtype(x, dtype) for x in tensors], axis=dim)


@aten("repeat", "tile")
def repeat(x: Array, repeats: Sequence[int]) -> Array:
    return jnp.tile(x, tuple(repeats))


@aten("repeat_interleave.self_int")
def repeat_interleave(x: Array, repeats: int, dim: int | None = None, *, output_size: Any = None) -> Array:
    return jnp.repeat(x, repeats, axis=dim)


@aten("fliplr")
def fliplr(x: Array) -> Array:
    return jnp.fliplr(x)


@aten("flipud")
def flipud(x: Array) -> Array:
    return jnp.flipud(x)


@aten("ravel")
def ravel(x: Array) -> Array:
    return x.reshape(-1)


@aten("broadcast_tensors")
def broadcast_tensors(tensors: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(jnp.broadcast_arrays(*align(*tensors)))


@aten("sum_to_size")
def sum_to_size(x: Array, size: Sequence[int]) -> Array:
    new = x.ndim - len(size)
    axes = (*range(new), *(new + i for i, wanted in enumerate(size) if wanted == 1 != x.shape[new + i]))
    return jnp.sum(x, axis=axes).reshape(tuple(size))


STACKS = {
    "hstack": jnp.hstack,
    "vstack": jnp.vstack,
    "row_stack": jnp.vstack,
    "dstack": jnp.dstack,
    "column_stack": jnp.column_stack,
}
for _name, _stack in STACKS.items():
    aten(_name)(lambda tensors, fn=_stack: fn([as_dtype(x, result_dtype(*tensors)) for x in tensors]))

for _rank, _atleast in enumerate((jnp.atleast_1d, jnp.atleast_2d, jnp.atleast_3d), 1):
    aten(f"atleast_{_rank}d")(_atleast)
    aten(f"atleast_{_rank}d.Sequence")(lambda tensors, fn=_atleast: tuple(fn(x) for x in tensors))


@aten("repeat_interleave.self_Tensor")
def repeat_interleave_each(x: Array, repeats: Array, dim: int | None = None, *, output_size: Any = None) -> Array:
    if output_size is None:
        raise NotImplementedError("the size of its result depends on data: pass output_size")
    return jnp.repeat(x, repeats, axis=dim, total_repeat_length=output_size)


@aten("flip")
def flip(x: Array, dims: Sequence[int]) -> Array:
    return jnp.flip(x, tuple(dims))


@aten("roll")
def roll(x: Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> Array:
    return jnp.roll(x, tuple(shifts), tuple(dims)) if dims else jnp.roll(x, shifts[0])


@aten("unfold")
def unfold(x: Array, dim: int, size: int, step: int) -> Array:
    """Windows along an axis, their entries in a new last one."""
    starts = jnp.arange((x.shape[dim] - size) // step + 1) * step
    windows = jnp.take(x, starts[:, None] + jnp.arange(size)[None], axis=dim)
    return jnp.moveaxis(windows, dim % x.ndim + 1, -1)


@aten("diagonal", "linalg_diagonal", "diagonal_copy")
def diagonal(x: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    return jnp.diagonal(x, offset, dim1, dim2)


@aten("tril")
def tril(x: Array, diagonal: int = 0) -> Array:
    return jnp.tril(x, diagonal)


@aten("triu")
def triu(x: Array, diagonal: int = 0) -> Array:
    return jnp.triu(x, diagonal)


@aten("diag")
def diag(x: Array, diagonal: int = 0) -> Array:
    return jnp.diag(x, diagonal)


@aten("diagflat")
def diagflat(x: Array, offset: int = 0) -> Array:
    return jnp.diagflat(x, offset)


@aten("diag_embed")
def diag_embed(x: Array, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Array:
    size = x.shape[-1] + abs(offset)
    rows = jnp.arange(x.shape[-1])
    out = jnp.zeros((*x.shape[:-1], size, size), x.dtype)
    out = out.at[..., rows + max(-offset, 0), rows + max(offset, 0)].set(x)
    return jnp.moveaxis(out, (-2, -1), (dim1, dim2))


@aten("meshgrid")
def meshgrid(tensors: Sequence[Array], *, indexing: str = "ij") -> tuple[Array, ...]:
    return tuple(jnp.meshgrid(*tensors, indexing=indexing))


@aten("pixel_shuffle")
def pixel_shuffle(x: Array, factor: int) -> Array:
    *lead, channels, height, width = x.shape
    x = x.reshape(*lead, channels // factor**2, factor, factor, height, width)
    x = jnp.moveaxis(x, (-4, -3), (-3, -1))
    return x.reshape(*lead, channels // factor**2, height * factor, width * factor)


@aten("pixel_unshuffle")
def pixel_unshuffle(x: Array, factor: int) -> Array:
    *lead, channels, height, width = x.shape
    x = x.reshape(*lead, channels, height // factor, factor, width // factor, factor)
    x = jnp.moveaxis(x, (-3, -1), (-4, -3))
    return x.reshape(*lead, channels * factor**2, height // factor, width // factor)


@aten("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(x: Array, groups: int) -> Array:
    batch, channels, *rest = x.shape
    return x.reshape(batch, groups, channels // groups, *rest).swapaxes(1, 2).reshape(x.shape)


@aten("rot90")
def rot90(x: Array, k: int = 1, dims: Sequence[int] = (0, 1)) -> Array:
    return jnp.rot90(x, k, (dims[0], dims[1]))


@aten("real")
def real(x: Array) -> Array:
    return jnp.real(x)
