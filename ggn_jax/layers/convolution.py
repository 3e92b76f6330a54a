"""Convolutions in forms that XLA computes fast, and correctly.

Its CPU compiler has fast code for one layout. Outside of loops it finds that layout by itself. Inside, as when many
vectors are back-propagated one after the other, it does not, and JAX's derivative of a convolution has another one,
which takes four times as long.

Where each example has a kernel of its own, or a gradient in one, JAX makes one convolution of all, with a group for
each example. If the batch is sharded, XLA (JAX 0.10) computes such gradients wrongly, and gathers the batch for other
groups; products of matrices stay where the examples are. On one CPU they are four times as fast.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.lax import ConvDimensionNumbers
from jaxtyping import Array

from ggn_jax.layers.jaxprs import bind

CONVOLUTION = frozenset({"conv_general_dilated"})


def is_convolution(eqn: Any) -> bool:
    """Whether an equation is a convolution without groups."""
    if eqn.primitive.name not in CONVOLUTION or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return False
    return eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1


def convolution(eqn: Any, x: Array, kernel: Array) -> Array:
    """The equation's result, with the same derivative."""
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs, out = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    rank = len(lhs)
    last = (0, rank - 1, *range(1, rank - 1))  # batch, spatial axes, features
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision", "preferred_element_type")
    options = {name: eqn.params[name] for name in names}

    def canonical(x: Array, kernel: Array, swapped: bool) -> Array:
        """With a kernel of spatial axes, inputs, outputs; or, swapped, outputs, inputs."""
        spatial = tuple(range(rank - 2))
        to_last = (*rhs[2:], rhs[0], rhs[1]) if swapped else (*rhs[2:], rhs[1], rhs[0])
        spec = (rank - 2, rank - 1, *spatial) if swapped else (rank - 1, rank - 2, *spatial)
        y = jax.lax.conv_general_dilated(
            x.transpose(lhs[0], *lhs[2:], lhs[1]),
            kernel.transpose(to_last),
            dimension_numbers=ConvDimensionNumbers(last, spec, last),
            **options,
        )
        return y.transpose(np.argsort((out[0], *out[2:], out[1])))

    def plain(x: Array, kernel: Array) -> Array:
        (y,) = bind(eqn, [x, kernel])
        return y

    @jax.custom_jvp
    def convolve(x: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(x, kernel, cpu=lambda x, k: canonical(x, k, False), default=plain)

    @partial(convolve.defjvp, symbolic_zeros=True)
    def push_forward(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
        x, kernel = primals
        dx, dkernel = tangents
        parts = []
        if not isinstance(dx, SymbolicZero):
            # Its transpose swaps inputs and outputs: of the swapped kernel, it has them in the order that is fast.
            swapped = partial(canonical, swapped=True)
            parts.append(jax.lax.platform_dependent(dx, kernel, cpu=swapped, default=plain))
        if not isinstance(dkernel, SymbolicZero):
            parts.append(plain(x, dkernel))
        return convolve(x, kernel), sum(parts[1:], parts[0])

    return convolve(x, kernel)


def convolution_by_patches(eqn: Any, x: Array, kernel: Array) -> Array:
    """The equation's result, with or without groups, as a product of the input's patches with the kernel."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    steps = params["window_strides"], params["rhs_dilation"]
    padding = [(*pad, d - 1) for pad, d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x, kernel = x.transpose(numbers.lhs_spec), kernel.transpose(numbers.rhs_spec)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *padding])
    for axis, (size, stride, dilation) in reversed(list(enumerate(zip(kernel.shape[2:], *steps, strict=True), 2))):
        x = _windows(x, axis, size, stride, dilation)
    features, batches = params["feature_group_count"], params["batch_group_count"]
    x = x.reshape(batches, x.shape[0] // batches, features, x.shape[1] // features, *x.shape[2:])
    kernel = kernel.reshape(batches, features, -1, *kernel.shape[1:])
    # Axes 0 to 4 are groups of the batch and of features, the batch, a group's inputs and outputs.
    rank = len(kernel.shape) - 4
    places, window = list(range(5, 5 + rank)), list(range(5 + rank, 5 + 2 * rank))
    both = [axis for pair in zip(places, window, strict=True) for axis in pair]
    y = jnp.einsum(
        x,
        [0, 2, 1, 3, *both],
        kernel,
        [0, 1, 4, 3, *window],
        [2, 0, 1, 4, *places],
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    y = y.reshape(y.shape[0], -1, *y.shape[4:])
    return y.transpose(np.argsort(numbers.out_spec))


def _windows(x: Array, axis: int, size: int, stride: int, dilation: int) -> Array:
    """An axis as two: the windows, and the places in each. The shorter one is written out."""
    count = max(0, (x.shape[axis] - dilation * (size - 1) - 1) // stride + 1)

    def cut(start: int, step: int, number: int) -> Array:
        return jax.lax.slice_in_dim(x, start, start + step * (number - 1) + 1, step, axis)

    if not 0 < count < size:
        return jnp.stack([cut(place * dilation, stride, count) for place in range(size)], axis + 1)
    return jnp.stack([cut(window * stride, dilation, size) for window in range(count)], axis)
