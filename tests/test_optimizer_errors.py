"""Arguments, states and factors that the optimizer refuses."""

import re
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_cases import (
    CE,
    KEY,
    assert_close,
    batch_of,
    gradient,
    linear,
    mlp,
    mlp_params,
    normal,
)

import ggn_jax

WITHOUT_MOMENTUM = ggn_jax.QuadraticModel(momentum=False)
RATE = (
    "learning_rate must be a finite number of at least 0, a function of the number of steps or ggn_jax.QuadraticModel"
)
MOMENTUM = "momentum must be a number of at least 0 and below 1, 'auto' or None; got"
MASK = "weight_decay_mask must be a pytree of booleans like params"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rate": "best"}, ValueError, f"{RATE}(...); got 'best'"),
        ({"learning_rate": True}, TypeError, f"{RATE}(...); got True"),
        ({"learning_rate": None}, TypeError, f"{RATE}(...); got None"),
        ({"damping": ggn_jax.SlopeDamping()}, ValueError, "comes with learning_rate=ggn_jax.QuadraticModel(), which"),
        (
            {"learning_rate": WITHOUT_MOMENTUM, "damping": ggn_jax.SlopeDamping()},
            ValueError,
            "looks along the last step",
        ),
        (
            {"learning_rate": ggn_jax.QuadraticModel},
            TypeError,
            "learning_rate must be an instance; got the class Quadr",
        ),
        ({"damping": ggn_jax.SlopeDamping}, TypeError, "damping must be an instance; got the class SlopeDamping"),
        ({"adapt_damping": 5}, TypeError, "unexpected keyword argument 'adapt_damping'. Did you mean 'damping'?"),
        ({"learning_rate": -1.0}, ValueError, f"{RATE}(...); got -1.0"),
        ({"learning_rate": float("inf")}, ValueError, f"{RATE}(...); got inf"),
        ({"learning_rate": float("nan")}, ValueError, f"{RATE}(...); got nan"),
        ({"learning_rate": ggn_jax.QuadraticModel(), "momentum": None}, ValueError, "QuadraticModel(momentum=False)."),
        (
            {"learning_rate": ggn_jax.QuadraticModel(), "nesterov": True},
            ValueError,
            "QuadraticModel() chooses one: leave",
        ),
        ({"nesterov": True, "momentum": None}, ValueError, "momentum is None: leave nesterov out"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False; got 1"),
        ({"momentum": 1.0}, ValueError, f"{MOMENTUM} 1.0"),
        ({"momentum": -0.1}, ValueError, f"{MOMENTUM} -0.1"),
        ({"momentum": "0.9"}, ValueError, f"{MOMENTUM} '0.9'"),
        ({"kl_clip": 0.0}, ValueError, "kl_clip must be a finite number above 0, 'auto' or None; got 0.0"),
        ({"kl_clip": "no"}, ValueError, "kl_clip must be a finite number above 0, 'auto' or None; got 'no'"),
        ({"damping": -1e-3}, ValueError, "damping must be a finite number of at least 0"),
        ({"damping": float("inf")}, ValueError, "damping must be a finite number of at least 0"),
        ({"damping": jnp.ones(2)}, ValueError, "got an array of shape"),
        ({"damping": "slope"}, ValueError, "ggn_jax.LevenbergMarquardt(...) or ggn_jax.SlopeDamping(...); got 'slope'"),
        ({"decay": 1.5}, ValueError, "decay must be a number from 0 to 1; got 1.5"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be a finite number of at least 0"),
        ({"weight_decay_mask": "no"}, TypeError, f"{MASK}, or a function of params that returns one; got 'no'"),
        ({"weight_decay_mask": True}, TypeError, f"{MASK}, or a function of params that returns one; got True"),
        ({"weight_decay_mask": {"u": 1}}, TypeError, "got 1 at"),
        ({"inverse_interval": 2.5}, TypeError, "inverse_interval must be an integer"),
        ({"staggered": "no"}, TypeError, "staggered must be True or False; got 'no'"),
        ({"ekfac": "no"}, TypeError, "ekfac must be True or False; got 'no'"),
        ({"ekfac": jnp.asarray(True)}, TypeError, "name 'ekfac' in its static_args"),
        ({"damping_method": "other"}, ValueError, "damping_method must be 'heuristic' or 'exact'"),
        ({"ekfac": True, "fisher_type": "forward-only"}, NotImplementedError, "ekfac"),
        ({"mesh": 2}, TypeError, "mesh must be a jax.sharding.Mesh"),
        ({"sharing": "other"}, ValueError, "sharing must be 'expand' or 'reduce'; got"),
        ({"loss": lambda f, y: 0.0}, NotImplementedError, "loss"),
        ({"loss": jnp.ones(())}, TypeError, "name 'loss' in its static_args"),
        ({"model_fn": 3}, TypeError, "model_fn must be a function"),
        ({"example_inputs": [1.0]}, TypeError, "example_inputs"),
        ({"full_params": {"u": 1.0}}, TypeError, "full_params['u'] must be an array or a jax.ShapeDtypeStruct"),
    ],
)
def test_bad_settings(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model_fn": mlp, "loss": CE, "learning_rate": 0.1, "example_inputs": batch_of()[0], **change}
    with pytest.raises(error, match=re.escape(message)):
        ggn_jax.kfac(**given)


@pytest.mark.parametrize("mask", [{"u": True}, lambda params: {"u": True}])
def test_masks_that_do_not_fit_are_refused(mask: Any) -> None:
    optimizer = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch_of()[0], weight_decay_mask=mask)
    with pytest.raises(ValueError, match="weight_decay_mask must fit params: wanted"):
        optimizer.init(mlp_params())


@pytest.mark.sweep
def test_a_mask_may_have_one_boolean_for_a_branch() -> None:
    params = {"a": {"w": normal(0, 3, 3)}, "b": {"w": normal(1, 3, 2)}}
    batch = batch_of()

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["a"]["w"]) @ params["b"]["w"]

    grads = gradient(model_fn, CE, params, batch)
    updates = []
    for decay in (0.0, 0.5):
        mask = {"a": False, "b": True}
        optimizer = ggn_jax.kfac(
            model_fn, CE, 0.1, example_inputs=batch[0], weight_decay=decay, weight_decay_mask=mask, fisher_type="type-2"
        )
        updates.append(jax.jit(optimizer.update)(grads, optimizer.init(params), params, batch=batch)[0])
    assert_close(updates[1]["a"], updates[0]["a"])
    assert_close(updates[1]["b"]["w"], updates[0]["b"]["w"] - 0.05 * params["b"]["w"])


class Linear(eqx.Module):
    """A pytree that can be called: parameters of it, and a mask made of it, are no functions."""

    w: Any
    b: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w + self.b[None]


class Decay(eqx.Module):
    """A schedule, or a mask's function, with fields."""

    value: jax.Array

    def __call__(self, given: Any) -> Any:
        return self.value if isinstance(given, jax.Array) else jax.tree.map(lambda p: p.ndim > 1, given)


@pytest.mark.sweep
def test_masks_and_schedules_that_can_be_called() -> None:
    """As with `optax.add_decayed_weights`, whose updates are the oracle."""
    params, batch = Linear(normal(0, 3, 2), normal(1, 2)), batch_of()
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    assert callable(mask)
    model_fn = lambda params, x: params(x)  # noqa: E731
    grads = gradient(model_fn, CE, params, batch)
    make = partial(ggn_jax.kfac, model_fn, CE, 0.1, example_inputs=batch[0], fisher_type="type-2")
    plain = make()
    direction, _ = jax.jit(plain.update)(grads, plain.init(params), params, batch=batch)
    decay = optax.add_decayed_weights(0.5, mask)
    wanted, _ = decay.update(jax.tree.map(lambda u: u / -0.1, direction), decay.init(params), params)
    for given in (mask, Decay(jnp.asarray(0.5)), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)):
        optimizer = make(weight_decay=Decay(jnp.asarray(0.5)), weight_decay_mask=given)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params, batch=batch)
        assert_close(updates, jax.tree.map(lambda u: -0.1 * u, wanted))


def test_schedules_must_return_numbers() -> None:
    params, batch = {"w": normal(0, 3, 2)}, batch_of()
    optimizer = ggn_jax.kfac(linear, CE, lambda count: jnp.ones(2), example_inputs=batch[0])
    with pytest.raises(ValueError, match="learning_rate must return one number"):
        jax.eval_shape(partial(optimizer.update, batch=batch, key=KEY), params, optimizer.init(params), params)


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
    quadratic = ggn_jax.kfac(mlp, CE, example_inputs=batch[0])
    factors = quadratic.factors(params, batch, state, key=KEY)
    with pytest.raises(TypeError, match="also with factors"):
        quadratic.update(grads, quadratic.init(params), params, factors=factors)
    with pytest.raises(TypeError, match="floating"):
        optimizer.init({"w": jnp.arange(3)})
    with pytest.raises(TypeError, match=r"params\['w'\] must be a floating array; got float"):
        optimizer.update({"w": 1.0}, state, {"w": 1.0}, batch=batch, key=KEY)


def of_kind(name: str) -> Any:
    """Optimizers of one model that keep different states."""
    options: dict[str, Any] = {"example_inputs": batch_of()[0], "damping": 0.1}
    if name == "adam":
        return optax.adam(0.1)
    if name == "scale":
        return ggn_jax.scale_by_kfac(mlp, CE, **options)
    if name == "multi":
        return ggn_jax.multi_steps(of_kind("kfac"), 2)
    changes: dict[str, Any] = {
        "kfac": {},
        "ekfac": {"ekfac": True},
        "exact": {"damping_method": "exact"},
        "separate": {"bias": "separate"},
        "no momentum": {"momentum": None},
        "adapted": {"damping": ggn_jax.LevenbergMarquardt()},
        "quadratic": {"learning_rate": ggn_jax.QuadraticModel(), "damping": ggn_jax.SlopeDamping()},
    }
    return ggn_jax.kfac(mlp, CE, **{"learning_rate": 0.1, **options, **changes[name]})


@pytest.mark.parametrize(
    ("mine", "other", "message"),
    [
        ("kfac", "adam", "state must be a KFACState; got tuple"),
        ("kfac", "scale", "state must be a KFACState; got ScaleByKFACState"),
        ("scale", "kfac", "state must be a ScaleByKFACState; got KFACState"),
        ("multi", "kfac", "state must be a MultiStepsState; got KFACState"),
        ("ekfac", "kfac", "state.curvature.inverses must hold 6 arrays; got 4"),
        ("kfac", "exact", "state.curvature.inverses must hold 4 arrays; got 6"),
        ("kfac", "separate", "state.curvature.blocks must hold 4 arrays; got 8"),
        ("kfac", "no momentum", "state.velocity must hold 4 arrays; got 0"),
        ("no momentum", "kfac", "state.velocity must hold 0 arrays; got 4"),
        ("kfac", "adapted", "same rule for the damping, no rule; got one of LevenbergMarquardt"),
        ("quadratic", "kfac", "same rule for the damping, SlopeDamping; got one of no rule"),
    ],
)
def test_states_of_other_optimizers_are_refused(mine: str, other: str, message: str) -> None:
    params, batch = mlp_params(), batch_of()
    optimizer, state = of_kind(mine), jax.eval_shape(of_kind(other).init, params)
    with pytest.raises((TypeError, ValueError), match=f"{message}. .* `init` of this one"):
        jax.eval_shape(partial(optimizer.update, batch=batch, key=KEY), params, state, params)


def test_rules_with_arrays_are_those_with_numbers() -> None:
    """So that they are compared and hashed, as static arguments and keys of caches are."""
    for kind in (ggn_jax.SlopeDamping, ggn_jax.LevenbergMarquardt):
        rules = {kind(initial=jnp.asarray(0.5), minimum=np.float32(0.25)), kind(initial=0.5, minimum=0.25)}
        assert len(rules) == 1
        with pytest.raises(ValueError, match=r"must not be below its minimum 1.0; got 0.5"):
            kind(initial=jnp.asarray(0.5), minimum=jnp.asarray(1.0))


def test_factors_and_states_of_other_optimizers_are_refused() -> None:
    params, batch = mlp_params(), batch_of()
    kfac, ekfac = of_kind("kfac"), of_kind("ekfac")
    states = [jax.eval_shape(optimizer.init, params) for optimizer in (kfac, ekfac)]
    factors = jax.eval_shape(partial(kfac.factors, batch=batch, key=KEY), params, state=states[0])
    with pytest.raises(ValueError, match=r"factors.corrections must hold 2 arrays; got 0"):
        jax.eval_shape(ekfac.update, params, states[1], params, factors=factors)
    with pytest.raises(ValueError, match=r"the state's Curvature.inverses must hold 6 arrays; got 4"):
        jax.eval_shape(partial(ekfac.value_and_grad_and_factors, batch=batch, key=KEY), params, state=states[0])
    wide = {**params, "u": normal(1, 3, 5), "c": normal(2, 5), "v": normal(3, 5, 2)}
    with pytest.raises(ValueError, match=r"state.curvature.blocks must hold an array of shape \(1, 5, 2\)"):
        jax.eval_shape(partial(kfac.update, batch=batch, key=KEY), params, jax.eval_shape(kfac.init, wide), params)


def test_what_looks_at_the_whole_batch_is_refused_for_micro_batches() -> None:
    x, y = batch_of()
    optimizer = ggn_jax.kfac(mlp, CE, example_inputs=x)
    with pytest.raises(NotImplementedError, match="multi_steps keeps no micro-batches"):
        ggn_jax.multi_steps(optimizer, 2)
    plain, params = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=x), mlp_params()
    with pytest.raises(ValueError, match="fits no layer"):
        plain.update(params, plain.init(params), params, batch=(x, y, jnp.ones((len(x), 5), bool)), key=KEY)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_coupled_examples_are_refused(kind: Any) -> None:
    def normalised(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, (x - x.mean(axis=0, keepdims=True)) / x.std(axis=0, keepdims=True))

    optimizer = ggn_jax.kfac(normalised, CE, 0.1, example_inputs=kind(batch_of()[0]))
    with pytest.raises(ValueError, match="couples examples"):
        optimizer.init(jax.tree.map(kind, mlp_params()))


def test_uncovered_parameters_are_refused_or_named() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.exp(params["w"]) @ params["v"]

    params, x = {"v": normal(0, 2, 2), "w": normal(1, 3, 2)}, batch_of()[0]
    with pytest.raises(NotImplementedError, match=r"params\['w'\]"):
        ggn_jax.kfac(model, CE, 0.1, example_inputs=x, on_uncovered="error").init(params)
    optimizer = ggn_jax.kfac(model, CE, 0.1, example_inputs=x, on_uncovered="diagonal")
    row = next(row for row in optimizer.report(params).rows if row.parameter == "['w']")
    assert row.curvature == "diagonal 6"
    assert row.why.startswith("uncovered")
    capped = ggn_jax.kfac(model, CE, 0.1, example_inputs=x, on_uncovered="full", max_dense_size=2)
    rows = {row.parameter: row for row in capped.report(params).rows}
    assert rows["['w']"].curvature == "diagonal 6"
