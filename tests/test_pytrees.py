"""Parameters in every container that JAX knows, or a program registered: the same numbers in the same places."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import ggn_jax

LOSS = ggn_jax.CrossEntropyLoss()
BATCH = jax.device_put(np.random.default_rng(0).normal(size=(4, 3))), jax.device_put(np.arange(4) % 2)
ARRAYS = [jax.device_put(np.random.default_rng(i).normal(size=(3, 3) if i < 2 else (3, 2))) for i in range(3)]

Triple = namedtuple("Triple", ["first", "second", "third"])  # as users write it


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    first: Any
    second: Any
    third: Any


class CallableWeights(eqx.Module):
    """A pytree that can be called, as modules are."""

    first: Any
    second: Any
    third: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        raise AssertionError("parameters are not called")


def leaf_or_inside(leaf: Any) -> st.SearchStrategy[Any]:
    """A leaf, alone or in something, perhaps beside None."""
    return st.sampled_from(
        [leaf, (leaf,), [leaf, None], {"leaf": leaf}, FrozenDict({"a": {"b": leaf}}), (None, {}, leaf)]
    )


CONTAINERS = [
    lambda *leaves: leaves,
    lambda *leaves: list(leaves),
    lambda *leaves: dict(zip("abc", leaves, strict=True)),
    lambda *leaves: FrozenDict(zip("abc", leaves, strict=True)),
    lambda *leaves: OrderedDict(zip("cab", leaves, strict=True)),
    Triple,
    Weights,
    CallableWeights,
]
PARAMS = st.builds(lambda make, *parts: make(*parts), st.sampled_from(CONTAINERS), *map(leaf_or_inside, ARRAYS))


def model_fn(params: Any, x: jax.Array) -> jax.Array:
    """By the leaves in the order in which the containers have them: that of the arrays, but for `OrderedDict`."""
    first, second, third = sorted(jax.tree.leaves(params), key=lambda leaf: -leaf.shape[1])
    return jnp.tanh(jnp.tanh(x @ first) @ second) @ third


def check(params: Any) -> None:
    """Operators by blocks and by products, a step of the optimizer, and the report."""
    leaves = jax.tree.leaves(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    plain = list(leaves)
    for cls, options in ((ggn_jax.GGNLinearOperator, {}), (ggn_jax.KFACLinearOperator, {"fisher_type": "type-2"})):
        operator = cls(model_fn, LOSS, params, BATCH, **options)
        product = operator.mv(params)
        assert jax.tree.structure(product) == jax.tree.structure(params)
        wanted = cls(model_fn, LOSS, plain, BATCH, **options).mv(plain)
        np.testing.assert_allclose(ravel_pytree(product)[0], ravel_pytree(wanted)[0], atol=1e-14)
    assert [row.parameter for row in ggn_jax.report(model_fn, params, BATCH[0]).rows] == names
    optimizer = ggn_jax.kfac(model_fn, LOSS, 0.1, example_inputs=BATCH[0], fisher_type="type-2", weight_decay=0.1)
    state = optimizer.init(params)
    grads = jax.grad(lambda p: LOSS(model_fn(p, BATCH[0]), BATCH[1]))(params)
    updates, _ = optimizer.update(grads, state, params, batch=BATCH)
    assert jax.tree.structure(optax.apply_updates(params, updates)) == jax.tree.structure(params)


def test_containers_in_each_other() -> None:
    first, second, third = ARRAYS
    check(CallableWeights((None, {}, first), FrozenDict({"a": {"b": second}}), OrderedDict({"leaf": [third, None]})))


@pytest.mark.sweep
@given(PARAMS)
@settings(max_examples=5)
def test_any_pytree(params: Any) -> None:
    check(params)


OTHERS = [UserDict(a=ARRAYS[0]), {"a": ARRAYS[0], "name": "text"}, {"a": ARRAYS[0], "size": 3}]


@pytest.mark.parametrize("params", [*OTHERS, None, {}, (None,)])
def test_what_holds_other_things_is_refused_by_name(params: Any) -> None:
    """But for optimizers of nothing, as `optax.masked` makes them."""
    with pytest.raises((TypeError, ValueError), match="params"):
        ggn_jax.GGNLinearOperator(model_fn, LOSS, params, BATCH)
    if jax.tree.leaves(params):
        with pytest.raises((TypeError, ValueError), match="params"):
            ggn_jax.kfac(model_fn, LOSS, 0.1, example_inputs=BATCH[0]).init(params)
