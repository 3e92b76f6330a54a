"""lineax's linear solves by the blocks' own inverses."""

from typing import Any

import lineax as lx
from jaxtyping import Array, PyTree

from ggn_jax.operators.blocks import BlockLinearOperator

State = tuple[BlockLinearOperator, BlockLinearOperator]


class BlockSolver(lx.AbstractLinearSolver[State]):
    """A lineax solver for operators that have blocks, as KFAC and its `damped`, which inverts each block.

    `lineax.linear_solve(kfac.damped(x), v, BlockSolver())` takes as long as `kfac.solve(v, x)`, and is differentiated
    as any of lineax's solves. `lineax.AutoLinearSolver`, which lineax uses by default, does not know the structure: for
    a positive definite operator it makes and factorises the dense matrix.

    Raises:
        ValueError: for operators without blocks.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> loss = ggn_jax.CrossEntropyLoss()
        >>> kfac = ggn_jax.KFACLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
        >>> solution = lx.linear_solve(kfac.damped(0.1), params, BlockSolver())
        >>> bool(jnp.allclose(solution.value["w"], kfac.solve(params, 0.1)["w"]))
        True
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> State:
        """Invert the blocks.

        Args:
            operator: an operator with blocks.
            options: not used.

        Returns:
            The operator and its inverse.

        Raises:
            ValueError: for an operator without blocks.
        """
        if not isinstance(operator, BlockLinearOperator):
            raise ValueError(
                f"BlockSolver solves with operators that have blocks, as KFACLinearOperator; got"
                f" {type(operator).__name__}: use another of lineax's solvers."
            )
        return operator, operator.inverse()

    def compute(
        self,
        state: State,
        vector: PyTree[Array],
        options: dict[str, Any],
    ) -> tuple[PyTree[Array], Any, dict[str, Any]]:
        """Compute the product with the inverse, refined as by `BlockLinearOperator.solve`.

        Args:
            state: what `init` returned.
            vector: a pytree of arrays like the parameters.
            options: not used.

        Returns:
            The solution, lineax's code for success, and no statistics.
        """
        operator, inverse = state
        return operator._refined(inverse, vector), lx.RESULTS.successful, {}

    def transpose(self, state: State, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the state of the transpose: the same, as the inverse is symmetric.

        Args:
            state: what `init` returned.
            options: not used.

        Returns:
            `state` and `options`.
        """
        return state, options

    def conj(self, state: State, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the state of the conjugate: the same, as the inverse is real.

        Args:
            state: what `init` returned.
            options: not used.

        Returns:
            `state` and `options`.
        """
        return state, options

    def assume_full_rank(self) -> bool:
        """Return True: singular blocks have no inverse."""
        return True
