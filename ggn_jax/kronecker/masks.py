"""A mask of the inputs' positions, arranged as each layer has these positions."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ggn_jax.layers import Trace
from ggn_jax.layers.provenance import AxisProvenance, position_provenance


class _AmbiguousMaskError(Exception):
    """The trace does not tell which axis of the mask a layer's axis is; says what would help."""


def arrange_masks(trace: Trace, mask: Array | None) -> list[Bool[Array, "N S"] | None]:
    """For each use, the mask in the order of its positions; None if it has other positions.

    Axes are matched by size. Among several of one size, the layer's axes must have known provenance, and the one that
    comes first in the inputs is the mask's first. Axes of length 1 are ignored (unless the mask has no others), and so
    are those that weights made, such as heads.
    """
    if mask is None:
        return [None] * len(trace.uses)
    if trace.examples > 1:  # coupled examples are positions
        mask = mask.reshape(-1, trace.examples, *mask.shape[1:])
    result = []
    for use, axes in zip(trace.uses, position_provenance(trace), strict=True):
        try:
            result.append(_arranged(mask, axes, _match(mask.shape, axes)))
        except _AmbiguousMaskError as error:
            owners = use.weight.entries.owning_leaves([math.prod(shape) for shape in trace.shapes])
            names = ", ".join(f"params{trace.names[leaf]}" for leaf in owners)
            raise ValueError(
                f"mask of shape {mask.shape}: its axes cannot be told apart in the layer of {names} ({use.source}), as"
                f" {error}"
            ) from None
    return result


Match = tuple[int | None, ...]  # for each position axis of a layer, which axis of the mask it is


def _match(shape: tuple[int, ...], axes: Sequence[tuple[int, AxisProvenance]]) -> Match | None:
    """Which axes are the mask's; None for a layer with other positions."""
    several = any(size > 1 for size in shape[1:])
    wanted = [axis for axis in range(1, len(shape)) if shape[axis] > 1 or not several]
    own = [i for i, (size, source) in enumerate(axes) if source != 0 and (size > 1 or not several)]
    if not several and all(axes[i][0] == 1 for i in own) and any(axes[i][1] is None for i in own):
        raise _AmbiguousMaskError(
            "one position for each example cannot be told from none. Pad to two positions, or leave out the examples"
            " that the mask leaves out."
        )
    if sorted(axes[i][0] for i in own) != sorted(shape[axis] for axis in wanted):
        return None
    result: list[int | None] = [None] * len(axes)
    for size in {shape[axis] for axis in wanted}:
        mine, theirs = [i for i in own if axes[i][0] == size], [axis for axis in wanted if shape[axis] == size]
        sources = [axes[i][1] for i in mine]
        if len(mine) > 1 and (None in sources or len(set(sources)) < len(sources)):
            raise _AmbiguousMaskError(
                f"several have length {size}. Pad one of them, in inputs and mask, by a position that the mask leaves"
                " out, so that the lengths differ."
            )
        for i, axis in zip(sorted(mine, key=lambda i: axes[i][1] or 0), theirs, strict=True):
            result[i] = axis
    return tuple(result)


def _arranged(
    mask: Array, axes: Sequence[tuple[int, AxisProvenance]], match: Match | None
) -> Bool[Array, "N S"] | None:
    if match is None:
        return None
    size, kept = mask.shape[0], [axis for axis in match if axis is not None]
    rest = [axis for axis in range(1, mask.ndim) if axis not in kept]  # of length 1
    lengths = [1 if axis is None else mask.shape[axis] for axis in match]
    moved = mask.transpose(0, *kept, *rest).reshape(size, *lengths)
    return jnp.broadcast_to(moved, (size, *(length for length, _ in axes))).reshape(size, -1)
