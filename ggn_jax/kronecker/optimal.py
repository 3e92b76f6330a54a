"""Kronecker products that are nearest to the GGN's own blocks."""

from collections.abc import Sequence
from functools import partial
from itertools import islice, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax._fusion import largest
from ggn_jax._sharding import vary_like
from ggn_jax.kronecker.algebra import Factor, Kronecker
from ggn_jax.kronecker.factors import factor_sums, in_places
from ggn_jax.kronecker.inputs import Inputs
from ggn_jax.kronecker.layout import Layout, cut, join
from ggn_jax.kronecker.linalg import norm
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.stacks import Blocks
from ggn_jax.kronecker.vectors import count_vectors, vector_maker
from ggn_jax.layers import capture
from ggn_jax.operators.problem import Problem

POWER_ITERATIONS = 1000


class Sides(NamedTuple):
    """What the gradients `M = sum_s left_s right_s^T` of each vector and example in a part of a layer are made of."""

    left: Float[Array, "V G N S out"]
    right: Float[Array, "V G N S in"]

    def scales(self) -> tuple[Float[Array, " G"], Float[Array, " G"]]:
        """The largest entries of both, for each group."""
        return largest(self.left, (0, 2, 3, 4)), largest(self.right, (0, 2, 3, 4))

    def divided(self, scales: tuple[Float[Array, " G"], Float[Array, " G"]]) -> "Sides":
        """By these, since fourth powers of entries would leave the dtype's range early."""
        left, right = (scale[None, :, None, None, None] for scale in scales)
        return Sides(self.left / left, self.right / right)

    def to_b(self, a: Float[Array, "G in in"]) -> Float[Array, "G out out"]:
        """`sum M a M^T`."""
        inner = jnp.einsum("vgnsi,gij,vgntj->vgnst", self.right, a, self.right)
        return jnp.einsum("vgnso,vgnst,vgntp->gop", self.left, inner, self.left)

    def to_a(self, b: Float[Array, "G out out"]) -> Float[Array, "G in in"]:
        """`sum M^T b M`."""
        inner = jnp.einsum("vgnso,gop,vgntp->vgnst", self.left, b, self.left)
        return jnp.einsum("vgnsi,vgnst,vgntj->gij", self.right, inner, self.right)


class Gradients(NamedTuple):
    """Of a batch's vectors and examples in all layers."""

    sides: list[Sides]
    """Of each pair of parts of each layer."""
    biases: list[Float[Array, "G out out"]]
    """The blocks of biases that are no column, in parts."""


def compute_optimal_blocks(problem: Problem, keys: Array | None, mask: Array | None, options: Options) -> Blocks:
    """KFOC's blocks: for each layer the Kronecker product that is nearest to the GGN's own block."""
    layout = Layout.of(problem, options)
    sums = factor_sums(problem, layout, keys, mask)
    found = gradients(problem, layout, keys)
    return in_places(layout, kronecker_blocks(layout, list(map(_nearest, found.sides)), found.biases), sums)


def gradients(problem: Problem, layout: Layout, keys: Array | None, *, unreduced: bool = False) -> Gradients:
    """The gradients in all layers; `unreduced` leaves the loss's reduction out, so that batches may be added."""
    fn = partial(_gradients, layout, problem.params, unreduced)
    found: Gradients = problem.sum_over_chunks(fn, keys)  # one chunk: all data at once
    return found


def _gradients(
    layout: Layout, params: PyTree, unreduced: bool, terms_at: Any, inputs: PyTree, operand: Any, keys: Array | None
) -> Gradients:
    trace, options = layout.trace, layout.options
    captured = capture(trace, params, inputs, ())
    wide = compute_dtype(captured.outputs.dtype)
    kind = options.fisher_type, options.mc_samples, options.positions
    terms = terms_at(captured.outputs, operand)
    num = count_vectors(layout.loss, trace.outputs, *kind, trace.examples)
    vectors = vector_maker(terms, *kind, keys, trace.examples)(jnp.arange(num))
    if unreduced:
        vectors = jnp.where(jnp.isinf(terms.r), 0, vectors / jnp.sqrt(terms.r).astype(vectors.dtype))
    grads, _ = jax.vmap(captured.pull_back)(vectors.astype(captured.outputs.dtype))
    sides, biases = [], []
    for layer in layout.plan.layers:
        left, right, bias = [], [], []
        for n, swapped in zip(layer.uses, layer.swapped, strict=True):
            use = trace.uses[n]
            g = jax.vmap(use.arrange_output_grads)(grads[n]).astype(wide)
            x = Inputs(use, captured.inputs[n], None, options, wide)
            a = jnp.broadcast_to(x.raw_rows(layout.joint(layer))[None], (*g.shape[:-1], x.width(layout.joint(layer))))
            left.append(a if swapped else g)
            right.append(g if swapped else a)
            bias.append(jnp.sum(g, axis=3))
        # A datum's weight gradient is a sum over positions, and over uses just as well.
        both = Sides(jnp.concatenate(left, 3), jnp.concatenate(right, 3))
        outs, ins = layout.cuts(layer)
        for runs in product(outs, ins):
            sides += [Sides(both.left[..., o], both.right[..., i]) for o, i in product(*(run.parts for run in runs))]
        if layout.separate(layer):
            parts = cut(sum(bias[1:], start=bias[0]), outs, 1)
            biases += [jnp.einsum("vgno,vgnp->gop", part, part) for part in parts]
    return Gradients(sides, biases)


def kronecker_blocks(
    layout: Layout, factors: Sequence[tuple[Array, Array]], biases: Sequence[Array]
) -> list[Kronecker]:
    """The layers' blocks of the factors of each pair of parts, in the order of `Gradients`."""
    pairs, apart = iter(factors), iter(biases)
    blocks: list[Kronecker] = []
    for layer in layout.plan.layers:
        outs, ins = layout.cuts(layer)
        for out, inputs in product(outs, ins):
            a, b = zip(*islice(pairs, out.count * inputs.count), strict=True)
            blocks.append(Kronecker((join(a),), (join(b),)))
        if layout.separate(layer):
            bias = islice(apart, len(outs))
            blocks += [Kronecker((jnp.ones((b.shape[0], 1), b.dtype),), (b,)) for b in bias]
    return blocks


def unit(x: Float[Array, "G d d"]) -> Float[Array, "G d d"]:
    """`x / |x|`, 0 for 0."""
    size = norm(x, (1, 2))[:, None, None]
    return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), 0)


def start(sides: Sides) -> Float[Array, "G in in"]:
    """What the iterations start from."""
    groups, inputs = sides.right.shape[1], sides.right.shape[-1]
    return vary_like(unit(jnp.broadcast_to(jnp.eye(inputs, dtype=sides.right.dtype), (groups, inputs, inputs))), sides)


def moves(a: Float[Array, "G in in"], before: Float[Array, "G in in"]) -> Bool[Array, ""]:
    """Whether a step has changed something."""
    return jnp.any(norm(a - before, (1, 2)) > 10 * jnp.finfo(a.dtype).eps)


def _nearest(sides: Sides) -> tuple[Factor, Factor]:
    """The nearest `B (x) A` to `sum_m vec(M_m) vec(M_m)^T`, for each group.

    The leading singular pair of the rearranged block by power iterations `B = sum M A M^T / |A|^2` and
    `A = sum M^T B M / |B|^2`. They map positive semi-definite matrices to such, so both factors are, starting from I.
    """
    scales = safe(sides.scales())
    sides = sides.divided(scales)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, _, count = state
        return unit(sides.to_a(unit(sides.to_b(a)))), a, count + 1

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        a, before, count = state
        return (count < POWER_ITERATIONS) & moves(a, before)

    first = start(sides)
    a, _, _ = jax.lax.while_loop(goes_on, step, (first, jnp.zeros_like(first), jnp.zeros((), jnp.int32)))
    return scaled((a, sides.to_b(a)), scales)


def safe(scales: tuple[Array, Array]) -> tuple[Array, Array]:
    """To divide by: 1 where all is 0 or something is not finite."""
    left, right = (jnp.where((x > 0) & jnp.isfinite(x), x, 1) for x in map(jax.lax.stop_gradient, scales))
    return left, right


def scaled(factors: tuple[Array, Array], scales: tuple[Array, Array]) -> tuple[Factor, Factor]:
    """The factors `A` and `B` of what was divided by these."""
    (a, b), (left, right) = factors, scales
    return a * right[:, None, None] ** 2, b * left[:, None, None] ** 2
