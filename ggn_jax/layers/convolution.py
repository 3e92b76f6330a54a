"""Convolutions in the one layout for which XLA's CPU compiler has fast code, also where they run in a loop.

Outside of loops it finds that layout by itself. Inside, as when many vectors are pulled back one after the other, it
does not, and JAX's derivative of a convolution has another one: that takes four times as long.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

    def run(x: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(x, kernel, cpu=lambda x, k: canonical(x, k, False), default=plain)

    def backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        def to_input(forward: Any) -> Any:
            return lambda x, kernel, g: jax.vjp(lambda x: forward(x, kernel), x)[1](g)[0]

        # The derivative swaps inputs and outputs: of the swapped kernel, it has them in the order that is fast.
        fast = to_input(lambda x, kernel: canonical(x, kernel, True))
        dx = jax.lax.platform_dependent(*kept, g, cpu=fast, default=to_input(plain))
        return dx, jax.vjp(lambda kernel: plain(kept[0], kernel), kept[1])[1](g)[0]

    convolve = jax.custom_vjp(run)
    convolve.defvjp(lambda x, kernel: (run(x, kernel), (x, kernel)), backward)
    return convolve(x, kernel)
