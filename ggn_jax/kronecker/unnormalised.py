"""Blocks of which sums and counts are known: a division makes them means, for all layers of a stack at once."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax.kronecker.algebra import (
    Factor,
    Kronecker,
    weighted_factor_sum,
)
from ggn_jax.kronecker.layout import Layout


class UnnormalisedBlock(eqx.Module):
    """A block whose input factors are still sums, to be divided by counts; without counts, they are means already.

    Swapped uses have inputs for the block's outputs, so their factors change sides once they are divided.
    """

    a: tuple[Factor, ...]
    b: tuple[Factor, ...]
    count: tuple[Float[Array, " G"], ...]
    swapped: tuple[bool, ...] = eqx.field(static=True)

    def block(self) -> Kronecker:
        a = [safe_divide(x, n) for x, n in zip(self.a, self.count, strict=True)] if self.count else self.a
        terms = list(zip(a, self.b, self.swapped, strict=True))
        return Kronecker(tuple(y if s else x for x, y, s in terms), tuple(x if s else y for x, y, s in terms))


def unnormalised_blocks(layout: Layout, sums: dict[str, Any], number: int) -> list[UnnormalisedBlock]:
    """The blocks of a layer: each pair of parts, then a separate bias."""
    layer = layout.plan.layers[number]
    outs, ins = layout.partitions(layer)
    groups, swapped = layer.weight.shape[0], layer.swapped
    a, counts = sums["a"][number], sums["count"][number] if "count" in sums else []
    dtype = a[0][0].dtype
    ones = [tuple(jnp.ones((groups * run.count, run.size), dtype) for run in (ins if s else outs)) for s in swapped]
    b = sums["b"][number] if "b" in sums else ones
    if layout.options.tied == "concatenate" and len(a) > 1:
        groups_of_uses = layout.concatenated_uses(layer)
        if any(swapped[i] != swapped[members[0]] for members in groups_of_uses for i in members):
            raise NotImplementedError(
                f"tied='concatenate' cannot put the uses of params{layout.trace.names[layer.leaves[0]]} together,"
                " since one is the transpose of another: pass tied='sum'."
            )
        a, b = (
            [tuple(map(_sum_factors, zip(*(parts[i] for i in members), strict=True))) for members in groups_of_uses]
            for parts in (a, b)
        )
        counts = [sum(counts[i] for i in members) for members in groups_of_uses] if counts else []
        swapped = tuple(swapped[members[0]] for members in groups_of_uses)

    def member(o: int, i: int) -> UnnormalisedBlock:
        split = outs[o].count, ins[i].count
        places = [((0, o), (1, i)) if s else ((1, i), (0, o)) for s in swapped]  # of a term's input and output factor
        first = tuple(
            _broadcast_to_pairs(x[n], use_factor, groups, split)
            for x, ((use_factor, n), _) in zip(a, places, strict=True)
        )
        second = tuple(
            _broadcast_to_pairs(x[n], use_factor, groups, split)
            for x, (_, (use_factor, n)) in zip(b, places, strict=True)
        )
        count = tuple(jnp.broadcast_to(n, groups * split[0] * split[1]) for n in counts)
        return UnnormalisedBlock(first, second, count, swapped)

    result = [member(o, i) for o, i in product(range(len(outs)), range(len(ins)))]
    if layout.has_separate_bias(layer):
        for o, run in enumerate(outs):
            terms, each = tuple(x[o] for x in b), jnp.ones(groups * run.count, dtype)
            result.append(UnnormalisedBlock((each[:, None],) * len(b), terms, (each,) * len(b), (False,) * len(b)))
    return result


def _broadcast_to_pairs(
    x: Float[Array, "parts ..."], use_factor: int, groups: int, split: tuple[int, int]
) -> Float[Array, "G ..."]:
    """Arrays for the parts of outputs (side 0) or of inputs (side 1), repeated for each pair of parts."""
    if split[1 - use_factor] == 1:
        return x
    parts = jnp.expand_dims(x.reshape(groups, split[use_factor], *x.shape[1:]), 2 - use_factor)
    return jnp.broadcast_to(parts, (groups, *split, *x.shape[1:])).reshape(-1, *x.shape[1:])


def _sum_factors(factors: Sequence[Factor]) -> Factor:
    return weighted_factor_sum(factors, jnp.ones(len(factors), factors[0].dtype))


def safe_divide(total: Factor, count: Any) -> Factor:
    """`total / count`, by group if there is a count for each; 0 where the count is."""
    count = jnp.reshape(count, (*jnp.shape(count), *[1] * (total.ndim - 1))) if jnp.ndim(count) else count
    # A count that is NaN gives NaN.
    return jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count))
