"""Sums over a part of the data, kept to be saved, added to others, and made an operator."""

from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from ggn_jax._checks import is_concrete, starts_sum
from ggn_jax._frozen import Frozen
from ggn_jax._repr import fields
from ggn_jax.loss import Loss


class Recipe:
    """How an operator is made of sums: equal for sums that may be added."""

    def __init__(self, operator: type, key: Any, made_of: Any = None):
        self.operator, self.made_of, self._key = operator, made_of, (operator, key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def loss_key(loss: Loss) -> Any:
    """Equal for losses with the same options, as far as their values are known."""
    frozen = Frozen(loss)
    arrays = [np.asarray(x).tobytes() if is_concrete(x) else None for x in jax.tree.leaves(frozen.arrays)]
    return frozen.static, tuple(arrays)


class PartialSums(eqx.Module):
    """What some of the data contribute to an operator; made by the operators' `partial_sums`.

    A pytree of arrays, all of which are sums over examples and independent of how these are cut into batches: `a + b`
    are the sums of the data of both, and an operator's `finish` makes the operator. To save them, save their leaves;
    their structure is that of the sums over any one batch.

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
    """How many examples were summed over."""
    recipe: Recipe = eqx.field(static=True)
    factors: "PartialSums | None" = None
    """Of EKFAC's second pass: the sums of its first."""
    bases: PyTree[Array] = None
    """And the eigenbases that these have."""

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
        if self.factors is not None and other.factors is not None:
            same_examples("the factors of both", self.factors.examples, other.factors.examples)
            pairs = zip(jax.tree.leaves(self.bases), jax.tree.leaves(other.bases), strict=True)
            if not all(not is_concrete(x) or not is_concrete(y) or np.array_equal(x, y) for x, y in pairs):
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
        return type(self)(totals, self.examples + other.examples, self.recipe, self.factors, self.bases)

    def __radd__(self, other: Any) -> Self:
        return self if starts_sum(other) else NotImplemented

    @property
    def _kind(self) -> str:
        return self.recipe.operator.__name__ + ("'s second pass" if self.factors is not None else "")


def same_examples(what: str, one: Array, two: Array) -> None:
    """Refuse counts of examples that differ, where they are known."""
    if is_concrete(one) and is_concrete(two) and int(one) != int(two):
        raise ValueError(f"{what} must be of the same data; got sums over {int(one)} examples and over {int(two)}.")


def check_sums(name: str, sums: Any, operator: type) -> None:
    """Refuse what are no sums for this operator."""
    found = sums.recipe.operator if isinstance(sums, PartialSums) else None
    if found is not operator:
        got = type(sums).__name__ if found is None else f"those of {found.__name__}"
        raise TypeError(f"{name} must be what {operator.__name__}.partial_sums returned; got {got}.")
