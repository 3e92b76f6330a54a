"""Checks of the optimizer's settings, and arithmetic on pytrees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._checks import as_array, check_real, compute_dtype, is_concrete

Number = float | Array
Schedule = Callable[[Any], Any]


def check_number(name: str, value: Any, least: float, most: float = float("inf")) -> Any:
    """A real number in `[least, most]`, perhaps traced, as `optax.inject_hyperparams` makes them."""
    array = as_array(name, value)
    check_real(name, array)
    if array.ndim:
        raise ValueError(f"{name} must be a number; got an array of shape {array.shape}.")
    if is_concrete(array) and not least <= np.asarray(array).astype(float) <= most:
        limits = f"of at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be a number {limits}; got {value}.")
    return value


def check_schedule(name: str, value: Any, least: float = 0.0) -> Any:
    """A number of at least `least`, or a function of the number of steps."""
    return value if callable(value) else check_number(name, value, least)


def value_at(value: Any, count: Int[Array, ""]) -> Float[Array, ""]:
    """A number or schedule after `count` steps, in at least float32."""
    array = jnp.asarray(value(count) if callable(value) else value)
    return array.astype(compute_dtype(array.dtype))


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether there is no NaN and no infinity."""
    parts = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(parts)) if parts else jnp.asarray(True)


def inner(a: PyTree[Array], b: PyTree[Array]) -> Float[Array, ""]:
    """The sum of all entries' products, in at least float32."""
    wide = wide_dtype(a)
    products = [
        jnp.sum(x.astype(wide) * y.astype(wide)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return jnp.sum(jnp.stack(products))


def wide_dtype(tree: PyTree[Array]) -> Any:
    """The widest compute dtype of the leaves."""
    dtypes = [compute_dtype(leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return jnp.dtype(jnp.float64) if jnp.dtype(jnp.float64) in dtypes else jnp.dtype(jnp.float32)


def combine(*terms: tuple[Array, PyTree[Array]], like: PyTree[Array]) -> PyTree[Array]:
    """`sum_i c_i x_i` with numbers `c_i`, computed in at least float32, in the dtypes of `like`."""

    def one(like: Array, *leaves: Array) -> Array:
        wide = compute_dtype(like.dtype)
        parts = [c.astype(wide) * x.astype(wide) for (c, _), x in zip(terms, leaves, strict=True)]
        return sum(parts[1:], start=parts[0]).astype(like.dtype)

    return jax.tree.map(one, like, *(tree for _, tree in terms))


def choose(which: Bool[Array, ""], yes: PyTree[Array], no: PyTree[Array]) -> PyTree[Array]:
    """`yes` or `no`, for all leaves."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), yes, no)
