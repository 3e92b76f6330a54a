"""A user's model function, in the form in which this package calls it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from ggn_jax._hints import describe_value
from ggn_jax._unbatched import are_batched, unwrap


class Model(eqx.Module):
    """`fn(params, inputs)` for inputs that may be `Unbatched`; returns the outputs alone, also with `has_aux`."""

    fn: Callable[[PyTree, PyTree], Any]
    has_aux: bool = eqx.field(static=True, default=False)

    def __call__(self, params: PyTree, inputs: PyTree) -> Array:
        outputs: Array = self.with_aux(params, inputs)[0]
        return outputs

    def at(self, inputs: PyTree) -> Callable[[PyTree, PyTree], Array]:
        """The same function for such inputs; `fn` itself if possible, since JAX caches traces by function."""
        return self if self.has_aux or not all(are_batched(inputs)) else self.fn

    def with_aux(self, params: PyTree, inputs: PyTree) -> tuple[Array, PyTree]:
        """The outputs and the aux value; None without `has_aux`."""
        result = self.fn(params, unwrap(inputs))
        if not self.has_aux:
            return result, None
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"with has_aux=True, model_fn must return a pair (outputs, aux); got {describe_value(result)}."
            )
        return result
