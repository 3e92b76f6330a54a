"""KFAC as optax transformations, against dense algebra from automatic differentiation of the real loss."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from optimizer_cases import (
    CE,
    MSE,
    assert_close,
    batch_of,
    deep_linear,
    gradient,
    linear,
    mlp,
    mlp_params,
    normal,
    objective,
)
from oracles import dense_ggn

import ggn_jax

PLAIN: dict[str, Any] = {
    "momentum": None,
    "kl_clip": None,
    "damping_method": "exact",
    "fisher_type": "type-2",
    "decay": 0.0,
}


def test_linear_model_takes_the_natural_gradient_step() -> None:
    params, batch = {"w": normal(0, 3, 2)}, (normal(1, 9, 3), normal(2, 9, 2))
    optimizer = ggn_jax.kfac(linear, MSE, 0.7, example_inputs=batch[0], damping=0.1, **PLAIN)
    grads = gradient(linear, MSE, params, batch)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, batch=batch)
    flat, unravel = ravel_pytree(grads)
    ggn = dense_ggn(linear, MSE, params, batch)
    assert_close(updates, unravel(-0.7 * np.linalg.solve(ggn + 0.1 * np.eye(6), flat)))


@pytest.mark.sweep
def test_deep_linear_model_takes_the_block_diagonal_step() -> None:
    params = {"u": normal(0, 3, 4), "v": normal(1, 4, 5), "w": normal(2, 5, 2)}
    batch = normal(3, 20, 3), normal(4, 20, 2)
    optimizer = ggn_jax.kfac(deep_linear, MSE, 1.0, example_inputs=batch[0], damping=0.05, **PLAIN)
    grads = gradient(deep_linear, MSE, params, batch)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params, batch=batch)
    ggn, start = dense_ggn(deep_linear, MSE, params, batch), 0
    for name in params:
        size = params[name].size
        block = ggn[start : start + size, start : start + size]
        step = -np.linalg.solve(block + 0.05 * np.eye(size), grads[name].reshape(-1))
        np.testing.assert_allclose(updates[name].reshape(-1), step, rtol=1e-9)
        start += size


def heuristic_step(a: np.ndarray, b: np.ndarray, grad: np.ndarray, damping: float) -> np.ndarray:
    """For a weight `[in, out]`."""
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(b) / len(b)))
    left = np.linalg.inv(a + pi * np.sqrt(damping) * np.eye(len(a)))
    return left @ grad @ np.linalg.inv(b + np.sqrt(damping) / pi * np.eye(len(b)))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.by_default("True")
def test_averages_heuristic_damping_momentum_decay_and_schedules(nesterov: bool) -> None:
    """Three steps against numpy: one layer with squared error, `A = x^T x / N` and `B = 2 / out I`."""
    params = {"w": normal(0, 3, 2)}
    optimizer = ggn_jax.kfac(
        linear,
        MSE,
        lambda count: 0.5 / (1.0 + count.astype(float)),
        example_inputs=normal(1, 9, 3),
        damping=lambda count: 0.1 * 0.5 ** count.astype(float),
        momentum=0.8,
        nesterov=nesterov,
        kl_clip=None,
        weight_decay=0.03,
        decay=0.6,
        inverse_interval=1,
        fisher_type="type-2",
        mc_samples=0,  # of no effect
    )
    state, w = optimizer.init(params), np.asarray(params["w"])
    a, velocity, weight = np.zeros((3, 3)), np.zeros((3, 2)), 0.0
    for t in range(3):
        x, y = np.asarray(normal(10 + t, 7, 3)), np.asarray(normal(20 + t, 7, 2))
        batch = jnp.asarray(x), jnp.asarray(y)
        grads = gradient(linear, MSE, params, batch)
        updates, state = optimizer.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        grad = 2 / y.size * x.T @ (x @ w - y)
        a, weight = 0.6 * a + 0.4 * x.T @ x / 7, 0.6 * weight + 0.4
        rate = 0.5 / (1 + t)
        step = rate * heuristic_step(a / weight, np.eye(2), grad, 0.1 * 0.5**t)
        velocity = 0.8 * velocity - step
        w = w + (0.8 * velocity - step if nesterov else velocity) - rate * 0.03 * w
        # The state's weight and damping are float32.
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)
    assert float(state.curvature.weight) == pytest.approx(weight, rel=1e-6)
    assert int(state.curvature.count) == 3


def test_kl_clip() -> None:
    params, batch = mlp_params(), batch_of()
    grads = gradient(mlp, CE, params, batch)
    make = partial(ggn_jax.kfac, mlp, CE, 0.5, example_inputs=batch[0])
    bounds = [1e-4, 1e3, "auto"]

    @jax.jit
    def updates(params: Any, grads: Any) -> list[Any]:
        made = [make(**{**PLAIN, "kl_clip": bound}) for bound in (None, *bounds)]
        return [one.update(grads, one.init(params), params, batch=batch) for one in made]

    (wanted, _), *clipped = updates(params, grads)
    size = 0.5 * -float(ravel_pytree(wanted)[0] @ ravel_pytree(grads)[0])  # lr^2 d^T g
    for bound, (got, state) in zip(bounds, clipped, strict=True):
        most: Any = 1e-3 if bound == "auto" else bound
        assert_close(got, jax.tree.map(lambda u, most=most: u * min(1, (most / size) ** 0.5), wanted), rtol=1e-6)
        assert (size > most) == (most < 1)
        logged = make(**PLAIN).statistics((state,))
        norm = float(jnp.linalg.norm(ravel_pytree(got)[0]))
        numbers = {"step": 1, "clipped": int(size > most), "kl": min(size, most), "step_norm": norm, "momentum": 0}
        numbers |= {"learning_rate": 0.5 * min(1, (most / size) ** 0.5), "damping": 1e-3, "rejected": 0, "skipped": 0}
        assert {name: float(x) for name, x in logged.items()} == pytest.approx(numbers, rel=1e-6)


def test_quadratic_learning_rate_and_momentum() -> None:
    params, batches = mlp_params(), [batch_of(seed=5), batch_of(seed=6)]
    optimizer = ggn_jax.kfac(
        mlp,
        CE,
        example_inputs=batches[0][0],
        damping=ggn_jax.SlopeDamping(0.2),
        fisher_type="type-2",
        kl_clip=1.0,  # above the first step's length, and below the second's
        factor_interval=1,
        inverse_interval=10,  # the rest by the default rule
    )
    scale = ggn_jax.scale_by_kfac(mlp, CE, example_inputs=batches[0][0], damping=0.2, fisher_type="type-2")
    state, scale_state, last = optimizer.init(params), scale.init(params), None
    update, precondition = jax.jit(optimizer.update), jax.jit(scale.update)
    for batch in batches:
        grads = gradient(mlp, CE, params, batch)
        updates, state = update(grads, state, params, batch=batch)
        direction, scale_state = precondition(grads, scale_state, params, batch=batch)
        columns = [ravel_pytree(direction)[0]] + ([] if last is None else [last])
        basis = np.stack([np.asarray(c) for c in columns], axis=1)
        matrix = dense_ggn(mlp, CE, params, batch) + float(np.float32(0.2)) * np.eye(len(basis))
        bend, slope = basis.T @ matrix @ basis, basis.T @ np.asarray(ravel_pytree(grads)[0])
        coefficients = np.linalg.solve(bend, -slope)
        size = coefficients @ bend @ coefficients
        coefficients *= min(1, np.sqrt(1 / size))  # the whole step, momentum included
        last = ravel_pytree(updates)[0]
        np.testing.assert_allclose(last, basis @ coefficients, rtol=1e-7, atol=1e-9)
        params = optax.apply_updates(params, updates)
    # The last step, on the second batch: the slope at its end, against its curvature.
    logged, ratio = optimizer.statistics(state), slope[1] / bend[1, 1]
    assert float(logged["slope_ratio"]) == pytest.approx(ratio, rel=1e-6)
    assert float(logged["damping"]) == pytest.approx(0.2 * (20 / 19) ** np.clip(4 * (ratio - 1), -1, 13), rel=1e-6)
    assert float(logged["momentum"]) == pytest.approx(coefficients[1], rel=1e-6)
    assert size > 1
    assert (float(logged["kl"]), int(logged["clipped"])) == (pytest.approx(1, rel=1e-6), 1)


@pytest.mark.parametrize("rate", [0.01, 30.0])
@pytest.mark.by_default("30.0")
def test_levenberg_marquardt(rate: float) -> None:
    params, batch = mlp_params(), batch_of()
    grads = gradient(mlp, CE, params, batch)
    optimizer = ggn_jax.kfac(
        mlp,
        CE,
        rate,
        example_inputs=batch[0],
        damping=ggn_jax.LevenbergMarquardt(0.5, interval=2),
        fisher_type="type-2",
        momentum=None,
        kl_clip=None,
    )
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params, batch=batch)
    assert float(state.curvature.damping) == pytest.approx(0.5)  # every second step
    updates, state = optimizer.update(grads, state, params, batch=batch)
    step, g = (np.asarray(ravel_pytree(tree)[0]) for tree in (updates, grads))
    matrix = dense_ggn(mlp, CE, params, batch) + 0.5 * np.eye(len(step))
    predicted = g @ step + step @ matrix @ step / 2
    moved = optax.apply_updates(params, updates)
    achieved = float(objective(mlp, CE, moved, batch) - objective(mlp, CE, params, batch))
    good = predicted < 0 and achieved / predicted > 0.75
    bad = predicted >= 0 or achieved / predicted < 0.25
    assert (good, bad) == (rate < 1, rate > 1)
    assert float(state.curvature.damping) == pytest.approx(0.5 * (0.95**2 if good else 0.95**-2), rel=1e-5)
    assert float(state.statistics.reduction_ratio) == pytest.approx(achieved / predicted if good else -np.inf, rel=1e-6)


def test_ekfac_follows_the_operator() -> None:
    params, batch = mlp_params(), batch_of()
    grads = gradient(mlp, CE, params, batch)
    options: dict[str, Any] = {"fisher_type": "type-2"}
    scale = ggn_jax.scale_by_kfac(
        mlp, CE, example_inputs=batch[0], damping=0.01, ekfac=True, decay=0.0, inverse_interval=1, **options
    )
    state = scale.init(params)
    first, state = scale.update(grads, state, params, batch=batch)
    second, state = scale.update(grads, state, params, batch=batch)
    damping = float(np.float32(0.01))
    args = (mlp, CE, params, batch)
    assert_close(first, ggn_jax.KFACLinearOperator(*args, **options).inverse(damping).mv(grads), 1e-7)
    assert_close(second, ggn_jax.EKFACLinearOperator(*args, **options).inverse(damping).mv(grads), 1e-7)


def test_ekfac_keeps_its_diagonal_in_new_bases() -> None:
    """With new factors, the diagonal of the old matrix in the new basis is what is kept."""
    params, batch, other = mlp_params(), batch_of(), batch_of(seed=9)
    scale = ggn_jax.scale_by_kfac(
        mlp, CE, example_inputs=batch[0], ekfac=True, decay=0.5, inverse_interval=1, fisher_type="type-2"
    )
    grads = gradient(mlp, CE, params, batch)
    _, state = scale.update(grads, scale.init(params), params, batch=batch)
    seen = scale.factors(params, other, state)
    _, new = scale.update(grads, state, params, factors=seen)
    gain = 0.5 / 0.75
    for old, now, value in zip(state.curvature.inverses, new.curvature.inverses, seen.corrections, strict=True):
        q, p = (np.kron(np.asarray(s["qb"][0]), np.asarray(s["qa"][0])) for s in (old, now))
        values = (1 - gain) * old["values"][0].reshape(-1) + gain * value[0].reshape(-1)
        matrix = q @ np.diag(values) @ q.T
        np.testing.assert_allclose(now["values"][0].reshape(-1), np.diag(p.T @ matrix @ p), rtol=1e-6, atol=1e-12)
