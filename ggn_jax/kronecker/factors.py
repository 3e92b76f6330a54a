"""Kronecker factors of a model's layers, summed over a batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block, Dense, Diagonal, Factor, Kronecker, Spectral, combine, decompose
from ggn_jax.kronecker.head import find_head, head_factor
from ggn_jax.kronecker.layout import Cuts, Layout, Run, cut, join
from ggn_jax.kronecker.masks import arrange_masks
from ggn_jax.kronecker.parts import sum_in_parts
from ggn_jax.kronecker.sides import Sides, find_sides, find_taps, groups_of_steps
from ggn_jax.kronecker.stacks import Blocks
from ggn_jax.kronecker.vectors import count_vectors, vector_maker
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
    """What KFAC's blocks are made of, summed over a batch; with EKFAC's bases, the squared gradients in them.

    `unassigned` asks for the blocks of parameters that have no layer as well.
    """
    if unassigned:
        layout.warn()
    check_mask_fits(layout.trace, mask)
    fn = partial(_factor_sums, layout, problem.params, bases, unassigned)
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
    problem: Problem, layout: Layout, keys: Array | None, mask: Array | None, bases: Bases | None = None
) -> dict[str, Any]:
    """`factor_sums` that add up over batches: those of the *sum-reduced* loss, and what its mean divides by.

    All but the input factors and their counts are proportional to the reduction.
    """
    sums, r = factor_sums(problem, layout, keys, mask, bases, bases is None), problem.reduction()
    for name in {"b", "own", "corrected"} & set(sums):
        # Where nothing counts, r is infinite and the sums are 0.
        sums[name] = jax.tree.map(lambda x: jnp.where(jnp.isinf(r), x, x / r.astype(x.dtype)), sums[name])
    return {**sums, "divisor": 1 / r}


def reduce_sums(layout: Layout, sums: dict[str, Any]) -> dict[str, Any]:
    """Added `batch_sums` as `factor_sums` of all batches' data."""
    sums = dict(sums)
    divisor = sums.pop("divisor")
    if layout.loss.reduction == "mean":
        for name in {"b", "own", "corrected"} & set(sums):
            sums[name] = jax.tree.map(lambda x: _divide(x, divisor.astype(x.dtype)), sums[name])
    return sums


def zero_sums(layout: Layout) -> dict[str, Any]:
    """`factor_sums` of nothing: zeros of the right shapes, which need no data."""
    trace, options = layout.trace, layout.options
    dtype = compute_dtype(trace.outputs.dtype)

    def factors(groups: int, cuts: Cuts, diagonal: bool) -> tuple[Array, ...]:
        dense = [not diagonal and run.size <= options.max_dense_size for run in cuts]
        return tuple(
            jnp.zeros((groups * run.count, *(run.size,) * (1 + d)), dtype) for run, d in zip(cuts, dense, strict=True)
        )

    sums: dict[str, Any] = {"a": [], "count": [], "b": [], "own": []}
    for layer in layout.plan.layers:
        groups = layer.weight.shape[0]
        outs, ins = layout.cuts(layer)
        roles = layout.roles(layer)
        sums["a"].append([factors(groups, outs if s else ins, counted) for counted, s in roles])
        sums["count"].append([jnp.ones((), dtype)] * len(roles))
        sums["b"].append([factors(groups, ins if s else outs, False) for _, s in roles])
    for left in layout.plan.unassigned:
        size = layout.sizes[left.leaf]
        if left.kind != "unused":
            sums["own"].append(jnp.zeros((size, size) if layout.is_full(left) else size, dtype))
    if options.fisher_type is FisherType.FORWARD_ONLY:
        del sums["b"], sums["own"]
    return sums


def eigenbases(layout: Layout, sums: dict[str, Any]) -> Bases:
    """EKFAC's: the eigenvectors of KFAC's factors."""
    return layout.by_layer(layout.each(decompose(assemble_blocks(layout, sums).blocks)))


def assemble_blocks(
    layout: Layout, sums: dict[str, Any], bases: Bases | None = None, corrections: dict[str, Any] | None = None
) -> Blocks:
    """The blocks, equal layers' as one stack; the sums over inputs are divided by their counts."""
    if bases is None or corrections is None:
        return _normalised(
            layout, [member for i in range(len(layout.plan.layers)) for member in _totals(layout, sums, i)], sums
        )
    pairs = [pair for group in zip(bases, corrections["corrected"], strict=True) for pair in zip(*group, strict=True)]
    return in_places(layout, [Spectral(basis.qa, basis.qb, values) for basis, values in pairs], sums)


def in_places(layout: Layout, layers: Sequence[Block], sums: dict[str, Any]) -> Blocks:
    """The layers' blocks, and those of all other entries, in stacks."""
    return Blocks(tuple(layout.stacked([*layers, *_other_blocks(layout, sums)])), layout.stacks)


def _normalised(layout: Layout, totals: list["_Totals"], sums: dict[str, Any]) -> Blocks:
    """The blocks from the layers' sums: they are divided where equal layers are one array."""
    stacked = layout.stacked([*totals, *_other_blocks(layout, sums)])
    return Blocks(tuple(x.block() if isinstance(x, _Totals) else x for x in stacked), layout.stacks)


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
    sides = find_sides(layout, extra["mask"])
    captured = capture(layout.trace, params, inputs, leaves, taps=find_taps(sides) if bases is None else {})
    return captured_sums(layout, sides, captured, terms_at, operand, extra["keys"], bases, unassigned)


def captured_sums(
    layout: Layout,
    sides: Mapping[int, Sides],
    captured: Captured,
    terms_at: Any,
    operand: Any,
    keys: Array | None,
    bases: Bases | None = None,
    unassigned: bool = True,
) -> dict[str, Any]:
    """Input factors, with their counts unless they are weighted, output factors, and what unassigned parameters need.

    With EKFAC's bases, its corrections.
    """
    trace, plan, options = layout.trace, layout.plan, layout.options
    wide = compute_dtype(captured.outputs.dtype)

    def of_uses(fn: Callable[[int], Any]) -> list[list[Any]]:
        return [[fn(n) for n in layer.uses] for layer in plan.layers]

    def input_factors(n: int) -> tuple[Factor, ...]:
        x = captured.inputs[n]
        return groups_of_steps(x, trace.uses[n]) if n in captured.tapped else sides[n].inputs(x)

    result: dict[str, Any] = {}
    if bases is None:
        result["a"] = of_uses(input_factors)
        if all(side.weights is None for side in sides.values()):
            result["count"] = of_uses(lambda n: sides[n].count(captured.outputs.shape[0]))
    else:
        raw = of_uses(lambda n: sides[n].rows(captured.inputs[n]).raw_rows(sides[n].joint))
    kind = options.fisher_type, options.mc_samples, options.positions
    num = count_vectors(layout.loss, trace.outputs, *kind, trace.examples)
    if options.fisher_type is FisherType.FORWARD_ONLY:
        return result
    terms = terms_at(captured.outputs, operand)
    make = vector_maker(terms, *kind, keys, trace.examples)
    head = None if bases is not None else find_head(layout)

    def part(indices: Array) -> dict[str, Any]:
        grads, own = jax.vmap(captured.vjp)(make(indices).astype(captured.outputs.dtype))

        def output_factors(n: int) -> tuple[Factor, ...] | None:
            if n == head:
                return None
            if n in captured.tapped:
                return groups_of_steps([jnp.sum(x, axis=0) for x in grads[n]], trace.uses[n])
            return sides[n].output_grads(grads[n].reshape(-1, *grads[n].shape[2:]))

        sums: dict[str, Any] = {}
        if bases is None:
            sums["b"] = of_uses(output_factors)
        else:
            gs = of_uses(lambda n: jax.vmap(trace.uses[n].arrange_output_grads)(grads[n]).astype(wide))
            sums["corrected"] = [
                _corrected(layout, layer, xs, g, basis)
                for layer, xs, g, basis in zip(plan.layers, raw, gs, bases, strict=True)
            ]
        if unassigned:
            flat = [g.reshape(g.shape[0] * g.shape[1], -1).astype(wide) for g in own]
            full = [layout.is_full(left) for left in plan.unassigned if left.kind != "unused"]
            sums["own"] = [g.T @ g if f else jnp.sum(g**2, axis=0) for g, f in zip(flat, full, strict=True)]
        return sums

    # Where all is known of the head, no vector is back-propagated.
    needed = head is None or len(trace.uses) > 1 or (unassigned and bool(layout.leaves))
    sums = sum_in_parts(part, num if needed else 0, options.vector_chunk_size)
    if head is not None:
        side = sides[head]
        known = side.weighted_outputs(head_factor(terms, side.cuts[0], options.max_dense_size))
        pairs = zip(plan.layers, sums["b"], strict=True)
        sums["b"] = [
            [known if n == head else found for n, found in zip(layer.uses, members, strict=True)]
            for layer, members in pairs
        ]
    return {**result, **sums}


def _corrected(layout: Layout, layer: Layer, rows: list[Array], gs: list[Array], bases: list[Spectral]) -> list[Array]:
    """`sum_{v, n} (Q_B^T (sum_s g a^T) Q_A)^2` for each block of the weight, then of a separate bias."""
    if not rows:
        return [jnp.zeros_like(basis.values) for basis in bases]
    outs, ins = layout.cuts(layer)
    members = list(product(outs, ins))
    result = [
        _corrected_block(layer.swapped, rows, gs, basis, *runs)
        for runs, basis in zip(members, bases[: len(members)], strict=True)
    ]
    if layout.separate(layer):
        sums = [jnp.sum(g, axis=3) for g in gs]
        total = sum(sums[1:], start=sums[0])  # [V, G, N, out]
        for part, basis in zip(cut(total, outs, 1), bases[len(members) :], strict=True):
            rotated = part if basis.qb is None else jnp.einsum("vgno,gop->vgnp", part, basis.qb)
            result.append(jnp.sum(rotated**2, axis=(0, 2))[..., None])
    return result


def _corrected_block(
    swapped: Sequence[bool], rows: list[Array], gs: list[Array], basis: Spectral, outs: Run, ins: Run
) -> Array:
    """Part by part: together, they would take the rows as often as there are parts."""
    split = outs.count, ins.count
    if split == (1, 1):
        return _corrected_part(swapped, rows, gs, basis, *outs.parts, *ins.parts)

    def part(o: int, i: int) -> Array:
        which: Spectral = jax.tree.map(lambda x: x.reshape(-1, *split, *x.shape[1:])[:, o, i], basis)
        return _corrected_part(swapped, rows, gs, which, outs.parts[o], ins.parts[i])

    return join([part(o, i) for o, i in product(range(split[0]), range(split[1]))])


def _corrected_part(
    swapped: Sequence[bool], rows: list[Array], gs: list[Array], basis: Spectral, out: slice, inputs: slice
) -> Array:
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


class _Totals(eqx.Module):
    """A block before the sums over inputs are divided by how many there were, if they are not means already."""

    a: tuple[Factor, ...]
    b: tuple[Factor, ...]
    count: tuple[Float[Array, " G"], ...]
    swapped: tuple[bool, ...] = eqx.field(static=True)

    def block(self) -> Kronecker:
        a = [_divide(x, n) for x, n in zip(self.a, self.count, strict=True)] if self.count else self.a
        terms = list(zip(a, self.b, self.swapped, strict=True))
        return Kronecker(tuple(y if s else x for x, y, s in terms), tuple(x if s else y for x, y, s in terms))


def _totals(layout: Layout, sums: dict[str, Any], number: int) -> list[_Totals]:
    """Of a layer, for each of its blocks."""
    layer = layout.plan.layers[number]
    outs, ins = layout.cuts(layer)
    groups, swapped = layer.weight.shape[0], layer.swapped
    a, counts = sums["a"][number], sums["count"][number] if "count" in sums else []
    dtype = a[0][0].dtype
    ones = [tuple(jnp.ones((groups * run.count, run.size), dtype) for run in (ins if s else outs)) for s in swapped]
    b = sums["b"][number] if "b" in sums else ones
    if layout.options.tied == "concatenate" and len(a) > 1:
        groups_of_uses = layout.concatenated(layer)
        if any(swapped[i] != swapped[members[0]] for members in groups_of_uses for i in members):
            raise NotImplementedError(
                f"tied='concatenate' cannot put the uses of params{layout.trace.names[layer.leaves[0]]} together,"
                " as one has inputs where the other has outputs: pass tied='sum'."
            )
        a, b = (
            [tuple(map(_sum, zip(*(parts[i] for i in members), strict=True))) for members in groups_of_uses]
            for parts in (a, b)
        )
        counts = [sum(counts[i] for i in members) for members in groups_of_uses] if counts else []
        swapped = tuple(swapped[members[0]] for members in groups_of_uses)

    def member(o: int, i: int) -> _Totals:
        split = outs[o].count, ins[i].count
        places = [((0, o), (1, i)) if s else ((1, i), (0, o)) for s in swapped]  # of a term's input and output factor
        first = tuple(_repeated(x[n], side, groups, split) for x, ((side, n), _) in zip(a, places, strict=True))
        second = tuple(_repeated(x[n], side, groups, split) for x, (_, (side, n)) in zip(b, places, strict=True))
        count = tuple(jnp.broadcast_to(n, groups * split[0] * split[1]) for n in counts)
        return _Totals(first, second, count, swapped)

    result = [member(o, i) for o, i in product(range(len(outs)), range(len(ins)))]
    if layout.separate(layer):
        for o, run in enumerate(outs):
            terms, each = tuple(x[o] for x in b), jnp.ones(groups * run.count, dtype)
            result.append(_Totals((each[:, None],) * len(b), terms, (each,) * len(b), (False,) * len(b)))
    return result


def _repeated(x: Float[Array, "parts ..."], side: int, groups: int, split: tuple[int, int]) -> Float[Array, "G ..."]:
    """What belongs to parts of the outputs (side 0) or of the inputs (side 1), for each pair of them."""
    if split[1 - side] == 1:
        return x
    parts = jnp.expand_dims(x.reshape(groups, split[side], *x.shape[1:]), 2 - side)
    return jnp.broadcast_to(parts, (groups, *split, *x.shape[1:])).reshape(-1, *x.shape[1:])


def _sum(factors: Sequence[Factor]) -> Factor:
    return combine(factors, jnp.ones(len(factors), factors[0].dtype))


def _other_blocks(layout: Layout, sums: dict[str, Any]) -> list[Block]:
    """The blocks of what no layer owns."""
    dtype = compute_dtype(layout.trace.outputs.dtype)
    own = iter(sums.get("own", ()))
    blocks: list[Block] = []
    for left in layout.plan.unassigned:
        size = layout.sizes[left.leaf]
        if left.kind == "unused":
            blocks += [Diagonal(jnp.zeros((1, size), dtype))] if size else []
        else:
            total = next(own)[None]
            blocks.append(Dense(total) if total.ndim == 3 else Diagonal(total))
    layers = sum(map(len, layout.by_layer(layout.members)))
    rest = layout.members[layers + len(blocks) :]
    return [*blocks, *(Diagonal(jnp.zeros((1, member.spec.shape[2]), dtype)) for member in rest)]


def _divide(total: Factor, count: Any) -> Factor:
    """`total / count`, for each group if there is a count for each; 0 where nothing was counted."""
    count = jnp.reshape(count, (*jnp.shape(count), *[1] * (total.ndim - 1))) if jnp.ndim(count) else count
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
