"""Products of arrays without their axes of length one.

A model runs on one example at a time, as a batch of one, and is mapped over examples. Mapped, a product has an axis of
length one between those of the examples and of the features. XLA's CPU compiler transposes both arrays for the
transpose of such a product, a weight's gradient, which then takes two to three times as long.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

DOT = frozenset({"dot_general"})


def has_unit_axes(eqn: Any) -> bool:
    """Whether an equation is a product of arrays with axes of length one that only pass through."""
    if eqn.primitive.name not in DOT or eqn.params.get("out_sharding") is not None:
        return False
    return any(_unit_axes(eqn))


def dot(eqn: Any, lhs: Array, rhs: Array) -> Array:
    """The equation's result."""
    gone = _unit_axes(eqn)
    summed, shared = (tuple(map(_renumbered, axes, gone)) for axes in eqn.params["dimension_numbers"])
    product = jax.lax.dot_general(
        lhs.squeeze(gone[0]),
        rhs.squeeze(gone[1]),
        ((summed[0], summed[1]), (shared[0], shared[1])),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    return product.reshape(eqn.outvars[0].aval.shape)


def _unit_axes(eqn: Any) -> list[tuple[int, ...]]:
    """The axes of length one of each array that are neither summed over nor common to both."""
    summed, shared = eqn.params["dimension_numbers"]
    return [
        tuple(axis for axis, size in enumerate(atom.aval.shape) if size == 1 and axis not in (*contracted, *batch))
        for atom, contracted, batch in zip(eqn.invars, summed, shared, strict=True)
    ]


def _renumbered(axes: Sequence[int], gone: Sequence[int]) -> tuple[int, ...]:
    """The numbers of these axes without those that are gone."""
    return tuple(axis - sum(other < axis for other in gone) for axis in axes)
