"""Curvature matrices of a model's loss in its parameters, as lineax linear operators."""

from ggn_jax.operators.averages import average_factors, average_operators
from ggn_jax.operators.base import DampedLinearOperator
from ggn_jax.operators.blocks import BlockLinearOperator
from ggn_jax.operators.diagonal import GGNDiagonalLinearOperator
from ggn_jax.operators.ef import EFLinearOperator
from ggn_jax.operators.ggn import GGNLinearOperator
from ggn_jax.operators.hessian import HessianLinearOperator
from ggn_jax.operators.kronecker import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from ggn_jax.operators.loaders import MappedBatches, map_batches
from ggn_jax.operators.outputs import (
    BatchesJacobianLinearOperator,
    JacobianLinearOperator,
)
from ggn_jax.operators.partial import PartialSums
from ggn_jax.operators.passes import BatchesLinearOperator
from ggn_jax.operators.rectangular import JacobianTransposeLinearOperator, StackedJacobianLinearOperator
from ggn_jax.operators.solver import BlockSolver
from ggn_jax.operators.weighted import WeightedSumLinearOperator

__all__ = [
    "BatchesJacobianLinearOperator",
    "BatchesLinearOperator",
    "BlockLinearOperator",
    "BlockSolver",
    "DampedLinearOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "JacobianTransposeLinearOperator",
    "KFACLinearOperator",
    "KFOCLinearOperator",
    "MappedBatches",
    "PartialSums",
    "StackedJacobianLinearOperator",
    "WeightedSumLinearOperator",
    "average_factors",
    "average_operators",
    "map_batches",
]
