"""Layers in every way of writing them: by hand, in Flax and in Equinox."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import ggn_jax

Model = tuple[Callable[[Any, Any], jax.Array], Any, Any]
wide = partial(dict, param_dtype=jnp.float64, dtype=jnp.float64)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def linen(module: nn.Module, inputs: Any, **kwargs: Any) -> Model:
    shapes = jax.eval_shape(partial(module.init, **kwargs), jax.random.key(0), inputs)
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> jax.Array:
        """Flax's own biases start at 0 and scales at 1, where mistakes do not show."""
        centre = 1 if path[-1].key in ("scale", "var") else 0
        return jnp.asarray((centre + rng.normal(size=x.shape) / 6).astype(x.dtype))

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return (*ggn_jax.from_linen(module, variables, **kwargs), inputs)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Conv(4, (3, 3), **wide())(x))
        x = nn.LayerNorm(**wide())(x)
        x = nn.Conv(
            6, (3, 2), strides=(2, 1), feature_group_count=2, padding="VALID", kernel_dilation=(1, 2), **wide()
        )(x)
        x = nn.Conv(6, (2, 2), feature_group_count=6, padding="CIRCULAR", **wide())(x)
        x = nn.ConvTranspose(3, (2, 2), strides=(2, 2), **wide())(x)
        x = nn.BatchNorm(use_running_average=True, **wide())(x)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3, **wide())(x.reshape(x.shape[0], -1))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(7, 8, **wide())
        x = embed(tokens) + nn.Embed(5, 8, name="position", **wide())(jnp.arange(5))[None]
        y = nn.LayerNorm(**wide())(x)
        x = x + nn.MultiHeadDotProductAttention(2, **wide())(y, y, y, mask=nn.make_causal_mask(tokens))
        x = x + nn.Dense(8, **wide())(nn.gelu(nn.Dense(12, **wide())(nn.RMSNorm(**wide())(x))))
        return embed.attend(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.RNN(nn.GRUCell(5, **wide()))(x)
        return nn.Dense(2, **wide())(nn.remat(nn.Dense)(4, **wide())(x[:, -1]))


def nnx_model() -> Model:
    layers = [nnx.Linear(3, 4, rngs=nnx.Rngs(0), **wide()), nnx.LayerNorm(4, rngs=nnx.Rngs(1), **wide()), nnx.relu]
    model = nnx.Sequential(*layers, nnx.LinearGeneral((4,), (2, 3), rngs=nnx.Rngs(2), **wide()))
    return (*ggn_jax.from_nnx(model), normal(6, 3))


def equinox_model() -> Model:
    keys = jax.random.split(jax.random.key(0), 2)
    module = eqx.nn.Sequential(
        [
            eqx.nn.Conv1d(2, 4, 3, key=keys[0], dtype=jnp.float64),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(16, 3, 5, 2, key=keys[1], dtype=jnp.float64),
        ]
    )
    return (*ggn_jax.from_equinox(module), normal(4, 2, 6))


def scanned(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ w["w"] + w["b"][None]), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["stack"], reverse=True)
    x = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["again"] + params["shift"][None]), x)
    return x @ params["head"]


def moved(params: Any, x: jax.Array) -> jax.Array:
    """A fused kernel split after, one split before, one stacked, one reshaped, one from two."""
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
    first, second = params["halves"][:, :3], params["halves"][:, 3:]
    x = jnp.concatenate([jnp.tanh(q * k) @ first, v @ second], -1)
    x = jnp.einsum("nj,gjk->ngk", x, jnp.stack([params["a"], params["b"]])).reshape(x.shape[0], -1)
    x = x @ params["flat"].reshape(4, 6)[::-1].T
    return x @ jnp.concatenate([params["left"], params["right"]], 1) + jnp.reshape(params["bias"], (1, -1))


def experts(params: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.softmax(x @ params["gate"])
    hidden = jnp.tanh(jnp.einsum("ni,eio->neo", x, params["in"]) + params["bias"][None])
    return jnp.sum(gates[..., None] * jnp.einsum("neo,eoj->nej", hidden, params["out"]), 1)


PERMUTATION = np.array([2, 0, 3, 1])


def gathered(params: Any, x: jax.Array) -> jax.Array:
    """Weights read at known places, and rows of tables at all positions, also in a loop."""
    x = x @ params["in"][:, PERMUTATION] + params["bias"][PERMUTATION][None, None]  # [n, t, 4]
    x = x + params["positions"][jnp.arange(x.shape[1])][None]

    def layer(h: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        offset = jnp.take(params["offsets"], number, axis=0)
        return jnp.tanh(h @ params["again"][::-1][PERMUTATION] + offset[None, None]), None

    x, _ = jax.lax.scan(layer, x, jnp.arange(3))
    return x @ jnp.concatenate([params["left"], params["right"]])[jnp.argsort(jnp.asarray(PERMUTATION)) + 1]


@jax.jit
def twice(w: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w + b[None])


FUNCTIONS: dict[str, Callable[[], Model]] = {
    "scan": lambda: (
        scanned,
        {
            "stack": {"w": normal(4, 3, 3), "b": normal(4, 3)},
            "again": normal(3, 3, seed=2),
            "shift": normal(3),
            "head": normal(3, 2),
        },
        normal(5, 3),
    ),
    "moved": lambda: (
        moved,
        {
            "qkv": normal(3, 12),
            "halves": normal(4, 6),
            "a": normal(6, 3),
            "b": normal(6, 3, seed=3),
            "flat": normal(24),
            "left": normal(4, 2),
            "right": normal(4, 1),
            "bias": normal(3, 1),
        },
        normal(5, 3),
    ),
    "gathered": lambda: (
        gathered,
        {
            "in": normal(3, 4),
            "bias": normal(4),
            "positions": normal(2, 4),
            "offsets": normal(3, 4),
            "again": normal(4, 4, seed=2),
            "left": normal(2, 2),
            "right": normal(3, 2),
        },
        normal(5, 2, 3),
    ),
    "experts": lambda: (
        experts,
        {"gate": normal(3, 2), "in": normal(2, 3, 4), "bias": normal(2, 4), "out": normal(2, 4, 3)},
        normal(5, 3),
    ),
    "twice": lambda: (
        lambda p, x: twice(p["w"], p["b"], twice(p["w"], p["b"], x)) @ p["v"],
        {"w": normal(3, 3), "b": normal(3), "v": normal(3, 2)},
        normal(5, 3),
    ),
    "merged axes": lambda: (
        lambda p, x: (x.reshape(-1, 3) @ p).reshape(x.shape[0], -1),
        normal(3, 2),
        normal(5, 4, 3),
    ),
    "batch last": lambda: (lambda p, x: (p @ jnp.moveaxis(x, 0, -1)).T, normal(2, 3), normal(5, 3)),
    "pytree inputs": lambda: (
        lambda p, x: x["a"] @ p["a"] + x["b"] @ p["b"] - p["c"][None],
        {"a": normal(3, 2), "b": normal(4, 2), "c": normal(2)},
        {"a": normal(5, 3), "b": normal(5, 4)},
    ),
}
MODELS: dict[str, Callable[[], Model]] = FUNCTIONS | {
    "convolutions": lambda: linen(Convolutions(), normal(3, 6, 6, 2)),
    "transformer": lambda: linen(Transformer(), jnp.arange(15).reshape(3, 5) % 7),
    "recurrent": lambda: linen(Recurrent(), normal(3, 4, 3)),
    "nnx": nnx_model,
    "equinox": equinox_model,
}


@cache
def model_of(name: str) -> Model:
    return MODELS[name]()


@cache
def report_of(name: str) -> ggn_jax.Report:
    return ggn_jax.report(*model_of(name))
