"""Updates of the inverses of the running averages: all at an interval, or a balanced subset at each step.

A program has one operation for each size of matrices, however many blocks have factors of that size: averages are
unpacked, damped and inverted in one loop over all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._fusion import max_abs
from ggn_jax._sharding import vary_alike
from ggn_jax.kronecker.algebra import Block, Dense, Kronecker, Spectral, finite_groups, is_diagonal
from ggn_jax.kronecker.inverse import inverse_by_cholesky
from ggn_jax.kronecker.linalg import BySize, map_sequentially, rotated
from ggn_jax.kronecker.pairs import split_damping
from ggn_jax.optimizer.settings import Settings
from ggn_jax.optimizer.spread import Groups, Spread, put_groups, take_groups
from ggn_jax.optimizer.storage import packed_trace, unpack, unpack_triangle


def update_inverses(
    blocks: PyTree[Array],
    dtypes: Sequence[Any],
    inverses: Any,
    count: Array,
    first: Bool[Array, ""],
    known: Bool[Array, ""],
    damping: Array,
    settings: Settings,
) -> Any:
    """The inverses, with those that are due recomputed."""

    def some(subset: Mapping[int, Groups]) -> Callable[..., Any]:
        def run(arrays: Any, damping: Array, first: Array) -> Any:
            blocks, inverses = arrays
            due = [(take_groups(blocks[i], groups), dtypes[i]) for i, groups in subset.items()]
            result = list(inverses)
            for (i, groups), (new, finite) in zip(subset.items(), _invert(due, damping, settings), strict=True):
                old = take_groups(inverses[i], groups)
                if settings.ekfac and isinstance(new, Spectral):
                    # EKFAC's eigenvalues are averages of their own: they move to the new basis, and are not replaced.
                    new = new.replace_values(jnp.where(first, new.values, _rotated(old, new)))
                # If a factorisation fails, the old inverse stays.
                kept = _groups_where(finite_groups(new) if finite is None else finite, new, old)
                result[i] = put_groups(inverses[i], groups, kept)
            return tuple(result)

        # Each device inverts the blocks that it holds.
        return lambda blocks, inverses, *numbers: settings.spread.map_shards(run, (blocks, inverses), *numbers)

    def none(blocks: Any, inverses: Any, *_: Array) -> Any:
        return inverses

    interval, everything = settings.inverse_interval, dict.fromkeys(range(len(blocks)))
    args = vary_alike(blocks, inverses, damping, first)
    if interval == 1 or not settings.staggered:
        due = first | (known & _all_due(count, interval))
        return jax.lax.cond(due, some(everything), none, *args)
    # One branch for each subset, one for all at the first step, and one for none.
    branches = [some(subset) for subset in _schedule(blocks, interval, settings.spread)]
    branches += [some(everything), none]
    which = jnp.where(first, interval, jnp.where(known, count % interval, interval + 1))
    return jax.lax.switch(which, branches, *args)


def _invert(
    due: Sequence[tuple[Block, Any]], damping: Array, settings: Settings
) -> list[tuple[Block, Bool[Array, " G"] | None]]:
    """The inverses of blocks (packed, with the dtype to compute in), and which groups are finite, where known."""
    products: dict[int, tuple[Kronecker, Any]] = {}
    if not settings.keeps_spectra:
        for i, (block, dtype) in enumerate(due):
            if isinstance(block, Kronecker) and len(block.a) == 1:
                products[i] = block, dtype
    inverted = iter(_invert_products(list(products.values()), damping))
    rest = iter(settings.invert([unpack(*pair) for i, pair in enumerate(due) if i not in products], damping))
    return [next(inverted) if i in products else (next(rest), None) for i in range(len(due))]


def _invert_products(
    products: Sequence[tuple[Kronecker, Any]], damping: Array
) -> list[tuple[Kronecker, Bool[Array, " G"]]]:
    """Inverses of single Kronecker products, damped as by `damp_factors`, and which groups are finite."""
    if not products:
        return []
    wide = max((dtype for _, dtype in products), key=lambda dtype: jnp.finfo(dtype).bits)
    factors = BySize([x.astype(dtype) for block, dtype in products for x in (block.a[0], block.b[0])])
    of_a, of_b = (np.concatenate(factors.group_ranges[side::2]) for side in (0, 1))

    means = jnp.concatenate([_mean(x).astype(wide) for x in factors.joined])
    (shift_a,), (shift_b,) = split_damping([means[of_a]], [means[of_b]], damping)
    shifts = jnp.concatenate([shift_a, shift_b])[np.argsort(np.concatenate([of_a, of_b]))]
    ends = np.cumsum([len(x) for x in factors.joined])
    inverses = [
        _shifted_inverses(x, shifts[end - len(x) : end].astype(x.dtype))
        for x, end in zip(factors.joined, ends, strict=True)
    ]
    finite = jnp.concatenate([jnp.isfinite(max_abs(x, range(1, x.ndim))) for x in inverses])

    found, both = factors.split(inverses), finite[of_a] & finite[of_b]
    result, start = [], 0
    for a, b in zip(found[::2], found[1::2], strict=True):
        result.append((Kronecker((a,), (b,)), both[start : start + len(a)]))
        start += len(a)
    return result


def _mean(x: Float[Array, "G ..."]) -> Float[Array, " G"]:
    """The mean eigenvalue of packed or diagonal factors."""
    if is_diagonal(x):
        return jnp.mean(x, axis=1)
    rows, half = x.shape[1:]
    return packed_trace(x) / (2 * half - (rows < 2 * half))


@jax.custom_jvp
def _shifted_inverses(stored: Float[Array, "G ..."], shifts: Float[Array, " G"]) -> Float[Array, "G d *d"]:
    """`(X + shift I)^-1` of packed or diagonal factors."""

    def one(packed: Array, shift: Array) -> Array:
        x = unpack_triangle(packed[None])[0]
        return inverse_by_cholesky(x + shift * jnp.eye(x.shape[0], dtype=x.dtype))

    return 1 / (stored + shifts[:, None]) if is_diagonal(stored) else map_sequentially(one, stored, shifts)


@_shifted_inverses.defjvp
def _shifted_inverses_jvp(primals: Any, tangents: Any) -> Any:
    """`dX^-1 = -X^-1 dX X^-1`."""
    found, (stored, shifts) = _shifted_inverses(*primals), tangents
    if is_diagonal(found):
        return found, -(found**2) * (stored + shifts[:, None])
    eye = jnp.eye(found.shape[1], dtype=found.dtype)[None]
    return found, -rotated(unpack_triangle(stored) + shifts[:, None, None] * eye, found)


def _schedule(blocks: Sequence[Block], steps: int, spread: Spread) -> list[dict[int, Groups]]:
    """Which groups of which stacks are inverted at each of `steps` steps."""
    groups = [(i, g) for i, block in enumerate(blocks) for g in range(spread.groups_per_device(block))]
    result: list[dict[int, Groups]] = []
    for subset in balance_load([_cost(blocks[i]) for i, _ in groups], steps):
        members: dict[int, tuple[int, ...]] = {}
        for i, g in (groups[n] for n in subset):
            members[i] = (*members.get(i, ()), g)
        result.append(dict(members))
    return result


def _groups_where(which: Bool[Array, " G"], yes: Block, no: Block) -> Block:
    """For each group, one or the other."""
    chosen: Block = jax.tree.map(
        lambda a, b: jnp.where(which.reshape(which.shape + (1,) * (a.ndim - 1)), a, b), yes, no
    )
    return chosen


def _all_due(count: Int[Array, ""], interval: int) -> Bool[Array, ""]:
    """Whether all inverses are due after `count` steps: each `interval` steps, and before that after 1, 2, 4, 8, ...,
    since averages of few batches change fast.
    """
    power_of_two = count & (count - 1) == 0  # or 0
    return (count % interval == 0) | ((count < interval) & power_of_two)


def balance_load(costs: Sequence[int], steps: int) -> list[list[int]]:
    """Assign items to steps with about equal costs: the next most expensive one to the step with the least load."""
    loads, result = [0] * steps, [[] for _ in range(steps)]  # type: tuple[list[int], list[list[int]]]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        result[least].append(i)
        loads[least] += costs[i]
    return [sorted(items) for items in result]


def _cost(block: Block) -> int:
    """The cost of one group's factorisations; a packed matrix has about as many rows as the matrix."""
    if isinstance(block, Kronecker):
        return sum(f.shape[1] ** 3 for f in (block.a[0], block.b[0]) if not is_diagonal(f))
    return block.matrix.shape[1] ** 3 if isinstance(block, Dense) else 0


def _rotated(old: Spectral, new: Spectral) -> Array:
    """The diagonal of `old` in the basis of `new`: `R_B^2 V (R_A^2)^T` with `R = Q_new^T Q_old`."""
    values = old.values
    if new.qb is not None and old.qb is not None:
        values = jnp.einsum("gpo,goi->gpi", jnp.einsum("gkp,gko->gpo", new.qb, old.qb) ** 2, values)
    if new.qa is not None and old.qa is not None:
        values = jnp.einsum("goi,gji->goj", values, jnp.einsum("gkj,gki->gji", new.qa, old.qa) ** 2)
    return values
