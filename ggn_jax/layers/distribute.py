"""Distribute products of data with computed weights, into sums and chains of products with parameters.

`x (W + U V)` is `x W + (x U) V`, and `x (W * c)` with one number `c` for each output is `(x W) * c`: parameters that
meet each other before they meet data are layers again, with inputs and output gradients of their own (merged low-rank
adapters, low-rank weights, straight-through estimators, the means of random weights, scaled rows and columns). So are
the real and imaginary parts of complex weights, whose products become real ones.

The new function has the same results and derivatives. It is not always an improvement, so `trace_model` takes
it only if fewer parameters are left without Kronecker form.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ggn_jax.layers.custom_rules import as_result, expand_call, straight_through_terms
from ggn_jax.layers.jaxprs import (
    BRANCHES,
    CUSTOM_JVP,
    CUSTOM_VJP,
    INLINED,
    REMAT,
    SCAN,
    as_written,
    bind,
    inner_jaxpr,
    open_jaxpr,
    run_branches,
    run_jaxpr,
    run_remat,
    run_scan,
    scan_sizes,
    varying_axes,
)
from ggn_jax.layers.products import Dot, distributed_product, ragged_product
from ggn_jax.layers.ragged import is_by_row
from ggn_jax.layers.weights import (
    CASTS,
    MOVES,
    SELECTS,
    UNSTACKS,
    ComplexParts,
    StraightThrough,
    Weight,
    are_weights,
    array_of,
    as_weight,
    evaluate_weights,
    gate,
    map_complex_parts,
    parameter_weight,
)


def distribute(closed: Any, num_params: int, fixed: Sequence[bool]) -> Callable[..., list[Any]]:
    """The function that a jaxpr of parameters, then inputs, computes, with all such products distributed.

    `fixed` says of each input whether it is the same for all examples: then it is a constant, which weights may be made
    of.
    """
    jaxpr, consts = open_jaxpr(closed)

    def run(*values: Any) -> list[Any]:
        given: list[Any] = [parameter_weight(value, {number}) for number, value in enumerate(values[:num_params])]
        given += [
            as_weight(value) if is_fixed else value for value, is_fixed in zip(values[num_params:], fixed, strict=True)
        ]
        return [array_of(x) for x in _run(jaxpr, consts, given)]

    return run


def _run(jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    def step(eqn: Any, path: tuple[int, ...], values: list[Any]) -> list[Any]:
        literals = [not isinstance(value, Weight | ComplexParts | jax.Array) for value in values]
        values = [as_weight(x) if literal else x for x, literal in zip(values, literals, strict=True)]
        if eqn.primitive.name in SELECTS and not isinstance(values[0], Weight) and are_weights(values[1:]):
            chosen = gate(values[0], values[1:], varying_axes(jaxpr, eqn.invars[0]))
            if chosen is not None:
                return [chosen]
        with as_written(eqn):
            return _evaluate(eqn, values)

    return run_jaxpr(jaxpr, [as_weight(const) for const in consts], values, (), step)


def _evaluate(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of an equation of weights and data: weights only where no data went in."""
    name = eqn.primitive.name
    if name in INLINED - CUSTOM_JVP:
        return _run(*open_jaxpr(inner_jaxpr(eqn)), values)
    if name in UNSTACKS and isinstance(values[0], Weight):
        # As slices, whose forms and boxes are known.
        slices, axis, size = jax.lax.index_in_dim, eqn.params["axis"], len(eqn.outvars)
        apart = jax.make_jaxpr(lambda x: [slices(x, i, axis, keepdims=False) for i in range(size)])
        return _run(*open_jaxpr(apart(values[0].value)), values)
    if are_weights(values):
        return (_straight_through(eqn, values) if name in CUSTOM_JVP | CUSTOM_VJP else None) or evaluate_weights(
            eqn, values
        )
    if name in CUSTOM_JVP | CUSTOM_VJP:
        expanded = _expand_call(eqn, values)
        return bind(eqn, list(map(array_of, values))) if expanded is None else expanded
    if is_by_row(eqn) and isinstance(values[1], Weight):
        return [ragged_product(eqn, *values)]
    if name in BRANCHES:
        return _branches(eqn, values)
    if name in REMAT:
        return _call_with_arrays(eqn, values, partial(run_remat, eqn))
    if name in SCAN:
        return _scan(eqn, values)
    found = None
    if len(values) >= 2 and not (isinstance(values[0], Weight) and isinstance(values[1], Weight)):
        number = int(isinstance(values[1], Weight))
        weight = values[number]
        if isinstance(weight, Weight) and weight.boxes:
            found = distributed_product(eqn, values, number)
    if len(values) == 1:
        return _evaluate_unary(eqn, values[0])
    return bind(eqn, list(map(array_of, values))) if found is None else [found]


def _evaluate_unary(eqn: Any, x: Any) -> list[Any]:
    """An equation of one value. For complex data, what their real and imaginary parts are is kept beside them.

    So a chain of complex layers is one of real products throughout, and no gradient passes through a complex one.
    """
    name = eqn.primitive.name
    if isinstance(x, ComplexParts):
        if name in ("real", "imag"):
            part = x.real if name == "real" else x.imag
            return [jnp.zeros_like(x.real) if part is None else part]
        if name in MOVES - CASTS:
            return [map_complex_parts(lambda x: bind(eqn, [x])[0], x)]
    results = bind(eqn, [array_of(x)])
    is_real = name in CASTS and jnp.iscomplexobj(results[0]) and not jnp.iscomplexobj(array_of(x))
    return [ComplexParts(results[0], x, None)] if is_real else results


# Calls with derivative rules of their own. ---------------------------------------------------------------------------


def _straight_through(eqn: Any, values: list[Weight]) -> list[Weight] | None:
    """The results of a call of weights whose rule passes the cotangent on, moved or not, or gives none; else None."""
    numbers = [i for i, value in enumerate(values) if value.boxes]
    passed = straight_through_terms(eqn, [value.value for value in values], numbers) if numbers else None
    if passed is None or len(passed) > 1:
        return None
    results = [as_weight(result) for result in bind(eqn, [value.value for value in values])]
    for number, term in passed.items():
        of = values[number]
        moved = jax.make_jaxpr(lambda x: as_result(term, x))(of.value)  # noqa: B023  # called at once
        (of,) = _run(*open_jaxpr(moved), [of])
        results = [replace(results[0], boxes=of.boxes, form=StraightThrough(of))]
    return [replace(x, value=x.value if x.boxes else jax.lax.stop_gradient(x.value)) for x in results]


def _expand_call(eqn: Any, values: list[Any]) -> list[Any] | None:
    """The results of a call of data and weights, with the products of its rule as equations; None if it has none."""
    numbers = [i for i, value in enumerate(values) if isinstance(value, Weight) and value.boxes]
    expanded = expand_call(eqn, list(map(array_of, values)), numbers) if numbers else None
    if expanded is None:
        return None
    results: list[Array] = []
    for product in expanded.products:
        weight = values[product.operand]
        weight = weight.form.of if isinstance(weight.form, StraightThrough) else weight
        (weight,) = _run(*open_jaxpr(jax.make_jaxpr(product.weight)(weight.value)), [weight])
        axes = product.term.axes
        if product.added_to is not None:
            results[product.added_to] += product.place(array_of(weight), axes)
            continue
        at = [(i, axes.index(x), x) for i, x in enumerate(product.a_axes) if x in axes]
        batch, contract = (
            [(i, j) for i, j, x in at if (x in product.term.b_axes) is shared] for shared in (True, False)
        )
        dot = Dot(*(tuple(pair[i] for pair in pairs) for pairs in (contract, batch) for i in (0, 1)))
        free = [x for i, x in enumerate(product.a_axes) if i not in (*dot.axes, *dot.batch)]
        free += [x for i, x in enumerate(axes) if i not in (*dot.weight_axes, *dot.weight_batch)]
        options = {"precision": product.term.precision, "preferred_element_type": None}
        result = array_of(dot(product.a, weight, options))
        results.append(product.place(result, (*(axes[i] for i in dot.weight_batch), *free)))
    return expanded.finish(results)


# Calls. --------------------------------------------------------------------------------------------------------------


def _call_with_arrays(eqn: Any, values: list[Any], call: Callable[..., Any]) -> list[Any]:
    """A call of a jaxpr as a function of arrays. Inside, weights count as parameters: their forms stay outside.

    JAX's higher-order primitives take arrays, and no record of what these are made of.
    """
    jaxpr, consts = open_jaxpr(inner_jaxpr(eqn))

    def fn(*arrays: Any) -> list[Any]:
        return list(map(array_of, _run(jaxpr, consts, _rewrap(values, arrays))))

    return list(call(fn, *map(array_of, values)))


def _branches(eqn: Any, values: list[Any]) -> list[Any]:
    def fn(number: int, jaxpr: Any, arrays: list[Any]) -> list[Any]:
        return list(map(array_of, _run(*open_jaxpr(jaxpr), _rewrap(values[1:], arrays))))

    return list(run_branches(eqn, fn, list(map(array_of, values))))


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    num_consts, num_carry = scan_sizes(eqn)
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    carried = range(num_consts, num_consts + num_carry)
    kinds = [None if i in carried else value for i, value in enumerate(values)]  # a carry may become data

    def fn(arrays: Any, _: Any) -> tuple[list[Any], tuple[()]]:
        return list(map(array_of, _run(jaxpr, consts, _rewrap(kinds, arrays)))), ()

    return list(run_scan(eqn, fn, list(map(array_of, values)), ())[0])


def _rewrap(values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Arrays as weights of the same parameters, where `values` are weights."""
    pairs = zip(values, arrays, strict=True)
    return [
        parameter_weight(x, {p.leaf for p in value.boxes}) if isinstance(value, Weight) else x for value, x in pairs
    ]
