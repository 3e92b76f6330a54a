"""A training step is compiled once for each size of batch; and what to do with a smaller last one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ggn_jax

DOCS = Path(__file__).resolve().parents[1] / "docs" / "training.md"
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled inside."""
    found: list[str] = []
    before = len(COMPILED)
    yield found
    found.extend(COMPILED[before:])


def values(seed: int, *shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).normal(size=shape))


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


LOSS = ggn_jax.CrossEntropyLoss()


def data(seed: int, size: int = 8) -> tuple[Any, Any]:
    """Parameters and a batch."""
    targets = jax.device_put(np.random.default_rng(seed).integers(2, size=size))
    return {"w": values(seed, 3, 4), "v": values(seed, 4, 2)}, (values(seed, size, 3), targets)


ADAPTED = ggn_jax.LevenbergMarquardt(1e-3, interval=2)


@pytest.mark.sweep
def test_steps() -> None:
    """Steps that make new inverses and those that do not; an uneven last batch is compiled again, and nothing else."""
    params, batch = data(0)
    optimizer = ggn_jax.kfac(model, LOSS, optax.linear_schedule(0.1, 0.0, 9), example_inputs=batch[0], damping=ADAPTED)

    @jax.jit
    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
        updates, state = optimizer.update(grads, state, params, batch=batch, factors=factors)
        return optax.apply_updates(params, updates), state, value

    batches, keys = [data(seed)[1] for seed in range(5)], list(jax.random.split(jax.random.key(0), 5))
    state, last = optimizer.init(params), data(7, size=5)[1]
    params, state, _ = step(params, state, batches[0], keys[0])
    with compilations() as found:
        for batch, key in zip(batches[1:], keys[1:], strict=True):
            params, state, _ = step(params, state, batch, key)
    assert not found
    with compilations() as found:
        step(params, state, last, keys[0])
    assert len(found) == 1


def test_padding_to_the_usual_size_changes_nothing() -> None:
    """What docs/training.md says to do with a smaller last batch of sequences."""

    def tokens(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"]) @ params["v"]

    size, length = 8, 4
    loss, (params, _) = ggn_jax.CrossEntropyLoss(class_axis=-1), data(0)
    inputs, targets = values(1, 5, length, 3), jax.device_put(np.random.default_rng(1).integers(2, size=(5, length)))
    optimizer = ggn_jax.kfac(tokens, loss, 0.1, example_inputs=inputs)
    state, key = optimizer.init(params), jax.random.key(0)

    missing = size - len(targets)
    mask = jnp.arange(size)[:, None] < jnp.full((1, length), len(targets))
    padded = (
        jnp.pad(inputs, [(0, missing)] + [(0, 0)] * (inputs.ndim - 1)),
        jnp.pad(targets, [(0, missing), (0, 0)], constant_values=-100),
    )
    look = jax.jit(optimizer.value_and_grad_and_factors)
    got, wanted = look(params, (*padded, mask), state, key=key), look(params, (inputs, targets), state, key=key)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    assert "jnp.pad(targets, [(0, missing), (0, 0)], constant_values=-100)" in DOCS.read_text()
