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

    def padded(x: Array) -> Array:
        return jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), [(low, high, 0) for low, high in padding])

    def marks(x: Array) -> Array:
        """Where the first largest entries are: of the windows, place by place; or of all entries, if none overlap."""
        x, y = padded(x), native(x)
        found, places = jnp.zeros(y.shape, bool), []
        for start, end in _places(window, strides, y.shape):
            places.append((jax.lax.slice(x, start, end, strides) == y) & ~found)
            found = found | places[-1]
        return jnp.stack(places) if overlap else _spread(places, window, strides, x.shape, jnp.logical_or)

    def pull_back(marks: Array, g: Array, like: Array) -> Array:
        shape = jax.eval_shape(padded, like).shape
        if overlap:
            parts = [jnp.where(mark, g, 0) for mark in marks]
            total = _spread(parts, window, strides, shape, jnp.add)
        else:
            for axis, stride in enumerate(strides):
                g = jnp.repeat(g, stride, axis)
            g = jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, n - m, 0) for n, m in zip(shape, g.shape, strict=True)])
            total = jnp.where(marks, g, 0)
        low = [start for start, _ in padding]
        return jax.lax.slice(total, low, [start + n for start, n in zip(low, like.shape, strict=True)])

    @jax.custom_vjp
    def pool(x: Array) -> Array:
        return native(x)

    def forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
        return native(x), (x, marks(x))  # made here, for any number of vectors that are pulled back

    def backward(kept: tuple[Array, Array], g: Array) -> tuple[Array]:
        x, places = kept
        return (
            jax.lax.platform_dependent(
                x,
                places,
                g,
                cpu=lambda x, places, g: pull_back(places, g, x),
                default=lambda x, places, g: jax.vjp(native, x)[1](g)[0],
            ),
        )

    pool.defvjp(forward, backward)
    return pool(x)


def _places(
    window: Sequence[int], strides: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """For each place in the window, the slice of the padded input that all windows have there."""
    for start in itertools.product(*map(range, window)):
        yield start, [a + stride * (n - 1) + 1 for a, stride, n in zip(start, strides, shape, strict=True)]


def _spread(
    parts: Sequence[Array], window: Sequence[int], strides: Sequence[int], shape: Sequence[int], add: Any
) -> Any:
    """One array per place in the window, each put where it belongs in the padded input, and added."""
    total: Any = None
    for part, (start, end) in zip(parts, _places(window, strides, parts[0].shape), strict=True):
        config = [(a, n - b, stride - 1) for a, b, stride, n in zip(start, end, strides, shape, strict=True)]
        spread = jax.lax.pad(part, jnp.zeros((), part.dtype), config)
        total = spread if total is None else add(total, spread)
    return total
