"""Blocks of one shape, stacked: where their entries are in the parameters, and products with all of them at once.

A network has many layers and few shapes. What is done to blocks (averages, inverses, products) is done to stacks of
them, `[G, out, in]` with `G` the sum of their groups, so that a program grows with the number of shapes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ggn_jax._fusion import split_rows
from ggn_jax._sharding import vary_like
from ggn_jax.kronecker.algebra import Block
from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.uses import ParameterView

ParamsStructure = tuple[
    tuple[tuple[int, ...], ...], tuple[Any, ...], Any
]  # of parameters: shapes, dtypes, the pytree's


@dataclass(frozen=True)
class BlockSpec:
    """Which parameter entries a block acts on, and of what kind they are."""

    names: tuple[str, ...]
    kind: str
    views: tuple[ParameterView, ...]  # a weight, and a bias that is one more input; or one array
    split: tuple[int, int] = (1, 1)
    """Into how many equal parts outputs and inputs are cut; each pair of parts is a group."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`[G, out, in]`."""
        groups, out, inputs = self.views[0].shape
        outs, ins = self.split
        return groups * outs * ins, out // outs, (inputs + len(self.views) - 1) // ins


@dataclass(frozen=True)
class Stack:
    """Blocks whose entries have the same layout, each in parameters of its own."""

    specs: tuple[BlockSpec, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`[G, out, in]` of all of them."""
        return sum(spec.shape[0] for spec in self.specs), *self.specs[0].shape[1:]

    @property
    def starts(self) -> tuple[int, ...]:
        """The first group of each block."""
        return tuple(accumulate((spec.shape[0] for spec in self.specs), initial=0))[:-1]

    @property
    def unused(self) -> bool:
        """Whether no output depends on the entries."""
        return self.specs[0].kind == "unused"


class Blocks(eqx.Module):
    """The blocks of a curvature matrix, and the entries that they act on."""

    blocks: tuple[Block, ...]
    """One for each stack."""
    stacks: tuple[Stack, ...] = eqx.field(static=True)

    def unstacked(self) -> list[tuple[BlockSpec, Block]]:
        """The blocks one by one."""
        return [pair for stack, block in zip(self.stacks, self.blocks, strict=True) for pair in unstack(stack, block)]


def unstack(stack: Stack, block: Block) -> list[tuple[BlockSpec, Block]]:
    """The blocks of a stack, each with its spec."""
    if len(stack.specs) == 1:
        return [(stack.specs[0], block)]

    def one(spec: BlockSpec, start: int) -> Block:
        part: Block = jax.tree.map(lambda x: x[start : start + spec.shape[0]], block)
        return part

    return [(spec, one(spec, start)) for spec, start in zip(stack.specs, stack.starts, strict=True)]


def params_structure(params: PyTree[Array]) -> ParamsStructure:
    """The static part of parameters: shapes, dtypes and the pytree."""
    leaves, tree = jax.tree.flatten(params)
    return tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves), tree


def entry_layout(spec: BlockSpec, sizes: Sequence[int]) -> Any:
    """The layout of a block's entries within its parameters: equal for blocks that can be stacked."""
    found = []
    for view in spec.views:
        first, last = leaf_range(view, sizes)
        found.append((view.shape, view.entries.shifted(-sum(sizes[:first])), tuple(sizes[first:last])))
    return spec.split, *found


def leaf_range(view: ParameterView, sizes: Sequence[int]) -> tuple[int, int]:
    """The range of (indices of) parameters that a view has entries of."""
    numbers = view.entries.owning_leaves(sizes)
    return numbers[0], numbers[-1] + 1


@dataclass(frozen=True)
class _Column:
    """One view of each block of a stack: all weights, or all biases that are one more input."""

    views: tuple[ParameterView, ...]
    ranges: tuple[tuple[int, int], ...]  # of the parameters that each view has entries of
    entries: IndexMap  # within these parameters: the same for all blocks
    size: int  # of these parameters
    split: tuple[int, int]

    @property
    def width(self) -> int:
        """The number of inputs of a group."""
        return self.views[0].shape[2] // self.split[1]

    def read(self, flat: Float[Array, "blocks size"]) -> Float[Array, "G out in"]:
        """The entries, as a linear function of the flat and stacked parameters."""
        _, out, inputs = self.views[0].shape
        outs, ins = self.split
        # One gather for all blocks of the stack, since their entries have the same layout within their parameters.
        whole = jax.vmap(self.entries.gather_fn(self.size))(flat)
        parts = whole.reshape(-1, outs, out // outs, ins, inputs // ins)
        return jnp.swapaxes(parts, 2, 3).reshape(-1, out // outs, inputs // ins)


def _columns(stack: Stack, sizes: Sequence[int]) -> list[_Column]:
    columns = []
    for views in zip(*(spec.views for spec in stack.specs), strict=True):
        ranges = tuple(leaf_range(view, sizes) for view in views)
        first, last = ranges[0]
        entries = views[0].entries.shifted(-sum(sizes[:first]))
        columns.append(_Column(views, ranges, entries, sum(sizes[first:last]), stack.specs[0].split))
    return columns


def _stacked(parts: list[Array]) -> Array:
    return parts[0][None] if len(parts) == 1 else jnp.stack(_promote(parts))


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(_promote(parts), axis=-1)


def _promote(arrays: list[Array]) -> list[Array]:
    """The arrays in one dtype: parameters may have several."""
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.result_type(*(array.dtype for array in arrays))
    return [array.astype(wide) for array in arrays]


def read_entries(stacks: Sequence[Stack], tree: PyTree[Array]) -> list[Float[Array, "G out in"]]:
    """The entries of a pytree like the parameters, for each stack."""
    leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]
    sizes = [leaf.size for leaf in leaves]

    def column(column: _Column) -> Array:
        return column.read(_stacked([_joined(leaves[slice(*owned)]) for owned in column.ranges]))

    return [_joined([column(c) for c in _columns(stack, sizes)]) for stack in stacks]


def write_entries(
    stacks: Sequence[Stack], structure: ParamsStructure, parts: Sequence[Float[Array, "G out in"]]
) -> PyTree[Array]:
    """A pytree like the parameters, with these entries for the stacks, and 0 elsewhere.

    A parameter of which several stacks have entries is the sum of what they write, each with zeros for the others.
    """
    shapes, dtypes, tree = structure
    sizes = [math.prod(shape) for shape in shapes]
    total: list[Array | None] = [None] * len(shapes)
    for part, stack in zip(parts, stacks, strict=True):
        columns, start = _columns(stack, sizes), 0
        for column in columns:
            stop = start + column.width
            for leaf, new in _rows(column, part.reshape(stack.shape)[..., start:stop], sizes):
                old = total[leaf]
                new = new.astype(dtypes[leaf])
                total[leaf] = new if old is None else old + new
            start = stop
    leaves = [
        vary_like(jnp.zeros(shape, dtype), list(parts)) if flat is None else flat.reshape(shape)
        for flat, shape, dtype in zip(total, shapes, dtypes, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def _rows(column: _Column, part: Array, sizes: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """The flat parameters that a column has entries of, with their indices: the transpose of `read`."""
    blocks = len(column.ranges)
    flat = vary_like(jnp.zeros((blocks, column.size), part.dtype), part)  # only its type is used
    (stacked,) = jax.linear_transpose(column.read, flat)(part)
    rows = split_rows(stacked) if blocks >= MIN_SPLIT_ROWS else list(stacked)
    for row, owned in zip(rows, column.ranges, strict=True):
        ends = list(accumulate(sizes[slice(*owned)]))
        yield from zip(range(*owned), jnp.split(row, ends[:-1]) if len(ends) > 1 else [row], strict=True)


MIN_SPLIT_ROWS = 4  # fewer rows are not worth the loop counter of `split_rows`


def blocks_mv(blocks: Blocks, structure: ParamsStructure, vector: PyTree[Array]) -> PyTree[Array]:
    """The blocks' product with a pytree like the parameters; the result has `structure`."""
    return write_entries(blocks.stacks, structure, stacked_mv(blocks.blocks, read_entries(blocks.stacks, vector)))


def stacked_mv(blocks: Sequence[Block], parts: Sequence[Float[Array, "G out in"]]) -> list[Float[Array, "G out in"]]:
    """The blocks' products with stacked entries, in the blocks' dtypes."""
    return [block.mv(m.astype(jax.tree.leaves(block)[0].dtype)) for block, m in zip(blocks, parts, strict=True)]
