"""Sums of outer products: the matrix products that factors are made of."""

import jax.numpy as jnp
from jaxtyping import Array, Float

ALIGNED = 256  # from this width on, one more column is expensive: GPUs multiply rows of whole 16 bytes twice as fast


def sum_outer_products(x: Float[Array, "G M d"]) -> Float[Array, "G d d"]:
    """`sum_m x_m x_m^T`. (In halves, which would save a quarter of the operations, it takes longer on GPUs.)"""
    return jnp.einsum("gmi,gmj->gij", x, x)


def sum_outer_products_with(x: Float[Array, "G M d"], last: Float[Array, "#G M"]) -> Float[Array, "G d+1 d+1"]:
    """`sum_outer_products` of rows with `last` as one more entry."""
    last = jnp.broadcast_to(last[..., None], (*x.shape[:-1], 1))
    if x.shape[-1] < ALIGNED:
        return sum_outer_products(jnp.concatenate([x, last], axis=-1))
    side, corner = (jnp.sum(last * y, axis=1, keepdims=True) for y in (x, last))
    upper = jnp.concatenate([sum_outer_products(x), jnp.swapaxes(side, 1, 2)], axis=2)
    return jnp.concatenate([upper, jnp.concatenate([side, corner], axis=2)], axis=1)
