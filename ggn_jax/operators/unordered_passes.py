"""Passes over an iterable of batches in any order, the first two of which are compared."""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jaxtyping import Array, PyTree

from ggn_jax._sharding import compiler_sharded
from ggn_jax.operators.batches import (
    DIFFERENT_DATA,
    CachedByShapes,
    fingerprint,
    no_batches,
    refuse_mask,
    same_data,
    sum_batches,
    with_batch,
    with_progress,
)
from ggn_jax.operators.problem import Problem

T = TypeVar("T")


class UnorderedPasses(Generic[T]):
    """Passes over batches; `make` makes something of a batch, once for each shape."""

    def __init__(
        self,
        make: Callable[[PyTree, Any], T],
        problem_of: Callable[[T], Problem],
        batches: Iterable[Any],
        progress: bool,
        *,
        refuse: Callable[[Any], None] = refuse_mask,
    ):
        """`make` checks a batch of each shape; `refuse` is called with a batch's mask."""
        self._made, self._problem_of = CachedByShapes(make), problem_of
        self._batches, self._progress, self._refuse = batches, progress, refuse
        self._seen: np.ndarray | None = None
        self._compared = False

    @property
    def first(self) -> Any:
        """What was made of the first batch; None before the first pass."""
        return self._made.first

    def peek(self) -> T:
        """Read the first batch only, and return what is made of it."""
        batches = (batch for batch, _ in zip(self._batches, range(1), strict=False))
        if not sum_batches(batches, lambda inputs, targets, mask, start: (self._of(inputs, targets, mask)[1], ()))[2]:
            raise no_batches(self._batches)
        found: T = self._made.first
        return found

    def sum_over_batches(self, contribution: Callable[[T, Problem, int], PyTree[Array]], description: str) -> Any:
        """The sum over batches of `contribution(made, problem, start)`.

        `made` is that of the first batch of these shapes, and `problem` has this batch's data; `start` is the number of
        its first example.
        """

        def sums(inputs: PyTree, targets: Any, mask: Any, start: int) -> tuple[Problem, PyTree[Array]]:
            made, problem = self._of(inputs, targets, mask)
            mark = None if self._compared else _fingerprint(problem.inputs, problem.targets)
            return problem, (contribution(made, problem, start), mark)

        _, total, count = sum_batches(with_progress(self._batches, self._progress, description), sums)
        if not count:
            raise no_batches(self._batches, again=self.first is not None)
        found, mark = total
        if mark is not None:
            self._compare(np.asarray(mark))
        return found

    def _of(self, inputs: PyTree, targets: Any, mask: Any) -> tuple[T, Problem]:
        self._refuse(mask)
        made: T = self._made.of(inputs, targets)
        return made, with_batch(self._problem_of(made), inputs, targets, check=self._seen is None)

    def _compare(self, mark: np.ndarray) -> None:
        if self._seen is None:
            self._seen = mark
        elif not same_data(mark, self._seen):
            raise ValueError(DIFFERENT_DATA)
        else:
            self._compared = True


_fingerprint = jax.jit(compiler_sharded(fingerprint))
