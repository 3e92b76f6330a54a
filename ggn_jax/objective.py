"""What is minimised, where that is a sum: functions of the same parameters, each with a batch of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import check_weight_number, is_sum_start
from ggn_jax._hints import check_model_fn
from ggn_jax._supported import check_supported
from ggn_jax.loss import Loss


@dataclass(frozen=True, eq=False)
class ObjectiveTerm:
    """One function of an `Objective`: `weight * loss(model_fn(params, inputs), targets)`.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
        loss: its `Loss`.
        weight: a number of at least 0.

    Example:
        >>> import ggn_jax
        >>> ggn_jax.Objective(lambda p, x: x @ p, ggn_jax.MSELoss(), 0.5).terms[0].weight
        0.5
    """

    model_fn: Callable[[PyTree, PyTree], Any]
    loss: Loss
    weight: Any


class Objective:
    """The objective `weight * loss(model_fn(params, inputs), targets)`, or a sum of such, made with `+` and `number *`.

    The functions of a sum have the same parameters, and each a batch of its own, of its own size: a differential
    equation in the interior of a domain and its boundary values, say, or data of several kinds. The curvature is the
    weighted sum, and each layer has a Kronecker term for each use of its weight, or with `tied="concatenate"` for each
    function that uses it. `ggn_jax.kfac(objective, learning_rate=..., example_inputs=[...])` takes one in place of
    `model_fn` and `loss`, and operators are made by `from_objective(objective, params, batches)`.

    Calling `objective(params, batches)`, with a batch `(inputs, targets)` for each function, returns its value. For an
    objective of one function, `batches` may also be its batch.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        weight: a number of at least 0; 1 by default.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, loss = {"w": jnp.ones((2, 1))}, ggn_jax.MSELoss()
        >>> slope = lambda p, x: jnp.ones((len(x), 1)) @ p["w"].T
        >>> objective = ggn_jax.Objective(lambda p, x: x @ p["w"], loss) + 0.5 * ggn_jax.Objective(slope, loss)
        >>> batches = [(jnp.ones((8, 2)), jnp.zeros((8, 1))), (jnp.ones((3, 2)), jnp.ones((3, 2)))]
        >>> float(objective(params, batches))
        4.0
        >>> ggn_jax.GGNLinearOperator.from_objective(objective, params, batches).as_matrix().shape
        (2, 2)
    """

    terms: tuple[ObjectiveTerm, ...]
    """The functions of the sum."""

    def __init__(self, model_fn: Callable[[PyTree, PyTree], Any], loss: Loss, weight: Any = 1.0):
        check_model_fn(model_fn)
        check_supported(loss)
        self.terms = (ObjectiveTerm(model_fn, loss, _static_or_array("weight", weight)),)

    @classmethod
    def _of(cls, terms: Sequence[ObjectiveTerm]) -> "Objective":
        made = object.__new__(cls)
        made.terms = tuple(terms)
        return made

    def __repr__(self) -> str:
        def one(term: ObjectiveTerm) -> str:
            name = getattr(term.model_fn, "__name__", type(term.model_fn).__name__)
            return f"{term.weight} * Objective({name}, {term.loss})"

        return " + ".join(map(one, self.terms))

    def __add__(self, other: Any) -> "Objective":
        return Objective._of((*self.terms, *other.terms)) if isinstance(other, Objective) else NotImplemented

    def __radd__(self, other: Any) -> "Objective":
        return self if is_sum_start(other) else NotImplemented

    def __mul__(self, number: Any) -> "Objective":
        by = _static_or_array("the factor of an objective", number)
        return Objective._of([replace(term, weight=by * term.weight) for term in self.terms])

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> "Objective":
        return self * (1 / _static_or_array("the divisor of an objective", number))

    def __call__(self, params: PyTree[Array], batches: Any) -> Float[Array, ""]:
        """Compute the value at `params`.

        Args:
            params: the parameters, a pytree of floating arrays.
            batches: a list with a batch `(inputs, targets)` for each function; for one function, also its batch.

        Returns:
            The value, a scalar.

        Raises:
            TypeError: for a number of batches that differs from that of the functions.
        """
        values = []
        for term, batch in zip(self.terms, self._batches(batches), strict=True):
            value = term.loss(term.model_fn(params, batch[0]), batch[1])
            values.append(jnp.asarray(term.weight).astype(value.dtype) * value)
        with jax.numpy_dtype_promotion("standard"):  # outputs may have several dtypes
            return sum(values[1:], start=values[0])

    def _batches(self, batches: Any) -> list[Any]:
        """The batch of each function; for one function, it may be given without a list."""
        return self._for_each_term(
            "batches", "a batch", batches, lambda x: isinstance(x, tuple | list) and len(x) in (2, 3)
        )

    def _for_each_term(self, name: str, what: str, given: Any, is_one: Callable[[Any], bool]) -> list[Any]:
        """Something for each function; `name` and `what` are for errors.

        For one function, it may be given without a list, as `is_one` tells.
        """
        count = len(self.terms)
        if count == 1 and is_one(given):
            return [given]
        if not isinstance(given, tuple | list) or len(given) != count:
            got = f"{len(given)} of them" if isinstance(given, tuple | list) else type(given).__name__
            raise TypeError(f"{name} must be a list of {count}, {what} for each function of the objective; got {got}.")
        return list(given)


def _static_or_array(name: str, value: Any) -> Any:
    """A checked weight: Python numbers stay static, and arrays may be traced."""
    number = check_weight_number(name, value)
    return value if isinstance(value, int | float) else number


def parts_of(objective: Any, batches: Any, key: Any) -> list[tuple[ObjectiveTerm, Any, Any]]:
    """Each function of an objective with its batch, and its key."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a ggn_jax.Objective; got {type(objective).__name__}.")
    pairs = zip(objective.terms, objective._batches(batches), strict=True)
    return [(term, batch, key_of(key, number)) for number, (term, batch) in enumerate(pairs)]


def key_of(key: Any, number: int) -> Any:
    """The key of the function of this number."""
    return None if key is None else jax.random.fold_in(key, number)


def array_weights(objective: Objective) -> list[Array]:
    """The weights as arrays."""
    return [jnp.asarray(term.weight, float) for term in objective.terms]
