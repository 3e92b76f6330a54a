"""What runs by default holds every combination of values that it should, and little else."""

from itertools import combinations, product

import pytest
from cases import CASES, CORE
from designs import cover, thinned


@pytest.mark.parametrize(
    ("sizes", "strength", "most"), [((5, 2), 1, 5), ((2, 2, 2), 2, 4), ((2, 3, 2, 3, 2, 2), 2, 12)]
)
def test_any_values_meet(sizes: tuple[int, ...], strength: int, most: int) -> None:
    cases = list(product(*map(range, sizes)))
    chosen = cover(cases, strength)
    assert chosen <= set(cases)
    assert len(chosen) <= most
    held = {meeting for case in chosen for meeting in combinations(enumerate(case), strength)}
    assert held == {meeting for case in cases for meeting in combinations(enumerate(case), strength)}


def test_values_are_used_evenly() -> None:
    assert cover(list(product(range(4), range(2))), 1) == {(0, 0), (1, 1), (2, 0), (3, 1)}


def test_the_sweep_adds_what_pairs_do_not_show() -> None:
    cases = list(product(range(3), range(2), range(2), range(3), range(2)))
    params = thinned(cases, 2)
    assert {param.values for param in params if not param.marks} == cover(cases, 2)
    assert all(mark.name == "sweep" for param in params for mark in param.marks)
    held = {meeting for param in params for meeting in combinations(enumerate(param.values), 3)}
    assert held == {meeting for case in cases for meeting in combinations(enumerate(case), 3)}
    assert len(params) < len(cases) / 2


def test_the_means_of_weighted_and_ignored_labels_are_among_the_losses() -> None:
    names = [case.name for case in CASES if case.name in CORE]
    assert len(names) == len(CORE) < len(CASES) / 2
    assert any(name.startswith("ce-mean") and "-weighted-" in name and "ignored" in name for name in names)
