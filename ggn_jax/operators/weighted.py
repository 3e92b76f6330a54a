"""Weighted sums of operators on the same parameters."""

from collections.abc import Callable
from typing import Any

import jax
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import errors_prefixed
from ggn_jax._keywords import check_names, keywords_of
from ggn_jax._weights import weighted_sum
from ggn_jax.objective import Objective, array_weights, parts_of
from ggn_jax.operators.base import SymmetricLinearOperator, check_vector, register


class WeightedSumLinearOperator(SymmetricLinearOperator):
    """The weighted sum `sum_k weights[k] operators[k]`: the curvature of an `Objective`; made by `from_objective`.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, loss, batch = {"w": jnp.ones((2, 3))}, ggn_jax.MSELoss(), (jnp.ones((8, 2)), jnp.ones((8, 3)))
        >>> term = ggn_jax.Objective(lambda p, x: x @ p["w"], loss)
        >>> ggn = ggn_jax.GGNLinearOperator.from_objective(term + 0.5 * term, params, [batch, batch])
        >>> type(ggn).__name__, ggn.damped(0.1).as_matrix().shape
        ('WeightedSumLinearOperator', (6, 6))
    """

    operators: tuple[lx.AbstractLinearOperator, ...]
    weights: tuple[Float[Array, ""], ...]

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operators[0].in_structure()

    def _details(self) -> dict[str, Any]:
        return {"operators": self.operators}

    def mv(self, vector: PyTree[Any]) -> PyTree[Array]:
        """Compute the product with a vector.

        Args:
            vector: a pytree of arrays like the parameters.

        Returns:
            A pytree of arrays like the parameters.
        """
        check_vector(self, vector)
        return weighted_sum([operator.mv(vector) for operator in self.operators], self.weights)


register(WeightedSumLinearOperator)
lx.is_positive_semidefinite.register(
    WeightedSumLinearOperator, lambda operator: all(map(lx.is_positive_semidefinite, operator.operators))
)
lx.linearise.register(
    WeightedSumLinearOperator,
    lambda operator: WeightedSumLinearOperator(tuple(map(lx.linearise, operator.operators)), operator.weights),
)


def of_terms(
    make: Callable[..., Any],
    objective: Objective,
    params: PyTree[Array],
    batches: Any,
    key: Any,
    options: dict[str, Any],
) -> tuple[list[Any], list[Array]]:
    """An operator for each function of an objective, with a key of its own, and the weights."""
    check_names("from_objective", options, keywords_of(make))
    made = []
    for i, (term, batch, own_key) in enumerate(parts_of(objective, batches, key)):
        own = options if own_key is None else {**options, "key": own_key}
        with errors_prefixed(f"batches[{i}]: "):
            pair = tuple(batch) if isinstance(batch, list) else batch
            made.append(make(term.model_fn, term.loss, params, pair, **own))
    return made, array_weights(objective)
