"""What `KFAC` is called with: numbers that may change from step to step, in its group of parameters; rules; options."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
import torch

import ggn_jax

P = ParamSpec("P")

RULES: dict[str, list[type]] = {
    "lr": [ggn_jax.QuadraticModel],
    "damping": [ggn_jax.LevenbergMarquardt, ggn_jax.SlopeDamping],
    "weight_decay": [],
}
"""What may be given instead of numbers, which may change from step to step."""
OWN = {"learning_rate", *RULES, "weight_decay_mask", "example_inputs", "full_params", "mesh", "has_aux"}
OPTIONS = set(inspect.signature(ggn_jax.kfac).parameters) - OWN - {"model_fn", "loss"}
ELSEWHERE = {"learning_rate": "lr", "betas": "momentum", "eps": "damping"}
USUAL_DAMPING: float = inspect.signature(ggn_jax.scale_by_kfac).parameters["damping"].default
"""Where `lr` is a number, as `ggn_jax.kfac` has it."""


class ParamGroup(dict[str, Any]):
    """A group of parameters, whose errors say why it has no number for what a rule chooses."""

    def __init__(self, items: Any = (), rules: Mapping[str, Any] | None = None):
        super().__init__(items)
        self.rules = dict(rules or {})

    def __missing__(self, name: str) -> Any:
        rule = self.rules.get(name)
        if rule is None:
            raise KeyError(name)
        raise KeyError(
            f"this KFAC's group of parameters has no {name!r}: {name}={rule} chooses it at each step, and"
            f" torch.optim.lr_scheduler needs a number. Leave the scheduler out, or pass KFAC a number as {name}."
        )

    def numbers(self) -> dict[str, Any]:
        """Those that may have changed, as NumPy's scalars."""
        for name, rule in self.rules.items():
            if name in self:
                raise ValueError(
                    f"param_groups[0][{name!r}] = {self[name]!r} has no effect, since {name}={rule} chooses it: delete"
                    f" it, or make a KFAC with a number as {name}."
                )
        numbers = {name: self.get(name) for name in RULES if name not in self.rules}
        for name, value in numbers.items():
            check_number(f"param_groups[0][{name!r}]", value)
        return {name: np.float64(value) for name, value in numbers.items()}


def split_rules(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers and the rules among what was given for `RULES`; refuses all else."""
    for name, rules in RULES.items():
        value, also = given[name], "auto" if name == "damping" else None
        if not isinstance(value, tuple(rules)) and not (isinstance(value, str) and value == also):
            check_number(name, value, rules)
    numbers = {name: value for name, value in given.items() if isinstance(value, int | float)}
    return numbers, {name: value for name, value in given.items() if name not in numbers}


def check_number(name: str, value: Any, rules: Sequence[type] = ()) -> None:
    """A finite number of at least 0."""
    words = " or ".join(["a number", *(f"ggn_jax.{rule.__name__}(...)" for rule in rules)])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {words}; got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0; got {value!r}.")


def takes_a_module(init: Callable[P, None]) -> Callable[P, None]:
    """Check names and the module before Python says what is missing, which reads as if parameters were right."""
    signature = inspect.signature(init)
    known = sorted({*OPTIONS, *signature.parameters} - {"self", "options"})

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs:
            if name not in known:
                near = [ELSEWHERE[name]] if name in ELSEWHERE else get_close_matches(name, known, 1)
                way_out = f" Did you mean {near[0]!r}?" if near else f" It takes {', '.join(known)}."
                raise TypeError(f"KFAC got an unexpected keyword argument {name!r}.{way_out}")
        given = signature.bind_partial(*args, **kwargs).arguments
        module = given.get("module")
        if not isinstance(module, torch.nn.Module) or "loss_func" not in given:
            got = type(module).__name__ if module is None or "loss_func" in given else f"{type(module).__name__} alone"
            raise TypeError(
                "module must be a torch.nn.Module, of which all parameters that require gradients are trained, and"
                f" loss_func the module of its loss, since the curvature is of both; got {got}. Call it as"
                " KFAC(module, torch.nn.CrossEntropyLoss(), lr=0.1), not with module.parameters()."
            )
        init(*args, **kwargs)

    return checked
