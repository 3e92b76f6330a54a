"""Which parameters each layer owns, and which none does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from ggn_jax._checks import wide_dtype
from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.labels import Data
from ggn_jax.layers.trace import Trace
from ggn_jax.layers.uses import ElementwiseUse, ParameterView, UncoveredUse, Use


@dataclass(frozen=True)
class Layer:
    """One weight, with all its uses, and the bias that is added wherever it is used."""

    uses: tuple[int, ...]  # numbers of `Trace.uses`
    swapped: tuple[bool, ...]  # for each use, whether it is by the transpose of the first one's weight
    weight: ParameterView  # as the first use lays it out
    bias: ParameterView | None
    leaves: tuple[int, ...]  # the parameters it has entries of; the weight's first

    def indices_between(self, start: int, stop: int) -> list[int]:
        """The indices (in `uses`) of the uses with these numbers."""
        return [place for place, number in enumerate(self.uses) if start <= number < stop]


@dataclass(frozen=True)
class UnassignedParameter:
    """A parameter that no layer owns."""

    leaf: int
    kind: str  # "scale", "shift", "uncovered" or "unused"
    why: str = ""
    source: str = ""
    module: str = ""


@dataclass(frozen=True)
class Plan:
    """Every parameter, once: in a layer, or unassigned."""

    layers: tuple[Layer, ...]
    unassigned: tuple[UnassignedParameter, ...]

    def layer_of(self, leaf: int) -> Layer | None:
        """The first layer with entries of a parameter."""
        return next((layer for layer in self.layers if leaf in layer.leaves), None)

    def restricted(self, start: int, stop: int) -> "Plan":
        """Of a plan of several functions, the part of the function with these uses: of each layer its own, or none."""
        return Plan(tuple(_restricted(layer, start, stop) for layer in self.layers), self.unassigned)


class UncoveredParametersWarning(UserWarning):
    """A warning that parameters have no Kronecker form, and are too large for a dense block.

    They have the GGN's exact diagonal. The Kronecker operators and an optimizer's `init` give it with
    `on_uncovered="auto"`; it names the parameters.

    Example:
        >>> import warnings, ggn_jax
        >>> warnings.simplefilter("ignore", ggn_jax.UncoveredParametersWarning)  # or pass on_uncovered="diagonal"
    """


MAX_SMALL_SIZE = 1024
"""The size of the largest parameter without a layer that has a dense block by default."""


def is_dense(kind: str, size: int, total: int, most: int = MAX_SMALL_SIZE) -> bool:
    """Whether an unassigned parameter of `size` entries, of `total` in all, has a dense block by default.

    The block of a scale or shift should not be larger than the model itself, as that of a position embedding is.
    """
    affordable = kind == "uncovered" or size**2 <= max(total, ALWAYS_DENSE**2)
    return size <= most and affordable


ALWAYS_DENSE = 128


def make_plan(trace: Trace) -> Plan:
    """Group uses of the same entries into layers; a parameter with any other use is unassigned."""
    sizes = [math.prod(shape) for shape in trace.shapes]

    unassigned: dict[int, UnassignedParameter] = {}

    def leaves_of(entries: IndexMap) -> tuple[int, ...]:
        return entries.owning_leaves(sizes)

    def unassign(leaf: int, kind: str, why: str, use: Use | ElementwiseUse | UncoveredUse | None = None) -> None:
        # The first reason stays: reasons are looked for from the most to the least specific.
        source, module = ("", "") if use is None else (use.source, use.module)
        unassigned.setdefault(leaf, UnassignedParameter(leaf, kind, why, source, module))

    # A bias belongs to a layer if it is added at every use of that weight, and nowhere else.
    by_weight: dict[object, list[int]] = {}
    for number, use in enumerate(trace.uses):
        if not use.weight.entries.size:
            continue
        by_weight.setdefault(_key(use.weight), []).append(number)
    bias_users: dict[object, set[object]] = {}
    for use in trace.uses:
        if use.bias is not None:
            bias_users.setdefault(_key(use.bias), set()).add(_key(use.weight))
    drafts: list[Layer] = []
    owned_biases: set[int] = set()
    for weight, numbers in by_weight.items():
        uses = [trace.uses[n] for n in numbers]
        biases = tuple(use.bias for use in uses if use.bias is not None)
        keys = {_key(bias) for bias in biases}
        first = uses[0].weight
        swapped = tuple(not _same_layout(first, use.weight) for use in uses)
        if any(s and not _same_layout(first, _transposed(use.weight)) for s, use in zip(swapped, uses, strict=True)):
            for leaf in leaves_of(first.entries):
                why = "its uses lay it out differently, and are not each other's transpose"
                unassign(leaf, "uncovered", why, uses[0])
        bias = None
        alike = len(biases) == len(uses) and not any(swapped) and all(_same_layout(biases[0], b) for b in biases)
        if alike and bias_users[next(iter(keys))] == {weight}:
            bias = biases[0]
            owned_biases |= set(numbers)
        views = (first,) if bias is None else (first, bias)
        leaves = tuple(dict.fromkeys(leaf for view in views for leaf in leaves_of(view.entries)))
        drafts.append(Layer(tuple(numbers), swapped, first, bias, leaves))

    for uncovered in trace.uncovered:
        for leaf in sorted(uncovered.leaves):
            unassign(leaf, "uncovered", uncovered.why, uncovered)
    in_layers = {leaf for layer in drafts for leaf in layer.leaves}
    for elementwise in trace.elementwise:
        if elementwise.bias_of is not None and elementwise.bias_of in owned_biases:
            continue
        for leaf in sorted(elementwise.leaves):
            if leaf in in_layers:
                why = f"it is the weight or bias of a layer and a {elementwise.kind} as well"
                unassign(leaf, "uncovered", why, elementwise)
            else:
                unassign(leaf, elementwise.kind, "", elementwise)
    for leaf in _overlapping(drafts, sizes):
        unassign(leaf, "uncovered", "its uses overlap in part")

    # A layer is covered as a whole or not at all: its block has all of its entries. So one that has entries of an
    # unassigned parameter is dropped, which may leave others without a parameter of theirs, and so on.
    while True:
        broken = [layer for layer in drafts if any(leaf in unassigned for leaf in layer.leaves)]
        if not broken:
            break
        drafts = [layer for layer in drafts if layer not in broken]
        for layer in broken:
            lacking = next(leaf for leaf in layer.leaves if leaf in unassigned)
            use = trace.uses[layer.uses[0]]
            for leaf in layer.leaves:
                why = f"its layer also has entries of {trace.names[lacking]}, which is not covered"
                is_bias = layer.bias is not None and leaf in leaves_of(layer.bias.entries)
                kind, why = ("shift", "") if is_bias else ("uncovered", why)
                unassign(leaf, kind, why, use)
    covered = {leaf for layer in drafts for leaf in layer.leaves}
    for leaf in range(len(trace.shapes)):
        if not sizes[leaf] or (leaf not in covered and leaf not in unassigned):
            unassigned[leaf] = UnassignedParameter(leaf, "unused", "no output depends on it")
    return Plan(tuple(drafts), tuple(unassigned[leaf] for leaf in sorted(unassigned)))


def join_traces(traces: Sequence[Trace]) -> Trace:
    """What is found in several functions of the same parameters, as if they were one model with all of their uses."""
    uses: list[Any] = []
    elementwise: list[Any] = []
    uncovered: list[Any] = []
    for trace in traces:
        start = len(uses)
        elementwise += [x if x.bias_of is None else replace(x, bias_of=x.bias_of + start) for x in trace.elementwise]
        uses += trace.uses
        uncovered += trace.uncovered
    wide = wide_dtype([trace.outputs for trace in traces])
    outputs = jax.ShapeDtypeStruct((), wide)
    found = replace(traces[0], uses=tuple(uses), elementwise=tuple(elementwise), uncovered=tuple(uncovered))
    return replace(found, outputs=outputs, head=Data())


def _restricted(layer: Layer, start: int, stop: int) -> Layer:
    places = layer.indices_between(start, stop)
    uses = tuple(layer.uses[i] - start for i in places)
    return replace(layer, uses=uses, swapped=tuple(layer.swapped[i] for i in places))


def _key(view: ParameterView) -> object:
    return view.entries.entry_set()


def _same_layout(a: ParameterView, b: ParameterView) -> bool:
    return a.shape == b.shape and a.entries.reshape(a.shape) == b.entries.reshape(b.shape)


def _transposed(view: ParameterView) -> ParameterView:
    groups, out, inputs = view.shape
    return ParameterView(view.entries.reshape(view.shape).transpose((0, 2, 1)), (groups, inputs, out))


def _overlapping(layers: list[Layer], sizes: list[int]) -> list[int]:
    """Parameters with an entry in two layers."""
    holders: dict[int, list[IndexMap]] = {}
    for layer in layers:
        for view in (layer.weight, *([] if layer.bias is None else [layer.bias])):
            for leaf in view.entries.owning_leaves(sizes):
                holders.setdefault(leaf, []).append(view.entries)
    result = []
    for leaf, held in holders.items():
        bounds = sorted(entries.bounds() for entries in held)
        if all(before[1] < after[0] for before, after in pairwise(bounds)):
            continue  # no two ranges overlap, as is usual: nothing of the parameters' size is needed
        start, stop = sum(sizes[:leaf]), sum(sizes[: leaf + 1])
        seen = np.zeros(stop - start, bool)  # a byte per entry, of this parameter only
        for entries in held:
            numbers = entries.indices().reshape(-1)
            numbers = numbers[(numbers >= start) & (numbers < stop)] - start
            if seen[numbers].any():
                result.append(leaf)
                break
            seen[numbers] = True
    return result
