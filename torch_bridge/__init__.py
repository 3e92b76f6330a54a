"""Curvature for PyTorch by jitted JAX: gradient output vectors; modules as JAX functions, operators and KFAC."""

import ggn_jax as _ggn_jax
from ggn_jax import FisherType
from torch_bridge.aten import register_operator
from torch_bridge.converted import ConvertedModule
from torch_bridge.grad_output import (
    loss_hessian_matrix_sqrt,
    make_batch_grad_output_fn,
    make_grad_output_fn,
    make_grad_output_sampler,
)
from torch_bridge.losses import register_loss
from torch_bridge.modules import from_module
from torch_bridge.operators import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from torch_bridge.optimizer import KFAC
from torch_bridge.structured import EKFACLinearOperator, GGNDiagonalLinearOperator, KFACLinearOperator
from torch_bridge.tensors import to_jax, to_torch

__all__ = [  # noqa: RUF022  # in plain order
    "ConvertedModule",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "FisherType",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "KFAC",
    "KFACLinearOperator",
    "from_module",
    "loss_hessian_matrix_sqrt",
    "make_batch_grad_output_fn",
    "make_grad_output_fn",
    "make_grad_output_sampler",
    "register_loss",
    "register_operator",
    "to_jax",
    "to_torch",
]


def __getattr__(name: str) -> str:
    if name == "__version__":  # of the same distribution
        return _ggn_jax.__version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
