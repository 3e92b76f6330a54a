"""Modules of Flax and Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen
from jax import lax
from zoo_layers import SEQUENCES, Model, Models, normal

import ggn_jax


class Block(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = {"param_dtype": jnp.float64, "dtype": jnp.float64}
        x = x + linen.MultiHeadDotProductAttention(2, **wide)(linen.LayerNorm(**wide)(x))
        return linen.Dense(2, **wide)(x).mean(1)


def flax_block() -> Model:
    inputs = normal(3, 4, 4)
    return Model(*ggn_jax.from_linen(Block(), jax.jit(Block().init)(jax.random.key(0), inputs)), inputs)


class Cell(eqx.Module):
    """A GRU over a sequence."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(3), x)[0])


def equinox_gru() -> Model:
    keys = jax.random.split(jax.random.key(0), 2)
    wide = {"dtype": jnp.float64}
    module = Cell(eqx.nn.GRUCell(4, 3, key=keys[0], **wide), eqx.nn.Linear(3, 2, key=keys[1], **wide))
    return Model(*ggn_jax.from_equinox(module), SEQUENCES)


MODULES: Models = {"Flax transformer block": flax_block, "Equinox GRU cell": equinox_gru}
