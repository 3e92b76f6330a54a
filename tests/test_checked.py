"""Which functions are not checked again for examples that depend on each other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggn_jax
from ggn_jax.layers import check

X = np.random.default_rng(0).normal(size=(6, 3))
PARAMS = {"w": jnp.ones((3, 2))}


def plain(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"])


def gated(params: Any, x: jax.Array) -> jax.Array:
    """A gate that starts at 0, where it has no derivative either."""
    return x @ params["w"] * (1 + params["gate"] ** 2 * jnp.mean(x))


def grouped(params: Any, inputs: Any) -> jax.Array:
    """Means over the examples of a group."""
    groups, x = inputs
    same = (groups[:, None] == groups[None]).astype(x.dtype)
    return same @ x / jnp.sum(same, axis=1)[:, None] @ params["w"]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """How many times a model is run for the check when an operator is made."""
    runs, both_ways = [], check._both_ways
    monkeypatch.setattr(check, "_both_ways", lambda *args: (runs.append(1), both_ways(*args))[1])

    def count(model_fn: Any, params: Any, inputs: Any) -> int:
        runs.clear()
        ggn_jax.GGNLinearOperator(model_fn, ggn_jax.MSELoss(), params, (inputs, jnp.zeros((6, 2))), chunk_size=3)
        return len(runs)

    return count


def test_a_function_is_checked_twice(checks: Callable[..., int]) -> None:
    """And, the second time, elsewhere; functions of their own, which JAX compiles again, as often as they come."""
    assert [checks(plain, PARAMS, X) for _ in range(4)] == [1, 2, 0, 0]
    assert checks(plain, {"w": jnp.ones((2, 2))}, X[:, :2]) == 1
    assert [checks(lambda p, x: plain(p, x), PARAMS, X) for _ in range(3)] == [1, 1, 1]


def test_values_that_hide_it(checks: Callable[..., int]) -> None:
    closed = PARAMS | {"gate": jnp.zeros(())}
    assert [checks(gated, closed, X) for _ in range(4)] == [1, 2, 1, 1]
    with pytest.raises(ValueError, match="couples examples"):
        checks(gated, closed | {"gate": jnp.ones(())}, X)
    assert [checks(grouped, PARAMS, (jnp.arange(6), X)) for _ in range(4)] == [1, 2, 1, 1]
    with pytest.raises(ValueError, match="couples examples"):
        checks(grouped, PARAMS, (jnp.arange(6) // 2, X))
