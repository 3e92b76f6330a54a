"""How blocks are kept between steps: as dicts, of a symmetric matrix one triangle, and perhaps in fewer bits."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float, Int, PyTree

HASH_FACTOR = 40503  # the golden ratio in units of 2^-16: the remainders of its multiples fill an interval evenly


def as_plain(tree: PyTree[Array]) -> PyTree[Array]:
    """`tree` with dicts in place of modules: a pytree that every library for checkpoints knows how to save."""

    def one(node: Any) -> Any:
        if not isinstance(node, eqx.Module):
            return node
        dynamic = [field.name for field in fields(node) if not field.metadata.get("static", False)]
        return {name: as_plain(getattr(node, name)) for name in dynamic}

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, eqx.Module))


def from_plain(leaves: Sequence[Any], like: PyTree[Any]) -> PyTree[Any]:
    """`like` with these leaves, which are in the order of `as_plain(like)`: dicts are sorted by their keys."""
    structure = jax.tree.structure(like)
    order = jax.tree.leaves(as_plain(jax.tree.unflatten(structure, range(len(leaves)))))
    sorted_leaves = [leaf for _, leaf in sorted(zip(order, leaves, strict=True), key=lambda pair: pair[0])]
    return jax.tree.unflatten(structure, sorted_leaves)


def to_storage(tree: PyTree[Array], dtype: Any, count: Int[Array, ""]) -> PyTree[Array]:
    """Packed averages in the dtype in which they are kept (None for their own), rounded for step number `count`."""

    def one(x: Array) -> Array:
        return dithered(x, count) if dtype == jnp.bfloat16 else x.astype(dtype or x.dtype)

    return jax.tree.map(one, tree)


def dithered(x: Float[Array, "*shape"], count: Int[Array, ""]) -> BFloat16[Array, "*shape"]:
    """Rounded down or up, with a dither that depends on the step, so that the mean over steps is right.

    Rounded to the nearest, an average would stop moving once a step changes it by less than 1/256.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    added = (2**15 + count.astype(jnp.uint32) * HASH_FACTOR) & jnp.uint32(2**16 - 1)  # to the bits that are cut off
    cut = (bits + added) & jnp.uint32(2**32 - 2**16)
    return jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)


def pack(tree: PyTree[Array]) -> PyTree[Array]:
    """Blocks with one triangle of each matrix: all their arrays `[G, d, d]` are symmetric, `[G, d]` are diagonals."""
    return jax.tree.map(lambda x: pack_triangle(x) if x.ndim == 3 else x, tree)


def unpack(tree: PyTree[Array], dtype: Any) -> PyTree[Array]:
    """The blocks again, in the dtype to compute with."""
    return jax.tree.map(lambda x: unpack_triangle(x.astype(dtype)) if x.ndim == 3 else x.astype(dtype), tree)


def pack_triangle(x: Float[Array, "G d d"]) -> Float[Array, "G rows half"]:
    """The lower triangles, in rectangular full packed format: `d (d + 1) / 2` entries (Gustavson et al. 2010).

    The first `ceil(d / 2)` columns of a triangle leave a triangle free, in which the transpose of the others fits.
    """
    size = x.shape[1]
    half, even = -(-size // 2), 1 - size % 2
    # One row more for even sizes, so that the free triangle has a diagonal of its own.
    left, right = x[:, :, :half], jnp.swapaxes(x[:, half:, half:], 1, 2)
    rows = size + even
    left = jnp.pad(left, ((0, 0), (even, 0), (0, 0)))
    right = jnp.pad(right, ((0, 0), (0, rows - right.shape[1]), (1 - even, 0)))
    return jnp.where(_is_left(rows, half, even), left, right)


def unpack_triangle(x: Float[Array, "G rows half"]) -> Float[Array, "G d d"]:
    """The symmetric matrices of `pack_triangle`."""
    rows, half = x.shape[1:]
    even = int(rows > 2 * half)
    rest = rows - even - half
    kept = jnp.where(_is_left(rows, half, even), x, 0)[:, even:]
    right = jnp.where(_is_left(rows, half, even), 0, x)[:, :rest, 1 - even :]
    lower = jnp.pad(kept, ((0, 0), (0, 0), (0, rest)))
    lower += jnp.pad(jnp.swapaxes(right, 1, 2), ((0, 0), (half, 0), (half, 0)))
    return lower + jnp.swapaxes(jnp.tril(lower, -1), 1, 2)


def packed_trace(x: Float[Array, "G rows half"]) -> Float[Array, " G"]:
    """The traces of packed matrices."""
    rows, half = x.shape[1:]
    column = jnp.arange(half)[None, :] - jnp.arange(rows)[:, None]
    even = int(rows > 2 * half)
    diagonal = (column == -even) | (column == 1 - even)  # of the first half, and of the rest
    return jnp.sum(jnp.where(diagonal[None], x, 0), axis=(1, 2))


def _is_left(rows: int, half: int, even: int) -> Bool[Array, "1 rows half"]:
    return jnp.tri(rows, half, -even, dtype=bool)[None]
