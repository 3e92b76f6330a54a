"""The two factors of one use of a layer, of its inputs and of its output gradients; in loops, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ggn_jax._checks import compute_dtype
from ggn_jax.kronecker.algebra import Factor
from ggn_jax.kronecker.inputs import Inputs, second_moment
from ggn_jax.kronecker.layout import Layout, Partition, has_own_steps, split_parts
from ggn_jax.kronecker.masks import arrange_masks
from ggn_jax.kronecker.options import Options
from ggn_jax.layers import Tap, Use
from ggn_jax.layers.uses import Axes

Given = tuple[Array | None, tuple[Array, Array] | None]  # a mask, and weights
Weights = dict[int, tuple[Array, Array]]  # of uses, by their numbers


@dataclass(frozen=True, eq=False)
class UseFactors:
    """How the factors of a use are made from its arrays."""

    use: Use
    joint: bool
    partitions: tuple[Partition, Partition]  # of the axes that are outputs and inputs for this use
    mask: Bool[Array, "N S"] | None
    options: Options
    wide: Any
    examples: int
    """How many coupled examples are one row of the arrays; 1 where they are independent."""
    weights: tuple[Array, Array] | None = None
    """Weights of the sums over inputs and over output gradients; 0 makes a sum 0, even if it is not finite."""

    def rows(self, x: Array) -> Inputs:
        """The inputs, captured as `[N, *loops, *operand]`, in matrix form."""
        return Inputs(self.use, x, self.mask, self.options, self.wide)

    def inputs(self, x: Array) -> tuple[Factor, ...]:
        """`sum a a^T` over examples and positions, of each part."""
        return self._weighted(self.rows(x).factors(self.joint, self.partitions[1]), 0)

    def output_grads(self, g: Array) -> tuple[Factor, ...]:
        """`sum g g^T` over vectors, examples and positions, of each part; `[V * N, *loops, *output]`."""
        g = self.use.arrange_output_grads(g).astype(self.wide)
        if self.options.sharing == "reduce":
            g = jnp.sum(g, axis=2, keepdims=True)
        return self.weighted_outputs(
            [second_moment(part, self.options) for part in split_parts(g, self.partitions[0], 0)]
        )

    def weighted_outputs(self, factors: Sequence[Factor]) -> tuple[Factor, ...]:
        """Sums over output gradients times their weight."""
        return self._weighted(factors, 1)

    def _weighted(self, factors: Sequence[Factor], which: int) -> tuple[Factor, ...]:
        if self.weights is None:
            return tuple(factors)
        weight = self.weights[which].astype(self.wide)
        return tuple(jnp.where(weight > 0, weight * x, 0) for x in factors)

    def count(self, size: int) -> Float[Array, ""]:
        """How many rows of inputs a batch of so many examples has."""
        size //= self.examples
        reduce = self.options.sharing == "reduce"
        if self.mask is None:
            return jnp.asarray(size * (1 if reduce else self.use.num_positions), self.wide)
        counted = jnp.any(self.mask, axis=1) if reduce else self.mask
        return jnp.sum(counted.astype(self.wide))

    def tap(self) -> Tap | None:
        """A tap that makes the factors of each step of the loops around the use, if each step has its own weight.

        Where steps share a weight, they are positions, which are summed over. Without a tap, all steps' activations
        would be kept until the loop's end; with one, only their factors are.
        """
        # An operand that is the same for all examples is not mapped, and the cotangents of its layer's output may
        # arrive already summed over examples.
        if self.use.constant or not has_own_steps(self.use):
            return None
        use = _of_one_step(self.use)

        def step(given: Given) -> UseFactors:
            return replace(self, use=use, mask=given[0], weights=given[1])

        given = self.mask, self.weights
        return Tap(lambda given, x: step(given).inputs(x), lambda given, g: step(given).output_grads(g), given)


def find_use_factors(layout: Layout, mask: Array | None, weights: Weights | None = None) -> dict[int, UseFactors]:
    """For each use of a layer, by the uses' numbers."""
    trace, wide = layout.trace, compute_dtype(layout.trace.outputs.dtype)
    masks = arrange_masks(trace, mask)
    found = {}
    for layer in layout.plan.layers:
        outs, ins = layout.partitions(layer)
        for n, swapped in zip(layer.uses, layer.swapped, strict=True):
            partitions = (ins, outs) if swapped else (outs, ins)
            weight = None if weights is None else weights[n]
            how = layout.options, wide, trace.examples
            found[n] = UseFactors(trace.uses[n], layout.has_joint_bias(layer), partitions, masks[n], *how, weight)
    return found


def mean_weights(layout: Layout, mask: Array | None, size: int, counts: Bool[Array, ""]) -> Weights:
    """The weights with which sums over a batch of this size, in chunks or not, are its factors; 0 if nothing counts.

    Applied where the sums are made, they save reading and writing all factors once more.
    """
    use_factors, found = find_use_factors(layout, mask), {}
    for layer in layout.plan.layers:
        rows = [use_factors[n].count(size) for n in layer.uses]
        if layout.options.tied == "concatenate" and rows:
            rows = [sum(rows[1:], start=rows[0])] * len(rows)
        for n, count in zip(layer.uses, rows, strict=True):
            some = counts & (count > 0)
            found[n] = jnp.where(some, 1 / jnp.where(some, count, 1), 0), counts
    return found


def find_taps(use_factors: Mapping[int, UseFactors]) -> dict[int, Tap]:
    """The taps of the uses that can have one."""
    taps = {n: use_factor.tap() for n, use_factor in use_factors.items()}
    return {n: tap for n, tap in taps.items() if tap is not None}


def steps_as_groups(factors: Sequence[Factor], use: Use) -> tuple[Factor, ...]:
    """The factors of all steps of the loops, `[*loops, G, ...]`, with steps as groups."""
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
