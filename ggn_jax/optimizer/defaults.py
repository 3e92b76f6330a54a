"""What `kfac` takes for the arguments that are left out: the usual numbers, or a rule that needs no tuning."""

from collections.abc import Mapping
from typing import Any

AUTO = "auto"
QUADRATIC = "quadratic"
SLOPE = "slope"
EVERY = 5  # steps

WITH_A_RATE: Mapping[str, Any] = {
    "momentum": 0.9,
    "damping": 1e-3,
    "adapt_damping": None,
    "inverse_interval": 10,
}
"""Where a learning rate is given."""

WITHOUT: Mapping[str, Any] = {
    "momentum": QUADRATIC,
    "damping": 1.0,
    "adapt_damping": SLOPE,
    "inverse_interval": EVERY,
}
"""Where none is: that of the quadratic model, with its momentum, and a damping by the slope on the next batch."""


def is_word(value: Any, word: str) -> bool:
    return isinstance(value, str) and value == word


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `kfac` with a value for each that is "auto", and a learning rate."""
    result = dict(given)
    tuned = result["learning_rate"] is not None
    if not tuned:
        result["learning_rate"] = QUADRATIC
        if is_word(result["adapt_damping"], AUTO):
            if callable(result["damping"]):
                result["adapt_damping"] = None  # a schedule says it all
            elif not any(is_word(result["momentum"], word) for word in (AUTO, QUADRATIC)):
                result["adapt_damping"] = EVERY  # the slope is that of the model with momentum
        if result["adapt_damping"] is None and is_word(result["damping"], AUTO):
            raise ValueError(
                "damping must be given with adapt_damping=None and no learning_rate, whose own damping is one to start"
                " adaptation from: pass damping=..., a number or a schedule, or leave adapt_damping out."
            )
    for name, value in (WITH_A_RATE if tuned else WITHOUT).items():
        if is_word(result[name], AUTO):
            result[name] = value
    return result
