"""Models that return a dict of arrays, as models of one array `[N, entries]`, of one output after the other."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

Shapes = Mapping[str, tuple[int, ...]]  # of one example's outputs, by their names


def flat_model(model_fn: Callable[[PyTree, PyTree], Any], has_aux: bool = False) -> Callable[[PyTree, PyTree], Any]:
    """`model_fn` with its outputs concatenated, in the order of their sorted names."""
    plain = not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model_fn))
    flat = _call_flat_with_aux if has_aux else _call_flat
    return jax.tree_util.Partial(flat, jax.tree_util.Partial(model_fn) if plain else model_fn)


def _call_flat(model_fn: Any, params: PyTree, inputs: PyTree) -> Array:
    return flatten_outputs(model_fn(params, inputs), 1)


def _call_flat_with_aux(model_fn: Any, params: PyTree, inputs: PyTree) -> tuple[Array, PyTree]:
    outputs, aux = model_fn(params, inputs)
    return flatten_outputs(outputs, 1), aux


def flatten_outputs(outputs: Mapping[str, Array], lead: int) -> Array:
    """`{name: [*lead, *out]}` as one array `[*lead, entries]`, in a dtype that holds all of them."""
    parts = [outputs[name] for name in sorted(outputs)]
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.result_type(*(part.dtype for part in parts))
    return jnp.concatenate([part.reshape(*part.shape[:lead], -1).astype(wide) for part in parts], axis=-1)


def split_outputs(flat: Array, shapes: Shapes) -> dict[str, Array]:
    """The inverse of `flatten_outputs`."""
    found, start = {}, 0
    for name in sorted(shapes):
        stop = start + math.prod(shapes[name])
        found[name] = flat[..., start:stop].reshape(*flat.shape[:-1], *shapes[name])
        start = stop
    return found
