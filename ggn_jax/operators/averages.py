"""Averages of operators with blocks: of the operators themselves, or of their factors."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ggn_jax._checks import as_array, check_real, is_concrete
from ggn_jax.kronecker.algebra import Dense, Diagonal, Kronecker
from ggn_jax.operators.blocks import BlockLinearOperator, add_operators, are_alike


def average_operators(operators: Sequence[BlockLinearOperator], weights: Any = None) -> BlockLinearOperator:
    """Average operators, with weights: `sum_i w_i O_i / sum_i w_i`, exactly, again an operator with blocks.

    A mean of Kronecker products `B_i (x) A_i` is not a Kronecker product: each operator adds its terms to the blocks,
    and inverses, roots and determinants follow the rules for sums of terms (`KFACLinearOperator.inverse`). To keep one
    term, as running averages in optimizers do, see `average_factors`.

    Args:
        operators: a sequence of operators with blocks, of one model and the same options, so that they have the same
            blocks.
        weights: as many numbers of at least 0; None (default) for equal ones. They may be unknown, under `jit`.

    Returns:
        The mean.

    Raises:
        TypeError: for operators without blocks.
        ValueError: for different blocks, no operators, or weights that do not fit, are negative, or all 0.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.CrossEntropyLoss()
        >>> def kfac(inputs):
        ...     batch = inputs, jnp.arange(8) % 3
        ...     return ggn_jax.KFACLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
        >>> first, second = kfac(jnp.ones((8, 2))), kfac(jnp.eye(8, 2))
        >>> mean = average_operators([first, second])
        >>> bool(jnp.allclose(mean.as_matrix(), (first.as_matrix() + second.as_matrix()) / 2))
        True
    """
    operators, normalised_weights = _check("average_operators", operators, weights)
    return add_operators(operators, tuple(normalised_weights))


def average_factors(operators: Sequence[BlockLinearOperator], weights: Any = None) -> BlockLinearOperator:
    """Average the factors of operators, with weights: the result has the blocks `mean(B_i) (x) mean(A_i)`.

    **It is not the mean of the operators** (that is `average_operators`), but what running averages in K-FAC optimizers
    are (Martens & Grosse 2015, section 5): one Kronecker product for each layer. For batches of one size, and a loss
    with reduction "mean", it is KFAC of all their examples. Terms of tied weights are averaged one by one, and exact
    blocks, which have no factors, directly.

    Args:
        operators: a sequence of operators with factors, as `KFACLinearOperator`, of one model and the same options, so
            that they have the same blocks.
        weights: as many numbers of at least 0; None (default) for equal ones. They may be unknown, under `jit`.

    Returns:
        The operator of the averaged factors.

    Raises:
        TypeError: for operators without blocks, and for blocks without factors, as EKFAC's and inverses.
        ValueError: for different blocks, no operators, or weights that do not fit, are negative, or all 0.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.MSELoss()
        >>> def kfac(inputs):
        ...     batch = inputs, jnp.ones((len(inputs), 3))
        ...     return ggn_jax.KFACLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
        >>> first, second = jnp.ones((4, 2)), jnp.eye(4, 2)
        >>> mean, whole = average_factors([kfac(first), kfac(second)]), kfac(jnp.concatenate([first, second]))
        >>> bool(jnp.allclose(mean.as_matrix(), whole.as_matrix()))
        True

    References:
        - Martens and Grosse (2015), *Optimizing neural networks with Kronecker-factored approximate curvature*:
          https://arxiv.org/abs/1503.05671
    """
    operators, normalised_weights = _check("average_factors", operators, weights)
    for operator in operators:
        for stack, block in zip(operator.blocks.stacks, operator.blocks.blocks, strict=True):
            if not isinstance(block, Kronecker | Dense | Diagonal):
                raise TypeError(
                    f"average_factors needs blocks with factors, as those of KFACLinearOperator; that of"
                    f" {', '.join(stack.specs[0].names)} is a {type(block).__name__}: use average_operators."
                )
    if len({jax.tree.structure(operator.blocks) for operator in operators}) > 1:
        raise ValueError("average_factors needs operators with as many Kronecker terms each: use average_operators.")
    return _mean_blocks(operators, normalised_weights)


@jax.jit
def _mean_blocks(
    operators: Sequence[BlockLinearOperator], normalised_weights: Float[Array, " n"]
) -> BlockLinearOperator:
    def mean(*leaves: Array) -> Array:
        weighted = [weight.astype(leaf.dtype) * leaf for weight, leaf in zip(normalised_weights, leaves, strict=True)]
        return sum(weighted[1:], start=weighted[0])

    blocks = jax.tree.map(mean, *(operator.blocks for operator in operators))
    return BlockLinearOperator._of(blocks, operators[0].structure)


def _check(
    name: Literal["average_operators", "average_factors"], operators: Any, weights: Any
) -> tuple[tuple[BlockLinearOperator, ...], Float[Array, " n"]]:
    """The operators, and their weights divided by the sum."""
    operators = tuple(operators)
    if not operators:
        raise ValueError(f"{name} needs at least one operator; got none.")
    for i, operator in enumerate(operators):
        if not isinstance(operator, BlockLinearOperator):
            raise TypeError(f"operators[{i}] must be an operator with blocks, as KFAC; got {type(operator).__name__}.")
        if not are_alike(operators[0], operator):
            raise ValueError(f"operators[{i}] has other blocks than operators[0]: make both with the same options.")
    if weights is None:
        return operators, jnp.full(len(operators), 1 / len(operators))
    if isinstance(weights, list | tuple):
        weights = jnp.stack([as_array(f"weights[{i}]", w).astype(float) for i, w in enumerate(weights)])
    weights = as_array("weights", weights)
    check_real("weights", weights)
    if weights.shape != (len(operators),):
        raise ValueError(f"weights must be {len(operators)} numbers, like operators; got shape {weights.shape}.")
    if is_concrete(weights) and not (np.all(np.asarray(weights) >= 0) and np.sum(np.asarray(weights)) > 0):
        raise ValueError(f"weights must be at least 0, and not all 0; got {weights}.")
    weights = weights.astype(float)
    return operators, weights / jnp.sum(weights)
