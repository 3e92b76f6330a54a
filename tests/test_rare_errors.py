"""Errors that are seldom seen: each names its argument, and says what came and what was wanted."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ggn_jax
import torch_bridge
from ggn_jax import GGNLinearOperator, JointLoss, MSELoss
from torch_bridge.losses import build_loss

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


def layers() -> Any:
    return ggn_jax.find_layers(lambda params, x: x @ jax.tree.leaves(params)[0], PARAMS, BATCH[0])


def io(params: Any) -> Any:
    return ggn_jax.layer_io(layers(), MSELoss(), params, BATCH)


def on_explicit_mesh() -> Any:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    return io(jax.device_put(PARAMS, NamedSharding(mesh, P())))


def given(a: Any) -> Any:
    """An operator of a factor `A`, and the identity as `B`."""
    return ggn_jax.from_factors(layers(), {"w": (jnp.asarray(a)[None], jnp.eye(2)[None])})


class Double(torch.nn.Module):
    """A layer in float64, beside a number in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2).double()
        self.scale = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


class Twice(torch.nn.Module):
    """One part with buffers under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = torch.nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Named(torch.nn.Module):
    """A result that is no tensor."""

    def forward(self, x: torch.Tensor) -> Any:
        return x, "a name"


class Thrice(torch.nn.Module):
    """An operator whose function in JAX returns a list."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.rare_errors.thrice(x)


@torch.library.custom_op("rare_errors::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


thrice.register_fake(torch.empty_like)
torch_bridge.register_operator(torch.ops.rare_errors.thrice, lambda x: [3 * x])
EXAMPLES = torch.ones(4, 3)


@cache
def of_linear() -> Any:
    module = torch.nn.Linear(3, 2).double()
    return of_module(module, list(module.parameters()))


def convert(module: torch.nn.Module, **options: Any) -> Any:
    return torch_bridge.from_module(module, EXAMPLES, **options)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "class as parameters": (
        lambda: GGNLinearOperator(model_fn, MSELoss(), MSELoss, BATCH),
        TypeError,
        "params must be .*Arguments are model_fn, loss, params, batch, in this order",
    ),
    "inputs of a mesh": (on_explicit_mesh, NotImplementedError, "from a mesh with explicit axes: use sum_layer_io"),
    "parameters of other layers": (
        lambda: io({"v": PARAMS["w"]}),
        ValueError,
        r"params must be like those that the layers were found for: wanted .*'w'.*got .*'v'",
    ),
    "factor that is not finite": (
        lambda: given(np.diag([1, 1, np.nan])),
        ValueError,
        "must be finite; it holds NaN",
    ),
    "factor that is not symmetric": (
        lambda: given(np.triu(np.ones((3, 3)))),
        ValueError,
        r"must be symmetric; it differs from its transpose by 1.0e\+00: is \(x \+ x\^T\) / 2 meant",
    ),
    "factor with a negative diagonal": (
        lambda: given(np.diag([1.0, 1.0, -2.0])),
        ValueError,
        "must be positive semi-definite; its diagonal holds -2",
    ),
    "no batches": (
        lambda: ggn_jax.GGNDiagonalLinearOperator.partial_sums(model_fn, MSELoss(), PARAMS, []),
        ValueError,
        "batches must yield at least one batch; list yielded none",
    ),
    "complex vector": (
        lambda: ggn(model_fn, MSELoss()).to_scipy() @ (1j * np.ones(6)),
        TypeError,
        "the operator is real; got a vector of dtype complex128: pass its parts one by one",
    ),
    "outputs of another number": (
        lambda: ggn_jax.report(lambda p, x: (x @ p["w"])[:3], PARAMS, BATCH[0]),
        ValueError,
        r"it returned shape \(3, 2\) for a batch of 4, and \(1, 2\) for a batch of one",
    ),
    "aux of an objective": (
        lambda: ggn_jax.kfac(ggn_jax.Objective(model_fn, MSELoss()), example_inputs=[BATCH[0]], has_aux=True),
        NotImplementedError,
        "has_aux=True is for one model_fn",
    ),
    "output of a module": (lambda: convert(Named()), NotImplementedError, "module must return tensors.*got str"),
    "a buffer of two names": (
        lambda: convert(Twice(), train=True),
        NotImplementedError,
        r"module has second.running_mean, .* under other names as well, and writes into buffers",
    ),
    "an operator's result": (
        lambda: convert(Thrice()),
        TypeError,
        "the function of rare_errors.thrice.default must return an array; got list",
    ),
    "dtypes of parameters": (
        lambda: of_module(module := Double(), list(module.parameters())),
        ValueError,
        r"params must have one dtype and one device; got \[.*float32.*float64",
    ),
    "damping of a module's operator": (
        lambda: of_linear().damped(torch.ones(2)),
        ValueError,
        r"damping must be a number, or a list of them; got a tensor of shape \(2,\)",
    ),
    "tensors": (
        lambda: of_linear() @ [torch.ones(2, 3), torch.ones(3)],
        ValueError,
        r"the tensors must have shapes \[\(2, 3\), \(2,\)\], .* got \[\(2, 3\), \(3,\)\]",
    ),
    "dtype of inputs": (
        lambda: (lambda fn, params: fn(params, BATCH[0]))(*convert(torch.nn.Linear(3, 2))),
        ValueError,
        r"wanted float32 of shape \[N, 3\], got float64.*Cast them to float32, or convert the module again",
    ),
    "loss of another process": (
        lambda: build_loss("('Unheard', {}, [])", []),
        NotImplementedError,
        "Unheard is not registered in this process: call torch_bridge.register_loss first",
    ),
    "device": (
        lambda: torch_bridge.make_batch_grad_output_fn(torch.nn.MSELoss(), "type-2")(EXAMPLES, EXAMPLES.to("meta")),
        ValueError,
        "targets is on meta, but outputs on cpu: move one of them",
    ),
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


def test_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a child whose parent used JAX."""
    monkeypatch.setattr("torch_bridge._fork._used_in", -1)
    with pytest.raises(RuntimeError, match=r"JAX was used before this process was forked.*start the process with"):
        torch_bridge.make_batch_grad_output_fn(torch.nn.MSELoss(), "type-2")(EXAMPLES, EXAMPLES)


@pytest.mark.parametrize("name", CASES)
def test_rare_errors(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()
