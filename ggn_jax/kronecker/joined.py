"""Blocks of several functions of the same parameters: one plan of layers, and each function's part of the factors."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ggn_jax._checks import compute_dtype
from ggn_jax._weights import times, weighted_sum
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.factors import Bases, factor_sums
from ggn_jax.kronecker.layout import Layout, Partition
from ggn_jax.kronecker.options import Options
from ggn_jax.layers import Layer, Trace, join_traces, trace_model
from ggn_jax.loss import Loss
from ggn_jax.operators.problem import Problem


class JoinedLayout(Layout):
    """The blocks of a sum of functions: the uses of a weight are those of all of them."""

    def __init__(self, losses: Sequence[Loss], traces: Sequence[Trace], options: Options):
        super().__init__(losses[0], join_traces(traces), options)
        self.functions: list[FunctionLayout] = []
        start = 0
        for loss, trace in zip(losses, traces, strict=True):
            self.functions.append(FunctionLayout(self, loss, trace, start))
            start += len(trace.uses)

    @classmethod
    def of_all(cls, problems: Sequence[Problem], options: Options) -> "JoinedLayout":
        traces = [trace_model(x.model_fn, x.params, x.inputs, coupled=x.coupled) for x in problems]
        return cls([problem.loss for problem in problems], traces, options)

    def concatenated_uses(self, layer: Layer) -> list[list[int]]:
        """Each function's uses, so that it has one term."""
        return [found for part in self.functions if (found := part.own_uses(layer))]


class FunctionLayout(Layout):
    """One function's part of a `JoinedLayout`: its own uses of each layer, perhaps none."""

    def __init__(self, whole: Layout, loss: Loss, trace: Trace, start: int):
        self.options, self.loss, self.trace = whole.options, loss, trace
        self.sizes, self.leaves = whole.sizes, whole.leaves
        self._start = start
        self.plan = whole.plan.restricted(start, start + len(trace.uses))
        self._whole, self._layers = whole, {id(own): i for i, own in enumerate(self.plan.layers)}

    def own_uses(self, layer: Layer) -> list[int]:
        """The indices of a layer's uses that are this function's."""
        return layer.indices_between(self._start, self._start + len(self.trace.uses))

    def _of_all(self, layer: Layer) -> Layer:
        return self._whole.plan.layers[self._layers[id(layer)]]

    def has_joint_bias(self, layer: Layer) -> bool:
        return self._whole.has_joint_bias(self._of_all(layer))

    def partitions(self, layer: Layer) -> tuple[Partition, Partition]:
        return self._whole.partitions(self._of_all(layer))

    def warn(self) -> None:
        """The whole layout warns, once."""


def joined_sums(
    layout: JoinedLayout,
    problems: Sequence[Problem],
    weights: Sequence[Array],
    keys: Sequence[Array | None],
    masks: Sequence[Array | None],
    bases: Bases | None = None,
    unassigned: bool = True,
) -> dict[str, Any]:
    """`factor_sums` of all functions."""
    if unassigned:
        layout.warn()
    parts = zip(problems, layout.functions, keys, masks, strict=True)
    return add_sums(layout, [factor_sums(*part, bases, unassigned) for part in parts], weights)


def add_sums(layout: JoinedLayout, sums: Sequence[dict[str, Any]], weights: Sequence[Array]) -> dict[str, Any]:
    """The factors of all uses, output factors times weights, and the weighted sum of what has no factors."""
    dtype = compute_dtype(layout.trace.outputs.dtype)
    sums = [jax.tree.map(lambda x: x.astype(dtype), found) for found in sums]
    weights = [weight.astype(dtype) for weight in weights]

    def scaled(weight: Array, tree: Any) -> Any:
        return jax.tree.map(partial(times, weight), tree)

    def side_by_side(parts: Sequence[Any]) -> list[list[Any]]:
        """For each layer, its uses in all functions, of lists with a list of uses for each layer."""
        return [[x for uses in layer for x in uses] for layer in zip(*parts, strict=True)]

    result: dict[str, Any] = {}
    for name in {"a", "count"} & set(sums[0]):
        result[name] = side_by_side([found[name] for found in sums])
    if layout.options.fisher_type is FisherType.FORWARD_ONLY:
        pairs = zip(layout.functions, weights, strict=True)
        result["b"] = side_by_side([scaled(weight, _identity_factors(layout, part, dtype)) for part, weight in pairs])
        return result
    if "b" in sums[0]:
        result["b"] = side_by_side([scaled(w, found["b"]) for w, found in zip(weights, sums, strict=True)])
    for name in {"unassigned", "corrections"} & set(sums[0]):
        result[name] = weighted_sum([found[name] for found in sums], weights)
    return result


def _identity_factors(layout: JoinedLayout, part: FunctionLayout, dtype: Any) -> list[list[tuple[Array, ...]]]:
    """The output factors if nothing is back-propagated."""
    result = []
    for layer, own in zip(layout.plan.layers, part.plan.layers, strict=True):
        partitions, groups = layout.partitions(layer), layer.weight.shape[0]
        runs = [partitions[int(swapped)] for swapped in own.swapped]
        result.append([tuple(jnp.ones((groups * run.count, run.size), dtype) for run in use) for use in runs])
    return result
