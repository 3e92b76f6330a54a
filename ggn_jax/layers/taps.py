"""Sums over examples made inside of a loop, where a layer is, so that its inputs and output gradients stay inside.

The model is mapped over examples. A function of all of them at once, such as a sum of outer products, takes the place
of the mapped one by `jax.custom_batching.custom_vmap`, and its result is not mapped. What it makes of output gradients
leaves the backward pass as the cotangent of an argument that nothing depends on, since that is all that JAX lets out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

BatchFn = Callable[[PyTree[Array], Array], PyTree[Array]]


class Tap(NamedTuple):
    """Functions of the arrays of a batch at one use: what leaves the loops around it, for each step, in their place."""

    inputs: BatchFn  # of `args` and [N, *operand]
    output_grads: BatchFn  # of `args` and [N, *output]
    args: PyTree[Array]


def apply_to_batch(fn: BatchFn, args: PyTree[Array], size: int, x: Array) -> PyTree[Array]:
    """`fn` of the `x` of all `size` examples, called on that of one example while they are mapped over."""

    @custom_vmap
    def summary(args: PyTree[Array], x: Array) -> PyTree[Array]:
        return fn(args, jnp.broadcast_to(x, (size, *x.shape)))

    @summary.def_vmap
    def of_all(size: int, mapped: Any, args: PyTree[Array], x: Array) -> tuple[PyTree[Array], PyTree[bool]]:
        result = fn(args, x)
        return result, jax.tree.map(lambda _: False, result)

    return summary(args, jax.lax.stop_gradient(x))


def tap_cotangents(fn: BatchFn, args: PyTree[Array], size: int, y: Array, perturbation: PyTree[Array]) -> Array:
    """`y` itself; the cotangent of `perturbation` is `fn` of all examples' cotangents of `y`."""

    @jax.custom_vjp
    def same(args: PyTree[Array], y: Array, perturbation: PyTree[Array]) -> Array:
        return y

    def forward(args: PyTree[Array], y: Array, perturbation: PyTree[Array]) -> tuple[Array, PyTree[Array]]:
        return y, args

    def backward(args: PyTree[Array], g: Array) -> tuple[None, Array, PyTree[Array]]:
        return None, g, apply_to_batch(fn, args, size, g)

    same.defvjp(forward, backward)
    return same(args, y, perturbation)
