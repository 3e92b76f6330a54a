"""Two-layer networks, tied weights and data for the tests of Kronecker-factored operators."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggn_jax

KFAC, EKFAC, KFOC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator, ggn_jax.KFOCLinearOperator
BOTH = pytest.mark.parametrize("cls", [KFAC, EKFAC])


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def linear_net(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["1"]["w"] + p["1"]["b"][None]) @ p["2"]["w"] + p["2"]["b"][None]


def tanh_net(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["1"]["w"] + p["1"]["b"][None]) @ p["2"]["w"] + p["2"]["b"][None]


PARAMS = {"1": {"w": normal(3, 4), "b": normal(4)}, "2": {"w": normal(4, 2), "b": normal(2)}}
FIRST = 4 + 12  # entries of the first layer
INPUTS, LABELS = normal(7, 3), jax.device_put(np.arange(7) % 2)
CE = ggn_jax.CrossEntropyLoss()


def tied(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"]


TIED = {"v": normal(3, 2), "w": normal(3, 3)}


def scale_and_shift(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) * p["s"][None] + p["t"][None]
