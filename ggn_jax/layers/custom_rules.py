"""Calls with custom derivative rules (`jax.custom_vjp`, `jax.custom_jvp`): make products in these rules equations.

The gradient that a rule gives a weight may be a product like that of any layer, `sum_s b_s a_s^T`, where `b` depends on
the cotangents of the call's results and `a` does not, as those of quantised and of fused layers are. Then the call is a
layer with inputs `a` and output gradients `b`, whatever it computes. It is replaced by the rule's forward pass as it
is, beside a product of `a` and the weight whose value is not used, but to which the rule gives the cotangent `b`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ggn_jax.layers.jaxprs import bind
from ggn_jax.layers.rules import Term, rule_of
from ggn_jax.layers.weights import Weight, broadcast_scale


@dataclass(frozen=True)
class RuleProduct:
    """`einsum("a_axes, axes -> b_axes", a, w)`, with a parameter `w`; without `a`, the parameter itself."""

    operand: int
    term: Term
    a: Array | None  # summed over axes that neither `b` nor the parameter has
    a_axes: tuple[int, ...]
    added_to: int | None  # of a bias, the number of the product that it is added to

    def weight(self, value: Array) -> Array:
        """The parameter as the product takes it: by the transpose of how its gradient is moved."""
        term = self.term
        shape = tuple(_size(term, axis) for axis in term.axes)

        def move(x: Array) -> Array:
            for eqn in term.moves:
                (x,) = bind(eqn, [x])
            return x

        like = jax.ShapeDtypeStruct(shape, value.dtype)
        moved = jax.linear_transpose(move, like)(value)[0] if term.moves else value
        return moved.astype(term.like.dtype)

    def place(self, x: Array, labels: tuple[int, ...]) -> Array:
        """An array with these labels for its axes, broadcast to the shape of `b`."""
        order = sorted(range(len(labels)), key=lambda i: labels[i])
        return jax.lax.broadcast_in_dim(jnp.transpose(x, order), self.term.b.aval.shape, sorted(labels))


def _size(term: Term, label: int) -> int:
    rank = len(term.b.aval.shape)
    return int(term.b.aval.shape[label] if label < rank else term.a.aval.shape[label - rank])


@dataclass(frozen=True)
class ExpandedCall:
    """A call in parts: its products, and the function from their results to its own."""

    products: tuple[RuleProduct, ...]
    finish: Callable[[list[Array]], list[Array]]


def expand_call(eqn: Any, values: Sequence[Any], weights: Sequence[int]) -> ExpandedCall | None:
    """A call of data and of weights (these operands), with the products of its rule; None if it has none."""
    rule = rule_of(eqn, values)
    if rule is None:
        return None
    gradients = dict(zip(rule.inputs, rule.gradients, strict=True))
    atoms = dict(zip(rule.inputs, rule.jaxpr.outvars[rule.results :], strict=True))
    found = {i: gradients[i] for i in weights if i in gradients and gradients[i] is not None}
    # Two products of a weight with one `b` are one product, with a sum of inputs. As two, they would be two uses, whose
    # cross terms are lost.
    found = {i: terms for i, terms in found.items() if not _shares(terms or ())}
    layers = [(i, term) for i, terms in found.items() for term in terms or () if term.a is not None]
    sides = {term.side: number for number, (_, term) in enumerate(layers)}
    # The gradient of a bias must be the sum of some product's `b`. An operand dropped here may take that product with
    # it, so this is checked once more below.
    found = {i: t for i, t in found.items() if all(x.a is not None or x.side in sides for x in t or ())}
    layers = [(i, term) for i, term in layers if i in found]
    if not found:
        return None
    biases = [(i, term) for i, terms in found.items() for term in terms or () if term.a is None]
    sides = {term.side: number for number, (_, term) in enumerate(layers)}
    if any(term.side not in sides for _, term in biases):
        return None

    # The forward pass is the rule's, with what it keeps for the backward pass, and without derivatives of its own.
    constant = [jax.lax.stop_gradient(value) for value in values]
    rest = [i for i in rule.inputs if i not in found]
    wanted = [*(atoms[i] for i in rest), *(term.b for _, term in layers)]
    scales = [scale.atom for _, term in layers for scale in term.scales if scale.atom is not None]
    needed = rule.needs([*wanted, *scales])
    outputs = rule.jaxpr.outvars[: rule.results]
    inputs = [term.a for _, term in layers]
    given = rule.forward(constant, [*outputs, *needed, *inputs])
    results, kept = given[: rule.results], given[rule.results : rule.results + len(needed)]
    products = [
        *(_product_of(i, term, a) for (i, term), a in zip(layers, given[rule.results + len(needed) :], strict=True)),
        *(RuleProduct(i, term, None, (), sides[term.side]) for i, term in biases),
    ]

    # The backward pass must be the rule's own, once, for all operands; only what it gives the layers' weights is cut
    # short at `b`, which goes to the products as their cotangent.
    @jax.custom_vjp
    def same(results: Any, rest: Any, products: Any, kept: Any) -> Any:
        return results

    def forward(results: Any, rest: Any, products: Any, kept: Any) -> Any:
        return results, kept

    def backward(kept: Any, cotangents: Any) -> Any:
        values = rule.backward(needed, kept, cotangents, [*wanted, *scales])
        of_rest, of_products = values[: len(rest)], values[len(rest) : len(wanted)]
        factors = iter(values[len(wanted) :])
        scaled = [_scaled(b, term, factors) for b, (_, term) in zip(of_products, layers, strict=True)]
        return None, of_rest, scaled, None

    same.defvjp(forward, backward)

    def finish(products: list[Array]) -> list[Array]:
        return list(same(results, [values[i] for i in rest], products, kept))

    return ExpandedCall(tuple(products), finish)


def _shares(terms: Sequence[Term]) -> bool:
    factors = [id(term.b) for term in terms if term.a is not None]
    return len(set(factors)) < len(factors)


def _product_of(operand: int, term: Term, a: Array) -> RuleProduct:
    lone = [i for i, x in enumerate(term.a_axes) if x not in term.b_axes and x not in term.axes]
    labels = tuple(x for i, x in enumerate(term.a_axes) if i not in lone)
    a = jnp.sum(a, axis=tuple(lone)) if lone else a
    return RuleProduct(operand, term, jax.lax.stop_gradient(a).astype(term.like.dtype), labels, None)


def _scaled(b: Array, term: Term, factors: Any) -> Array:
    for scale in term.scales:
        if scale.atom is None:
            b = -b
            continue
        value = next(factors)
        places = {axis: scale.axes[axis] for axis in scale.varies}
        by = broadcast_scale(Weight(value, frozenset(), scale.varies), places, b.ndim).astype(b.dtype)
        b = b / by if scale.inverted else b * by
    return b.astype(term.like.dtype)


def straight_through_terms(eqn: Any, values: Sequence[Any], weights: Sequence[int]) -> dict[int, Term] | None:
    """The operands of a call, of these weights, whose gradient is the cotangent of its one result, moved or not.

    The gradients of all others must be 0; None otherwise.
    """
    rule = rule_of(eqn, values)
    if rule is None:
        return None
    gradients = dict(zip(rule.inputs, rule.gradients, strict=True))
    found = {}
    for number in weights:
        terms = gradients.get(number, ())
        if terms is None or len(terms) > 1 or (terms and rule.results > 1):
            return None
        for term in terms:
            if term.a is not None or term.b is not rule.jaxpr.invars[-1] or len(term.axes) < len(term.b_axes):
                return None
            found[number] = term
    return found


def as_result(term: Term, value: Array) -> Array:
    """The operand whose gradient is this term, moved so that it has the shape of the call's result."""
    assert math.prod(term.b.aval.shape) == value.size
    return RuleProduct(0, term, None, (), None).weight(value).transpose(*_inverse(term.axes))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda i: order[i])
