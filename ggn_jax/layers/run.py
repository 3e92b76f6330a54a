"""Evaluate an equation: some in another way, for speed, that gives the same results and derivatives."""

from collections.abc import Sequence
from typing import Any

from ggn_jax.layers.convolution import convolution, is_convolution
from ggn_jax.layers.jaxprs import bind
from ggn_jax.layers.pooling import is_max_pool, max_pool


def run_equation(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of an equation for these inputs."""
    if is_convolution(eqn):
        return [convolution(eqn, *values)]
    if is_max_pool(eqn):
        return [max_pool(eqn, *values)]
    return bind(eqn, values)
