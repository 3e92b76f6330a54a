"""Targets and keys are needed where they are looked at, and nowhere else."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_errors import raises
from test_user_losses import GammaLoss, GaussianLoss, SoftmaxLoss, WeightedVectorLoss

import ggn_jax
from ggn_jax import BCEWithLogitsLoss, CrossEntropyLoss, LikelihoodLoss, LossHessian, MSELoss

KEY = jax.random.key(0)
N = 4


class LogNormalLoss(LikelihoodLoss):
    """Positive targets: 0, which stands for others elsewhere, is not of the domain."""

    curvature = "hessian"

    def nll(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return 0.5 * (f - jnp.log(y)) ** 2

    def sample(self, key: jax.Array, f: jax.Array) -> jax.Array:
        return jnp.exp(f + jax.random.normal(key, f.shape, f.dtype))

    def term_valid(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return y > 0


class LogNormalPairLoss(LogNormalLoss):
    """The same for vectors as targets."""

    term_axes = (1,)

    def nll(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(super().nll(f, y))

    def term_valid(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.all(y > 0)


def normal(*shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(0).normal(size=shape))


def integers(high: int, *shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(1).integers(high, size=shape))


# The loss, the shape of its outputs, and targets like any others.
FREE: dict[str, tuple[ggn_jax.Loss, tuple[int, ...], Any]] = {
    "mse": (MSELoss(), (N, 2, 3), normal(N, 2, 3)),
    "ce": (CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1), (N, 3), integers(3, N)),
    "ce-ignoring-0": (CrossEntropyLoss(ignore_index=0, class_axis=-1), (N, 2, 3), 1 + integers(2, N, 2)),
    "bce": (BCEWithLogitsLoss(np.array([0.5, 1.0, 2.0])), (N, 3), integers(2, N, 3).astype(float)),
    "log-normal": (LogNormalLoss(reduction="sum"), (N, 3), 1 + integers(5, N, 3)),
    "pair": (LogNormalPairLoss(), (N, 3, 2), 1 + integers(5, N, 3, 2)),
    "gaussian": (GaussianLoss(), (N, 2), normal(N)),
}


@pytest.mark.parametrize("name", FREE)
@pytest.mark.by_default("pair", "log-normal")
def test_vectors(name: str) -> None:
    loss, shape, targets = FREE[name]
    outputs = normal(*shape)
    for kind in ("type-2", "mc"):
        fn = ggn_jax.make_batch_grad_output_fn(loss, kind, 2)
        wanted = fn(outputs, targets, KEY)
        assert np.isfinite(wanted).all()
        np.testing.assert_array_equal(fn(outputs, None, KEY), wanted)
    one = ggn_jax.make_grad_output_fn(loss, "type-2")
    np.testing.assert_array_equal(one(outputs[0], None), one(outputs[0], targets[0]))


def test_other_calls() -> None:
    loss, shape, targets = FREE["ce"]
    outputs = normal(*shape)
    mapped = jax.jit(jax.vmap(ggn_jax.make_grad_output_fn(loss, "type-2")))
    np.testing.assert_array_equal(mapped(outputs, None), mapped(outputs, targets))
    np.testing.assert_array_equal(*[LossHessian(loss, outputs, y).mv(outputs) for y in (None, targets)])
    np.testing.assert_array_equal(
        *[ggn_jax.make_grad_output_sampler(loss)(outputs[0], 2, y, KEY) for y in (None, targets[0])]
    )


PRECISION = jnp.eye(2)
# The loss, the shape of its outputs, and why it needs targets.
BOUND: dict[str, tuple[ggn_jax.Loss, tuple[int, ...], str]] = {
    "ce": (CrossEntropyLoss(jnp.ones(3)), (N, 3), "class weights"),
    "bce": (BCEWithLogitsLoss(pos_weight=2.0), (N, 3), "pos_weight"),
    "gamma": (GammaLoss(), (N, 3), "its Hessian"),
    "softmax": (SoftmaxLoss(axis=-1), (N, 3), "may depend"),  # it does not, but its jaxpr does not tell
    "weighted": (WeightedVectorLoss(PRECISION), (N, 2), "its weights"),
}


@pytest.mark.parametrize("name", BOUND)
def test_losses_that_need_targets(name: str) -> None:
    loss, shape, why = BOUND[name]
    outputs = normal(*shape)
    for kind in ("type-2", "mc"):
        with raises(ValueError, "targets must be given", type(loss).__name__, why):
            ggn_jax.make_batch_grad_output_fn(loss, kind)(outputs, None, KEY)
    assert ggn_jax.make_batch_grad_output_fn(loss, "forward-only")(outputs, None).shape == (0, *shape)


def test_what_needs_targets() -> None:
    outputs, loss = normal(N, 3), MSELoss()
    with raises(TypeError, "targets", "fisher_type 'empirical'", "None"):
        ggn_jax.make_batch_grad_output_fn(loss, "empirical")(outputs, None)
    with raises(TypeError, "targets", "NoneType"):
        loss(outputs, None)
    with raises(ValueError, "no targets fit classes on the first axis", "class_axis=-1"):
        ggn_jax.make_batch_grad_output_fn(CrossEntropyLoss(), "type-2")(normal(N, 3, 2), None)


PARAMS, X, Y = {"w": normal(2, 3)}, normal(N, 2), integers(3, N)
LOSS, WEIGHTED = CrossEntropyLoss(), CrossEntropyLoss(jnp.arange(1.0, 4))


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


# Every constructor takes a key, whether it needs one or not.
OPERATORS = {
    "ggn": ggn_jax.GGNLinearOperator,
    "ggn-mc": partial(ggn_jax.GGNLinearOperator, mc_samples=2),
    "diagonal": ggn_jax.GGNDiagonalLinearOperator,
    "diagonal-mc": partial(ggn_jax.GGNDiagonalLinearOperator, mc_samples=2, method="data"),
    "kfac": partial(ggn_jax.KFACLinearOperator, fisher_type="type-2", mc_samples=0),
    "kfac-mc": ggn_jax.KFACLinearOperator,
    "kfac-forward": partial(ggn_jax.KFACLinearOperator, fisher_type="forward-only"),
    "ekfac": partial(ggn_jax.EKFACLinearOperator, fisher_type="type-2"),
    "kfoc": partial(ggn_jax.KFOCLinearOperator, fisher_type="type-2"),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.by_default("ggn", "kfac", "diagonal-mc", "kfac-forward")
def test_operators(name: str) -> None:
    make = partial(OPERATORS[name], linear, key=KEY)
    got, wanted = (make(LOSS, PARAMS, (X, y)).mv(PARAMS)["w"] for y in (None, Y))
    np.testing.assert_array_equal(got, wanted)
    if name == "kfac-forward":  # it looks neither at targets nor at the loss
        np.testing.assert_array_equal(make(WEIGHTED, PARAMS, (X, None)).mv(PARAMS)["w"], wanted)
        return
    with raises(ValueError, "targets must be given", "class weights"):
        make(WEIGHTED, PARAMS, (X, None))


def test_operators_that_need_targets() -> None:
    for make in (ggn_jax.EFLinearOperator, ggn_jax.HessianLinearOperator):
        with raises(TypeError, "targets", "the value of the loss", "None"):
            make(linear, LOSS, PARAMS, (X, None))
    with raises(TypeError, "targets", "'empirical'", "None"):
        ggn_jax.KFACLinearOperator(linear, LOSS, PARAMS, (X, None), fisher_type="empirical", key=KEY)


@pytest.mark.sweep
def test_batches() -> None:
    make = partial(ggn_jax.KFACLinearOperator.from_batches, linear, LOSS, PARAMS, fisher_type="type-2", key=KEY)
    got, wanted = (make([(X, y), (X[:3], z)]).mv(PARAMS)["w"] for y, z in ((None, None), (Y, Y[:3])))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "forward-only", "empirical"])
@pytest.mark.by_default("forward-only", "mc")
def test_optimizer(fisher_type: str) -> None:
    scale = ggn_jax.scale_by_kfac(linear, LOSS, example_inputs=X, damping=0.1, fisher_type=fisher_type)
    state = scale.init(PARAMS)
    update = partial(scale.update, PARAMS, state, PARAMS, key=KEY)
    if fisher_type == "empirical":
        with raises(TypeError, "targets", "'empirical'", "None"):
            update(batch=(X, None))
        return
    got, wanted = (jax.jit(update)(batch=(X, y))[0]["w"] for y in (None, Y))
    np.testing.assert_array_equal(got, wanted)
    assert jax.eval_shape(scale.factors, PARAMS, (X, None), state, key=KEY).batches.shape == ()
    with raises(TypeError, "targets", "the value of the loss", "None"):
        scale.value_and_grad_and_factors(PARAMS, (X, None), state, key=KEY)


def test_an_optimizer_that_looks_at_the_loss() -> None:
    optimizer = ggn_jax.kfac(linear, LOSS, example_inputs=X, fisher_type="type-2")
    with raises(TypeError, "targets", "the value of the loss", "None"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, batch=(X, None))
