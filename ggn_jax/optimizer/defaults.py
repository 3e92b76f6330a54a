"""What `kfac` takes for the arguments that are left out: the usual numbers, or a rule that needs no tuning."""

from typing import Any, NamedTuple

AUTO = "auto"
QUADRATIC = "quadratic"
SLOPE = "slope"
EVERY = 5  # steps
FACTORS_EVERY = 5


class Tuned(NamedTuple):
    """What `kfac` has values of its own for."""

    learning_rate: Any
    damping: Any
    adapt_damping: Any
    momentum: Any
    inverse_interval: Any


WITH_A_RATE = (1e-3, None, 0.9, AUTO)
"""Damping, its adaptation, momentum, and steps between inverses (as `Settings` has them), where a rate is given."""

WITHOUT = (1.0, SLOPE, QUADRATIC, EVERY)
"""Where none is: its and the momentum of the quadratic model, and a damping by the slope on the next batch."""


def is_word(value: Any, word: str) -> bool:
    return isinstance(value, str) and value == word


def with_defaults(rate: Any, damping: Any, adapt: Any, momentum: Any, interval: Any) -> Tuned:
    """A learning rate, and a value for each of the others that is "auto"."""
    tuned = rate is not None
    if not tuned:
        rate = QUADRATIC
        if is_word(adapt, AUTO):
            if callable(damping):
                adapt = None  # a schedule says it all
            elif not any(is_word(momentum, word) for word in (AUTO, QUADRATIC)):
                adapt = EVERY  # the slope is that of the model with momentum
        if adapt is None and is_word(damping, AUTO):
            raise ValueError(
                "damping must be given with adapt_damping=None and no learning_rate, whose own damping is one to start"
                " adaptation from: pass damping=..., a number or a schedule, or leave adapt_damping out."
            )
    given = damping, adapt, momentum, interval
    usual = WITH_A_RATE if tuned else WITHOUT
    return Tuned(rate, *(usual if is_word(x, AUTO) else x for x, usual in zip(given, usual, strict=True)))


def factor_interval(rate: Any, given: Any) -> Any:
    """How many steps pass between new factors."""
    return (1 if rate is not None else FACTORS_EVERY) if is_word(given, AUTO) else given
