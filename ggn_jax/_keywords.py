"""Keyword arguments that several functions share: a `TypedDict` says once what they are."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def takes(defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """Let `help`, `inspect.signature`, and so `optax.inject_hyperparams`, see what `**options` of a function may be."""

    def named(function: F) -> F:
        signature = inspect.signature(function)
        own = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
        more = [inspect.Parameter(name, own[0].KEYWORD_ONLY, default=value) for name, value in defaults.items()]
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return named


def check_keywords(function: str, given: Mapping[str, Any], known: Mapping[str, Any], hint: str = "") -> None:
    """Refuse other keyword arguments, as Python does."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            more = f" Did you mean {near[0]!r}?" if near else hint or f" Its options are {', '.join(known)}."
            raise TypeError(f"{function} got an unexpected keyword argument {name!r}.{more}")
