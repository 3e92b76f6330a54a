"""Compile what is called outside of `jit`, where JAX would recompile loops and branches at each call."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import equinox as eqx
import jax

from ggn_jax._checks import is_concrete

T = TypeVar("T")


def compiled(fn: Callable[..., T]) -> Callable[..., T]:
    """`fn`, compiled if it is called outside of all transformations. What is not an array must be hashable.

    Inside a transformation it is `fn` itself, which is not traced a second time for a program of its own.
    """
    jitted = eqx.filter_jit(fn)

    @wraps(fn)
    def run(*args: Any) -> T:
        arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
        result: T = (jitted if all(map(is_concrete, arrays)) else fn)(*args)
        return result

    return run
