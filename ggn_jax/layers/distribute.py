"""Products of data with computed weights as sums and chains of products with parameters.

`x (W + U V)` is `x W + (x U) V`, and `x (W * c)` with one number `c` for each output is `(x W) * c`: parameters that
meet each other before they meet data are layers again, with inputs and output gradients of their own (merged low-rank
adapters, low-rank weights, straight-through estimators, the means of random weights, scaled rows and columns). So are
the real and imaginary parts of complex weights, whose products are taken apart into real ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

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
from ggn_jax.layers.own_rules import as_result, open_call, passed_through
from ggn_jax.layers.products import Dot, product_with, ragged_product
from ggn_jax.layers.ragged import is_by_row
from ggn_jax.layers.weights import (
    CASTS,
    MOVES,
    SELECTS,
    UNSTACKS,
    Parts,
    Straight,
    Weight,
    are_weights,
    as_weight,
    gated,
    of_each_part,
    of_leaves,
    of_weights,
    plain,
)


def distribute(closed: Any, num_params: int, fixed: Sequence[bool]) -> Callable[..., list[Any]]:
    """The function that a jaxpr of parameters, then inputs, computes, with all such products distributed.

    `fixed` says of each input whether it is the same for all examples.
    """
    jaxpr, consts = open_jaxpr(closed)

    def run(*values: Any) -> list[Any]:
        given: list[Any] = [of_leaves(value, {number}) for number, value in enumerate(values[:num_params])]
        given += [
            as_weight(value) if is_fixed else value for value, is_fixed in zip(values[num_params:], fixed, strict=True)
        ]
        return [plain(x) for x in _run(jaxpr, consts, given)]

    return run


def _run(jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    def step(eqn: Any, path: tuple[int, ...], values: list[Any]) -> list[Any]:
        literals = [not isinstance(value, Weight | Parts | jax.Array) for value in values]
        values = [as_weight(x) if literal else x for x, literal in zip(values, literals, strict=True)]
        if eqn.primitive.name in SELECTS and not isinstance(values[0], Weight) and are_weights(values[1:]):
            chosen = gated(values[0], values[1:], varying_axes(jaxpr, eqn.invars[0]))
            if chosen is not None:
                return [chosen]
        with as_written(eqn):
            return _evaluate(eqn, values)

    return run_jaxpr(jaxpr, [as_weight(const) for const in consts], values, (), step)


def _evaluate(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of an equation, of weights and of data."""
    name = eqn.primitive.name
    if name in INLINED - CUSTOM_JVP:
        return _run(*open_jaxpr(inner_jaxpr(eqn)), values)
    if name in UNSTACKS and isinstance(values[0], Weight):
        slices, axis, size = jax.lax.index_in_dim, eqn.params["axis"], len(eqn.outvars)
        apart = jax.make_jaxpr(lambda x: [slices(x, i, axis, keepdims=False) for i in range(size)])
        return _run(*open_jaxpr(apart(values[0].value)), values)
    if are_weights(values):
        return (_straight(eqn, values) if name in CUSTOM_JVP | CUSTOM_VJP else None) or of_weights(eqn, values)
    if name in CUSTOM_JVP | CUSTOM_VJP:
        opened = _opened(eqn, values)
        return bind(eqn, list(map(plain, values))) if opened is None else opened
    if is_by_row(eqn) and isinstance(values[1], Weight):
        return [ragged_product(eqn, *values)]
    if name in BRANCHES:
        return _branches(eqn, values)
    if name in REMAT:
        return _across(eqn, values, partial(run_remat, eqn))
    if name in SCAN:
        return _scan(eqn, values)
    found = None
    if len(values) >= 2 and not (isinstance(values[0], Weight) and isinstance(values[1], Weight)):
        number = int(isinstance(values[1], Weight))
        weight = values[number]
        if isinstance(weight, Weight) and weight.leaves:
            found = product_with(eqn, values, number)
    if len(values) == 1:
        return _of_parts(eqn, values[0])
    return bind(eqn, list(map(plain, values))) if found is None else [found]


def _of_parts(eqn: Any, x: Any) -> list[Any]:
    """An equation of one value; of complex ones, it is kept in mind what their parts are."""
    name = eqn.primitive.name
    if isinstance(x, Parts):
        if name in ("real", "imag"):
            part = x.real if name == "real" else x.imag
            return [jnp.zeros_like(x.real) if part is None else part]
        if name in MOVES - CASTS:
            return [of_each_part(lambda x: bind(eqn, [x])[0], x)]
    results = bind(eqn, [plain(x)])
    is_real = name in CASTS and jnp.iscomplexobj(results[0]) and not jnp.iscomplexobj(plain(x))
    return [Parts(results[0], x, None)] if is_real else results


# Calls with derivative rules of their own. ---------------------------------------------------------------------------


def _straight(eqn: Any, values: list[Weight]) -> list[Weight] | None:
    """The results of a call of weights whose rule passes on what comes, or nothing."""
    numbers = [i for i, value in enumerate(values) if value.leaves]
    passed = passed_through(eqn, [value.value for value in values], numbers) if numbers else None
    if passed is None or len(passed) > 1:
        return None
    results = [as_weight(result) for result in bind(eqn, [value.value for value in values])]
    for number, term in passed.items():
        of = values[number]
        moved = jax.make_jaxpr(lambda x: as_result(term, x))(of.value)  # noqa: B023  # called at once
        (of,) = _run(*open_jaxpr(moved), [of])
        results = [replace(results[0], leaves=of.leaves, form=Straight(of))]
    return [replace(x, value=x.value if x.leaves else jax.lax.stop_gradient(x.value)) for x in results]


def _opened(eqn: Any, values: list[Any]) -> list[Any] | None:
    """The results of a call of data and weights, with the products of its rule in the open."""
    numbers = [i for i, value in enumerate(values) if isinstance(value, Weight) and value.leaves]
    opened = open_call(eqn, list(map(plain, values)), numbers) if numbers else None
    if opened is None:
        return None
    results: list[Array] = []
    for product in opened.products:
        weight = values[product.operand]
        weight = weight.form.of if isinstance(weight.form, Straight) else weight
        (weight,) = _run(*open_jaxpr(jax.make_jaxpr(product.weight)(weight.value)), [weight])
        axes = product.term.axes
        if product.of is not None:
            results[product.of] += product.place(plain(weight), axes)
            continue
        at = [(i, axes.index(x), x) for i, x in enumerate(product.a_axes) if x in axes]
        batch, contract = (
            [(i, j) for i, j, x in at if (x in product.term.b_axes) is shared] for shared in (True, False)
        )
        dot = Dot(*(tuple(pair[i] for pair in pairs) for pairs in (contract, batch) for i in (0, 1)))
        free = [x for i, x in enumerate(product.a_axes) if i not in (*dot.axes, *dot.batch)]
        free += [x for i, x in enumerate(axes) if i not in (*dot.weight_axes, *dot.weight_batch)]
        options = {"precision": product.term.precision, "preferred_element_type": None}
        result = plain(dot(product.a, weight, options))
        results.append(product.place(result, (*(axes[i] for i in dot.weight_batch), *free)))
    return opened.finish(results)


# Calls. --------------------------------------------------------------------------------------------------------------


def _across(eqn: Any, values: list[Any], call: Callable[..., Any]) -> list[Any]:
    """A call of a jaxpr as a function of arrays: what weights were made of stays outside."""
    jaxpr, consts = open_jaxpr(inner_jaxpr(eqn))

    def fn(*arrays: Any) -> list[Any]:
        return list(map(plain, _run(jaxpr, consts, _again(values, arrays))))

    return list(call(fn, *map(plain, values)))


def _branches(eqn: Any, values: list[Any]) -> list[Any]:
    def fn(number: int, jaxpr: Any, arrays: list[Any]) -> list[Any]:
        return list(map(plain, _run(*open_jaxpr(jaxpr), _again(values[1:], arrays))))

    return list(run_branches(eqn, fn, list(map(plain, values))))


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    num_consts, num_carry = scan_sizes(eqn)
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    carried = range(num_consts, num_consts + num_carry)
    kinds = [None if i in carried else value for i, value in enumerate(values)]  # a carry may become data

    def fn(arrays: Any, _: Any) -> tuple[list[Any], tuple[()]]:
        return list(map(plain, _run(jaxpr, consts, _again(kinds, arrays)))), ()

    return list(run_scan(eqn, fn, list(map(plain, values)), ())[0])


def _again(values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Arrays as weights of the same parameters, where they were weights."""
    pairs = zip(values, arrays, strict=True)
    return [of_leaves(x, {p.leaf for p in value.leaves}) if isinstance(value, Weight) else x for value, x in pairs]
