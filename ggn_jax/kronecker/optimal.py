"""Kronecker products that are nearest to the GGN's own blocks."""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax._sharding import vary_like
from ggn_jax.kronecker.algebra import Factor, Kronecker
from ggn_jax.kronecker.factors import compute_blocks
from ggn_jax.kronecker.inputs import Inputs
from ggn_jax.kronecker.layout import Layout, Run, cut, join
from ggn_jax.kronecker.linalg import norm, scale_of
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.stacks import Blocks
from ggn_jax.kronecker.vectors import count_vectors, vector_maker
from ggn_jax.layers import capture
from ggn_jax.operators.problem import Problem

POWER_ITERATIONS = 1000


def compute_optimal_blocks(problem: Problem, keys: Array | None, mask: Array | None, options: Options) -> Blocks:
    """KFOC's blocks: for each layer the Kronecker product that is nearest to the GGN's own block."""
    layout = Layout.of(problem, options)
    blocks = compute_blocks(problem, layout, keys, mask)
    fn = partial(_optimal_factors, layout, problem.params)
    nearest = problem.sum_over_chunks(fn, {"keys": keys, "mask": mask})  # one chunk: all data at once
    flat = [Kronecker((a,), (b,)) for group in nearest for a, b in group]
    members = [*flat, *layout.each(blocks.blocks)[len(flat) :]]
    return Blocks(tuple(layout.stacked(members)), layout.stacks)


def _optimal_factors(
    layout: Layout, params: PyTree, terms_at: Any, inputs: PyTree, operand: Any, extra: dict[str, Any]
) -> list[list[tuple[Factor, Factor]]]:
    trace, options = layout.trace, layout.options
    captured = capture(trace, params, inputs, ())
    wide = compute_dtype(captured.outputs.dtype)
    kind = options.fisher_type, options.mc_samples, options.positions
    make = vector_maker(terms_at(captured.outputs, operand), *kind, extra["keys"], trace.examples)
    num = count_vectors(layout.loss, trace.outputs, *kind, trace.examples)
    grads, _ = jax.vmap(captured.pull_back)(make(jnp.arange(num)).astype(captured.outputs.dtype))
    result = []
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
        outs, ins = layout.cuts(layer)
        group = [_nearest(jnp.concatenate(left, 3), jnp.concatenate(right, 3), *runs) for runs in product(outs, ins)]
        if layout.separate(layer):
            for part in cut(sum(bias[1:], start=bias[0]), outs, 1):
                b = jnp.einsum("vgno,vgnp->gop", part, part)
                group.append((jnp.ones((b.shape[0], 1), wide), b))
        result.append(group)
    return result


def _nearest(left: Array, right: Array, outs: Run, ins: Run) -> tuple[Factor, Factor]:
    """Of each pair of parts."""
    pairs = product(outs.parts, ins.parts)
    a, b = zip(*(_nearest_to_outer_products(left[..., o], right[..., i]) for o, i in pairs), strict=True)
    return join(a), join(b)


def _nearest_to_outer_products(left: Array, right: Array) -> tuple[Factor, Factor]:
    """The nearest `B (x) A` to `sum_m vec(M_m) vec(M_m)^T`, with `M_m = sum_s left_s right_s^T`, for each group.

    The leading singular pair of the rearranged block by power iterations `B = sum M A M^T / |A|^2` and
    `A = sum M^T B M / |B|^2`. They map positive semi-definite matrices to such, so both factors are, starting from I.
    """
    groups, out, inputs = left.shape[1], left.shape[-1], right.shape[-1]
    # Fourth powers of entries would leave the dtype's range early.
    axes = (0, 2, 3, 4)
    size_left, size_right = (scale_of(x, axes)[None, :, None, None, None] for x in (left, right))
    left, right = left / size_left, right / size_right
    tolerance = 10 * jnp.finfo(left.dtype).eps

    def to_b(a: Array) -> Array:
        inner = jnp.einsum("vgnsi,gij,vgntj->vgnst", right, a, right)
        return jnp.einsum("vgnso,vgnst,vgntp->gop", left, inner, left)

    def to_a(b: Array) -> Array:
        inner = jnp.einsum("vgnso,gop,vgntp->vgnst", left, b, left)
        return jnp.einsum("vgnsi,vgnst,vgntj->gij", right, inner, right)

    def unit(x: Array) -> Array:
        size = norm(x, (1, 2))[:, None, None]
        return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), 0)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, _, count = state
        return unit(to_a(unit(to_b(a)))), a, count + 1

    def moves(state: tuple[Array, Array, Array]) -> Array:
        a, before, count = state
        return (count < POWER_ITERATIONS) & jnp.any(norm(a - before, (1, 2)) > tolerance)

    start = unit(jnp.broadcast_to(jnp.eye(inputs, dtype=left.dtype), (groups, inputs, inputs)))
    start = vary_like(start, (left, right))
    a, _, _ = jax.lax.while_loop(moves, step, (start, jnp.zeros_like(start), jnp.zeros((), jnp.int32)))
    b = to_b(a).reshape(groups, out, out)
    return a * size_right[0, :, :, 0] ** 2, b * size_left[0, :, :, 0] ** 2
