"""Real architectures in plain JAX, for `models.py`: nested dictionaries of parameters, and functions of them.

Each function here returns a `Problem` of the sizes that it is called with. Nothing has values until `init` is called
with a key; `jax.eval_shape` of it gives the shapes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from architecture_layers import (
    Params,
    Problem,
    attention,
    attention_init,
    conv,
    conv_init,
    dense,
    dense_init,
    fixed_norm,
    floats,
    integers,
    layer_norm,
    norm_init,
    rms_norm,
    split,
)
from architecture_unet import unet, unet_tiny
from jax import lax

import ggn_jax

# Perceptrons.


def mlp(depth: int, width: int = 32, classes: int = 10, batch: int = 32) -> Problem:
    """As many hidden layers as `depth`, of one width, tanh and ReLU in turn."""

    def init(key: jax.Array) -> Params:
        keys = split(key, depth + 1)
        layers = {f"layer{i}": dense_init(next(keys), width, width) for i in range(depth)}
        return {**layers, "head": dense_init(next(keys), width, classes)}

    def model_fn(params: Params, x: jax.Array) -> jax.Array:
        for i in range(depth):
            x = (jax.nn.relu if i % 2 else jnp.tanh)(dense(params[f"layer{i}"], x))
        return dense(params["head"], x)

    return Problem(init, model_fn, ggn_jax.CrossEntropyLoss(), floats(batch, width), integers(batch), classes)


# Residual networks (He et al. 2016), with fixed statistics in place of batch normalisation.


def unit_init(key: jax.Array, size: int, inputs: int, out: int, scale: float = 1.0) -> Params:
    return {"conv": conv_init(key, size, inputs, out, bias=False), "norm": norm_init(out, scale)}


def unit(p: Params, x: jax.Array, stride: int = 1) -> jax.Array:
    return fixed_norm(p["norm"], conv(p["conv"], x, stride))


def resnet(
    stages: tuple[int, ...],
    width: int,
    bottleneck: bool,
    size: int,
    classes: int,
    batch: int,
) -> Problem:
    """Stages of residual blocks; images of at least 64 pixels have the large stem and its pooling."""
    large, expansion = size >= 64, 4 if bottleneck else 1
    strides = [2 if stage and not block else 1 for stage, blocks in enumerate(stages) for block in range(blocks)]
    widths = [width * 2**stage for stage, blocks in enumerate(stages) for _ in range(blocks)]

    def block_init(key: jax.Array, inputs: int, width: int, stride: int) -> Params:
        keys, out, last = split(key, 4), width * expansion, 0.25  # a small last scale keeps a deep sum bounded
        if bottleneck:
            p = {"unit1": unit_init(next(keys), 1, inputs, width), "unit2": unit_init(next(keys), 3, width, width)}
            p["unit3"] = unit_init(next(keys), 1, width, out, last)
        else:
            p = {"unit1": unit_init(next(keys), 3, inputs, width), "unit2": unit_init(next(keys), 3, width, out, last)}
        if stride > 1 or inputs != out:
            p["shortcut"] = unit_init(next(keys), 1, inputs, out)
        return p

    def block(p: Params, x: jax.Array, stride: int) -> jax.Array:
        straight = unit(p["shortcut"], x, stride) if "shortcut" in p else x
        if bottleneck:
            x = unit(p["unit2"], jax.nn.relu(unit(p["unit1"], x)), stride)
            x = unit(p["unit3"], jax.nn.relu(x))
        else:
            x = unit(p["unit2"], jax.nn.relu(unit(p["unit1"], x, stride)))
        return jax.nn.relu(x + straight)

    def init(key: jax.Array) -> Params:
        keys, inputs = split(key, len(widths) + 2), width
        params = {"stem": unit_init(next(keys), 7 if large else 3, 3, width)}
        for i, (out, stride) in enumerate(zip(widths, strides, strict=True)):
            params[f"block{i}"] = block_init(next(keys), inputs, out, stride)
            inputs = out * expansion
        return {**params, "head": dense_init(next(keys), inputs, classes)}

    def model_fn(params: Params, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(unit(params["stem"], x, 2 if large else 1))
        if large:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for i, stride in enumerate(strides):
            x = block(params[f"block{i}"], x, stride)
        return dense(params["head"], jnp.mean(x, (1, 2)))

    return Problem(init, model_fn, ggn_jax.CrossEntropyLoss(), floats(batch, size, size, 3), integers(batch), classes)


# Transformers.


def block_init(key: jax.Array, width: int) -> Params:
    """A block of GPT-2 and of vision transformers, normalised first."""
    keys = split(key, 3)
    return {
        "norm1": norm_init(width),
        "attention": attention_init(next(keys), width),
        "norm2": norm_init(width),
        "up": dense_init(next(keys), width, 4 * width),
        "down": dense_init(next(keys), 4 * width, width),
    }


def block(p: Params, x: jax.Array, heads: int, causal: bool = False) -> jax.Array:
    x = x + attention(p["attention"], layer_norm(p["norm1"], x), heads, causal)
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(p["norm2"], x))))


def blocks_init(key: jax.Array, number: int, width: int) -> Params:
    keys = jax.random.split(key, number)
    return {f"block{i}": block_init(keys[i], width) for i in range(number)}


def vit(
    layers: int = 12,
    width: int = 384,
    heads: int = 6,
    patch: int = 16,
    size: int = 224,
    classes: int = 1000,
    batch: int = 32,
    token: bool = False,
) -> Problem:
    """A vision transformer (Dosovitskiy et al. 2021), which pools by the mean, or by a class token."""
    places = (size // patch) ** 2 + token

    def init(key: jax.Array) -> Params:
        keys = split(key, 5)
        params = {
            "patches": conv_init(next(keys), patch, 3, width),
            "places": jax.random.normal(next(keys), (places, width)) * 0.02,
            **blocks_init(next(keys), layers, width),
            "norm": norm_init(width),
            "head": dense_init(next(keys), width, classes),
        }
        return {**params, "token": jax.random.normal(next(keys), (width,)) * 0.02} if token else params

    def model_fn(params: Params, x: jax.Array) -> jax.Array:
        x = conv(params["patches"], x, patch)
        x = x.reshape(x.shape[0], -1, width)
        if token:
            x = jnp.concatenate([jnp.broadcast_to(params["token"], (x.shape[0], 1, width)), x], axis=1)
        x = x + params["places"]
        for i in range(layers):
            x = block(params[f"block{i}"], x, heads)
        x = layer_norm(params["norm"], x)
        return dense(params["head"], x[:, 0] if token else jnp.mean(x, 1))

    return Problem(init, model_fn, ggn_jax.CrossEntropyLoss(), floats(batch, size, size, 3), integers(batch), classes)


def gpt2(
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 50_257,
    length: int = 1024,
    batch: int = 2,
    scan: bool = False,
) -> Problem:
    """GPT-2 (Radford et al. 2019), whose head is the token embedding; `scan` stacks the layers and recomputes them."""

    def init(key: jax.Array) -> Params:
        keys = split(key, 3)
        stack = jax.vmap(lambda key: block_init(key, width))
        return {
            "tokens": jax.random.normal(next(keys), (vocabulary, width)) * 0.02,
            "places": jax.random.normal(next(keys), (length, width)) * 0.02,
            "blocks": stack(jax.random.split(next(keys), layers)) if scan else blocks_init(next(keys), layers, width),
            "norm": norm_init(width),
        }

    def body(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        return block(p, x, heads, causal=True), None

    def model_fn(params: Params, tokens: jax.Array) -> jax.Array:
        x = params["tokens"][tokens] + params["places"]
        if scan:
            x, _ = lax.scan(jax.checkpoint(body), x, params["blocks"])
        else:
            for i in range(layers):
                x, _ = body(x, params["blocks"][f"block{i}"])
        return layer_norm(params["norm"], x) @ params["tokens"].T

    tokens = integers(batch, length)
    return Problem(init, model_fn, ggn_jax.CrossEntropyLoss(class_axis=-1), tokens, tokens, vocabulary)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embeddings (Su et al. 2021) of `x [N, T, heads, size]`, by halves."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = jnp.arange(x.shape[1], dtype=x.dtype)[:, None, None] * frequencies
    cos, sin, a, b = jnp.cos(angles), jnp.sin(angles), x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def llama(
    layers: int = 24,
    width: int = 1024,
    heads: int = 16,
    groups: int = 4,
    hidden: int = 2816,
    vocabulary: int = 32_000,
    length: int = 1024,
    batch: int = 2,
) -> Problem:
    """A decoder like Llama's (Touvron et al. 2023): scanned and recomputed; `groups` of heads share keys and values."""
    size, linear = width // heads, partial(dense_init, bias=False)

    def layer_init(key: jax.Array) -> Params:
        keys = split(key, 7)
        return {
            "norm1": {"scale": jnp.ones(width)},
            "q": linear(next(keys), width, width),
            "k": linear(next(keys), width, groups * size),
            "v": linear(next(keys), width, groups * size),
            "out": linear(next(keys), width, width),
            "norm2": {"scale": jnp.ones(width)},
            "gate": linear(next(keys), width, hidden),
            "up": linear(next(keys), width, hidden),
            "down": linear(next(keys), hidden, width),
        }

    def init(key: jax.Array) -> Params:
        keys = split(key, 3)
        return {
            "tokens": jax.random.normal(next(keys), (vocabulary, width)),
            "layers": jax.vmap(layer_init)(jax.random.split(next(keys), layers)),
            "norm": {"scale": jnp.ones(width)},
            "head": linear(next(keys), width, vocabulary),
        }

    def body(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        n, t, _ = x.shape
        normed = rms_norm(p["norm1"], x)
        q, k, v = (dense(p[name], normed).reshape(n, t, -1, size) for name in ("q", "k", "v"))
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + dense(p["out"], mixed.reshape(n, t, width))
        normed = rms_norm(p["norm2"], x)
        return x + dense(p["down"], jax.nn.silu(dense(p["gate"], normed)) * dense(p["up"], normed)), None

    def model_fn(params: Params, tokens: jax.Array) -> jax.Array:
        x, _ = lax.scan(jax.checkpoint(body), params["tokens"][tokens], params["layers"])
        return dense(params["head"], rms_norm(params["norm"], x))

    tokens = integers(batch, length)
    return Problem(init, model_fn, ggn_jax.CrossEntropyLoss(class_axis=-1), tokens, tokens, vocabulary)


MODELS: dict[str, Callable[..., Problem]] = {
    **{f"mlp-{depth}": partial(mlp, depth) for depth in (10, 20, 40)},
    "mlp-100": partial(mlp, 100, 256),
    "resnet18": partial(resnet, (2, 2, 2, 2), 64, False, 32, 10, batch=64),
    "resnet50": partial(resnet, (3, 4, 6, 3), 64, True, 224, 1000, batch=32),
    "vit-s16": vit,
    "vit-s16-token": partial(vit, token=True),
    "vit-b16": partial(vit, width=768, heads=12),
    "gpt2-small": gpt2,
    "gpt2-scan": partial(gpt2, scan=True),
    "llama": llama,
    "unet": unet,
}
"""All take the number of examples as `batch`."""

_GPT: dict[str, int] = {"layers": 2, "width": 16, "heads": 2, "vocabulary": 50, "length": 8}
_VIT: dict[str, int] = {"layers": 2, "width": 16, "heads": 2, "patch": 4, "size": 8, "classes": 5}
TINY: dict[str, Callable[..., Problem]] = {
    **{f"mlp-{depth}": partial(mlp, 2, width, 3) for depth, width in ((10, 4), (20, 5), (40, 6), (100, 7))},
    "resnet18": partial(resnet, (1, 1), 4, False, 8, 5),
    "resnet50": partial(resnet, (1, 1), 4, True, 64, 5),
    "vit-s16": partial(vit, **_VIT),
    "vit-s16-token": partial(vit, **_VIT, token=True),
    "vit-b16": partial(vit, **_VIT),
    "gpt2-small": partial(gpt2, **_GPT),
    "gpt2-scan": partial(gpt2, **_GPT, scan=True),
    "llama": partial(llama, **_GPT, groups=1, hidden=24),
    "unet": unet_tiny,
}
"""The same architectures in sizes to check them with."""
