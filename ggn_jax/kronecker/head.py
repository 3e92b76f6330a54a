"""The output factor of a layer whose output is the model's: the sum of the loss Hessians, without back-propagation.

Its output gradients for type-2 are the columns of the loss Hessian's square root, so that `B = sum_{n,s} H_{n,s}`: for
many classes, one product of matrices in place of a backward pass for each class.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.layout import Layout, Partition
from ggn_jax.kronecker.vectors import feature_axes
from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.uses import Axes
from ggn_jax.terms import Terms


def find_head(layout: Layout) -> int | None:
    """The use whose output gradients are the type-2 vectors, entry by entry, if there is one.

    Its output may have been moved, as long as a position's features are those of one term of the loss, in order.
    """
    trace = layout.trace
    number, entries = trace.head.use, trace.head.entries
    if layout.options.fisher_type is not FisherType.TYPE2 or not layout.loss.takes_trailing_axes:
        return None
    if number is None or entries is None:
        return None
    axes = trace.uses[number].output_axes
    seeded = tuple(axis + 1 for axis in feature_axes(layout.loss, trace.outputs))
    ours = _by_features(entries.reshape((trace.examples, *trace.outputs.shape)), seeded)
    theirs = _by_features(IndexMap.contiguous(axes.shape), axes.features)
    return number if axes.count(axes.groups) == 1 and _same_rows(ours, theirs) else None


def _by_features(entries: IndexMap, axes: tuple[int, ...]) -> IndexMap:
    """The entries as a matrix of positions and features."""
    rest = tuple(axis for axis in range(len(entries.shape)) if axis not in axes)
    moved = entries.transpose((*rest, *axes))
    shape = Axes(entries.shape, (), rest, axes)
    return moved.reshape((shape.count(rest), shape.count(axes)))


def _same_rows(a: IndexMap, b: IndexMap) -> bool:
    """Whether two matrices have the same rows, in any order."""
    if a.table is not None or b.table is not None or a.shape != b.shape or not a.size:
        return False
    first = [m.slice((0, 0), (m.shape[0], 1), (1, 1)).entry_set() for m in (a, b)]
    return first[0] == first[1] and (a.strides[1] == b.strides[1] or a.shape[1] == 1)


def head_factor(terms: Terms, partitions: Partition, max_dense_size: int) -> tuple[Float[Array, "G out *out"], ...]:
    """The parts of the output factor."""
    if all(run.size <= max_dense_size for run in partitions):
        return tuple(jnp.stack([terms.hessian_sum(part.start, part.stop) for part in run.parts]) for run in partitions)
    diagonal = terms.diagonal()
    axes = terms.axes or (diagonal.ndim - 1,)
    rest = tuple(axis for axis in range(diagonal.ndim) if axis not in axes)
    return (diagonal.sum(rest).reshape(1, -1),)
