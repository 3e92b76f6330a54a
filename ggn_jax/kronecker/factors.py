"""Kronecker factors of a model's layers, summed over a batch.

Sums are dicts of pytrees, so that chunks, batches and functions can be added up before anything is divided: `"a"` and
`"b"` hold the input and output factors of each use of each layer, in parts; `"count"` the rows that went into each of
`"a"`; `"unassigned"` the blocks of parameters without a layer; with EKFAC's bases there are only `"corrections"`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import (
    Block,
    Dense,
    Diagonal,
    Factor,
    Spectral,
    decompose,
)
from ggn_jax.kronecker.chunked import sum_chunked
from ggn_jax.kronecker.head import find_head, head_factor
from ggn_jax.kronecker.layout import EqualParts, Layout, Partition, merge_parts, split_parts
from ggn_jax.kronecker.masks import arrange_masks
from ggn_jax.kronecker.stacks import Blocks
from ggn_jax.kronecker.unnormalised import UnnormalisedBlock, safe_divide, unnormalised_blocks
from ggn_jax.kronecker.use_factors import UseFactors, find_taps, find_use_factors, steps_as_groups
from ggn_jax.kronecker.vectors import count_vectors, make_vector_fn
from ggn_jax.layers import Captured, Layer, Trace, capture
from ggn_jax.operators.problem import Problem

Bases = list[list[Spectral]]  # of each layer's weight, and of its bias where that is separate


def compute_blocks(
    problem: Problem, layout: Layout, keys: Array | None, mask: Array | None, correct: bool = False
) -> Blocks:
    """KFAC's blocks of the loss at a batch; with `correct`, EKFAC's."""
    sums = factor_sums(problem, layout, keys, mask)
    if not correct:
        return assemble_blocks(layout, sums)
    bases = eigenbases(layout, sums)
    return assemble_blocks(layout, sums, bases, factor_sums(problem, layout, keys, mask, bases, unassigned=False))


def factor_sums(
    problem: Problem,
    layout: Layout,
    keys: Array | None,
    mask: Array | None,
    bases: Bases | None = None,
    unassigned: bool = True,
) -> dict[str, Any]:
    """The factors of KFAC's blocks, summed over a batch; with EKFAC's bases, the squared gradients in these instead.

    `unassigned` asks for the blocks of parameters without a layer as well.
    """
    if unassigned:
        layout.warn()
    check_mask_fits(layout.trace, mask)
    fn = partial(_factor_sums, layout, problem.params, bases, unassigned)
    return problem.sum_over_chunks(fn, {"keys": keys, "mask": mask})


def check_mask_fits(trace: Trace, mask: Array | None) -> None:
    """Refuse a mask that fits no layer's sharing positions."""
    if mask is not None and all(arranged is None for arranged in arrange_masks(trace, mask)):
        positions = sorted({use.positions for use in trace.uses})
        raise ValueError(
            f"mask of shape {mask.shape} fits no layer: their sharing positions are {positions}, of each of"
            f" {mask.shape[0]} data."
        )


def batch_sums(
    problem: Problem, layout: Layout, keys: Array | None, mask: Array | None, bases: Bases | None = None
) -> dict[str, Any]:
    """`factor_sums` that can be added over batches: those of the *sum-reduced* loss, and the divisor of its mean.

    All but the input factors and their counts are proportional to the reduction, which depends on the whole data.
    """
    sums, r = factor_sums(problem, layout, keys, mask, bases, bases is None), problem.reduction()
    for name in {"b", "unassigned", "corrections"} & set(sums):
        # If no term counts, the reduction is infinite and the sums are 0.
        sums[name] = jax.tree.map(lambda x: jnp.where(jnp.isinf(r), x, x / r.astype(x.dtype)), sums[name])
    return {**sums, "divisor": 1 / r}


def reduce_sums(layout: Layout, sums: dict[str, Any]) -> dict[str, Any]:
    """`batch_sums` added over batches, as the `factor_sums` of all of them as one batch."""
    sums = dict(sums)
    divisor = sums.pop("divisor")
    if layout.loss.reduction == "mean":
        for name in {"b", "unassigned", "corrections"} & set(sums):
            sums[name] = jax.tree.map(lambda x: safe_divide(x, divisor.astype(x.dtype)), sums[name])
    return sums


def zero_sums(layout: Layout) -> dict[str, Any]:
    """`factor_sums` of an empty batch: zeros of the right shapes."""
    trace, options = layout.trace, layout.options
    dtype = compute_dtype(trace.outputs.dtype)

    def factors(groups: int, partitions: Partition, diagonal: bool) -> tuple[Array, ...]:
        dense = [not diagonal and run.size <= options.max_dense_size for run in partitions]
        return tuple(
            jnp.zeros((groups * run.count, *(run.size,) * (1 + d)), dtype)
            for run, d in zip(partitions, dense, strict=True)
        )

    sums: dict[str, Any] = {"a": [], "count": [], "b": [], "unassigned": []}
    for layer in layout.plan.layers:
        groups = layer.weight.shape[0]
        outs, ins = layout.partitions(layer)
        roles = layout.roles(layer)
        sums["a"].append([factors(groups, outs if s else ins, counted) for counted, s in roles])
        sums["count"].append([jnp.ones((), dtype)] * len(roles))
        sums["b"].append([factors(groups, ins if s else outs, False) for _, s in roles])
    for parameter in layout.plan.unassigned:
        size = layout.sizes[parameter.leaf]
        if parameter.kind != "unused":
            sums["unassigned"].append(jnp.zeros((size, size) if layout.has_dense_block(parameter) else size, dtype))
    if options.fisher_type is FisherType.FORWARD_ONLY:
        del sums["b"], sums["unassigned"]
    return sums


def eigenbases(layout: Layout, sums: dict[str, Any]) -> Bases:
    """EKFAC's bases: the eigenvectors of KFAC's factors."""
    return layout.by_layer(layout.unstack_all(decompose(assemble_blocks(layout, sums).blocks)))


def assemble_blocks(
    layout: Layout, sums: dict[str, Any], bases: Bases | None = None, corrections: dict[str, Any] | None = None
) -> Blocks:
    """The blocks in stacks, from sums; those over inputs are divided by their counts."""
    if bases is None or corrections is None:
        return _normalised(
            layout,
            [member for i in range(len(layout.plan.layers)) for member in unnormalised_blocks(layout, sums, i)],
            sums,
        )
    pairs = [pair for group in zip(bases, corrections["corrections"], strict=True) for pair in zip(*group, strict=True)]
    return with_other_blocks(layout, [Spectral(basis.qa, basis.qb, values) for basis, values in pairs], sums)


def with_other_blocks(layout: Layout, layers: Sequence[Block], sums: dict[str, Any]) -> Blocks:
    """These blocks of layers, and those of all other entries, in stacks."""
    return Blocks(tuple(layout.stack_all([*layers, *_unassigned_blocks(layout, sums)])), layout.stacks)


def _normalised(layout: Layout, totals: list[UnnormalisedBlock], sums: dict[str, Any]) -> Blocks:
    """The blocks, divided by their counts after stacking: one division for all layers of a stack."""
    stacked = layout.stack_all([*totals, *_unassigned_blocks(layout, sums)])
    return Blocks(tuple(x.block() if isinstance(x, UnnormalisedBlock) else x for x in stacked), layout.stacks)


def _factor_sums(
    layout: Layout,
    params: PyTree,
    bases: Bases | None,
    unassigned: bool,
    terms_at: Any,
    inputs: PyTree,
    operand: Any,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """`captured_sums` of a chunk."""
    leaves = layout.leaves if unassigned else ()
    use_factors = find_use_factors(layout, extra["mask"])
    captured = capture(layout.trace, params, inputs, leaves, taps=find_taps(use_factors) if bases is None else {})
    return captured_sums(layout, use_factors, captured, terms_at, operand, extra["keys"], bases, unassigned)


def captured_sums(
    layout: Layout,
    use_factors: Mapping[int, UseFactors],
    captured: Captured,
    terms_at: Any,
    operand: Any,
    keys: Array | None,
    bases: Bases | None = None,
    unassigned: bool = True,
) -> dict[str, Any]:
    """The sums of a captured batch. Input factors that are weighted have no counts, since they are means already."""
    trace, plan, options = layout.trace, layout.plan, layout.options
    wide = compute_dtype(captured.outputs.dtype)

    def of_uses(fn: Callable[[int], Any]) -> list[list[Any]]:
        return [[fn(n) for n in layer.uses] for layer in plan.layers]

    def input_factors(n: int) -> tuple[Factor, ...]:
        x = captured.inputs[n]
        return steps_as_groups(x, trace.uses[n]) if n in captured.tapped else use_factors[n].inputs(x)

    result: dict[str, Any] = {}
    if bases is None:
        result["a"] = of_uses(input_factors)
        if all(use_factor.weights is None for use_factor in use_factors.values()):
            result["count"] = of_uses(lambda n: use_factors[n].count(captured.outputs.shape[0]))
    else:
        raw = of_uses(lambda n: use_factors[n].rows(captured.inputs[n]).raw_rows(use_factors[n].joint))
    kind = options.fisher_type, options.mc_samples, options.positions
    num = count_vectors(layout.loss, trace.outputs, *kind, trace.examples)
    if options.fisher_type is FisherType.FORWARD_ONLY:
        return result
    terms = terms_at(captured.outputs, operand)
    make = make_vector_fn(terms, *kind, keys, trace.examples)
    head = None if bases is not None else find_head(layout)

    def part(indices: Array) -> dict[str, Any]:
        grads, own = jax.vmap(captured.vjp)(make(indices).astype(captured.outputs.dtype))

        def output_factors(n: int) -> tuple[Factor, ...] | None:
            if n == head:
                return None
            if n in captured.tapped:
                return steps_as_groups([jnp.sum(x, axis=0) for x in grads[n]], trace.uses[n])
            return use_factors[n].output_grads(grads[n].reshape(-1, *grads[n].shape[2:]))

        sums: dict[str, Any] = {}
        # Sums over some of the vectors: what leaves this function does not grow with their number.
        if bases is None:
            sums["b"] = of_uses(output_factors)
        else:
            gs = of_uses(lambda n: jax.vmap(trace.uses[n].arrange_output_grads)(grads[n]).astype(wide))
            sums["corrections"] = [
                _corrections(layout, layer, xs, g, basis)
                for layer, xs, g, basis in zip(plan.layers, raw, gs, bases, strict=True)
            ]
        if unassigned:
            flat = [g.reshape(g.shape[0] * g.shape[1], -1).astype(wide) for g in own]
            full = [layout.has_dense_block(parameter) for parameter in plan.unassigned if parameter.kind != "unused"]
            sums["unassigned"] = [g.T @ g if f else jnp.sum(g**2, axis=0) for g, f in zip(flat, full, strict=True)]
        return sums

    # If the head's output factor is known in closed form, and nothing else needs vectors, none is back-propagated.
    needed = head is None or len(trace.uses) > 1 or (unassigned and bool(layout.leaves))
    sums = sum_chunked(part, num if needed else 0, options.vector_chunk_size)
    if head is not None:
        use_factor = use_factors[head]
        known = use_factor.weighted_outputs(head_factor(terms, use_factor.partitions[0], options.max_dense_size))
        pairs = zip(plan.layers, sums["b"], strict=True)
        sums["b"] = [
            [known if n == head else found for n, found in zip(layer.uses, members, strict=True)]
            for layer, members in pairs
        ]
    return {**result, **sums}


def _corrections(
    layout: Layout, layer: Layer, rows: list[Array], gs: list[Array], bases: list[Spectral]
) -> list[Array]:
    """`sum_{v, n} (Q_B^T (sum_s g a^T) Q_A)^2` for each block of the weight, then of a separate bias."""
    if not rows:
        return [jnp.zeros_like(basis.values) for basis in bases]
    outs, ins = layout.partitions(layer)
    members = list(product(outs, ins))
    result = [
        _block_corrections(layer.swapped, rows, gs, basis, *runs)
        for runs, basis in zip(members, bases[: len(members)], strict=True)
    ]
    if layout.has_separate_bias(layer):
        sums = [jnp.sum(g, axis=3) for g in gs]
        total = sum(sums[1:], start=sums[0])  # [V, G, N, out]
        for part, basis in zip(split_parts(total, outs, 1), bases[len(members) :], strict=True):
            rotated = part if basis.qb is None else jnp.einsum("vgno,gop->vgnp", part, basis.qb)
            result.append(jnp.sum(rotated**2, axis=(0, 2))[..., None])
    return result


def _block_corrections(
    swapped: Sequence[bool], rows: list[Array], gs: list[Array], basis: Spectral, outs: EqualParts, ins: EqualParts
) -> Array:
    """Part by part: batched over pairs of parts, the rows would be copied for each of them."""
    split = outs.count, ins.count
    if split == (1, 1):
        return _part_corrections(swapped, rows, gs, basis, *outs.parts, *ins.parts)

    def part(o: int, i: int) -> Array:
        which: Spectral = jax.tree.map(lambda x: x.reshape(-1, *split, *x.shape[1:])[:, o, i], basis)
        return _part_corrections(swapped, rows, gs, which, outs.parts[o], ins.parts[i])

    return merge_parts([part(o, i) for o, i in product(range(split[0]), range(split[1]))])


def _part_corrections(
    swapped: Sequence[bool], rows: list[Array], gs: list[Array], basis: Spectral, out: slice, inputs: slice
) -> Array:
    # The square of each example's gradient, which is a sum over positions and uses: in the eigenbasis, so that only
    # rotated rows are needed. With one position and one use, it is `(g^2) (a^2)^T`, and no gradient is formed.
    total: Any = 0.0
    for a, g, s in zip(rows, gs, swapped, strict=True):
        q_in, q_out = (basis.qb, basis.qa) if s else (basis.qa, basis.qb)
        a, g = a[..., out if s else inputs], g[..., inputs if s else out]
        g = g if q_out is None else jnp.einsum("vgnso,gop->vgnsp", g, q_out)
        a = a if q_in is None else jnp.einsum("gnsi,gij->gnsj", a, q_in)
        if len(rows) == 1 and a.shape[2] == 1:
            squares = jnp.einsum("vgno,gni->goi", g[:, :, :, 0] ** 2, a[:, :, 0] ** 2)
            return jnp.swapaxes(squares, 1, 2) if s else squares
        gradient = jnp.einsum("vgnso,gnsi->vgnoi", g, a)
        total = total + (jnp.swapaxes(gradient, -1, -2) if s else gradient)
    return jnp.sum(total**2, axis=(0, 2))


def _unassigned_blocks(layout: Layout, sums: dict[str, Any]) -> list[Block]:
    """The blocks of unassigned parameters, and of entries that no output depends on."""
    dtype = compute_dtype(layout.trace.outputs.dtype)
    own = iter(sums.get("unassigned", ()))
    blocks: list[Block] = []
    for parameter in layout.plan.unassigned:
        size = layout.sizes[parameter.leaf]
        if parameter.kind == "unused":
            blocks += [Diagonal(jnp.zeros((1, size), dtype))] if size else []
        else:
            total = next(own)[None]
            blocks.append(Dense(total) if total.ndim == 3 else Diagonal(total))
    layers = sum(map(len, layout.by_layer(layout.members)))
    rest = layout.members[layers + len(blocks) :]
    return [*blocks, *(Diagonal(jnp.zeros((1, member.spec.shape[2]), dtype)) for member in rest)]
