"""The vectors at a model's outputs whose outer products add up to the loss Hessian, some of them at a time."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax.fisher_type import FisherType
from ggn_jax.joint import JointLoss, JointTerms, fold_keys
from ggn_jax.loss import Loss
from ggn_jax.terms import Terms, term_axes

Positions = Literal["signs", "exact"]


def feature_axes(loss: Loss, output: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The axes of one example's output whose entries are seeded one by one.

    Those of a term; the last axis where each entry is a term of its own, as with squared errors.
    """
    axes = term_axes(loss, output, False)
    return axes if axes or not output.shape else (len(output.shape) - 1,)


def uses_random_signs(
    loss: Loss, output: jax.ShapeDtypeStruct, fisher_type: FisherType, positions: Positions, num_coupled: int = 1
) -> bool:
    """Whether type-2 vectors of several loss positions (of all coupled examples) are added with random signs.

    The signs cancel, in expectation, what positions that share a backward pass add to each other.
    """
    if isinstance(loss, JointLoss):
        return any(
            uses_random_signs(*head, fisher_type, positions, num_coupled) for head in loss._heads(output).values()
        )
    axes = feature_axes(loss, output)
    several = num_coupled * math.prod(size for axis, size in enumerate(output.shape) if axis not in axes) > 1
    return fisher_type is FisherType.TYPE2 and positions == "signs" and several


def count_vectors(
    loss: Loss,
    output: jax.ShapeDtypeStruct,
    fisher_type: FisherType,
    mc_samples: int,
    positions: Positions,
    num_coupled: int = 1,
) -> int:
    """The number of vectors, where `num_coupled` examples share a backward pass."""
    if fisher_type is FisherType.FORWARD_ONLY:
        return 0
    if fisher_type is FisherType.TYPE2:
        if isinstance(loss, JointLoss):
            heads = loss._heads(output).values()
            return sum(count_vectors(*head, fisher_type, mc_samples, positions, num_coupled) for head in heads)
        if uses_random_signs(loss, output, fisher_type, positions, num_coupled):
            return math.prod(output.shape[axis] for axis in feature_axes(loss, output))
        return num_coupled * math.prod(output.shape)
    return mc_samples if fisher_type is FisherType.MC else 1


def make_vector_fn(
    terms: Terms | JointTerms,
    fisher_type: FisherType,
    mc_samples: int,
    positions: Positions,
    keys: Any,
    num_coupled: int = 1,
) -> Any:
    """A function from indices `[v]` to the vectors with these indices, `[v, N, *out]`.

    `keys` holds one key per example if anything is drawn. Vectors are made on demand: all of them may be too many.
    """
    shape, dtype = terms.outputs.shape, terms.outputs.dtype
    one = jax.ShapeDtypeStruct(shape[1:], dtype)
    if fisher_type is FisherType.MC:
        drawn = terms.draw(keys, mc_samples)

        def sample(index: Array) -> Float[Array, "N *out"]:
            return (terms.sampled_gradient(jax.tree.map(lambda x: x[index], drawn)) / math.sqrt(mc_samples)).astype(
                terms.dtype
            )

        return jax.vmap(sample)
    if fisher_type is FisherType.EMPIRICAL:
        vector = terms.empirical().astype(terms.dtype)
        return lambda indices: jnp.broadcast_to(vector, (len(indices), *shape))

    if isinstance(terms, JointTerms):
        return _columns_of_heads(terms, (fisher_type, mc_samples, positions, num_coupled), keys)
    if uses_random_signs(terms.loss, one, fisher_type, positions, num_coupled):
        axes = feature_axes(terms.loss, one)
        seeded = (1, *(size if axis in axes else 1 for axis, size in enumerate(one.shape)))
        free = tuple(1 if axis in axes else size for axis, size in enumerate(one.shape))
        signs = jax.vmap(lambda key: jax.random.rademacher(key, free, dtype))(keys)
    else:
        seeded, signs = (num_coupled, *one.shape), jnp.ones((1,) * len(shape), dtype)

    # With signs, one column is seeded at all positions at once, each with its own sign; without, at one position.
    def column(index: Array) -> Float[Array, "N *out"]:
        unit = (jnp.arange(math.prod(seeded)) == index).astype(dtype).reshape(seeded)
        return terms.product("sqrt_mv", jnp.broadcast_to(unit * signs, shape))

    return jax.vmap(column)


def _columns_of_heads(terms: JointTerms, kind: Any, keys: Any) -> Any:
    """The vectors of one head after the other, each 0 at the other heads: a head's vectors out of range are 0."""
    fisher_type, mc_samples, positions, num_coupled = kind
    makers, starts, start = [], [], 0
    for i, (name, (loss, f)) in enumerate(terms.loss._heads(terms.outputs).items()):
        own = terms.weighted(name)
        own_keys = None if keys is None else fold_keys(keys, i)
        makers.append(make_vector_fn(own, fisher_type, mc_samples, positions, own_keys, num_coupled))
        starts.append(start)
        start += count_vectors(loss, jax.ShapeDtypeStruct(f.shape[1:], f.dtype), *kind)

    def columns(indices: Array) -> Float[Array, "v N entries"]:
        return terms.join([make(indices - start) for make, start in zip(makers, starts, strict=True)], 2)

    return columns
