"""Which combinations of options run by default."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import pytest


def covering(strength: int, ids: Callable[[Any], str | None] | None = None, **values: Iterable[Any]) -> Any:
    """`pytest.mark.parametrize` over all combinations of values; most run with `-m sweep` only.

    By default there are enough for any values of `strength` arguments to meet in one test: with 1 every value is used,
    with 2 every pair of values of two arguments. Bugs that need more options than that at a time are rare.
    """
    chosen = cover([list(each) for each in values.values()], strength)
    cases = [
        pytest.param(*case, marks=[] if place in chosen else [pytest.mark.sweep])
        for place, case in _with_places(values.values())
    ]
    return pytest.mark.parametrize(tuple(values), cases, ids=ids)


def _with_places(values: Iterable[Iterable[Any]]) -> Iterable[tuple[tuple[int, ...], tuple[Any, ...]]]:
    for case in product(*map(enumerate, values)):
        yield tuple(place for place, _ in case), tuple(value for _, value in case)


def cover(values: list[list[Any]], strength: int) -> set[tuple[int, ...]]:
    """The places of values of some combinations which hold any values of `strength` arguments."""
    return min((_greedily(values, strength, evenly) for evenly in (True, False)), key=len)


def _greedily(values: list[list[Any]], strength: int, evenly: bool) -> set[tuple[int, ...]]:
    """Always the combination with most of what is missing; among those, evenly, that of the values used least."""
    cases = list(product(*(range(len(each)) for each in values)))
    held = {case: set(combinations(enumerate(case), strength)) for case in cases}
    missing, chosen = set().union(*held.values()), set()
    uses: Counter[tuple[int, int]] = Counter()
    while missing:
        best = max(
            cases, key=lambda case: (len(held[case] & missing), -evenly * sum(uses[use] for use in enumerate(case)))
        )
        chosen.add(best)
        missing -= held[best]
        uses.update(enumerate(best))
    return chosen
