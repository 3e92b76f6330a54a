"""KFAC and EKFAC as optax transformations."""

from ggn_jax.optimizer.by_layer import ScaleByLayersState, scale_by_layers
from ggn_jax.optimizer.curvature import Curvature, Factors
from ggn_jax.optimizer.methods import KFACTransformation
from ggn_jax.optimizer.multi_steps import MultiStepsState, multi_steps
from ggn_jax.optimizer.summary import CurvatureReport, CurvatureRow
from ggn_jax.optimizer.transformation import KFACState, ScaleByKFACState, kfac, scale_by_kfac

__all__ = [
    "Curvature",
    "CurvatureReport",
    "CurvatureRow",
    "Factors",
    "KFACState",
    "KFACTransformation",
    "MultiStepsState",
    "ScaleByKFACState",
    "ScaleByLayersState",
    "kfac",
    "multi_steps",
    "scale_by_kfac",
    "scale_by_layers",
]
