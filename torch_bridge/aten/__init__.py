"""Operators of PyTorch (ATen) as JAX functions."""

import torch_bridge.aten.activations
import torch_bridge.aten.attention
import torch_bridge.aten.dropout
import torch_bridge.aten.elementwise
import torch_bridge.aten.factories
import torch_bridge.aten.fourier
import torch_bridge.aten.indexing
import torch_bridge.aten.linalg
import torch_bridge.aten.linear
import torch_bridge.aten.losses
import torch_bridge.aten.metric
import torch_bridge.aten.norms
import torch_bridge.aten.pooling
import torch_bridge.aten.recurrent
import torch_bridge.aten.reductions
import torch_bridge.aten.shapes  # noqa: F401  # each enters its functions
from torch_bridge.aten.registry import find_operator, register_operator

__all__ = ["find_operator", "register_operator"]
