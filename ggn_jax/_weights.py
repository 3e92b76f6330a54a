"""Products, sums and roots of weights of at least 0; a weight of 0 gives 0, even times NaN or infinity."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def times(weight: Float[Array, "*#shape"], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`weight * x` in the dtype of `x`; 0 where the weight is 0."""
    return jnp.where(weight == 0, 0, weight.astype(x.dtype) * x)


def weighted_sum(trees: Sequence[PyTree[Array]], weights: Sequence[Float[Array, ""]]) -> PyTree[Array]:
    """`sum_k weights[k] trees[k]`, by `times`."""

    def one(*leaves: Array) -> Array:
        parts = [times(weight, x) for weight, x in zip(weights, leaves, strict=True)]
        with jax.numpy_dtype_promotion("standard"):  # losses of outputs in several dtypes
            return sum(parts[1:], start=parts[0])

    return jax.tree.map(one, *trees)


def safe_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The square root of positive numbers, else 0; its derivative at 0 is 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
