"""Which blocks a traced model has, which parameter entries they act on, and how they are stacked."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ggn_jax._frozen import Frozen
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.stacks import BlockSpec, Stack, entry_layout, unstack
from ggn_jax.layers import Layer, Plan, Trace, UnassignedParameter, Use, make_plan, trace_model
from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.plan import UncoveredParametersWarning, is_dense
from ggn_jax.layers.uses import ParameterView
from ggn_jax.loss import Loss
from ggn_jax.operators.problem import Problem


@dataclass(frozen=True)
class EqualParts:
    """Parts of one size of an axis, one after the other."""

    start: int
    size: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.size * self.count

    @property
    def parts(self) -> list[slice]:
        """The slice of each part."""
        return [slice(self.start + n * self.size, self.start + (n + 1) * self.size) for n in range(self.count)]


Partition = tuple[EqualParts, ...]
"""How an axis is cut into parts. Equal parts are groups of one block, so programs do not grow with their number."""


@dataclass(frozen=True)
class StackMember:
    """One block: its entries, and a key that is equal for blocks that can be stacked."""

    spec: BlockSpec
    key: Any


class Layout:
    """The blocks that a trace and options give; static, as it is found from shapes alone."""

    def __init__(self, loss: Loss, trace: Trace, options: Options):
        self.options, self.loss, self.trace = options, loss, trace
        self.plan: Plan = make_plan(trace)
        self.sizes = [math.prod(shape) for shape in trace.shapes]
        self.leaves = tuple(parameter.leaf for parameter in self.plan.unassigned if parameter.kind != "unused")
        uncovered = [parameter for parameter in self.plan.unassigned if parameter.kind == "uncovered"]
        if uncovered and options.on_uncovered == "error":
            raise NotImplementedError(_uncovered_message(self.trace, uncovered))
        forward_only = options.fisher_type is FisherType.FORWARD_ONLY
        if forward_only and self.leaves:
            names = ", ".join(self.trace.names[leaf] for leaf in self.leaves)
            raise NotImplementedError(
                f"fisher_type 'forward-only' back-propagates nothing, and has no curvature for {names}, which no layer"
                " owns: choose another fisher type."
            )

    @classmethod
    def of(cls, problem: Problem, options: Options) -> Self:
        trace = trace_model(problem.model_fn, problem.params, problem.inputs, coupled=problem.coupled)
        return cls(problem.loss, trace, options)

    def signature(self) -> Frozen:
        """Equal for layouts that have the same blocks in the same order, so that their factors can be added."""
        return Frozen(tuple((member.spec, member.key) for member in self.members))

    def has_joint_bias(self, layer: Layer) -> bool:
        """Whether the bias is one more input. Not that of an embedding, whose input factor would not be diagonal."""
        kinds = {self.trace.uses[n].kind for n in layer.uses}
        return layer.bias is not None and self.options.bias == "joint" and "embedding" not in kinds

    def has_separate_bias(self, layer: Layer) -> bool:
        """Whether the bias has a block of its own."""
        return layer.bias is not None and not self.has_joint_bias(layer)

    def concatenated_uses(self, layer: Layer) -> list[list[int]]:
        """The groups of a layer's uses that `tied="concatenate"` makes one term, by their indices: all of them."""
        return [list(range(len(layer.uses)))]

    def has_dense_block(self, parameter: UnassignedParameter) -> bool:
        """Whether an unassigned parameter has a dense block, and not a diagonal."""
        options, size, covered = self.options, self.sizes[parameter.leaf], parameter.kind != "uncovered"
        wanted = options.small if covered else options.on_uncovered
        if wanted == "auto" or covered:
            return wanted != "diagonal" and is_dense(parameter.kind, size, sum(self.sizes), options.max_small_size)
        return wanted == "full" and size <= options.max_dense_size

    def warn(self) -> None:
        """Warn about uncovered parameters that have a diagonal by default."""
        parameter = [
            parameter
            for parameter in self.plan.unassigned
            if parameter.kind == "uncovered" and not self.has_dense_block(parameter)
        ]
        if parameter and self.options.on_uncovered == "auto":
            message = (
                "The curvature of these parameters, which have no Kronecker form, is the GGN's exact diagonal:\n  "
                f"{_reasons(self.trace, parameter)}\nPass on_uncovered='diagonal' to take it without this warning, or"
                f" 'full' for dense blocks ('auto' makes those of at most max_small_size ="
                f" {self.options.max_small_size} entries); ggn_jax.report shows all parameters."
            )
            warnings.warn(message, UncoveredParametersWarning, stacklevel=2)

    def roles(self, layer: Layer) -> tuple[tuple[bool, bool], ...]:
        """For each use, whether its input factor counts rows of a table, and whether inputs and outputs are swapped."""
        kinds = [self.trace.uses[n].kind for n in layer.uses]
        return tuple((kind == "embedding", swapped) for kind, swapped in zip(kinds, layer.swapped, strict=True))

    def partitions(self, layer: Layer) -> tuple[Partition, Partition]:
        """Where the outputs and the inputs of a layer are cut into blocks: nowhere, unless a factor is too large.

        A block-diagonal factor on one side makes the layer's block block-diagonal as well: each part of the weight has
        a Kronecker product of its own.
        """
        _, out, inputs = layer.weight.shape
        roles = self.roles(layer)
        # A factor that counts rows of a table is diagonal, so its size is no reason to cut.
        dense_out = any(not (swapped and counted) for counted, swapped in roles)
        dense_in = any(swapped or not counted for counted, swapped in roles)
        return self._partition(out, dense_out, False), self._partition(
            inputs + self.has_joint_bias(layer), dense_in, self.has_joint_bias(layer)
        )

    def _partition(self, size: int, dense: bool, has_joint_bias: bool) -> Partition:
        options = self.options
        if not (dense and options.large == "block" and size > options.max_dense_size):
            return (EqualParts(0, size, 1),)
        parts = -(-size // min(options.block_size, options.max_dense_size))
        # Sizes differ by at most one, so there are at most three runs of equal parts, and few blocks.
        small, more = divmod(size, parts)
        runs = [
            (small + 1, more),
            (small, parts - more - has_joint_bias),
            (small, int(has_joint_bias)),
        ]  # the bias is in the last part
        starts = accumulate((part * count for part, count in runs), initial=0)
        return tuple(EqualParts(start, *run) for start, run in zip(starts, runs, strict=False) if run[1])

    @cached_property
    def members(self) -> tuple[StackMember, ...]:
        """All blocks: each layer's parts and separate bias, parameters without a layer, and what no layer reads."""
        result: list[StackMember] = []
        for layer in self.plan.layers:
            result += self._layer_members(layer)
        starts = np.cumsum([0, *self.sizes]).tolist()
        for parameter in self.plan.unassigned:
            size = self.sizes[parameter.leaf]
            if size:
                view = ParameterView(IndexMap.contiguous((1, 1, size), starts[parameter.leaf]), (1, 1, size))
                made = (
                    "unused"
                    if parameter.kind == "unused"
                    else "full"
                    if self.has_dense_block(parameter)
                    else "diagonal"
                )
                result.append(self._make_member((self.trace.names[parameter.leaf],), parameter.kind, (view,), made))
        return (*result, *self._rest([member.spec for member in result]))

    def _layer_members(self, layer: Layer) -> list[StackMember]:
        kind = "+".join(dict.fromkeys(self.trace.uses[n].kind for n in layer.uses))
        # What a loop makes of its own steps is a stack already. Joined with other blocks, it would be copied.
        alone = layer.uses if any(has_own_steps(self.trace.uses[n]) for n in layer.uses) else ()
        made = self.roles(layer), alone
        outs, ins = self.partitions(layer)
        size_in = layer.weight.shape[2]
        result = []
        for o, i in product(outs, ins):
            rows, last = (o.start, o.stop), i.stop > size_in  # the bias is the last input
            views = [_view_part(layer.weight, rows, (i.start, min(i.stop, size_in)))] if i.start < size_in else []
            if last:
                assert layer.bias is not None
                views.append(_view_part(layer.bias, rows, (0, 1)))
            names = tuple(dict.fromkeys(name for view in views for name in self._names(view)))
            result.append(self._make_member(names, kind, tuple(views), made, (o.count, i.count)))
        if self.has_separate_bias(layer):
            assert layer.bias is not None
            for o in outs:
                view = _view_part(layer.bias, (o.start, o.stop), (0, 1))
                result.append(self._make_member(self._names(view), "bias", (view,), ("bias", made), (o.count, 1)))
        return result

    def _rest(self, specs: Sequence[BlockSpec]) -> list[StackMember]:
        """The entries that no output depends on, of parameters that layers use in part."""
        views = [view for spec in specs for view in spec.views]
        if sum(view.entries.size for view in views) == sum(self.sizes):
            return []
        free = np.ones(sum(self.sizes), bool)  # a byte per parameter, and only here
        for view in views:
            free[view.entries.indices().reshape(-1)] = False
        (numbers,) = np.nonzero(free)
        view = ParameterView(IndexMap.explicit(numbers.reshape(1, 1, -1)), (1, 1, len(numbers)))
        names = (f"unused entries of {', '.join(self._names(view))}",)
        return [self._make_member(names, "unused", (view,), "unused")]

    def _make_member(
        self,
        names: tuple[str, ...],
        kind: str,
        views: tuple[ParameterView, ...],
        made: Any,
        split: tuple[int, int] = (1, 1),
    ) -> StackMember:
        spec = BlockSpec(names, kind, views, split)
        return StackMember(spec, (made, entry_layout(spec, self.sizes)))

    def _names(self, view: ParameterView) -> tuple[str, ...]:
        return tuple(self.trace.names[i] for i in view.entries.owning_leaves(self.sizes))

    @cached_property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        """For each stack, the indices of its members."""
        groups: dict[Any, list[int]] = {}
        for number, member in enumerate(self.members):
            groups.setdefault(member.key, []).append(number)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks that are laid out alike, together."""
        return tuple(Stack(tuple(self.members[n].spec for n in group)) for group in self._groups)

    def stack_all(self, blocks: Sequence[Any]) -> list[Any]:
        """Pytrees of arrays `[G, ...]`, one for each member, concatenated for each stack."""
        return [
            blocks[group[0]]
            if len(group) == 1
            else jax.tree.map(lambda *x: jnp.concatenate(x), *(blocks[n] for n in group))
            for group in self._groups
        ]

    def unstack_all(self, blocks: Sequence[Block]) -> list[Block]:
        """The members of stacks, in the order of `members`."""
        found: dict[int, Block] = {}
        for group, stack, block in zip(self._groups, self.stacks, blocks, strict=True):
            found.update(zip(group, (member for _, member in unstack(stack, block)), strict=True))
        return [found[number] for number in range(len(found))]

    def by_layer(self, members: Sequence[Any]) -> list[list[Any]]:
        """A list with an entry for each member, as a list for each layer; what belongs to no layer is left out."""
        found, result = iter(members), []
        for layer in self.plan.layers:
            outs, ins = self.partitions(layer)
            count = len(outs) * (len(ins) + self.has_separate_bias(layer))
            result.append([next(found) for _ in range(count)])
        return result


def _view_part(view: ParameterView, out: tuple[int, int], inputs: tuple[int, int]) -> ParameterView:
    """The view's rows and columns in these ranges."""
    groups, size_out, size_in = view.shape
    if out == (0, size_out) and inputs == (0, size_in):
        return view
    entries = view.entries.reshape(view.shape)
    split_parts = entries.slice((0, out[0], inputs[0]), (groups, out[1], inputs[1]), (1, 1, 1))
    return ParameterView(split_parts, (groups, out[1] - out[0], inputs[1] - inputs[0]))


def has_own_steps(use: Use) -> bool:
    """Whether a use is in a loop, and each step has a weight of its own."""
    lead = len(use.loops)
    return lead > 0 and use.input_axes.groups[:lead] == tuple(range(lead))


def is_whole(runs: Partition) -> bool:
    """Whether nothing is cut."""
    return sum(run.count for run in runs) == 1


def find_layout(problem: Problem, options: Options) -> Layout:
    """`Layout.of` without computing anything."""
    layout: Layout = eqx.filter_eval_shape(lambda problem: Frozen(Layout.of(problem, options)), problem).thaw()
    return layout


def split_parts(x: Array, runs: Partition, groups: int) -> list[Array]:
    """The parts of an array's last axis; equal parts become groups, along axis `groups`."""
    if is_whole(runs):
        return [x]

    def parts(run: EqualParts) -> Array:
        some = x[..., run.start : run.stop].reshape(*x.shape[:-1], run.count, run.size)
        some = jnp.moveaxis(some, -2, groups + 1)
        return some.reshape(*some.shape[:groups], -1, *some.shape[groups + 2 :])

    return [parts(run) for run in runs]


def merge_parts(parts: Sequence[Array]) -> Array:
    """Arrays `[G, ...]` for each pair of parts, as groups of their block."""
    if len(parts) == 1:
        return parts[0]
    joined = jnp.stack(parts, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def _uncovered_message(trace: Trace, uncovered: list[UnassignedParameter]) -> str:
    return (
        f"These parameters have no Kronecker form:\n  {_reasons(trace, uncovered)}\nPass on_uncovered='auto' or"
        " 'diagonal' (the GGN's diagonal) or 'full' (its dense block) for curvature without one; ggn_jax.report shows"
        " all parameters."
    )


def _reasons(trace: Trace, uncovered: list[UnassignedParameter]) -> str:
    lines = []
    for parameter in uncovered:
        where = f" at {parameter.source}" if parameter.source else ""
        where += f" in {parameter.module}" if parameter.module else ""
        lines.append(f"params{trace.names[parameter.leaf]}: {parameter.why}{where}")
    return "\n  ".join(lines)
