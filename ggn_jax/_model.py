"""A user's model function, as everything here calls it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from ggn_jax._hints import kind
from ggn_jax._unbatched import are_batched, unwrap


class Model(eqx.Module):
    """`fn(params, inputs)` at inputs that may be `Unbatched`; its outputs alone, also where it returns more."""

    fn: Callable[[PyTree, PyTree], Any]
    has_aux: bool = eqx.field(static=True, default=False)

    def __call__(self, params: PyTree, inputs: PyTree) -> Array:
        outputs: Array = self.with_aux(params, inputs)[0]
        return outputs

    def at(self, inputs: PyTree) -> Callable[[PyTree, PyTree], Array]:
        """The same function for such inputs: `fn` itself where that is all, as JAX knows what it has traced by it."""
        return self if self.has_aux or not all(are_batched(inputs)) else self.fn

    def with_aux(self, params: PyTree, inputs: PyTree) -> tuple[Array, PyTree]:
        """The outputs, and what else it returns; None if that is nothing."""
        result = self.fn(params, unwrap(inputs))
        if not self.has_aux:
            return result, None
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"with has_aux=True, model_fn must return a pair (outputs, aux); got {kind(result)}.")
        return result
