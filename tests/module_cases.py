"""Functions of PyTorch compared with their conversions, many at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import torch_bridge

Case = Callable[[dict[str, torch.Tensor]], Any]


LOW = (torch.float32, torch.float16, torch.bfloat16)
RTOL = {"Hardsigmoid": 1e-6, "float32": 1e-2}  # torch's derivative has 1 / 6 in float32; and what is rounded


class Cases(nn.Module):
    """Functions of the same inputs, each of one tensor or several."""

    def __init__(self, cases: dict[str, Case]):
        super().__init__()
        self.cases = cases
        self.layers = nn.ModuleDict({name: case for name, case in cases.items() if isinstance(case, nn.Module)})

    def forward(self, **inputs: torch.Tensor) -> dict[str, Any]:
        return {name: case(inputs) for name, case in self.cases.items()}


class Layer(nn.Module):
    """A layer, with the names of its inputs."""

    def __init__(self, layer: nn.Module, *names: str):
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        return self.layer(*(inputs[name] for name in self.names))


def tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [part for v in value for part in tensors(v)]


def check(cases: dict[str, Case], inputs: dict[str, torch.Tensor], dynamic: bool = True) -> None:
    """Values, dtypes, and the gradients in parameters and inputs of each case."""
    module = Cases(cases).double().eval()
    model_fn, params = torch_bridge.from_module(module, inputs, dynamic_batch=dynamic)
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    wanted = module(**leaves)
    fixed = {name: jnp.asarray(x) for name, x in inputs.items() if not x.is_floating_point()}
    floating = {name: jnp.asarray(x) for name, x in inputs.items() if x.is_floating_point()}

    @jax.jit
    def run(params: Any, floating: Any, cotangents: Any) -> Any:
        """The outputs, and one gradient for each case."""
        outputs, pull_back = jax.vjp(lambda p, x: model_fn(p, {**x, **fixed}), params, floating)
        return outputs, jax.vmap(pull_back)(cotangents)

    rng = np.random.default_rng(0)
    sizes = jax.eval_shape(model_fn, params, {**floating, **fixed})
    names = list(wanted)
    drawn = {name: jax.tree.map(lambda s: rng.normal(size=s.shape), sizes[name]) for name in names}

    def one_for_each(index: int, like: Any, values: Any) -> Any:
        if not jnp.issubdtype(like.dtype, jnp.floating):
            return np.zeros((len(names), *like.shape), jax.dtypes.float0)
        out = np.zeros((len(names), *like.shape), like.dtype)
        out[index] = values
        return jnp.asarray(out)

    cotangents = {
        name: jax.tree.map(functools.partial(one_for_each, i), sizes[name], drawn[name]) for i, name in enumerate(names)
    }
    outputs, pulled = run(params, floating, cotangents)
    parameters = dict(module.named_parameters())
    for i, name in enumerate(names):
        ours, theirs = jax.tree.leaves(outputs[name]), tensors(wanted[name])
        assert len(ours) == len(theirs), name
        for a, b in zip(ours, theirs, strict=True):
            assert str(a.dtype) == str(b.dtype).removeprefix("torch."), name
            rtol = 8 * torch.finfo(b.dtype).eps if b.dtype in LOW else 1e-10
            ours64 = np.asarray(a, np.float64)
            np.testing.assert_allclose(ours64, b.detach().double().numpy(), rtol=rtol, atol=1e-10, err_msg=name)
        where = {**parameters, **{n: leaves[n] for n in floating}}
        total = sum(
            (t * torch.from_numpy(np.asarray(d))).sum()
            for t, d in zip(theirs, jax.tree.leaves(drawn[name]), strict=True)
            if t.is_floating_point() and t.requires_grad
        )
        if not isinstance(total, torch.Tensor):
            continue
        grads = torch.autograd.grad(total, list(where.values()), allow_unused=True)
        for key, grad in zip(where, grads, strict=True):
            mine = np.asarray((pulled[0] if key in parameters else pulled[1])[key][i])
            expected = np.zeros_like(mine) if grad is None else grad.numpy(force=True)
            np.testing.assert_allclose(
                mine, expected, rtol=RTOL.get(name, 1e-9), atol=1e-9, err_msg=f"{name}: d/d {key}"
            )


def draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).normal(size=shape))


INPUTS = {
    "x": draw(2, 3, 4),
    "y": draw(2, 3, 4).flip(2),
    "p": torch.sigmoid(draw(2, 3, 4)),
    "i": torch.from_numpy(np.random.default_rng(1).integers(-5, 6, (2, 3, 4))),
    "b": draw(2, 3, 4) > 0,
    "e": torch.tensor([[-3.0, -1.0, 0.0, 0.5, 1.0, 3.0, 6.0, -6.0]] * 2, dtype=torch.float64),  # corners
    "k": torch.tensor([[0, 2, 1, 1], [3, 0, 2, 1]]),
}


def on(name: str, fn: Callable[..., Any], *more: Any, **options: Any) -> Case:
    return lambda inputs: fn(inputs[name], *more, **options)
