"""What is known of a value of a jaxpr, in place of the value itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.jaxprs import bind
from ggn_jax.layers.uses import Use

CASTS = frozenset({"pvary"})  # of types, inside `jax.shard_map`


@dataclass(frozen=True)
class Entries:
    """A value that is parameters moved about; loop axes first."""

    entries: IndexMap
    rows: frozenset[tuple[int, ...]] = frozenset()  # the paths of the gathers it went through
    factor: float = 1.0  # it is these entries times this


@dataclass(frozen=True)
class Derived:
    """A value computed from parameters and no data."""

    leaves: frozenset[int]
    how: str
    rows: frozenset[tuple[int, ...]] = frozenset()
    pending: tuple[Use, ...] = ()  # products of other parameters with constants: layers, once they meet data


@dataclass(frozen=True)
class Data:
    """A value that depends on the inputs; if it is a layer's output, moved about: of which, and how."""

    use: int | None = None
    entries: IndexMap | None = None


@dataclass(eq=False)
class Known:
    """A constant that can be computed while tracing, which is done where something depends on its value."""

    compute: Callable[[], Any]

    @cached_property
    def value(self) -> Any:
        return self.compute()


@dataclass(frozen=True)
class Stopped:
    """Parameters moved about, as a constant."""

    of: Entries

    @staticmethod
    def copy(label: "Value") -> "Stopped | None":
        """The label of a value without its derivatives."""
        return Stopped(label) if isinstance(label, Entries) else None


Value = (
    Entries | Derived | Data | Known | Stopped | None
)  # None: a constant that changes, in a loop or from batch to batch


def known(values: Sequence[Any]) -> list[Value]:
    """The labels of values that are there."""
    return [Known(lambda value=value: value) for value in values]  # type: ignore[misc]


def constants(eqn: Any, labels: list[Value]) -> list[Value]:
    """The labels of an equation of constants."""
    if eqn.primitive.name in CASTS:
        return labels
    known = [label for label in labels if isinstance(label, Known)]
    if len(known) < len(labels):
        return [None] * len(eqn.outvars)
    results = Known(lambda: bind(eqn, [label.value for label in known]))
    return [Known(lambda i=i: results.value[i]) for i in range(len(eqn.outvars))]  # type: ignore[misc]


def join(a: Value, b: Value) -> Value:
    """The label of a value that is one or the other."""
    if a == b:
        return a
    if isinstance(a, Data) or isinstance(b, Data):
        return Data()
    if not isinstance(a, Entries | Derived) and not isinstance(b, Entries | Derived):
        return None
    leaves: frozenset[int] = frozenset()
    pending: dict[tuple[int, ...], Use] = {}
    for label in (a, b):
        if isinstance(label, Derived):
            leaves |= label.leaves
            pending |= {use.path: use for use in label.pending}
        elif isinstance(label, Entries):
            return Data()  # moved about by the loop: whatever it meets there has no fixed entries
    return Derived(leaves, "a loop's carry", pending=tuple(pending.values()))


LARGE = 2**20  # entries of a constant that are not looked at


def scale_of(eqn: Any, labels: list[Value]) -> float | None:
    """The known number with which an equation multiplies parameters; None if it does something else."""
    name, numbers = eqn.primitive.name, [label for label in labels if not isinstance(label, Entries)]
    if name == "neg":
        return -1.0
    shapes = [var.aval.shape for var, label in zip(eqn.invars, labels, strict=True) if isinstance(label, Entries)]
    if shapes != [eqn.outvars[0].aval.shape]:
        return None  # primitives may repeat an axis of length 1
    inverted = name == "div" and isinstance(labels[-1], Entries)
    if inverted or len(labels) != 2 or not isinstance(numbers[0], Known):
        return None
    constant = next(var for var, label in zip(eqn.invars, labels, strict=True) if not isinstance(label, Entries))
    if math.prod(constant.aval.shape) > LARGE:
        return None
    try:
        value = np.asarray(numbers[0].value)
    except jax.errors.TracerArrayConversionError:
        return None
    if value.size == 0 or value.dtype.kind not in "fV" or not (value == value.flat[0]).all():
        return None
    number = float(value.flat[0])
    if not math.isfinite(number) or number == 0:
        return None
    return 1 / number if name == "div" else number
