"""What the optimizer does where training goes wrong: NaN, batches without terms, inverses that fail."""

from functools import cache
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizer_cases import (
    CE,
    KEY,
    MSE,
    assert_close,
    batch_of,
    finite,
    gradient,
    is_zero,
    linear,
    mlp,
    mlp_params,
    normal,
)

import ggn_jax


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_with_nan_is_left_out(first: bool) -> None:
    params, batch = mlp_params(), batch_of()
    optimizer = ggn_jax.kfac(mlp, CE, 0.1, damping=0.1, example_inputs=batch[0])
    state = optimizer.init(params)
    step = jax.jit(lambda p, s, b, k: optimizer.update(gradient(mlp, CE, p, b), s, p, batch=b, key=k))
    if not first:
        _, state = step(params, state, batch, KEY)
    bad = batch[0].at[0, 0].set(jnp.nan), batch[1]
    updates, after = step(params, state, bad, KEY)
    assert is_zero(updates)
    assert (int(after.rejected), int(after.curvature.skipped)) == (1, 1)
    for name in ("weight", "blocks", "inverses"):
        assert_close(getattr(after.curvature, name), getattr(state.curvature, name), 0)
    assert_close(after.velocity, state.velocity, 0)
    updates, after = step(params, after, batch, KEY)
    assert finite((updates, after))
    assert np.asarray(updates["u"]).any()


@pytest.mark.parametrize(
    "options",
    [{}, {"ekfac": True}, {"damping_method": "exact"}, {"learning_rate": ggn_jax.QuadraticModel(momentum=False)}],
)
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e6]),
    ignored=st.sampled_from(["none", "some", "all"]),
    data=st.data(),
)
@pytest.mark.by_default("options2")
def test_steps_are_finite(options: Any, scale: float, ignored: str, data: Any) -> None:
    """Batches of one or four, inputs that are all 0, singular factors, masked batches, zero gradients."""
    params, size = mlp_params(jnp.float32), 4 if options else 1  # two sizes are compiled twice
    optimizer, step = _optimizer_for_finite_steps(tuple(sorted({"learning_rate": 0.1, **options}.items())))
    x = scale * normal(data.draw(st.integers(0, 3)), size, 3, dtype=jnp.float32)
    targets = {"none": np.zeros(size, int), "some": np.arange(size) % 2 - 1, "all": np.full(size, -1)}[ignored]
    state = optimizer.init(params)
    for t in range(2):
        updates, state = step(params, state, (x, targets), jax.random.key(t))
        assert finite((updates, state))
        if ignored == "all":
            assert float(state.curvature.weight) == 0
        if ignored == "all" or int(state.rejected):
            assert is_zero(updates)
    assert int(state.curvature.skipped) == 0
    # Such factors are singular to rounding in spite of the damping.
    assert int(state.rejected) == 0 or scale == 1e6


@cache
def _optimizer_for_finite_steps(options: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    loss = ggn_jax.CrossEntropyLoss(ignore_index=-1)
    example = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    optimizer = ggn_jax.kfac(mlp, loss, example_inputs=example, damping=1e-3, **dict(options))

    @jax.jit
    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        return optimizer.update(gradient(mlp, loss, params, batch), state, params, batch=batch, key=key)

    return optimizer, step


def test_scale_by_kfac_leaves_nan_out() -> None:
    params, batch = mlp_params(), batch_of()
    scale = ggn_jax.scale_by_kfac(mlp, CE, damping=0.1, example_inputs=batch[0])
    step = jax.jit(lambda s, b, k: scale.update(gradient(mlp, CE, params, b), s, params, batch=b, key=k))
    _, state = step(scale.init(params), batch, KEY)
    updates, state = step(state, (batch[0].at[0, 0].set(jnp.nan), batch[1]), KEY)
    assert is_zero(updates)
    assert (int(state.rejected), int(state.curvature.skipped)) == (1, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.by_default("mean")
def test_an_ignored_batch_says_nothing(reduction: str) -> None:
    """Also where the gradient is not 0, as with a penalty on the parameters."""
    loss = ggn_jax.CrossEntropyLoss(ignore_index=-1, reduction=reduction)
    params, (x, y) = {"w": normal(0, 3, 2)}, batch_of()
    scale = ggn_jax.scale_by_kfac(linear, loss, example_inputs=x)
    update = jax.jit(lambda state, y: scale.update(params, state, params, batch=(x, y), key=KEY))
    moved, state = update(scale.init(params), y)
    nothing = jnp.full(len(x), -1)
    assert is_zero(scale.factors(params, (x, nothing), state, key=KEY))
    updates, after = update(state, nothing)
    assert not is_zero(moved)
    assert is_zero(updates)
    assert_close(after.curvature._replace(count=state.curvature.count), state.curvature, 0)


@pytest.mark.parametrize("rate", [0.1, ggn_jax.QuadraticModel()])
@pytest.mark.by_default("rate1")
def test_an_ignored_batch_is_no_step(rate: Any) -> None:
    """Only the number of steps changes: not the averages, the momentum or the damping."""
    loss = ggn_jax.CrossEntropyLoss(ignore_index=-1)
    params, (x, y) = {"w": normal(0, 3, 2)}, batch_of()
    damping = ggn_jax.LevenbergMarquardt(0.1, interval=1)
    optimizer = ggn_jax.kfac(linear, loss, rate, example_inputs=x, damping=damping, fisher_type="type-2")
    step = jax.jit(lambda s, b: optimizer.update(gradient(linear, loss, params, b), s, params, batch=b))
    _, before = step(optimizer.init(params), (x, y))
    assert not is_zero(before.velocity)
    updates, after = step(before, (x, jnp.full(len(x), -1)))
    assert is_zero(updates)
    assert int(after.curvature.count) == 2
    assert_close(after._replace(curvature=after.curvature._replace(count=before.curvature.count)), before, 0)


@pytest.mark.sweep
def test_micro_batches_that_say_nothing() -> None:
    loss = ggn_jax.CrossEntropyLoss(ignore_index=-1)
    params, (x, y) = {"w": normal(0, 3, 2)}, batch_of()
    inner = ggn_jax.kfac(linear, loss, 0.1, example_inputs=x, damping=0.1, fisher_type="type-2")
    optimizer = ggn_jax.multi_steps(inner, 2)
    step = jax.jit(lambda s, b: optimizer.update(gradient(linear, loss, params, b), s, params, batch=b))
    bad, ignored, good = (x.at[0].set(jnp.nan), y), (x, jnp.full(len(x), -1)), (x, y)
    state, results = optimizer.init(params), []
    for pair in ((bad, bad), (bad, ignored), (ignored, ignored), (good, ignored), (good, good)):
        for batch in pair:
            updates, state = step(state, batch)
            assert finite((updates, state))
        results.append((is_zero(updates), int(state.inner.rejected), int(state.skipped)))
    assert results == [(True, 1, 2), (True, 2, 3), (True, 2, 3), (False, 2, 3), (False, 2, 3)]
    # What is ignored is not in the mean.
    alone, _ = jax.jit(inner.update)(gradient(linear, loss, params, good), inner.init(params), params, batch=good)
    state = optimizer.init(params)
    for batch in (ignored, good):
        updates, state = step(state, batch)
    assert_close(updates, alone)


def test_a_failed_inverse_leaves_the_last() -> None:
    params, batch = {"w": normal(0, 3, 2)}, (normal(1, 9, 3), normal(2, 9, 2))
    scale = ggn_jax.scale_by_kfac(
        linear, MSE, example_inputs=batch[0], damping=0.0, decay=0.0, inverse_interval=1, fisher_type="type-2"
    )
    grads = gradient(linear, MSE, params, batch)
    wanted, state = scale.update(grads, scale.init(params), params, batch=batch)
    singular = jnp.zeros_like(batch[0]), batch[1]
    got, after = scale.update(grads, state, params, batch=singular)
    assert_close(got, wanted)
    assert finite(after)


def test_steps_without_an_inverse_are_counted() -> None:
    """With damping 0, a first batch whose factor is singular has none."""
    params, batch = {"w": normal(0, 3, 2)}, (normal(1, 9, 3), normal(2, 9, 2))
    optimizer = ggn_jax.kfac(linear, MSE, 0.1, example_inputs=batch[0], damping=0.0, decay=0.0, fisher_type="type-2")
    step = jax.jit(lambda s, b: optimizer.update(gradient(linear, MSE, params, b), s, params, batch=b))
    singular = batch[0].at[:, 0].set(0.0), batch[1]
    state = optimizer.init(params)
    for t in range(2):
        updates, state = step(state, singular)
        assert is_zero((updates, state.velocity))
        assert int(state.rejected) == t + 1
    updates, state = step(state, batch)
    assert not is_zero(updates)
    assert int(state.rejected) == 2
