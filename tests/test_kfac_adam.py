"""Adam in KFAC's eigenbases, against dense algebra in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizer_cases import CE, assert_close, batch_of, gradient, is_zero, mlp, mlp_params, normal
from oracles import dense_ggn

import ggn_jax

B1, B2, EPS, DECAY, INTERVAL = 0.8, 0.9, 1e-3, 0.5, 2
PARAMS = {"c": normal(2, 2), "s": normal(3, 2), "u": normal(1, 3, 2)}
BATCHES = [batch_of(seed=seed) for seed in range(5)]
STACKED = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)


def scaled(params: Any, x: jax.Array) -> jax.Array:
    """A layer with a bias, and parameters that have an exact block."""
    return jnp.tanh(x @ params["u"] + params["c"][None]) * params["s"][None]


def run(optimizer: Any, params: Any, model_fn: Any = scaled) -> Any:
    """The updates of some batches at the same parameters."""

    @jax.jit
    def steps(state: Any, batches: Any) -> Any:
        def one(state: Any, batch: Any) -> Any:
            grads = jax.grad(lambda params: CE(model_fn(params, batch[0]), batch[1]))(params)
            updates, state = optimizer.update(grads, state, params, batch=batch)
            return state, updates

        return jax.lax.scan(one, state, batches)

    return steps(optimizer.init(params), STACKED)


def factors(batch: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """`A` and `B` of the layer, and the exact block of the scales as `B`, in NumPy."""
    c, s, u = (np.asarray(PARAMS[name]) for name in "csu")
    x = np.asarray(batch[0])
    h = np.tanh(x @ u + c)
    p = np.exp(h * s)
    p /= p.sum(1, keepdims=True)
    a, b = np.zeros((4, 4)), np.zeros((2, 2))
    for i in range(len(x)):
        one, back = np.append(x[i], 1.0), np.diag(s * (1 - h[i] ** 2))
        a += np.outer(one, one) / len(x)
        b += back @ (np.diag(p[i]) - np.outer(p[i], p[i])) @ back / len(x)
    return [(a, b), (np.eye(1), dense_ggn(scaled, CE, PARAMS, batch)[2:4, 2:4])]


def adam_steps(rate: float, decay: float) -> list[Any]:
    """What `kfac_adam` says it does, with `Q_B (x) Q_A` as one matrix."""
    averages: list[Any] = []
    bases: list[Any] = [np.zeros((8, 8)), np.zeros((2, 2))]
    first, second = [np.zeros(8), np.zeros(2)], [np.zeros(8), np.zeros(2)]
    found = []
    for t, batch in enumerate(BATCHES):
        gain = (1 - DECAY) / (1 - DECAY ** (t + 1))
        new = factors(batch)
        averages = averages or new
        averages = [
            tuple((1 - gain) * old + gain * x for old, x in zip(*pair, strict=True))
            for pair in zip(averages, new, strict=True)
        ]
        grads = gradient(scaled, CE, PARAMS, batch)
        matrix = np.concatenate([np.asarray(grads["u"]).T, np.asarray(grads["c"])[:, None]], axis=1)
        made = []
        for i, g in enumerate((matrix.reshape(-1), np.asarray(grads["s"]))):
            if t in (0, 1, 2, 4):
                q = np.kron(*(np.linalg.eigh(averages[i][side])[1] for side in (1, 0)))
                r = q.T @ bases[i]
                bases[i], first[i], second[i] = q, r @ first[i], r**2 @ second[i]
            r = bases[i].T @ g
            first[i], second[i] = B1 * first[i] + (1 - B1) * r, B2 * second[i] + (1 - B2) * r**2
            root = np.sqrt(second[i] / (1 - B2 ** (t + 1)))
            made.append(bases[i] @ (first[i] / (1 - B1 ** (t + 1)) / (root + EPS)))
        layer = made[0].reshape(2, 4)
        step = {"c": layer[:, 3], "s": made[1], "u": layer[:, :3].T}
        found.append({name: -rate * (x + decay * np.asarray(PARAMS[name])) for name, x in step.items()})
    return found


def test_steps_are_those_of_dense_algebra() -> None:
    numbers: dict[str, Any] = {"b1": B1, "b2": B2, "eps": EPS, "decay": DECAY}
    intervals = {"factor_interval": 1, "inverse_interval": INTERVAL}
    optimizer = ggn_jax.kfac_adam(
        scaled, CE, 0.1, example_inputs=BATCHES[0][0], weight_decay=0.01, fisher_type="type-2", **numbers, **intervals
    )
    state, updates = run(optimizer, PARAMS)
    wanted = adam_steps(float(np.float32(0.1)), float(np.float32(0.01)))
    assert_close(updates, jax.tree.map(lambda *x: np.stack(x), *wanted), 1e-6)
    assert (int(state.steps), int(state.rejected)) == (5, 0)


def test_what_is_not_finite_or_ignored_is_no_step() -> None:
    """The moments stay; a mask leaves parameters out of the decay, whose rate may be a schedule."""
    loss = ggn_jax.CrossEntropyLoss(ignore_index=-1)
    params, (x, y) = mlp_params(), batch_of()
    optimizer = ggn_jax.kfac_adam(
        mlp,
        loss,
        lambda count: 0.1 / (1 + count.astype(float)),
        example_inputs=x,
        weight_decay=0.5,
        weight_decay_mask={"u": True, "c": False, "v": False, "d": False},
        fisher_type="type-2",
    )
    step = jax.jit(lambda s, b: optimizer.update(gradient(mlp, loss, params, b), s, params, batch=b))
    first, before = step(optimizer.init(params), (x, y))
    assert (int(before.steps), sorted(optimizer.statistics(before))) == (1, ["rejected", "skipped", "step"])
    undecayed = ggn_jax.kfac_adam(mlp, loss, 0.1, example_inputs=x, fisher_type="type-2")
    plain, _ = undecayed.update(gradient(mlp, loss, params, (x, y)), undecayed.init(params), params, batch=(x, y))
    assert_close(first, {**plain, "u": plain["u"] - 0.05 * params["u"]}, 1e-6)
    for targets, inputs, rejected in ((jnp.full(len(x), -1), x, 0), (y, x.at[0, 0].set(jnp.nan), 1)):
        updates, after = step(before, (inputs, targets))
        assert is_zero(updates)
        assert (int(after.steps), int(after.rejected)) == (1, rejected)
        assert_close((after.first, after.second), (before.first, before.second), 1e-12)


def test_new_bases_of_a_step_that_is_rejected() -> None:
    """The moments, which take no gradient, are moved to the new bases all the same."""
    params, (x, _) = mlp_params(), BATCHES[0]
    optimizer = ggn_jax.kfac_adam(mlp, CE, 0.1, example_inputs=x, fisher_type="type-2", inverse_interval=1)

    @jax.jit
    def step(state: Any, batch: Any, scale: Any) -> Any:
        grads = jax.tree.map(lambda g: g * scale, gradient(mlp, CE, params, batch))
        factors = optimizer.factors(params, batch, state)
        return optimizer.update(grads, state, params, factors=factors)

    def means(state: Any) -> list[Any]:
        pairs = zip(state.curvature.inverses, state.first, strict=True)
        return [q["qb"][0] @ m[0] @ q["qa"][0].T for q, m in pairs]

    _, before = step(optimizer.init(params), BATCHES[0], 1.0)
    updates, after = step(before, BATCHES[1], jnp.nan)
    assert is_zero(updates)
    assert (int(after.steps), int(after.rejected)) == (1, 1)
    assert not np.allclose(after.first[0], before.first[0], atol=1e-3)
    assert_close(means(after), means(before), 1e-9)


@pytest.mark.sweep
def test_devices_share_blocks_and_moments() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    whole = NamedSharding(mesh, P())
    options: dict[str, Any] = {"example_inputs": BATCHES[0][0], "fisher_type": "type-2"}
    _, wanted = run(ggn_jax.kfac_adam(mlp, CE, 0.1, **options), mlp_params(), mlp)
    shared = ggn_jax.kfac_adam(mlp, CE, 0.1, mesh=mesh, **options)
    state, updates = run(shared, jax.device_put(mlp_params(), whole), mlp)
    assert_close(updates, wanted, 1e-8)
    for leaf in jax.tree.leaves((state.first, state.second, state.curvature.inverses)):
        assert [len(shard.data) for shard in leaf.addressable_shards] == [1, 1]


def test_arguments_are_checked() -> None:
    example_inputs = BATCHES[0][0]
    for name, value in (("b1", 1.0), ("b2", -0.1), ("eps", -1.0), ("learning_rate", -1.0)):
        with pytest.raises(ValueError, match=name):
            ggn_jax.kfac_adam(mlp, CE, example_inputs=example_inputs, **{name: value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'staggered'"):
        ggn_jax.kfac_adam(mlp, CE, example_inputs=example_inputs, staggered=True)
    optimizer: Any = ggn_jax.kfac_adam(mlp, CE, example_inputs=example_inputs)
    params = mlp_params()
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="update needs params"):
        optimizer.update(params, state)
    with pytest.raises(TypeError, match="update needs batch"):
        optimizer.update(params, state, params)
    with pytest.raises(TypeError, match="KFACAdamState"):
        optimizer.update(params, optax.EmptyState(), params, batch=BATCHES[0])
    with pytest.raises(TypeError, match="kfac_adam has no damping"):
        optimizer.diagnose(state, params, BATCHES[0])
    several = ggn_jax.multi_steps(optimizer, 2)
    assert jax.tree.structure(several.init(params).inner) == jax.tree.structure(state)
