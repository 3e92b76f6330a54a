"""A two-layer network with equal eigenvalues and a singular factor, for functions of blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import ggn_jax

RNG = np.random.default_rng(0)
N, DAMPING = 9, 0.3


def normal(*shape: int) -> jax.Array:
    return jax.device_put(RNG.normal(size=shape))


def model_fn(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]


# Orthonormal columns and squared error: the second layer's output factor is a multiple of the identity, and the first's
# is nearly one; an input that is always 0 makes a factor singular.
PARAMS = {"w": normal(3, 4), "b": normal(4), "v": jax.device_put(np.linalg.qr(RNG.normal(size=(4, 3)))[0])}
INPUTS = [jax.device_put(RNG.normal(size=(N, 3)) * [0, 1, 1]), normal(N, 3)]
TARGETS, LOSS = normal(N, 3), ggn_jax.MSELoss()
VECTOR = {"w": normal(3, 4), "b": normal(4), "v": normal(4, 3)}


def flat(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]
