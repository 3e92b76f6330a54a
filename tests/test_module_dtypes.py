"""Dtypes, integers and memory formats of modules: converted as they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from module_cases import draw
from module_checks import check, linear
from torch import nn

import torch_bridge


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


def test_what_the_module_computes_in_float32() -> None:
    """Casts inside of it stay: a float64 module is then as exact as float32 allows, in JAX as in torch."""

    class Normalised(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.linear, self.dtype = linear(), dtype

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.to(self.dtype)
            return self.linear((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype))

    x = draw(3, 4)
    check(Normalised(torch.float64), x)
    module = Normalised(torch.float32)
    model_fn, params = torch_bridge.from_module(module, x)
    wanted = module(x).detach().numpy()
    error = np.abs(model_fn(params, jax.device_put(x.numpy())) - wanted).max()
    assert error < 10 * np.finfo(np.float32).eps * np.abs(wanted).max()


class Integers(nn.Module):
    """Arithmetic with integers: with a buffer of this size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = linear()
        self.register_buffer("size", torch.tensor(size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear((ids * self.size % 7 + torch.arange(4)).to(self.linear.weight.dtype))


def test_integers_of_64_bits() -> None:
    """They are exact where JAX has them; and of 32 bits where it has not, or refused."""
    ids = torch.tensor([[1, 2, 3, 4], [5, 1000003, 7, 8]])
    check(Integers(1000003), ids)
    with jax.enable_x64(False):
        for make, name in ((lambda: Integers(2**40), "size, aten.mul.Tensor"), (lambda: Integers(1000003), "aten.mul")):
            with pytest.raises(TypeError, match=rf"more than 32 bits with example_inputs \({name}.*enable_x64"):
                torch_bridge.from_module(make().float(), ids)
        module = Integers(100).float()
        model_fn, params = torch_bridge.from_module(module, ids)
        array = torch_bridge.to_jax(ids)
        assert array.dtype == np.int64
        with pytest.raises(ValueError, match=r"wanted int32.*got int64.*jnp.asarray\(array, jnp.int32\)"):
            model_fn(params, array)
        outputs = model_fn(params, jnp.asarray(array, jnp.int32))
        np.testing.assert_allclose(outputs, module(ids).detach(), rtol=1e-5)
    model_fn, params = torch_bridge.from_module(Integers(2**40).float(), ids)
    with jax.enable_x64(False), pytest.raises(TypeError, match="more than 32 bits"):
        model_fn(params, jnp.asarray(ids.numpy(), jnp.int32))
