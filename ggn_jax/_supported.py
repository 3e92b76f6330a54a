"""Which losses are supported, and for which vectors."""

from typing import Any

import jax
import numpy as np

from ggn_jax._checks import Shaped
from ggn_jax._hints import loss_hint
from ggn_jax.cross_entropy import CrossEntropyLoss
from ggn_jax.fisher_type import FisherType
from ggn_jax.joint import JointLoss, errors_name_output
from ggn_jax.likelihood import LikelihoodLoss, missing_fisher_sqrt
from ggn_jax.loss import Loss
from ggn_jax.losses import BCEWithLogitsLoss, MSELoss

BUILT_IN: tuple[type[Loss], ...] = (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss)


def check_supported(loss: Any) -> Loss:
    """`loss`, if its class tells its curvature; refused otherwise."""
    if isinstance(loss, JointLoss):
        for name, head in loss.losses.items():
            with errors_name_output(name):
                check_supported(head)
        return loss
    if not isinstance(loss, Loss):
        names = ", ".join(cls.__name__ for cls in BUILT_IN)
        raise NotImplementedError(
            f"loss must be one of ggn_jax's losses ({names}) or an instance of your own ggn_jax.LikelihoodLoss; got"
            f" {loss!r}.{loss_hint(loss)}"
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
    """Refuse a loss without an exact factor of its curvature."""
    if isinstance(loss, JointLoss):
        for name, head in loss.losses.items():
            with errors_name_output(name):
                check_exact(head)
    if isinstance(loss, LikelihoodLoss) and loss.curvature == "fisher" and not loss._has_fisher_sqrt():
        raise missing_fisher_sqrt(loss)


def stand_in_targets(loss: Loss, outputs: Shaped, fisher_type: FisherType | None, *, batch: bool) -> Any:
    """Targets for vectors that do not depend on them; `fisher_type` is None for what needs the loss's value."""
    if fisher_type in (FisherType.TYPE2, FisherType.MC):
        return loss.stand_in_targets(outputs, batch)
    what = f"fisher_type {fisher_type.value!r}" if fisher_type else "the value of the loss, which is needed here"
    raise TypeError(f"targets must be an array for {what}; got None.")
