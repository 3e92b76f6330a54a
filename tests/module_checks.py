"""A small module, and its conversion compared with itself."""

import jax
import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn

import torch_bridge


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2).double()


def check(module: nn.Module, x: torch.Tensor) -> list[str]:
    model_fn, params = torch_bridge.from_module(module, x)
    wanted = module.eval()(x).detach().numpy()
    np.testing.assert_allclose(model_fn(params, jax.device_put(x.numpy())), wanted, rtol=1e-10, atol=1e-12)
    assert list(params) == [name for name, _ in module.named_parameters()]
    return list(params)
