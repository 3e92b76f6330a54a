"""One walk over a jaxpr: follow each parameter until it first meets data."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import compress
from typing import Any

import jax

from ggn_jax.layers.index_map import MOVES, IndexMap, concatenate, gather
from ggn_jax.layers.jaxprs import (
    BRANCHES,
    CUSTOM_JVP,
    CUSTOM_VJP,
    INLINED,
    REMAT,
    SCAN,
    has_complex,
    inner_jaxpr,
    is_floating,
    is_literal,
    live_equations,
    module_of,
    open_jaxpr,
    scan_sizes,
    source_of,
)
from ggn_jax.layers.labels import Data, Derived, Entries, Known, Stopped, Value, constants, join, known, scale_of
from ggn_jax.layers.ragged import RAGGED
from ggn_jax.layers.uses import LAYERS, Blocked, NotALayerError, SmallUse, Use, attach_bias
from ggn_jax.layers.weights import ADDITIONS, GATHERS, SELECTS, WITHOUT_DERIVATIVE

ELEMENTWISE = {"mul": "scale", "add": "shift", "add_any": "shift", "sub": "shift"}
JOINS = {"concatenate": "dimension", "stack": "axis"}
SCALES = frozenset({"mul", "div", "neg"})
PLACES = frozenset({*JOINS, "select_n", "pad", "dynamic_update_slice"})


def analyse(
    closed: Any, shapes: list[tuple[int, ...]], batched: Sequence[bool], commits: bool = False
) -> tuple["Analysis", Data]:
    """What there is in a jaxpr of parameters, then inputs; and the label of its first result."""
    jaxpr, consts = open_jaxpr(closed)
    embeddings: frozenset[tuple[int, ...]] = frozenset()
    with jax.ensure_compile_time_eval():
        while True:
            analysis = Analysis(shapes, embeddings, commits)
            labels: list[Value] = [Entries(entries) for entries in analysis.maps]
            labels += [Data() if is_batched else None for is_batched in batched]
            (result,) = analysis.run(jaxpr, known(consts), labels, (), (), outputs=1)
            # Rows at known places may make up a layer's weight. If they do not, they are an embedding as well.
            more = analysis.rows - analysis.weights
            if not more:
                break
            embeddings |= more
    if isinstance(result, Entries | Derived):
        analysis.block([result], "it is an output of the model without having met data", "", "")
    return analysis, result if isinstance(result, Data) else Data()


class Analysis:
    """One walk over a jaxpr with labels in place of values.

    `embeddings` are the paths of gathers at known places that count as embeddings; `commits` is whether what weights
    make of computed parameters is data to whatever it meets, also where it may be the weight of a layer.
    """

    def __init__(self, shapes: list[tuple[int, ...]], embeddings: frozenset[tuple[int, ...]], commits: bool):
        self.sizes = [math.prod(shape) for shape in shapes]
        self.maps = [IndexMap.contiguous(shape, sum(self.sizes[:i])) for i, shape in enumerate(shapes)]
        self.uses: list[Use] = []
        self.small: list[SmallUse] = []
        self.blocked: list[Blocked] = []
        self.computed = False  # whether a computed weight met data in a layer's equation
        self.unmapped = False  # whether JAX cannot map an equation over examples
        self.embeddings, self.commits = embeddings, commits
        self.rows: set[tuple[int, ...]] = set()  # the paths of the other gathers of rows at known places
        self.weights: set[tuple[int, ...]] = set()  # of those, the ones that make up the weight of a layer

    def uncovered(self) -> frozenset[int]:
        """The numbers of the parameters with a use that has no Kronecker form."""
        return frozenset[int]().union(*(blocked.leaves for blocked in self.blocked))

    def leaves_of(self, label: Value) -> frozenset[int]:
        """The numbers of the parameters that a value holds."""
        if isinstance(label, Derived):
            return label.leaves.union(*(use.weight.entries.owners(self.sizes) for use in label.pending))
        return frozenset(label.entries.owners(self.sizes) if isinstance(label, Entries) else ())

    def block(self, labels: list[Value], why: str, source: str, module: str) -> None:
        for label in labels:
            if isinstance(label, Derived):
                self.commit(label)
                if label.leaves:
                    why = f"it goes through {label.how} first, then {why}"
                    self.blocked.append(Blocked(label.leaves, why, source, module))
            elif isinstance(label, Entries):
                self.blocked.append(Blocked(self.leaves_of(label), why, source, module))

    def commit(self, label: Value) -> None:
        """Make layers of products with constants: what becomes of their results is for automatic differentiation."""
        pending = label.pending if isinstance(label, Derived) else ()
        paths = {use.path for use in self.uses} if pending else set()
        self.uses += [use for use in pending if use.path not in paths]

    def layer(self, eqn: Any, path: tuple[int, ...], labels: list[Value], operand: int, loops: tuple[int, ...]) -> Use:
        """The layer whose weight is this operand; raises NotALayerError if it is none."""
        label = labels[operand]
        assert isinstance(label, Entries)
        parts = LAYERS[eqn.primitive.name](eqn, operand, label.entries, loops)
        if parts["kind"] == "embedding" and label.factor != 1:
            raise NotALayerError("its rows are scaled before they are read")
        rest = {"bias": None, "patches": None, "lookup": (), "fills": False, "loops": loops, "path": path, **parts}
        shape, dtype = (*loops, *eqn.outvars[0].aval.shape), eqn.outvars[0].aval.dtype
        rest |= {"constant": not isinstance(labels[parts["operand"]], Data)}
        rest |= {"factor": label.factor, "source": source_of(eqn), "module": module_of(eqn)}
        return Use(**rest, output_shape=shape, output_dtype=dtype)

    def run(
        self,
        jaxpr: Any,
        consts: list[Value],
        labels: list[Value],
        path: tuple[int, ...],
        loops: tuple[int, ...],
        outputs: int | None = None,
    ) -> list[Value]:
        """The labels of a jaxpr's results, or of the first few; what these do not depend on is not looked at."""
        wanted = jaxpr.outvars[:outputs]
        live = live_equations(jaxpr, wanted)
        atoms = [atom for eqn in compress(jaxpr.eqns, live) for atom in eqn.invars] + list(wanted)
        reads = Counter(atom for atom in atoms if not is_literal(atom))
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *labels], strict=True))

        def read(atom: Any) -> Value:
            if is_literal(atom):
                return Known(lambda: atom.val)
            label = env[atom]
            # What is read twice has two gradients: a bias added to one of the copies sees only its own.
            return Data() if isinstance(label, Data) and reads[atom] > 1 else label

        for index, eqn in compress(enumerate(jaxpr.eqns), live):
            results = self.step(eqn, (*path, index), [read(atom) for atom in eqn.invars], loops)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in wanted]

    def step(self, eqn: Any, path: tuple[int, ...], labels: list[Value], loops: tuple[int, ...]) -> list[Value]:
        """The labels of an equation's results."""
        name, count, lead = eqn.primitive.name, len(eqn.outvars), len(loops)
        has_data = any(isinstance(label, Data) for label in labels)
        has_params = any(isinstance(label, Entries | Derived) for label in labels)
        if len(labels) == 1 and isinstance(labels[0], Stopped) and name in MOVES:
            return list(map(Stopped.copy, self.move(name, eqn, labels[0].of, lead)))
        if not has_params and not has_data:
            return constants(eqn, labels)
        if name in WITHOUT_DERIVATIVE:
            return [Data() if isinstance(label, Data) else Stopped.copy(label) for label in labels]
        self.unmapped |= name in RAGGED
        followed = has_params or any(isinstance(label, Data) and label.use is not None for label in labels)
        if name in CUSTOM_JVP | CUSTOM_VJP and has_data:
            # The function inside says nothing of it; products in the rule are layers, once they are in the open.
            self.computed |= has_params
            why = f"it meets data in {name}, whose derivative rule has no product of an input with it"
            self.block(labels, why, source_of(eqn), module_of(eqn))
            return [Data()] * count
        if name in CUSTOM_JVP and has_params:
            return [self.derive(eqn, path, labels, loops)] * count
        if followed and name in INLINED | REMAT:
            return self.call(eqn, path, labels, loops)
        if has_params and name in SCAN:
            return self.scan(eqn, path, labels, loops)
        if has_params and has_data and name in BRANCHES and not isinstance(labels[0], Data):
            return self.branches(eqn, path, labels, loops)
        if len(labels) == 1 and name in MOVES and is_floating(eqn.outvars[0]):
            return self.move(name, eqn, labels[0], lead)
        if has_data and not has_params:
            return [Data()] * count
        if not has_data and path not in self.embeddings:
            result = self.gather(eqn, path, labels, loops) if name in GATHERS else self.derive(eqn, path, labels, loops)
            return [result] * count
        return self.meet(eqn, path, labels, loops)

    def call(self, eqn: Any, path: tuple[int, ...], labels: list[Value], loops: tuple[int, ...]) -> list[Value]:
        """A call of another jaxpr, which is walked in place."""
        jaxpr, consts = open_jaxpr(inner_jaxpr(eqn))
        return self.run(jaxpr, known(consts), labels, path, loops)

    def branches(self, eqn: Any, path: tuple[int, ...], labels: list[Value], loops: tuple[int, ...]) -> list[Value]:
        """One of several calls, the same for all examples: a walk over each."""
        saved, where = (len(self.uses), len(self.small), len(self.blocked)), (source_of(eqn), module_of(eqn))
        # A layer's output may be another one's in each branch: no bias is added to all of them.
        inputs = [Data() if isinstance(label, Data) else label for label in labels[1:]]
        ways = [
            self.run(jaxpr, known(consts), list(inputs), (*path, number), loops)
            for number, (jaxpr, consts) in enumerate(map(open_jaxpr, eqn.params["branches"]))
        ]
        if any(use.input_axes.groups[: len(loops)] != tuple(range(len(loops))) for use in self.uses[saved[0] :]):
            # Steps are positions, some of which do not occur.
            del self.uses[saved[0] :], self.small[saved[1] :], self.blocked[saved[2] :]
            self.block(labels, f"only some steps of a loop take the branch of {eqn.primitive.name} it is in", *where)
            return [Data()] * len(eqn.outvars)

        def leave(way: Sequence[Value]) -> Value:
            if any(isinstance(label, Data) for label in way):
                self.put(way, where)
                return Data()
            if all(label == way[0] for label in way):
                return way[0]
            return self.derive(eqn, path, list(way), loops) if any(map(self.leaves_of, way)) else None

        return [leave(way) for way in zip(*ways, strict=True)]

    def move(self, name: str, eqn: Any, label: Value, lead: int) -> list[Value]:
        if isinstance(label, Derived):
            return [label] * len(eqn.outvars)
        entries = label.entries if isinstance(label, Entries | Data) else None
        if entries is None:
            return [label] * len(eqn.outvars)
        moved = MOVES[name](entries, lead, eqn.params)
        maps = moved if isinstance(moved, list) else [moved]
        if isinstance(label, Entries):
            return [replace(label, entries=m) for m in maps]
        # A table for every output entry would be large, and a part of an output is none of the forms a bias has.
        whole = len(maps) == 1 and maps[0].table is None and maps[0].size == entries.size
        return [replace(label, entries=maps[0])] if whole else [Data()] * len(maps)  # type: ignore[type-var]

    def gather(self, eqn: Any, path: tuple[int, ...], labels: list[Value], loops: tuple[int, ...]) -> Value:
        """Parameters read at places that do not depend on data, such as a permutation, or all positions."""
        label, places = labels
        if not isinstance(label, Entries):
            return self.derive(eqn, path, labels, loops)
        rows = label.rows
        try:
            if LAYERS[eqn.primitive.name](eqn, 0, label.entries, loops)["weight"].shape[1] > 1:
                rows |= {path}
                self.rows.add(path)
        except NotALayerError:
            pass
        entries = gather(label.entries, len(loops), eqn.params, places.value) if isinstance(places, Known) else None
        if entries is not None:
            return replace(label, entries=entries, rows=rows)
        return Derived(self.leaves_of(label), f"{eqn.primitive.name} at indices known only when the program runs", rows)

    def derive(self, eqn: Any, path: tuple[int, ...], labels: list[Value], loops: tuple[int, ...]) -> Value:
        """Parameters combined with each other or with constants."""
        if not any(is_floating(var) for var in eqn.outvars):
            return None
        entries = [label for label in labels if isinstance(label, Entries)]
        name, lead = eqn.primitive.name, len(loops)
        # Multiplied with a weight, they are what meets it.
        params = [label for label in labels if isinstance(label, Entries | Derived)]
        rows = frozenset() if name in LAYERS else frozenset().union(*(label.rows for label in params))
        factors = {label.factor for label in entries}
        if name in JOINS and len(entries) == len(labels) and len(factors) == 1:
            axis, maps = eqn.params[JOINS[name]] + lead, [label.entries for label in entries]
            if name == "stack":
                maps = [m.reshape((*m.shape[:axis], 1, *m.shape[axis:])) for m in maps]
            return Entries(concatenate(maps, axis), rows, *factors)
        if name in SCALES and len(params) == len(entries) == 1:
            factor = scale_of(eqn, labels)
            if factor:
                return replace(entries[0], factor=entries[0].factor * factor)
        computed = [label for label in labels if isinstance(label, Derived)]
        pending = {use.path: use for label in computed for use in label.pending}
        if name in LAYERS and not has_complex(eqn) and len(entries) <= 1 + (not self.commits):
            # Of two parameters, the smaller one is what meets the other.
            operands = [i for i, label in enumerate(labels) if isinstance(label, Entries)]
            for i in sorted(operands, key=lambda i: -math.prod(eqn.invars[i].aval.shape)):
                with suppress(NotALayerError):
                    pending[path] = self.layer(eqn, path, labels, i, loops)
                    params = [label for label in labels[:i] + labels[i + 1 :] if isinstance(label, Entries | Derived)]
                    break
        bare = [label.leaves if isinstance(label, Derived) else self.leaves_of(label) for label in params]
        how = next((label.how for label in computed), f"{name} ({source_of(eqn)})")
        return Derived(frozenset().union(*bare), how, rows, tuple(pending.values()))

    def meet(self, eqn: Any, path: tuple[int, ...], labels: list[Value], loops: tuple[int, ...]) -> list[Value]:
        """A parameter meets data: a layer, a scale or shift, or something without a Kronecker form."""
        name, where = eqn.primitive.name, (source_of(eqn), module_of(eqn))
        params = [i for i, label in enumerate(labels) if isinstance(label, Entries | Derived)]
        label = labels[params[0]]
        if name in LAYERS and isinstance(label, Derived):
            self.weights |= label.rows
        for i in params:
            label = labels[i]
            if isinstance(label, Derived) and name in LAYERS:
                self.computed = True
            if isinstance(label, Derived) and label.pending:
                if name in LAYERS and not (self.commits and label.leaves):  # a weight that was computed
                    labels[i] = replace(label, leaves=self.leaves_of(label), pending=())
                else:
                    self.commit(label)
                    labels[i] = replace(label, pending=()) if label.leaves else Data()
        params = [i for i in params if not isinstance(labels[i], Data)]
        if not params:
            return [Data()] * len(eqn.outvars)
        label = labels[params[0]]
        if name in LAYERS and has_complex(eqn):
            # The gradient of a real weight is the real part of complex ones': two products, not one.
            self.computed = True
            self.block([labels[i] for i in params], f"it meets complex data in {name}", *where)
            return [Data()] * len(eqn.outvars)
        if len(params) == 1 and len(labels) == 2 and isinstance(label, Entries) and name in LAYERS:
            try:
                use = self.layer(eqn, path, labels, params[0], loops)
            except NotALayerError as error:
                self.block([label], str(error), *where)
                return [Data()] * len(eqn.outvars)
            self.weights |= label.rows
            self.uses.append(use)
            return [Data(len(self.uses) - 1, IndexMap.contiguous(use.output_shape))]
        if len(params) == 1 and name in ELEMENTWISE:
            owner = self.attach(label, labels[1 - params[0]]) if name in ADDITIONS else None
            self.small.append(SmallUse(ELEMENTWISE[name], self.leaves_of(label), *where, bias_of=owner))
            # With its bias, it is the layer's output still: the gradient is that of the sum.
            return [Data() if owner is None else labels[1 - params[0]]]
        if name in SELECTS and any(isinstance(other, Stopped) and other.of == label for other in labels):
            self.computed = True
            self.block([label], "data choose whether it has a derivative", *where)
            return [Data()]
        if name in PLACES:
            self.put(labels, where)
            return [Data()] * len(eqn.outvars)
        why = f"it meets data in {name}"
        if len(params) > 1 and name in LAYERS | ELEMENTWISE:
            why += " together with another parameter"
        self.block([labels[i] for i in params], why, *where)
        return [Data()] * len(eqn.outvars)

    def put(self, labels: Sequence[Value], where: tuple[str, str]) -> None:
        """Parameters put beside data or in the place of some: they are added to zeros there."""
        for label in labels:
            self.commit(label)
            leaves = label.leaves if isinstance(label, Derived) else self.leaves_of(label)
            self.small += [SmallUse("shift", leaves, *where)] if leaves else []

    def attach(self, label: Value, other: Value) -> int | None:
        """Make what is added to a layer's output that layer's bias, if it is one; the number of the layer."""
        if not isinstance(label, Entries) or label.factor != 1 or not isinstance(other, Data):
            return None
        if other.use is None or other.entries is None:
            return None
        use, added, shape = self.uses[other.use], label.entries, other.entries.shape
        if len(added.shape) == len(shape):  # primitives broadcast axes of length 1 themselves
            added = added.broadcast_in_dim(shape, tuple(range(len(shape))))
        bias = attach_bias(use, other.entries, added) if added.shape == shape and use.bias is None else None
        if bias is None:
            return None
        self.uses[other.use] = replace(use, bias=bias)
        return other.use

    def scan(self, eqn: Any, path: tuple[int, ...], labels: list[Value], loops: tuple[int, ...]) -> list[Value]:
        """A loop of known length: one walk over its body, with a loop axis in front of all entries."""
        params = eqn.params
        (num_consts, num_carry), length = scan_sizes(eqn), params["length"]
        jaxpr, consts = open_jaxpr(params["jaxpr"])
        lead, where = len(loops), (source_of(eqn), module_of(eqn))

        def enter(label: Value, changes: bool, sliced: bool) -> Value:
            if isinstance(label, Entries):
                if sliced:  # the axis after the loops is the one that is looped over
                    return label
                shape = (*loops, length, *label.entries.shape[lead:])
                axes = (*range(lead), *range(lead + 1, len(shape)))
                return replace(label, entries=label.entries.broadcast_in_dim(shape, axes))
            if isinstance(label, Known) and changes:
                return None
            return Data() if isinstance(label, Data) else label

        inner = [enter(label, i >= num_consts, i >= num_consts + num_carry) for i, label in enumerate(labels)]
        carried = slice(num_consts, num_consts + num_carry)
        saved = len(self.uses), len(self.small), len(self.blocked)
        while True:
            results = self.run(jaxpr, known(consts), list(inner), path, (*loops, length))
            joined = [join(a, b) for a, b in zip(inner[carried], results[:num_carry], strict=True)]
            if joined == inner[carried]:
                break
            inner[carried] = joined
            del self.uses[saved[0] :], self.small[saved[1] :], self.blocked[saved[2] :]
        for before, after in zip(labels[carried], inner[carried], strict=True):
            if isinstance(after, Data) and isinstance(before, Entries | Derived):
                self.put([before], where)  # a state that data are added to
        for after, result in zip(inner[carried], results[:num_carry], strict=True):
            if isinstance(after, Data) and isinstance(result, Entries | Derived):
                self.block([result], "it is the value of a loop's carry", *where)

        def leave(label: Value, carry: bool, before: Value) -> Value:
            if isinstance(label, Entries):
                if carry:  # passed through as it came
                    return before
                return Derived(self.leaves_of(label), f"the results of a loop ({where[0]})")
            return Data() if isinstance(label, Data) else None if isinstance(label, Known | Stopped) else label

        outer = labels[carried] + [None] * (len(results) - num_carry)
        final = [*joined, *results[num_carry:]]
        return [leave(label, i < num_carry, outer[i]) for i, label in enumerate(final)]
