"""Which functions are known to treat examples independently, so that operators of one do not check it each time.

What JAX compiled for a function runs whenever it is called again with inputs of the same shapes: operators differ in
the values of parameters and inputs only. These may hide that examples depend on each other, as a gate that starts at 0
does. So the check of a function that comes a second time is also made elsewhere: at parameters that were moved and
examples that have much in common. One that passes there, too, is not checked any more.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jaxtyping import Array, PyTree

from ggn_jax._model import Model
from ggn_jax._unbatched import are_batched

FEW = 2**24  # entries of parameters: the moved ones are a copy
MOVE = 0.1  # by how much of its size a parameter is moved

NEW, ONCE, SETTLED, UNSETTLED = range(4)

_states: "WeakKeyDictionary[Callable[..., Any], dict[Any, int]]" = WeakKeyDictionary()


class Known(NamedTuple):
    """What is known of a function with parameters and examples of some shapes."""

    states: dict[Any, int]
    key: Any

    @classmethod
    def of(cls, model_fn: Any, params: PyTree[Array], inputs: PyTree[Array], examples: int) -> "Known":
        """Nothing is kept of what holds arrays, which may differ next time, or is no function by itself."""
        model = model_fn if isinstance(model_fn, Model) else Model(model_fn)
        fn = model.fn
        if isinstance(fn, jax.tree_util.Partial) and not fn.args and not fn.keywords:
            fn = fn.func
        leaves = jax.tree.leaves(params)
        kept = sum(leaf.size for leaf in leaves) <= FEW and all(_is_on_one_device(leaf) for leaf in leaves)
        if not kept or not (isinstance(fn, FunctionType) or hasattr(fn, "__func__")):
            return cls({}, None)
        batched = zip(jax.tree.leaves(inputs), are_batched(inputs), strict=True)
        shapes = tuple((x.shape[is_batched:], x.dtype) for x, is_batched in batched)
        of_params = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = model.has_aux, examples, jax.tree.structure((params, inputs)), of_params, shapes
        return cls(_states.setdefault(fn, {}), key)

    @property
    def settled(self) -> bool:
        return self.states.get(self.key, NEW) == SETTLED

    def passed(self, elsewhere: Callable[[], bool]) -> None:
        """Note that the function passed the check; the second time, whether it does so elsewhere."""
        state = self.states.get(self.key, NEW)
        if state == NEW:
            self.states[self.key] = ONCE
        elif state == ONCE:
            self.states[self.key] = SETTLED if elsewhere() else UNSETTLED


def _is_on_one_device(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.devices()) == 1


def moved(params: PyTree[Array]) -> PyTree[Array]:
    """Parameters in whose neighbourhood none is 0, or equal to another one."""
    rng = np.random.default_rng(0)

    def move(x: Array) -> Array:
        values = np.asarray(x, np.float64)
        size = np.sqrt(np.mean(values**2)) if x.size else 0.0
        drawn = np.resize(rng.standard_normal(min(x.size, 2**16)), x.shape)
        # Committed only if it was, for which JAX compiles again.
        other = (values + MOVE * (size or 1.0) * drawn).astype(x.dtype)
        return jax.device_put(other, x.sharding if x.committed else None)

    return jax.tree.map(move, params)
