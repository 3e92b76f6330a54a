"""Short representations in one line: names, shapes, and options that differ from the default."""

import inspect
from typing import Any

import equinox as eqx
import jax
import numpy as np


def short(value: Any) -> str:
    """An array as its dtype and shape, a pytree of several as their number and size, anything else as it is."""
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    own = isinstance(value, eqx.Module) and type(value).__repr__ is not eqx.Module.__repr__
    leaves = jax.tree.leaves(value)
    if leaves and not own and all(hasattr(leaf, "shape") for leaf in leaves):
        if len(leaves) == 1:
            return short(leaves[0])
        return f"{len(leaves)} arrays, {sum(int(np.prod(leaf.shape)) for leaf in leaves):,} entries"
    return repr(value)


def fields(value: Any, **given: Any) -> str:
    """`Class(name=what, ...)`."""
    return f"{type(value).__name__}({', '.join(f'{name}={short(x)}' for name, x in given.items())})"


def options(value: Any) -> str:
    """`Class(name=what, ...)` of those arguments of the constructor that are not the default."""
    given = {}
    for name, parameter in inspect.signature(type(value)).parameters.items():
        found = getattr(value, name, parameter.default)
        if found is not parameter.default and not (is_plain(found) and found == parameter.default):
            given[name] = found
    return fields(value, **given)


def is_plain(value: Any) -> bool:
    """Whether a value is of a built-in type that can be compared with `==`."""
    return isinstance(value, bool | int | float | str | tuple)
