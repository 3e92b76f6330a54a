"""Convolutions in the one layout for which XLA's CPU compiler has fast code, also where they run in a loop.

Outside of loops it finds that layout by itself. Inside, as when many vectors are pulled back one after the other, it
does not, and JAX's derivative of a convolution has another one: that takes four times as long.
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
