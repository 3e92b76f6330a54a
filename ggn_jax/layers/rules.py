"""Derivative rules of a call (`jax.custom_vjp`, `jax.custom_jvp`), and the products that are the gradients in them.

A rule is traced as the call's VJP. Each gradient is then written as a sum of terms, if possible: a product of something
that depends on cotangents (`b`) with something that does not (`a`), rescaled and moved.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp

from ggn_jax.layers.jaxprs import (
    CUSTOM_JVP,
    INLINED,
    bind,
    has_complex,
    inner_jaxpr,
    is_floating,
    is_literal,
    live_equations,
    open_jaxpr,
    run_jaxpr,
)
from ggn_jax.layers.weights import ADDITIONS, CASTS, ELEMENTWISE

BIJECTIONS = frozenset({"reshape", "squeeze", "transpose"})
ZERO_KEPT = CASTS | BIJECTIONS | {"broadcast_in_dim", "reduce_sum", "mul", "neg"}


@dataclass(frozen=True)
class Scale:
    """A factor of a term: an atom with an axis for each of these labels, which varies along some; -1 if it is None."""

    atom: Any
    axes: tuple[int, ...]
    varies: frozenset[int]
    inverted: bool


@dataclass(frozen=True)
class Term:
    """`einsum("a_axes, b_axes -> axes", a, b)`, times scales, then moved by equations; without `a`, of `b` alone.

    Labels below `b`'s rank are axes of `b`. So two terms of one `b` have the same labels.
    """

    a: Any
    b: Any
    a_axes: tuple[int, ...]
    axes: tuple[int, ...]
    like: Any  # the type of the result, before it is moved
    scales: tuple[Scale, ...] = ()
    moves: tuple[Any, ...] = ()
    precision: Any = None

    @property
    def b_axes(self) -> tuple[int, ...]:
        return tuple(range(len(self.b.aval.shape)))

    @property
    def is_whole(self) -> bool:
        """Whether all entries of the product are there, in some order of axes."""
        return not self.moves and len(self.axes) == len(self.b_axes)

    @property
    def side(self) -> Any:
        """Equal for terms whose `b` and scales are the same, and so their layer's output gradients."""
        scales = [(id(x.atom), x.inverted, *sorted(x.axes[axis] for axis in x.varies)) for x in self.scales]
        return self.b, tuple(scales)


@dataclass(frozen=True)
class Rule:
    """A call's results, then the gradients that its rule gives, as a jaxpr of its inputs, then cotangents.

    Forward and backward pass are both parts of this one jaxpr: what depends on cotangents, and what does not.
    """

    jaxpr: Any
    consts: Sequence[Any]
    inputs: tuple[int, ...]  # the numbers of the call's operands that have gradients
    results: int
    dependent: frozenset[Any]  # the variables that depend on cotangents
    gradients: tuple[tuple[Term, ...] | None, ...]  # for each input, as a sum of terms if it is one; () is 0

    def forward(self, values: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
        """These atoms, which do not depend on cotangents."""
        env = dict(
            zip([*self.jaxpr.constvars, *self.jaxpr.invars[: len(values)]], [*self.consts, *values], strict=True)
        )
        return self._run(env, wanted)

    def _run(self, env: dict[Any, Any], wanted: Sequence[Any]) -> list[Any]:
        # Backwards for what is needed, then forwards: what is given in `env` is not computed again.
        missing, equations = {atom for atom in wanted if not is_literal(atom)} - env.keys(), []
        for eqn in reversed(self.jaxpr.eqns):
            if not missing.isdisjoint(eqn.outvars):
                equations.append(eqn)
                missing |= {atom for atom in eqn.invars if not is_literal(atom)} - env.keys()

        def read(atom: Any) -> Any:
            return jnp.asarray(atom.val, atom.aval.dtype) if is_literal(atom) else env[atom]

        for eqn in reversed(equations):
            env.update(zip(eqn.outvars, bind(eqn, list(map(read, eqn.invars))), strict=True))
        return [read(atom) for atom in wanted]

    def needs(self, wanted: Sequence[Any]) -> list[Any]:
        """What the backward pass to these atoms needs of the forward pass."""
        live = live_equations(self.jaxpr, wanted)
        reads = [a for eqn in compress(self.jaxpr.eqns, live) if self.depends(eqn.outvars) for a in eqn.invars]
        return list(dict.fromkeys(a for a in [*reads, *wanted] if not is_literal(a) and a not in self.dependent))

    def depends(self, atoms: Iterable[Any]) -> bool:
        return any(not is_literal(atom) and atom in self.dependent for atom in atoms)

    def backward(self, needed: Sequence[Any], kept: Sequence[Any], cotangents: Sequence[Any], wanted: Any) -> list[Any]:
        given = self.jaxpr.invars[-self.results :]
        return self._run(dict(zip([*needed, *given], [*kept, *cotangents], strict=True)), wanted)


def rule_of(eqn: Any, values: Sequence[Any]) -> Rule | None:
    """The rule of a call; None where its results or inputs are complex, or some results have no derivative."""
    if has_complex(eqn) or not all(map(is_floating, eqn.outvars)):
        return None
    closed_over = eqn.params.get("num_consts", 0)  # a rule gives none of these a gradient
    numbers = tuple(i for i, var in enumerate(eqn.invars) if i >= closed_over and is_floating(var))

    def run(values: list[Any], cotangents: list[Any]) -> list[Any]:
        def call(*floating: Any) -> list[Any]:
            given = dict(zip(numbers, floating, strict=True))
            return bind(eqn, [given.get(i, value) for i, value in enumerate(values)])

        results, vjp = jax.vjp(call, *(values[i] for i in numbers))
        return [*results, *vjp(cotangents)]

    cotangents = jax.eval_shape(lambda values: bind(eqn, values), list(values))
    closed = _inline_calls(jax.make_jaxpr(run)(list(values), cotangents), [*values, *cotangents])
    jaxpr, consts = open_jaxpr(closed)
    count = len(cotangents)
    terms, dependent = _find_terms(jaxpr, count)
    gradients = tuple(terms.get(atom) if not is_literal(atom) else _zero(atom) for atom in jaxpr.outvars[count:])
    return Rule(jaxpr, consts, numbers, count, dependent, gradients)


def _inline_calls(closed: Any, args: Sequence[Any]) -> Any:
    """A jaxpr with its calls inlined: terms are looked for in a flat list of equations."""

    def step(eqn: Any, path: tuple[int, ...], values: list[Any]) -> list[Any]:
        if eqn.primitive.name in INLINED - CUSTOM_JVP:
            return run_jaxpr(*open_jaxpr(inner_jaxpr(eqn)), values, path, step)
        return bind(eqn, values)

    return jax.make_jaxpr(lambda *args: run_jaxpr(*open_jaxpr(closed), args, (), step))(*args)


# What gradients are made of. -----------------------------------------------------------------------------------------


def _zero(atom: Any) -> tuple[Term, ...] | None:
    return () if not jnp.ndim(atom.val) and atom.val == 0 else None


def _find_terms(jaxpr: Any, results: int) -> tuple[dict[Any, tuple[Term, ...]], frozenset[Any]]:
    """The variables that are sums of terms, each with its terms, and those that depend on cotangents."""
    dependent = set(jaxpr.invars[-results:])
    terms: dict[Any, tuple[Term, ...]] = {var: (_whole_term(var),) for var in dependent}
    varies = {var: _long_axes(var) for var in (*jaxpr.constvars, *jaxpr.invars)}
    for eqn in jaxpr.eqns:
        varying = [frozenset() if is_literal(atom) else varies[atom] for atom in eqn.invars]
        varies |= {var: _varies(eqn, varying, var) for var in eqn.outvars}
        sums = [_zero(atom) if is_literal(atom) else terms.get(atom) for atom in eqn.invars]
        depends = [not is_literal(atom) and atom in dependent for atom in eqn.invars]
        found = _terms_of(eqn, sums, depends, varying) if len(eqn.outvars) == 1 else None
        if any(depends):
            dependent |= set(eqn.outvars)
            found = found or (_whole_term(eqn.outvars[0]),)  # whatever it is, it may be the `b` of a later product
        if found is not None:
            terms[eqn.outvars[0]] = found
    return terms, frozenset(dependent)


def _whole_term(var: Any) -> Term:
    return Term(None, var, (), tuple(range(len(var.aval.shape))), var.aval)


def _long_axes(var: Any) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(var.aval.shape) if size > 1)


def _varies(eqn: Any, varying: list[frozenset[int]], var: Any) -> frozenset[int]:
    """The axes along which the entries of a result may differ; all of them where the equation does not tell."""
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        return frozenset(eqn.params["broadcast_dimensions"][axis] for axis in varying[0])
    if name in ELEMENTWISE or (name in BIJECTIONS and not varying[0]):
        return frozenset[int]().union(*varying)
    return _long_axes(var)


def _terms_of(eqn: Any, sums: list[Any], depends: list[bool], varying: list[frozenset[int]]) -> tuple[Term, ...] | None:
    """The result of an equation as a sum of terms, given those of its inputs; `()` is 0, None is not such a sum."""
    name = eqn.primitive.name
    if name in ZERO_KEPT and () in sums:
        return ()
    if name in ADDITIONS | {"sub"} and None not in sums and all(term.a is not None for terms in sums for term in terms):
        second = sums[1] if name != "sub" else _scaled_terms(sums[1], Scale(None, (), frozenset(), False))
        return None if second is None else (*sums[0], *second)
    if name == "dot_general" and sum(depends) == 1:
        number = depends.index(True)
        return (_product_term(eqn, number, sums[number]),)
    if name == "neg" and sums[0] is not None:
        return _scaled_terms(sums[0], Scale(None, (), frozenset(), False))
    if name in ("mul", "div"):
        for i in (0, 1) if name == "mul" else (0,):
            if depends[i] and sums[i] and (not depends[1 - i] or not varying[1 - i]):
                scaled = _scaled_terms(sums[i], Scale(eqn.invars[1 - i], (), varying[1 - i], name == "div"))
                if scaled is not None:
                    return scaled
        return None
    if len(sums) == 1 and depends[0] and sums[0]:
        moved = [_moved_term(eqn, term) for term in sums[0]]
        return None if None in moved else tuple(moved)  # type: ignore[arg-type]  # none is None
    return None


def _product_term(eqn: Any, number: int, terms: Any) -> Term:
    """A product of what depends on cotangents, operand `number`, and what does not."""
    (contract, batch) = eqn.params["dimension_numbers"]
    b, a = eqn.invars[number], eqn.invars[1 - number]
    rank = len(b.aval.shape)
    own = tuple(range(rank))
    if terms and len(terms) == 1 and terms[0].a is None and terms[0].is_whole:
        b, own = terms[0].b, terms[0].axes  # a transposed one: terms of one `b` must have the same labels
    pairs = zip((*batch[1 - number], *contract[1 - number]), (*batch[number], *contract[number]), strict=True)
    shared = {i: own[j] for i, j in pairs}
    labels = {number: own, 1 - number: tuple(shared.get(i, rank + i) for i in range(len(a.aval.shape)))}
    free = [[x for i, x in enumerate(labels[n]) if i not in (*contract[n], *batch[n])] for n in (0, 1)]
    axes = (*(own[i] for i in batch[number]), *free[0], *free[1])
    return Term(a, b, labels[1 - number], axes, eqn.outvars[0].aval, precision=eqn.params["precision"])


def _scaled_terms(terms: tuple[Term, ...], scale: Scale) -> tuple[Term, ...] | None:
    """Terms times a scale that varies along axes of `b` alone, so that it can be applied to `b`; else None."""
    scaled = []
    for term in terms:
        if term.a is None:
            return None
        labels = {term.axes[axis] for axis in scale.varies} if not term.moves else {-1} if scale.varies else set()
        if not labels <= set(term.b_axes):
            return None
        scaled.append(replace(term, scales=(*term.scales, replace(scale, axes=term.axes))))
    return tuple(scaled)


def _moved_term(eqn: Any, term: Term) -> Term | None:
    """The term of the result of an equation of one input; None if it does more than move, sum or cast."""
    name = eqn.primitive.name
    if name in CASTS:
        before, after = (var.aval.dtype for var in (eqn.invars[0], eqn.outvars[0]))
        if not is_floating(eqn.outvars[0]):
            return None
        # A rounded `b` is another value. A rounded product is not: its layer's product is rounded the same way.
        return term if term.a is not None or jnp.finfo(before).bits <= jnp.finfo(after).bits else None
    if not term.moves:
        if name == "transpose":
            return replace(term, axes=tuple(term.axes[i] for i in eqn.params["permutation"]))
        if name == "reduce_sum":
            return replace(term, axes=tuple(x for i, x in enumerate(term.axes) if i not in eqn.params["axes"]))
    # `b` alone in another shape is a new `b`: a product with it may contract axes that the old one does not have.
    is_kept = name in BIJECTIONS and not (term.a is None and term.is_whole)
    return replace(term, moves=(*term.moves, eqn)) if is_kept else None
