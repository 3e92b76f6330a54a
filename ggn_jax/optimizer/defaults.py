"""What `kfac` takes for the arguments that are left out: the usual numbers, or rules that need no tuning."""

from typing import Any, NamedTuple

from ggn_jax._checks import is_word
from ggn_jax.optimizer.rules import LevenbergMarquardt, QuadraticModel, SlopeDamping

AUTO = "auto"


class Tuned(NamedTuple):
    """What `kfac` has values of its own for."""

    damping: Any
    momentum: Any
    kl_clip: Any
    factor_interval: Any
    inverse_interval: Any


WITH_A_RATE = Tuned(damping=1e-3, momentum=0.9, kl_clip=1e-3, factor_interval=1, inverse_interval=10)
"""Where the learning rate is a number or a schedule."""

WITHOUT = Tuned(damping=SlopeDamping(), momentum=AUTO, kl_clip=None, factor_interval=5, inverse_interval=5)
"""Where it and the momentum are the quadratic model's, which bounds its steps itself."""


def with_defaults(rate: Any, given: Tuned) -> Tuned:
    """A value for each argument that is "auto"."""
    usual = WITH_A_RATE
    if isinstance(rate, QuadraticModel):
        usual = WITHOUT
        if not rate.momentum:  # the slope along the last step is that of the model with momentum
            usual = usual._replace(damping=LevenbergMarquardt(), momentum=WITH_A_RATE.momentum)
        damping = usual.damping if is_word(given.damping, AUTO) else given.damping
        if not isinstance(damping, SlopeDamping):  # other dampings do not notice in time that factors are stale
            usual = usual._replace(factor_interval=WITH_A_RATE.factor_interval)
    return Tuned(*(default if is_word(x, AUTO) else x for x, default in zip(given, usual, strict=True)))
