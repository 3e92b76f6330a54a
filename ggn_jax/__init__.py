"""Curvature for deep learning in JAX: exact Gauss-Newton / Fisher vectors, and matrix-free operators on them."""

from ggn_jax._unbatched import Unbatched
from ggn_jax._version import find_version as _find_version
from ggn_jax.cross_entropy import CrossEntropyLoss
from ggn_jax.fisher_type import FisherType
from ggn_jax.grad_output import (
    loss_hessian_matrix_sqrt,
    make_batch_grad_output_fn,
    make_grad_output_fn,
    make_grad_output_sampler,
)
from ggn_jax.joint import JointLoss
from ggn_jax.kronecker.options import KroneckerOptions
from ggn_jax.layers import Report, ReportRow, UncoveredParametersWarning, report
from ggn_jax.layerwise.batches import BatchesGramLinearOperator
from ggn_jax.layerwise.found import LayerInfo, Layers, find_layers
from ggn_jax.layerwise.given import from_factors
from ggn_jax.layerwise.gram import GramLinearOperator
from ggn_jax.layerwise.io import LayerIO, LayersIO, UseIO
from ggn_jax.layerwise.matrices import from_matrices, to_matrices
from ggn_jax.layerwise.run import layer_io, sum_layer_io
from ggn_jax.likelihood import LikelihoodLoss
from ggn_jax.loss import Loss
from ggn_jax.loss_check import check_loss
from ggn_jax.loss_hessian import LossHessian
from ggn_jax.losses import BCEWithLogitsLoss, MSELoss
from ggn_jax.models import ModelFn, from_equinox, from_haiku, from_linen, from_nnx
from ggn_jax.objective import Objective, ObjectiveTerm
from ggn_jax.operators import (
    BatchesJacobianLinearOperator,
    BatchesLinearOperator,
    BlockLinearOperator,
    BlockSolver,
    DampedLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    JacobianTransposeLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    MappedBatches,
    PartialSums,
    StackedJacobianLinearOperator,
    WeightedSumLinearOperator,
    average_factors,
    average_operators,
    map_batches,
)
from ggn_jax.optimizer import (
    BlockDiagnosis,
    Curvature,
    CurvatureReport,
    CurvatureRow,
    Diagnosis,
    Factors,
    Finding,
    KFACOptions,
    KFACState,
    KFACTransformation,
    LevenbergMarquardt,
    MultiStepsState,
    QuadraticModel,
    ScaleByKFACState,
    ScaleByLayersState,
    SlopeDamping,
    StepStatistics,
    kfac,
    multi_steps,
    scale_by_kfac,
    scale_by_layers,
)

__all__ = [
    "BCEWithLogitsLoss",
    "BatchesGramLinearOperator",
    "BatchesJacobianLinearOperator",
    "BatchesLinearOperator",
    "BlockDiagnosis",
    "BlockLinearOperator",
    "BlockSolver",
    "CrossEntropyLoss",
    "Curvature",
    "CurvatureReport",
    "CurvatureRow",
    "DampedLinearOperator",
    "Diagnosis",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "Factors",
    "Finding",
    "FisherType",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "GramLinearOperator",
    "HessianLinearOperator",
    "JacobianLinearOperator",
    "JacobianTransposeLinearOperator",
    "JointLoss",
    "KFACLinearOperator",
    "KFACOptions",
    "KFACState",
    "KFACTransformation",
    "KFOCLinearOperator",
    "KroneckerOptions",
    "LayerIO",
    "LayerInfo",
    "Layers",
    "LayersIO",
    "LevenbergMarquardt",
    "LikelihoodLoss",
    "Loss",
    "LossHessian",
    "MSELoss",
    "MappedBatches",
    "ModelFn",
    "MultiStepsState",
    "Objective",
    "ObjectiveTerm",
    "PartialSums",
    "QuadraticModel",
    "Report",
    "ReportRow",
    "ScaleByKFACState",
    "ScaleByLayersState",
    "SlopeDamping",
    "StackedJacobianLinearOperator",
    "StepStatistics",
    "Unbatched",
    "UncoveredParametersWarning",
    "UseIO",
    "WeightedSumLinearOperator",
    "average_factors",
    "average_operators",
    "check_loss",
    "find_layers",
    "from_equinox",
    "from_factors",
    "from_haiku",
    "from_linen",
    "from_matrices",
    "from_nnx",
    "kfac",
    "layer_io",
    "loss_hessian_matrix_sqrt",
    "make_batch_grad_output_fn",
    "make_grad_output_fn",
    "make_grad_output_sampler",
    "map_batches",
    "multi_steps",
    "report",
    "scale_by_kfac",
    "scale_by_layers",
    "sum_layer_io",
    "to_matrices",
]


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up when it is asked for, which takes a millisecond
        return _find_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
