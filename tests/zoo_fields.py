"""Perceptrons, fields and networks for images, each in a few lines."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from zoo_layers import (
    IMAGES,
    SEQUENCES,
    TASK,
    F,
    Models,
    X,
    attend,
    conv,
    dense,
    layer,
    mlp,
    mlp_shapes,
    norm,
    normal,
    of,
)

# Perceptrons and fields. ----------------------------------------------------------------------------------------------


def mup(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) @ (p["readout"] / 4)


def siren(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sin(3.0 * dense(p["second"], jnp.sin(3.0 * dense(p["first"], x)))) @ p["out"]


def fourier_features(p: Any, x: jax.Array) -> jax.Array:
    angles = x @ normal(3, 4, seed=9)
    return mlp(p, jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))


def learned_frequencies(p: Any, x: jax.Array) -> jax.Array:
    angles = x @ p["frequencies"]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1) @ p["out"]


def kan(p: Any, x: jax.Array) -> jax.Array:
    basis = jnp.exp(-((x[..., None] - jnp.linspace(-1, 1, 4)) ** 2))
    return jnp.einsum("nik,iko->no", basis, p["spline"]) + jax.nn.silu(x) @ p["base"]


def masked(p: Any, x: jax.Array) -> jax.Array:
    order = jnp.arange(4)
    hidden = jnp.tanh(x @ (p["w"] * (order[:, None] <= order)) + p["b"])
    return hidden @ (p["out"] * (order[:, None] < order))


def low_rank_adapter(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["w"] + 0.5 * p["a"] @ p["b"])) @ p["out"]


def weight_norm(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))) @ p["out"]


def spectral_norm(p: Any, x: jax.Array) -> jax.Array:
    u = normal(4, seed=7)
    v = lax.stop_gradient(p["w"] @ u / jnp.linalg.norm(p["w"] @ u))
    return jnp.tanh(x @ (p["w"] / (v @ p["w"] @ u))) @ p["out"]


def quantised(p: Any, x: jax.Array) -> jax.Array:
    rounded = p["w"] + lax.stop_gradient(jnp.round(p["w"] * 8) / 8 - p["w"])
    return jnp.tanh(x @ rounded) @ p["out"]


def variational(p: Any, x: jax.Array) -> jax.Array:
    noise = normal(3, 4, seed=8)
    return jnp.tanh(x @ (p["mean"] + jax.nn.softplus(p["rho"]) * noise)) @ p["out"]


def ensemble(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(mlp, in_axes=(0, None), out_axes=1)(p, x).reshape(len(x), -1)


def hypernetwork(p: Any, inputs: Any) -> jax.Array:
    weights = mlp(p, inputs["task"]).reshape(-1, 3, 2)
    return jnp.einsum("ni,nio->no", inputs["x"], weights)


def film(p: Any, inputs: Any) -> jax.Array:
    scale, shift = jnp.split(dense(p["condition"], inputs["task"]), 2, -1)
    return jnp.tanh(dense(p["first"], inputs["x"]) * scale + shift) @ p["out"]


def deep_operator(p: Any, inputs: Any) -> jax.Array:
    return jnp.einsum("nk,nqk->nq", mlp(p["branch"], inputs["u"]), mlp(p["trunk"], inputs["y"])) + p["bias"]


PERCEPTRONS: Models = {
    "multilayer perceptron": of(mlp, X, **mlp_shapes(3, 4, 2)),
    "muP multipliers": of(mup, X, w=(3, 4), readout=(4, 2)),
    "SIREN": of(siren, X, first=layer(3, 4), second=layer(4, 4), out=(4, 2)),
    "random Fourier features": of(fourier_features, X, **mlp_shapes(8, 4, 2)),
    "learned frequencies": of(learned_frequencies, X, frequencies=(3, 4), out=(8, 2)),
    "Kolmogorov-Arnold network": of(kan, X, spline=(3, 4, 2), base=(3, 2)),
    "masked weights (MADE)": of(masked, normal(3, 4), w=(4, 4), b=(4,), out=(4, 4)),
    "low-rank adapter (LoRA), merged": of(low_rank_adapter, X, w=(3, 4), a=(3, 1), b=(1, 4), out=(4, 2)),
    "weight normalisation": of(weight_norm, X, w=(3, 4), g=(4,), out=(4, 2)),
    "spectral normalisation": of(spectral_norm, X, w=(3, 4), out=(4, 2)),
    "straight-through quantisation": of(quantised, X, w=(3, 4), out=(4, 2)),
    "variational weights": of(variational, X, mean=(3, 4), rho=(3, 4), out=(4, 2)),
    "ensemble by vmap": of(ensemble, X, first={"w": (2, 3, 4), "b": (2, 4)}, last={"w": (2, 4, 2), "b": (2, 2)}),
    "hypernetwork": of(hypernetwork, TASK, **mlp_shapes(3, 4, 6)),
    "FiLM conditioning": of(film, TASK, condition=layer(3, 8), **F),
    "deep operator network": of(
        deep_operator,
        {"u": normal(3, 5), "y": normal(3, 2, 2)},
        branch=mlp_shapes(5, 4, 3),
        trunk=mlp_shapes(2, 4, 3),
        bias=(),
    ),
}


# Images. --------------------------------------------------------------------------------------------------------------


def cnn(p: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(x, p["w1"]) + p["b1"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return dense(p["head"], jnp.tanh(conv(x, p["w2"], rhs_dilation=(2, 2))).reshape(len(x), -1))


def separable(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(conv(x, p["depthwise"], feature_group_count=2) @ p["pointwise"] + p["b"])
    return conv(x, p["grouped"], feature_group_count=2).mean((1, 2))


def upsampling(p: Any, x: jax.Array) -> jax.Array:
    return lax.conv_transpose(jnp.tanh(conv(x, p["down"])), p["up"], (2, 2), "SAME").mean((1, 2))


def residual(p: Any, x: jax.Array) -> jax.Array:
    x = conv(x, p["stem"])
    y = jax.nn.relu(norm(x) * p["scale"] + p["shift"])
    return (x + conv(y, p["w"])).mean((1, 2)) @ p["head"]


def standardised(p: Any, x: jax.Array) -> jax.Array:
    w = p["w"] - p["w"].mean((0, 1, 2))
    return jax.nn.relu(conv(x, w * lax.rsqrt(w.var((0, 1, 2)) + 1e-3))).mean((1, 2)) @ p["head"]


def squeeze_excite(p: Any, x: jax.Array) -> jax.Array:
    x = conv(x, p["w"])
    return (x * jax.nn.sigmoid(mlp(p["gate"], x.mean((1, 2))))[:, None, None]).mean((1, 2))


def vit(p: Any, x: jax.Array) -> jax.Array:
    patches = x.reshape(len(x), 2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 4, 8) @ p["patch"]
    token = jnp.broadcast_to(p["class"], (len(x), 1, 4))
    x = jnp.concatenate([token, patches], 1) + p["position"]
    q, k, v = jnp.split(norm(x) @ p["qkv"], 3, -1)
    return (x + attend(q, k, v) @ p["out"])[:, 0] @ p["head"]


def mae(p: Any, x: jax.Array) -> jax.Array:
    seen = jnp.arange(4)[:, None] % 2 == 0
    hidden = jnp.where(seen, jnp.tanh(dense(p["encoder"], x)), p["mask token"])
    return dense(p["decoder"], attend(hidden, hidden, hidden)).mean(1)


IMAGE_MODELS: Models = {
    "convolutional network": of(cnn, IMAGES, w1=(3, 3, 2, 3), b1=(3,), w2=(3, 3, 3, 2), head=layer(8, 2)),
    "depthwise and grouped convolutions": of(
        separable, IMAGES, depthwise=(3, 3, 1, 2), pointwise=(2, 4), b=(4,), grouped=(1, 1, 2, 4)
    ),
    "transposed convolution": of(upsampling, IMAGES, down=(3, 3, 2, 3), up=(2, 2, 3, 2)),
    "residual block with normalisation": of(
        residual, IMAGES, stem=(1, 1, 2, 3), scale=(3,), shift=(3,), w=(3, 3, 3, 3), head=(3, 2)
    ),
    "weight standardisation": of(standardised, IMAGES, w=(3, 3, 2, 3), head=(3, 2)),
    "squeeze and excitation": of(squeeze_excite, IMAGES, w=(3, 3, 2, 3), gate=mlp_shapes(3, 2, 3)),
    "vision transformer, class token": of(
        vit, IMAGES, patch=(8, 4), position=(5, 4), qkv=(4, 12), out=(4, 4), head=(4, 2), **{"class": (4,)}
    ),
    "masked autoencoder": of(mae, SEQUENCES, encoder=layer(4, 3), decoder=layer(3, 2), **{"mask token": (3,)}),
}
