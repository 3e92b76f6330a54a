"""Curvature for deep learning in JAX: exact Gauss-Newton / Fisher vectors, and matrix-free operators on them."""

from ggn_jax.fisher_type import FisherType
from ggn_jax.grad_output import (
    loss_hessian_matrix_sqrt,
    make_batch_grad_output_fn,
    make_grad_output_fn,
    make_grad_output_sampler,
)
from ggn_jax.likelihood import LikelihoodLoss
from ggn_jax.loss import Loss
from ggn_jax.loss_hessian import LossHessian
from ggn_jax.losses import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "FisherType",
    "LikelihoodLoss",
    "Loss",
    "LossHessian",
    "MSELoss",
    "loss_hessian_matrix_sqrt",
    "make_batch_grad_output_fn",
    "make_grad_output_fn",
    "make_grad_output_sampler",
]
