"""Which axis of the inputs each position axis of a layer comes from, as far as the trace tells."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal

import jax

from ggn_jax.layers.jaxprs import INLINED, REMAT, SCAN, inner_jaxpr, open_jaxpr, run_jaxpr, scan_sizes
from ggn_jax.layers.trace import Trace
from ggn_jax.layers.uses import Axes

AxisProvenance = int | None
"""An axis of the inputs, from 1 on; 0 for the batch's, or one that a weight made; None where it is not told.

Of coupled examples, the batch's is 1.
"""
AxesProvenance = tuple[AxisProvenance, ...]
WEIGHTS: Literal["weights"] = "weights"
AbstractValue = AxesProvenance | Literal["weights"] | None  # what depends on inputs; on parameters only; on neither


def position_provenance(trace: Trace) -> list[tuple[tuple[int, AxisProvenance], ...]]:
    """For each use, the size and the label of all axes of its positions."""
    walk = _Walk(trace)
    jaxpr, consts = open_jaxpr(trace.closed)
    data = jaxpr.invars[len(trace.shapes) :]
    first = int(trace.examples > 1)  # together, their axis is one of positions
    values: list[AbstractValue] = [WEIGHTS] * len(trace.shapes)
    values += [
        tuple(range(first, first + len(var.aval.shape))) if batched else None
        for var, batched in zip(data, trace.batched, strict=True)
    ]
    walk.run(jaxpr, [None] * len(consts), values, (), ())
    return [_positions(use.output_axes, walk.found[n]) for n, use in enumerate(trace.uses)]


def _positions(axes: Axes, labels: AxesProvenance) -> tuple[tuple[int, AxisProvenance], ...]:
    if len(labels) < len(axes.shape):  # a convolution's features are split into groups and the rest
        at = axes.groups[-1]
        labels = (*labels[:at], 0, *labels[at:])
    return tuple((axes.shape[axis], labels[axis]) for axis in axes.positions)


class _Walk:
    """One walk over a jaxpr with the labels of axes in place of values."""

    def __init__(self, trace: Trace):
        self.uses = {use.path: number for number, use in enumerate(trace.uses)}
        self.found: dict[int, AxesProvenance] = {}

    def run(
        self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], path: tuple[int, ...], loops: AxesProvenance
    ) -> list[AbstractValue]:
        def step(eqn: Any, at: tuple[int, ...], values: list[Any]) -> list[AbstractValue]:
            known: list[Any] = [value if isinstance(value, tuple | str) else None for value in values]  # literals
            results = self.step(eqn, at, known, loops)
            if at in self.uses:
                self.found[self.uses[at]] = (*loops, *_axes_of(results[0], eqn.outvars[0]))
            return results

        return run_jaxpr(jaxpr, consts, values, path, step)

    def step(
        self, eqn: Any, path: tuple[int, ...], values: list[AbstractValue], loops: AxesProvenance
    ) -> list[AbstractValue]:
        name = eqn.primitive.name
        if name in SCAN:
            return self.scan(eqn, path, values, loops)
        if name in INLINED | REMAT:
            jaxpr, consts = open_jaxpr(inner_jaxpr(eqn))
            return self.run(jaxpr, [None] * len(consts), values, path, loops)
        if not any(isinstance(value, tuple) for value in values):
            return [WEIGHTS if WEIGHTS in values else None] * len(eqn.outvars)
        if name in RULES:
            return [RULES[name](eqn, *values)]
        if any(hasattr(param, "eqns") for param in jax.tree.leaves(eqn.params)):  # branches, loops, custom rules
            return [_axes_of(None, var) for var in eqn.outvars]
        return [_in_place(eqn, var, values) for var in eqn.outvars]

    def scan(
        self, eqn: Any, path: tuple[int, ...], values: list[AbstractValue], loops: AxesProvenance
    ) -> list[AbstractValue]:
        jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
        num_consts, num_carry = scan_sizes(eqn)
        first = num_consts + num_carry
        sliced = [value[0] for value in values[first:] if isinstance(value, tuple)]
        step_axis = reduce(_join, sliced) if sliced else None
        members = [value[1:] if isinstance(value, tuple) else value for value in values[first:]]
        carry = values[num_consts:first]
        while True:
            inner = [*values[:num_consts], *carry, *members]
            results = self.run(jaxpr, [None] * len(consts), inner, path, (*loops, step_axis))
            agreed = [_agree(a, b) for a, b in zip(carry, results[:num_carry], strict=True)]
            if agreed == carry:
                stacked = [(step_axis, *v) if isinstance(v, tuple) else v for v in results[num_carry:]]
                return [*carry, *stacked]
            carry = agreed


def _axes_of(value: AbstractValue, var: Any, others: AxisProvenance = None) -> AxesProvenance:
    """A label for each axis of a value; `others` for those of what depends on no input."""
    return value if isinstance(value, tuple) else (others,) * len(var.aval.shape)


def _join(a: AxisProvenance, b: AxisProvenance) -> AxisProvenance:
    """Of an axis that two values share: an axis of the inputs counts more than another, or what is not told."""
    if a == b:
        return a
    return None if a and b else a or b or None


def _agree(a: AbstractValue, b: AbstractValue) -> AbstractValue:
    """Of a value that is one or the other."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(x if x == y else None for x, y in zip(a, b, strict=True))
    return next((value for value in (a, b) if isinstance(value, tuple)), a or b)


def _in_place(eqn: Any, var: Any, values: list[AbstractValue]) -> AxesProvenance:
    """Of what keeps axes where they are, such as sums, or takes some out; nothing is told of other equations."""
    rank, axes = len(var.aval.shape), eqn.params.get("axes", ())
    found = []
    for value in values:
        if isinstance(value, tuple):
            if isinstance(axes, tuple) and len(value) == rank + len(axes):
                value = tuple(label for axis, label in enumerate(value) if axis not in axes)
            found += [value] if len(value) == rank else []
    return reduce(lambda a, b: tuple(map(_join, a, b)), found) if found else _axes_of(None, var)


def _transpose(eqn: Any, labels: AxesProvenance) -> AxesProvenance:
    return tuple(labels[axis] for axis in eqn.params["permutation"])


def _squeeze(eqn: Any, labels: AxesProvenance) -> AxesProvenance:
    return tuple(label for axis, label in enumerate(labels) if axis not in eqn.params["dimensions"])


def _broadcast(eqn: Any, labels: AxesProvenance) -> AxesProvenance:
    places = dict(zip(eqn.params["broadcast_dimensions"], labels, strict=True))
    return tuple(places.get(axis) for axis in range(len(eqn.outvars[0].aval.shape)))


def _reshape(eqn: Any, labels: AxesProvenance) -> AxesProvenance:
    """The parts of an axis are of its origin; joined axes have one only if theirs is the same."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    result: list[AxisProvenance] = [None] * len(new)
    ones = [next((axis for axis, size in enumerate(shape) if size != 1), len(shape)) for shape in (old, new)]
    if ones[0] == ones[1]:  # else it is not told which of them each is
        result[: ones[0]] = labels[: ones[0]]
    if 0 in old:
        return tuple(result)
    sources = iter([(size, labels[axis]) for axis, size in enumerate(old) if size != 1])
    targets = iter([(size, axis) for axis, size in enumerate(new) if size != 1])
    for (size, label), (reached, axis) in zip(sources, targets, strict=False):
        group = [axis]
        while size != reached:
            if size < reached:
                more, other = next(sources)
                size, label = size * more, label if label == other else None
            else:
                more, axis = next(targets)
                reached, group = reached * more, [*group, axis]
        for axis in group:
            result[axis] = label
    return tuple(result)


def _dot(eqn: Any, *values: AbstractValue) -> AxesProvenance:
    contract, batch = eqn.params["dimension_numbers"]
    sides = [_axes_of(v, var, _made_by(v)) for v, var in zip(values, eqn.invars, strict=True)]
    shared = [_join(sides[0][i], sides[1][j]) for i, j in zip(*batch, strict=True)]
    free = [label for n, side in enumerate(sides) for a, label in enumerate(side) if a not in (*contract[n], *batch[n])]
    return (*shared, *free)


def _conv(eqn: Any, image: AbstractValue, kernel: AbstractValue) -> AxesProvenance:
    spec, _, out = eqn.params["dimension_numbers"]
    places = dict(zip(out, (_axes_of(image, eqn.invars[0])[axis] for axis in spec), strict=True))
    places[out[1]] = _made_by(kernel)
    return tuple(places[axis] for axis in range(len(out)))


def _gather(eqn: Any, table: AbstractValue, index: AbstractValue) -> AxesProvenance:
    if isinstance(table, tuple):
        return _axes_of(None, eqn.outvars[0])
    places, offset = iter(_axes_of(index, eqn.invars[1])), eqn.params["dimension_numbers"].offset_dims
    return tuple(_made_by(table) if axis in offset else next(places) for axis in range(len(eqn.outvars[0].aval.shape)))


def _made_by(value: AbstractValue) -> AxisProvenance:
    """Of an axis that an operand adds to a product."""
    return 0 if value == WEIGHTS else None


RULES: dict[str, Callable[..., AxesProvenance]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}
"""What moves axes about; all else leaves them in place."""
