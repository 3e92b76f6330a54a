"""The denoising network of diffusion models (Ho et al. 2020), by time and with attention."""

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
    floats,
    group_norm,
    norm_init,
    split,
)

import ggn_jax


def sinusoids(times: jax.Array, width: int) -> jax.Array:
    angles = times[:, None] * 10_000.0 ** (-jnp.arange(width // 2, dtype=times.dtype) / (width // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def residual_init(key: jax.Array, inputs: int, out: int, embedding: int) -> Params:
    keys = split(key, 4)
    p = {
        "norm1": norm_init(inputs),
        "conv1": conv_init(next(keys), 3, inputs, out),
        "time": dense_init(next(keys), embedding, out),
        "norm2": norm_init(out),
        "conv2": conv_init(next(keys), 3, out, out),
    }
    return {**p, "shortcut": conv_init(next(keys), 1, inputs, out)} if inputs != out else p


def residual(p: Params, x: jax.Array, time: jax.Array, groups: int) -> jax.Array:
    straight = conv(p["shortcut"], x) if "shortcut" in p else x
    x = conv(p["conv1"], jax.nn.silu(group_norm(p["norm1"], x, groups)))
    x = x + dense(p["time"], jax.nn.silu(time))[:, None, None]
    return straight + conv(p["conv2"], jax.nn.silu(group_norm(p["norm2"], x, groups)))


def look_around(p: Params, x: jax.Array, groups: int) -> jax.Array:
    """Attention, with one head, over all pixels."""
    n, h, w, c = x.shape
    mixed = attention(p["attention"], group_norm(p["norm"], x, groups).reshape(n, h * w, c), 1)
    return x + mixed.reshape(x.shape)


def unet(
    size: int = 32,
    width: int = 128,
    multiples: tuple[int, ...] = (1, 2, 2, 2),
    depth: int = 2,
    attended: int = 16,
    groups: int = 32,
    batch: int = 32,
) -> Problem:
    """Predicts the noise in images from them and their times; attention where images have `attended` pixels a side."""
    embedding, levels = 4 * width, len(multiples)
    outs, sides = [width * m for m in multiples], [size // 2**level for level in range(levels)]
    downs = [(level, i) for level in range(levels) for i in range(depth)]
    ups = [(level, i) for level in reversed(range(levels)) for i in range(depth + 1)]

    def unit_init(key: jax.Array, inputs: int, level: int, attend: bool) -> Params:
        keys = split(key, 2)
        p = {"residual": residual_init(next(keys), inputs, outs[level], embedding)}
        if attend:
            p |= {"norm": norm_init(outs[level]), "attention": attention_init(next(keys), outs[level])}
        return p

    def unit(p: Params, x: jax.Array, time: jax.Array) -> jax.Array:
        x = residual(p["residual"], x, time, groups)
        return look_around(p, x, groups) if "attention" in p else x

    def init(key: jax.Array) -> Params:
        keys = split(key, 2 * len(ups) + 2 * levels + 8)
        p: Params = {"time1": dense_init(next(keys), width, embedding), "stem": conv_init(next(keys), 3, 3, width)}
        p["time2"] = dense_init(next(keys), embedding, embedding)
        inputs, skips = width, [width]
        for level, i in downs:
            p[f"down{level}-{i}"] = unit_init(next(keys), inputs, level, sides[level] == attended)
            inputs = outs[level]
            skips.append(inputs)
            if i == depth - 1 and level < levels - 1:
                p[f"shrink{level}"] = conv_init(next(keys), 3, inputs, inputs)
                skips.append(inputs)
        for i in range(2):
            p[f"middle{i}"] = unit_init(next(keys), inputs, levels - 1, i == 0)
        for level, i in ups:
            p[f"up{level}-{i}"] = unit_init(next(keys), inputs + skips.pop(), level, sides[level] == attended)
            inputs = outs[level]
            if i == depth and level:
                p[f"grow{level}"] = conv_init(next(keys), 3, inputs, inputs)
        return {**p, "norm": norm_init(inputs), "last": conv_init(next(keys), 3, inputs, 3)}

    def model_fn(params: Params, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, times = inputs
        time = dense(params["time2"], jax.nn.silu(dense(params["time1"], sinusoids(times, width))))
        x = conv(params["stem"], images)
        skips = [x]
        for level, i in downs:
            x = unit(params[f"down{level}-{i}"], x, time)
            skips.append(x)
            if f"shrink{level}" in params and i == depth - 1:
                x = conv(params[f"shrink{level}"], x, 2)
                skips.append(x)
        for i in range(2):
            x = unit(params[f"middle{i}"], x, time)
        for level, i in ups:
            x = unit(params[f"up{level}-{i}"], jnp.concatenate([x, skips.pop()], axis=-1), time)
            if i == depth and level:
                x = conv(params[f"grow{level}"], jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return conv(params["last"], jax.nn.silu(group_norm(params["norm"], x, groups)))

    images = floats(batch, size, size, 3)
    return Problem(init, model_fn, ggn_jax.MSELoss(), (images, floats(batch)), images)


def unet_tiny(batch: int) -> Problem:
    return unet(8, 8, (1, 2), 1, 4, 4, batch)
