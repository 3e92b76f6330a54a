"""Errors that are seldom seen: each names its argument, and says what came and what was wanted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
import torch

import ggn_jax
import torch_bridge
from ggn_jax import GGNLinearOperator, JointLoss, MSELoss

BATCH = np.ones((4, 3)), np.ones((4, 2))
PARAMS = {"w": jnp.ones((3, 2))}
JOINT = JointLoss({"a": MSELoss(), "b": MSELoss()})


class StudentLoss(ggn_jax.LikelihoodLoss):
    """With a factor that is no square matrix, and an axis that is named twice."""

    curvature = "fisher"

    def nll(self, f: Any, y: Any) -> Any:
        return jnp.sum(jnp.log1p((y - f) ** 2))

    def sample(self, key: Any, f: Any) -> Any:
        return f + jax.random.t(key, 1.0, f.shape, f.dtype)

    def fisher_sqrt(self, f: Any) -> Any:
        return jnp.zeros(2)


class TwiceLoss(StudentLoss):
    term_axes = (0, -1)


def model_fn(params: Any, x: Any) -> jax.Array:
    return x @ params["w"]


def ggn(fn: Callable[[Any, Any], Any], loss: Any, targets: Any = BATCH[1]) -> Any:
    return GGNLinearOperator(fn, loss, PARAMS, (BATCH[0], targets))


def optimizer(**options: Any) -> Any:
    return ggn_jax.scale_by_kfac(model_fn, MSELoss(), example_inputs=BATCH[0], **options)


def micro_step(*args: Any) -> Any:
    steps = ggn_jax.multi_steps(optimizer(), 2)
    return steps.update(PARAMS, steps.init(PARAMS), *args)


def without_x64() -> Any:
    with jax.enable_x64(False):
        return optimizer(factor_dtype="float64")


LINEAR = torch.nn.Linear(3, 2)


def of_module(module: Any, params: Any) -> Any:
    return torch_bridge.GGNLinearOperator(module, torch.nn.MSELoss(), params, [tuple(map(torch.from_numpy, BATCH))])


def vectors(loss: Any) -> Any:
    return ggn_jax.make_batch_grad_output_fn(loss, "type-2")(jnp.ones((2, 3)), jnp.ones((2, 3)))


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "boolean": (
        lambda: ggn_jax.CrossEntropyLoss(ignore_index=True),
        TypeError,
        "ignore_index must be an integer; got True",
    ),
    "losses": (lambda: JointLoss([MSELoss()]), TypeError, r"losses must be a dict of losses.*got \[MSELoss"),
    "weights": (
        lambda: JointLoss({"a": MSELoss()}, {"a": jnp.ones(2)}),
        ValueError,
        r"weights\['a'\] must be a number; got an array of shape \(2,\)",
    ),
    "outputs of several sizes": (
        lambda: ggn_jax.LossHessian(JOINT, {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}, None),
        ValueError,
        r"one common batch axis; got shapes \{'a': \(2, 3\), 'b': \(4, 3\)\}",
    ),
    "terms of a joint loss": (
        lambda: JOINT.term_value(jnp.ones(2), jnp.ones(2)),
        NotImplementedError,
        "terms of several kinds: use those of its losses",
    ),
    "output that is no array": (
        lambda: ggn(lambda p, x: {"a": x @ p["w"], "b": [x]}, JOINT, None),
        TypeError,
        r"model_fn must return an array \[N, \*out\] as output 'b'; got \[",
    ),
    "outputs of a model of several sizes": (
        lambda: ggn(lambda p, x: {"a": x @ p["w"], "b": (x @ p["w"])[:1]}, JOINT, None),
        ValueError,
        r"outputs of model_fn must have one common batch axis; got shapes .*\(1, 2\)",
    ),
    "factor": (
        lambda: vectors(StudentLoss()),
        ValueError,
        r"StudentLoss.fisher_sqrt must return an array of shape \(\); got \(2,\)",
    ),
    "axis": (lambda: vectors(TwiceLoss()), ValueError, r"TwiceLoss.term_axes = \(0, -1\) names an axis twice"),
    "function of a batch": (
        lambda: ggn_jax.map_batches([BATCH], lambda batch: batch),
        TypeError,
        "fn must be a function of one batch; got list: it comes before the batches",
    ),
    "iterator": (
        lambda: ggn_jax.map_batches(lambda batch: batch, iter([BATCH])),
        TypeError,
        "a list or a loader, which can be gone over again; got list_iterator",
    ),
    "hash": (lambda: hash(ggn(model_fn, MSELoss())), TypeError, r"has no hash .* use equinox.filter_jit"),
    "damped": (
        lambda: ggn_jax.DampedLinearOperator(lx.MatrixLinearOperator(jnp.ones((2, 2))), 1.0),
        ValueError,
        "operator must be a symmetric lineax operator; got MatrixLinearOperator",
    ),
    "damping": (
        lambda: ggn(model_fn, MSELoss()).damped(jnp.inf),
        ValueError,
        "damping must be finite; got inf",
    ),
    "no operators": (lambda: ggn_jax.average_operators([]), ValueError, "needs at least one operator; got none"),
    "operators without blocks": (
        lambda: ggn_jax.average_operators([ggn(model_fn, MSELoss())]),
        TypeError,
        r"operators\[0\] must be an operator with blocks, as KFAC; got GGN",
    ),
    "optimizer": (
        lambda: ggn_jax.multi_steps(optax.sgd(0.1), 2),
        TypeError,
        "optimizer must be made by kfac or scale_by_kfac; got GradientTransformation",
    ),
    "micro-batch without params": (lambda: micro_step(), ValueError, "update needs params"),
    "micro-batch without batch": (lambda: micro_step(PARAMS), TypeError, r"update needs batch=\(inputs, targets\) or"),
    "dtype": (without_x64, ValueError, "factor_dtype is float64, which JAX has not without"),
    "masked": (
        lambda: optimizer().init({"w": PARAMS["w"], "v": optax.MaskedNode()}),
        ValueError,
        r"params hold optax.MaskedNode.*pass full_params=params",
    ),
    "full params": (
        lambda: optimizer(full_params={**PARAMS, "u": PARAMS["w"]}).init({**PARAMS, "v": optax.MaskedNode()}),
        ValueError,
        "full_params must be a pytree like params, with values where those are masked",
    ),
    "module": (
        lambda: of_module(3, [LINEAR.weight]),
        TypeError,
        "model_func must be a torch.nn.Module or a ConvertedModule; got int",
    ),
    "no parameters": (lambda: of_module(LINEAR, []), ValueError, "at least one parameter of the module"),
    "parameters of others": (
        lambda: of_module(LINEAR, [LINEAR.weight, torch.nn.Linear(3, 2).bias]),
        ValueError,
        r"different parameters of model_func, in a list or dict; numbers \[1\] are not",
    ),
    "optimizer of a module": (
        lambda: torch_bridge.KFAC(3, torch.nn.MSELoss(), 0.1),
        TypeError,
        "module must be a torch.nn.Module, of which all parameters.*; got int",
    ),
    "injected": (
        lambda: ggn_jax.kfac(model_fn, MSELoss(), 0.1, example_inputs=BATCH[0], factor_interval=jnp.asarray(2)),
        TypeError,
        r"factor_interval must be a value of Python's own; .*name 'factor_interval' in its static_args",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rare_errors(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()
