"""KFOC's power iterations over an iterable of batches; each iteration is two passes."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._sharding import compiler_sharded
from ggn_jax.kronecker.checks import check_draws
from ggn_jax.kronecker.factors import batch_sums, reduce_sums, with_other_blocks
from ggn_jax.kronecker.layout import Layout, find_layout
from ggn_jax.kronecker.optimal import (
    MAX_POWER_ITERATIONS,
    gradients,
    has_changed,
    initial_factor,
    kronecker_blocks,
    normalised,
    rescaled,
    safe_scales,
)
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.stacks import Blocks
from ggn_jax.operators.batches import check_iterable, with_reduction
from ggn_jax.operators.problem import Problem
from ggn_jax.operators.unordered_passes import UnorderedPasses


def nearest_blocks(
    make: Callable[[PyTree, Any], Problem], batches: Iterable[Any], options: Options, key: Any, progress: bool
) -> tuple[Blocks, Problem]:
    """KFOC's blocks of all data, and the first batch's problem; `make` checks a batch of each shape.

    The first pass computes all that takes no iterations, and the scales of gradients. Then `B` is computed from `A`,
    and `A` from `B`, as for one batch.
    """
    check_iterable(batches, "KFOC goes over the batches many times")
    passes = UnorderedPasses(make, lambda problem: problem, batches, progress, refuse=refuse_kfoc_mask)
    found: list[Any] = []
    layouts: list[Layout] = []  # of the first batch; every other is compared with it

    def first(_: Problem, problem: Problem, start: int) -> PyTree[Array]:
        if not layouts:
            layouts.append(find_layout(problem, options))
        totals, other, places = _first_pass(problem, check_draws(problem, options, key, start), options)
        found.append(other)
        if places != layouts[0].signature():
            raise ValueError("the model's layers differ from those of batch 0, or come in another order.")
        return totals

    sums, biases = passes.sum_over_batches(first, "sizes")
    scales = [
        safe_scales(x) for x in jax.tree.map(lambda *x: jnp.max(jnp.stack(x), axis=0), *(scales for scales, _ in found))
    ]

    def step(given: list[Array], to_b: bool) -> list[Array]:
        def contribution(_: Problem, problem: Problem, start: int) -> PyTree[Array]:
            keys = check_draws(problem, options, key, start)
            return _half_step(problem, keys, options=options, scales=scales, given=given, to_b=to_b)

        stepped: list[Array] = passes.sum_over_batches(contribution, "outputs" if to_b else "inputs")
        return stepped

    a = found[0][1]
    for _ in range(MAX_POWER_ITERATIONS):
        # Both factors are normalised at each half step; only the last one has the size.
        before, a = a, _normalise_all(step(_normalise_all(step(a, True)), False))
        if not _have_changed(a, before):
            break
    return _finish_blocks(layouts[0], sums, biases, a, step(a, True), scales), passes.first


def refuse_kfoc_mask(mask: Any) -> None:
    """Refuse a mask, which only KFAC uses."""
    if mask is not None:
        raise NotImplementedError("KFOC does not use a mask: leave it out, or use KFAC.")


@eqx.filter_jit
@compiler_sharded
def _first_pass(problem: Problem, keys: Array | None, options: Options) -> Any:
    """What is summed over batches without iterations; the gradients' scales, and initial factors; the layout."""
    layout = Layout.of(problem, options)
    found = gradients(problem, layout, keys, unreduced=True)
    other = [side.scales() for side in found.sides], [initial_factor(side) for side in found.sides]
    return (batch_sums(problem, layout, keys, None), found.biases), other, layout.signature()


@eqx.filter_jit
@compiler_sharded
def _half_step(
    problem: Problem, keys: Array | None, *, options: Options, scales: Any, given: list[Array], to_b: bool
) -> list[Array]:
    found = gradients(problem, Layout.of(problem, options), keys, unreduced=True)
    sides = [side.divided(scale) for side, scale in zip(found.sides, scales, strict=True)]
    return [side.to_b(x) if to_b else side.to_a(x) for side, x in zip(sides, given, strict=True)]


@jax.jit
def _normalise_all(xs: list[Array]) -> list[Array]:
    return list(map(normalised, xs))


@jax.jit
def _have_changed(xs: list[Array], before: list[Array]) -> Array:
    return jnp.any(jnp.stack([has_changed(x, y) for x, y in zip(xs, before, strict=True)]))


@eqx.filter_jit
@compiler_sharded
def _finish_blocks(
    layout: Layout, sums: Any, biases: list[Array], a: list[Array], b: list[Array], scales: Any
) -> Blocks:
    reduction, divisor = layout.loss.reduction, sums["divisor"]

    def reduced(xs: list[Array]) -> list[Array]:
        found: list[Array] = with_reduction(reduction, xs, divisor, [x.dtype for x in xs])
        return found

    factors = [rescaled(pair, scale) for pair, scale in zip(zip(a, reduced(b), strict=True), scales, strict=True)]
    return with_other_blocks(layout, kronecker_blocks(layout, factors, reduced(biases)), reduce_sums(layout, sums))
