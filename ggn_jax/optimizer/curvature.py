"""Running averages of Kronecker factors, and the inverses made of them now and then."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._eager import compiled
from ggn_jax._fusion import max_abs
from ggn_jax._repr import fields
from ggn_jax._sharding import vary_alike
from ggn_jax.kronecker.algebra import (
    Block,
    Dense,
    DenseSpectral,
    Diagonal,
    Kronecker,
    Spectral,
    is_diagonal,
)
from ggn_jax.kronecker.factors import Bases, assemble_blocks, zero_sums
from ggn_jax.kronecker.layout import Layout
from ggn_jax.kronecker.stacks import Stack, params_structure, read_entries, stacked_mv, write_entries
from ggn_jax.optimizer.inverse_updates import update_inverses
from ggn_jax.optimizer.numbers import all_finite, inner, zeros_like
from ggn_jax.optimizer.settings import Settings
from ggn_jax.optimizer.storage import pack, to_storage


class Factors(NamedTuple):
    """What batches contribute to the curvature: a pytree of arrays. Those of several batches may be added, or averaged.

    Returned by `factors` and `value_and_grad_and_factors` of `kfac` and `scale_by_kfac`; `update` takes them.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), 0.1, example_inputs=batch[0])
        >>> optimizer.factors(params, batch, optimizer.init(params), key=jax.random.key(0))
        Factors(batches=float32[], weight=float32[], blocks=2 arrays, 13 entries, corrections=())
    """

    batches: Float[Array, ""]
    """The number of batches: 1, or 0 where every target is ignored."""
    weight: Float[Array, ""]
    """The number of batches that factors were computed for: 0 at a step where factors are not due."""
    blocks: tuple[Block, ...]
    """The sum of the batches' blocks, as in `KFACLinearOperator`."""
    corrections: tuple[Array, ...]
    """The sum of EKFAC's eigenvalues in the bases of the state, one array per layer's block; else empty."""

    def __repr__(self) -> str:
        return fields(self, **self._asdict())


class Curvature(NamedTuple):
    """What is known of the curvature so far: a pytree of arrays, part of the state of `kfac` and `scale_by_kfac`.

    In that state its blocks are dicts of arrays, so that any library that saves pytrees can save it.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> state = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x).init(params)
        >>> int(state.curvature.count), float(state.curvature.damping)
        (0, 0.0010000000474974513)
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as in optax, not a tuple's method
    """The number of updates so far."""
    skipped: Int[Array, ""]
    """The number of updates whose batch had factors that were NaN or infinite, and was left out of the averages."""
    weight: Float[Array, ""]
    """The weight of the averages, `1 - decay^n` after n batches; 0 means that there are none yet."""
    damping: Float[Array, ""]
    """The damping in use."""
    blocks: PyTree[Array]
    """The bias-corrected averages of the blocks; one triangle of each symmetric matrix."""
    inverses: PyTree[Array]
    """Their damped inverses (heuristic damping), or their eigendecompositions (exact damping, EKFAC); 0 before the
    first ones."""

    def __repr__(self) -> str:
        return fields(self, **self._asdict())


def find_curvature(state: Any) -> Curvature:
    """The one `Curvature` in an optimizer's state, however it is wrapped."""
    found: Curvature = find_one(state, Curvature)
    return found


def find_one(state: Any, *kinds: type) -> Any:
    """The one part of these kinds in an optimizer's state, however it is wrapped."""

    def is_one(node: Any) -> bool:
        return isinstance(node, kinds)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        raise ValueError(
            "state must be that of an optimizer with one kfac or scale_by_kfac, as its init returns it; got"
            f" {type(state).__name__} with {len(found)} of them."
        )
    return found[0]


def initial_curvature(layout: Layout, settings: Settings, damping: Array) -> Curvature:
    """The state before the first batch."""
    # Each array has its own buffer, since a state may be donated.
    count, skipped, weight = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    blocks = jax.eval_shape(lambda blocks: tuple(map(settings.spread.pad, blocks)), block_shapes(layout))
    averages = jax.eval_shape(lambda blocks: to_storage(pack(blocks), settings.factor_dtype, count), blocks)
    # Without the mesh, on which shapes do not depend: it need not be that of the context.
    inverses = tuple(jax.eval_shape(replace(settings, mesh=None).invert, blocks, damping))
    return Curvature(count, skipped, weight, damping, zeros_like(averages), zeros_like(inverses))


def block_shapes(layout: Layout) -> tuple[Block, ...]:
    """Blocks of `jax.ShapeDtypeStruct`s: of the right kinds and shapes."""
    shapes: tuple[Block, ...] = jax.eval_shape(lambda: assemble_blocks(layout, zero_sums(layout)).blocks)
    return shapes


def zero_factors(blocks: Sequence[Block], settings: Settings) -> Factors:
    """The factors of no batch, for blocks of these shapes."""
    corrections = [
        jnp.zeros(shape, block.a[0].dtype)
        for block in blocks
        if settings.ekfac and isinstance(block, Kronecker)
        for shape in [(*block.b[0].shape[:2], block.a[0].shape[1])]
    ]
    batches, weight = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    return Factors(batches, weight, zeros_like(tuple(blocks)), tuple(corrections))


def bases_of(layout: Layout, inverses: Sequence[Block]) -> Bases:
    """The eigenbases of each layer's blocks, without the groups that pad a stack on a mesh."""

    def real(stack: Stack, inverse: Block) -> Block:
        cut: Block = jax.tree.map(lambda x: x[: stack.shape[0]], inverse)
        return cut

    real_ones = [real(*pair) for pair in zip(layout.stacks, inverses, strict=True)]
    return layout.by_layer(layout.unstack_all(real_ones))


@compiled
def update_averages(curvature: Curvature, seen: Factors, damping: Array, decay: Any, settings: Settings) -> Curvature:
    """Add a batch's factors to the averages, and update the inverses that are due.

    Averages are kept bias-corrected: `average += gain (new - average)` with `gain = (1 - decay) / weight`, and
    `weight = 1 - decay^n` after n batches. So the first batch has gain 1, and nothing is divided when they are used.
    """
    present = seen.weight > 0
    if settings.factor_interval == 1:
        averages = _averages(curvature, seen, decay, settings)
    else:
        # At steps in between, factors are 0 and are not even read.
        kept = _Averages(curvature.blocks, curvature.inverses, curvature.weight, jnp.asarray(False))
        kept, curvature, seen = vary_alike(kept, curvature, seen)
        averages = jax.lax.cond(present, lambda: _averages(curvature, seen, decay, settings), lambda: kept)
    good, weight = averages.good, averages.weight
    first = good & (curvature.weight == 0)
    known = (weight > 0) & (seen.batches > 0)
    dtypes = [jax.tree.leaves(block)[0].dtype for block in seen.blocks]
    args = averages.blocks, dtypes, averages.inverses, curvature.count, first, known, damping, settings
    skipped = curvature.skipped + (present & ~good).astype(jnp.int32)
    return Curvature(curvature.count + 1, skipped, weight, damping, averages.blocks, update_inverses(*args))


class _Averages(NamedTuple):
    """The averages with a batch's factors, if these are finite."""

    blocks: PyTree[Array]
    inverses: Any
    """Before new ones; but EKFAC's eigenvalues, which are kept with them, are averages as well."""
    weight: Float[Array, ""]
    good: Bool[Array, ""]
    """Whether the factors are there, and finite."""


def _averages(curvature: Curvature, seen: Factors, decay: Any, settings: Settings) -> _Averages:
    present = seen.weight > 0
    good = present & all_finite((seen.blocks, seen.corrections))
    decay = jnp.asarray(decay, jnp.float32)
    weight = jnp.where(good, decay * curvature.weight + (1 - decay), curvature.weight)
    weight = jnp.where(good & (decay == 1) & (curvature.weight == 0), 1.0, weight)  # decay 1 keeps the first batch's
    gain = jnp.where(good, jnp.where(curvature.weight == 0, 1, (1 - decay) / jnp.where(good, weight, 1)), 0)

    def average(old: Array, total: Array) -> Array:
        new = total / jnp.where(present, seen.weight, 1).astype(total.dtype)
        old = old.astype(new.dtype)
        return jnp.where(good, old + gain.astype(old.dtype) * (new - old), old)

    spread = settings.spread
    averages = jax.tree.map(average, curvature.blocks, spread.shard(spread.pad(pack(seen.blocks))))
    blocks = spread.constrain(to_storage(averages, settings.factor_dtype, curvature.count))
    inverses = list(curvature.inverses)
    spectra = [i for i, block in enumerate(inverses) if settings.ekfac and isinstance(block, Spectral)]
    for i, value in zip(spectra, spread.shard(spread.pad(seen.corrections)), strict=True):
        inverses[i] = inverses[i].replace_values(spread.constrain(average(inverses[i].values, value)))
    return _Averages(blocks, tuple(inverses), weight, good)


def with_new_inverses(curvature: Curvature, dtypes: Sequence[Any], settings: Settings) -> Curvature:
    """The state with all inverses recomputed from the present averages and damping."""
    first, known = jnp.asarray(False), jnp.asarray(True)
    at_once = replace(settings, inverse_interval=1)
    args = curvature.inverses, curvature.count, first, known, curvature.damping, at_once
    return curvature._replace(inverses=update_inverses(curvature.blocks, dtypes, *args))


class Direction(NamedTuple):
    """A preconditioned gradient."""

    entries: PyTree[Array]
    slope: Float[Array, ""]
    """Its inner product with the gradient."""
    finite: Bool[Array, ""]
    """Whether it is finite, and so the gradient, since no product makes NaN finite."""


@compiled
def precondition(
    curvature: Curvature, stacks: tuple[Stack, ...], settings: Settings, gradient: PyTree[Array]
) -> Direction:
    """The damped inverse times a gradient; 0 before the first batch."""
    made, parts = precondition_stacks(curvature, stacks, settings, gradient)
    finite = all_finite(made)
    made = [jnp.where(curvature.weight > 0, part, 0) for part in made]
    slope = inner(made, [part.astype(x.dtype) for part, x in zip(parts, made, strict=True)])
    made = [x[: stack.shape[0]] for stack, x in zip(stacks, made, strict=True)]
    return Direction(write_entries(stacks, params_structure(gradient), made), slope, finite)


def precondition_stacks(
    curvature: Curvature, stacks: tuple[Stack, ...], settings: Settings, gradient: PyTree[Array]
) -> tuple[list[Float[Array, "G ..."]], list[Float[Array, "G ..."]]]:
    """The damped inverses times a gradient, and the gradient, for each stack; with the groups that pad it on a mesh."""
    inverses = curvature.inverses
    if settings.keeps_spectra:

        def damped(x: Array) -> Array:
            return 1 / (x + curvature.damping.astype(x.dtype))

        inverses = tuple(block.map(damped) for block in inverses)
    spread = settings.spread
    # Each device multiplies with the inverses that it holds.
    parts = spread.constrain(spread.pad(read_entries(stacks, gradient)))
    return list(stacked_mv(inverses, parts)), list(parts)


@compiled
def inverses_available(curvature: Curvature, stacks: tuple[Stack, ...], settings: Settings) -> Bool[Array, ""]:
    """Whether every block has an inverse: without damping, all factorisations of a block may have failed so far.

    A missing inverse is 0. A damped inverse has a positive diagonal, and no row of eigenvectors is 0, so one entry
    or row is enough to check; eigenvalues before damping may be 0.
    """

    def first(x: Array) -> Float[Array, "G ..."]:
        return x.reshape(x.shape[0], -1)[:, 0]

    def first_row(x: Array) -> Float[Array, " G"]:
        return max_abs(x[:, 0], axis=1)

    def entries(block: Any) -> list[Array]:
        if isinstance(block, Spectral):
            return [first_row(q) for q in (block.qa, block.qb) if q is not None]
        if isinstance(block, DenseSpectral):
            return [first_row(block.q)]
        return [] if settings.keeps_spectra else list(map(first, jax.tree.leaves(block)))

    missing = [
        entry[: stack.shape[0]] == 0
        for block, stack in zip(curvature.inverses, stacks, strict=True)
        if not stack.unused
        for entry in entries(block)
    ]
    return (curvature.weight == 0) | ~jnp.any(jnp.concatenate([jnp.zeros(1, bool), *missing]))


def describe(block: Block) -> str:
    """What a block is, in a few words."""

    def factor(x: Array) -> str:
        groups = f"{x.shape[0]} x " if x.shape[0] > 1 else ""
        return f"{groups}diagonal {x.shape[1]}" if is_diagonal(x) else f"{groups}{x.shape[1]} x {x.shape[1]}"

    if isinstance(block, Kronecker):
        terms = f", {len(block.a)} terms" if len(block.a) > 1 else ""
        return f"Kronecker ({factor(block.b[0])}) (x) ({factor(block.a[0])}){terms}"
    if isinstance(block, Dense):
        return f"exact {block.matrix.shape[1]} x {block.matrix.shape[1]}"
    assert isinstance(block, Diagonal)
    return f"diagonal {block.values.shape[1]}"
