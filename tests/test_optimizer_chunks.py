"""The optimizer on parts of a batch; what counts as a step; which layers a batch's factors belong to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_cases import CE, KEY, MSE, assert_close, batch_of, gradient, mlp, mlp_params, normal

import ggn_jax


@pytest.mark.parametrize(
    "options",
    [
        {"factor_interval": 2},
        {"ekfac": True},
        {"learning_rate": ggn_jax.QuadraticModel(), "damping": ggn_jax.LevenbergMarquardt(0.1, interval=1)},
        {"fisher_type": "empirical", "damping_method": "exact"},
    ],
)
@pytest.mark.by_default("options0")
def test_chunks_give_the_steps_of_the_whole_batch(options: Any) -> None:
    """12 examples in parts of 5, 5 and 2, or in one: values, gradients, factors, learning rates and dampings."""
    batch = batch_of()

    def run(chunk_size: int | None) -> Any:
        arguments = {"learning_rate": 0.1, "damping": 0.1, **options}
        optimizer = ggn_jax.kfac(mlp, CE, example_inputs=batch[0], chunk_size=chunk_size, **arguments)
        params = mlp_params()
        state = optimizer.init(params)

        @jax.jit
        def step(params: Any, state: Any, key: jax.Array) -> Any:
            value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
            updates, state = optimizer.update(grads, state, params, batch=batch, factors=factors)
            return optax.apply_updates(params, updates), state, value

        values = []
        for t in range(3):
            params, state, value = step(params, state, jax.random.key(t))
            values.append(value)
        return params, state.curvature.blocks, values  # eigenvectors have a free sign

    for chunk_size in (5, 12) if "ekfac" in options else (5,):
        assert_close(run(chunk_size), run(None), 1e-9)


def test_a_chunk_of_ignored_targets_and_one_of_padding() -> None:
    loss = ggn_jax.CrossEntropyLoss(ignore_index=-1)
    inputs, targets = batch_of()
    targets = targets.at[:4].set(-1)
    optimizer = [ggn_jax.kfac(mlp, loss, 0.1, example_inputs=inputs, chunk_size=n) for n in (4, None)]
    params = mlp_params()
    found = [o.value_and_grad_and_factors(params, (inputs, targets), o.init(params), key=KEY) for o in optimizer]
    assert_close(*found, 1e-12)


@pytest.mark.parametrize(("reduction", "every"), [("sum", None), ("mean", 2)])
@pytest.mark.by_default("sum-None")
def test_a_batch_of_ignored_targets_is_no_step(reduction: str, every: int | None) -> None:
    loss = ggn_jax.CrossEntropyLoss(ignore_index=-1, reduction=reduction)
    inputs, targets = batch_of()
    params, nothing = mlp_params(), jnp.full_like(targets, -1)
    optimizer: Any = ggn_jax.kfac(mlp, loss, 0.1, example_inputs=inputs)
    if every is not None:
        optimizer = ggn_jax.multi_steps(optimizer, every=every)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for _ in range(every or 1):
        _, state = update(
            gradient(mlp, loss, params, (inputs, targets)), state, params, batch=(inputs, targets), key=KEY
        )
    before = state.inner if every else state
    for _ in range(every or 1):
        grads = gradient(mlp, loss, params, (inputs, nothing))
        updates, state = update(grads, state, params, batch=(inputs, nothing), key=KEY)
    after = state.inner if every else state
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert_close(after.curvature.blocks, before.curvature.blocks, 0)
    assert_close(after.velocity, before.velocity, 0)


def test_layers_whose_order_depends_on_the_inputs_are_refused() -> None:
    """Both weights have one shape, so that the factors' shapes do not tell that they are swapped."""
    params = {"u": normal(0, 3, 3), "v": normal(1, 3, 3)}

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        first, second = ("u", "v") if x.shape[1] == 4 else ("v", "u")
        return jnp.sum(jnp.tanh(x @ params[first]) @ params[second], axis=1)

    optimizer = ggn_jax.kfac(model_fn, MSE, 0.1, example_inputs=normal(2, 5, 4, 3))
    state = optimizer.init(params)
    optimizer.factors(params, (normal(2, 5, 4, 3), normal(3, 5, 3)), state, key=KEY)
    with pytest.raises(ValueError, match="other factors than for example_inputs"):
        optimizer.factors(params, (normal(2, 5, 6, 3), normal(3, 5, 3)), state, key=KEY)


def test_chunk_size_is_checked() -> None:
    with pytest.raises((TypeError, ValueError), match="chunk_size"):
        ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch_of()[0], chunk_size=0)
