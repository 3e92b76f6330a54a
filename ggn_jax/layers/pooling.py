"""Max pooling with a derivative that is fast on CPUs too: XLA's own takes twenty times as long there."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

MAX_POOL = frozenset({"reduce_window_max"})
LARGEST = 32  # windows of more entries would make large programs


def is_max_pool(eqn: Any) -> bool:
    """Whether an equation is the maximum over windows that `max_pool` takes."""
    if eqn.primitive.name not in MAX_POOL or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return False
    dilations = (*eqn.params["base_dilation"], *eqn.params["window_dilation"])
    return all(d == 1 for d in dilations) and 1 < math.prod(eqn.params["window_dimensions"]) <= LARGEST


def max_pool(eqn: Any, x: Array) -> Array:
    """The equation's result, with the same derivative: to the first largest entry of each window."""
    window, strides, padding = (eqn.params[name] for name in ("window_dimensions", "window_strides", "padding"))
    overlap = any(size > stride for size, stride in zip(window, strides, strict=True))

    def native(x: Array) -> Array:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)

    def padded(x: Array, value: float) -> Array:
        return jax.lax.pad(x, jnp.asarray(value, x.dtype), [(low, high, 0) for low, high in padding])

    def marks(x: Array) -> Array:
        """Where the first largest entries are: of the windows, place by place; or of all entries, if none overlap."""
        x, y = padded(x, -jnp.inf), native(x)
        found, places = jnp.zeros(y.shape, bool), []
        for start, end in _places(window, strides, y.shape):
            places.append((jax.lax.slice(x, start, end, strides) == y) & ~found)
            found = found | places[-1]
        return jnp.stack(places) if overlap else _spread(places, window, strides, x.shape)

    def push(marks: Array, dx: Array) -> Array:
        """The tangents at the marks, window by window. What counts for speed is this linear map's transpose."""
        dx, shape = padded(dx, 0), jax.eval_shape(native, dx).shape
        if overlap:
            places = _places(window, strides, shape)
            parts = [
                jnp.where(mark, jax.lax.slice(dx, *ends, strides), 0) for mark, ends in zip(marks, places, strict=True)
            ]
            return sum(parts[1:], parts[0])
        blocks = [(0, n * stride - size, 0) for n, stride, size in zip(shape, strides, dx.shape, strict=True)]
        dx = jax.lax.pad(jnp.where(marks, dx, 0), jnp.zeros((), dx.dtype), blocks)
        dx = dx.reshape([size for pair in zip(shape, strides, strict=True) for size in pair])
        return dx.sum(range(1, dx.ndim, 2))

    pool = jax.custom_jvp(native)

    @pool.defjvp
    def push_forward(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        (x,), (dx,) = primals, tangents
        return pool(x), push(marks(x), dx)  # the marks are made once, for any number of vectors

    return pool(x)


def _places(
    window: Sequence[int], strides: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """For each place in the window, the slice of the padded input that all windows have there."""
    for start in itertools.product(*map(range, window)):
        yield start, [a + stride * (n - 1) + 1 for a, stride, n in zip(start, strides, shape, strict=True)]


def _spread(places: Sequence[Array], window: Sequence[int], strides: Sequence[int], shape: Sequence[int]) -> Array:
    """One mask per place in the window, each put where it belongs in the padded input."""
    total = jnp.zeros(shape, bool)
    for place, (start, end) in zip(places, _places(window, strides, places[0].shape), strict=True):
        config = [(a, n - b, stride - 1) for a, b, stride, n in zip(start, end, strides, shape, strict=True)]
        total = total | jax.lax.pad(place, jnp.zeros((), bool), config)
    return total
