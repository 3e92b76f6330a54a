"""Which losses are taken, and for which vectors."""

from typing import Any

import jax
import numpy as np

from ggn_jax.likelihood import LikelihoodLoss, missing_fisher_sqrt
from ggn_jax.loss import Loss
from ggn_jax.losses import BUILT_IN


def check_loss(loss: Any) -> Loss:
    """`loss`, if what is known of its class says what its curvature is."""
    if not isinstance(loss, Loss):
        names = ", ".join(cls.__name__ for cls in BUILT_IN)
        raise NotImplementedError(
            f"loss must be one of ggn_jax's losses ({names}) or an instance of your own ggn_jax.LikelihoodLoss; got"
            f" {loss!r}."
        )
    for cls in BUILT_IN:
        if isinstance(loss, cls) and type(loss) is not cls:
            raise NotImplementedError(
                f"{type(loss).__name__} is a subclass of {cls.__name__}, whose closed-form curvature need not be its"
                " own: derive it from ggn_jax.LikelihoodLoss instead."
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(loss):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
            raise TypeError(
                f"{type(loss).__name__}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array: declare"
                " it as equinox.field(static=True)."
            )
    return loss


def check_exact(loss: Loss) -> None:
    """Refuse a loss that has no exact factor of its matrix."""
    if isinstance(loss, LikelihoodLoss) and loss.curvature == "fisher" and not loss.has_fisher_sqrt():
        raise missing_fisher_sqrt(loss)
