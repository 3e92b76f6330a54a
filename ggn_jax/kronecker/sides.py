"""The two factors of one use of a layer: that of its inputs and that of its output gradients, in loops step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ggn_jax._checks import compute_dtype
from ggn_jax.kronecker.algebra import Factor
from ggn_jax.kronecker.inputs import Inputs, second_moment
from ggn_jax.kronecker.layout import Cuts, Layout, cut, has_own_steps
from ggn_jax.kronecker.masks import arrange_masks
from ggn_jax.kronecker.options import Options
from ggn_jax.layers import Tap, Use
from ggn_jax.layers.uses import Axes

Given = tuple[Array | None, tuple[Array, Array] | None]  # a mask, and weights
Weights = dict[int, tuple[Array, Array]]  # of uses, by their numbers


@dataclass(frozen=True, eq=False)
class Sides:
    """How the factors of a use are made of its arrays."""

    use: Use
    joint: bool
    cuts: tuple[Cuts, Cuts]  # of what the use has for outputs, and of what it has for inputs
    mask: Bool[Array, "N S"] | None
    options: Options
    wide: Any
    together: int
    """How many examples a row of the arrays is of."""
    weights: tuple[Array, Array] | None = None
    """What the sums over inputs and over output gradients are multiplied by; where that is 0, so are they."""

    def rows(self, x: Array) -> Inputs:
        """Of the inputs, `[N, *loops, *operand]`."""
        return Inputs(self.use, x, self.mask, self.options, self.wide)

    def inputs(self, x: Array) -> tuple[Factor, ...]:
        """`sum a a^T` over examples and positions, of each part."""
        return self._weighted(self.rows(x).factors(self.joint, self.cuts[1]), 0)

    def output_grads(self, g: Array) -> tuple[Factor, ...]:
        """`sum g g^T` over vectors, examples and positions, of each part; `[V * N, *loops, *output]`."""
        g = self.use.arrange_output_grads(g).astype(self.wide)
        if self.options.sharing == "reduce":
            g = jnp.sum(g, axis=2, keepdims=True)
        return self.weighted_outputs([second_moment(part, self.options) for part in cut(g, self.cuts[0], 0)])

    def weighted_outputs(self, factors: Sequence[Factor]) -> tuple[Factor, ...]:
        """Of sums over output gradients."""
        return self._weighted(factors, 1)

    def _weighted(self, factors: Sequence[Factor], which: int) -> tuple[Factor, ...]:
        if self.weights is None:
            return tuple(factors)
        weight = self.weights[which].astype(self.wide)
        return tuple(jnp.where(weight > 0, weight * x, 0) for x in factors)

    def count(self, size: int) -> Float[Array, ""]:
        """How many rows of inputs a batch of so many examples has."""
        size //= self.together
        reduce = self.options.sharing == "reduce"
        if self.mask is None:
            return jnp.asarray(size * (1 if reduce else self.use.num_positions), self.wide)
        counted = jnp.any(self.mask, axis=1) if reduce else self.mask
        return jnp.sum(counted.astype(self.wide))

    def tap(self) -> Tap | None:
        """What makes the factors of each step of the loops around a use, if each step has a weight of its own.

        Where steps share a weight, they are positions, which are summed over.
        """
        # What is the same for all examples is not mapped over them: cotangents would come in summed already.
        if self.use.constant or not has_own_steps(self.use):
            return None
        use = _of_one_step(self.use)

        def step(given: Given) -> Sides:
            return replace(self, use=use, mask=given[0], weights=given[1])

        given = self.mask, self.weights
        return Tap(lambda given, x: step(given).inputs(x), lambda given, g: step(given).output_grads(g), given)


def find_sides(layout: Layout, mask: Array | None, weights: Weights | None = None) -> dict[int, Sides]:
    """Of each use of a layer, by the uses' numbers."""
    trace, wide = layout.trace, compute_dtype(layout.trace.outputs.dtype)
    masks = arrange_masks(trace, mask)
    found = {}
    for layer in layout.plan.layers:
        outs, ins = layout.cuts(layer)
        for n, swapped in zip(layer.uses, layer.swapped, strict=True):
            cuts = (ins, outs) if swapped else (outs, ins)
            weight = None if weights is None else weights[n]
            how = layout.options, wide, trace.examples
            found[n] = Sides(trace.uses[n], layout.joint(layer), cuts, masks[n], *how, weight)
    return found


def mean_weights(layout: Layout, mask: Array | None, size: int, counts: Bool[Array, ""]) -> Weights:
    """Those with which sums over a batch of this size, also chunk by chunk, are its factors; 0 where nothing counts.

    Multiplied in the loops that make them, factors need not be read and written once more.
    """
    sides, found = find_sides(layout, mask), {}
    for layer in layout.plan.layers:
        rows = [sides[n].count(size) for n in layer.uses]
        if layout.options.tied == "concatenate" and rows:
            rows = [sum(rows[1:], start=rows[0])] * len(rows)
        for n, count in zip(layer.uses, rows, strict=True):
            some = counts & (count > 0)
            found[n] = jnp.where(some, 1 / jnp.where(some, count, 1), 0), counts
    return found


def find_taps(sides: Mapping[int, Sides]) -> dict[int, Tap]:
    """Of the uses that can be tapped."""
    taps = {n: side.tap() for n, side in sides.items()}
    return {n: tap for n, tap in taps.items() if tap is not None}


def groups_of_steps(factors: Sequence[Factor], use: Use) -> tuple[Factor, ...]:
    """The factors of all steps of the loops, `[*loops, G, ...]`, as those of so many more groups."""
    lead = len(use.loops)
    return tuple(x.reshape(-1, *x.shape[lead + 1 :]) for x in factors)


def _of_one_step(use: Use) -> Use:
    lead = len(use.loops)

    def inside(axes: Axes) -> Axes:
        def moved(which: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis - lead for axis in which if axis >= lead)

        return Axes(axes.shape[lead:], moved(axes.groups), moved(axes.positions), moved(axes.features))

    return replace(
        use,
        loops=(),
        input_axes=inside(use.input_axes),
        output_axes=inside(use.output_axes),
        output_shape=use.output_shape[lead:],
    )
