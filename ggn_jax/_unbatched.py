"""Inputs of a model of which some leaves have a batch axis, and others none."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from ggn_jax._repr import short


class Unbatched(eqx.Module):
    """A part of a model's `inputs` without batch axis: running statistics, a time step, one key, a graph's edges.

    `model_fn` gets `value` itself. It is the same for all examples: not cut into chunks, not mapped over, and not used
    to find the length of the batch. Every argument that takes a batch takes it, `example_inputs` too; targets and masks
    have an entry for each example.

    A model that closes over `value` is the same function, but is compiled anew for each value.

    Args:
        value: an array, or a pytree of arrays and PRNG keys.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> def model_fn(params, inputs):
        ...     x, mean = inputs
        ...     return (x - mean) @ params["w"]
        >>> params, inputs = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), ggn_jax.Unbatched(jnp.zeros(2)))
        >>> ggn = ggn_jax.GGNLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), params, (inputs, jnp.arange(8) % 3))
        >>> ggn.mv(params)["w"].shape
        (2, 3)
    """

    value: PyTree

    def __repr__(self) -> str:
        return f"Unbatched({short(self.value)})"


def is_unbatched(node: Any) -> bool:
    return isinstance(node, Unbatched)


def map_batched(fn: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """`fn` of the leaves with a batch axis; the others stay."""
    return jax.tree.map(lambda x: x if is_unbatched(x) else fn(x), tree, is_leaf=is_unbatched)


def batched_leaves(tree: PyTree) -> list[Any]:
    """The leaves with a batch axis."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_unbatched) if not is_unbatched(x)]


def batch_axes(tree: PyTree) -> PyTree:
    """What `jax.vmap` maps over: a prefix of the tree, 0 or None."""
    return jax.tree.map(lambda x: None if is_unbatched(x) else 0, tree, is_leaf=is_unbatched)


def are_batched(tree: PyTree) -> list[bool]:
    """Whether each leaf has a batch axis."""
    nodes = jax.tree.leaves(tree, is_leaf=is_unbatched)
    return [not is_unbatched(node) for node in nodes for _ in jax.tree.leaves(node)]


def unwrap(tree: PyTree) -> PyTree[Array]:
    """The tree as a model sees it."""
    return jax.tree.map(lambda x: x.value if is_unbatched(x) else x, tree, is_leaf=is_unbatched)
