"""What the tests of the optimizer share: small models, batches, and dense matrices by automatic differentiation."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ggn_jax

MSE = ggn_jax.MSELoss()
CE = ggn_jax.CrossEntropyLoss()
KEY = jax.random.key(0)


def normal(seed: int, *shape: int, dtype: Any = jnp.float64) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype))


def integers(seed: int, high: int, *shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).integers(high, size=shape))


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def deep_linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["u"] @ params["v"] @ params["w"]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["u"] + params["c"][None]) @ params["v"] + params["d"][None]


def mlp_params(dtype: Any = jnp.float64) -> Any:
    return {
        "u": normal(1, 3, 4, dtype=dtype),
        "c": normal(2, 4, dtype=dtype),
        "v": normal(3, 4, 2, dtype=dtype),
        "d": normal(4, 2, dtype=dtype),
    }


def batch_of(size: int = 12, seed: int = 5, dtype: Any = jnp.float64) -> tuple[jax.Array, jax.Array]:
    return normal(seed, size, 3, dtype=dtype), integers(seed, 2, size)


@eqx.filter_jit
def objective(model_fn: Any, loss: Any, params: Any, batch: Any) -> jax.Array:
    return loss(model_fn(params, batch[0]), batch[1])


@eqx.filter_jit
def gradient(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    return jax.grad(partial(objective, model_fn, loss))(params, batch)


def assert_close(a: Any, b: Any, rtol: float = 1e-9) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=rtol * float(np.abs(y).max() + 1e-30))


def finite(tree: Any) -> bool:
    return all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(tree))


def is_zero(tree: Any) -> bool:
    return not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))
