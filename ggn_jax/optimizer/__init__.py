"""KFAC and EKFAC as optax transformations."""

from ggn_jax.optimizer.advice import Finding
from ggn_jax.optimizer.by_layer import ScaleByLayersState, scale_by_layers
from ggn_jax.optimizer.curvature import Curvature, Factors
from ggn_jax.optimizer.diagnosis import BlockDiagnosis, Diagnosis
from ggn_jax.optimizer.methods import KFACTransformation
from ggn_jax.optimizer.multi_steps import MultiStepsState, multi_steps
from ggn_jax.optimizer.rules import LevenbergMarquardt, QuadraticModel, SlopeDamping
from ggn_jax.optimizer.settings import KFACOptions
from ggn_jax.optimizer.states import KFACState, ScaleByKFACState, StepStatistics
from ggn_jax.optimizer.summary import CurvatureReport, CurvatureRow
from ggn_jax.optimizer.transformation import kfac, scale_by_kfac

__all__ = [
    "BlockDiagnosis",
    "Curvature",
    "CurvatureReport",
    "CurvatureRow",
    "Diagnosis",
    "Factors",
    "Finding",
    "KFACOptions",
    "KFACState",
    "KFACTransformation",
    "LevenbergMarquardt",
    "MultiStepsState",
    "QuadraticModel",
    "ScaleByKFACState",
    "ScaleByLayersState",
    "SlopeDamping",
    "StepStatistics",
    "kfac",
    "multi_steps",
    "scale_by_kfac",
    "scale_by_layers",
]
