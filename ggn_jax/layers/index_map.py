"""Which parameters an array holds: arrays of parameter entries, followed through reshapes, slices and transposes.

All parameters of a model, flat and one after the other, are one vector; an entry is an index of it. An array that is a
view of one parameter is described by strides, as in NumPy, so that nothing of its size is stored, and blocks of equal
strides can be recognised as alike. Only what no strides describe (a concatenation, a gather) has a table of indices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclass(frozen=True)
class IndexMap:
    """An array of entries of a flat vector: at index `i`, entry `offset + sum(strides * i)` of it.

    Arrays that no strides describe hold their entries' indices explicitly, in `table`: bytes of int64 in C order, so
    that maps can be compared and hashed.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    offset: int = 0
    table: bytes | None = None

    @classmethod
    def contiguous(cls, shape: tuple[int, ...], offset: int = 0) -> "IndexMap":
        """An array in C order, from entry `offset` on."""
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(tuple(shape), strides, offset)

    @classmethod
    def explicit(cls, indices: np.ndarray) -> "IndexMap":
        """The array of the entries with these indices."""
        return cls(tuple(indices.shape), table=np.ascontiguousarray(indices, np.int64).tobytes())

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def indices(self) -> np.ndarray:
        """The entries' indices as an array: 8 bytes each, where strides take none."""
        if self.table is not None:
            return np.frombuffer(self.table, np.int64).reshape(self.shape)
        total = np.full((), self.offset, np.int64)
        for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            total = total + np.expand_dims(stride * np.arange(size), tuple(range(1, len(self.shape) - axis)))
        return np.broadcast_to(total, self.shape)

    def reshape(self, shape: tuple[int, ...]) -> "IndexMap":
        shape = tuple(shape)
        if self.table is None:
            strides = _reshaped_strides(self.shape, self.strides, shape)
            if strides is not None:
                return IndexMap(shape, strides, self.offset)
        return IndexMap.explicit(self.indices().reshape(shape))

    def transpose(self, axes: tuple[int, ...]) -> "IndexMap":
        if self.table is not None:
            return IndexMap.explicit(self.indices().transpose(axes))
        return IndexMap(tuple(self.shape[a] for a in axes), tuple(self.strides[a] for a in axes), self.offset)

    def slice(self, starts: tuple[int, ...], stops: tuple[int, ...], steps: tuple[int, ...]) -> "IndexMap":
        """`array[start:stop:step, ...]`, with steps of at least 1."""
        if self.table is not None:
            return IndexMap.explicit(self.indices()[tuple(map(slice, starts, stops, steps))])
        shape = tuple(len(range(*parts)) for parts in zip(starts, stops, steps, strict=True))
        offset = self.offset + sum(start * stride for start, stride in zip(starts, self.strides, strict=True))
        return IndexMap(shape, tuple(s * step for s, step in zip(self.strides, steps, strict=True)), offset)

    def flip(self, axes: tuple[int, ...]) -> "IndexMap":
        if self.table is not None:
            return IndexMap.explicit(np.flip(self.indices(), axes))
        offset = self.offset + sum(self.strides[a] * (self.shape[a] - 1) for a in axes)
        strides = tuple(-s if axis in axes else s for axis, s in enumerate(self.strides))
        return IndexMap(self.shape, strides, offset)

    def broadcast_in_dim(self, shape: tuple[int, ...], axes: tuple[int, ...]) -> "IndexMap":
        """`jax.lax.broadcast_in_dim`: axis `i` becomes axis `axes[i]` of the result; the others repeat."""
        if self.table is not None:
            own = [1] * len(shape)
            for axis, size in zip(axes, self.shape, strict=True):
                own[axis] = size
            return IndexMap.explicit(np.broadcast_to(self.indices().reshape(own), shape))
        strides = [0] * len(shape)
        for axis, size, stride in zip(axes, self.shape, self.strides, strict=True):
            strides[axis] = stride if size == shape[axis] else 0
        return IndexMap(tuple(shape), tuple(strides), self.offset)

    def repeats(self) -> tuple[bool, ...]:
        """For each axis, whether the array is constant along it."""
        if self.table is None:
            return tuple(not stride and size > 1 for size, stride in zip(self.shape, self.strides, strict=True))
        indices = self.indices()
        return tuple(
            size > 1 and bool(np.all(indices == np.take(indices, [0], axis))) for axis, size in enumerate(self.shape)
        )

    def bounds(self) -> tuple[int, int]:
        """The least and the largest index, of an array that is not empty."""
        if self.table is not None:
            indices = self.indices()
            return int(indices.min()), int(indices.max())
        reach = [stride * (size - 1) for stride, size in zip(self.strides, self.shape, strict=True)]
        return self.offset + sum(min(r, 0) for r in reach), self.offset + sum(max(r, 0) for r in reach)

    def is_injective(self) -> bool:
        """Whether no entry is held twice."""
        if self.table is not None:
            return len(np.unique(self.indices())) == self.size
        # Sufficient, and true of all views of one array: each axis steps over all that the faster ones reach.
        reach = 0
        for stride, size in sorted((abs(t), n) for n, t in zip(self.shape, self.strides, strict=True) if n > 1):
            if stride <= reach:
                return False
            reach += stride * (size - 1)
        return True

    def entry_set(self) -> Any:
        """A key that is equal for two injective maps of the same entries, whatever their order.

        A map with strides and one with a table may have different keys for one set: then two uses of a weight count
        as two layers, and `plan` finds that they overlap.
        """
        if self.table is not None:
            return np.sort(self.indices(), axis=None).tobytes()
        offset = self.offset
        axes: list[tuple[int, int]] = []
        for stride, size in sorted((abs(t), n) for n, t in zip(self.shape, self.strides, strict=True) if n > 1):
            if axes and axes[-1][0] * axes[-1][1] == stride:
                axes[-1] = axes[-1][0], axes[-1][1] * size
            else:
                axes.append((stride, size))
        offset += sum(t * (n - 1) for n, t in zip(self.shape, self.strides, strict=True) if t < 0)
        return offset, tuple(axes)

    def owning_leaves(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Which parameters the entries are of, in a vector of parameters of these sizes."""
        ends = np.cumsum(sizes)
        if not self.size:
            return ()
        if self.table is None:  # strides never leave the array they started in
            return (int(np.searchsorted(ends, self.offset, side="right")),)
        return tuple(int(i) for i in np.unique(np.searchsorted(ends, self.indices(), side="right")))

    def shifted(self, by: int) -> "IndexMap":
        """The map of the entries `by` further on."""
        if self.table is not None:
            return IndexMap.explicit(self.indices() + by)
        return IndexMap(self.shape, self.strides, self.offset + by)

    def gather_fn(self, size: int) -> Callable[[Array], Array]:
        """A linear function of flat vectors `[size]` that returns the entries of this injective map.

        Slices where possible: XLA fuses them, and their transpose is a pad instead of a scatter.
        """
        plan = _slice_plan(self, size)
        if plan is None:
            indices = self.indices()
            return lambda flat: jnp.take(flat, jnp.asarray(indices), axis=0, unique_indices=True, mode="clip")
        dims, starts, stops, order = plan

        def read(flat: Array) -> Array:
            cut = jax.lax.slice(flat.reshape(dims), starts, stops)
            return cut.reshape(tuple(self.shape[a] for a in order)).transpose(np.argsort(order))

        return read


def _reshaped_strides(shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a strided array reshaped to `new`, if there are any."""
    # Merge what is contiguous, then split along the boundaries of `new`.
    merged: list[list[int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    if math.prod(shape) == 0:
        return None
    result: list[int] = []
    for size in reversed(new):
        if size == 1:
            result.append(0)
            continue
        if not merged or merged[-1][0] % size:
            return None
        rest, stride = merged[-1]
        result.append(stride)
        if rest == size:
            merged.pop()
        else:
            merged[-1] = [rest // size, stride * size]
    return tuple(reversed(result))


def _slice_plan(entries: IndexMap, size: int) -> Any:
    """`(dims, starts, stops, order)`, or None where there is no such slice.

    `flat.reshape(dims)[starts:stops]` has the entries, with the map's axes in this order.
    """
    if entries.table is not None or any(t <= 0 < n - 1 for n, t in zip(entries.shape, entries.strides, strict=True)):
        return None
    order = sorted(range(len(entries.shape)), key=lambda a: (-entries.strides[a], entries.shape[a]))
    axes = [(entries.strides[a], entries.shape[a]) for a in order if entries.shape[a] > 1]
    dims, starts, stops = [], [], []
    extent, offset = size, entries.offset
    for stride, count in axes:
        if extent % stride:
            return None
        start, offset = divmod(offset, stride)
        if start + count > extent // stride:
            return None
        dims.append(extent // stride)
        starts.append(start)
        stops.append(start + count)
        extent = stride
    dims.append(extent)
    starts.append(offset)
    stops.append(offset + 1)
    return dims, starts, stops, order


def _identity(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> IndexMap:
    return entries


def _reshape(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> IndexMap:
    return entries.reshape(entries.shape[:num_loops] + tuple(params["new_sizes"]))


def _squeeze(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> IndexMap:
    dropped = {axis + num_loops for axis in params["dimensions"]}
    return entries.reshape(tuple(size for axis, size in enumerate(entries.shape) if axis not in dropped))


def _transpose(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> IndexMap:
    return entries.transpose((*range(num_loops), *(axis + num_loops for axis in params["permutation"])))


def _slice(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> IndexMap:
    starts = (0,) * num_loops + tuple(params["start_indices"])
    stops = entries.shape[:num_loops] + tuple(params["limit_indices"])
    return entries.slice(
        starts, stops, (1,) * num_loops + tuple(params["strides"] or (1,) * len(params["start_indices"]))
    )


def _rev(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> IndexMap:
    return entries.flip(tuple(axis + num_loops for axis in params["dimensions"]))


def _broadcast_in_dim(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> IndexMap:
    axes = (*range(num_loops), *(axis + num_loops for axis in params["broadcast_dimensions"]))
    return entries.broadcast_in_dim(entries.shape[:num_loops] + tuple(params["shape"]), axes)


def _split(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> list[IndexMap]:
    axis, parts, start = params["axis"] + num_loops, [], 0
    for size in map(int, params["sizes"]):
        starts = tuple(start if a == axis else 0 for a in range(len(entries.shape)))
        stops = tuple(start + size if a == axis else n for a, n in enumerate(entries.shape))
        parts.append(entries.slice(starts, stops, (1,) * len(starts)))
        start += size
    return parts


def _unstack(entries: IndexMap, num_loops: int, params: dict[str, Any]) -> list[IndexMap]:
    axis, shape = params["axis"] + num_loops, entries.shape
    sizes = {"axis": params["axis"], "sizes": [1] * shape[axis]}
    return [piece.reshape(shape[:axis] + shape[axis + 1 :]) for piece in _split(entries, num_loops, sizes)]


MOVE_RULES: dict[str, Callable[[IndexMap, int, dict[str, Any]], IndexMap | list[IndexMap]]] = {
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "slice": _slice,
    "rev": _rev,
    "broadcast_in_dim": _broadcast_in_dim,
    "split": _split,
    "unstack": _unstack,
    # Values may be rounded or moved to another device; they still come from the same entries.
    "convert_element_type": _identity,
    "copy": _identity,
    "copy_p": _identity,
    "name": _identity,
    "device_put": _identity,
    "sharding_constraint": _identity,
    "optimization_barrier": _identity,
    "pvary": _identity,
}
"""What primitives of one array do to an `IndexMap` with `num_loops` loop axes in front."""


def concatenate(maps: list[IndexMap], axis: int) -> IndexMap:
    """The maps one after the other along an axis."""
    return IndexMap.explicit(np.concatenate([entries.indices() for entries in maps], axis))


def gather(entries: IndexMap, num_loops: int, params: dict[str, Any], indices: Array) -> IndexMap | None:
    """The entries that `jax.lax.gather` reads at these indices, `num_loops` loop axes in front.

    None if it reads anything else, or if the indices are unknown, as under an outer `jax.jit`.
    """
    shape = entries.shape[num_loops:]
    names = ("dimension_numbers", "slice_sizes", "mode")
    options = {name: params[name] for name in names}
    try:
        # JAX's own gather of positions says what it reads, whatever the mode does to indices out of range.
        positions = jnp.arange(math.prod(shape)).reshape(shape)
        read = np.asarray(jax.lax.gather(positions, indices, fill_value=-1, **options))
    except jax.errors.TracerArrayConversionError:
        return None
    if (read < 0).any():
        return None
    flat = entries.indices().reshape(*entries.shape[:num_loops], -1)
    return IndexMap.explicit(np.take(flat, read, axis=-1))
