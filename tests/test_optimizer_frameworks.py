"""The optimizer in optax's and Flax's hands: their wrappers, their training states, donation."""

import copy
import pickle
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from optimizer_cases import (
    CE,
    KEY,
    assert_close,
    batch_of,
    gradient,
    mlp,
    mlp_params,
    normal,
    objective,
)

import ggn_jax


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


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])  # float64 is that of all other tests
@pytest.mark.by_default("bfloat16")
def test_dtypes_are_stable(dtype: Any) -> None:
    params, batch = mlp_params(dtype), batch_of(dtype=dtype)
    damping = ggn_jax.LevenbergMarquardt(0.1, interval=1)
    optimizer = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0], damping=damping, weight_decay=1e-3)
    state = optimizer.init(params)
    grads = gradient(mlp, CE, params, batch)
    updates, new = jax.eval_shape(partial(optimizer.update, batch=batch, key=KEY), grads, state, params)
    for a, b in ((updates, params), (new, state)):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert {x.dtype for x in jax.tree.leaves(new.curvature.blocks)} == {jnp.dtype(jnp.float32)}

    # The state stays the same under `lax.cond`.
    @jax.jit
    def step(params: Any, state: Any, chosen: jax.Array, key: jax.Array) -> Any:
        def update(state: Any) -> Any:
            grads = gradient(mlp, CE, params, batch)
            updates, state = optimizer.update(grads, state, params, batch=batch, key=key)
            return optax.apply_updates(params, updates), state

        return jax.lax.cond(chosen, update, lambda state: (params, state), state)

    assert int(step(params, state, False, KEY)[1].curvature.count) == 0
    trained = params
    for t in range(10):
        trained, state = step(trained, state, True, jax.random.key(t))
    assert int(state.curvature.count) == 10
    before, after = (float(objective(mlp, CE, p, batch)) for p in (params, trained))
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


FORMS = {"few": ("pytree", "multi_steps", "named_chain", "partition")}
FORMS["others"] = ("_replace", "copy", "apply_if_finite", "inject", "conditionally")


@pytest.mark.by_default("few")
@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_transformations_that_hold_one(forms: tuple[str, ...]) -> None:
    """Its methods stay where it is rebuilt, and find its state where it is a part; updates are the same."""
    params, batch = {"w": normal(0, 3, 2), "v": normal(1, 2, 2)}, batch_of()
    model_fn = lambda params, x: x @ params["w"] @ params["v"]  # noqa: E731
    make = partial(ggn_jax.kfac, model_fn, CE, example_inputs=batch[0], damping=0.1, kl_clip=None)
    kfac = make(0.1)
    rebuilt = {
        "_replace": kfac._replace(update=lambda *args, **extra: kfac.update(*args, **extra)),
        "pytree": jax.tree.map(lambda fn: fn, kfac),
        "copy": copy.copy(kfac),
        "multi_steps": ggn_jax.multi_steps(kfac, 1),
    }
    holding = {
        "named_chain": optax.named_chain(("finite", optax.zero_nans()), ("kfac", kfac)),
        "apply_if_finite": optax.apply_if_finite(kfac, 3),
        "partition": optax.partition({"kfac": kfac, "sgd": optax.sgd(0.1)}, "kfac"),
        "inject": optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate=0.1),
        "conditionally": optax.conditionally_transform(kfac, lambda step: step >= 0),
    }
    report, start = str(kfac.report(params)), kfac.init(params)
    wanted = jax.jit(kfac.value_and_grad_and_factors)(params, batch, start, key=KEY)
    updates, _ = jax.jit(kfac.update)(wanted[1], start, params, factors=wanted[2])
    for name in forms:
        optimizer = {**rebuilt, **holding}[name]
        methods = optimizer if name in rebuilt else kfac
        assert str(methods.report(params)) == report, name
        state = optimizer.init(params)
        found = jax.eval_shape(partial(methods.value_and_grad_and_factors, key=KEY), params, batch, state)
        assert jax.tree.structure(found) == jax.tree.structure(wanted), name
        got, _ = jax.jit(optimizer.update)(wanted[1], state, params, factors=wanted[2])
        assert_close(got, updates, 1e-6 if name == "inject" else 1e-12)  # its numbers are float32
    with pytest.raises(TypeError, match="both init and update were replaced"):
        kfac._replace(init=lambda params: params, update=lambda *args: args).report(params)


def test_an_optimizer_is_pickled_as_what_it_is_made_of() -> None:
    kfac = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch_of()[0], ekfac=True, momentum=None)
    scale = ggn_jax.scale_by_kfac(mlp, CE, example_inputs=batch_of()[0], damping=0.1)
    for optimizer in (ggn_jax.multi_steps(kfac, 2), scale):
        again, params = pickle.loads(pickle.dumps(optimizer)), mlp_params()
        assert str(again.report(params)) == str(optimizer.report(params))
        states = [jax.eval_shape(one.init, params) for one in (again, optimizer)]
        assert states[0] == states[1]
    with pytest.raises((AttributeError, pickle.PicklingError), match="<lambda>"):
        pickle.dumps(kfac._replace(init=lambda params: params))


@pytest.mark.parametrize("way", ["function", "static_args"])
@pytest.mark.by_default("function")
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
            "model_fn loss example_inputs factor_interval inverse_interval mc_samples max_dense_size"
            " block_size max_small_size vector_chunk_size"
        )
        make = optax.inject_hyperparams(ggn_jax.kfac, static_args=names.split())
        optimizer = make(mlp, CE, schedule, damping=0.1, example_inputs=x)
    plain = ggn_jax.kfac(mlp, CE, schedule, damping=0.1, example_inputs=x)
    params, state = train(optimizer, mlp_params(), 4)
    wanted, _ = train(plain, mlp_params(), 4)
    assert_close(params, wanted, 1e-6)
    assert {"learning_rate", "damping"} <= set(state.hyperparams)
    if way == "static_args":
        bare = optax.inject_hyperparams(ggn_jax.kfac, static_args=["model_fn", "loss", "example_inputs"])
        with pytest.raises(TypeError, match="name 'mc_samples' in its static_args"):
            bare(mlp, CE, schedule, example_inputs=x).init(params)


def test_tree_map_params() -> None:
    params, batch = mlp_params(), batch_of()
    optimizer = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0])
    state = optimizer.init(params)
    mapped = optax.tree.map_params(optimizer, lambda p: p + 1, state, transform_non_params=lambda x: x)
    assert_close(mapped.velocity, jax.tree.map(lambda p: p + 1, state.velocity))
    assert_close(mapped.curvature, state.curvature)


@pytest.mark.sweep
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


@pytest.mark.sweep
def test_masked_parameters() -> None:
    """A part is trained; values of the others come with each update, and are not those that `kfac` was given."""
    old, batch = mlp_params(), batch_of()
    params = jax.tree.map(lambda p: 1.5 * p, old)
    options: dict[str, Any] = {"example_inputs": batch[0], "damping": 0.1, "fisher_type": "type-2"}
    inner = ggn_jax.kfac(mlp, CE, 0.1, full_params=old, **options)
    labels = {"u": "kfac", "c": "kfac", "v": "adam", "d": "adam"}
    optimizer = optax.multi_transform({"kfac": inner, "adam": optax.adam(1e-2)}, labels)
    state, grads = optimizer.init(params), gradient(mlp, CE, params, batch)
    update = jax.jit(optimizer.update)
    with jax.numpy_dtype_promotion("standard"):  # Adam's own
        updates, after = update(grads, state, params, batch=batch, full_params=params)
        some = {name: params[name] for name in ("u", "c")}
        alone = ggn_jax.kfac(lambda p, x: mlp({**params, **p}, x), CE, 0.1, **options)
        wanted, _ = jax.jit(alone.update)({n: grads[n] for n in some}, alone.init(some), some, batch=batch)
        assert_close({n: updates[n] for n in some}, wanted)

        part = {**some, "v": optax.MaskedNode(), "d": optax.MaskedNode()}
        look = partial(inner.value_and_grad_and_factors, batch=batch, state=state)
        _, part_grads, factors = jax.jit(look)(part, full_params=params)
        assert_close(part_grads, {n: grads[n] for n in some})
        assert_close(update(grads, state, params, factors=factors), (updates, after))

        with pytest.raises(ValueError, match="params must be masked as the optimizer's are"):
            look(params)
        with pytest.raises(ValueError, match="as an extra argument with the present values"):
            optimizer.update(grads, state, params, batch=batch)
        shapes = jax.eval_shape(lambda: params)
        with pytest.raises(TypeError, match=r"full_params\['c'\] must have its present values"):
            optimizer.update(grads, state, params, batch=batch, full_params=shapes)
        with pytest.raises(ValueError, match="full_params must be a pytree like"):
            optimizer.update(grads, state, params, batch=batch, full_params={**params, "v": params["u"]})
    shaped = ggn_jax.kfac(mlp, CE, 0.1, full_params=shapes, **options)
    assert jax.tree.structure(shaped.init(part)) == jax.tree.structure(inner.init(part))
    with pytest.raises(ValueError, match="pass full_params=params to kfac"):
        ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0]).init(part)
    with pytest.raises(ValueError, match="full_params must be a pytree like params"):
        shaped.init({**part, "other": params["u"]})
    with pytest.raises(ValueError, match="couples examples"):
        ggn_jax.kfac(lambda p, x: mlp(p, x - x.mean(axis=0, keepdims=True)), CE, 0.1, full_params=old, **options)


def test_nnx_optimizer() -> None:
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    x, y = batch_of(dtype=jnp.float32)
    model_fn, params = ggn_jax.from_nnx(model)
    tx = ggn_jax.kfac(model_fn, CE, 0.3, example_inputs=x, damping=0.1)
    grads = gradient(model_fn, CE, params, (x, y))
    wanted = jax.jit(tx.update)(grads, tx.init(params), params, batch=(x, y), key=KEY)[0]
    wanted = optax.apply_updates(params, wanted)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, key: jax.Array) -> jax.Array:
        value, grads = nnx.value_and_grad(lambda model: CE(model(x), y))(model)
        optimizer.update(model, grads, batch=(x, y), key=key)
        return value

    @nnx.jit
    def shared(model: Any, optimizer: Any, key: jax.Array) -> jax.Array:
        """As the documentation has it."""
        params = nnx.state(model, nnx.Param)
        value, grads, factors = tx.value_and_grad_and_factors(params, (x, y), optimizer.opt_state, key=key)
        optimizer.update(model, grads, factors=factors)
        return value

    first = step(model, optimizer, KEY)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), wanted, 1e-5)
    other_model, other_optimizer = nnx.clone(model), nnx.clone(optimizer)
    for t in range(3):
        step(model, optimizer, jax.random.key(t))
        last = shared(other_model, other_optimizer, jax.random.key(t))
    assert_close(nnx.state(other_model, nnx.Param), nnx.state(model, nnx.Param), 1e-5)
    assert last < first


class KFACTrainState(TrainState):
    """`apply_gradients` that passes extra arguments on."""

    def apply_gradients(self, *, grads: Any, **extra: Any) -> Any:
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


@pytest.mark.sweep
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


@pytest.mark.parametrize("kind", ["kfac", "scale_by_kfac", "multi_steps"])
@pytest.mark.sweep
def test_donated_states_hold_nothing_of_the_users(kind: str) -> None:
    """Numbers as arrays, parameters, batches, gradients and keys are still there when a state is gone."""
    numbers = {"damping": jnp.float64(0.1), "decay": jnp.float64(0.9)}
    if kind != "scale_by_kfac":
        names = "learning_rate", "momentum", "kl_clip", "weight_decay"
        numbers |= {name: jnp.float64(0.1) for name in names}
    params, batch, key = mlp_params(), batch_of(), jax.random.key(1)
    make = ggn_jax.scale_by_kfac if kind == "scale_by_kfac" else ggn_jax.kfac
    optimizer: Any = make(mlp, CE, **numbers, example_inputs=batch[0])
    optimizer = ggn_jax.multi_steps(optimizer, 1) if kind == "multi_steps" else optimizer
    grads = gradient(mlp, CE, params, batch)
    given = numbers, params, batch, grads, key
    gone = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for init, update in ((optimizer.init, jax.jit(optimizer.update)), (jax.jit(optimizer.init), optimizer.update)):
        state = init(params)
        state = update(grads, state, params, batch=batch, key=key)[1]
        gone(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        gone(init(params))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_the_state_of_no_parameters_is_donated() -> None:
    """Each of its arrays is one of its own."""
    state = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch_of()[0]).init({})
    assert len({leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}) == len(jax.tree.leaves(state))
