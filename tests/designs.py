"""Which combinations of options run by default."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

SWEEP = 3  # so many values of different options meet in a test of the sweep


def covering(strength: int, ids: Callable[[Any], str | None] | None = None, **values: Collection[Any]) -> Any:
    """`pytest.mark.parametrize` over combinations of values; most run with `-m sweep` only.

    By default there are enough for any values of `strength` arguments to meet in one test: with 1 every value is used,
    with 2 every pair of values of two arguments. Bugs that need more options than that at a time are rare. With the
    sweep any three meet; no more than that is run.
    """
    places = list(product(*(range(len(each)) for each in values.values())))
    cases = dict(zip(places, product(*values.values()), strict=True))
    chosen, swept = design(places, strength)
    params = [_marked(cases[place], place in chosen) for place in places if place in chosen | swept]
    return pytest.mark.parametrize(tuple(values), params, ids=ids)


def thinned(cases: Sequence[tuple[Hashable, ...]], strength: int) -> list[Any]:
    """The same for cases which are not all combinations."""
    chosen, swept = design(cases, strength)
    return [_marked(case, case in chosen) for case in cases if case in chosen | swept]


Cases = set[tuple[Hashable, ...]]


def design(cases: Sequence[tuple[Hashable, ...]], strength: int) -> tuple[Cases, Cases]:
    """What runs by default, and what the sweep adds so that any `SWEEP` values meet, that meet in one of the cases."""
    chosen = cover(cases, strength)
    return chosen, cover(cases, min(SWEEP, len(cases[0])), chosen) - chosen


def swept(cases: Sequence[tuple[Hashable, ...]], by_default: Collection[tuple[Hashable, ...]]) -> list[Any]:
    """The cases, of which those that are not named run with `-m sweep` only."""
    unknown = set(by_default) - set(cases)
    assert not unknown, unknown
    return [_marked(case, case in by_default) for case in cases]


def _marked(case: tuple[Any, ...], by_default: bool) -> Any:
    return pytest.param(*case, marks=[] if by_default else [pytest.mark.sweep])


def cover(
    cases: Sequence[tuple[Hashable, ...]], strength: int, start: Collection[tuple[Hashable, ...]] = ()
) -> set[tuple[Hashable, ...]]:
    """Some of the cases, `start` among them, which hold any `strength` values at their places that one case holds."""
    return min((_greedily(cases, strength, evenly, start) for evenly in (True, False)), key=len)


def _greedily(
    cases: Sequence[tuple[Hashable, ...]], strength: int, evenly: bool, start: Collection[tuple[Hashable, ...]]
) -> set[tuple[Hashable, ...]]:
    """Always the case with most of what is missing; among those, evenly, that of the values used least."""
    held = {case: set(combinations(enumerate(case), strength)) for case in cases}
    chosen = set(start)
    missing = set().union(*held.values()) - set().union(*(held[case] for case in start))
    uses: Counter[tuple[int, Hashable]] = Counter()

    def gain(case: tuple[Hashable, ...]) -> tuple[int, int]:
        return len(held[case] & missing), -evenly * sum(uses[use] for use in enumerate(case))

    while missing:
        best = max(cases, key=gain)
        chosen.add(best)
        missing -= held[best]
        uses.update(enumerate(best))
    return chosen
