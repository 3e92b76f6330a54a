"""Modules that are wrapped, hooked, parametrised or changed: converted as they compute, or refused by name."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_cases import draw
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_bridge


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2).double()


def check(module: nn.Module, x: torch.Tensor) -> list[str]:
    model_fn, params = torch_bridge.from_module(module, x)
    wanted = module.eval()(x).detach().numpy()
    np.testing.assert_allclose(model_fn(params, jnp.asarray(x.numpy())), wanted, rtol=1e-10, atol=1e-12)
    assert list(params) == [name for name, _ in module.named_parameters()]
    return list(params)


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
    np.testing.assert_allclose(model_fn(params, jnp.asarray(x.numpy())), wanted, rtol=1e-10)
    assert check(nn.DataParallel(linear()), x) == ["module.weight", "module.bias"]
    assert check(nn.parallel.DistributedDataParallel(linear()), x) == ["module.weight", "module.bias"]


def test_memory_formats() -> None:
    check(nn.Linear(3, 2).double(), draw(3, 4).t())
    images = draw(2, 3, 5, 4).to(memory_format=torch.channels_last)
    check(nn.Conv2d(3, 2, 3).double().to(memory_format=torch.channels_last), images)


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.double())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_dtypes_of_inputs(dtype: torch.dtype) -> None:
    check(Cast(), (draw(3, 4) > 0).to(dtype))


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
        lambda: nn.LazyLinear(2, dtype=torch.float64),
    ],
    ids=["hook", "pre-hook", "weight norm", "spectral norm", "orthogonal", "pruned", "lazy"],
)
def test_what_changes_parameters_or_outputs(make: Callable[[], nn.Module]) -> None:
    check(make(), draw(3, 4))


def hooked_parameter() -> nn.Module:
    module = nn.Sequential(linear())
    module[0].weight.register_hook(lambda g: g * 2)
    return module


class HookWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        x.register_hook(lambda g: g * 2)
        return x


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
        (hooked_parameter, draw(3, 4), r"parameter '0.weight' has a hook.*handle.remove\(\)"),
        (HookWithin, draw(3, 4), "forward puts a hook on a tensor by register_hook"),
        (lambda: nn.Embedding(5, 3, max_norm=1.0), torch.tensor([[0, 1]]), r"max_norm=1.0.*set its max_norm to None"),
        (lambda: nn.Linear(4, 2, dtype=torch.complex64), draw(3, 4).cfloat(), r"'weight' is complex.*torch.complex"),
        (lambda: Packed(), torch.ones(2, 3, 4), "packed sequences.*padded ones"),
        (lambda: Autocast(True), draw(3, 4), "autocast is on.*convert the module without it"),
        (lambda: nn.Sequential(torch.jit.trace(linear(), draw(3, 4))), draw(3, 4), "'0' is a TorchScript module"),
    ],
    ids=[
        "backward hook",
        "parameter's hook",
        "hook within",
        "max_norm",
        "complex",
        "packed",
        "autocast",
        "TorchScript",
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_is_refused(make: Callable[[], nn.Module], x: torch.Tensor, message: str) -> None:
    module = make()
    for train in (False, True):
        with pytest.raises(NotImplementedError, match=message):
            torch_bridge.from_module(module, x, train=train)


def test_hooks_that_leave_gradients_as_they_are() -> None:
    """One that runs after a gradient is accumulated, and one that was removed."""
    module = linear()
    module.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    module.weight.register_hook(lambda g: g * 2).remove()
    check(module, draw(3, 4))


def test_training_mode_draws_nothing_from_the_callers_generator() -> None:
    module, before = nn.Sequential(linear(), nn.Dropout(0.5)), torch.get_rng_state()
    with pytest.raises(NotImplementedError, match="dropout"):
        torch_bridge.from_module(module, draw(3, 4), train=True)
    assert torch.equal(torch.get_rng_state(), before)


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
