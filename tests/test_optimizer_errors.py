"""What the optimizer does where training goes wrong, and what it refuses."""

import re
from functools import cache, partial
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
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

# What goes wrong in training.


WITHOUT_MOMENTUM = ggn_jax.QuadraticModel(momentum=False)


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
    "options", [{}, {"ekfac": True}, {"damping_method": "exact"}, {"learning_rate": WITHOUT_MOMENTUM}]
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
    targets = {"none": jnp.zeros(size, int), "some": jnp.arange(size) % 2 - 1, "all": jnp.full(size, -1)}[ignored]
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


# Arguments.


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
        ({"adapt_damping": 5}, TypeError, "unexpected keyword argument 'adapt_damping'. Did you mean 'damping'?"),
        ({"learning_rate": -1.0}, ValueError, f"{RATE}(...); got -1.0"),
        ({"learning_rate": float("inf")}, ValueError, f"{RATE}(...); got inf"),
        ({"learning_rate": float("nan")}, ValueError, f"{RATE}(...); got nan"),
        ({"learning_rate": ggn_jax.QuadraticModel(), "momentum": None}, ValueError, "QuadraticModel(momentum=False)."),
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
    }
    return ggn_jax.kfac(mlp, CE, 0.1, **options, **changes[name])


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
    ],
)
def test_states_of_other_optimizers_are_refused(mine: str, other: str, message: str) -> None:
    params, batch = mlp_params(), batch_of()
    optimizer, state = of_kind(mine), jax.eval_shape(of_kind(other).init, params)
    with pytest.raises((TypeError, ValueError), match=f"{message}. .* `init` of this one"):
        jax.eval_shape(partial(optimizer.update, batch=batch, key=KEY), params, state, params)


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
