"""Curvature for deep learning in JAX: exact Gauss-Newton / Fisher vectors, and matrix-free operators on them."""

from ggn_jax.fisher_type import FisherType
from ggn_jax.grad_output import (
    loss_hessian_matrix_sqrt,
    make_batch_grad_output_fn,
    make_grad_output_fn,
    make_grad_output_sampler,
)
from ggn_jax.layers import report
from ggn_jax.likelihood import LikelihoodLoss
from ggn_jax.loss import Loss
from ggn_jax.loss_hessian import LossHessian
from ggn_jax.losses import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from ggn_jax.models import from_equinox, from_linen, from_nnx
from ggn_jax.operators import (
    BlockSolver,
    DampedLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    average_factors,
    average_operators,
)
from ggn_jax.optimizer import KFACTransformation, kfac, multi_steps, scale_by_kfac

__all__ = [
    "BCEWithLogitsLoss",
    "BlockSolver",
    "CrossEntropyLoss",
    "DampedLinearOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "FisherType",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "KFACLinearOperator",
    "KFACTransformation",
    "KFOCLinearOperator",
    "LikelihoodLoss",
    "Loss",
    "LossHessian",
    "MSELoss",
    "average_factors",
    "average_operators",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "kfac",
    "loss_hessian_matrix_sqrt",
    "make_batch_grad_output_fn",
    "make_grad_output_fn",
    "make_grad_output_sampler",
    "multi_steps",
    "report",
    "scale_by_kfac",
]
