"""Dampings: one number for all parameters, or a pytree of them that is a prefix of the parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ggn_jax._checks import as_array, check_real, is_concrete


def check_nonnegative_number(name: str, value: Any) -> Array:
    """`value` as a floating array: one number of at least 0."""
    if isinstance(value, np.generic | np.ndarray) and not np.ndim(value):
        value = value.item()  # narrowed where Python's numbers are
    number = as_array(name, value)
    check_real(name, number)
    if number.dtype == bool:
        raise TypeError(f"{name} must be a number; got {value!r}.")
    if number.ndim:
        raise ValueError(f"{name} must be a number; got an array of shape {number.shape}.")
    if is_concrete(number) and not np.asarray(number) >= 0:
        raise ValueError(f"{name} must not be negative, nor NaN; got {number}.")
    return number if jnp.issubdtype(number.dtype, jnp.floating) else number.astype(float)


def _check_finite(name: str, value: Any) -> Array:
    number = check_nonnegative_number(name, value)
    if is_concrete(number) and np.isinf(np.asarray(number)):
        raise ValueError(f"{name} must be finite; got {number}.")
    return number


def nonnegative_number(value: Any) -> float | None:
    """`value` as a Python number if it is one of at least 0, and not infinite; None where it is not, or not known."""
    if isinstance(value, jax.Array) and not is_concrete(value):
        return None
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array) or np.ndim(value):
        return None
    number = math.nan if np.iscomplexobj(value) else float(value)
    return number if 0 <= number < math.inf else None


def check_damping(damping: Any, structure: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """One number of at least 0, or a pytree of them that is a prefix of the parameters."""
    if jax.tree_util.all_leaves([damping]):
        return _check_finite("damping", damping)
    if damping is None:
        raise TypeError("damping must be a number, or a pytree of numbers like the parameters; got None.")
    checked = jax.tree_util.tree_map_with_path(
        lambda path, number: _check_finite(f"damping{jax.tree_util.keystr(path)}", number), damping
    )
    leaf_dampings(checked, structure)
    return checked


def leaf_dampings(damping: PyTree[Array], structure: PyTree[jax.ShapeDtypeStruct]) -> list[Array]:
    """The damping of each parameter."""
    try:
        spread = jax.tree.map(lambda number, tree: [number] * len(jax.tree.leaves(tree)), damping, structure)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{_damping_mismatch(damping, structure)}. damping is a number, or a pytree of numbers that is a prefix of"
            " the parameters."
        ) from error
    return jax.tree.leaves(spread)


def _damping_mismatch(damping: PyTree[Array], structure: PyTree, name: str = "damping") -> str:
    """Where a pytree is not a prefix of another, and what is there in both; empty if it is one."""
    if jax.tree_util.all_leaves([damping]):
        return ""
    (own, kind), (wanted, wanted_kind) = _children(damping), _children(structure)
    if kind != wanted_kind:
        one = "one number" if jax.tree_util.all_leaves([structure]) else f"a number, or {_describe_pytree(structure)}"
        return f"{name} must be {one}, as the parameters are; got {_describe_pytree(damping)}"
    found = (_damping_mismatch(x, wanted[key], name + key) for key, x in own.items())
    return next(filter(None, found), "")


def _children(tree: PyTree) -> tuple[dict[str, PyTree], Any]:
    """What a node holds, by the paths from it, and the node's own structure."""
    here: Callable[[Any], bool] = lambda x: x is not tree  # noqa: E731
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=here)
    return {jax.tree_util.keystr(path): x for path, x in pairs}, jax.tree.structure(tree, is_leaf=here)


def _describe_pytree(tree: PyTree) -> str:
    kind = type(tree).__name__
    names = list(_children(tree)[0])
    return f"a {kind} of {', '.join(names)}" if names else "None" if tree is None else f"an empty {kind}"
