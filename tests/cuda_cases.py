"""A model of several kinds of layers, and a step of KFAC."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ggn_jax


def problem() -> tuple[Any, Any, Any, Any]:
    """A convolution, an embedding, a scan and a head; a loss of three terms for each example. All is float32."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32)

    params = {
        "table": normal(5, 4),
        "conv": normal(3, 3, 1, 2),
        "loop": normal(2, 8, 8),
        "scale": jnp.ones(8, jnp.float32),
        "head": {"kernel": normal(8, 3), "bias": jnp.zeros(3, jnp.float32)},
    }

    def model_fn(params: Any, x: Any) -> jax.Array:
        image, words = x
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(image, params["conv"], (1, 1), "VALID", dimension_numbers=numbers)
        y = y.reshape(y.shape[0], 1, -1) + jnp.concatenate([params["table"][words]] * 2, axis=-1)
        y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y * params["scale"][None, None], params["loop"])
        return y @ params["head"]["kernel"] + params["head"]["bias"][None, None]

    inputs = normal(6, 4, 4, 1), jax.random.randint(next(keys), (6, 3), 0, 5)
    targets = jax.random.randint(next(keys), (6, 3), 0, 3)
    return model_fn, ggn_jax.CrossEntropyLoss(class_axis=-1), params, (inputs, targets)


def step_of(optimizer: Any) -> Callable[[Any, Any, Any], Any]:
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=jax.random.key(1))
        options = {"batch": batch} if optimizer.needs_batch else {}
        updates, state = optimizer.update(grads, state, params, factors=factors, **options)
        return optax.apply_updates(params, updates), state, value

    return step
