"""Checks of the optimizer's arguments: each names the argument, what came, what was wanted, and the way out."""

from collections.abc import Callable
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from ggn_jax._checks import check_real, is_concrete
from ggn_jax._hints import tensor_hint
from ggn_jax.optimizer.storage import as_plain, from_plain

Range = tuple[str, Callable[[float], bool]]
AT_LEAST_0: Range = "a finite number of at least 0", lambda x: 0 <= x < inf
ABOVE_0: Range = "a finite number above 0", lambda x: 0 < x < inf
BELOW_1: Range = "a number of at least 0 and below 1", lambda x: 0 <= x < 1
FROM_0_TO_1: Range = "a number from 0 to 1", lambda x: 0 <= x <= 1


def check_number(name: str, value: Any, allowed: Range = AT_LEAST_0, also: tuple[str, ...] = ()) -> None:
    """A real number in a range, perhaps traced, as `optax.inject_hyperparams` makes them; tracers' values are not seen.

    `also` says what else may be given.
    """
    words, holds = allowed
    wanted = f"{name} must be {', '.join([words, *also[:-1]])}{f' or {also[-1]}' if also else ''}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, jax.Array | np.ndarray | np.generic | int | float):
        raise (ValueError if isinstance(value, str) else TypeError)(f"{wanted}; got {value!r}.")
    array: Any = value if isinstance(value, jax.Array) else np.asarray(value)
    check_real(name, array)
    if array.ndim:
        raise ValueError(f"{wanted}; got an array of shape {array.shape}.")
    if (isinstance(array, np.ndarray) or is_concrete(array)) and not holds(float(np.asarray(array).astype(float))):
        raise ValueError(f"{wanted}; got {value}.")


def check_schedule(name: str, value: Any, also: tuple[str, ...] = ()) -> None:
    """A number of at least 0, or a function of the number of steps."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be an instance; got the class {value.__name__}: call it, {value.__name__}(...).")
    if not callable(value):
        check_number(name, value, also=("a function of the number of steps", *also))


def check_static(name: str, value: Any) -> None:
    """Refuse arrays where Python's own values are needed: `optax.inject_hyperparams` makes arrays of all numbers."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a value of Python's own; got an array of {value.dtype}. optax.inject_hyperparams makes"
            f" arrays of all numbers, and calls what is callable: name {name!r} in its static_args, as model_fn, loss,"
            " example_inputs and all integers; or inject into a function of the few arguments that change."
        )


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}.")


def check_dtype(name: str, value: Any) -> Any:
    """A dtype with the range of float32 at least, or None."""
    if value is None:
        return None
    allowed = [jnp.dtype(kind) for kind in (jnp.bfloat16, jnp.float32, jnp.float64)]
    try:
        found = jnp.dtype(value)
    except TypeError:
        found = None
    if found is None or found not in allowed:
        raise ValueError(f"{name} must be 'bfloat16', 'float32', 'float64' or None; got {value!r}.")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise ValueError(f"{name} is {found}, which JAX has not without jax.config.update('jax_enable_x64', True).")
    return found


def as_arrays(name: str, tree: PyTree) -> PyTree:
    """JAX's arrays, made of NumPy's as `jit` does, and `jax.ShapeDtypeStruct`s as they are."""

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            return leaf
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biuf":
            return jnp.asarray(leaf)
        where = f"{name}{jax.tree_util.keystr(path)}"
        got = type(leaf).__name__
        raise TypeError(f"{where} must be an array or a jax.ShapeDtypeStruct; got {got}.{tensor_hint(leaf)}")

    return jax.tree_util.tree_map_with_path(one, tree)


def check_mesh(mesh: Any) -> None:
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, or None; got {type(mesh).__name__}.")


def check_grads(grads: PyTree[Array], params: PyTree[Array]) -> None:
    """Refuse a gradient that is not like the parameters."""
    wanted, got = jax.tree_util.tree_leaves_with_path(params), jax.tree_util.tree_leaves_with_path(grads)
    if jax.tree.structure(params) != jax.tree.structure(grads):  # type: ignore[operator]  # untyped in jaxlib
        raise ValueError(
            f"grads must be a pytree like params: wanted {jax.tree.structure(params)}, got {jax.tree.structure(grads)}."
        )
    for (path, p), (_, g) in zip(wanted, got, strict=True):
        if jnp.shape(p) != jnp.shape(g):
            raise ValueError(
                f"grads{jax.tree_util.keystr(path)} must have the parameter's shape {jnp.shape(p)}; got {jnp.shape(g)}."
            )


def is_function(value: Any) -> bool:
    """Whether a mask is a function that returns one; a module of booleans is a mask, which may be called too."""
    return callable(value) and not any(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(value))


def check_decay_mask(mask: Any) -> None:
    """Refuse what is not a pytree of booleans; whether it fits the parameters is seen by `spread_mask`."""
    wanted = "weight_decay_mask must be a pytree of booleans like params, or a function of params that returns one"
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not path or not isinstance(leaf, bool | np.bool_):
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            raise TypeError(f"{wanted}; got {leaf!r}{where}. Leave it out to let all parameters decay.")


def spread_mask(mask: Any, params: PyTree[Array]) -> PyTree[bool]:
    """A boolean for each parameter, from a mask that may have one for a whole branch, or be a function."""
    if is_function(mask):
        mask = mask(params)
        check_decay_mask(mask)
    try:
        return jax.tree.map(lambda keep, branch: jax.tree.map(lambda _: bool(keep), branch), mask, params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"weight_decay_mask must fit params: wanted {jax.tree.structure(params)}, got {jax.tree.structure(mask)}."
        ) from error


def check_type(name: str, got: Any, wanted: type) -> None:
    if type(got) is not wanted:
        order = " Arguments are grads, state, params, in this order." if name == "state" else ""
        raise TypeError(f"{name} must be a {wanted.__name__}; got {type(got).__name__}.{order} {_OWN}")


def check_structure(name: str, got: Any, wanted: Any) -> Any:
    """`got` with the structure of `wanted`, whose leaves need shapes only; refused if its arrays differ.

    Named tuples are compared field by field. Anything that wraps single arrays, as `nnx.Optimizer` does, comes off.
    """
    if hasattr(wanted, "_fields"):
        check_type(name, got, type(wanted))
        parts = zip(wanted._fields, got, wanted, strict=True)
        return type(wanted)(*(check_structure(f"{name}.{field}", g, w) for field, g, w in parts))
    leaves, shapes = jax.tree.leaves(as_plain(got)), [leaf.shape for leaf in jax.tree.leaves(as_plain(wanted))]
    if len(leaves) != len(shapes):
        raise ValueError(f"{name} must hold {len(shapes)} arrays; got {len(leaves)}. {_OWN}")
    for leaf, shape in zip(leaves, shapes, strict=True):
        if jnp.shape(leaf) != shape:
            raise ValueError(f"{name} must hold an array of shape {shape}; got {jnp.shape(leaf)} there. {_OWN}")
    return from_plain(leaves, wanted)


_OWN = (
    "States and factors belong to one optimizer and its settings: start with the state that `init` of this one returns,"
    " and pass factors that it made."
)
