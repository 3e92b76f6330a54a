"""One walk over a jaxpr: follow each parameter until it first meets data.

An abstract interpretation: every value has a label (`labels`) that says which parameters it holds, and how. Decisions
depend on primitives alone, never on names, so it does not matter how a model is written. What is not understood
(a primitive, a combination) is recorded as uncovered and never guessed, since a wrong layer gives a wrong curvature,
and a missed one only a block without Kronecker form.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import compress
from math import prod
from typing import Any

import jax

from ggn_jax.layers.findings import Findings
from ggn_jax.layers.index_map import MOVE_RULES, IndexMap, concatenate, gather
from ggn_jax.layers.jaxprs import (
    BRANCHES,
    CUSTOM_JVP,
    CUSTOM_VJP,
    INLINED,
    REMAT,
    SCAN,
    Path,
    has_complex,
    inner_jaxpr,
    is_floating,
    is_literal,
    live_equations,
    location_of,
    open_jaxpr,
    scan_sizes,
)
from ggn_jax.layers.labels import (
    Constant,
    Data,
    Derived,
    FromParameters,
    Label,
    ParameterSlice,
    StoppedSlice,
    as_constants,
    fold_constants,
    join,
    scalar_factor,
)
from ggn_jax.layers.ragged import RAGGED
from ggn_jax.layers.uses import LAYER_PRIMITIVES, ElementwiseUse, NotALayerError
from ggn_jax.layers.weights import ADDITIONS, GATHERS, SELECTS, WITHOUT_DERIVATIVE

ELEMENTWISE_KINDS = {"mul": "scale", "add": "shift", "add_any": "shift", "sub": "shift"}
JOINS = {"concatenate": "dimension", "stack": "axis"}
SCALES = frozenset({"mul", "div", "neg"})
INSERTIONS = frozenset({*JOINS, "select_n", "pad", "dynamic_update_slice"})


def analyse(
    closed: Any, shapes: list[tuple[int, ...]], batched: Sequence[bool], commit_early: bool = False
) -> tuple[Findings, Data]:
    """The uses of parameters in a jaxpr of parameters, then inputs; and the label of its first result."""
    jaxpr, consts = open_jaxpr(closed)
    embeddings: frozenset[Path] = frozenset()
    # Constants are folded on the way, and must have values even inside an outer `jax.jit`.
    with jax.ensure_compile_time_eval():
        while True:
            found = Findings(shapes)
            labels: list[Label] = [ParameterSlice(entries) for entries in found.maps]
            labels += [Data() if is_batched else None for is_batched in batched]
            walk = Walk(found, embeddings, commit_early)
            (result,) = walk.run(jaxpr, as_constants(consts), labels, (), (), outputs=1)
            # Rows at known indices may make up a layer's weight (a permuted matrix), or be an embedding (of all
            # positions). Which one it is shows only later: those that are no layer's weight are embeddings next time.
            more = found.row_gathers - found.weight_gathers
            if not more:
                break
            embeddings |= more
    if isinstance(result, FromParameters):
        found.add_uncovered([result], "it is an output of the model without having met data", ("", ""))
    return found, result if isinstance(result, Data) else Data()


class Walk:
    """One walk over a jaxpr with labels in place of values, which adds to `found`.

    `embeddings` are the paths of the gathers at known indices that count as embeddings. With `commit_early`, the
    product of a weight and computed parameters counts as data for all that follows, even where it may be a weight.
    """

    def __init__(self, found: Findings, embeddings: frozenset[Path], commit_early: bool):
        self.found, self.embeddings, self.commit_early = found, embeddings, commit_early

    def run(
        self,
        jaxpr: Any,
        consts: list[Label],
        labels: list[Label],
        path: Path,
        loops: tuple[int, ...],
        outputs: int | None = None,
    ) -> list[Label]:
        """The labels of a jaxpr's results, or of the first few; equations that these do not depend on are skipped."""
        wanted = jaxpr.outvars[:outputs]
        live = live_equations(jaxpr, wanted)
        atoms = [atom for eqn in compress(jaxpr.eqns, live) for atom in eqn.invars] + list(wanted)
        reads = Counter(atom for atom in atoms if not is_literal(atom))
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *labels], strict=True))

        def read(atom: Any) -> Label:
            if is_literal(atom):
                return Constant(lambda: atom.val)
            label = env[atom]
            # What is read twice has two cotangents, which JAX adds up: the output gradient of a bias added to one of
            # the readers is only a part of its layer's. So it no longer counts as the layer's output.
            return Data() if isinstance(label, Data) and reads[atom] > 1 else label

        for index, eqn in compress(enumerate(jaxpr.eqns), live):
            results = self.step(eqn, (*path, index), [read(atom) for atom in eqn.invars], loops)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in wanted]

    def step(self, eqn: Any, path: Path, labels: list[Label], loops: tuple[int, ...]) -> list[Label]:
        """The labels of an equation's results."""
        name, count, num_loops = eqn.primitive.name, len(eqn.outvars), len(loops)
        has_data = any(isinstance(label, Data) for label in labels)
        has_params = any(isinstance(label, FromParameters) for label in labels)
        # The order matters: what has no derivative comes first, then calls, whose inside decides; a primitive is
        # examined itself only after these, since any call with parameters and data looks like one where they meet.
        if len(labels) == 1 and isinstance(labels[0], StoppedSlice) and name in MOVE_RULES:
            return list(map(StoppedSlice.copy, self.move(name, eqn, labels[0].of, num_loops)))
        if not has_params and not has_data:
            return fold_constants(eqn, labels)
        if name in WITHOUT_DERIVATIVE:
            return [Data() if isinstance(label, Data) else StoppedSlice.copy(label) for label in labels]
        self.found.has_unmappable |= name in RAGGED
        # Calls without parameters are walked only for a layer's output, whose bias may be added inside (as by `jit`).
        followed = has_params or any(isinstance(label, Data) and label.use is not None for label in labels)
        if name in CUSTOM_JVP | CUSTOM_VJP and has_data:
            # The function inside says nothing about its gradients, which its rule makes. `distribute` expands rules
            # whose gradients are products; what is still a call has none.
            self.found.has_computed_weight |= has_params
            why = f"it meets data in {name}, whose derivative rule has no product of an input with it"
            self.found.add_uncovered(labels, why, location_of(eqn))
            return [Data()] * count
        if name in CUSTOM_JVP and has_params:
            return [self.derive(eqn, path, labels, loops)] * count
        if followed and name in INLINED | REMAT:
            return self.call(eqn, path, labels, loops)
        if has_params and name in SCAN:
            return self.scan(eqn, path, labels, loops)
        if has_params and has_data and name in BRANCHES and not isinstance(labels[0], Data):
            return self.branches(eqn, path, labels, loops)
        if len(labels) == 1 and name in MOVE_RULES and is_floating(eqn.outvars[0]):
            return self.move(name, eqn, labels[0], num_loops)
        if has_data and not has_params:
            return [Data()] * count
        if not has_data and path not in self.embeddings:
            result = self.gather(eqn, path, labels, loops) if name in GATHERS else self.derive(eqn, path, labels, loops)
            return [result] * count
        return self.meet_data(eqn, path, labels, loops)

    def call(self, eqn: Any, path: Path, labels: list[Label], loops: tuple[int, ...]) -> list[Label]:
        """A call of another jaxpr, which is walked as if it were inlined."""
        jaxpr, consts = open_jaxpr(inner_jaxpr(eqn))
        return self.run(jaxpr, as_constants(consts), labels, path, loops)

    def branches(self, eqn: Any, path: Path, labels: list[Label], loops: tuple[int, ...]) -> list[Label]:
        """One of several calls, chosen by something that is the same for all examples: a walk over each.

        Each branch's layers are layers: `capture` gives those of a branch that is not taken zeros.
        """
        before, where = self.found.checkpoint(), location_of(eqn)
        # Outside, a result may be one layer's output or another's. A bias inside of one branch is not added to the
        # layer whenever that is used, so none is attached to layers before the branches.
        inputs = [Data() if isinstance(label, Data) else label for label in labels[1:]]
        outcomes = [
            self.run(jaxpr, as_constants(consts), list(inputs), (*path, number), loops)
            for number, (jaxpr, consts) in enumerate(map(open_jaxpr, eqn.params["branches"]))
        ]
        if any(use.input_axes.groups[: len(loops)] != tuple(range(len(loops))) for use in self.found.uses[before[0] :]):
            # Where steps of a loop share a weight, they are sharing positions, which are counted. Steps that do not
            # take this branch are none of them, but how many there are is unknown here.
            self.found.rollback(before)
            self.found.add_uncovered(
                labels, f"only some steps of a loop take the branch of {eqn.primitive.name} it is in", where
            )
            return [Data()] * len(eqn.outvars)

        def leave(labels: Sequence[Label]) -> Label:
            if any(isinstance(label, Data) for label in labels):
                self.found.add_inserted(labels, where)
                return Data()
            if all(label == labels[0] for label in labels):
                return labels[0]
            return self.derive(eqn, path, list(labels), loops) if any(map(self.found.leaves_of, labels)) else None

        return [leave(labels) for labels in zip(*outcomes, strict=True)]

    def move(self, name: str, eqn: Any, label: Label, num_loops: int) -> list[Label]:
        """The labels of the results of an equation that moves the entries of its one input."""
        if isinstance(label, Derived):
            return [label] * len(eqn.outvars)
        entries = label.entries if isinstance(label, ParameterSlice | Data) else None
        if entries is None:
            return [label] * len(eqn.outvars)
        moved = MOVE_RULES[name](entries, num_loops, eqn.params)
        maps = moved if isinstance(moved, list) else [moved]
        if isinstance(label, ParameterSlice):
            return [replace(label, entries=m) for m in maps]
        # A layer's output is followed only while strides describe it: a table with a number for each of its entries
        # would be large. A part of it is not followed either, since a bias is added to all of an output.
        whole = len(maps) == 1 and maps[0].table is None and maps[0].size == entries.size
        return [replace(label, entries=maps[0])] if whole else [Data()] * len(maps)  # type: ignore[type-var]

    def gather(self, eqn: Any, path: Path, labels: list[Label], loops: tuple[int, ...]) -> Label:
        """Parameters read at indices that do not depend on data, such as a permutation, or all positions."""
        label, indices = labels
        if not isinstance(label, ParameterSlice):
            return self.derive(eqn, path, labels, loops)
        row_gathers = label.row_gathers
        try:
            if LAYER_PRIMITIVES[eqn.primitive.name](eqn, 0, label.entries, loops)["weight"].shape[1] > 1:
                row_gathers |= {path}
                self.found.row_gathers.add(path)
        except NotALayerError:
            pass
        if isinstance(indices, Constant):
            entries = gather(label.entries, len(loops), eqn.params, indices.value)
            if entries is not None:
                return replace(label, entries=entries, row_gathers=row_gathers)
        why = f"{eqn.primitive.name} at indices known only when the program runs"
        return Derived(self.found.leaves_of(label), why, row_gathers)

    def derive(self, eqn: Any, path: Path, labels: list[Label], loops: tuple[int, ...]) -> Label:
        """Parameters combined with each other or with constants."""
        if not any(is_floating(var) for var in eqn.outvars):
            return None  # comparisons and the like have no derivative
        entries = [label for label in labels if isinstance(label, ParameterSlice)]
        name, num_loops = eqn.primitive.name, len(loops)
        # Gathered rows that are multiplied with a weight (all positions' embeddings, projected) are its inputs, not a
        # part of a weight: they stay candidates for an embedding.
        params = [label for label in labels if isinstance(label, FromParameters)]
        row_gathers = (
            frozenset() if name in LAYER_PRIMITIVES else frozenset().union(*(label.row_gathers for label in params))
        )
        factors = {label.factor for label in entries}
        if name in JOINS and len(entries) == len(labels) and len(factors) == 1:
            axis, maps = eqn.params[JOINS[name]] + num_loops, [label.entries for label in entries]
            if name == "stack":
                maps = [m.reshape((*m.shape[:axis], 1, *m.shape[axis:])) for m in maps]
            return ParameterSlice(concatenate(maps, axis), row_gathers, *factors)
        if name in SCALES and len(params) == len(entries) == 1:
            factor = scalar_factor(eqn, labels)
            if factor:
                return replace(entries[0], factor=entries[0].factor * factor)
        computed = [label for label in labels if isinstance(label, Derived)]
        pending = {use.path: use for label in computed for use in label.pending}
        if name in LAYER_PRIMITIVES and not has_complex(eqn) and len(entries) <= 1 + (not self.commit_early):
            # A product with a constant, or with another parameter, is pending: if data enter it later other than as a
            # weight, it is a layer with constant inputs. Of two parameters, the larger one is taken as the weight.
            operands = [i for i, label in enumerate(labels) if isinstance(label, ParameterSlice)]
            for i in sorted(operands, key=lambda i: -prod(eqn.invars[i].aval.shape)):
                with suppress(NotALayerError):
                    pending[path] = self.found.make_use(eqn, path, labels, i, loops)
                    params = [label for label in labels[:i] + labels[i + 1 :] if isinstance(label, FromParameters)]
                    break
        bare = [label.leaves if isinstance(label, Derived) else self.found.leaves_of(label) for label in params]
        computed_by = next((label.computed_by for label in computed), f"{name} ({location_of(eqn)[0]})")
        return Derived(frozenset().union(*bare), computed_by, row_gathers, tuple(pending.values()))

    def meet_data(self, eqn: Any, path: Path, labels: list[Label], loops: tuple[int, ...]) -> list[Label]:
        """A parameter meets data: a layer, a scale or shift, or something without a Kronecker form."""
        name, where = eqn.primitive.name, location_of(eqn)
        params = [i for i, label in enumerate(labels) if isinstance(label, FromParameters)]
        label = labels[params[0]]
        if name in LAYER_PRIMITIVES and isinstance(label, Derived):
            self.found.weight_gathers |= label.row_gathers
        # First, what to make of pending products. In a layer's equation their result is a weight, so the products are
        # no layers: all their parameters are in that weight. Elsewhere, and with `commit_early`, they are layers, and
        # their result is data unless other parameters went into it.
        for i in params:
            label = labels[i]
            if isinstance(label, Derived) and name in LAYER_PRIMITIVES:
                self.found.has_computed_weight = True
            if isinstance(label, Derived) and label.pending:
                if name in LAYER_PRIMITIVES and not (self.commit_early and label.leaves):
                    labels[i] = replace(label, leaves=self.found.leaves_of(label), pending=())
                else:
                    self.found.commit(label)
                    labels[i] = replace(label, pending=()) if label.leaves else Data()
        params = [i for i in params if not isinstance(labels[i], Data)]
        if not params:
            return [Data()] * len(eqn.outvars)
        label = labels[params[0]]
        if name in LAYER_PRIMITIVES and has_complex(eqn):
            # The gradient of a real weight is the real part of that of a complex one: two products instead of one.
            # `distribute` takes them apart.
            self.found.has_computed_weight = True
            self.found.add_uncovered([labels[i] for i in params], f"it meets complex data in {name}", where)
            return [Data()] * len(eqn.outvars)
        if len(params) == 1 and len(labels) == 2 and isinstance(label, ParameterSlice) and name in LAYER_PRIMITIVES:
            try:
                use = self.found.make_use(eqn, path, labels, params[0], loops)
            except NotALayerError as error:
                self.found.add_uncovered([label], str(error), where)
                return [Data()] * len(eqn.outvars)
            self.found.weight_gathers |= label.row_gathers
            self.found.uses.append(use)
            return [Data(len(self.found.uses) - 1, IndexMap.contiguous(use.output_shape))]
        if len(params) == 1 and name in ELEMENTWISE_KINDS:
            owner = self.found.attach_bias(label, labels[1 - params[0]]) if name in ADDITIONS else None
            self.found.elementwise.append(
                ElementwiseUse(ELEMENTWISE_KINDS[name], self.found.leaves_of(label), *where, bias_of=owner)
            )
            # With its bias, it still counts as the layer's output: both have the cotangent of the sum.
            return [Data() if owner is None else labels[1 - params[0]]]
        if name in SELECTS and any(isinstance(other, StoppedSlice) and other.of == label for other in labels):
            self.found.has_computed_weight = True
            self.found.add_uncovered([label], "data choose whether it has a derivative", where)
            return [Data()]
        if name in INSERTIONS:
            self.found.add_inserted(labels, where)
            return [Data()] * len(eqn.outvars)
        why = f"it meets data in {name}"
        if len(params) > 1 and name in LAYER_PRIMITIVES | ELEMENTWISE_KINDS:
            why += " together with another parameter"
        self.found.add_uncovered([labels[i] for i in params], why, where)
        return [Data()] * len(eqn.outvars)

    def scan(self, eqn: Any, path: Path, labels: list[Label], loops: tuple[int, ...]) -> list[Label]:
        """A loop of known length: walk over its body, with a loop axis in front of all entries.

        What a step carries to the next is unknown before the body was walked. So the walk is repeated with the join of
        what comes in and what comes out, until that stays the same: labels only go up (towards `Data`), so it ends.
        """
        params = eqn.params
        (num_consts, num_carry), length = scan_sizes(eqn), params["length"]
        jaxpr, consts = open_jaxpr(params["jaxpr"])
        num_loops, where = len(loops), location_of(eqn)

        def enter(label: Label, changes: bool, sliced: bool) -> Label:
            if isinstance(label, ParameterSlice):
                if sliced:  # its first axis after the loops' is the new loop's axis already
                    return label
                shape = (*loops, length, *label.entries.shape[num_loops:])
                axes = (*range(num_loops), *range(num_loops + 1, len(shape)))
                return replace(label, entries=label.entries.broadcast_in_dim(shape, axes))
            if isinstance(label, Constant) and changes:
                return None
            # An output of a layer outside: added to in each step, so no bias is attached to it inside.
            return Data() if isinstance(label, Data) else label

        inner = [enter(label, i >= num_consts, i >= num_consts + num_carry) for i, label in enumerate(labels)]
        carried = slice(num_consts, num_consts + num_carry)
        checkpoint = self.found.checkpoint()
        while True:
            results = self.run(jaxpr, as_constants(consts), list(inner), path, (*loops, length))
            joined = [join(a, b) for a, b in zip(inner[carried], results[:num_carry], strict=True)]
            if joined == inner[carried]:
                break
            inner[carried] = joined
            self.found.rollback(checkpoint)
        for before, after in zip(labels[carried], inner[carried], strict=True):
            if isinstance(after, Data) and isinstance(before, FromParameters):
                self.found.add_inserted([before], where)  # an initial state, to which data are added

        for after, result in zip(inner[carried], results[:num_carry], strict=True):
            if isinstance(after, Data) and isinstance(result, FromParameters):
                self.found.add_uncovered([result], "it is the value of a loop's carry", where)

        def leave(label: Label, carry: bool, before: Label) -> Label:
            if isinstance(label, ParameterSlice):
                if carry:  # passed through as it came
                    return before
                return Derived(self.found.leaves_of(label), f"the results of a loop ({where[0]})")
            return Data() if isinstance(label, Data) else None if isinstance(label, Constant | StoppedSlice) else label

        outer = labels[carried] + [None] * (len(results) - num_carry)
        final = [*joined, *results[num_carry:]]
        return [leave(label, i < num_carry, outer[i]) for i, label in enumerate(final)]
