"""KFAC and EKFAC as optax transformations."""

from ggn_jax.optimizer.methods import KFACTransformation
from ggn_jax.optimizer.multi_steps import multi_steps
from ggn_jax.optimizer.transformation import kfac, scale_by_kfac

__all__ = ["KFACTransformation", "kfac", "multi_steps", "scale_by_kfac"]
