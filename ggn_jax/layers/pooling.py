"""Max pooling with a derivative that is fast on CPUs too: XLA's own takes twenty times as long there."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

MAX_POOL = frozenset({"reduce_window_max"})
MAX_WINDOW_SIZE = 32  # a window of more entries would make a large program


def is_max_pool(eqn: Any) -> bool:
    """Whether an equation is the maximum over windows that `max_pool` takes."""
    if eqn.primitive.name not in MAX_POOL or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return False
    dilations = (*eqn.params["base_dilation"], *eqn.params["window_dilation"])
    return all(d == 1 for d in dilations) and 1 < math.prod(eqn.params["window_dimensions"]) <= MAX_WINDOW_SIZE


def max_pool(eqn: Any, x: Array) -> Array:
    """The equation's result, with the same derivative: to the first largest entry of each window."""
    window, strides, padding = (eqn.params[name] for name in ("window_dimensions", "window_strides", "padding"))
    overlap = any(size > stride for size, stride in zip(window, strides, strict=True))

    def native(x: Array) -> Array:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)

    def padded(x: Array, value: float) -> Array:
        return jax.lax.pad(x, jnp.asarray(value, x.dtype), [(low, high, 0) for low, high in padding])

    def argmax_masks(x: Array) -> Array:
        """Masks of the first largest entries: of the windows, offset by offset; or of all entries, if none overlap."""
        x, y = padded(x, -jnp.inf), native(x)
        found, masks = jnp.zeros(y.shape, bool), []
        for start, end in _window_slices(window, strides, y.shape):
            masks.append((jax.lax.slice(x, start, end, strides) == y) & ~found)
            found = found | masks[-1]
        return jnp.stack(masks) if overlap else _pad_and_dilate(masks, window, strides, x.shape)

    def push_at(masks: Array, dx: Array) -> Array:
        """The tangents at the masks, window by window. What matters for speed is the transpose of this linear map."""
        dx, shape = padded(dx, 0), jax.eval_shape(native, dx).shape
        if overlap:
            slices = _window_slices(window, strides, shape)
            parts = [
                jnp.where(mask, jax.lax.slice(dx, *ends, strides), 0) for mask, ends in zip(masks, slices, strict=True)
            ]
            return sum(parts[1:], parts[0])
        blocks = [(0, n * stride - size, 0) for n, stride, size in zip(shape, strides, dx.shape, strict=True)]
        dx = jax.lax.pad(jnp.where(masks, dx, 0), jnp.zeros((), dx.dtype), blocks)
        dx = dx.reshape([size for pair in zip(shape, strides, strict=True) for size in pair])
        return dx.sum(range(1, dx.ndim, 2))

    pool = jax.custom_jvp(native)

    @pool.defjvp
    def push_forward(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        (x,), (dx,) = primals, tangents
        return pool(x), push_at(argmax_masks(x), dx)  # the masks are made once, for any number of vectors

    return pool(x)


def _window_slices(
    window: Sequence[int], strides: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """For each offset in the window, the slice of the padded input that all windows have there."""
    for start in itertools.product(*map(range, window)):
        yield start, [a + stride * (n - 1) + 1 for a, stride, n in zip(start, strides, shape, strict=True)]


def _pad_and_dilate(
    masks: Sequence[Array], window: Sequence[int], strides: Sequence[int], shape: Sequence[int]
) -> Array:
    """One mask per offset in the window, each put where it belongs in the padded input."""
    total = jnp.zeros(shape, bool)
    for mask, (start, end) in zip(masks, _window_slices(window, strides, masks[0].shape), strict=True):
        config = [(a, n - b, stride - 1) for a, b, stride, n in zip(start, end, strides, shape, strict=True)]
        total = total | jax.lax.pad(mask, jnp.zeros((), bool), config)
    return total
