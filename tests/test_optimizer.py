"""KFAC as optax transformations, against dense algebra from automatic differentiation of the real loss."""

from functools import cache, partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ggn_jax
from ggn_jax.kronecker.algebra import batched
from ggn_jax.optimizer.curvature import take_turns
from ggn_jax.optimizer.shares import share_out, shared_over

MSE = ggn_jax.MSELoss()
CE = ggn_jax.CrossEntropyLoss()
KEY = jax.random.key(0)


def normal(seed: int, *shape: int, dtype: Any = jnp.float64) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def deep_linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["u"] @ params["v"] @ params["w"]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["u"] + params["c"][None]) @ params["v"] + params["d"][None]


def mlp_params(dtype: Any = jnp.float64) -> Any:
    return {
        "u": normal(1, 3, 4, dtype=dtype),
        "c": normal(2, 4, dtype=dtype),
        "v": normal(3, 4, 2, dtype=dtype),
        "d": normal(4, 2, dtype=dtype),
    }


def batch_of(size: int = 12, seed: int = 5, dtype: Any = jnp.float64) -> tuple[jax.Array, jax.Array]:
    return normal(seed, size, 3, dtype=dtype), jax.random.randint(jax.random.key(seed), (size,), 0, 2)


def objective(model_fn: Any, loss: Any, params: Any, batch: Any) -> jax.Array:
    return loss(model_fn(params, batch[0]), batch[1])


def gradient(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    return jax.grad(partial(objective, model_fn, loss))(params, batch)


def dense_ggn(model_fn: Any, loss: Any, params: Any, batch: Any) -> np.ndarray:
    """`J^T H J` of the whole batch from automatic differentiation."""
    flat, unravel = ravel_pytree(params)
    outputs = model_fn(params, batch[0])
    jacobian = jax.jacobian(lambda p: model_fn(unravel(p), batch[0]).reshape(-1))(flat)
    hessian = jax.hessian(lambda f: loss(f.reshape(outputs.shape), batch[1]))(outputs.reshape(-1))
    return np.asarray(jacobian.T @ hessian @ jacobian)


def assert_close(a: Any, b: Any, rtol: float = 1e-9) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=rtol * float(np.abs(y).max() + 1e-30))


PLAIN: dict[str, Any] = {"momentum": None, "damping_method": "exact", "fisher_type": "type-2", "decay": 0.0}


# One step against dense algebra.


def test_linear_model_takes_the_natural_gradient_step() -> None:
    params, batch = {"w": normal(0, 3, 2)}, (normal(1, 9, 3), normal(2, 9, 2))
    optimizer = ggn_jax.kfac(linear, MSE, 0.7, example_inputs=batch[0], damping=0.1, **PLAIN)
    grads = gradient(linear, MSE, params, batch)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, batch=batch)
    flat, unravel = ravel_pytree(grads)
    ggn = dense_ggn(linear, MSE, params, batch)
    assert_close(updates, unravel(-0.7 * np.linalg.solve(ggn + 0.1 * np.eye(6), flat)))


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


def test_averages_heuristic_damping_momentum_decay_and_schedules() -> None:
    """Three steps against numpy: one layer with squared error, `A = x^T x / N` and `B = 2 / out I`."""
    params = {"w": normal(0, 3, 2)}
    optimizer = ggn_jax.kfac(
        linear,
        MSE,
        lambda count: 0.5 / (1.0 + count.astype(float)),
        example_inputs=normal(1, 9, 3),
        damping=lambda count: 0.1 * 0.5 ** count.astype(float),
        momentum=0.8,
        weight_decay=0.03,
        decay=0.6,
        inverse_interval=1,
        fisher_type="type-2",
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
        velocity = 0.8 * velocity - rate * heuristic_step(a / weight, np.eye(2), grad, 0.1 * 0.5**t)
        w = w + velocity - rate * 0.03 * w
        # The state's weight and damping are float32.
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)
    assert float(state.curvature.weight) == pytest.approx(weight, rel=1e-6)
    assert int(state.curvature.count) == 3


@pytest.mark.parametrize("bound", [1e-4, 1e3])
def test_kl_clip(bound: float) -> None:
    params, batch = mlp_params(), batch_of()
    grads = gradient(mlp, CE, params, batch)
    make = partial(ggn_jax.kfac, mlp, CE, 0.5, example_inputs=batch[0], **PLAIN)
    free, clipped = make(), make(kl_clip=bound)
    wanted, _ = free.update(grads, free.init(params), params, batch=batch)
    got, _ = clipped.update(grads, clipped.init(params), params, batch=batch)
    size = 0.5 * -float(ravel_pytree(wanted)[0] @ ravel_pytree(grads)[0])  # lr^2 d^T g
    assert_close(got, jax.tree.map(lambda u: u * min(1, (bound / size) ** 0.5), wanted), rtol=1e-6)
    assert (size > bound) == (bound < 1)


def test_quadratic_learning_rate_and_momentum() -> None:
    params, batches = mlp_params(), [batch_of(seed=5), batch_of(seed=6)]
    optimizer = ggn_jax.kfac(
        mlp, CE, "quadratic", momentum="quadratic", example_inputs=batches[0][0], damping=0.2, fisher_type="type-2"
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
        coefficients = np.linalg.solve(basis.T @ matrix @ basis, -basis.T @ np.asarray(ravel_pytree(grads)[0]))
        last = ravel_pytree(updates)[0]
        np.testing.assert_allclose(last, basis @ coefficients, rtol=1e-7, atol=1e-9)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("rate", [0.01, 30.0])
def test_levenberg_marquardt(rate: float) -> None:
    params, batch = mlp_params(), batch_of()
    grads = gradient(mlp, CE, params, batch)
    optimizer = ggn_jax.kfac(
        mlp, CE, rate, example_inputs=batch[0], damping=0.5, adapt_damping=2, fisher_type="type-2", momentum=None
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
        q, p = (np.kron(np.asarray(s.qb[0]), np.asarray(s.qa[0])) for s in (old, now))
        values = (1 - gain) * old.values[0].reshape(-1) + gain * value[0].reshape(-1)
        matrix = q @ np.diag(values) @ q.T
        np.testing.assert_allclose(now.values[0].reshape(-1), np.diag(p.T @ matrix @ p), rtol=1e-6, atol=1e-12)


# Intervals.


def test_intervals() -> None:
    params, batch = mlp_params(), batch_of()
    scale = ggn_jax.scale_by_kfac(mlp, CE, example_inputs=batch[0], factor_interval=2, inverse_interval=3)
    state, changed = scale.init(params), []
    grads = gradient(mlp, CE, params, batch)
    update = jax.jit(scale.update)
    for t in range(7):
        _, new = update(grads, state, params, batch=batch, key=jax.random.key(t))
        same = [
            all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
            for a, b in zip(state.curvature[-2:], new.curvature[-2:], strict=True)
        ]
        changed.append((not same[0], not same[1]))
        state = new
    assert [c[0] for c in changed] == [t % 2 == 0 for t in range(7)]
    assert [c[1] for c in changed] == [t % 3 == 0 for t in range(7)]


def test_staggered_inverses_are_all_renewed_in_turn() -> None:
    params, batch = mlp_params(), batch_of()
    make = partial(ggn_jax.scale_by_kfac, mlp, CE, example_inputs=batch[0], decay=0.0)
    staggered, plain = make(staggered=True, inverse_interval=2), make(inverse_interval=1)
    state, renewed = staggered.init(params), []
    grads = gradient(mlp, CE, params, batch)
    for t in range(4):
        _, new = jax.jit(staggered.update)(grads, state, params, batch=batch, key=jax.random.key(t))
        _, fresh = jax.jit(plain.update)(grads, plain.init(params), params, batch=batch, key=jax.random.key(t))
        renewed.append(
            [
                bool(np.allclose(a.a[0], b.a[0], rtol=1e-12) and np.allclose(a.b[0], b.b[0], rtol=1e-12))
                for a, b in zip(new.curvature.inverses, fresh.curvature.inverses, strict=True)
            ]
        )
        state = new
    assert renewed[0] == [True, True]
    assert [sum(step) for step in renewed[1:]] == [1, 1, 1]
    assert renewed[1] == renewed[3] != renewed[2]


@hypothesis.given(st.lists(st.integers(0, 10**6), max_size=12), st.integers(1, 6))
def test_turns_hold_everything_once(costs: list[int], turns: int) -> None:
    found = take_turns(costs, turns)
    assert len(found) == turns
    assert sorted(i for turn in found for i in turn) == list(range(len(costs)))
    loads = [sum(costs[i] for i in turn) for turn in found]
    assert max(loads) <= sum(costs) / turns + max(costs, default=0)


# One pass.


def embedding_model(params: Any, x: jax.Array) -> jax.Array:
    h = params["table"][x] + params["position"][None]
    h = h * params["scale"][None, None] + jnp.tanh(h @ params["w"])
    return h @ params["table"].T


def embedding_problem() -> tuple[Any, Any]:
    params = {"table": normal(0, 7, 4), "position": normal(1, 5, 4), "scale": normal(2, 4), "w": normal(3, 4, 4)}
    tokens = jax.random.randint(KEY, (6, 5), 0, 7)
    return params, (tokens, (tokens + 1) % 7)


@pytest.mark.parametrize("ekfac", [False, True])
def test_one_pass_equals_two(ekfac: bool) -> None:
    params, batch = embedding_problem()
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1, ignore_index=3)
    optimizer = ggn_jax.kfac(embedding_model, loss, 0.1, example_inputs=batch[0], ekfac=ekfac)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    _, state = update(params, state, params, batch=batch, key=KEY)  # bases, for EKFAC
    value, grads, factors = jax.jit(optimizer.value_and_grad_and_factors)(params, batch, state, key=KEY)
    wanted = jax.value_and_grad(partial(objective, embedding_model, loss))(params, batch)
    assert_close((value, grads), wanted)
    assert_close(factors, optimizer.factors(params, batch, state, key=KEY))
    updates = update(grads, state, params, batch=batch, key=KEY)
    assert_close(update(grads, state, params, factors=factors), updates)


def test_factors_are_the_operators() -> None:
    params, batch = embedding_problem()
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1)
    scale = ggn_jax.scale_by_kfac(embedding_model, loss, example_inputs=batch[0])
    seen = scale.factors(params, batch, scale.init(params), key=KEY)
    operator = ggn_jax.KFACLinearOperator(embedding_model, loss, params, batch, key=KEY)
    assert_close(seen.blocks, operator.blocks.blocks)
    report = scale.report(params)
    assert {row.parameter for row in report.rows} == {"['table']", "['position']", "['scale']", "['w']"}
    assert "2 terms" in str(report)


def test_multi_steps_are_one_step_of_the_whole() -> None:
    params, (x, y) = mlp_params(), batch_of(12)
    for ekfac in (False, True):
        inner = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=x, fisher_type="type-2", ekfac=ekfac, inverse_interval=1)
        parts = ggn_jax.multi_steps(inner, 3)
        whole_state, state = inner.init(params), parts.init(params)
        update = jax.jit(parts.update)
        for _ in range(2):
            grads = gradient(mlp, CE, params, (x, y))
            wanted, whole_state = inner.update(grads, whole_state, params, batch=(x, y))
            for i in range(3):
                part = x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]
                updates, state = update(gradient(mlp, CE, params, part), state, params, batch=part)
                assert (i == 2) == any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
            assert_close(updates, wanted, 1e-7)


# optax's and Flax's conventions.


def train(optimizer: Any, params: Any, steps: int, **extra: Any) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        batch = batch_of(dtype=params["u"].dtype)
        grads = gradient(mlp, CE, params, batch)
        updates, state = optimizer.update(grads, state, params, batch=batch, key=key, **extra)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for t in range(steps):
        params, state = step(params, state, jax.random.key(t))
    return params, state


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes_are_stable(dtype: Any) -> None:
    params, batch = mlp_params(dtype), batch_of(dtype=dtype)
    optimizer = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0], damping=0.1, weight_decay=1e-3, adapt_damping=1)
    state = optimizer.init(params)
    grads = gradient(mlp, CE, params, batch)
    updates, new = jax.jit(optimizer.update)(grads, state, params, batch=batch, key=KEY)
    for a, b in ((updates, params), (new, state)):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert {x.dtype for x in jax.tree.leaves(new.curvature.blocks)} == {jnp.dtype(wide)}
    # The state stays the same under `lax.cond`.
    choose = jax.jit(
        lambda c: jax.lax.cond(
            c,
            lambda s: optimizer.update(grads, s, params, batch=batch, key=KEY)[1],
            lambda s: s,
            state,
        )
    )
    assert int(choose(True).curvature.count) == 1
    assert int(choose(False).curvature.count) == 0
    before, after = (float(objective(mlp, CE, p, batch)) for p in (params, train(optimizer, params, 10)[0]))
    assert after < before


def test_chain_finds_the_state_and_scan_runs() -> None:
    params, batch = mlp_params(), batch_of()
    scale = ggn_jax.scale_by_kfac(mlp, CE, example_inputs=batch[0], damping=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), scale, optax.scale_by_learning_rate(0.3))

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, grads, factors = scale.value_and_grad_and_factors(params, batch, state, key=key)
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.random.split(KEY, 20)), donate_argnums=0)
    _, values = run((jax.tree.map(jnp.copy, params), optimizer.init(params)))
    assert values[-1] < values[0]
    assert values[0] == pytest.approx(float(objective(mlp, CE, params, batch)))


@pytest.mark.parametrize("way", ["function", "static_args"])
def test_inject_hyperparams(way: str) -> None:
    x = batch_of()[0]
    schedule = optax.linear_schedule(0.2, 0.1, 10)
    if way == "function":
        make: Any = optax.inject_hyperparams(
            lambda learning_rate, damping: ggn_jax.kfac(mlp, CE, learning_rate, damping=damping, example_inputs=x)
        )
        optimizer = make(schedule, damping=0.1)
    else:
        names = (
            "model_fn loss example_inputs adapt_damping factor_interval inverse_interval mc_samples max_dense_size"
            " max_small_size vector_chunk_size"
        )
        make = optax.inject_hyperparams(ggn_jax.kfac, static_args=names.split())
        optimizer = make(mlp, CE, schedule, damping=0.1, example_inputs=x)
    plain = ggn_jax.kfac(mlp, CE, schedule, damping=0.1, example_inputs=x)
    params, state = train(optimizer, mlp_params(), 4)
    wanted, _ = train(plain, mlp_params(), 4)
    assert_close(params, wanted, 1e-6)
    assert {"learning_rate", "damping"} <= set(state.hyperparams)


def test_tree_map_params() -> None:
    params, batch = mlp_params(), batch_of()
    optimizer = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0])
    state = optimizer.init(params)
    mapped = optax.tree.map_params(optimizer, lambda p: p + 1, state, transform_non_params=lambda x: x)
    assert_close(mapped.velocity, jax.tree.map(lambda p: p + 1, state.velocity))
    assert_close(mapped.curvature, state.curvature)


def test_optax_multi_steps() -> None:
    """It works, with the factors of the last micro-batch: `ggn_jax.multi_steps` has those of all."""
    x = batch_of(dtype=jnp.float32)[0]
    optimizer = optax.MultiSteps(ggn_jax.kfac(mlp, CE, 0.1, damping=0.1, example_inputs=x), 2)
    with jax.numpy_dtype_promotion("standard"):  # its own
        _, state = train(optimizer, mlp_params(jnp.float32), 4)
    assert int(state.gradient_step) == 2
    plain = ggn_jax.kfac(mlp, CE, 0.1, damping=0.1, example_inputs=x)
    assert int(state.inner_opt_state.curvature.count) == 2
    assert jax.tree.structure(state.inner_opt_state) == jax.tree.structure(plain.init(mlp_params(jnp.float32)))


def test_masked_parameters() -> None:
    params, batch = mlp_params(), batch_of()
    labels = {"u": "kfac", "c": "kfac", "v": "adam", "d": "adam"}
    inner = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0], damping=0.1, fisher_type="type-2", full_params=params)
    optimizer = optax.multi_transform({"kfac": inner, "adam": optax.adam(1e-2)}, labels)
    state = optimizer.init(params)
    grads = gradient(mlp, CE, params, batch)
    with jax.numpy_dtype_promotion("standard"):  # Adam's own
        updates, state = jax.jit(optimizer.update)(grads, state, params, batch=batch, full_params=params)
    some = {name: params[name] for name in ("u", "c")}
    alone = ggn_jax.kfac(
        lambda p, x: mlp({**params, **p}, x), CE, 0.1, example_inputs=batch[0], damping=0.1, fisher_type="type-2"
    )
    wanted, _ = alone.update({n: grads[n] for n in some}, alone.init(some), some, batch=batch)
    assert_close({n: updates[n] for n in some}, wanted)
    bare = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0])
    with pytest.raises(ValueError, match="full_params"):
        optax.multi_transform({"kfac": bare, "adam": optax.adam(1e-2)}, labels).init(params)


def test_nnx_optimizer() -> None:
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    x, y = batch_of(dtype=jnp.float32)
    model_fn, params = ggn_jax.from_nnx(model)
    tx = ggn_jax.kfac(model_fn, CE, 0.3, example_inputs=x, damping=0.1)
    wanted = tx.update(gradient(model_fn, CE, params, (x, y)), tx.init(params), params, batch=(x, y), key=KEY)[0]
    wanted = optax.apply_updates(params, wanted)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, key: jax.Array) -> jax.Array:
        value, grads = nnx.value_and_grad(lambda model: CE(model(x), y))(model)
        optimizer.update(model, grads, batch=(x, y), key=key)
        return value

    first = step(model, optimizer, KEY)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), wanted, 1e-5)
    for t in range(5):
        last = step(model, optimizer, jax.random.key(t))
    assert last < first


class KFACTrainState(TrainState):
    """`apply_gradients` that passes extra arguments on."""

    def apply_gradients(self, *, grads: Any, **extra: Any) -> Any:
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


def test_linen_train_state() -> None:
    module = linen.Sequential([linen.Dense(4), jnp.tanh, linen.Dense(2)])
    x, y = batch_of(dtype=jnp.float32)
    model_fn, params = ggn_jax.from_linen(module, module.init(KEY, x))
    state = KFACTrainState.create(
        apply_fn=module.apply, params=params, tx=ggn_jax.kfac(model_fn, CE, 0.3, example_inputs=x, damping=0.1)
    )

    @jax.jit
    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        value, grads = jax.value_and_grad(partial(objective, model_fn, CE))(state.params, (x, y))
        return state.apply_gradients(grads=grads, batch=(x, y), key=key), value

    state, first = step(state, KEY)
    for t in range(5):
        state, last = step(state, jax.random.key(t))
    assert last < first
    assert int(state.step) == 6


def test_orbax_checkpoint_continues_bit_identically(tmp_path: Any) -> None:
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax comes with Flax")
    x = batch_of()[0]
    optimizer = optax.chain(
        ggn_jax.kfac(mlp, CE, 0.1, example_inputs=x, damping=0.1, adapt_damping=2, ekfac=True), optax.zero_nans()
    )

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        batch = batch_of()
        updates, state = optimizer.update(gradient(mlp, CE, params, batch), state, params, batch=batch, key=key)
        return optax.apply_updates(params, updates), state

    params = mlp_params()
    state = optimizer.init(params)
    for t in range(3):
        params, state = step(params, state, jax.random.key(t))
    # Modules are pytrees that orbax does not know: it is given their leaves.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", jax.tree.leaves((params, state)))
        checkpointer.wait_until_finished()
        leaves = checkpointer.restore(tmp_path / "state", jax.tree.leaves((params, state)))
    restored = jax.tree.unflatten(jax.tree.structure((params, state)), leaves)
    for t in range(3, 6):
        params, state = step(params, state, jax.random.key(t))
        restored = step(*restored, jax.random.key(t))
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(restored), strict=True):
        assert np.array_equal(a, b)


# Several devices.


def mesh_of(size: int) -> Mesh:
    if len(jax.devices()) < size:
        pytest.skip(f"needs {size} devices, here are {len(jax.devices())}")
    return Mesh(np.array(jax.devices()[:size]), ("data",))


@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"staggered": True, "inverse_interval": 2}])
def test_sharded_batch_and_shared_inverses_give_the_same_steps(options: Any) -> None:
    mesh = mesh_of(2)
    batch = batch_of()
    sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(mlp_params(), NamedSharding(mesh, P()))

    def run(optimizer: Any, params: Any, batch: Any) -> Any:
        @jax.jit
        def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
            _, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
            updates, state = optimizer.update(grads, state, params, factors=factors)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for t in range(3):
            params, state = step(params, state, batch, jax.random.key(t))
        return params

    make = partial(ggn_jax.kfac, mlp, CE, 0.1, damping=0.1, example_inputs=batch[0], **options)
    wanted = run(make(), mlp_params(), batch)
    assert_close(run(make(mesh=mesh), params, sharded), wanted, 1e-8)
    assert_close(run(make(), params, sharded), wanted, 1e-8)


def test_each_device_factorises_its_share() -> None:
    mesh = mesh_of(2)
    matrices = [normal(i, 1 + i % 2, n, n) for i, n in enumerate((5, 3, 5, 8))]
    matrices = [m @ jnp.swapaxes(m, 1, 2) for m in matrices]
    calls: list[int] = []

    def fn(x: jax.Array) -> tuple[jax.Array, ...]:
        jax.debug.callback(lambda _: calls.append(x.shape[-1]), x[0, 0])
        return tuple(jnp.linalg.eigh(x))

    shared = jax.jit(partial(shared_over(mesh), fn))(matrices)
    jax.effects_barrier()
    assert sorted(calls) == sorted(m.shape[1] for m in matrices for _ in range(m.shape[0]))  # each once
    for pair, wanted in zip(shared, batched(lambda x: tuple(jnp.linalg.eigh(x)), matrices), strict=True):
        assert_close(pair, wanted, 1e-10)


@hypothesis.given(st.lists(st.integers(1, 512), min_size=1, max_size=20), st.sampled_from([1, 2, 4, 8]))
def test_shares_are_about_even(sizes: list[int], devices: int) -> None:
    shares = share_out(sizes, devices)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] ** 3 for i in share) for share in shares]
    assert max(loads) <= sum(loads) / devices + max(sizes) ** 3


# What goes wrong in training.


def finite(tree: Any) -> bool:
    return all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(tree))


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
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
    assert (int(after.rejected), int(after.curvature.skipped)) == (1, 1)
    for name in ("weight", "blocks", "inverses"):
        assert_close(getattr(after.curvature, name), getattr(state.curvature, name), 0)
    assert_close(after.velocity, state.velocity, 0)
    updates, after = step(params, after, batch, KEY)
    assert finite((updates, after))
    assert np.asarray(updates["u"]).any()


@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"damping_method": "exact"}, {"learning_rate": "quadratic"}])
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    size=st.sampled_from([1, 4]),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e6]),
    ignored=st.sampled_from(["none", "some", "all"]),
    data=st.data(),
)
def test_steps_are_finite(options: Any, size: int, scale: float, ignored: str, data: Any) -> None:
    """Batches of one, inputs that are all 0, singular factors, masked batches, zero gradients."""
    params = mlp_params(jnp.float32)
    optimizer, step = _optimizer_for_finite_steps(tuple(sorted({"learning_rate": 0.1, **options}.items())))
    x = scale * normal(data.draw(st.integers(0, 3)), size, 3, dtype=jnp.float32)
    targets = {"none": jnp.zeros(size, int), "some": jnp.arange(size) % 2 - 1, "all": jnp.full(size, -1)}[ignored]
    state = optimizer.init(params)
    for t in range(2):
        updates, state = step(params, state, (x, targets), jax.random.key(t))
        assert finite((updates, state))
        if ignored == "all":
            assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
            assert float(state.curvature.weight) == 0
    assert (int(state.curvature.skipped), int(state.rejected)) == (0, 0)


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
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
    assert (int(state.rejected), int(state.curvature.skipped)) == (1, 1)


def test_factors_of_an_ignored_batch_are_nothing() -> None:
    loss = ggn_jax.CrossEntropyLoss(ignore_index=-1)
    params, (x, _) = mlp_params(), batch_of()
    scale = ggn_jax.scale_by_kfac(mlp, loss, example_inputs=x)
    seen = scale.factors(params, (x, jnp.full(len(x), -1)), scale.init(params), key=KEY)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(seen))


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


# Arguments.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rate": "best"}, ValueError, "learning_rate must be a number or 'quadratic'"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be a number of at least 0"),
        ({"momentum": "quadratic"}, ValueError, "comes with learning_rate='quadratic'"),
        ({"momentum": 1.5}, ValueError, "momentum must be a number from 0 to 1"),
        ({"damping": -1e-3}, ValueError, "damping must be a number of at least 0"),
        ({"damping": jnp.ones(2)}, ValueError, "damping must be a number; got an array"),
        ({"damping": float("nan")}, ValueError, "damping must be a number"),
        ({"damping": lambda t: 0.1, "adapt_damping": 5}, ValueError, "got a schedule"),
        ({"adapt_damping": 0}, ValueError, "adapt_damping must be an integer of at least 1"),
        ({"inverse_interval": 2.5}, TypeError, "inverse_interval must be an integer"),
        ({"damping_method": "other"}, ValueError, "damping_method must be 'heuristic' or 'exact'"),
        ({"ekfac": True, "fisher_type": "forward-only"}, NotImplementedError, "ekfac"),
        ({"mesh": 2}, TypeError, "mesh must be a jax.sharding.Mesh"),
        ({"sharing": "other"}, ValueError, "sharing must be one of"),
        ({"loss": lambda f, y: 0.0}, NotImplementedError, "loss"),
        ({"model_fn": 3}, TypeError, "model_fn must be a function"),
        ({"example_inputs": [1.0]}, TypeError, "example_inputs"),
    ],
)
def test_bad_settings(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model_fn": mlp, "loss": CE, "learning_rate": 0.1, "example_inputs": batch_of()[0], **change}
    with pytest.raises(error, match=message):
        ggn_jax.kfac(**given)


def test_bad_updates() -> None:
    params, batch = mlp_params(), batch_of()
    optimizer = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0])
    state, grads = optimizer.init(params), params
    with pytest.raises(ValueError, match="needs params"):
        optimizer.update(grads, state, batch=batch, key=KEY)
    with pytest.raises(TypeError, match="needs batch="):
        optimizer.update(grads, state, params)
    with pytest.raises(TypeError, match="batch must be"):
        optimizer.update(grads, state, params, batch=batch[0], key=KEY)
    with pytest.raises(ValueError, match="needs a key"):
        optimizer.update(grads, state, params, batch=batch)
    with pytest.raises(TypeError, match="factors must be"):
        optimizer.update(grads, state, params, factors=batch)
    with pytest.raises(ValueError, match="grads must be a pytree like params"):
        optimizer.update({"u": grads["u"]}, state, params, batch=batch, key=KEY)
    with pytest.raises(ValueError, match=r"grads\['u'\] must have the parameter's shape"):
        optimizer.update({**grads, "u": grads["v"]}, state, params, batch=batch, key=KEY)
    with pytest.raises(ValueError, match="one kfac or scale_by_kfac"):
        optimizer.value_and_grad_and_factors(params, batch, (), key=KEY)
    quadratic = ggn_jax.kfac(mlp, CE, "quadratic", example_inputs=batch[0])
    factors = quadratic.factors(params, batch, state, key=KEY)
    with pytest.raises(TypeError, match="also with factors"):
        quadratic.update(grads, quadratic.init(params), params, factors=factors)
    with pytest.raises(TypeError, match="floating"):
        optimizer.init({"w": jnp.arange(3)})


def test_what_looks_at_the_whole_batch_is_refused_for_micro_batches() -> None:
    x, y = batch_of()
    optimizer = ggn_jax.kfac(mlp, CE, "quadratic", example_inputs=x)
    with pytest.raises(NotImplementedError, match="multi_steps keeps no micro-batches"):
        ggn_jax.multi_steps(optimizer, 2)
    plain, params = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=x), mlp_params()
    with pytest.raises(ValueError, match="fits no layer"):
        plain.update(params, plain.init(params), params, batch=(x, y, jnp.ones((len(x), 5), bool)), key=KEY)


def test_coupled_examples_are_refused() -> None:
    def normalised(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, (x - x.mean(axis=0, keepdims=True)) / x.std(axis=0, keepdims=True))

    optimizer = ggn_jax.kfac(normalised, CE, 0.1, example_inputs=batch_of()[0])
    with pytest.raises(ValueError, match="couples examples"):
        optimizer.init(mlp_params())


def test_uncovered_parameters_are_refused_or_named() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.cond(True, lambda w: x @ w, lambda w: x @ w, params["w"]) @ params["v"]

    params, x = {"v": normal(0, 2, 2), "w": normal(1, 3, 2)}, batch_of()[0]
    with pytest.raises(NotImplementedError, match=r"params\['w'\]"):
        ggn_jax.kfac(model, CE, 0.1, example_inputs=x).init(params)
    optimizer = ggn_jax.kfac(model, CE, 0.1, example_inputs=x, on_uncovered="diagonal")
    row = next(row for row in optimizer.report(params).rows if row.parameter == "['w']")
    assert row.curvature == "diagonal 6"
    assert row.why.startswith("uncovered")
    capped = ggn_jax.kfac(model, CE, 0.1, example_inputs=x, on_uncovered="full", max_dense_size=2)
    rows = {row.parameter: row for row in capped.report(params).rows}
    assert rows["['w']"].curvature == "diagonal 6"
