"""Modules that are wrapped, hooked, parametrised or changed: converted as they compute, or refused by name."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from module_cases import draw
from module_checks import check, linear
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_bridge


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_wrappers() -> None:
    x = draw(3, 4)
    compiled = torch.compile(linear())
    model_fn, params = torch_bridge.from_module(nn.Sequential(compiled, nn.Tanh()), x)
    wanted = torch.tanh(compiled._orig_mod(x)).detach().numpy()
    np.testing.assert_allclose(model_fn(params, jax.device_put(x.numpy())), wanted, rtol=1e-10)
    assert check(nn.DataParallel(linear()), x) == ["module.weight", "module.bias"]
    assert check(nn.parallel.DistributedDataParallel(linear()), x) == ["module.weight", "module.bias"]


def hooked(kind: str) -> nn.Module:
    module = nn.Sequential(linear())
    getattr(module[0], kind)(lambda module, args, *output: (output or args)[0] * 2)
    return module


def old(name: str) -> nn.Module:
    with pytest.warns(FutureWarning):
        return getattr(nn.utils, name)(linear())


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked("register_forward_hook"),
        lambda: hooked("register_forward_pre_hook"),
        lambda: old("weight_norm"),
        lambda: nn.utils.spectral_norm(linear()),
        lambda: parametrizations.orthogonal(linear()),
        lambda: prune.l1_unstructured(linear(), "weight", amount=0.5),
        lambda: nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d()).double(),
    ],
    ids=["hook", "pre-hook", "weight norm", "spectral norm", "orthogonal", "pruned", "lazy"],
)
def test_what_changes_parameters_or_outputs(make: Callable[[], nn.Module]) -> None:
    check(make(), draw(3, 4))


def with_tensor_hook(kind: str) -> nn.Module:
    module = nn.Sequential(linear())
    getattr(module[0].weight, kind)(lambda grad: None)
    return module


class Twice(nn.Module):
    """Two layers, the first of them called by a function; and a product with what the second gives."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first, self.second, self.call = linear(), linear(), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.first, x) * self.second(x)


def frozen(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def in_inference_mode(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        y = layer(x)
    return y.clone()


def hooked_output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    if y.requires_grad:
        y.register_hook(lambda grad: 3 * grad)
    return y


def hooked_saved(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: 2 * t, lambda t: t):
        return torch.tanh(layer(x))


def exported_otherwise(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x) * (2 if torch.compiler.is_exporting() else 1)


def without_gradient(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


def gradient_inside(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)[0][:, :2]


def checkpointed(use_reentrant: bool) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda layer, x: torch.utils.checkpoint.checkpoint(layer, layer(x).repeat(1, 2), use_reentrant=use_reentrant)


def buffer_of_a_weight() -> nn.Module:
    module = Twice(lambda layer, x: nn.functional.linear(x, layer.double_weight))
    module.first.register_buffer("double_weight", 2 * module.first.weight)
    return module


def sparse_buffer() -> nn.Module:
    module = linear()
    module.register_buffer("eye", torch.eye(2).to_sparse())
    return module


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 2)), {nn.Linear}, dtype=torch.qint8)


DROPPED = "what torch.export makes of the module has other values"


@pytest.mark.parametrize("call", [checkpointed(False), without_gradient])
@pytest.mark.parametrize("change", [lambda module: module, frozen], ids=["trained", "frozen"])
def test_what_torch_export_follows(call: Callable[..., torch.Tensor], change: Callable[[nn.Module], nn.Module]) -> None:
    """Values and gradients: of frozen parameters, too, since a function of JAX knows of no such."""
    module, x = change(Twice(call)), draw(3, 4)
    model_fn, params = torch_bridge.from_module(module, x)
    flags = {parameter.requires_grad for parameter in module.parameters()}
    assert flags == {change is not frozen}
    value, grads = jax.value_and_grad(lambda p: (model_fn(p, jax.device_put(x.numpy())) ** 2).sum())(params)
    wanted = (module.requires_grad_(True)(x) ** 2).sum()
    theirs = torch.autograd.grad(wanted, list(module.parameters()), allow_unused=True)
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-10)
    for (name, parameter), grad in zip(module.named_parameters(), theirs, strict=True):
        expected = np.zeros(parameter.shape) if grad is None else grad.numpy()
        np.testing.assert_allclose(grads[name], expected, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("change", [lambda module: module, frozen], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (in_inference_mode, DROPPED + r".*: gradient in 'first.weight', gradient in 'first.bias'"),
        (hooked_output, DROPPED + ".*gradient in 'first.weight'"),
        (hooked_saved, DROPPED + ".*gradient in 'first.weight'"),
        (exported_otherwise, DROPPED + ".*: outputs"),
        (lambda layer, x: layer(x) + x.data[:, :2], "use tensor.detach"),
        (gradient_inside, "derivatives of its own parts"),
        (checkpointed(True), "use_reentrant=False"),
    ],
    ids=["inference mode", "hook", "saved tensors", "exporting", "data", "gradient", "checkpoint"],
)
def test_what_torch_export_drops(
    call: Callable[..., torch.Tensor], message: str, change: Callable[[nn.Module], nn.Module]
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        torch_bridge.from_module(change(Twice(call)), draw(3, 4))


def test_choices_by_values_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([linear(), linear()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x[:, :2])
            for i in (x.sum() > 0).long().nonzero():
                y = y + self.experts[int(i)](x)
            return y

    with pytest.raises(NotImplementedError, match=r"by values of its data.*'batched_mm'.*It says"):
        torch_bridge.from_module(Experts(), draw(3, 4))


@torch.library.custom_op("traps::grouped_mm", mutates_args=())
def grouped_mm(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


grouped_mm.register_fake(torch.empty_like)


def test_kernels_of_experts_have_an_alternative() -> None:
    with pytest.raises(NotImplementedError, match=r"traps.grouped_mm.default.*'batched_mm'\) first"):
        torch_bridge.from_module(Twice(lambda layer, x: layer(grouped_mm(x))), draw(3, 4))


def test_hooks_for_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        with pytest.raises(NotImplementedError, match=r"hooks for all modules.*handle.remove"):
            torch_bridge.from_module(linear(), draw(3, 4))
    finally:
        handle.remove()
    check(linear(), draw(3, 4))


def test_random_state_is_left_alone() -> None:
    module = linear()
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    torch_bridge.from_module(module, draw(3, 4))
    assert torch.equal(torch.rand(2), wanted)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True))[1]


class Autocast(nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.linear, self.enabled = linear(), enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.linear(x)


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (lambda: hooked("register_full_backward_hook"), draw(3, 4), r"backward hooks.*handle.remove\(\)"),
        (lambda: nn.Embedding(5, 3, max_norm=1.0), torch.tensor([[0, 1]]), r"max_norm=1.0.*set its max_norm to None"),
        (lambda: nn.Linear(4, 2, dtype=torch.complex64), draw(3, 4).cfloat(), r"'weight' is complex.*torch.complex"),
        (lambda: with_tensor_hook("register_hook"), draw(3, 4), r"'0.weight' has hooks.*handle.remove\(\)"),
        (lambda: nn.Linear(4, 2, device="meta"), draw(3, 4), "'weight' is on the meta device.*load_state_dict"),
        (sparse_buffer, draw(3, 4), r"'eye' is a sparse.*to_dense\(\)"),
        (buffer_of_a_weight, draw(3, 4), DROPPED + ".*buffers computed from parameters"),
        (quantised, draw(3, 4), r"'0' is quantised \(Linear\)"),
        (lambda: Packed(), torch.ones(2, 3, 4), "packed sequences.*padded ones"),
        (lambda: Autocast(True), draw(3, 4), "autocast is on.*convert the module without it"),
        (lambda: nn.Sequential(torch.jit.trace(linear(), draw(3, 4))), draw(3, 4), "'0' is a TorchScript module"),
    ],
    ids=[
        "backward hook",
        "max_norm",
        "complex",
        "hook",
        "meta",
        "sparse",
        "buffer",
        "quantised",
        "packed",
        "autocast",
        "TorchScript",
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_what_is_refused(make: Callable[[], nn.Module], x: torch.Tensor, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        torch_bridge.from_module(make(), x)


def test_spectral_norms_in_training_mode() -> None:
    """Those that iterate are refused; in evaluation they are constants of a module that is not."""
    module = nn.Sequential(parametrizations.spectral_norm(linear()))
    with pytest.raises(NotImplementedError, match=r"spectral norms.*\(0.parametrizations.weight.0\).*train=None"):
        torch_bridge.from_module(module, draw(3, 4), train=True)
    module.get_submodule("0.parametrizations.weight.0").eval()
    assert torch_bridge.from_module(module, draw(3, 4), train=None)[1]


def test_hooks_that_leave_gradients_as_they_are() -> None:
    """One that runs after a gradient is accumulated, and one that was removed."""
    module = with_tensor_hook("register_post_accumulate_grad_hook")
    module[0].weight.register_hook(lambda g: g * 2).remove()
    check(module, draw(3, 4))


def test_surroundings() -> None:
    x = draw(3, 4)
    check(Autocast(False), x)
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match=r"autocast is on for cpu.*outside of it"):
        torch_bridge.from_module(linear(), x)
    with torch.inference_mode():
        check(linear(), x.clone())
    with pytest.raises(ValueError, match="at least one example"):
        torch_bridge.from_module(linear(), x[:0])


def test_examples_keep_their_values_for_other_sizes() -> None:
    """A graph for each size of batch is made with values that the module is known to take."""

    class Solve(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.linalg.inv(x)

    x = torch.eye(2).expand(3, 2, 2).double()
    model_fn, params = torch_bridge.from_module(Solve(), x, dynamic_batch=False)
    np.testing.assert_allclose(
        model_fn(params, 2 * jnp.ones((5, 1, 1)) * jnp.eye(2)[None]), np.eye(2)[None] / 2 + np.zeros((5, 1, 1))
    )
