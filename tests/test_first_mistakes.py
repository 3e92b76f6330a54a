"""The registry of first mistakes: each call, and the words that its error must have."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from errors_page import PAGE, page
from flax import linen, nnx
from flax.training.train_state import TrainState
from test_errors import raises

import ggn_jax
from ggn_jax import CrossEntropyLoss, MSELoss, make_batch_grad_output_fn, make_grad_output_fn

KEY = jax.random.key(0)
PARAMS = {"w": jnp.ones((2, 3))}
X, Y = jnp.ones((8, 2)), jax.device_put(np.arange(8) % 3)
CE, MSE = CrossEntropyLoss(), MSELoss()


def model(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def one_output(params: Any, x: jax.Array) -> jax.Array:
    return model(params, x)[:, 0]


class MyModel(eqx.Module):
    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.weight @ x


LINEN = linen.Dense(3)
STATE = TrainState.create(apply_fn=LINEN.apply, params=PARAMS, tx=optax.sgd(0.1))
ARRAY, TENSOR = jnp.ones(3), torch.ones(8, 2)


def optimizer(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    """A first step of training."""
    inputs = batch[0] if isinstance(batch, tuple | list) else X
    made = ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=inputs)
    return made.update(params, made.init(params), params, batch=batch, key=KEY)


def report(model_fn: Any, _: Any, params: Any, batch: Any) -> Any:
    return ggn_jax.report(model_fn, params, batch[0])


CALLS: dict[str, Callable[..., Any]] = {
    "ggn": ggn_jax.GGNLinearOperator,
    "kfac": partial(ggn_jax.KFACLinearOperator, key=KEY),
    "diagonal": ggn_jax.GGNDiagonalLinearOperator,
    "ef": ggn_jax.EFLinearOperator,
    "optimizer": optimizer,
    "report": report,
}
LOSS = "loss must be one of ggn_jax's losses"
CALLED = "ggn_jax calls model_fn(params, inputs)"
# What is passed instead, the error, and its words, in order.
EVERYWHERE: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "an NNX module": ({"model_fn": nnx.Linear(2, 3, rngs=nnx.Rngs(0))}, TypeError, ("model_fn", "Linear", "from_nnx")),
    "a linen module": ({"model_fn": LINEN}, TypeError, ("model_fn", "Dense", "from_linen(module, variables)")),
    "an Equinox layer": (
        {"model_fn": eqx.nn.Sequential([eqx.nn.Linear(2, 3, key=KEY)])},
        TypeError,
        ("model_fn", "Sequential", "from_equinox"),
    ),
    "an Equinox module": (
        {"model_fn": MyModel(jnp.ones((3, 2)))},
        TypeError,
        ("model_fn must be a function of (params, inputs)", "MyModel(x", "from_equinox"),
    ),
    "a torch module": (
        {"model_fn": torch.nn.Linear(2, 3)},
        TypeError,
        ("model_fn", "Linear", "torch_bridge.from_module"),
    ),
    "a function of inputs": ({"model_fn": lambda x: x}, TypeError, ("(params, inputs)", "<lambda>(x)", "Parameters")),
    "model and params swapped": (
        {"model_fn": PARAMS, "params": model},
        TypeError,
        ("model_fn", "dict", "model_fn, loss, params, batch, in this order"),
    ),
    "a function that takes inputs first": ({"model_fn": lambda x, p: x @ p["w"]}, Exception, (CALLED, "params['w']")),
    "a model that returns a pair": (
        {"model_fn": lambda p, x: (model(p, x), 0)},
        TypeError,
        ("model_fn must return one array [N, *out]",),
    ),
    "a TrainState": ({"params": STATE}, TypeError, ("params.step", "int", "TrainState: pass state.params")),
    "NNX's own module as params": (
        {"params": nnx.Linear(2, 3, rngs=nnx.Rngs(0))},
        TypeError,
        (CALLED, "float32[2, 3]", "from_nnx"),
    ),
    "an Equinox module as params": (
        {"params": eqx.nn.MLP(2, 3, 4, 1, key=KEY)},
        TypeError,
        ("params.activation", "must be a floating", "from_equinox"),
    ),
    "tensors as params": (
        {"params": {"w": TENSOR}},
        TypeError,
        ("params['w']", "floating", "torch_bridge.to_jax(tensor)"),
    ),
    "integers among params": ({"params": {**PARAMS, "n": 3}}, TypeError, ("params['n']", "int", "Close model_fn")),
    "no params": ({"params": {}}, ValueError, ("params must hold at least one array",)),
    "tensors as inputs": (
        {"batch": (TENSOR, Y)},
        TypeError,
        ("inputs must be a", "Tensor", "torch_bridge.to_jax(tensor)"),
    ),
}
WITH_TARGETS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "a loss of optax": (
        {"loss": optax.softmax_cross_entropy_with_integer_labels},
        NotImplementedError,
        (LOSS, "Pass ggn_jax.CrossEntropyLoss(class_axis=-1)"),
    ),
    "a loss function": ({"loss": lambda f, y: 0.0}, NotImplementedError, (LOSS, "state its likelihood")),
    "a class of losses": ({"loss": MSELoss}, NotImplementedError, (LOSS, "Pass an instance: MSELoss()")),
    "a loss of torch": ({"loss": torch.nn.MSELoss()}, NotImplementedError, (LOSS, "counterpart", "torch_bridge")),
    "params in the loss's place": ({"loss": ARRAY.tolist()}, NotImplementedError, (LOSS, "model_fn, loss, params")),
    "a dict as batch": (
        {"batch": {"image": X, "label": Y}},
        TypeError,
        ("batch must be", "(inputs, targets)", "dict", "(batch['image'], batch['label'])"),
    ),
    "inputs alone": ({"batch": X}, TypeError, ("batch must be", "an array of shape (8, 2)", "(inputs, targets)")),
    "tensors as targets": (
        {"batch": (X, torch.ones(8))},
        TypeError,
        ("targets", "Tensor", "torch_bridge.to_jax(tensor)"),
    ),
    "a list as targets": ({"batch": (X, [0] * 8)}, TypeError, ("targets", "list", "jnp.asarray")),
    "other numbers of targets": ({"batch": (X, Y[:5])}, ValueError, ("common leading", "inputs (8, 2), targets (5,)")),
    "class indices in a column": (
        {"batch": (X, Y[:, None])},
        ValueError,
        ("targets must have shape (8,)", "got (8, 1)", "targets[..., 0]"),
    ),
    "integers as one-hot": (
        {"batch": (X, jax.nn.one_hot(Y, 3, dtype=int))},
        ValueError,
        ("targets", "got the outputs' shape (8, 3)", "must be floating"),
    ),
    "floating class indices": (
        {"batch": (X, Y.astype(float))},
        ValueError,
        ("targets are floating, thus class probabilities", "(8,)", "must be integers"),
    ),
    "squared errors of a column": (
        {"model_fn": one_output, "loss": MSE, "batch": (X, X[:, :1])},
        ValueError,
        ("targets must have the outputs' shape (8,)", "got (8, 1)", "targets[..., 0]"),
    ),
    "squared errors in a column": (
        {"model_fn": lambda p, x: one_output(p, x)[:, None], "loss": MSE, "batch": (X, X[:, 0])},
        ValueError,
        ("targets must have the outputs' shape (8, 1)", "got (8,)", "targets[..., None]"),
    ),
}


def cases() -> list[Any]:
    found = [(call, name, *case) for name, case in EVERYWHERE.items() for call in CALLS]
    found += [(call, name, *case) for name, case in WITH_TARGETS.items() for call in CALLS if call != "report"]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in found]


@pytest.mark.parametrize(("call", "_name", "change", "error", "words"), cases())
def test_arguments(call: str, _name: str, change: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    given = {"model_fn": model, "loss": CE, "params": PARAMS, "batch": (X, Y), **change}
    with raises(error, *words):
        CALLS[call](given["model_fn"], given["loss"], given["params"], given["batch"])


MADE = ggn_jax.kfac(model, CE, 0.1, example_inputs=X)
GGN, JACOBIAN = ggn_jax.GGNLinearOperator(model, CE, PARAMS, (X, Y)), ggn_jax.JacobianLinearOperator(model, PARAMS, X)
LIST = ("a list of length 2", "from_batches")
ONE = "make a batch of one"
MORE: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a list of batches": (
        lambda: ggn_jax.KFACLinearOperator(model, CE, PARAMS, [(X, Y)] * 2, key=KEY),
        TypeError,
        ("batch", *LIST),
    ),
    "a list of more batches": (
        lambda: ggn_jax.GGNLinearOperator(model, CE, PARAMS, [(X, Y)] * 5),
        TypeError,
        ("batch must be", "a list of length 5", "from_batches"),
    ),
    "one batch as batches": (
        lambda: ggn_jax.KFACLinearOperator.from_batches(model, CE, PARAMS, (X, Y), key=KEY),
        TypeError,
        ("batch 0", "an array of shape (8, 2)", "One is [batch]"),
    ),
    "one example": (
        lambda: ggn_jax.GGNLinearOperator(model, CE, PARAMS, (X[0], Y[0])),
        ValueError,
        ("leading batch axis", "inputs (2,), targets ()", "x[None]"),
    ),
    "an objective for a model": (
        lambda: ggn_jax.report(ggn_jax.Objective(model, CE), PARAMS, X),
        TypeError,
        ("model_fn must be a function", "an Objective", "from_objective", "objective.terms[i].model_fn"),
    ),
    "a wrong name of an option": (
        lambda: ggn_jax.kfac(model, CE, example_inputs=X, fisher="mc"),
        TypeError,
        ("unexpected keyword argument 'fisher'", "Did you mean 'fisher_type'?"),
    ),
    "a report on one example": (lambda: ggn_jax.report(model, PARAMS, X[0]), Exception, (CALLED, "a batch of one")),
    "a report on a batch with targets": (
        lambda: ggn_jax.report(model, PARAMS, (X, Y)),
        TypeError,
        (CALLED, "inputs[1]", "without targets"),
    ),
    "example inputs with targets": (
        lambda: ggn_jax.kfac(model, CE, 0.1, example_inputs=(X, Y)).init(PARAMS),
        TypeError,
        (CALLED, "inputs[1]", "without targets"),
    ),
    "example inputs without a batch axis": (
        lambda: ggn_jax.kfac(model, CE, 0.1, example_inputs=X[0]).init(PARAMS),
        Exception,
        (CALLED, "inputs float64[2]", "first axis is the batch's"),
    ),
    "a batch of other features": (
        lambda: MADE.factors(PARAMS, (jnp.ones((8, 5)), Y), MADE.init(PARAMS), key=KEY),
        TypeError,
        ("(5,) and (2,)", CALLED, "made with example_inputs float64[8, 2]; this batch has inputs float64[8, 5]"),
    ),
    "grads and state swapped": (
        lambda: MADE.update(MADE.init(PARAMS), PARAMS, PARAMS, batch=(X, Y), key=KEY),
        TypeError,
        ("state must be a KFACState", "dict", "grads, state, params, in this order"),
    ),
    "a seed as key": (
        lambda: MADE.update(PARAMS, MADE.init(PARAMS), PARAMS, batch=(X, Y), key=0),
        TypeError,
        ("key must be a JAX PRNG key", "int"),
    ),
    "a batch for one example": (
        lambda: make_grad_output_fn(CE, "type-2")(jnp.ones((8, 3)), Y),
        ValueError,
        ("targets must have shape (3,)", "They fit as a batch", "make_batch_grad_output_fn", "jax.vmap"),
    ),
    "one example for a batch": (
        lambda: make_batch_grad_output_fn(CE, "type-2")(jnp.ones(3), jnp.asarray(0)),
        ValueError,
        ("outputs", "They fit as one example", "x[None]"),
    ),
    "tensors as outputs": (
        lambda: make_grad_output_fn(CE, "type-2")(TENSOR, Y),
        TypeError,
        ("outputs", "Tensor", "torch_bridge"),
    ),
    "a function of optax": (
        lambda: make_grad_output_fn(optax.l2_loss, "mc"),
        NotImplementedError,
        (LOSS, "Pass ggn_jax.MSELoss()", "twice"),
    ),
    "an operator @ a gradient": (
        lambda: GGN @ PARAMS,
        TypeError,
        ("composes operators; got dict", "operator.mv(vector)"),
    ),
    "a flat vector": (
        lambda: GGN.mv(jnp.ones(6)),
        ValueError,
        ("like the parameters", "operator.to_scipy()", "ravel_pytree(params)[1](vector)"),
    ),
    "an array @ an operator": (lambda: np.ones(6) @ GGN, TypeError, ("composes operators", "operator.T.mv(vector)")),
    "an operator + a number": (
        lambda: 0.1 + GGN,
        TypeError,
        ("of two operators; got float", "operator.damped(number)"),
    ),
    "an operator times True": (lambda: True * GGN, TypeError, ("an operator and a number; got True",)),
    "an operator times a string": (lambda: JACOBIAN / "2", TypeError, ("an operator and a number; got '2'",)),
    "an operator times a vector": (
        lambda: GGN * PARAMS,
        TypeError,
        ("an operator and a number; got dict", "operator.mv(vector)"),
    ),
    "a solve without blocks": (
        lambda: GGN.solve(PARAMS),
        AttributeError,
        ("GGNLinearOperator has no 'solve'", "lineax.linear_solve(operator.damped(d)", "KFACLinearOperator"),
    ),
    "an inverse of a Jacobian": (
        lambda: JACOBIAN.inverse(),
        AttributeError,
        ("'inverse'", "lsqr", "GramLinearOperator"),
    ),
    "another library's name": (lambda: GGN.matvec(PARAMS), AttributeError, ("no 'matvec': it is 'mv' here",)),
    "a method with a slip": (lambda: GGN.submatrx("w"), AttributeError, ("'submatrx'. Did you mean 'submatrix'?",)),
    "a wrong option of many batches": (
        lambda: ggn_jax.GGNLinearOperator.from_batches(model, CE, PARAMS, [(X, Y)], chunk=4),
        TypeError,
        ("from_batches got an unexpected keyword argument 'chunk'", "Did you mean 'chunk_size'?"),
    ),
    "a wrong option of an objective": (
        lambda: ggn_jax.GGNDiagonalLinearOperator.from_objective(ggn_jax.Objective(model, CE), PARAMS, [(X, Y)], mc=4),
        TypeError,
        ("unexpected keyword argument 'mc'", "It takes", "mc_samples"),
    ),
    "arguments swapped": (lambda: make_grad_output_fn("mc", CE), ValueError, ("fisher_type must be one of",)),
}


@pytest.mark.parametrize("name", MORE)
def test_calls(name: str) -> None:
    call, error, words = MORE[name]
    with raises(error, *words):
        call()


def test_what_looks_like_a_mistake_and_is_none() -> None:
    """A module of Equinox that is a function of both, and a pair of inputs."""

    class Function(eqx.Module):
        scale: jax.Array

        def __call__(self, params: Any, inputs: Any) -> jax.Array:
            return self.scale[None] * model(params, inputs[0])

    inputs = SimpleNamespace(pair=(X, X)).pair
    assert ggn_jax.GGNLinearOperator(Function(jnp.ones(3)), CE, PARAMS, (inputs, Y)).mv(PARAMS)["w"].shape == (2, 3)


def test_page() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/errors_page.py"
