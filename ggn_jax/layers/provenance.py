"""Provenance of axes: which axis of the inputs each position axis of a layer comes from, as far as the trace tells.

For masks: a mask has axes of the inputs, and a layer's positions may be these axes merged, swapped or repeated. This
is a walk of its own, since the one for layers forgets what happens to data.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal

import jax

from ggn_jax.layers.jaxprs import INLINED, REMAT, SCAN, inner_jaxpr, open_jaxpr, run_jaxpr, scan_sizes
from ggn_jax.layers.trace import Trace
from ggn_jax.layers.uses import Axes

AxisProvenance = int | None
"""An axis of the inputs, from 1 on; 0 for the batch axis, or one that a weight made; None where it is unknown.

Of coupled examples, the batch axis is 1.
"""
Provenance = tuple[AxisProvenance, ...]
WEIGHTS: Literal["weights"] = "weights"
AbstractValue = Provenance | Literal["weights"] | None  # what depends on inputs; on parameters only; on neither


def position_provenance(trace: Trace) -> list[tuple[tuple[int, AxisProvenance], ...]]:
    """For each use, the size and the provenance of all axes of its positions."""
    walk = _Walk(trace)
    jaxpr, consts = open_jaxpr(trace.closed)
    data = jaxpr.invars[len(trace.shapes) :]
    first = int(trace.examples > 1)  # the batch axis of coupled examples is one of positions
    values: list[AbstractValue] = [WEIGHTS] * len(trace.shapes)
    values += [
        tuple(range(first, first + len(var.aval.shape))) if batched else None
        for var, batched in zip(data, trace.batched, strict=True)
    ]
    walk.run(jaxpr, [None] * len(consts), values, (), ())
    return [_positions(use.output_axes, walk.found[n]) for n, use in enumerate(trace.uses)]


def _positions(axes: Axes, sources: Provenance) -> tuple[tuple[int, AxisProvenance], ...]:
    if len(sources) < len(axes.shape):  # a convolution's features are split into groups and the rest
        at = axes.groups[-1]
        sources = (*sources[:at], 0, *sources[at:])
    return tuple((axes.shape[axis], sources[axis]) for axis in axes.positions)


class _Walk:
    """One walk over a jaxpr with the provenance of axes in place of values."""

    def __init__(self, trace: Trace):
        self.uses = {use.path: number for number, use in enumerate(trace.uses)}
        self.found: dict[int, Provenance] = {}

    def run(
        self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], path: tuple[int, ...], loops: Provenance
    ) -> list[AbstractValue]:
        def step(eqn: Any, at: tuple[int, ...], values: list[Any]) -> list[AbstractValue]:
            abstract: list[Any] = [value if isinstance(value, tuple | str) else None for value in values]  # no literals
            results = self.step(eqn, at, abstract, loops)
            if at in self.uses:
                self.found[self.uses[at]] = (*loops, *_provenance_of(results[0], eqn.outvars[0]))
            return results

        return run_jaxpr(jaxpr, consts, values, path, step)

    def step(
        self, eqn: Any, path: tuple[int, ...], values: list[AbstractValue], loops: Provenance
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
            return [_provenance_of(None, var) for var in eqn.outvars]
        return [_in_place(eqn, var, values) for var in eqn.outvars]

    def scan(
        self, eqn: Any, path: tuple[int, ...], values: list[AbstractValue], loops: Provenance
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


def _provenance_of(value: AbstractValue, var: Any, others: AxisProvenance = None) -> Provenance:
    """The provenance of a value's axes; `others` for those of a value that depends on no input."""
    return value if isinstance(value, tuple) else (others,) * len(var.aval.shape)


def _join(a: AxisProvenance, b: AxisProvenance) -> AxisProvenance:
    """Of an axis that two values share: an axis of the inputs if one of them has it, and unknown if they have two."""
    if a == b:
        return a
    return None if a and b else a or b or None


def _agree(a: AbstractValue, b: AbstractValue) -> AbstractValue:
    """Of a value that is one or the other."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(x if x == y else None for x, y in zip(a, b, strict=True))
    return next((value for value in (a, b) if isinstance(value, tuple)), a or b)


def _in_place(eqn: Any, var: Any, values: list[AbstractValue]) -> Provenance:
    """Of equations that keep axes in place, such as sums, or take some out; unknown for others."""
    rank, axes = len(var.aval.shape), eqn.params.get("axes", ())
    found = []
    for value in values:
        if isinstance(value, tuple):
            if isinstance(axes, tuple) and len(value) == rank + len(axes):
                value = tuple(source for axis, source in enumerate(value) if axis not in axes)
            found += [value] if len(value) == rank else []
    return reduce(lambda a, b: tuple(map(_join, a, b)), found) if found else _provenance_of(None, var)


def _transpose(eqn: Any, sources: Provenance) -> Provenance:
    return tuple(sources[axis] for axis in eqn.params["permutation"])


def _squeeze(eqn: Any, sources: Provenance) -> Provenance:
    return tuple(source for axis, source in enumerate(sources) if axis not in eqn.params["dimensions"])


def _broadcast(eqn: Any, sources: Provenance) -> Provenance:
    places = dict(zip(eqn.params["broadcast_dimensions"], sources, strict=True))
    return tuple(places.get(axis) for axis in range(len(eqn.outvars[0].aval.shape)))


def _reshape(eqn: Any, sources: Provenance) -> Provenance:
    """The parts of a split axis have its provenance; merged axes have one only if theirs is the same."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    result: list[AxisProvenance] = [None] * len(new)
    ones = [next((axis for axis, size in enumerate(shape) if size != 1), len(shape)) for shape in (old, new)]
    # Axes of length 1 in front (the batch's of one example) are matched one to one; others cannot be told apart.
    if ones[0] == ones[1]:
        result[: ones[0]] = sources[: ones[0]]
    if 0 in old:
        return tuple(result)
    # Both shapes in step: take more axes of the one whose product is behind, until the products agree.
    old_axes = iter([(size, sources[axis]) for axis, size in enumerate(old) if size != 1])
    new_axes = iter([(size, axis) for axis, size in enumerate(new) if size != 1])
    for (size, source), (reached, axis) in zip(old_axes, new_axes, strict=False):
        group = [axis]
        while size != reached:
            if size < reached:
                more, other = next(old_axes)
                size, source = size * more, source if source == other else None
            else:
                more, axis = next(new_axes)
                reached, group = reached * more, [*group, axis]
        for axis in group:
            result[axis] = source
    return tuple(result)


def _dot(eqn: Any, *values: AbstractValue) -> Provenance:
    contract, batch = eqn.params["dimension_numbers"]
    sides = [_provenance_of(v, var, _axis_of_operand(v)) for v, var in zip(values, eqn.invars, strict=True)]
    shared = [_join(sides[0][i], sides[1][j]) for i, j in zip(*batch, strict=True)]
    free = [
        source for n, side in enumerate(sides) for a, source in enumerate(side) if a not in (*contract[n], *batch[n])
    ]
    return (*shared, *free)


def _conv(eqn: Any, image: AbstractValue, kernel: AbstractValue) -> Provenance:
    spec, _, out = eqn.params["dimension_numbers"]
    places = dict(zip(out, (_provenance_of(image, eqn.invars[0])[axis] for axis in spec), strict=True))
    places[out[1]] = _axis_of_operand(kernel)
    return tuple(places[axis] for axis in range(len(out)))


def _gather(eqn: Any, table: AbstractValue, index: AbstractValue) -> Provenance:
    if isinstance(table, tuple):
        return _provenance_of(None, eqn.outvars[0])
    places, offset = iter(_provenance_of(index, eqn.invars[1])), eqn.params["dimension_numbers"].offset_dims
    return tuple(
        _axis_of_operand(table) if axis in offset else next(places) for axis in range(len(eqn.outvars[0].aval.shape))
    )


def _axis_of_operand(value: AbstractValue) -> AxisProvenance:
    """The provenance of an axis that this operand adds to a product."""
    return 0 if value == WEIGHTS else None


RULES: dict[str, Callable[..., Provenance]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}
"""The primitives that move axes; all others leave them in place."""
