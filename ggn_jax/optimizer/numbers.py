"""Arithmetic on pytrees, in at least float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._checks import check_real, compute_dtype, wide_dtype
from ggn_jax._fusion import max_abs, stack_scalars

Number = float | Array
Schedule = Callable[[Any], Any]


def value_at(name: str, value: Any, count: Int[Array, ""]) -> Float[Array, ""]:
    """A number or schedule after `count` steps, in at least float32; a new array, since states may be donated."""
    found = value(count) if callable(value) else value
    if not isinstance(found, jax.Array | np.ndarray | np.generic | int | float) or np.ndim(found):
        got = f"shape {np.shape(found)}" if hasattr(found, "shape") else repr(found)
        raise ValueError(f"{name} must return one number for a number of steps; got {got}.")
    array = jnp.array(found)
    check_real(name, array)
    return array.astype(compute_dtype(array.dtype))


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether no entry is NaN or infinite."""
    parts = [jnp.isfinite(max_abs(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(stack_scalars(parts)) if parts else jnp.asarray(True)


def inner(a: PyTree[Array], b: PyTree[Array]) -> Float[Array, ""]:
    """The inner product of two pytrees, in at least float32."""
    wide = wide_dtype(a)
    products = [
        jnp.sum(x.astype(wide) * y.astype(wide)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return jnp.sum(stack_scalars(products))


def combine(*terms: tuple[Array, PyTree[Array]]) -> PyTree[Array]:
    """`sum_i c_i x_i` with numbers `c_i`, in at least float32."""

    def one(*leaves: Array) -> Array:
        wide = wide_dtype(leaves)
        parts = [c.astype(wide) * x.astype(wide) for (c, _), x in zip(terms, leaves, strict=True)]
        return sum(parts[1:], start=parts[0])

    return jax.tree.map(one, *(tree for _, tree in terms))


def cast(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """The pytree in the dtypes of `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def tree_where(which: Bool[Array, ""], yes: PyTree[Array], no: PyTree[Array]) -> PyTree[Array]:
    """`jnp.where` of whole pytrees."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), yes, no)


def zeros_like(tree: PyTree[Array]) -> PyTree[Array]:
    """Zeros of these shapes and dtypes, sharded like the arrays."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else jnp.zeros_like(x), tree
    )


def wide_zeros_like(tree: PyTree[Array]) -> PyTree[Array]:
    """`zeros_like` in at least float32, for what is added up over many steps."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=compute_dtype(x.dtype)), tree)
