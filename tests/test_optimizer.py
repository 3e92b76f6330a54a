"""KFAC as optax transformations, against dense algebra from automatic differentiation of the real loss."""

from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizer_cases import (
    CE,
    KEY,
    MSE,
    assert_close,
    batch_of,
    deep_linear,
    gradient,
    is_zero,
    linear,
    mlp,
    mlp_params,
    normal,
    objective,
)
from oracles import dense_ggn

import ggn_jax
from ggn_jax.kronecker.linalg import batched
from ggn_jax.optimizer.renewal import take_turns
from ggn_jax.optimizer.spread import Spread

PLAIN: dict[str, Any] = {
    "momentum": None,
    "kl_clip": None,
    "damping_method": "exact",
    "fisher_type": "type-2",
    "decay": 0.0,
}


# One step against dense algebra.


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
        velocity = 0.8 * velocity - rate * heuristic_step(a / weight, np.eye(2), grad, 0.1 * 0.5**t)
        w = w + velocity - rate * 0.03 * w
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
        damping=0.2,
        fisher_type="type-2",
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
        last = ravel_pytree(updates)[0]
        np.testing.assert_allclose(last, basis @ coefficients, rtol=1e-7, atol=1e-9)
        params = optax.apply_updates(params, updates)
    # The last step, on the second batch: the slope at its end, against its curvature.
    logged, ratio = optimizer.statistics(state), slope[1] / bend[1, 1]
    assert float(logged["slope_ratio"]) == pytest.approx(ratio, rel=1e-6)
    assert float(logged["damping"]) == pytest.approx(0.2 * (20 / 19) ** np.clip(4 * (ratio - 1), -1, 13), rel=1e-6)
    assert float(logged["momentum"]) == pytest.approx(coefficients[1], rel=1e-6)


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
        damping=0.5,
        adapt_damping=2,
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


# Intervals.


def test_intervals() -> None:
    params, batch = mlp_params(), batch_of()
    schedule = lambda count: 0.1 / (1 + count.astype(float))  # noqa: E731  # so that each renewal shows
    scale = ggn_jax.scale_by_kfac(
        mlp, CE, example_inputs=batch[0], damping=schedule, factor_interval=2, inverse_interval=6
    )
    state, changed = scale.init(params), []
    grads = gradient(mlp, CE, params, batch)
    update = jax.jit(scale.update)
    for t in range(14):
        _, new = update(grads, state, params, batch=batch, key=jax.random.key(t))
        same = [
            all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
            for a, b in zip(state.curvature[-2:], new.curvature[-2:], strict=True)
        ]
        changed.append((not same[0], not same[1]))
        state = new
    assert [t for t in range(14) if changed[t][0]] == [0, 1, 2, 4, 6, 8, 10, 12]
    assert [t for t in range(14) if changed[t][1]] == [0, 1, 2, 4, 6, 12]
    for given, factors, inverses in (({}, 5, 5), ({"learning_rate": 0.1}, 1, 10), ({"factor_interval": 3}, 3, 5)):
        settings = ggn_jax.kfac(mlp, CE, example_inputs=batch[0], **given).core.settings
        assert (settings.factor_interval, settings.inverse_interval) == (factors, inverses)


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
                all(np.allclose(a[side][0], b[side][0], rtol=1e-12) for side in ("a", "b"))
                for a, b in zip(new.curvature.inverses, fresh.curvature.inverses, strict=True)
            ]
        )
        state = new
    assert renewed[0] == [True, True]
    assert [sum(step) for step in renewed[1:]] == [1, 1, 1]
    assert renewed[1] == renewed[3] != renewed[2]


@hypothesis.settings(max_examples=20)
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
@pytest.mark.by_default("True")
def test_one_pass_equals_two(ekfac: bool) -> None:
    params, batch = embedding_problem()
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1, ignore_index=3)
    optimizer = ggn_jax.kfac(embedding_model, loss, 0.1, example_inputs=batch[0], ekfac=ekfac)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    _, state = update(params, state, params, batch=batch, key=KEY)  # bases, for EKFAC
    value, grads, factors = jax.jit(optimizer.value_and_grad_and_factors)(params, batch, state, key=KEY)
    wanted = jax.jit(jax.value_and_grad(partial(objective, embedding_model, loss)))(params, batch)
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
        parts = ggn_jax.multi_steps(inner, 4)
        whole_state, state = inner.init(params), parts.init(params)
        update = jax.jit(parts.update)
        for bad in (2, 3):
            grads = gradient(mlp, CE, params, (x, y))
            wanted, whole_state = inner.update(grads, whole_state, params, batch=(x, y))
            micro = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
            micro.insert(bad, (micro[0][0].at[0].set(jnp.nan), micro[0][1]))  # is left out
            for i, part in enumerate(micro):
                updates, state = update(gradient(mlp, CE, params, part), state, params, batch=part)
                assert is_zero(updates) == (i < 3)
            assert_close(updates, wanted, 1e-7)
            assert int(state.skipped) == bad - 1
        assert int(state.inner.rejected) == 0


# Several devices.


def mesh_of(size: int) -> Mesh:
    if len(jax.devices()) < size:
        pytest.skip(f"needs {size} devices, here are {len(jax.devices())}")
    return Mesh(np.array(jax.devices()[:size]), ("data",))


@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"staggered": True, "inverse_interval": 2}])
@pytest.mark.sweep
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
        places = jax.tree.map(lambda x: x.sharding.device_set, state.curvature)
        for t in range(3):
            params, state = step(params, state, batch, jax.random.key(t))
        if optimizer.core.settings.mesh is not None:  # what `init` made is where the steps leave it
            assert jax.tree.map(lambda x: x.sharding.device_set, state.curvature) == places
        return params

    make = partial(ggn_jax.kfac, mlp, CE, 0.1, damping=0.1, example_inputs=batch[0], **options)
    wanted = run(make(), mlp_params(), batch)
    assert_close(run(make(mesh=mesh), params, sharded), wanted, 1e-8)
    if not options:
        assert_close(run(make(), params, sharded), wanted, 1e-8)


def test_each_device_factorises_its_share() -> None:
    spread = Spread(mesh_of(2))
    matrices = [normal(i, 1 + i % 2, n, n) for i, n in enumerate((5, 3, 5, 8))]
    matrices = [m @ jnp.swapaxes(m, 1, 2) for m in matrices]
    padded = spread.pad(matrices)
    assert [m.shape[0] for m in padded] == [2, 2, 2, 2]
    calls: list[int] = []

    def fn(x: jax.Array) -> tuple[jax.Array, ...]:
        jax.debug.callback(lambda _: calls.append(x.shape[-1]), x[0, 0])
        return tuple(jnp.linalg.eigh(x))

    shared = jax.jit(lambda matrices: spread.locally(partial(batched, fn), matrices))(padded)
    jax.effects_barrier()
    assert sorted(calls) == [3, 3, 5, 5, 5, 5, 8, 8]  # one of each stack on each device
    for pair, wanted in zip(shared, batched(lambda x: tuple(jnp.linalg.eigh(x)), matrices), strict=True):
        assert_close([part[: len(whole)] for part, whole in zip(pair, wanted, strict=True)], list(wanted), 1e-10)
        assert all(len(part.sharding.device_set) == 2 for part in pair)


def test_each_device_holds_its_share_of_the_state() -> None:
    """Eight layers of one shape on two devices: four factors of each kind on each."""
    mesh = mesh_of(2)
    params = jax.device_put({"layers": [{"w": normal(i, 4, 4)} for i in range(8)]}, NamedSharding(mesh, P()))

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"])
        return x

    batch = jax.device_put((normal(9, 6, 4), jnp.arange(6) % 4), NamedSharding(mesh, P("data")))
    optimizer = ggn_jax.kfac(model_fn, CE, 0.1, example_inputs=batch[0], mesh=mesh, damping=0.1)
    state = optimizer.init(params)
    grads = gradient(model_fn, CE, params, batch)
    _, state = jax.jit(optimizer.update)(grads, state, params, batch=batch, key=KEY)
    for leaf in jax.tree.leaves((state.curvature.blocks, state.curvature.inverses)):
        assert leaf.shape in [(8, 4, 4), (8, 5, 2)]  # averages are packed
        assert [shard.data.shape for shard in leaf.addressable_shards] == [(4, *leaf.shape[1:])] * 2
