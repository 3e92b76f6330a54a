"""What the walk over a jaxpr has found: the uses of parameters, with and without a Kronecker form."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.jaxprs import Location, Path, location_of
from ggn_jax.layers.labels import Data, Derived, Label, ParameterSlice
from ggn_jax.layers.uses import LAYER_PRIMITIVES, ElementwiseUse, NotALayerError, UncoveredUse, Use, find_bias


class Findings:
    """The uses of parameters of these shapes, in the order of the equations."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self.sizes = [math.prod(shape) for shape in shapes]
        self.maps = [IndexMap.contiguous(shape, sum(self.sizes[:i])) for i, shape in enumerate(shapes)]
        self.uses: list[Use] = []
        self.elementwise: list[ElementwiseUse] = []
        self.uncovered: list[UncoveredUse] = []
        self.has_computed_weight = False  # whether a computed weight met data in a layer's equation
        self.has_unmappable = False  # whether JAX cannot map an equation over examples
        self.row_gathers: set[Path] = set()  # gathers of rows at known indices that do not count as embeddings
        self.weight_gathers: set[Path] = set()  # of those, the ones that make up the weight of a layer

    def checkpoint(self) -> tuple[int, int, int]:
        """A state to return to with `rollback`."""
        return len(self.uses), len(self.elementwise), len(self.uncovered)

    def rollback(self, checkpoint: tuple[int, int, int]) -> None:
        """Forget the uses found since: a loop's body is walked again, or a branch cannot be a layer after all."""
        for uses, count in zip((self.uses, self.elementwise, self.uncovered), checkpoint, strict=True):
            del uses[count:]  # type: ignore[attr-defined]

    def uncovered_leaves(self) -> frozenset[int]:
        """The indices of the parameters with a use that has no Kronecker form."""
        return frozenset[int]().union(*(use.leaves for use in self.uncovered))

    def leaves_of(self, label: Label) -> frozenset[int]:
        """The indices of the parameters that a value depends on."""
        if isinstance(label, Derived):
            return label.leaves.union(*(use.weight.entries.owning_leaves(self.sizes) for use in label.pending))
        return frozenset(label.entries.owning_leaves(self.sizes) if isinstance(label, ParameterSlice) else ())

    def add_uncovered(self, labels: Sequence[Label], why: str, location: Location) -> None:
        """Record that these values meet data in a way that has no Kronecker form."""
        for label in labels:
            if isinstance(label, Derived):
                self.commit(label)
                if label.leaves:
                    reason = f"it goes through {label.computed_by} first, then {why}"
                    self.uncovered.append(UncoveredUse(label.leaves, reason, *location))
            elif isinstance(label, ParameterSlice):
                self.uncovered.append(UncoveredUse(self.leaves_of(label), why, *location))

    def commit(self, label: Label) -> None:
        """Make the pending products of a value layers, whatever becomes of their results.

        Their output gradients come from automatic differentiation, so nothing after them needs to be understood.
        """
        pending = label.pending if isinstance(label, Derived) else ()
        paths = {use.path for use in self.uses} if pending else set()
        self.uses += [use for use in pending if use.path not in paths]

    def make_use(self, eqn: Any, path: Path, labels: list[Label], operand: int, loops: tuple[int, ...]) -> Use:
        """The layer whose weight is this operand; raises NotALayerError if there is no such layer."""
        label = labels[operand]
        assert isinstance(label, ParameterSlice)
        parts = LAYER_PRIMITIVES[eqn.primitive.name](eqn, operand, label.entries, loops)
        if parts["kind"] == "embedding" and label.factor != 1:
            # The factor of other layers goes to their inputs, which are row numbers here.
            raise NotALayerError("its rows are scaled before they are read")
        rest = {"bias": None, "patches": None, "table_axes": (), "fills": False, "loops": loops, "path": path, **parts}
        source, module = location_of(eqn)
        return Use(
            **rest,
            output_shape=(*loops, *eqn.outvars[0].aval.shape),
            output_dtype=eqn.outvars[0].aval.dtype,
            constant=not isinstance(labels[parts["operand"]], Data),
            factor=label.factor,
            source=source,
            module=module,
        )

    def add_inserted(self, labels: Sequence[Label], location: Location) -> None:
        """Record parameters that are put beside data, or in place of some: a shift, as if added to zeros there."""
        for label in labels:
            self.commit(label)
            leaves = label.leaves if isinstance(label, Derived) else self.leaves_of(label)
            self.elementwise += [ElementwiseUse("shift", leaves, *location)] if leaves else []

    def attach_bias(self, label: Label, other: Label) -> int | None:
        """Make `label`, which is added to `other`, the bias of the layer whose output that is; the layer's number.

        None if `other` is not a layer's output, or `label` is not one number for each output feature.
        """
        if not isinstance(label, ParameterSlice) or label.factor != 1 or not isinstance(other, Data):
            return None
        if other.use is None or other.entries is None:
            return None
        use, added, shape = self.uses[other.use], label.entries, other.entries.shape
        if len(added.shape) == len(shape):  # primitives broadcast axes of length 1 themselves
            added = added.broadcast_in_dim(shape, tuple(range(len(shape))))
        bias = find_bias(use, other.entries, added) if added.shape == shape and use.bias is None else None
        if bias is None:
            return None
        self.uses[other.use] = replace(use, bias=bias)
        return other.use
