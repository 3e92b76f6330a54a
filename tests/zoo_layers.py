"""What small models are made of: layers, shapes of parameters, and inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Fn = Callable[[Any, Any], jax.Array]


class Model(NamedTuple):
    """`fn(params, inputs [N, ...]) -> [N, out]`, with a batch of inputs."""

    fn: Fn
    params: Any
    inputs: Any


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def params(**shapes: Any) -> Any:
    """Numbers for shapes, which may be nested."""
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(structure, [normal(*shape, seed=i) for i, shape in enumerate(leaves)])


def tokens(*shape: int, high: int = 5) -> jax.Array:
    return jax.device_put(np.random.default_rng(0).integers(high, size=shape))


def dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def layer(inputs: int, out: int) -> Any:
    return {"w": (inputs, out), "b": (out,)}


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return dense(p["last"], jnp.tanh(dense(p["first"], x)))


def mlp_shapes(inputs: int, hidden: int, out: int) -> Any:
    return {"first": layer(inputs, hidden), "last": layer(hidden, out)}


def norm(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2), axis=-1) @ v


def conv(x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    how = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    return lax.conv_general_dilated(x, w, **how)


IMAGES, SEQUENCES, X = normal(3, 4, 4, 2), normal(3, 4, 4), normal(3, 3)
TASK = {"task": X, "x": normal(3, 3, seed=1)}
F = {"first": layer(3, 4), "out": (4, 2)}
Models = dict[str, Callable[[], Model]]


def of(fn: Fn, inputs: Any, **shapes: Any) -> Callable[[], Model]:
    """A model with parameters of these shapes."""
    return lambda: Model(fn, params(**shapes), inputs)
