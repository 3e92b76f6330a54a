"""Passes over an iterable of batches in a fixed order: their outputs are the rows of one Jacobian."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from ggn_jax._sharding import compiler_sharded
from ggn_jax.operators.batches import (
    CachedByShapes,
    check_iterable,
    example_marks,
    no_batches,
    refuse_mask,
    same_data,
    sum_batches,
    with_batch,
    with_progress,
)
from ggn_jax.operators.problem import Problem

Contribution = Callable[[Problem, int], PyTree[Array]]


class OrderedPasses:
    """Passes over batches, all in the order of the first, which counts examples; the second one is compared with it."""

    def __init__(
        self,
        make: Callable[[PyTree, Any], Problem],
        batches: Iterable[Any],
        *,
        with_targets: bool,
        progress: bool,
        contribution: Contribution = lambda problem, start: (),
    ):
        """Go over `batches` once: `make` checks a batch of each shape, `contribution` is called with each batch."""
        check_iterable(batches, "each product goes over the batches")
        self._made, self._batches = CachedByShapes(make), batches
        self._with_targets, self._progress = with_targets, progress
        self._marks: list[Any] | None = None
        """For each batch of the first pass, a number for each example."""
        self._compared = False
        self.sum_over_batches(contribution, "counting")
        first = self._made.first
        self.params, self.loss = first.params, first.loss
        self.outputs = jax.ShapeDtypeStruct((self.ends[-1], *first.outputs.shape[1:]), first.outputs.dtype)
        """Of all batches together."""

    @property
    def ends(self) -> list[int]:
        """The number of examples up to the end of each batch."""
        return [int(end) for end in np.cumsum([len(mark) for mark in self._marks or ()])]

    def sum_over_batches(self, contribution: Contribution, description: str) -> PyTree[Array]:
        """The sum of `contribution(problem, start)` over the batches, with the number of the first example of each."""
        found: list[Any] = []

        def sums(inputs: PyTree, targets: Any, mask: Any, start: int) -> tuple[Problem, PyTree[Array]]:
            refuse_mask(mask)
            problem = self._problem(inputs, targets if self._with_targets else None)
            found.append(None if self._compared else _marks(problem.inputs, problem.targets))
            self._check(problem, len(found) - 1)
            return problem, contribution(problem, start)

        _, total, _ = sum_batches(with_progress(self._batches, self._progress, description), sums)
        if not found:
            raise no_batches(self._batches, again=self._marks is not None)
        if self._marks is None:
            self._marks = [np.asarray(mark) for mark in found]
            return total
        if len(found) != len(self._marks):
            raise ValueError(f"{BATCHES_CHANGED}: {len(found)} batches where the first pass had {len(self._marks)}.")
        if not self._compared:
            for number, (mark, first) in enumerate(zip(found, self._marks, strict=True)):
                if not same_data(np.asarray(mark), first):
                    raise ValueError(f"{BATCHES_CHANGED}: batch {number} differs.")
            self._compared = True
        return total

    def _problem(self, inputs: PyTree[Array], targets: Any) -> Problem:
        is_first = self._made.first is None
        made: Problem = self._made.of(inputs, targets)
        if is_first:
            made.check_batches()
        return with_batch(made, inputs, targets, check=self._marks is None)

    def _check(self, problem: Problem, number: int) -> None:
        """Refuse a batch whose outputs differ in shape from those before, or that differs from the first pass."""
        like, outputs = self._made.first.outputs, problem.outputs
        if (outputs.shape[1:], outputs.dtype) != (like.shape[1:], like.dtype):
            raise ValueError(
                f"outputs must be like batch 0's, {like.dtype} of shape {like.shape}, but for the number of examples,"
                f" since they follow each other in one array; got {outputs.dtype} of shape {outputs.shape}: pad them,"
                " or make an operator of each."
            )
        if self._marks is not None:
            wanted = len(self._marks[number]) if number < len(self._marks) else "none"
            if wanted != outputs.shape[0]:
                raise ValueError(f"{BATCHES_CHANGED}: {outputs.shape[0]} examples where the first pass had {wanted}.")


_marks = jax.jit(compiler_sharded(example_marks))

BATCHES_CHANGED = (
    "two passes over the batches gave different data, or in another order, and rows are in the order of the batches:"
    " switch off shuffling, and what draws data again (random crops, sampling with replacement)"
)
