"""Products of data with computed weights as sums and chains of products with parameters.

`x (W + U V)` is `x W + (x U) V`, and `x (W * c)` with one number `c` for each output is `(x W) * c`: parameters that
meet each other before they meet data are layers again, with inputs and output gradients of their own (merged low-rank
adapters, low-rank weights, straight-through estimators, the means of random weights, scaled rows and columns). So are
the real and imaginary parts of complex weights, whose products are taken apart into real ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ggn_jax.layers.convolution import CONVOLUTION
from ggn_jax.layers.jaxprs import (
    BRANCHES,
    CUSTOM_JVP,
    INLINED,
    REMAT,
    SCAN,
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
from ggn_jax.layers.ragged import by_row, is_by_row
from ggn_jax.layers.weights import (
    ADDITIONS,
    CASTS,
    DOTS,
    GATHERS,
    MOVES,
    SELECTS,
    UNSTACKS,
    Complex,
    Gated,
    Parts,
    Product,
    Scaled,
    Sum,
    Weight,
    are_weights,
    as_weight,
    gated,
    is_complex,
    of_each_part,
    of_leaves,
    of_weights,
    plain,
    rank_of,
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
        return of_weights(eqn, values)
    if is_by_row(eqn) and isinstance(values[1], Weight):
        return [_ragged(eqn, *values)]
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
            found = _distributed(eqn, values, number)
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


# Products with data. -------------------------------------------------------------------------------------------------


def _distributed(eqn: Any, values: list[Any], number: int) -> Any:
    """The result of an equation of data and a weight, operand `number`; None where it is none of these."""
    name, params = eqn.primitive.name, eqn.params
    weight, x = values[number], values[1 - number]
    if weight.form is None and (is_complex(weight) or not jnp.iscomplexobj(plain(x))):
        return None  # nothing to take apart
    if name in DOTS and params.get("out_sharding") is None:
        (contract, batch) = params["dimension_numbers"]
        options = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}
        dot = _Dot(tuple(contract[1 - number]), tuple(contract[number]), tuple(batch[1 - number]), tuple(batch[number]))
        result = dot(x, weight, options)
        if number == 0:  # weights' axes come first
            lead, free = len(dot.batch), jnp.ndim(plain(x)) - len(dot.batch) - len(dot.axes)
            axes = range(jnp.ndim(plain(result)))
            order = [*axes[:lead], *axes[lead + free :], *axes[lead : lead + free]]
            result = of_each_part(lambda x: jnp.transpose(x, order), result)
        return result
    if name in CONVOLUTION and number == 1 and params["batch_group_count"] == 1:
        return _convolution(eqn, plain(x), weight)
    if name in GATHERS and number == 0:
        return _rows(eqn, list(map(plain, values[1:])), weight)
    if name in ADDITIONS and isinstance(weight.form, Gated):
        of = weight.form.of.value
        return _with_derivative(plain(x) + jax.lax.stop_gradient(of), of, weight.form.by.value)
    return None


def _gated(form: Gated, by: Array, x: Array, product: Callable[[Array, Weight], Array]) -> Array:
    """The product with a constant weight, plus 0 with the derivative in the weight where `by`, of the result."""
    still = Weight(jax.lax.stop_gradient(form.of.value), frozenset(), form.of.varies)
    return _with_derivative(product(x, still), product(jax.lax.stop_gradient(x), form.of), by)


def _with_derivative(value: Array, of: Array, by: Array) -> Array:
    """A value that does not depend on `of`, as far as derivatives go, with one of 1 in it where `by`."""
    return value + jnp.where(by, of - jax.lax.stop_gradient(of), 0)


@dataclass(frozen=True)
class _Dot:
    """A product of data with a weight: which axes are contracted, and which are batched, of each."""

    axes: tuple[int, ...]
    weight_axes: tuple[int, ...]
    batch: tuple[int, ...] = ()
    weight_batch: tuple[int, ...] = ()

    def __call__(self, x: Any, weight: Weight, options: dict[str, Any]) -> Any:
        """The result, `[*batch, *free axes of x, *free axes of the weight]`."""
        form = weight.form
        if isinstance(form, Complex):
            return self._complex(x, form, options)
        if isinstance(form, Sum):
            results = [plain(self(x, part, options)) for part in form.parts]
            return sum(results[1:], start=results[0])
        if isinstance(form, Scaled):
            scaled = self._scaled(x, form, options)
            if scaled is not None:
                return scaled
        if isinstance(form, Gated) and form.by.varies <= set(self.weight_batch):
            lead, rank = len(self.batch), jnp.ndim(plain(x)) - len(self.axes) + rank_of(weight) - len(self.weight_axes)
            by = _spread(form.by, {a: i for i, a in enumerate(self.weight_batch)}, rank - lead)
            return _gated(form, by, plain(x), lambda x, weight: plain(self(x, weight, options)))
        if isinstance(form, Product) and not self.batch:
            chained = self._chained(plain(x), form, options)
            if chained is not None:
                return chained
        x = plain(x) if is_complex(weight) else x
        wanted = options["preferred_element_type"]
        if not is_complex(weight) and (jnp.iscomplexobj(plain(x)) or jnp.issubdtype(wanted, jnp.complexfloating)):
            return self._complex(x, Complex(weight, None), options)
        numbers = (self.axes, self.weight_axes), (self.batch, self.weight_batch)
        return jax.lax.dot_general(x, weight.value, numbers, **options)

    def _complex(self, x: Any, form: Complex, options: dict[str, Any]) -> Parts:
        """By real products, since the gradient of a real weight is the real part of a complex one."""
        if isinstance(x, Parts):
            real, imag = x.real, x.imag
        else:
            real, imag = (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x, None)
        wanted = options["preferred_element_type"]
        options = {**options, "preferred_element_type": None if wanted is None else jnp.finfo(wanted).dtype}
        pairs = [(real, form.real), (imag, form.imag), (real, form.imag), (imag, form.real)]
        parts = [None if x is None or weight is None else self(x, weight, options) for x, weight in pairs]
        zeros = jnp.zeros_like(next(part for part in parts if part is not None))
        rr, ii, ri, ir = (zeros if part is None else part for part in parts)
        return Parts(jax.lax.complex(rr - ii, ri + ir), rr - ii, ri + ir)

    def _scaled(self, x: Array, form: Scaled, options: dict[str, Any]) -> Array | None:
        by, rank = form.by, rank_of(form.of)
        if by.varies <= set(self.weight_axes):
            places = dict(zip(self.weight_axes, self.axes, strict=True))
            x = plain(x)
            return plain(self(x * _spread(by, places, jnp.ndim(x)), form.of, options))
        if not by.varies & set(self.weight_axes):
            free = [a for a in range(rank) if a not in (*self.weight_axes, *self.weight_batch)]
            lead = jnp.ndim(plain(x)) - len(self.axes)  # batch axes, and the free ones of x
            places = {a: i for i, a in enumerate(self.weight_batch)} | {a: lead + i for i, a in enumerate(free)}
            return plain(self(x, form.of, options)) * _spread(by, places, lead + len(free))
        return None

    def _chained(self, x: Array, form: Product, options: dict[str, Any]) -> Array | None:
        """By the factor that has all contracted axes first, then the other one."""
        origins = form.origins()
        for i, near in enumerate((form.first, form.second)):
            far = (form.first, form.second)[1 - i]
            of_near = [place for place, (factor, _) in enumerate(origins) if factor == i]
            if set(of_near) != set(self.weight_axes):
                continue
            # x with the near factor: [*free axes of x, *axes that the factors share].
            hidden = _Dot(self.axes, tuple(origins[a][1] for a in self.weight_axes))(x, near, options)
            shared = [a for a in range(rank_of(near)) if a in form.axes[i]]
            matching = tuple(form.axes[1 - i][form.axes[i].index(a)] for a in shared)
            rank = jnp.ndim(plain(hidden))
            first = rank - len(shared)
            result = _Dot(tuple(range(first, rank)), matching)(hidden, far, options)
            # The far factor's free axes are in its own order; wanted is the weight's.
            own = [a for a in range(rank_of(far)) if a not in form.axes[1 - i]]
            order = [own.index(a) for factor, a in origins if factor != i]
            return jnp.transpose(plain(result), [*range(first), *(first + place for place in order)])
        return None


def _ragged(eqn: Any, x: Any, weights: Weight, sizes: Any) -> Array:
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}

    def dot(x: Array, axis: int, inputs: int, group: int) -> Array:
        return plain(_Dot((axis,), (inputs,), (0,), (group,))(x, weights, options))

    return by_row(eqn, plain(x), eqn.invars[2].aval.shape[0], plain(sizes), dot)


def _convolution(eqn: Any, x: Array, weight: Weight) -> Any:
    form = weight.form
    if isinstance(form, Sum):
        results = [_convolution(eqn, x, part) for part in form.parts]
        return sum(results[1:], start=results[0])
    if isinstance(form, Gated) and not form.by.varies:
        return _gated(form, _spread(form.by, {}, jnp.ndim(x)), x, lambda x, weight: _convolution(eqn, x, weight))
    if isinstance(form, Scaled):
        (_, feature, *_), (out, inputs, *_), (_, out_feature, *_) = eqn.params["dimension_numbers"]
        by, rank = form.by, jnp.ndim(x)
        if by.varies <= {out}:
            return _convolution(eqn, x, form.of) * _spread(by, {out: out_feature}, rank)
        if by.varies <= {inputs} and eqn.params["feature_group_count"] == 1:
            return _convolution(eqn, x * _spread(by, {inputs: feature}, rank), form.of)
    return bind(eqn, [x, weight.value])[0]


def _rows(eqn: Any, indices: Sequence[Any], table: Weight) -> Any:
    """Rows of a table that is a sum of tables, or a number times one."""
    form = table.form
    if isinstance(form, Complex):
        parts = [None if part is None else _rows(eqn, indices, part) for part in (form.real, form.imag)]
        zeros = jnp.zeros_like(next(part for part in parts if part is not None))
        return jax.lax.complex(*(zeros if part is None else part for part in parts))
    if isinstance(form, Sum):
        results = [_rows(eqn, indices, part) for part in form.parts]
        return sum(results[1:], start=results[0])
    if isinstance(form, Scaled) and not form.by.varies:
        result = _rows(eqn, indices, form.of)
        return result * _spread(form.by, {}, jnp.ndim(result))
    return bind(eqn, [table.value, *indices])[0]


def _spread(by: Weight, places: dict[int, int], rank: int) -> Array:
    """A scale as an array of this rank, with its axes that vary at these places."""
    value = jnp.asarray(by.value)
    axes = sorted(by.varies)
    value = value[tuple(slice(None) if a in by.varies else 0 for a in range(value.ndim))]
    order = sorted(range(len(axes)), key=lambda i: places[axes[i]])
    shape = [1] * rank
    for i in order:
        shape[places[axes[i]]] = value.shape[i]
    return jnp.transpose(value, order).reshape(shape)


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
