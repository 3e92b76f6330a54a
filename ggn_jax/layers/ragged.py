"""Products of rows with the matrix of their group (`jax.lax.ragged_dot`), as products of all rows with all matrices.

JAX cannot map the former over examples that share the matrices. Each matrix meets all rows, and those of other groups
are left out afterwards.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

RAGGED = frozenset({"ragged_dot_general"})


def is_by_row(eqn: Any) -> bool:
    """Whether an equation is `[rows, in]` times `[groups, in, out]`, in any order of axes, and nothing else."""
    if eqn.primitive.name not in RAGGED:
        return False
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch) = numbers.dot_dimension_numbers
    ranks = tuple(len(var.aval.shape) for var in eqn.invars[:2])
    plain = eqn.params["group_offset"] is None and eqn.params.get("out_sharding") is None
    one_each = tuple(map(len, contract)) == (1, 1) and tuple(map(len, batch)) == (0, 0)
    ragged = len(numbers.lhs_ragged_dimensions) == len(numbers.rhs_group_dimensions) == 1
    return plain and ranks == (2, 3) and one_each and ragged and numbers.lhs_ragged_dimensions[0] != contract[0][0]


def by_row(eqn: Any, x: Array, groups: int, sizes: Array, dot: Callable[[Array, int, int, int], Array]) -> Array:
    """The result `[rows, out]` of such an equation; rows past the last group are 0.

    `dot(x, axis, inputs, group)` is the product `[groups, rows, out]` of data `[groups, ...]` along an axis with the
    weights along their axes of inputs, for each group.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (rows,), (group,) = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    every = dot(jnp.broadcast_to(x, (groups, *x.shape)), 2 - rows, numbers.dot_dimension_numbers[0][1][0], group)
    ends = jnp.cumsum(sizes)[:, None]
    number = jnp.arange(every.shape[1], dtype=ends.dtype)[None]
    own = (number < ends) & (number >= ends - sizes[:, None])
    return jnp.sum(jnp.where(own[:, :, None], every, 0), axis=0)
