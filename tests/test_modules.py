"""Modules of PyTorch as functions of JAX: whole models, their layers, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's custom
from torch import nn
from torch.nn.utils import parametrizations

import ggn_jax
import torch_bridge


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(F.silu(self.norm(self.down(x)), inplace=True))
        return self.out(torch.cat([x, y], 1)).mean((2, 3))


class LanguageModel(nn.Module):
    """Tied embeddings, positions, a causal mask, and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(5, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        h[:, 0] += 1.0
        h += self.position[: tokens.shape[1]]
        return self.head(self.block(h, src_mask=self.mask, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(3, 4, batch_first=True), nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


def trained(module: nn.Module) -> nn.Module:
    """With statistics that are not those of the start."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module


def cnn() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return trained(nn.Sequential(first, nn.Flatten(), nn.Linear(12, 3)))


def parametrized() -> nn.Module:
    first = parametrizations.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(first, nn.Tanh(), parametrizations.spectral_norm(nn.Linear(5, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), (3, 4)),
    "cnn": (cnn, (3, 2, 4, 4)),
    "u-net": (UNet, (3, 2, 4, 4)),
    "recurrent": (Recurrent, (3, 4, 3)),
    "language model": (LanguageModel, (3, 5)),
    "parametrized": (parametrized, (3, 4)),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    module = build().double()
    x = torch.randint(0, 7, shape) if name == "language model" else torch.randn(shape, dtype=torch.float64)
    return module, x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.by_default("language model", "cnn", "parametrized", "mlp")
def test_models(name: str) -> None:
    """Values and gradients, for the batch of the example and one of another size, compiled and mapped."""
    module, x = make(name)
    before = copy.deepcopy(module.state_dict())
    model_fn, params = torch_bridge.from_module(module, x[:2])
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert list(params) == [name for name, _ in module.named_parameters()]
    module.eval()
    wanted = module(x)
    weights = torch.randn_like(wanted)
    grads = dict(zip(params, torch.autograd.grad((wanted * weights).sum(), list(module.parameters())), strict=True))
    inputs, cotangent = jax.device_put(x.numpy()), jax.device_put(weights.numpy())
    outputs, ours = jax.jit(
        lambda p: (lambda y, vjp: (y, vjp(cotangent)[0]))(*jax.vjp(lambda p: model_fn(p, inputs), p))
    )(params)
    np.testing.assert_allclose(outputs, wanted.detach().numpy(), rtol=1e-10, atol=1e-12)
    for key, grad in grads.items():
        np.testing.assert_allclose(ours[key], grad.numpy(), rtol=1e-8, atol=1e-11, err_msg=key)
    one_by_one = jax.jit(jax.vmap(lambda one: model_fn(params, one[None])[0]))(inputs)
    np.testing.assert_allclose(one_by_one, outputs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cnn", "u-net", "recurrent", "language model"])
@pytest.mark.by_default("cnn")
def test_layers_are_found(name: str) -> None:
    module, x = make(name)
    model_fn, params = torch_bridge.from_module(module, x)
    report = str(ggn_jax.report(model_fn, params, jax.device_put(x.numpy())))
    assert "Self-check passed" in report
    for part, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            line = next((line for line in report.splitlines() if f"['{part}.weight']" in line), None)
            if line is not None and "self_attn" not in part:  # tied weights have the embedding's name
                assert "Kronecker" in line, report


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, *, extra: dict[str, torch.Tensor], flag: Any = None) -> dict[str, Any]:
        return {"z": (self.linear(x), extra["b"] + 1), "a": None, "n": extra["ids"].sum(1)}


def test_structures() -> None:
    module = Structured()
    inputs = {"x": torch.ones(3, 2), "extra": {"ids": torch.ones(3, 4, dtype=torch.int32), "b": torch.ones(3)}}
    model_fn, params = torch_bridge.from_module(module, inputs)
    outputs = model_fn(params, jax.tree.map(lambda t: jax.device_put(t.numpy()), inputs))
    wanted = module(**inputs)
    assert outputs["a"] is None
    np.testing.assert_allclose(outputs["z"][0], wanted["z"][0].detach().numpy(), rtol=1e-6)
    np.testing.assert_array_equal(outputs["z"][1], wanted["z"][1].numpy())
    np.testing.assert_array_equal(outputs["n"], wanted["n"].numpy())
    with pytest.raises(ValueError, match="structure of example_inputs"):
        model_fn(params, jnp.ones((3, 2)))


def test_later_changes_are_not_seen() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    x = torch.ones(3, 2)
    model_fn, params = torch_bridge.from_module(module, x)
    before = np.asarray(model_fn(params, jax.device_put(x.numpy())))
    with torch.no_grad():
        for value in module.state_dict().values():
            value.zero_()
    np.testing.assert_array_equal(model_fn(params, jax.device_put(x.numpy())), before)


class Function(nn.Module):
    """`fn(module, x)`, with a linear layer to use."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn, self.linear, self.dropout = fn, nn.Linear(2, 2), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


def without_gradient(module: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = module.linear(x)
    return module.linear(x) * y


@pytest.mark.parametrize("fn", [without_gradient, lambda m, x: m.linear(x) * m.linear(x).detach().mul_(1.0)])
def test_what_has_no_gradient(fn: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module, x = Function(fn), torch.randn(3, 2)
    model_fn, params = torch_bridge.from_module(module, x)
    ours = jax.grad(lambda p: jnp.sum(model_fn(p, jax.device_put(x.numpy()))))(params)["linear.weight"]
    (wanted,) = torch.autograd.grad(module(x).sum(), [module.linear.weight])
    np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-5)


def by_size(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.linear(x) * (1 if x.shape[0] == 3 else 2)


def test_a_graph_for_each_size_of_batch() -> None:
    module = Function(by_size)
    with pytest.raises(RuntimeError, match="pass dynamic_batch=False"):
        torch_bridge.from_module(module, torch.ones(3, 2))
    model_fn, params = torch_bridge.from_module(module, torch.ones(3, 2), dynamic_batch=False)
    for size in (3, 1):
        wanted = module(torch.ones(size, 2)).detach().numpy()
        np.testing.assert_allclose(model_fn(params, jnp.ones((size, 2), jnp.float32)), wanted, rtol=1e-6)


def test_train() -> None:
    """In the mode that each submodule is in, what is random or changes statistics is refused."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    with pytest.raises(NotImplementedError, match=r"dropout.default of '1': it is random"):
        torch_bridge.from_module(module, torch.ones(3, 2), train=None)
    module[1].eval()
    torch_bridge.from_module(module, torch.ones(3, 2), train=None)
    assert module.training
    assert not module[1].training
    with pytest.raises(NotImplementedError, match=r"writes into running_mean.*train=True"):
        torch_bridge.from_module(nn.BatchNorm2d(2), torch.ones(3, 2, 4, 4), train=None)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda m, x: torch.rand_like(x) + torch.special.zeta(x, x), r"aten.rand_like.default .*; aten.special_zeta"),
        (lambda m, x: m.count.add_(1) + m.linear(x), "writes into count"),
        (lambda m, x: x.mul_(2) + m.linear(x), "writes into its inputs"),
        (lambda m, x: x[x > 0].sum(), "data"),
    ],
    ids=["missing", "buffers", "inputs", "sizes"],
)
def test_what_is_refused(fn: Callable[..., Any], message: str) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        torch_bridge.from_module(Function(fn), torch.ones(3, 2))


def test_arguments() -> None:
    linear = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="module must be"):
        torch_bridge.from_module(lambda x: x, torch.ones(3, 2))
    with pytest.raises(TypeError, match="must be a tensor; got float"):
        torch_bridge.from_module(linear, (torch.ones(3, 2), 1.0))
    with jax.enable_x64(False), pytest.raises(TypeError, match=r"float64 \(weight\).*jax.enable_x64"):
        torch_bridge.from_module(nn.Linear(2, 2).double(), torch.ones(3, 2).double())
    with jax.enable_x64(False):
        embed = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
        model_fn, params = torch_bridge.from_module(embed, torch.zeros(2, 3, dtype=torch.int64))
        assert model_fn(params, jnp.zeros((4, 3), int)).shape == (4, 3, 2)
    model_fn, params = torch_bridge.from_module(linear, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"shape \[N, 2\], got float32 of shape \(3, 5\)"):
        model_fn(params, jnp.ones((3, 5), jnp.float32))
    with pytest.raises(KeyError, match="bias are missing"):
        model_fn({"weight": params["weight"]}, jnp.ones((3, 2), jnp.float32))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def test_derivatives_of_ones_own_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"Function \(StraightThrough\)"):
        torch_bridge.from_module(Function(lambda m, x: StraightThrough.apply(m.linear(x)).sin()), torch.ones(3, 2))


@torch.library.custom_op("ggn_jax_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_fake(torch.empty_like)


def test_register_operator() -> None:
    module = Function(lambda m, x: torch.ops.ggn_jax_tests.cube(m.linear(x)))
    x = torch.ones(3, 2)
    with pytest.raises(NotImplementedError, match=r"ggn_jax_tests.cube.default \(in the module itself\)"):
        torch_bridge.from_module(module, x)
    torch_bridge.register_operator(torch.ops.ggn_jax_tests.cube.default, lambda x: x[:, :1] ** 3)
    with pytest.raises(TypeError, match=r"cube.default of the module itself gave an array of shape"):
        torch_bridge.from_module(module, x)
    torch_bridge.register_operator(torch.ops.ggn_jax_tests.cube, lambda x: x**3)
    model_fn, params = torch_bridge.from_module(module, x)
    np.testing.assert_allclose(model_fn(params, jax.device_put(x.numpy())), module(x).detach().numpy(), rtol=1e-5)
    with pytest.raises(TypeError, match="operator must be"):
        torch_bridge.register_operator("cube", lambda x: x)
