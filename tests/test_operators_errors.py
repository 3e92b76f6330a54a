"""What curvature operators refuse, and how they say so."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from problems import (
    CE,
    CE_SUM,
    DAMPING,
    MLP_PARAMS,
    OPERATORS,
    N,
    StudentLoss,
    X,
    assert_close,
    flat,
    mlp,
    normal,
)

import ggn_jax
from ggn_jax import EFLinearOperator, GGNDiagonalLinearOperator, GGNLinearOperator, HessianLinearOperator

every_operator = pytest.mark.parametrize("cls", OPERATORS, ids=lambda cls: cls.__name__)
MODEL, LOSS, PARAMS, (INPUTS, TARGETS) = CE_SUM.args
KEYS = jax.random.split(jax.random.key(0), N)


class SubclassedCrossEntropyLoss(ggn_jax.CrossEntropyLoss):
    pass


@every_operator
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (("mlp", LOSS, PARAMS, (INPUTS, TARGETS)), {}, TypeError, "model_fn must be a function .* got str"),
        ((MODEL, LOSS, {}, (INPUTS, TARGETS)), {}, ValueError, "params must hold at least one array"),
        (
            (MODEL, LOSS, {**PARAMS, "deep": [PARAMS, {"step": jnp.arange(3)}]}, (INPUTS, TARGETS)),
            {},
            TypeError,
            re.escape("params['deep'][1]['step'] must be a floating JAX array; got int"),
        ),
        ((MODEL, LOSS, {**PARAMS, "rate": 0.1}, (INPUTS, TARGETS)), {}, TypeError, r"params\['rate'\] .* got float"),
        ((MODEL, LOSS, {**PARAMS, "w1": np.ones((3, 4))}, (INPUTS, TARGETS)), {}, TypeError, r"\['w1'\] .* ndarray"),
        ((MODEL, LOSS, PARAMS, INPUTS), {}, TypeError, r"batch must be a pair \(inputs, targets\)"),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS, TARGETS)), {}, TypeError, "batch must be a pair .* tuple of length 3"),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS[:-1])), {}, ValueError, r"common leading batch axis.*\(5, 3\).*\(4,\)"),
        ((MODEL, LOSS, PARAMS, ([INPUTS, INPUTS[:2]], TARGETS)), {}, ValueError, "common leading batch axis"),
        ((MODEL, LOSS, PARAMS, (INPUTS[0, 0], TARGETS)), {}, ValueError, "common leading batch axis"),
        ((MODEL, LOSS, PARAMS, (INPUTS[:0], TARGETS[:0])), {}, ValueError, "at least one example"),
        (
            (MODEL, LOSS, PARAMS, ("text", TARGETS)),
            {},
            TypeError,
            "inputs must be a JAX or NumPy array, or a number; got str",
        ),
        (
            (MODEL, LOSS, PARAMS, ([X, "text"], TARGETS)),
            {},
            TypeError,
            r"inputs\[1\] must be a JAX or NumPy .* got str",
        ),
        ((MODEL, LOSS, PARAMS, (INPUTS, torch.zeros(N))), {}, TypeError, "targets must be .* got Tensor"),
        ((lambda p, x: {"logits": mlp(p, x)}, LOSS, PARAMS, (INPUTS, TARGETS)), {}, TypeError, "must return one array"),
        ((lambda p, x: mlp(p, x).T, LOSS, PARAMS, (INPUTS, TARGETS)), {}, ValueError, r"N = 5; got shape \(3, 5\)"),
        ((lambda p, x: jnp.sum(mlp(p, x)), LOSS, PARAMS, (INPUTS, TARGETS)), {}, ValueError, r"N = 5; got shape \(\)"),
        (
            (lambda p, x: mlp(p, x).astype(int), LOSS, PARAMS, (INPUTS, TARGETS)),
            {},
            TypeError,
            "outputs of model_fn must have one of the dtypes",
        ),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS), None), {}, TypeError, "positional"),
        ((MODEL, LOSS, {"w": KEYS}, (INPUTS, TARGETS)), {}, TypeError, r"params\['w'\] must be a floating JAX array"),
        ((MODEL, LOSS, PARAMS, (INPUTS, KEYS)), {}, TypeError, "targets must be an array of numbers; got a PRNG key"),
        (
            (MODEL, LOSS, PARAMS, ({"x": INPUTS, "key": KEYS[0]}, TARGETS)),
            {},
            ValueError,
            r"inputs\['key'\] \(\), inputs\['x'\] \(5, 3\), targets \(5,\)\. A key for each .*split\(key, N\)",
        ),
        (CE_SUM.args, {"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1; got 0"),
        (CE_SUM.args, {"chunk_size": -3}, ValueError, "chunk_size must be an integer of at least 1; got -3"),
        (CE_SUM.args, {"chunk_size": 2.0}, TypeError, "chunk_size must be an integer"),
        (CE_SUM.args, {"chunk_size": True}, TypeError, "chunk_size must be an integer"),
        ((MODEL, jnp.square, PARAMS, (INPUTS, TARGETS)), {}, NotImplementedError, "loss must be one of"),
        ((MODEL, torch.nn.MSELoss(), PARAMS, (INPUTS, TARGETS)), {}, NotImplementedError, "CrossEntropyLoss"),
        ((MODEL, SubclassedCrossEntropyLoss(), PARAMS, (INPUTS, TARGETS)), {}, NotImplementedError, "is a subclass of"),
        ((MODEL, LOSS, PARAMS, (INPUTS, np.full(N, 3))), {}, ValueError, "class indices from 0 to 2 .*got 3"),
        ((MODEL, ggn_jax.BCEWithLogitsLoss(), PARAMS, (INPUTS, 2 + INPUTS * 0)), {}, ValueError, "between 0 and 1"),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS[:, None])), {}, ValueError, r"targets must have shape \(5,\)"),
        ((MODEL, ggn_jax.MSELoss(), PARAMS, (INPUTS, TARGETS * 1.0)), {}, ValueError, "must have the outputs' shape"),
    ],
)
def test_refuses(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(*args, **kwargs)


@pytest.mark.parametrize("cls", [GGNLinearOperator, GGNDiagonalLinearOperator], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mc_samples": -1, "key": jax.random.key(0)}, ValueError, "mc_samples must be an integer of at least 1"),
        ({"mc_samples": 1.0, "key": jax.random.key(0)}, TypeError, "mc_samples must be an integer"),
        ({"mc_samples": True, "key": jax.random.key(0)}, TypeError, "mc_samples must be an integer"),
        ({"mc_samples": False}, TypeError, "mc_samples must be an integer"),
        ({"mc_samples": None, "key": jax.random.key(0)}, TypeError, "mc_samples must be an integer"),
        ({"mc_samples": 2}, ValueError, "needs a key"),
        ({"mc_samples": 2, "key": 0}, TypeError, "key must be a JAX PRNG key"),
        ({"mc_samples": 2, "key": jax.random.split(jax.random.key(0), N)}, ValueError, "key must be one key"),
    ],
)
def test_refuses_monte_carlo(cls: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(*CE.args, **kwargs)


@pytest.mark.parametrize("cls", [GGNLinearOperator, EFLinearOperator, HessianLinearOperator])
def test_chunks_need_independent_examples(cls: Any) -> None:
    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, x - jnp.mean(x, 0, keepdims=True))

    args = model_fn, LOSS, PARAMS, (INPUTS, TARGETS)
    with pytest.raises(ValueError, match="couples examples"):
        cls(*args, chunk_size=2)
    cls(*args), cls(*args, chunk_size=N)


def test_models_of_no_inputs() -> None:
    args = (lambda params, _: mlp(params, X)), LOSS, PARAMS, ((), TARGETS)
    assert_close(GGNLinearOperator(*args).as_matrix(), CE_SUM.ggn())
    for make in (GGNDiagonalLinearOperator, lambda *args: GGNLinearOperator(*args, chunk_size=2)):
        with pytest.raises(ValueError, match="inputs must hold an array"):
            make(*args)


@pytest.mark.parametrize("cls", [GGNLinearOperator, GGNDiagonalLinearOperator], ids=lambda cls: cls.__name__)
@pytest.mark.by_default("GGNDiagonalLinearOperator")
def test_loss_without_exact_factor(cls: Any) -> None:
    args = mlp, StudentLoss(), MLP_PARAMS, (X, normal("y", N, 3))
    with pytest.raises(NotImplementedError, match="StudentLoss declares curvature='fisher' and has no exact factor"):
        cls(*args)
    operator = cls(*args, mc_samples=2, key=jax.random.key(0), chunk_size=2)
    assert np.linalg.norm(flat(operator.mv(MLP_PARAMS))) > 0


@pytest.mark.parametrize("cls", [EFLinearOperator, HessianLinearOperator], ids=lambda cls: cls.__name__)
def test_ef_and_hessian_need_no_factor(cls: Any) -> None:
    args = mlp, StudentLoss(), MLP_PARAMS, (X, normal("y", N, 3))
    assert np.linalg.norm(flat(cls(*args).mv(MLP_PARAMS))) > 0


def test_refuses_other_arguments() -> None:
    with pytest.raises(ValueError, match="per must be 'term' or 'example'"):
        EFLinearOperator(*CE.args, per="token")
    with pytest.raises(ValueError, match="method must be 'layers' or 'data'"):
        GGNDiagonalLinearOperator(*CE.args, method="fast")
    for value, error in ((0, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match="vector_chunk_size must be an integer of at least 1"):
            GGNDiagonalLinearOperator(*CE.args, vector_chunk_size=value)


@every_operator
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["w1"], "vector must be a pytree like the parameters"),
        (lambda v: {**v, "w3": v["w1"]}, "vector must be a pytree like the parameters"),
        (lambda v: {**v, "w1": v["w1"].T}, r"vector\['w1'\] must have shape \(3, 4\) and dtype float64.* got \(4, 3\)"),
        (lambda v: {**v, "b1": v["b1"].astype("float32")}, r"vector\['b1'\] .*dtype float64.* float32"),
        (lambda v: {**v, "b1": v["b1"].astype("int32")}, r"vector\['b1'\] .*dtype float64.* int32"),
    ],
)
@pytest.mark.parametrize("damped", [False, True])
def test_refuses_vectors(cls: Any, damped: bool, change: Callable[[Any], Any], message: str) -> None:
    operator = cls(*CE.args)
    with pytest.raises(ValueError, match=message):
        (operator.damped(DAMPING) if damped else operator).mv(change(CE.vector))
