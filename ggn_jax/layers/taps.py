"""Sums over examples that are made where a layer is, in a loop, so that its inputs and output gradients stay inside.

The model is mapped over examples. What is wanted of all of them at once, such as a sum of outer products, is a function
that takes the place of the mapped one (`jax.custom_batching.custom_vmap`), and whose result is not mapped. What it
makes of output gradients leaves the backward pass as the cotangent of an argument that nothing depends on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

Summary = Callable[[PyTree[Array], Array], PyTree[Array]]


class Tap(NamedTuple):
    """What leaves the loops around a use in place of its arrays, for each step: functions of those of a batch."""

    inputs: Summary  # of `given` and [N, *operand]
    output_grads: Summary  # of `given` and [N, *output]
    given: PyTree[Array]


def of_batch(fn: Summary, given: PyTree[Array], size: int, x: Array) -> PyTree[Array]:
    """`fn` of the `x` of all examples, called on that of one while so many are mapped over."""

    @custom_vmap
    def summary(given: PyTree[Array], x: Array) -> PyTree[Array]:
        return fn(given, jnp.broadcast_to(x, (size, *x.shape)))

    @summary.def_vmap
    def of_all(size: int, mapped: Any, given: PyTree[Array], x: Array) -> tuple[PyTree[Array], PyTree[bool]]:
        result = fn(given, x)
        return result, jax.tree.map(lambda _: False, result)

    return summary(given, jax.lax.stop_gradient(x))


def give_grads(fn: Summary, given: PyTree[Array], size: int, y: Array, receiver: PyTree[Array]) -> Array:
    """`y` itself; `fn` of its cotangents of all examples is the cotangent of `receiver`."""

    @jax.custom_vjp
    def same(given: PyTree[Array], y: Array, receiver: PyTree[Array]) -> Array:
        return y

    def forward(given: PyTree[Array], y: Array, receiver: PyTree[Array]) -> tuple[Array, PyTree[Array]]:
        return y, given

    def backward(given: PyTree[Array], g: Array) -> tuple[None, Array, PyTree[Array]]:
        return None, g, of_batch(fn, given, size, g)

    same.defvjp(forward, backward)
    return same(given, y, receiver)
