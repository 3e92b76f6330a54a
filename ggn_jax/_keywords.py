"""Keyword arguments that several functions share: a `TypedDict` says once what they are."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def check_names(caller: str, given: Iterable[str], known: Sequence[str], hint: str = "") -> None:
    """Refuse names of options that a function does not have, with the nearest one, or `hint` where none is near."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            way_out = f" Did you mean {near[0]!r}?" if near else hint or f" It takes {', '.join(known)}."
            raise TypeError(f"{caller} got an unexpected keyword argument {name!r}.{way_out}")


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that are given by name only."""
    found = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in found if parameter.kind is parameter.KEYWORD_ONLY]


def takes(defaults: Mapping[str, Any], hint: str = "") -> Callable[[F], F]:
    """Say what `**options` of a function may be.

    `help`, `inspect.signature`, and so `optax.inject_hyperparams`, see the names; others are refused, as Python does,
    with the nearest one, or with `hint` where none is near.
    """

    def named(function: F) -> F:
        signature = inspect.signature(function)
        own = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
        more = [inspect.Parameter(name, own[0].KEYWORD_ONLY, default=value) for name, value in defaults.items()]
        known = [x.name for x in (*own, *more) if x.name not in ("self", "cls")]

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            caller = type(args[0]).__name__ if args and function.__name__ == "__init__" else function.__name__
            check_names(caller, kwargs, known, hint)
            return function(*args, **kwargs)

        checked.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return cast(F, checked)

    return named
