"""Modules of Flax, Equinox and Haiku as model functions, with what the modules themselves return."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from ggn_jax import from_equinox, from_haiku, from_linen, from_nnx

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
N = 6
X = jax.device_put(np.random.default_rng(0).normal(size=(N, 3)))
TARGETS = np.arange(N) % 2
VALUES = jax.device_put(np.random.default_rng(1).normal(size=(4, 6)))


class NNXNet(nnx.Module):
    """Batch statistics and a random stream besides the parameters."""

    def __init__(self, seed: int, **dtypes: Any):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(3, 4, rngs=rngs, **dtypes)
        self.norm = nnx.BatchNorm(4, rngs=rngs, **dtypes)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs, **dtypes)

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.norm(self.first(x)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(self.encode(x)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = linen.Dense(4, **F64)(x)
        x = linen.BatchNorm(use_running_average=not train, **F64)(x)
        x = linen.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return linen.Dense(2, **F64)(x)


class LinenDropout(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(4, **F64)(x))


class EquinoxNet(eqx.Module):
    """Takes one example; an integer array and a function besides the parameters."""

    layer: eqx.nn.Linear
    order: jax.Array
    activation: Any = jnp.tanh

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(self.layer(x[self.order]))


class EquinoxBatched(eqx.Module):
    net: EquinoxNet

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.net)(x)


def nnx_net(**dtypes: Any) -> NNXNet:
    """With batch statistics that are not the initial ones."""
    net = NNXNet(0, **(dtypes or F64))
    net.norm.mean[...] = jnp.linspace(-1, 1, 4, dtype=jnp.float32)
    net.norm.var[...] = jnp.linspace(0.5, 2, 4, dtype=jnp.float32)
    net.eval()
    return net


def linen_net() -> tuple[LinenNet, Any]:
    net = LinenNet()
    variables = net.init(jax.random.key(0), X, train=False)
    _, changed = net.apply(variables, 5 + 3 * X, train=True, rngs={"dropout": jax.random.key(1)}, mutable="batch_stats")
    return net, {**variables, **changed}


def equinox_net() -> EquinoxNet:
    return EquinoxNet(eqx.nn.Linear(3, 2, key=jax.random.key(0), dtype=jnp.float64), jnp.array([2, 0, 1]))


def made_nnx_linear() -> tuple[Any, Any]:
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0), **F64)
    return from_nnx(module), module(X)


def made_nnx_net() -> tuple[Any, Any]:
    module = nnx_net()
    return from_nnx(module), module(X)


def made_nnx_method() -> tuple[Any, Any]:
    module = nnx_net()
    return from_nnx(module, method="encode"), module.encode(X)


def made_linen_dense() -> tuple[Any, Any]:
    module = linen.Dense(2, **F64)
    variables = module.init(jax.random.key(0), X)
    return from_linen(module, variables), module.apply(variables, X)


def made_linen_net() -> tuple[Any, Any]:
    module, variables = linen_net()
    return from_linen(module, variables, train=False), module.apply(variables, X, train=False)


def made_linen_dropout() -> tuple[Any, Any]:
    module = LinenDropout()
    variables = module.init(jax.random.key(0), X, False)
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
    return from_linen(module, variables, **kwargs), module.apply(variables, X, **kwargs)


def made_equinox_mlp() -> tuple[Any, Any]:
    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0), dtype=jnp.float64)
    return from_equinox(module), jax.vmap(module)(X)


def made_equinox_net() -> tuple[Any, Any]:
    module = equinox_net()
    return from_equinox(module), jax.vmap(module)(X)


def made_equinox_batched() -> tuple[Any, Any]:
    module = EquinoxBatched(equinox_net())
    return from_equinox(module, batched=True), module(X)


class TransformedWithState(NamedTuple):
    """As Haiku's: it is known by its name and its `apply`, and need not be installed."""

    init: Any
    apply: Any


class Transformed(NamedTuple):
    init: Any
    apply: Any


def haiku_net(params: Any, state: Any, rng: Any, x: jax.Array, training: bool) -> tuple[jax.Array, Any]:
    mean = jnp.where(training, jnp.mean(x, 0), state["norm"]["mean"])
    hidden = jnp.tanh((x - mean[None]) @ params["linear"]["w"])
    return hidden @ params["head"]["w"] + jax.random.normal(rng, (2,))[None], {"norm": {"mean": mean}}


def made_haiku_net() -> tuple[Any, Any]:
    params = {"linear": {"w": VALUES[:3, :4]}, "head": {"w": VALUES[:, 4:]}}
    state, key = {"norm": {"mean": jnp.arange(3) / 4}}, jax.random.key(0)
    made = from_haiku(TransformedWithState(None, haiku_net), params, state, rng=key, training=False)
    return made, haiku_net(params, state, key, X, False)[0]


MAKERS = [
    made_haiku_net,
    made_nnx_linear,
    made_nnx_net,
    made_nnx_method,
    made_linen_dense,
    made_linen_net,
    made_linen_dropout,
    made_equinox_mlp,
    made_equinox_net,
    made_equinox_batched,
]
every_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("made_"))
