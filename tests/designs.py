"""Which combinations of options run by default."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(strength: int, ids: Callable[[Any], str | None] | None = None, **values: Collection[Any]) -> Any:
    """`pytest.mark.parametrize` over all combinations of values; most run with `-m sweep` only.

    By default there are enough for any values of `strength` arguments to meet in one test: with 1 every value is used,
    with 2 every pair of values of two arguments. Bugs that need more options than that at a time are rare.
    """
    places = list(product(*(range(len(each)) for each in values.values())))
    chosen = cover(places, strength)
    cases = [_marked(case, place in chosen) for place, case in zip(places, product(*values.values()), strict=True)]
    return pytest.mark.parametrize(tuple(values), cases, ids=ids)


def thinned(cases: Sequence[tuple[Hashable, ...]], strength: int) -> list[Any]:
    """The same for cases which are not all combinations."""
    chosen = cover(cases, strength)
    return [_marked(case, case in chosen) for case in cases]


def swept(cases: Sequence[tuple[Hashable, ...]], by_default: Collection[tuple[Hashable, ...]]) -> list[Any]:
    """The cases, of which those that are not named run with `-m sweep` only."""
    unknown = set(by_default) - set(cases)
    assert not unknown, unknown
    return [_marked(case, case in by_default) for case in cases]


def _marked(case: tuple[Any, ...], by_default: bool) -> Any:
    return pytest.param(*case, marks=[] if by_default else [pytest.mark.sweep])


def cover(cases: Sequence[tuple[Hashable, ...]], strength: int) -> set[tuple[Hashable, ...]]:
    """Some of the cases, which hold any `strength` values at their places that one of all cases holds."""
    return min((_greedily(cases, strength, evenly) for evenly in (True, False)), key=len)


def _greedily(cases: Sequence[tuple[Hashable, ...]], strength: int, evenly: bool) -> set[tuple[Hashable, ...]]:
    """Always the case with most of what is missing; among those, evenly, that of the values used least."""
    held = {case: set(combinations(enumerate(case), strength)) for case in cases}
    missing, chosen = set().union(*held.values()), set()
    uses: Counter[tuple[int, Hashable]] = Counter()

    def gain(case: tuple[Hashable, ...]) -> tuple[int, int]:
        return len(held[case] & missing), -evenly * sum(uses[use] for use in enumerate(case))

    while missing:
        best = max(cases, key=gain)
        chosen.add(best)
        missing -= held[best]
        uses.update(enumerate(best))
    return chosen
