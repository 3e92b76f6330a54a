"""KFOC: the Kronecker products nearest to the blocks of the GGN, in Frobenius norm."""

from collections.abc import Sequence
from functools import partial
from itertools import islice, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax._fusion import max_abs
from ggn_jax._sharding import vary_like
from ggn_jax._weights import safe_sqrt, times
from ggn_jax.kronecker.algebra import Factor, Kronecker
from ggn_jax.kronecker.factors import factor_sums, with_other_blocks
from ggn_jax.kronecker.inputs import Inputs
from ggn_jax.kronecker.joined import JoinedLayout, joined_sums
from ggn_jax.kronecker.layout import Layout, merge_parts, split_parts
from ggn_jax.kronecker.linalg import norm
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.stacks import Blocks
from ggn_jax.kronecker.vectors import count_vectors, make_vector_fn
from ggn_jax.layers import capture
from ggn_jax.operators.problem import Problem

MAX_POWER_ITERATIONS = 1000


class GradientFactors(NamedTuple):
    """The factors of the gradients `M = sum_s left_s right_s^T` of each vector and example in a part of a layer."""

    left: Float[Array, "V G N S out"]
    right: Float[Array, "V G N S in"]

    def scales(self) -> tuple[Float[Array, " G"], Float[Array, " G"]]:
        """The largest absolute entries of both, for each group."""
        return max_abs(self.left, (0, 2, 3, 4)), max_abs(self.right, (0, 2, 3, 4))

    def divided(self, scales: tuple[Float[Array, " G"], Float[Array, " G"]]) -> "GradientFactors":
        """Divided by these: fourth powers of entries are summed, which leave the dtype's range early."""
        left, right = (scale[None, :, None, None, None] for scale in scales)
        return GradientFactors(self.left / left, self.right / right)

    def to_b(self, a: Float[Array, "G in in"]) -> Float[Array, "G out out"]:
        """`sum M a M^T`."""
        inner = jnp.einsum("vgnsi,gij,vgntj->vgnst", self.right, a, self.right)
        return jnp.einsum("vgnso,vgnst,vgntp->gop", self.left, inner, self.left)

    def to_a(self, b: Float[Array, "G out out"]) -> Float[Array, "G in in"]:
        """`sum M^T b M`."""
        inner = jnp.einsum("vgnso,gop,vgntp->vgnst", self.left, b, self.left)
        return jnp.einsum("vgnsi,vgnst,vgntj->gij", self.right, inner, self.right)


class LayerGradients(NamedTuple):
    """The gradients of a batch's vectors and examples in all layers."""

    sides: list[GradientFactors]
    """One for each pair of parts of each layer; without positions if this function does not use the layer."""
    biases: list[Float[Array, "G out out"]]
    """The blocks of separate biases, in parts."""

    def weighted(self, weight: Float[Array, ""]) -> "LayerGradients":
        """The gradients of a weighted loss; with a weight of 0, they are 0 even where they were not finite."""
        # A block is quadratic in `left right^T`: the root of the weight goes to one side, and 0 or 1 to the other.
        here, square_root = jnp.sign(weight), safe_sqrt(weight)
        sides = [GradientFactors(times(square_root, x.left), times(here, x.right)) for x in self.sides]
        return LayerGradients(sides, [times(weight, bias) for bias in self.biases])


def compute_optimal_blocks(problem: Problem, keys: Array | None, mask: Array | None, options: Options) -> Blocks:
    """KFOC's blocks: for each layer, the Kronecker product nearest to the GGN's block."""
    layout = Layout.of(problem, options)
    sums = factor_sums(problem, layout, keys, mask)
    return _nearest_blocks(layout, [gradients(problem, layout, keys)], sums)


def joined_optimal_blocks(
    layout: JoinedLayout, problems: Sequence[Problem], weights: Sequence[Array], keys: Sequence[Array | None]
) -> Blocks:
    """KFOC's blocks for the weighted sum of several functions' GGNs."""
    sums = joined_sums(layout, problems, weights, keys, [None] * len(problems))
    wide = compute_dtype(layout.trace.outputs.dtype)
    found = []
    for problem, part, key, weight in zip(problems, layout.functions, keys, weights, strict=True):
        own: LayerGradients = jax.tree.map(lambda x: x.astype(wide), gradients(problem, part, key))
        found.append(own.weighted(weight.astype(wide)))
    return _nearest_blocks(layout, found, sums)


def _nearest_blocks(layout: Layout, found: Sequence[LayerGradients], sums: dict[str, Any]) -> Blocks:
    """The blocks of all functions' gradients together."""
    sides = zip(*(one.sides for one in found), strict=True)
    biases = [sum(parts[1:], start=parts[0]) for parts in zip(*(one.biases for one in found), strict=True)]
    return with_other_blocks(layout, kronecker_blocks(layout, list(map(_nearest, sides)), biases), sums)


def gradients(problem: Problem, layout: Layout, keys: Array | None, *, unreduced: bool = False) -> LayerGradients:
    """The gradients in all layers; `unreduced` leaves the loss's reduction out, so that batches can be added."""
    fn = partial(_gradients, layout, problem.params, unreduced)
    found: LayerGradients = problem.sum_over_chunks(fn, keys)  # the caller refuses chunks: all examples at once
    return found


def _gradients(
    layout: Layout, params: PyTree, unreduced: bool, terms_at: Any, inputs: PyTree, operand: Any, keys: Array | None
) -> LayerGradients:
    trace, options = layout.trace, layout.options
    captured = capture(trace, params, inputs, ())
    wide = compute_dtype(captured.outputs.dtype)
    kind = options.fisher_type, options.mc_samples, options.positions
    terms = terms_at(captured.outputs, operand)
    num = count_vectors(layout.loss, trace.outputs, *kind, trace.examples)
    vectors = make_vector_fn(terms, *kind, keys, trace.examples)(jnp.arange(num))
    if unreduced:
        vectors = jnp.where(
            jnp.isinf(terms.reduction_factor), 0, vectors / jnp.sqrt(terms.reduction_factor).astype(vectors.dtype)
        )
    grads, _ = jax.vmap(captured.vjp)(vectors.astype(captured.outputs.dtype))
    sides, biases = [], []
    for layer in layout.plan.layers:
        left, right, bias = [], [], []
        if not layer.uses:  # a layer of another function
            groups, out, inputs = layer.weight.shape
            left.append(jnp.zeros((1, groups, 1, 0, out), wide))
            right.append(jnp.zeros((1, groups, 1, 0, inputs + layout.has_joint_bias(layer)), wide))
            bias.append(jnp.zeros((1, groups, 1, out), wide))
        for n, swapped in zip(layer.uses, layer.swapped, strict=True):
            use = trace.uses[n]
            g = jax.vmap(use.arrange_output_grads)(grads[n]).astype(wide)
            x = Inputs(use, captured.inputs[n], None, options, wide)
            a = jnp.broadcast_to(
                x.raw_rows(layout.has_joint_bias(layer))[None], (*g.shape[:-1], x.width(layout.has_joint_bias(layer)))
            )
            left.append(a if swapped else g)
            right.append(g if swapped else a)
            bias.append(jnp.sum(g, axis=3))
        # An example's weight gradient is a sum over positions, and just as well over uses: they are more positions.
        both = GradientFactors(jnp.concatenate(left, 3), jnp.concatenate(right, 3))
        outs, ins = layout.partitions(layer)
        for runs in product(outs, ins):
            sides += [
                GradientFactors(both.left[..., o], both.right[..., i]) for o, i in product(*(run.parts for run in runs))
            ]
        if layout.has_separate_bias(layer):
            parts = split_parts(sum(bias[1:], start=bias[0]), outs, 1)
            biases += [jnp.einsum("vgno,vgnp->gop", part, part) for part in parts]
    return LayerGradients(sides, biases)


def kronecker_blocks(
    layout: Layout, factors: Sequence[tuple[Array, Array]], biases: Sequence[Array]
) -> list[Kronecker]:
    """The layers' blocks of the factors of each pair of parts, in the order of `LayerGradients`."""
    pairs, apart = iter(factors), iter(biases)
    blocks: list[Kronecker] = []
    for layer in layout.plan.layers:
        outs, ins = layout.partitions(layer)
        for out, inputs in product(outs, ins):
            a, b = zip(*islice(pairs, out.count * inputs.count), strict=True)
            blocks.append(Kronecker((merge_parts(a),), (merge_parts(b),)))
        if layout.has_separate_bias(layer):
            bias = islice(apart, len(outs))
            blocks += [Kronecker((jnp.ones((b.shape[0], 1), b.dtype),), (b,)) for b in bias]
    return blocks


def normalised(x: Float[Array, "G d d"]) -> Float[Array, "G d d"]:
    """`x / |x|`, 0 for 0."""
    size = norm(x, (1, 2))[:, None, None]
    return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), 0)


def initial_factor(sides: GradientFactors) -> Float[Array, "G in in"]:
    """The input factor that iterations start from: the identity, so that all of them are PSD."""
    groups, inputs = sides.right.shape[1], sides.right.shape[-1]
    return vary_like(
        normalised(jnp.broadcast_to(jnp.eye(inputs, dtype=sides.right.dtype), (groups, inputs, inputs))), sides
    )


def has_changed(a: Float[Array, "G in in"], before: Float[Array, "G in in"]) -> Bool[Array, ""]:
    """Whether a step has changed the input factor by more than rounding."""
    return jnp.any(norm(a - before, (1, 2)) > 10 * jnp.finfo(a.dtype).eps)


def _nearest(parts: Sequence[GradientFactors]) -> tuple[Factor, Factor]:
    """The nearest `B (x) A` to `sum_m vec(M_m) vec(M_m)^T` over all parts, for each group.

    The leading singular pair of the rearranged block by power iterations `B = sum M A M^T / |A|^2` and
    `A = sum M^T B M / |B|^2`. They map positive semi-definite matrices to such, so both factors are, starting from I.
    """
    largest_of = jax.tree.map(lambda *x: jnp.max(jnp.stack(x), axis=0), *(sides.scales() for sides in parts))
    scales = safe_scales(largest_of)
    parts = [sides.divided(scales) for sides in parts]

    def to_b(a: Array) -> Array:
        return sum((sides.to_b(a) for sides in parts[1:]), start=parts[0].to_b(a))

    def to_a(b: Array) -> Array:
        return sum((sides.to_a(b) for sides in parts[1:]), start=parts[0].to_a(b))

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, _, count = state
        return normalised(to_a(normalised(to_b(a)))), a, count + 1

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        a, before, count = state
        return (count < MAX_POWER_ITERATIONS) & has_changed(a, before)

    first = vary_like(initial_factor(parts[0]), parts)
    a, _, _ = jax.lax.while_loop(goes_on, step, (first, jnp.zeros_like(first), jnp.zeros((), jnp.int32)))
    return rescaled((a, to_b(a)), scales)


def safe_scales(scales: tuple[Array, Array]) -> tuple[Array, Array]:
    """Scales that can be divided by: 1 if all is 0 or anything is not finite."""
    left, right = (jnp.where((x > 0) & jnp.isfinite(x), x, 1) for x in map(jax.lax.stop_gradient, scales))
    return left, right


def rescaled(factors: tuple[Array, Array], scales: tuple[Array, Array]) -> tuple[Factor, Factor]:
    """The factors `A` and `B`, from those of gradients that were divided by these scales."""
    (a, b), (left, right) = factors, scales
    return a * right[:, None, None] ** 2, b * left[:, None, None] ** 2
