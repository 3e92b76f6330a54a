"""Pytrees with leaves that are not arrays, as arguments of `jax.jit`."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree


class Frozen(eqx.Module):
    """A pytree whose arrays are leaves; all else is static and must be hashable."""

    arrays: PyTree[Array]
    static: tuple[Any, Any] = eqx.field(static=True)

    def __init__(self, tree: PyTree):
        self.arrays, static = eqx.partition(tree, eqx.is_array)
        leaves, structure = jax.tree.flatten(static)
        self.static = tuple(leaves), structure

    def thaw(self) -> PyTree:
        """The original pytree."""
        leaves, structure = self.static
        return eqx.combine(self.arrays, jax.tree.unflatten(structure, leaves))
