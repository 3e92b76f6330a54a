"""What a layer is: one equation in which a parameter array meets data linearly, and how its arrays are laid out.

Every layer is brought to one form: groups `G` that share nothing, sharing positions `S` that use the same weights, and
matrices `[out, in]`. Inputs become `[G, N, S, in]`, output gradients `[G, N, S, out]`, weights `[G, out, in]`.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ggn_jax.layers.index_map import IndexMap


class NotALayerError(Exception):
    """This use of a parameter has no Kronecker form; says why."""


@dataclass(frozen=True)
class Axes:
    """The axes of an array (after it is reshaped to `shape`), by their role in the layer."""

    shape: tuple[int, ...]
    groups: tuple[int, ...]
    positions: tuple[int, ...]
    features: tuple[int, ...]

    def arrange(self, x: Array) -> Array:
        """`[N, *shape]` as `[G, N, S, features]`."""
        x = x.reshape(x.shape[0], *self.shape)
        groups, positions, features = (
            [axis + 1 for axis in axes] for axes in (self.groups, self.positions, self.features)
        )
        x = x.transpose(*groups, 0, *positions, *features)
        return x.reshape(self.count(self.groups), -1, self.count(self.positions), self.count(self.features))

    def count(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)


@dataclass(frozen=True)
class ParameterView:
    """Which parameter entries a weight has, as an array `[G, out, in]`."""

    entries: IndexMap  # [*groups, *out, *in]
    shape: tuple[int, int, int]

    def __repr__(self) -> str:  # tables are long
        return f"ParameterView({self.shape})"


@dataclass(frozen=True)
class Patches:
    """How the patches of a convolution's input, one for each position of its output, are cut out."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    spec: tuple[int, ...]  # of the input: batch, feature, spatial axes
    groups: int
    channels_first: bool

    def __call__(self, x: Array) -> Array:
        """`[B, *input]` as `[B * batch, *positions, groups, in]`."""
        x = self.pad_and_dilate(x)
        shifted = [self.window_slice(x, offset) for offset in all_indices(self.kernel)]
        patches = jnp.stack(shifted, axis=-2)  # [B, *positions, kernel, channels]
        patches = patches.reshape(*patches.shape[:-1], self.groups, -1)
        # Groups first, then channels and kernel in the order of the weight's axes: the columns of its matrix.
        patches = jnp.moveaxis(patches, -3, -1) if self.channels_first else jnp.moveaxis(patches, -2, -3)
        return patches.reshape(*patches.shape[:-2], -1)

    def pad_and_dilate(self, x: Array) -> Array:
        """`[B, *input]` as `[B * batch, *spatial, channels]`, padded and dilated."""
        batch, feature, *spatial = (axis + 1 for axis in self.spec)
        x = x.transpose(0, batch, *spatial, feature)
        x = x.reshape(-1, *x.shape[2:])
        config = [(0, 0, 0), *((*pad, d - 1) for pad, d in zip(self.padding, self.input_dilation, strict=True))]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])

    def window_slice(self, x: Array, offset: tuple[int | None, ...]) -> Array:
        """What the kernel's entry at `offset` meets at each position, of a padded input; None is the whole axis."""
        starts, stops, steps = [0], [x.shape[0]], [1]
        for axis, place in enumerate(offset):
            size, stride, dilation = x.shape[axis + 1], self.strides[axis], self.kernel_dilation[axis]
            start = 0 if place is None else place * dilation
            starts.append(start)
            stops.append(size if place is None else start + stride * (self.count(x, axis) - 1) + 1)
            steps.append(1 if place is None else stride)
        return jax.lax.slice(x, (*starts, 0), (*stops, x.shape[-1]), (*steps, 1))

    def count(self, x: Array, axis: int) -> int:
        """How many positions there are along a spatial axis of a padded input."""
        reach = self.kernel_dilation[axis] * (self.kernel[axis] - 1) + 1
        return (x.shape[axis + 1] - reach) // self.strides[axis] + 1


def all_indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The indices of an array, in C order."""
    return list(product(*map(range, shape)))


@dataclass(frozen=True)
class TableAxis:
    """An axis of a table whose rows are read: one of several, where a row is named by several indices."""

    column: int  # where its index is along the last axis of the indices
    size: int
    stride: int  # of row numbers, in C order of these axes


@dataclass(frozen=True)
class Use:
    """One layer: an equation, the operand it takes as data, and how its arrays are laid out."""

    kind: str  # "linear", "convolution", "embedding"
    path: tuple[int, ...]  # of equation indices, through nested jaxprs
    operand: int  # which input of the equation is the data
    loops: tuple[int, ...]  # lengths of the scans around it
    weight: ParameterView
    bias: ParameterView | None
    input_axes: Axes
    output_axes: Axes
    output_shape: tuple[int, ...]  # of one example, loops first
    output_dtype: Any
    patches: Patches | None
    table_axes: tuple["TableAxis", ...]  # embedding: which row is read
    fills: bool  # embedding: rows out of range are not read (but for `clip`)
    factor: float  # the equation's operand is the weight times this
    constant: bool  # whether the other operand is the same for all examples
    source: str
    module: str

    @property
    def positions(self) -> tuple[int, ...]:
        """The sizes of the axes of sharing positions that are longer than 1."""
        axes = self.output_axes
        return tuple(axes.shape[axis] for axis in axes.positions if axes.shape[axis] > 1)

    @property
    def num_positions(self) -> int:
        return math.prod(self.positions)

    def arrange_inputs(self, x: Array) -> Array:
        """What was captured, `[N, *loops, *operand]`, as `[G, N, S, in]`; an embedding's row numbers, `[G, N, S]`."""
        if self.kind == "embedding":
            return self._rows(self.input_axes.arrange(x))
        if self.patches is None:
            return self.input_axes.arrange(x)
        size, loops = x.shape[0], self.loops
        x = self.patches(x.reshape(-1, *x.shape[1 + len(loops) :]))
        return self.input_axes.arrange(x.reshape(size, -1))

    def _rows(self, indices: Array) -> Array:
        """The rows' numbers, from an index for each axis of the table; one past the last for what is out of range."""
        if indices.dtype.itemsize < 4:  # which may be too small for the product of the axes' sizes
            indices = indices.astype(jnp.int32)
        number = jnp.zeros(indices.shape[:-1], indices.dtype)
        outside = jnp.zeros(number.shape, bool)
        for axis in self.table_axes:
            index = indices[..., axis.column]
            inside = jnp.clip(index, 0, axis.size - 1)
            number, outside = number + inside * axis.stride, outside | (inside != index)
        return jnp.where(outside, self.weight.shape[2], number) if self.fills else number

    def arrange_output_grads(self, g: Array) -> Array:
        """`[N, *loops, *output]` as `[G, N, S, out]`."""
        return self.output_axes.arrange(g)


@dataclass(frozen=True)
class ElementwiseUse:
    """Parameters that, moved or computed with, scale or shift data entry by entry."""

    kind: str  # "scale" or "shift"
    leaves: frozenset[int]
    source: str
    module: str
    bias_of: int | None = None  # the layer to whose output it is added


@dataclass(frozen=True)
class UncoveredUse:
    """A use that has no Kronecker form."""

    leaves: frozenset[int]
    why: str
    source: str
    module: str


def _weight_view(
    entries: IndexMap, groups: tuple[int, ...], out: tuple[int, ...], inputs: tuple[int, ...], what: str
) -> ParameterView:
    """The view with these axes; along all other axes the weight is broadcast, and one index stands for all."""
    kept = (*groups, *out, *inputs)
    starts = (0,) * len(entries.shape)
    stops = tuple(size if axis in kept else min(size, 1) for axis, size in enumerate(entries.shape))
    cut = entries.slice(starts, stops, (1,) * len(starts))
    rest = tuple(axis for axis in range(len(entries.shape)) if axis not in kept)
    cut = cut.transpose(rest + kept).reshape(tuple(entries.shape[axis] for axis in kept))
    if not cut.is_injective():
        raise NotALayerError(f"its entries are repeated within the weight of this {what}")
    sizes = (math.prod(entries.shape[axis] for axis in axes) for axes in (groups, out, inputs))
    return ParameterView(cut, tuple(sizes))  # type: ignore[arg-type]  # three of them


def from_dot(eqn: Any, weight: int, entries: IndexMap, loops: tuple[int, ...]) -> dict[str, Any]:
    """A matrix product, batched or not, with the weight as operand number `weight`.

    Batch axes along which the weight is broadcast (as `vmap` makes them) and loops that share it are positions; the
    others are groups. Its contracted axes are inputs, and its free axes outputs.
    """
    (contract, batch) = eqn.params["dimension_numbers"]
    num_loops, data = len(loops), 1 - weight
    ranks = [len(var.aval.shape) for var in eqn.invars]
    free = [[a for a in range(ranks[i]) if a not in (*contract[i], *batch[i])] for i in range(2)]
    out_of_batch = range(num_loops, num_loops + len(batch[0]))
    first = num_loops + len(batch[0])
    out_of_free = [range(first, first + len(free[0])), range(first + len(free[0]), first + len(free[0]) + len(free[1]))]

    repeats = entries.repeats()
    shared = (
        [i for i in range(num_loops) if repeats[i]],
        [i for i, a in enumerate(batch[weight]) if repeats[a + num_loops]],
    )
    own = (
        [i for i in range(num_loops) if not repeats[i]],
        [i for i, a in enumerate(batch[weight]) if not repeats[a + num_loops]],
    )
    return {
        "kind": "linear",
        "operand": data,
        "weight": _weight_view(
            entries,
            (*own[0], *(batch[weight][i] + num_loops for i in own[1])),
            tuple(a + num_loops for a in free[weight]),
            tuple(a + num_loops for a in contract[weight]),
            "matrix product",
        ),
        "input_axes": Axes(
            (*loops, *eqn.invars[data].aval.shape),
            (*own[0], *(batch[data][i] + num_loops for i in own[1])),
            (*shared[0], *(batch[data][i] + num_loops for i in shared[1]), *(a + num_loops for a in free[data])),
            tuple(a + num_loops for a in contract[data]),
        ),
        "output_axes": Axes(
            (*loops, *eqn.outvars[0].aval.shape),
            (*own[0], *(out_of_batch[i] for i in own[1])),
            (*shared[0], *(out_of_batch[i] for i in shared[1]), *out_of_free[data]),
            tuple(out_of_free[weight]),
        ),
    }


def from_conv(eqn: Any, weight: int, entries: IndexMap, loops: tuple[int, ...]) -> dict[str, Any]:
    """A convolution of any rank, stride, padding, dilation and number of groups, as a product with patches."""
    params = eqn.params
    if weight != 1:
        raise NotALayerError("it is the input of a convolution whose kernel is data")
    if params["batch_group_count"] != 1:
        raise NotALayerError("the convolution has batch_group_count > 1")
    num_loops, groups = len(loops), int(params["feature_group_count"])
    spec, kernel_spec, out_spec = params["dimension_numbers"]
    kernel_shape, out_shape = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    out_axis, in_axis, *spatial = kernel_spec
    kernel = tuple(kernel_shape[axis] for axis in spatial)
    channels_first = in_axis < min(spatial, default=-1)

    repeats = entries.repeats()
    shared, own = [i for i in range(num_loops) if repeats[i]], [i for i in range(num_loops) if not repeats[i]]
    # [*loops, groups, out / groups, in / groups, *kernel] in the order of the kernel's own axes.
    inner = (in_axis, *spatial) if channels_first else (*spatial, in_axis)
    split = entries.transpose((*range(num_loops), out_axis + num_loops, *(axis + num_loops for axis in inner)))
    split = split.reshape(
        (*split.shape[:num_loops], groups, split.shape[num_loops] // groups, *split.shape[num_loops + 1 :])
    )
    view = _weight_view(
        split, (*own, num_loops), (num_loops + 1,), tuple(range(num_loops + 2, len(split.shape))), "convolution"
    )

    out_batch, feature, *out_spatial = out_spec
    positions = tuple(out_shape[axis] for axis in out_spatial)
    shape = list(out_shape)
    shape[feature : feature + 1] = [groups, out_shape[feature] // groups]

    def split_axis(axis: int) -> int:  # where an axis is once the features are split
        return axis + num_loops + (axis > feature)

    size = eqn.invars[0].aval.shape[spec[0]]
    after = num_loops + 1 + len(positions)
    return {
        "kind": "convolution",
        "operand": 0,
        "weight": view,
        "patches": Patches(
            kernel,
            tuple(params["window_strides"]),
            tuple((int(low), int(high)) for low, high in params["padding"]),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            tuple(spec),
            groups,
            channels_first,
        ),
        "input_axes": Axes(
            (*loops, size, *positions, groups, view.shape[2]),
            (*own, after),
            (*shared, *range(num_loops, after)),
            (after + 1,),
        ),
        "output_axes": Axes(
            (*loops, *shape),
            (*own, feature + num_loops),
            (*shared, split_axis(out_batch), *map(split_axis, out_spatial)),
            (feature + num_loops + 1,),
        ),
    }


def from_gather(eqn: Any, weight: int, entries: IndexMap, loops: tuple[int, ...]) -> dict[str, Any]:
    """Rows of a table, as in an embedding: a matrix product with one-hot inputs, which are never formed."""
    assert weight == 0  # indices are integers, which no parameter is
    numbers, num_loops = eqn.params["dimension_numbers"], len(loops)
    table, indices = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    sizes, fills = tuple(eqn.params["slice_sizes"]), "FILL" in str(eqn.params["mode"])
    mapped = tuple(numbers.start_index_map)
    # An axis that is read as a whole has only one place to start from: its index is clipped to 0, and names no row.
    rows = tuple(axis for axis in mapped if sizes[axis] < table[axis]) or mapped[:1]
    whole = tuple(1 if axis in rows else size for axis, size in enumerate(table))
    if not rows or sizes != whole or (fills and len(rows) < len(mapped)) or numbers.operand_batching_dims:
        raise NotALayerError("this indexing reads other things than whole rows")
    rows = tuple(sorted(rows))
    repeats = entries.repeats()
    shared, own = tuple(i for i in range(num_loops) if repeats[i]), tuple(i for i in range(num_loops) if not repeats[i])
    features = tuple(axis for axis in range(len(table)) if axis not in rows)
    sliced = [axis for axis in range(len(table)) if axis not in numbers.collapsed_slice_dims]
    kept = tuple(out + num_loops for axis, out in zip(sliced, numbers.offset_dims, strict=True) if axis in features)
    out_rank = len(eqn.outvars[0].aval.shape)
    counts = [table[axis] for axis in rows]
    return {
        "kind": "embedding",
        "operand": 1,
        "weight": _weight_view(
            entries, own, tuple(a + num_loops for a in features), tuple(a + num_loops for a in rows), "embedding"
        ),
        "table_axes": tuple(
            TableAxis(mapped.index(axis), table[axis], math.prod(counts[i + 1 :])) for i, axis in enumerate(rows)
        ),
        "fills": fills,
        "input_axes": Axes(
            (*loops, *indices),
            own,
            (*shared, *range(num_loops, num_loops + len(indices) - 1)),
            (num_loops + len(indices) - 1,),
        ),
        "output_axes": Axes(
            (*loops, *eqn.outvars[0].aval.shape),
            own,
            (*shared, *(axis for axis in range(num_loops, num_loops + out_rank) if axis not in kept)),
            kept,
        ),
    }


LAYER_PRIMITIVES = {"dot_general": from_dot, "conv_general_dilated": from_conv, "gather": from_gather}
"""The primitives in which a parameter array can meet data as the weight of a layer."""


def find_bias(use: Use, output: IndexMap, bias: IndexMap) -> ParameterView | None:
    """The bias `[G, out, 1]` that is added to a layer's output, if it is one number per output feature; else None.

    `output` says which entry of the layer's output each entry of the sum is, `bias` which parameter is added to it.
    """
    axes = use.output_axes
    if output.table is not None or bias.table is not None or output.size != math.prod(axes.shape):
        return None
    order = sorted(range(len(output.shape)), key=lambda a: (-output.strides[a], output.shape[a]))
    # Undo the moves of the output: the sum must have each of the layer's outputs once, in order.
    moved = output.transpose(tuple(order))
    if moved.reshape((moved.size,)) != IndexMap.contiguous((moved.size,)):
        return None
    seen = bias.transpose(tuple(order)).reshape(axes.shape)
    repeats = seen.repeats()
    wanted = axes.positions
    if any(repeats[a] != (a in wanted) for a in range(len(axes.shape)) if axes.shape[a] > 1):
        return None
    try:
        view = _weight_view(seen, axes.groups, axes.features, (), "sum")
    except NotALayerError:
        return None
    return ParameterView(view.entries, (*view.shape[:2], 1))
