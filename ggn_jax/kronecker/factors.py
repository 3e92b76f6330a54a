"""Kronecker factors of a model's layers, summed over a batch."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block, Dense, Diagonal, Factor, Kronecker, Spectral, combine, decompose
from ggn_jax.kronecker.inputs import Inputs
from ggn_jax.kronecker.layout import Blocks, Layout, Options
from ggn_jax.kronecker.masks import arrange_masks
from ggn_jax.kronecker.parts import sum_in_parts
from ggn_jax.kronecker.vectors import count_vectors, vector_maker
from ggn_jax.layers import Captured, Layer, Trace, Use, capture
from ggn_jax.operators.problem import Problem

Bases = list[list[Spectral]]  # of each layer's weight, and of its bias where that is separate


def compute_blocks(
    problem: Problem, keys: Array | None, mask: Array | None, options: Options, correct: bool = False
) -> Blocks:
    """KFAC's blocks of the loss at a batch; with `correct`, EKFAC's."""
    sums = factor_sums(problem, keys, mask, options)
    if not correct:
        return assemble(problem, options, sums)
    bases = eigenbases(problem, options, sums)
    return assemble(problem, options, sums, bases, factor_sums(problem, keys, mask, options, bases, leftovers=False))


def factor_sums(
    problem: Problem,
    keys: Array | None,
    mask: Array | None,
    options: Options,
    bases: Bases | None = None,
    leftovers: bool = True,
) -> dict[str, Any]:
    """What KFAC's blocks are made of, summed over a batch; with EKFAC's bases, the squared gradients in them.

    `leftovers` asks for the blocks of parameters that have no layer as well.
    """
    layout = Layout.of(problem, options)
    check_mask_fits(layout.trace, mask)
    fn = partial(_factor_sums, layout, problem.params, bases, leftovers)
    return problem.sum_over_chunks(fn, {"keys": keys, "mask": mask})


def check_mask_fits(trace: Trace, mask: Array | None) -> None:
    """Refuse a mask that no layer has the sharing positions of."""
    if mask is not None and all(arranged is None for arranged in arrange_masks(trace, mask)):
        positions = sorted({use.positions for use in trace.uses})
        raise ValueError(
            f"mask of shape {mask.shape} fits no layer: their sharing positions are {positions}, of each of"
            f" {mask.shape[0]} data."
        )


def batch_sums(
    problem: Problem, keys: Array | None, mask: Array | None, options: Options, bases: Bases | None = None
) -> dict[str, Any]:
    """`factor_sums` that add up over batches: those of the *sum-reduced* loss, and what its mean divides by.

    All but the input factors and their counts are proportional to the reduction.
    """
    sums, r = factor_sums(problem, keys, mask, options, bases, bases is None), problem.reduction()
    for name in {"b", "own", "corrected"} & set(sums):
        # Where nothing counts, r is infinite and the sums are 0.
        sums[name] = jax.tree.map(lambda x: jnp.where(jnp.isinf(r), x, x / r.astype(x.dtype)), sums[name])
    return {**sums, "divisor": 1 / r}


def reduce_sums(problem: Problem, sums: dict[str, Any]) -> dict[str, Any]:
    """Added `batch_sums` as `factor_sums` of all batches' data."""
    sums = dict(sums)
    divisor = sums.pop("divisor")
    if problem.loss.reduction == "mean":
        for name in {"b", "own", "corrected"} & set(sums):
            sums[name] = jax.tree.map(lambda x: _divide(x, divisor.astype(x.dtype)), sums[name])
    return sums


def zero_sums(layout: Layout) -> dict[str, Any]:
    """`factor_sums` of nothing: zeros of the right shapes, which need no data."""
    trace, options = layout.trace, layout.options
    dtype = compute_dtype(trace.outputs.dtype)

    def factor(groups: int, size: int, diagonal: bool) -> Array:
        return jnp.zeros((groups, size) if diagonal or size > options.max_dense_size else (groups, size, size), dtype)

    sums: dict[str, Any] = {"a": [], "count": [], "b": [], "own": []}
    for layer in layout.plan.layers:
        members = [trace.uses[n] for n in layer.uses]
        joint = layout.joint(layer)
        shapes = [use.weight.shape for use in members]
        embeddings = [use.kind == "embedding" for use in members]
        sums["a"].append([factor(g, n + joint, e) for (g, _, n), e in zip(shapes, embeddings, strict=True)])
        sums["count"].append([jnp.ones((), dtype)] * len(members))
        sums["b"].append([factor(g, out, False) for g, out, _ in shapes])
    for left in layout.plan.leftovers:
        size = math.prod(trace.shapes[left.leaf])
        if left.kind != "unused":
            sums["own"].append(jnp.zeros((size, size) if layout.is_full(left) else size, dtype))
    if options.fisher_type is FisherType.FORWARD_ONLY:
        del sums["b"], sums["own"]
    return sums


def eigenbases(problem: Problem, options: Options, sums: dict[str, Any]) -> Bases:
    """EKFAC's: the eigenvectors of KFAC's factors."""
    groups = _assemble_layers(Layout.of(problem, options), sums)
    bases = iter(decompose([block for group in groups for block in group]))
    return [[next(bases) for _ in group] for group in groups]  # type: ignore[misc]  # of Kronecker products


def assemble(
    problem: Problem,
    options: Options,
    sums: dict[str, Any],
    bases: Bases | None = None,
    corrections: dict[str, Any] | None = None,
) -> Blocks:
    """The blocks from sums over all data."""
    return assemble_blocks(Layout.of(problem, options), sums, bases, corrections)


def assemble_blocks(
    layout: Layout, sums: dict[str, Any], bases: Bases | None = None, corrections: dict[str, Any] | None = None
) -> Blocks:
    groups: list[list[Block]] = _assemble_layers(layout, sums)  # type: ignore[assignment]  # Kronecker products
    if bases is not None and corrections is not None:
        corrected = corrections["corrected"]
        groups = [
            [Spectral(basis.qa, basis.qb, value) for basis, value in zip(*pair, strict=True)]
            for pair in zip(bases, corrected, strict=True)
        ]
    return in_places(layout, [block for group in groups for block in group], sums)


def in_places(layout: Layout, layers: list[Block], sums: dict[str, Any]) -> Blocks:
    """The layers' blocks, and those of all other entries."""
    blocks, places = [*layers, *_leftover_blocks(layout, sums)], layout.places()
    dtype = compute_dtype(layout.trace.outputs.dtype)
    blocks += [Diagonal(jnp.zeros(place.views[0].shape[2], dtype)) for place in places[len(blocks) :]]
    return Blocks(tuple(blocks), places)


def _factor_sums(
    layout: Layout,
    params: PyTree,
    bases: Bases | None,
    leftovers: bool,
    terms_at: Any,
    inputs: PyTree,
    operand: Any,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """`captured_sums` of a chunk."""
    captured = capture(layout.trace, params, inputs, layout.leaves if leftovers else ())
    return captured_sums(layout, captured, terms_at, operand, extra["keys"], extra["mask"], bases, leftovers)


def captured_sums(
    layout: Layout,
    captured: Captured,
    terms_at: Any,
    operand: Any,
    keys: Array | None,
    mask: Array | None,
    bases: Bases | None = None,
    leftovers: bool = True,
) -> dict[str, Any]:
    """Unnormalised input factors, their counts, output factors, and what leftovers need; or EKFAC's corrections."""
    trace, plan, options = layout.trace, layout.plan, layout.options
    wide = compute_dtype(captured.outputs.dtype)
    uses = [[(n, trace.uses[n]) for n in layer.uses] for layer in plan.layers]
    masks = arrange_masks(trace, mask)
    rows = [[Inputs(use, captured.inputs[n], masks[n], options, wide) for n, use in members] for members in uses]
    result: dict[str, Any] = {}
    if bases is None:
        result["a"] = [
            [x.factor(layout.joint(layer)) for x in members] for layer, members in zip(plan.layers, rows, strict=True)
        ]
        result["count"] = [[x.count for x in members] for members in rows]
    kind = options.fisher_type, options.mc_samples, options.positions
    num = count_vectors(layout.loss, trace.outputs, *kind)
    if options.fisher_type is FisherType.FORWARD_ONLY:
        return result
    terms = terms_at(captured.outputs, operand)
    make = vector_maker(terms, *kind, keys)

    def part(indices: Array) -> dict[str, Any]:
        grads, own = jax.vmap(captured.pull_back)(make(indices).astype(captured.outputs.dtype))

        def arranged(n: int, use: Use) -> Array:  # [V, G, N, S, out]
            return jax.vmap(use.arrange_output_grads)(grads[n]).astype(wide)

        sums: dict[str, Any] = {}
        gs = [[arranged(n, use) for n, use in members] for members in uses]
        if bases is None:
            sums["b"] = [[_output_factor(g, options) for g in members] for members in gs]
        else:
            sums["corrected"] = [
                _corrected(layout, layer, xs, g, basis)
                for layer, xs, g, basis in zip(plan.layers, rows, gs, bases, strict=True)
            ]
        if leftovers:
            flat = [g.reshape(g.shape[0] * g.shape[1], -1).astype(wide) for g in own]
            full = [layout.is_full(left) for left in plan.leftovers if left.kind != "unused"]
            sums["own"] = [g.T @ g if f else jnp.sum(g**2, axis=0) for g, f in zip(flat, full, strict=True)]
        return sums

    return {**result, **sum_in_parts(part, num, options.vector_chunk_size)}


def _output_factor(g: Array, options: Options) -> Factor:
    """`sum g g^T` over vectors, data and positions; `[V, G, N, S, out]`."""
    if options.sharing == "reduce":
        g = jnp.sum(g, axis=3, keepdims=True)
    g = jnp.moveaxis(g, 1, 0).reshape(g.shape[1], -1, g.shape[-1])
    if g.shape[-1] > options.max_dense_size:
        return jnp.sum(g**2, axis=1)
    return jnp.einsum("gmo,gmp->gop", g, g)


def _corrected(layout: Layout, layer: Layer, xs: list[Inputs], gs: list[Array], bases: list[Spectral]) -> list[Array]:
    """`sum_{v, n} (Q_B^T (sum_s g a^T) Q_A)^2` for the weight (and joint bias), then for a separate bias."""
    joint, result = layout.joint(layer), []
    basis = bases[0]
    total: Any = 0.0
    for x, g, swapped in zip(xs, gs, layer.swapped, strict=True):
        q_in, q_out = (basis.qb, basis.qa) if swapped else (basis.qa, basis.qb)
        g = g if q_out is None else jnp.einsum("vgnso,gop->vgnsp", g, q_out)
        a = x.raw_rows(joint)
        a = a if q_in is None else jnp.einsum("gnsi,gij->gnsj", a, q_in)
        if len(xs) == 1 and a.shape[2] == 1:
            squares = jnp.einsum("vgno,gni->goi", g[:, :, :, 0] ** 2, a[:, :, 0] ** 2)
            return [squares, *_bias_corrected(layout, layer, gs, bases)]
        gradient = jnp.einsum("vgnso,gnsi->vgnoi", g, a)
        total = total + (jnp.swapaxes(gradient, -1, -2) if swapped else gradient)
    result.append(jnp.sum(total**2, axis=(0, 2)))
    return [*result, *_bias_corrected(layout, layer, gs, bases)]


def _bias_corrected(layout: Layout, layer: Layer, gs: list[Array], bases: list[Spectral]) -> list[Array]:
    if layer.bias is None or layout.joint(layer):
        return []
    total = sum(jnp.sum(g, axis=3) for g in gs)  # [V, G, N, out]
    q = bases[1].qb
    total = total if q is None else jnp.einsum("vgno,gop->vgnp", total, q)
    return [jnp.sum(total**2, axis=(0, 2))[..., None]]


def _assemble_layers(layout: Layout, sums: dict[str, Any]) -> list[list[Kronecker]]:
    """For each layer its block, and that of a separate bias."""
    groups = []
    for i, layer in enumerate(layout.plan.layers):
        counts = sums["count"][i]
        totals = sums["a"][i]
        a = [_divide(x, n) for x, n in zip(totals, counts, strict=True)]
        if "b" in sums:
            b = sums["b"][i]
        else:
            outs = [layout.trace.uses[n].weight.shape for n in layer.uses]
            b = [jnp.ones((g, out), x.dtype) for (g, out, _), x in zip(outs, a, strict=True)]
        if layout.options.tied == "concatenate" and len(a) > 1:
            if any(layer.swapped):
                raise NotImplementedError(
                    f"tied='concatenate' cannot put the uses of params{layout.trace.names[layer.leaves[0]]} together,"
                    " as one has inputs where the other has outputs: pass tied='sum'."
                )
            ones = jnp.ones(len(a), a[0].dtype)
            a, b = [_divide(combine(totals, ones), sum(counts))], [combine(b, ones)]
        terms = list(zip(a, b, layer.swapped, strict=False))  # one term of several uses, if they are concatenated
        block = Kronecker(tuple(y if s else x for x, y, s in terms), tuple(x if s else y for x, y, s in terms))
        group = [block]
        if layer.bias is not None and not layout.joint(layer):
            constants = tuple(jnp.ones((x.shape[0], 1), x.dtype) for x in b)
            group.append(Kronecker(constants, tuple(b)))
        groups.append(group)
    return groups


def _leftover_blocks(layout: Layout, sums: dict[str, Any]) -> list[Block]:
    """The blocks of parameters that have no layer."""
    blocks: list[Block] = []
    own = iter(sums.get("own", ()))
    for left in layout.plan.leftovers:
        if left.kind == "unused":
            size, dtype = math.prod(layout.trace.shapes[left.leaf]), compute_dtype(layout.trace.outputs.dtype)
            if size:
                blocks.append(Diagonal(jnp.zeros(size, dtype)))
        else:
            block = next(own)
            blocks.append(Dense(block) if block.ndim == 2 else Diagonal(block))
    return blocks


def _divide(total: Factor, count: Any) -> Factor:
    """`total / count`; 0 where nothing was counted."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
