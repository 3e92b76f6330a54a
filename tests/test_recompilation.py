"""No public function compiles anything in a second call with the same shapes, outside of `jit` too."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import ggn_jax

RNG = np.random.default_rng(0)
PARAMS = {"w": jax.device_put(RNG.normal(size=(3, 4))), "s": jnp.ones(4), "v": jax.device_put(RNG.normal(size=(4, 2)))}
INPUTS, LABELS = jax.device_put(RNG.normal(size=(6, 3))), jax.device_put(np.arange(6) % 2)
LOSS, DAMPINGS = ggn_jax.CrossEntropyLoss(), {"w": 0.1, "s": 0.2, "v": 0.3}


def model_fn(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] * p["s"][None]) @ p["v"]


ARGS = model_fn, LOSS, PARAMS, (INPUTS, LABELS)
OUTPUTS = model_fn(PARAMS, INPUTS)
KEY = jax.random.key(0)
KRONECKER = [ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator, ggn_jax.KFOCLinearOperator]
PRODUCTS = [ggn_jax.GGNLinearOperator, ggn_jax.EFLinearOperator, ggn_jax.HessianLinearOperator]


def products(cls: Any, i: int) -> None:
    operator = cls(*ARGS)
    operator.mv(PARAMS)
    operator.as_matrix()
    operator.damped(0.1 + i).mv(PARAMS)
    operator.damped(0.1 + i).as_matrix()
    (2 * operator).mv(PARAMS)


def diagonal(i: int) -> None:
    operator = ggn_jax.GGNDiagonalLinearOperator(*ARGS)
    operator.mv(PARAMS)
    operator.as_matrix()
    operator.damped(0.1 + i).inverse().mv(PARAMS)


def blocks(cls: Any, i: int) -> None:
    operator = cls(*ARGS, fisher_type="type-2")
    damping = 0.1 + i
    made = [operator, operator.damped(damping), operator.damped(DAMPINGS)]
    made += [2 * operator, operator + operator] if cls is ggn_jax.KFACLinearOperator else []
    for one in made:
        one.mv(PARAMS)
        one.as_matrix()
        one.trace()
        one.frobenius_norm()
        one.diagonal()
        one.logdet(damping)
        one.det(damping)
        one.solve(PARAMS, damping)
        one.solve(PARAMS, damping, "heuristic")
        one.sqrt(damping)
        one.inverse_sqrt(damping)
        one.block("w")
        one.factors()
    lx.linear_solve(operator.damped(damping), PARAMS, ggn_jax.BlockSolver())
    ggn_jax.average_operators([operator, operator], [1.0, 2.0])
    if cls is not ggn_jax.EKFACLinearOperator:
        ggn_jax.average_factors([operator, operator])
    if cls is not ggn_jax.KFOCLinearOperator:
        cls.from_batches(*ARGS[:3], [ARGS[3], ARGS[3]], fisher_type="type-2")


def vectors(i: int) -> None:
    del i
    for kind in ("type-2", "mc", "empirical"):
        ggn_jax.make_batch_grad_output_fn(LOSS, kind)(OUTPUTS, LABELS, KEY)
        ggn_jax.make_grad_output_fn(LOSS, kind)(OUTPUTS[0], LABELS[0], KEY)
    ggn_jax.make_grad_output_sampler(LOSS)(OUTPUTS[0], 2, LABELS[0], KEY)
    ggn_jax.loss_hessian_matrix_sqrt(OUTPUTS[0], LABELS[0], LOSS)
    hessian = ggn_jax.LossHessian(LOSS, OUTPUTS, LABELS)
    for method in (hessian.mv, hessian.sqrt_mv, hessian.sqrt_rmv):
        method(OUTPUTS)
    hessian.diagonal()
    hessian.trace()
    LOSS(OUTPUTS, LABELS)


def report(i: int) -> None:
    del i
    ggn_jax.report(model_fn, PARAMS, INPUTS)


OPTIMIZERS = {
    name: ggn_jax.kfac(*ARGS[:2], rate, example_inputs=INPUTS, **options)
    for name, rate, options in [
        ("kfac", 0.1, {"inverse_interval": 2, "factor_interval": 2}),
        ("quadratic", ggn_jax.QuadraticModel(), {"damping": ggn_jax.LevenbergMarquardt(interval=2), "ekfac": True}),
    ]
}


def steps(optimizer: ggn_jax.KFACTransformation, i: int) -> None:
    """Outside of `jit`, with steps of which some renew factors and inverses."""
    del i
    state = optimizer.init(PARAMS)
    for _ in range(3):
        _, grads, factors = optimizer.value_and_grad_and_factors(PARAMS, ARGS[3], state, key=KEY)
        _, state = optimizer.update(grads, state, PARAMS, batch=ARGS[3], factors=factors)


CALLS: dict[str, Callable[[int], None]] = {
    "vectors": vectors,
    "report": report,
    "GGNDiagonalLinearOperator": diagonal,
    **{cls.__name__: lambda i, cls=cls: products(cls, i) for cls in PRODUCTS},
    **{cls.__name__: lambda i, cls=cls: blocks(cls, i) for cls in KRONECKER},
    **{name: lambda i, made=made: steps(made, i) for name, made in OPTIMIZERS.items()},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.by_default(
    "KFOCLinearOperator",
    "kfac",
    "HessianLinearOperator",
    "GGNLinearOperator",
    "EFLinearOperator",
    "GGNDiagonalLinearOperator",
    "report",
    "vectors",
)
def test_nothing_compiles_in_a_second_call(name: str, caplog: pytest.LogCaptureFixture) -> None:
    CALLS[name](0)
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        CALLS[name](1)
    compiled = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling ")]
    assert not compiled


def test_what_is_compiled_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        jax.jit(lambda x: x + 1)(1.0)
    assert any(record.getMessage().startswith("Compiling ") for record in caplog.records)
