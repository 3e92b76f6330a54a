"""Sums over a part of the data, kept to be saved, added to others, and made an operator."""

import zlib
from functools import reduce
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt32

from ggn_jax._checks import is_concrete, is_sum_start
from ggn_jax._frozen import Frozen
from ggn_jax._repr import fields
from ggn_jax._sharding import compiler_sharded
from ggn_jax.loss import Loss
from ggn_jax.operators.batches import DIFFERENT_DATA, same_data
from ggn_jax.operators.problem import Problem


class Recipe:
    """How an operator is made from sums: equal for sums that can be added."""

    def __init__(self, operator: type, key: Any, made_of: Any = None):
        self.operator, self.made_of, self._key = operator, made_of, (operator, key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def loss_key(loss: Loss) -> Any:
    """Equal for losses with the same options, as far as these have known values."""
    frozen = Frozen(loss)
    arrays = [np.asarray(x).tobytes() if is_concrete(x) else None for x in jax.tree.leaves(frozen.arrays)]
    return frozen.static, tuple(arrays)


class PartialSums(eqx.Module):
    """What some of the batches contribute to an operator; made by the operators' `partial_sums`.

    A pytree of arrays: sums over examples, which do not depend on how these are cut into batches, with marks of the
    options, parameters and draws that they belong to. `a + b` are the sums over the examples of both, and an operator's
    `finish` makes the operator. To save them, save their leaves; their structure is that of the sums over any one
    batch.

    `a + b` refuses sums with other options, other values of the parameters, or a model with other nonlinear functions
    (`tanh` for `relu`, say, or dropout that is on; another constant is not noticed), and sums with draws of one key for
    the same examples, as of a part without its `start`, or added twice. Where nothing is sampled, such an overlap is
    not noticed.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, ggn_jax
        >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.CrossEntropyLoss()
        >>> args, options = (lambda p, x: x @ p["w"], loss, params), {"fisher_type": "type-2"}
        >>> batches = [(jnp.ones((n, 2)), jnp.arange(n) % 3) for n in (8, 8, 5)]
        >>> some = ggn_jax.KFACLinearOperator.partial_sums(*args, batches[:2], **options)
        >>> saved = [np.asarray(leaf) for leaf in jax.tree.leaves(some)]  # np.savez(path, *saved)
        >>> rest = ggn_jax.KFACLinearOperator.partial_sums(*args, batches[2:], start=int(some.examples), **options)
        >>> restored = jax.tree.unflatten(jax.tree.structure(rest), saved)
        >>> (restored + rest).examples, ggn_jax.KFACLinearOperator.finish(restored + rest)
        (Array(21, dtype=int32), KFACLinearOperator(params=float32[2, 3], blocks=1))
    """

    totals: PyTree[Array]
    examples: Int[Array, ""]
    """The number of examples summed over."""
    params: UInt32[Array, ""]
    """A hash of all bits of the parameters, which tells different values apart."""
    model: UInt32[Array, ""]
    """A hash of the names of the model's functions of single entries, and of its draws."""
    draws: UInt32[Array, "ranges 3"]
    """For which examples something was sampled: a hash of the key, the first example, and one past the last."""
    recipe: Recipe = eqx.field(static=True)
    factors: "PartialSums | None" = None
    """For EKFAC's second pass, the sums of its first."""
    bases: PyTree[Array] = None
    """For EKFAC's second pass, the eigenbases of its first."""
    data: Float[Array, " n"] | None = None
    """For EKFAC, sums over examples that tell the data of its passes apart."""

    @classmethod
    def _of(
        cls,
        recipe: Recipe,
        problem: Problem,
        totals: PyTree[Array],
        seen: int,
        drawn: tuple[Any, int] | None,
        **passes: Any,
    ) -> Self:
        """The sums over `seen` examples, with the key and the number of the first example where something was drawn."""
        ranges = np.zeros((0, 3), np.uint32)
        if drawn is not None and _has_value(drawn[0]):
            ranges = np.asarray([[_key_hash(drawn[0]), drawn[1], drawn[1] + seen]], np.uint32)
        marks = (
            _params_hash(problem.params),
            jnp.asarray(zlib.crc32(" ".join(sorted(problem.nonlinear_functions())).encode()), jnp.uint32),
        )
        return cls(totals, jnp.asarray(seen, jnp.int32), *marks, jnp.asarray(ranges), recipe, **passes)

    def __repr__(self) -> str:
        return fields(self, operator=self.recipe.operator.__name__, examples=self.examples, totals=self.totals)

    def __add__(self, other: Any) -> Self:
        """The sums over the data of both."""
        if not isinstance(other, PartialSums):
            raise TypeError(f"partial sums are added to others; got {type(other).__name__}.")
        if self.recipe != other.recipe or (self.factors is None) != (other.factors is None):
            raise ValueError(
                f"partial sums are of one operator, model, loss and set of options; got those of {self._kind} and of"
                f" {other._kind}, made otherwise."
            )
        same_program("partial sums", self, other)
        if self.factors is not None and other.factors is not None:
            same_examples("the factors of both", self.factors.examples, other.factors.examples)
            pairs = zip(jax.tree.leaves(self.bases), jax.tree.leaves(other.bases), strict=True)
            if not all(not _has_value(x) or not _has_value(y) or np.array_equal(x, y) for x, y in pairs):
                raise ValueError(
                    "the second pass's sums are in different eigenbases, as other machines may find them: start the"
                    " other parts with factors=, the sums of the first part of this pass."
                )
        for n, (x, y) in enumerate(zip(*map(jax.tree.leaves, (self.totals, other.totals)), strict=True)):
            if jnp.shape(x) != jnp.shape(y):
                raise ValueError(
                    f"partial sums of one model have leaves of the same shapes; leaf {n} has {jnp.shape(x)} and"
                    f" {jnp.shape(y)}: restore what was saved, in the same order."
                )
        totals = jax.tree.map(jnp.add, self.totals, other.totals)
        draws = _union(self.draws, other.draws)
        made = totals, self.examples + other.examples, self.params, self.model, draws
        data = jax.tree.map(jnp.add, self.data, other.data)
        return type(self)(*made, self.recipe, self.factors, self.bases, data)

    def __radd__(self, other: Any) -> Self:
        return self if is_sum_start(other) else NotImplemented

    @property
    def _kind(self) -> str:
        return self.recipe.operator.__name__ + ("'s second pass" if self.factors is not None else "")


def same_examples(what: str, one: Array, two: Array) -> None:
    """Refuse numbers of examples that differ, if they are known."""
    if _has_value(one) and _has_value(two) and int(one) != int(two):
        raise ValueError(f"{what} must be of the same data; got sums over {int(one)} examples and over {int(two)}.")


def same_passes(first: PartialSums, second: PartialSums) -> None:
    """Refuse two passes over different data, if they are known."""
    same_examples("EKFAC's passes", first.examples, second.examples)
    marks = first.data, second.data
    if all(map(_has_value, marks)) and not same_data(*map(np.asarray, marks)):
        raise ValueError(DIFFERENT_DATA)


def _has_value(x: Any) -> bool:
    """Whether an array, perhaps one read from a file, has values."""
    return isinstance(x, np.ndarray | np.generic) or is_concrete(x)


def same_program(what: str, one: PartialSums, two: PartialSums) -> None:
    """Refuse hashes of parameters, or of a model, that differ, if they are known."""
    if _differ(one.params, two.params):
        raise ValueError(
            f"{what} must be of the same parameters' values; got those of others, as after a step of training: make all"
            " parts at the same ones."
        )
    if _differ(one.model, two.model):
        raise ValueError(
            f"{what} must be of one model; got those of a model_fn with other nonlinear functions, as another"
            " activation or dropout that is on: make all parts with the same one."
        )


def _differ(one: Array, two: Array) -> bool:
    return _has_value(one) and _has_value(two) and int(one) != int(two)


def _union(one: Array, two: Array) -> Array:
    """The ranges of both, which must not overlap."""
    if not _has_value(one) or not _has_value(two):
        return jnp.concatenate([one, two])
    merged: list[list[int]] = []
    for mark, start, stop in sorted(np.concatenate([np.asarray(one), np.asarray(two)]).tolist()):
        last = merged[-1] if merged and merged[-1][0] == mark else None
        if last is None or start > last[2]:
            merged.append([mark, start, stop])
        elif start == last[2]:
            last[2] = stop
        else:
            raise ValueError(
                f"both partial sums have draws of one key for the examples {start} to {min(stop, last[2]) - 1}: pass"
                " start=, the number of examples before those of a part, and add each part once."
            )
    return jnp.asarray(np.asarray(merged, np.uint32).reshape(-1, 3))


def _key_hash(key: Array) -> int:
    """A hash of a key."""
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return reduce(lambda mark, word: (mark * HASH_FACTOR + word) % 2**32, np.asarray(words).reshape(-1).tolist(), 1)


HASH_FACTOR = 2654435761  # 2^32 divided by the golden ratio


@jax.jit
@compiler_sharded
def _params_hash(params: PyTree[Array]) -> UInt32[Array, ""]:
    """A hash of the parameters: sums of integers, which do not depend on their order, and so not on the machine."""
    mark = jnp.ones((), jnp.uint32)
    for leaf in jax.tree.leaves(params):
        width = min(leaf.dtype.itemsize, 4)
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32).reshape(-1)
        weights = jnp.uint32(HASH_FACTOR) * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)
        mark = jnp.uint32(HASH_FACTOR) * mark + jnp.sum(words * weights, dtype=jnp.uint32)
    return mark


def check_sums(name: str, sums: Any, operator: type) -> None:
    """Refuse anything but partial sums for this operator."""
    found = sums.recipe.operator if isinstance(sums, PartialSums) else None
    if found is not operator:
        got = type(sums).__name__ if found is None else f"those of {found.__name__}"
        raise TypeError(f"{name} must be what {operator.__name__}.partial_sums returned; got {got}.")
