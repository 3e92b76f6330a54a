"""Labels: what the walk over a jaxpr knows of each value, in place of the value itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.jaxprs import Path, bind
from ggn_jax.layers.uses import Use

VARYING_CASTS = frozenset({"pvary"})  # change only the type of a value, inside `jax.shard_map`


@dataclass(frozen=True)
class ParameterSlice:
    """A value that holds parameter entries, moved but not computed with; loop axes first."""

    entries: IndexMap
    row_gathers: frozenset[Path] = frozenset()  # the paths of the gathers of rows it went through
    factor: float = 1.0  # the value is the entries times this number


@dataclass(frozen=True)
class Derived:
    """A value computed from parameters and constants, but no data."""

    leaves: frozenset[int]
    computed_by: str  # the first primitive that made it more than a slice, for messages
    row_gathers: frozenset[Path] = frozenset()
    pending: tuple[Use, ...] = ()  # products of other parameters with constants, which become layers if they meet data


@dataclass(frozen=True)
class Data:
    """A value that depends on the inputs; of a layer's output, moved or not, also which layer and how it was moved."""

    use: int | None = None
    entries: IndexMap | None = None  # of the layer's output, not of the parameters


@dataclass(eq=False)
class Constant:
    """A constant whose value is available while tracing. It is computed on demand: most are never needed."""

    compute: Callable[[], Any]

    @cached_property
    def value(self) -> Any:
        return self.compute()


@dataclass(frozen=True)
class StoppedSlice:
    """A `ParameterSlice` behind `jax.lax.stop_gradient`: a constant of which it is known what it is a copy of."""

    of: ParameterSlice

    @staticmethod
    def copy(label: "Label") -> "StoppedSlice | None":
        """The label of a value without its derivatives."""
        return StoppedSlice(label) if isinstance(label, ParameterSlice) else None


# None is a constant without a value at trace time: it changes from step to step of a loop, or from batch to batch.
Label = ParameterSlice | Derived | Data | Constant | StoppedSlice | None
FromParameters = ParameterSlice | Derived


def as_constants(values: Sequence[Any]) -> list[Label]:
    """The labels of available values."""
    return [Constant(lambda value=value: value) for value in values]  # type: ignore[misc]


def fold_constants(eqn: Any, labels: list[Label]) -> list[Label]:
    """The labels of the results of an equation of constants."""
    if eqn.primitive.name in VARYING_CASTS:
        return labels
    known = [label for label in labels if isinstance(label, Constant)]
    if len(known) < len(labels):
        return [None] * len(eqn.outvars)
    results = Constant(lambda: bind(eqn, [label.value for label in known]))
    return [Constant(lambda i=i: results.value[i]) for i in range(len(eqn.outvars))]  # type: ignore[misc]


def join(a: Label, b: Label) -> Label:
    """The label of a value that is one or the other, as a loop's carry is: the least that both are."""
    if a == b:
        return a
    if isinstance(a, Data) or isinstance(b, Data):
        return Data()
    if not isinstance(a, FromParameters) and not isinstance(b, FromParameters):
        return None
    leaves: frozenset[int] = frozenset()
    pending: dict[Path, Use] = {}
    for label in (a, b):
        if isinstance(label, Derived):
            leaves |= label.leaves
            pending |= {use.path: use for use in label.pending}
        elif isinstance(label, ParameterSlice):
            return Data()  # other entries in each step: no index map describes it, so it counts as unknown
    return Derived(leaves, "a loop's carry", pending=tuple(pending.values()))


MAX_CONSTANT_SIZE = 2**20  # larger constants are not compared entry by entry


def scalar_factor(eqn: Any, labels: list[Label]) -> float | None:
    """The known number by which an equation multiplies parameters; None if it does anything else.

    Not 0, nor NaN or infinity: the weight's gradient is the effective weight's times the number, and so are its inputs.
    """
    name, numbers = eqn.primitive.name, [label for label in labels if not isinstance(label, ParameterSlice)]
    if name == "neg":
        return -1.0
    shapes = [
        var.aval.shape for var, label in zip(eqn.invars, labels, strict=True) if isinstance(label, ParameterSlice)
    ]
    if shapes != [eqn.outvars[0].aval.shape]:
        return None  # the parameters are broadcast as well
    inverted = name == "div" and isinstance(labels[-1], ParameterSlice)
    if inverted or len(labels) != 2 or not isinstance(numbers[0], Constant):
        return None
    constant = next(var for var, label in zip(eqn.invars, labels, strict=True) if not isinstance(label, ParameterSlice))
    if math.prod(constant.aval.shape) > MAX_CONSTANT_SIZE:
        return None
    try:
        value = np.asarray(numbers[0].value)
    except jax.errors.TracerArrayConversionError:
        return None
    # Kind "V" is bfloat16, and other types of ml_dtypes.
    if value.size == 0 or value.dtype.kind not in "fV" or not (value == value.flat[0]).all():
        return None
    number = float(value.flat[0])
    if not math.isfinite(number) or number == 0:
        return None
    return 1 / number if name == "div" else number
