"""Running averages of Kronecker factors, and the inverses made of them now and then."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._sharding import vary_alike
from ggn_jax.kronecker.algebra import Block, Dense, DenseSpectral, Diagonal, Kronecker, Spectral, is_diagonal
from ggn_jax.kronecker.factors import Bases, assemble_blocks, zero_sums
from ggn_jax.kronecker.layout import Blocks, Layout, Place, multiply, structure
from ggn_jax.optimizer.numbers import all_finite, choose, zeros_like
from ggn_jax.optimizer.settings import Settings


class Factors(NamedTuple):
    """What batches say of the curvature: a pytree of arrays. Those of several batches may be added, or averaged."""

    batches: Float[Array, ""]
    """How many batches: 1, or 0 where every target is ignored."""
    weight: Float[Array, ""]
    """How many of them were looked at: none at a step where factors are not due."""
    blocks: tuple[Block, ...]
    """The sum of their blocks of the GGN's approximation, as in `KFACLinearOperator`."""
    corrections: tuple[Array, ...]
    """The sum of EKFAC's eigenvalues in the bases of the state, one array per layer's block; else empty."""


class Curvature(NamedTuple):
    """What is known of the curvature so far: a pytree of arrays, part of the optimizer's state."""

    count: Int[Array, ""]  # type: ignore[assignment]  # as in optax, not a tuple's method
    """Updates so far."""
    skipped: Int[Array, ""]
    """Of these, how many had a batch with factors that were NaN or infinite: left out of the averages."""
    weight: Float[Array, ""]
    """Of the averages: `1 - decay^n` after n batches; 0 means that there are none yet."""
    damping: Float[Array, ""]
    """The damping in use."""
    blocks: PyTree[Array]
    """The bias-corrected averages of the blocks."""
    inverses: PyTree[Array]
    """Their damped inverses (heuristic damping), or their eigendecompositions (exact damping, EKFAC); 0 before that."""


def find_curvature(state: Any) -> Curvature:
    """The one `Curvature` in an optimizer's state, however it is wrapped."""
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_curvature) if _is_curvature(x)]
    if len(found) != 1:
        raise ValueError(
            "state must be that of an optimizer with one kfac or scale_by_kfac, as its init returns it; got"
            f" {type(state).__name__} with {len(found)} of them."
        )
    return found[0]


def _is_curvature(node: Any) -> bool:
    return isinstance(node, Curvature)


def initial(layout: Layout, settings: Settings, damping: Array) -> Curvature:
    """Before the first batch."""
    blocks = zero_blocks(layout)
    # Shapes are the same on any mesh, also on one that is not that of the context.
    shapes = jax.eval_shape(replace(settings, mesh=None).invert, blocks, damping)
    inverses = tuple(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    # Each its own buffer: a state may be donated.
    count, skipped, weight = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return Curvature(count, skipped, weight, damping, blocks, inverses)


def zero_blocks(layout: Layout) -> tuple[Block, ...]:
    """Blocks of the right kinds and shapes."""
    return zeros_like(assemble_blocks(layout, zero_sums(layout)).blocks)


def zero_factors(curvature: Curvature, settings: Settings) -> Factors:
    """What no batch says."""
    corrections = [block.values for block in curvature.inverses if settings.ekfac and isinstance(block, Spectral)]
    batches, weight = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    return Factors(batches, weight, zeros_like(curvature.blocks), tuple(map(jnp.zeros_like, corrections)))


def bases_of(layout: Layout, inverses: Sequence[Block]) -> Bases:
    """The eigenbases of each layer's weight and separate bias."""
    spectra = iter(inverses)
    sizes = [1 + (layer.bias is not None and not layout.joint(layer)) for layer in layout.plan.layers]
    return [[next(spectra) for _ in range(size)] for size in sizes]  # type: ignore[misc]  # of Kronecker products


def follow(curvature: Curvature, seen: Factors, damping: Array, settings: Settings) -> Curvature:
    """Take a batch's factors into the averages, and renew the inverses that are due."""
    finite = all_finite((seen.blocks, seen.corrections))
    present = seen.weight > 0
    good = present & finite
    decay = jnp.asarray(settings.decay, jnp.float32)
    weight = jnp.where(good, decay * curvature.weight + (1 - decay), curvature.weight)
    weight = jnp.where(good & (decay == 1) & (curvature.weight == 0), 1.0, weight)  # the first batch's, for ever
    gain = jnp.where(good, jnp.where(curvature.weight == 0, 1, (1 - decay) / jnp.where(good, weight, 1)), 0)

    def average(old: Array, total: Array) -> Array:
        new = total / jnp.where(present, seen.weight, 1).astype(total.dtype)
        return jnp.where(good, old + gain.astype(old.dtype) * (new - old), old)

    blocks = jax.tree.map(average, curvature.blocks, seen.blocks)
    inverses = list(curvature.inverses)
    for i, value in enumerate(seen.corrections):
        inverses[i] = inverses[i].replace_values(average(inverses[i].values, value))
    first = good & (curvature.weight == 0)
    known = (weight > 0) & (seen.batches > 0)
    inverses = _renew(blocks, tuple(inverses), curvature.count, first, known, damping, settings)
    skipped = curvature.skipped + (present & ~finite).astype(jnp.int32)
    return Curvature(curvature.count + 1, skipped, weight, damping, blocks, inverses)


def _renew(
    blocks: tuple[Block, ...],
    inverses: Any,
    count: Array,
    first: Bool[Array, ""],
    known: Bool[Array, ""],
    damping: Array,
    settings: Settings,
) -> Any:
    """The inverses, those that are due made anew."""

    def some(numbers: Sequence[int]) -> Callable[..., Any]:
        def run(blocks: Any, inverses: Any, damping: Array) -> Any:
            result = list(inverses)
            made = settings.invert([blocks[i] for i in numbers], damping)
            for i, new in zip(numbers, made, strict=True):
                old = inverses[i]
                if settings.ekfac and isinstance(new, Spectral):
                    new = new.replace_values(jnp.where(first, new.values, _rotated(old, new)))
                # A factorisation that failed leaves what was there.
                result[i] = choose(all_finite(new), new, old)
            return tuple(result)

        return run

    interval, everything = settings.inverse_interval, range(len(blocks))
    args = vary_alike(blocks, inverses, damping)
    if interval == 1 or not settings.staggered:
        due = first | (known & _are_due(count, interval))
        return jax.lax.cond(due, some(everything), lambda _, old, __: old, *args)
    turns = [some(turn) for turn in take_turns([_cost(block) for block in blocks], interval)]
    turns += [some(everything), lambda _, old, __: old]
    which = jnp.where(first, interval, jnp.where(known, count % interval, interval + 1))
    return jax.lax.switch(which, turns, *args)


def _are_due(count: Int[Array, ""], interval: int) -> Bool[Array, ""]:
    """Whether all inverses are renewed after so many steps: each `interval` of them, and before that after 1, 2, 4, 8
    and so on, as the averages of few batches change fast.
    """
    power_of_two = count & (count - 1) == 0  # or 0
    return (count % interval == 0) | ((count < interval) & power_of_two)


def take_turns(costs: Sequence[int], turns: int) -> list[list[int]]:
    """Which blocks are inverted at each of `turns` steps, so that the costs of the steps are about even."""
    loads, result = [0] * turns, [[] for _ in range(turns)]  # type: tuple[list[int], list[list[int]]]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        result[least].append(i)
        loads[least] += costs[i]
    return [sorted(turn) for turn in result]


def _cost(block: Block) -> int:
    if isinstance(block, Kronecker):
        return sum(f.shape[0] * f.shape[1] ** 3 for f in (block.a[0], block.b[0]) if not is_diagonal(f))
    return block.matrix.shape[0] ** 3 if isinstance(block, Dense) else 0


def _rotated(old: Spectral, new: Spectral) -> Array:
    """The diagonal of `old` in the basis of `new`: `R_B^2 V (R_A^2)^T` with `R = Q_new^T Q_old`."""
    values = old.values
    if new.qb is not None and old.qb is not None:
        values = jnp.einsum("gpo,goi->gpi", jnp.einsum("gkp,gko->gpo", new.qb, old.qb) ** 2, values)
    if new.qa is not None and old.qa is not None:
        values = jnp.einsum("goi,gji->goj", values, jnp.einsum("gkj,gki->gji", new.qa, old.qa) ** 2)
    return values


def precondition(
    curvature: Curvature, places: tuple[Place, ...], settings: Settings, gradient: PyTree[Array]
) -> PyTree[Array]:
    """The damped inverse times a gradient; 0 as long as no batch was seen."""
    inverses = curvature.inverses
    if settings.keeps_spectra:

        def damped(x: Array) -> Array:
            return 1 / (x + curvature.damping.astype(x.dtype))

        inverses = tuple(block.map(damped) for block in inverses)
    product = multiply(Blocks(tuple(inverses), places), structure(gradient), gradient)
    return choose(curvature.weight > 0, product, zeros_like(product))


def are_made(curvature: Curvature, places: tuple[Place, ...], settings: Settings) -> Bool[Array, ""]:
    """Whether no inverse is missing, as one is whose factorisations all failed; without damping they may.

    A damped inverse has no row of zeros, nor have its eigenvectors; eigenvalues before damping may be 0.
    """

    def kept(block: Any) -> PyTree[Array]:
        if isinstance(block, Spectral):
            return block.qa, block.qb
        if isinstance(block, DenseSpectral):
            return block.q
        return () if settings.keeps_spectra else block

    blocks = [kept(block) for block, place in zip(curvature.inverses, places, strict=True) if place.kind != "unused"]
    rows = [leaf.reshape(-1, leaf.shape[-1])[0] for leaf in jax.tree.leaves(blocks)]
    made = [jnp.any(row != 0) for row in rows]
    return (curvature.weight == 0) | jnp.all(jnp.stack([jnp.asarray(True), *made]))


def describe(block: Block) -> str:
    """What a block is, in a few words."""

    def factor(x: Array) -> str:
        groups = f"{x.shape[0]} x " if x.shape[0] > 1 else ""
        return f"{groups}diagonal {x.shape[1]}" if is_diagonal(x) else f"{groups}{x.shape[1]} x {x.shape[1]}"

    if isinstance(block, Kronecker):
        terms = f", {len(block.a)} terms" if len(block.a) > 1 else ""
        return f"Kronecker ({factor(block.b[0])}) (x) ({factor(block.a[0])}){terms}"
    if isinstance(block, Dense):
        return f"exact {block.matrix.shape[0]} x {block.matrix.shape[0]}"
    assert isinstance(block, Diagonal)
    return f"diagonal {block.values.shape[0]}"
