"""Kronecker factors of a model's layers, summed over a batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block, Dense, Diagonal, Factor, Kronecker, Spectral, combine, decompose
from ggn_jax.kronecker.vectors import Positions, count_vectors, vector_maker
from ggn_jax.layers import Layer, Leftover, Plan, Trace, Use, capture, make_plan, trace_model
from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.uses import View
from ggn_jax.operators.problem import Problem

POWER_ITERATIONS = 1000
Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class Options:
    """How the factors are made; see `KFACLinearOperator`."""

    fisher_type: FisherType
    mc_samples: int
    sharing: Sharing
    bias: Literal["joint", "separate"]
    tied: Literal["sum", "concatenate"]
    positions: Positions
    on_uncovered: Literal["error", "diagonal", "full"]
    small: Literal["full", "diagonal"]
    max_dense_size: int
    max_small_size: int
    vector_chunk_size: int


@dataclass(frozen=True)
class Place:
    """Which parameters a block acts on, and what it is."""

    names: tuple[str, ...]
    kind: str
    views: tuple[View, ...]  # a weight, and a bias that is one more input; or one array


class Blocks(eqx.Module):
    """The blocks of a curvature matrix, and where they are."""

    blocks: tuple[Block, ...]
    places: tuple[Place, ...] = eqx.field(static=True)


class Layout:
    """What a trace and options say about blocks, before any value is known."""

    def __init__(self, problem: Problem, options: Options):
        self.options, self.loss = options, problem.loss
        self.trace: Trace = trace_model(problem.model_fn, problem.params, problem.inputs)
        self.plan: Plan = make_plan(self.trace)
        self.leaves = tuple(left.leaf for left in self.plan.leftovers if left.kind != "unused")
        uncovered = [left for left in self.plan.leftovers if left.kind == "uncovered"]
        if uncovered and options.on_uncovered == "error":
            raise NotImplementedError(_uncovered_message(self.trace, uncovered))
        forward_only = options.fisher_type is FisherType.FORWARD_ONLY
        if forward_only and self.leaves:
            names = ", ".join(self.trace.names[leaf] for leaf in self.leaves)
            raise NotImplementedError(
                f"fisher_type 'forward-only' back-propagates nothing, and has no curvature for {names}, which no layer"
                " owns: choose another fisher type."
            )

    def joint(self, layer: Layer) -> bool:
        """Whether the bias is one more input; counts of rows stay diagonal, so an embedding's bias is apart."""
        kinds = {self.trace.uses[n].kind for n in layer.uses}
        return layer.bias is not None and self.options.bias == "joint" and "embedding" not in kinds

    def is_full(self, left: Leftover) -> bool:
        options = self.options
        uncovered = left.kind == "uncovered"
        wanted, most = (
            (options.on_uncovered, options.max_dense_size) if uncovered else (options.small, options.max_small_size)
        )
        return wanted == "full" and math.prod(self.trace.shapes[left.leaf]) <= most

    def places(self) -> tuple[Place, ...]:
        result: list[Place] = []
        starts = [sum(math.prod(s) for s in self.trace.shapes[:i]) for i in range(len(self.trace.shapes))]
        for layer in self.plan.layers:
            kind = "+".join(dict.fromkeys(self.trace.uses[n].kind for n in layer.uses))
            if self.joint(layer):
                assert layer.bias is not None
                names = tuple(self.trace.names[leaf] for leaf in layer.leaves)
                result.append(Place(names, kind, (layer.weight, layer.bias)))
                continue
            owners = {view: self._names(view) for view in (layer.weight, layer.bias) if view is not None}
            result += [Place(owners[layer.weight], kind, (layer.weight,))]
            if layer.bias is not None:
                result.append(Place(owners[layer.bias], "bias", (layer.bias,)))
        for left in self.plan.leftovers:
            size = math.prod(self.trace.shapes[left.leaf])
            if not size:
                continue
            entries = IndexMap.contiguous((1, 1, size), starts[left.leaf])
            result.append(Place((self.trace.names[left.leaf],), left.kind, (View(entries, (1, 1, size)),)))
        return (*result, *self.rest(result))

    def rest(self, places: list[Place]) -> list[Place]:
        """The entries that no output depends on, of parameters of which a layer uses a part."""
        sizes = [math.prod(shape) for shape in self.trace.shapes]
        views = [view for place in places for view in place.views]
        if sum(view.entries.size for view in views) == sum(sizes):
            return []
        free = np.ones(sum(sizes), bool)  # a byte per parameter, and only here
        for view in views:
            free[view.entries.numbers().reshape(-1)] = False
        (numbers,) = np.nonzero(free)
        view = View(IndexMap.explicit(numbers.reshape(1, 1, -1)), (1, 1, len(numbers)))
        return [Place((f"unused entries of {', '.join(self._names(view))}",), "unused", (view,))]

    def _names(self, view: View) -> tuple[str, ...]:
        return tuple(self.trace.names[i] for i in view.entries.owners([math.prod(s) for s in self.trace.shapes]))


def _uncovered_message(trace: Trace, uncovered: list[Leftover]) -> str:
    lines = []
    for left in uncovered:
        where = f" at {left.source}" if left.source else ""
        where += f" in {left.module}" if left.module else ""
        lines.append(f"params{trace.names[left.leaf]}: {left.why}{where}")
    return (
        "These parameters have no Kronecker form:\n  "
        + "\n  ".join(lines)
        + "\nPass on_uncovered='diagonal' (the GGN's"
        " diagonal) or 'full' (its dense block) for curvature without one; ggn_jax.report shows all parameters."
    )


def compute_blocks(
    problem: Problem, keys: Array | None, mask: Array | None, options: Options, correct: bool = False
) -> Blocks:
    """KFAC's blocks of the loss at a batch; with `correct`, EKFAC's."""
    layout = Layout(problem, options)
    if mask is not None and not any(_masked(use, mask) for use in layout.trace.uses):
        positions = sorted({use.positions for use in layout.trace.uses})
        raise ValueError(
            f"mask of shape {mask.shape} fits no layer: their sharing positions are {positions}, of each of"
            f" {mask.shape[0]} data."
        )
    sums = problem.sum_over_chunks(partial(_factor_sums, layout, problem.params, None), *_data(keys, mask))
    blocks = _assemble(layout, sums)
    if correct:
        groups = _assemble_layers(layout, sums)
        bases = iter(decompose([block for group in groups for block in group]))
        grouped = [[next(bases) for _ in group] for group in groups]
        fn = partial(_factor_sums, layout, problem.params, grouped)
        values = problem.sum_over_chunks(fn, *_data(keys, mask))["corrected"]
        pairs = [pair for group in zip(grouped, values, strict=True) for pair in zip(*group, strict=True)]
        corrected = [Spectral(basis.qa, basis.qb, value) for basis, value in pairs]  # type: ignore[union-attr]
        blocks = [*corrected, *blocks[len(corrected) :]]
    places = layout.places()
    dtype = compute_dtype(layout.trace.outputs.dtype)
    blocks += [Diagonal(jnp.zeros(place.views[0].shape[2], dtype)) for place in places[len(blocks) :]]
    return Blocks(tuple(blocks), places)


def compute_optimal_blocks(problem: Problem, keys: Array | None, mask: Array | None, options: Options) -> Blocks:
    """KFOC's blocks: for each layer the Kronecker product that is nearest to the GGN's own block."""
    layout = Layout(problem, options)
    blocks = compute_blocks(problem, keys, mask, options)
    fn = partial(_optimal_factors, layout, problem.params)
    nearest = problem.sum_over_chunks(fn, *_data(keys, mask))  # one chunk: all data at once
    flat = [Kronecker((a,), (b,)) for group in nearest for a, b in group]
    return Blocks((*flat, *blocks.blocks[len(flat) :]), blocks.places)


def _optimal_factors(
    layout: Layout, params: PyTree, terms_at: Any, inputs: PyTree, operand: Any, extra: dict[str, Any]
) -> list[list[tuple[Factor, Factor]]]:
    trace, options = layout.trace, layout.options
    captured = capture(trace, params, inputs, ())
    wide = compute_dtype(captured.outputs.dtype)
    kind = options.fisher_type, options.mc_samples, options.positions
    make = vector_maker(terms_at(captured.outputs, operand), *kind, extra["keys"])
    num = count_vectors(layout.loss, trace.outputs, *kind)
    grads, _ = jax.vmap(captured.pull_back)(make(jnp.arange(num)).astype(captured.outputs.dtype))
    result = []
    for layer in layout.plan.layers:
        left, right, bias = [], [], []
        for n, swapped in zip(layer.uses, layer.swapped, strict=True):
            use = trace.uses[n]
            g = jax.vmap(use.arrange_output_grads)(grads[n]).astype(wide)
            x = _Inputs(use, captured.inputs[n], None, options, wide)
            a = jnp.broadcast_to(x.raw_rows(layout.joint(layer))[None], (*g.shape[:-1], x.width(layout.joint(layer))))
            left.append(a if swapped else g)
            right.append(g if swapped else a)
            bias.append(jnp.sum(g, axis=3))
        # A datum's weight gradient is a sum over positions, and over uses just as well.
        group = [_nearest_to_outer_products(jnp.concatenate(left, 3), jnp.concatenate(right, 3))]
        if layer.bias is not None and not layout.joint(layer):
            total = sum(bias[1:], start=bias[0])
            b = jnp.einsum("vgno,vgnp->gop", total, total)
            group.append((jnp.ones((b.shape[0], 1), wide), b))
        result.append(group)
    return result


def _nearest_to_outer_products(left: Array, right: Array) -> tuple[Factor, Factor]:
    """The nearest `B (x) A` to `sum_m vec(M_m) vec(M_m)^T`, with `M_m = sum_s left_s right_s^T`, for each group.

    The leading singular pair of the rearranged block by power iterations `B = sum M A M^T / |A|^2` and
    `A = sum M^T B M / |B|^2`. They map positive semi-definite matrices to such, so both factors are, starting from I.
    """
    groups, out, inputs = left.shape[1], left.shape[-1], right.shape[-1]
    tolerance = 10 * jnp.finfo(left.dtype).eps

    def squares(x: Array) -> Array:
        return jnp.sum(x**2, axis=(1, 2), keepdims=True)

    def to_b(a: Array) -> Array:
        inner = jnp.einsum("vgnsi,gij,vgntj->vgnst", right, a, right)
        return jnp.einsum("vgnso,vgnst,vgntp->gop", left, inner, left)

    def to_a(b: Array) -> Array:
        inner = jnp.einsum("vgnso,gop,vgntp->vgnst", left, b, left)
        return jnp.einsum("vgnsi,vgnst,vgntj->gij", right, inner, right)

    def unit(x: Array) -> Array:
        size = jnp.sqrt(squares(x))
        return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), 0)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, _, count = state
        return unit(to_a(unit(to_b(a)))), a, count + 1

    def moves(state: tuple[Array, Array, Array]) -> Array:
        a, before, count = state
        return (count < POWER_ITERATIONS) & jnp.any(jnp.sqrt(squares(a - before)) > tolerance)

    start = unit(jnp.broadcast_to(jnp.eye(inputs, dtype=left.dtype), (groups, inputs, inputs)))
    a, _, _ = jax.lax.while_loop(moves, step, (start, jnp.zeros_like(start), jnp.zeros((), jnp.int32)))
    b = to_b(a)
    return a, b.reshape(groups, out, out)


def _data(keys: Array | None, mask: Array | None) -> tuple[Any, ...]:
    """What is cut along with the data; absent ones as empty pytrees."""
    return ({"keys": keys, "mask": mask},)


def _factor_sums(
    layout: Layout, params: PyTree, bases: Any, terms_at: Any, inputs: PyTree, operand: Any, extra: dict[str, Any]
) -> dict[str, Any]:
    """Unnormalised input factors, their counts, output factors, and what leftovers need, of a chunk."""
    trace, plan, options = layout.trace, layout.plan, layout.options
    captured = capture(trace, params, inputs, layout.leaves)
    wide = compute_dtype(captured.outputs.dtype)
    uses = [[(n, trace.uses[n]) for n in layer.uses] for layer in plan.layers]
    rows = [[_Inputs(use, captured.inputs[n], extra["mask"], options, wide) for n, use in members] for members in uses]
    result: dict[str, Any] = {}
    if bases is None:
        result["a"] = [
            [x.factor(layout.joint(layer)) for x in members] for layer, members in zip(plan.layers, rows, strict=True)
        ]
        result["count"] = [[x.count for x in members] for members in rows]
    kind = options.fisher_type, options.mc_samples, options.positions
    num = count_vectors(layout.loss, trace.outputs, *kind)
    if not num:
        return result
    terms = terms_at(captured.outputs, operand)
    make = vector_maker(terms, *kind, extra["keys"])

    def part(indices: Array) -> dict[str, Any]:
        grads, own = jax.vmap(captured.pull_back)(make(indices).astype(captured.outputs.dtype))

        def arranged(n: int, use: Use) -> Array:  # [V, G, N, S, out]
            return jax.vmap(use.arrange_output_grads)(grads[n]).astype(wide)

        sums: dict[str, Any] = {}
        gs = [[arranged(n, use) for n, use in members] for members in uses]
        if bases is None:
            sums["b"] = [[_output_factor(g, options) for g in members] for members in gs]
            flat = [g.reshape(g.shape[0] * g.shape[1], -1).astype(wide) for g in own]
            full = [layout.is_full(left) for left in plan.leftovers if left.kind != "unused"]
            sums["own"] = [g.T @ g if f else jnp.sum(g**2, axis=0) for g, f in zip(flat, full, strict=True)]
        else:
            sums["corrected"] = [
                _corrected(layout, layer, xs, g, basis)
                for layer, xs, g, basis in zip(plan.layers, rows, gs, bases, strict=True)
            ]
        return sums

    return {**result, **_sum_in_parts(part, num, options.vector_chunk_size)}


def _sum_in_parts(fn: Callable[[Array], PyTree], num: int, at_once: int) -> PyTree:
    """The sum of `fn(indices)` over `num` indices, in parts of about equal size."""
    parts = -(-num // at_once)
    size = -(-num // parts)
    even = num // size
    if even <= 1:
        total = fn(jnp.arange(min(size, num)))
    else:
        shapes = jax.eval_shape(fn, jnp.arange(size))
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        indices = jnp.arange(even * size).reshape(even, size)
        total, _ = jax.lax.scan(lambda t, i: (jax.tree.map(jnp.add, t, fn(i)), None), start, indices)
    rest = num - max(even, 1) * size
    return jax.tree.map(jnp.add, total, fn(jnp.arange(num - rest, num))) if rest > 0 else total


def _masked(use: Use, mask: Array) -> bool:
    """Whether the mask is of this layer's sharing positions."""
    return bool(use.positions) and use.positions == tuple(n for n in mask.shape[1:] if n > 1)


class _Inputs:
    """A use's inputs, as sharing, mask and dtype want them."""

    def __init__(self, use: Use, captured: Array, mask: Array | None, options: Options, wide: Any):
        x = use.arrange_inputs(captured)  # [G, N, S, in], or row numbers [G, N, S]
        self.use, self.options = use, options
        size, positions = x.shape[1], x.shape[2]
        self.mask = None
        if mask is not None and _masked(use, mask):
            self.mask = mask.reshape(size, positions).astype(wide)
        self.embedding = use.kind == "embedding"
        if self.embedding:
            rows = use.weight.shape[2]
            index = jnp.clip(x, 0, rows - 1)
            weight = ((index == x) | (not use.fills)).astype(wide)
            self.index = index
            self.weight = weight if self.mask is None else weight * self.mask
        else:
            self.x = x.astype(wide)
        reduce = options.sharing == "reduce"
        if self.mask is None:
            self.count: Any = jnp.asarray(size * (1 if reduce else positions), wide)
        elif reduce:
            self.count = jnp.sum(jnp.any(self.mask > 0, axis=1)).astype(wide)
        else:
            self.count = jnp.sum(self.mask)

    def rows(self, joint: bool) -> Array:
        """`[G, N, S, in]`, with the bias's constant where it is joint; averaged over positions for `reduce`."""
        x = self.x
        if joint:
            x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
        if self.mask is not None:
            x = x * self.mask[None, :, :, None]
        if self.options.sharing == "reduce":
            total = x.shape[2] if self.mask is None else jnp.maximum(jnp.sum(self.mask, 1), 1)[None, :, None, None]
            x = jnp.sum(x, axis=2, keepdims=True) / total
        return x

    def raw_rows(self, joint: bool) -> Array:
        """`[G, N, S, in]` of all positions, as in the weight's gradient; rows of a table as one-hot vectors."""
        if self.embedding:
            return (
                jax.nn.one_hot(self.index, self.use.weight.shape[2], dtype=self.weight.dtype) * self.weight[..., None]
            )
        x = self.x
        return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1) if joint else x

    def width(self, joint: bool) -> int:
        """The length of these rows."""
        return self.use.weight.shape[2] + joint

    def factor(self, joint: bool) -> Factor:
        """The unnormalised `sum a a^T`."""
        if self.embedding:
            groups, rows = self.index.shape[0], self.use.weight.shape[2]
            weight = self.weight
            if self.options.sharing == "reduce":
                # The mean of one-hot rows: its square at a row is (count / S)^2; sum_s (count of s's row) / S^2.
                same = (self.index[..., :, None] == self.index[..., None, :]) * weight[..., None, :]
                total = jnp.maximum(jnp.sum(weight, -1), 1) if self.mask is not None else weight.shape[-1]
                weight = weight * jnp.sum(same, axis=-1) / jnp.square(jnp.asarray(total, weight.dtype))[..., None]
            flat, values = self.index.reshape(groups, -1), weight.reshape(groups, -1)
            return jax.vmap(lambda i, v: jnp.zeros(rows, v.dtype).at[i].add(v))(flat, values)
        x = self.rows(joint)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if x.shape[-1] > self.options.max_dense_size:
            return jnp.sum(x**2, axis=1)
        return jnp.einsum("gmi,gmj->gij", x, x)


def _output_factor(g: Array, options: Options) -> Factor:
    """`sum g g^T` over vectors, data and positions; `[V, G, N, S, out]`."""
    if options.sharing == "reduce":
        g = jnp.sum(g, axis=3, keepdims=True)
    g = jnp.moveaxis(g, 1, 0).reshape(g.shape[1], -1, g.shape[-1])
    if g.shape[-1] > options.max_dense_size:
        return jnp.sum(g**2, axis=1)
    return jnp.einsum("gmo,gmp->gop", g, g)


def _corrected(layout: Layout, layer: Layer, xs: list[_Inputs], gs: list[Array], bases: list[Spectral]) -> list[Array]:
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


def _assemble(layout: Layout, sums: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = [block for group in _assemble_layers(layout, sums) for block in group]
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
