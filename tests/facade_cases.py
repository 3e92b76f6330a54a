"""Losses and batches for the tests of the façade under what PyTorch does to functions."""

from typing import Any

import torch
from torch.func import vmap
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss

import torch_bridge

LOSSES = [CrossEntropyLoss(), MSELoss(), BCEWithLogitsLoss()]
TYPES = ["type-2", "mc", "empirical", "forward-only"]


def batch(loss: Any, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    outputs = torch.randn(size, 3, dtype=torch.float64, generator=generator)
    if isinstance(loss, CrossEntropyLoss):
        return outputs, torch.randint(3, (size,), generator=generator)
    return outputs, torch.rand(size, 3, dtype=torch.float64, generator=generator)


def as_curvlinops(loss: Any, fisher_type: str, mc_samples: int = 1, out_dims: int = 1) -> Any:
    fn = torch_bridge.make_grad_output_fn(loss, fisher_type, mc_samples)
    randomness = "different" if fisher_type == "mc" else "same"
    return vmap(fn, in_dims=(0, 0, None), out_dims=out_dims, randomness=randomness)


def seeded(fn: Any, *args: Any) -> Any:
    torch.manual_seed(0)
    return fn(*args)
