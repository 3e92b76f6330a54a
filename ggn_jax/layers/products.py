"""Products of data with computed weights, as products with what these weights are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ggn_jax.layers.convolution import CONVOLUTION
from ggn_jax.layers.jaxprs import bind
from ggn_jax.layers.ragged import by_row
from ggn_jax.layers.weights import (
    ADDITIONS,
    DOTS,
    GATHERS,
    Complex,
    ComplexParts,
    Gated,
    Product,
    Scaled,
    StraightThrough,
    Sum,
    Weight,
    array_of,
    broadcast_scale,
    is_complex,
    map_complex_parts,
    rank_of,
)


def distributed_product(eqn: Any, values: list[Any], number: int) -> Any:
    """The result of an equation of data and a weight, operand `number`; None if it is not such a product."""
    name, params = eqn.primitive.name, eqn.params
    weight, x = values[number], values[1 - number]
    if weight.form is None and (is_complex(weight) or not jnp.iscomplexobj(array_of(x))):
        return None  # nothing to distribute
    if name in DOTS and params.get("out_sharding") is None:
        (contract, batch) = params["dimension_numbers"]
        options = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}
        dot = Dot(tuple(contract[1 - number]), tuple(contract[number]), tuple(batch[1 - number]), tuple(batch[number]))
        result = dot(x, weight, options)
        if number == 0:  # `Dot` puts the free axes of the data first, the equation those of operand 0
            lead, free = len(dot.batch), jnp.ndim(array_of(x)) - len(dot.batch) - len(dot.axes)
            axes = range(jnp.ndim(array_of(result)))
            order = [*axes[:lead], *axes[lead + free :], *axes[lead : lead + free]]
            result = map_complex_parts(lambda x: jnp.transpose(x, order), result)
        return result
    if name in CONVOLUTION and number == 1 and params["batch_group_count"] == 1:
        return _convolution(eqn, array_of(x), weight)
    if name in GATHERS and number == 0:
        return _rows(eqn, list(map(array_of, values[1:])), weight)
    if name in ADDITIONS and isinstance(weight.form, Gated):
        of = weight.form.of.value
        return _plus_zero_with_gradient(array_of(x) + jax.lax.stop_gradient(of), of, weight.form.by.value)
    return None


def _gated(form: Gated, by: Array, x: Array, product: Callable[[Array, Weight], Array]) -> Array:
    """The product with a constant weight, plus 0 with the derivative in the weight, where `by` (of the result) is true.

    The added product has the output's cotangent where the branch is taken, and 0 elsewhere: what the weight's output
    gradients are. Its value cancels, so the result stays the equation's to the last bit.
    """
    still = Weight(jax.lax.stop_gradient(form.of.value), frozenset(), form.of.varies)
    return _plus_zero_with_gradient(product(x, still), product(jax.lax.stop_gradient(x), form.of), by)


def _straight_through(
    form: StraightThrough, weight: Weight, x: Array, product: Callable[[Array, Weight], Array]
) -> Array:
    """The product with the weight's value, with the derivative of the product with what it is an estimator of.

    So that is a layer, with the inputs and output gradients that the rule gives it; the data's gradient is through the
    weight's value.
    """
    still = Weight(jax.lax.stop_gradient(weight.value), frozenset(), weight.varies)
    return _value_with_gradient_of(product(x, still), product(jax.lax.stop_gradient(x), form.of))


@jax.custom_vjp
def _value_with_gradient_of(value: Array, of: Array) -> Array:
    return value


_value_with_gradient_of.defvjp(lambda value, of: (value, None), lambda _, g: (g, g))


def _plus_zero_with_gradient(value: Array, of: Array, by: Array) -> Array:
    """A value that does not depend on `of`, with a derivative of 1 in it where `by` is true."""
    return value + jnp.where(by, of - jax.lax.stop_gradient(of), 0)


@dataclass(frozen=True)
class Dot:
    """A product of data with a weight: the contracted and the batched axes of each."""

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
            results = [array_of(self(x, part, options)) for part in form.parts]
            return sum(results[1:], start=results[0])
        if isinstance(form, Scaled):
            scaled = self._scaled(x, form, options)
            if scaled is not None:
                return scaled
        if isinstance(form, Gated) and form.by.varies <= set(self.weight_batch):
            lead, rank = (
                len(self.batch),
                jnp.ndim(array_of(x)) - len(self.axes) + rank_of(weight) - len(self.weight_axes),
            )
            by = broadcast_scale(form.by, {a: i for i, a in enumerate(self.weight_batch)}, rank - lead)
            return _gated(form, by, array_of(x), lambda x, weight: array_of(self(x, weight, options)))
        if isinstance(form, StraightThrough):
            return _straight_through(form, weight, array_of(x), lambda x, weight: array_of(self(x, weight, options)))
        if isinstance(form, Product) and not self.batch:
            chained = self._chained(array_of(x), form, options)
            if chained is not None:
                return chained
        x = array_of(x) if is_complex(weight) else x
        wanted = options["preferred_element_type"]
        if not is_complex(weight) and (jnp.iscomplexobj(array_of(x)) or jnp.issubdtype(wanted, jnp.complexfloating)):
            return self._complex(x, Complex(weight, None), options)
        numbers = (self.axes, self.weight_axes), (self.batch, self.weight_batch)
        return jax.lax.dot_general(x, weight.value, numbers, **options)

    def _complex(self, x: Any, form: Complex, options: dict[str, Any]) -> ComplexParts:
        """By real products: the gradient of a real weight is a real part, which is not one product of complex numbers.

        Each of the four products is a use of a real weight of its own, with real inputs and output gradients.
        """
        if isinstance(x, ComplexParts):
            real, imag = x.real, x.imag
        else:
            real, imag = (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x, None)
        wanted = options["preferred_element_type"]
        options = {**options, "preferred_element_type": None if wanted is None else jnp.finfo(wanted).dtype}
        pairs = [(real, form.real), (imag, form.imag), (real, form.imag), (imag, form.real)]
        parts = [None if x is None or weight is None else self(x, weight, options) for x, weight in pairs]
        zeros = jnp.zeros_like(next(part for part in parts if part is not None))
        rr, ii, ri, ir = (zeros if part is None else part for part in parts)
        return ComplexParts(jax.lax.complex(rr - ii, ri + ir), rr - ii, ri + ir)

    def _scaled(self, x: Array, form: Scaled, options: dict[str, Any]) -> Array | None:
        by, rank = form.by, rank_of(form.of)
        if by.varies <= set(self.weight_axes):
            target_axes = dict(zip(self.weight_axes, self.axes, strict=True))
            x = array_of(x)
            return array_of(self(x * broadcast_scale(by, target_axes, jnp.ndim(x)), form.of, options))
        if not by.varies & set(self.weight_axes):
            free = [a for a in range(rank) if a not in (*self.weight_axes, *self.weight_batch)]
            lead = jnp.ndim(array_of(x)) - len(self.axes)  # batch axes, and the free ones of x
            target_axes = {a: i for i, a in enumerate(self.weight_batch)} | {a: lead + i for i, a in enumerate(free)}
            return array_of(self(x, form.of, options)) * broadcast_scale(by, target_axes, lead + len(free))
        return None

    def _chained(self, x: Array, form: Product, options: dict[str, Any]) -> Array | None:
        """`x (U V)` as `(x U) V`: first the factor that has all contracted axes, then the other one.

        None if the contracted axes are of both factors: then no order makes two products of data with parameters.
        """
        factor_axes = form.factor_axes()
        for i, near in enumerate((form.first, form.second)):
            far = (form.first, form.second)[1 - i]
            of_near = [place for place, (factor, _) in enumerate(factor_axes) if factor == i]
            if set(of_near) != set(self.weight_axes):
                continue
            # x with the near factor: [*free axes of x, *axes that the factors share].
            hidden = Dot(self.axes, tuple(factor_axes[a][1] for a in self.weight_axes))(x, near, options)
            shared = [a for a in range(rank_of(near)) if a in form.axes[i]]
            matching = tuple(form.axes[1 - i][form.axes[i].index(a)] for a in shared)
            rank = jnp.ndim(array_of(hidden))
            first = rank - len(shared)
            result = Dot(tuple(range(first, rank)), matching)(hidden, far, options)
            # The far factor's free axes are in its own order; the result has them in the weight's.
            own = [a for a in range(rank_of(far)) if a not in form.axes[1 - i]]
            order = [own.index(a) for factor, a in factor_axes if factor != i]
            return jnp.transpose(array_of(result), [*range(first), *(first + place for place in order)])
        return None


def ragged_product(eqn: Any, x: Any, weights: Weight, sizes: Any) -> Array:
    """The result of an equation of `ragged` for which `is_by_row` holds, with the matrices `weights`."""
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}

    def dot(x: Array, axis: int, inputs: int, group: int) -> Array:
        return array_of(Dot((axis,), (inputs,), (0,), (group,))(x, weights, options))

    return by_row(eqn, array_of(x), eqn.invars[2].aval.shape[0], array_of(sizes), dot)


def _convolution(eqn: Any, x: Array, weight: Weight) -> Any:
    """A convolution of data with a kernel of a form; a product of parameters has none that is a convolution."""
    form = weight.form
    if isinstance(form, Sum):
        results = [_convolution(eqn, x, part) for part in form.parts]
        return sum(results[1:], start=results[0])
    if isinstance(form, StraightThrough):
        return _straight_through(form, weight, x, lambda x, weight: _convolution(eqn, x, weight))
    if isinstance(form, Gated) and not form.by.varies:
        return _gated(
            form, broadcast_scale(form.by, {}, jnp.ndim(x)), x, lambda x, weight: _convolution(eqn, x, weight)
        )
    if isinstance(form, Scaled):
        (_, feature, *_), (out, inputs, *_), (_, out_feature, *_) = eqn.params["dimension_numbers"]
        by, rank = form.by, jnp.ndim(x)
        if by.varies <= {out}:
            return _convolution(eqn, x, form.of) * broadcast_scale(by, {out: out_feature}, rank)
        if by.varies <= {inputs} and eqn.params["feature_group_count"] == 1:
            return _convolution(eqn, x * broadcast_scale(by, {inputs: feature}, rank), form.of)
    return bind(eqn, [x, weight.value])[0]


def _rows(eqn: Any, indices: Sequence[Any], table: Weight) -> Any:
    """Rows of a table that has a form, as rows of the tables that it is made of."""
    form = table.form
    if isinstance(form, Complex):
        parts = [None if part is None else _rows(eqn, indices, part) for part in (form.real, form.imag)]
        zeros = jnp.zeros_like(next(part for part in parts if part is not None))
        return jax.lax.complex(*(zeros if part is None else part for part in parts))
    if isinstance(form, Sum):
        results = [_rows(eqn, indices, part) for part in form.parts]
        return sum(results[1:], start=results[0])
    if isinstance(form, StraightThrough):
        still = bind(eqn, [jax.lax.stop_gradient(table.value), *indices])[0]
        return _value_with_gradient_of(still, array_of(_rows(eqn, indices, form.of)))
    if isinstance(form, Scaled) and not form.by.varies:
        result = _rows(eqn, indices, form.of)
        return result * broadcast_scale(form.by, {}, jnp.ndim(result))
    return bind(eqn, [table.value, *indices])[0]
