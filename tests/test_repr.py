"""What things are, in one short line."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_user_losses import StudentTLoss

import ggn_jax
import torch_bridge

KEY = jax.random.key(0)
MODEL, PARAMS = ggn_jax.from_nnx(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0))))
X, LOSS = jnp.ones((8, 2), jnp.float32), ggn_jax.CrossEntropyLoss()
ARGS = MODEL, LOSS, PARAMS, (X, jax.device_put(np.arange(8) % 4))
KFAC = ggn_jax.kfac(MODEL, LOSS, 0.1, example_inputs=X)
OF = "4 arrays, 25 entries"
AT = "loss=CrossEntropyLoss(), outputs=float32[8, 4]"

LAST = "statistics=5 arrays, 5 entries"
CASES: dict[str, Callable[[], Any]] = {
    "MSELoss()": ggn_jax.MSELoss,
    "CrossEntropyLoss(weight=float64[3], ignore_index=-1, class_axis=-1)": lambda: ggn_jax.CrossEntropyLoss(
        jnp.ones(3), ignore_index=-1, class_axis=-1
    ),
    "BCEWithLogitsLoss(reduction='sum')": lambda: ggn_jax.BCEWithLogitsLoss(reduction="sum"),
    "StudentTLoss(scale=0.1)": lambda: StudentTLoss(scale=0.1),
    "LossHessian(loss=MSELoss(), outputs=float64[2, 3])": lambda: ggn_jax.LossHessian(
        ggn_jax.MSELoss(), jnp.ones((2, 3)), jnp.ones((2, 3))
    ),
    "ModelFn(Sequential)": lambda: MODEL,
    "ModelFn(Linear)": lambda: ggn_jax.from_equinox(eqx.nn.Linear(2, 3, key=KEY))[0],
    f"GGNLinearOperator(params={OF}, {AT}, mc_samples=0)": lambda: ggn_jax.GGNLinearOperator(*ARGS),
    f"EFLinearOperator(params={OF}, {AT}, per='example')": lambda: ggn_jax.EFLinearOperator(*ARGS),
    f"HessianLinearOperator(params={OF}, {AT})": lambda: ggn_jax.HessianLinearOperator(*ARGS),
    f"GGNDiagonalLinearOperator(params={OF})": lambda: ggn_jax.GGNDiagonalLinearOperator(*ARGS),
    f"DampedLinearOperator(operator=HessianLinearOperator(params={OF}, {AT}), damping=float64[])": lambda: (
        ggn_jax.HessianLinearOperator(*ARGS).damped(0.1)
    ),
    "JointLoss(losses={'a': MSELoss()}, weights={'a': 2.0})": lambda: ggn_jax.JointLoss(
        {"a": ggn_jax.MSELoss()}, {"a": 2.0}
    ),
    "Unbatched(float64[3])": lambda: ggn_jax.Unbatched(jnp.ones(3)),
    f"JacobianTransposeLinearOperator(jacobian=JacobianLinearOperator(params={OF}, outputs=float32[8, 4]))": lambda: (
        ggn_jax.JacobianLinearOperator(MODEL, PARAMS, X).T
    ),
    f"KFACLinearOperator(params={OF}, blocks=2)": lambda: ggn_jax.KFACLinearOperator(*ARGS, key=KEY),
    f"KFACState(curvature=12 arrays, 86 entries, velocity={OF}, rejected=int32[], {LAST})": lambda: KFAC.init(PARAMS),
}


@pytest.mark.parametrize("text", CASES)
def test_repr(text: str) -> None:
    assert repr(CASES[text]()) == text


def test_under_jit() -> None:
    seen = []
    jax.jit(lambda state: seen.append(repr(state)))(KFAC.init(PARAMS))
    assert seen[0].startswith("KFACState(curvature=12 arrays")


def test_versions() -> None:
    version = ggn_jax.__version__
    assert version[0].isdigit()
    assert torch_bridge.__version__ == version
    for package in (ggn_jax, torch_bridge):
        assert not hasattr(package, "no_such_name")


def tied(params: Any, x: jax.Array) -> jax.Array:
    for _ in range(3):
        x = jnp.tanh(x @ params["u"])
    return x @ params["w"] * params["s"][None]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"max_dense_size": 2, "large": "diagonal"},
            "['w']: a factor of size 3 is more than max_dense_size = 2: diagonal",
        ),
        ({"max_dense_size": 2, "block_size": 2}, "max_dense_size = 2: 2 blocks on its diagonal"),
        ({"max_small_size": 1}, "['s']: size 2 is more than max_small_size = 1: diagonal"),
        ({}, "['u']: 3 Kronecker terms are inverted as two that are near their sum"),
    ],
    ids=["diagonal", "blocks", "small", "terms"],
)
def test_reports_say_what_is_less_than_exact(options: Any, why: str) -> None:
    params = {"u": jnp.ones((3, 3)), "w": jnp.ones((3, 2)), "s": jnp.ones(2)}
    scale = ggn_jax.scale_by_kfac(tied, ggn_jax.MSELoss(), example_inputs=jnp.ones((4, 3)), **options)
    assert why in str(scale.report(params))
