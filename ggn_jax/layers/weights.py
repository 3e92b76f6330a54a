"""Values that depend on parameters and constants alone, and what they were made of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ggn_jax.layers.jaxprs import bind

ADDITIONS = frozenset({"add", "add_any"})
DOTS = frozenset({"dot_general"})
GATHERS = frozenset({"gather"})
SELECTS = frozenset({"select_n"})
UNSTACKS = frozenset({"unstack"})
WITHOUT_DERIVATIVE = frozenset({"stop_gradient"})
CASTS = frozenset({"convert_element_type", "pvary", "copy", "copy_p"})
# Moves that can be applied to the factors of an elementwise product one by one.
MOVES = frozenset({"transpose", "reshape", "broadcast_in_dim", "squeeze", "slice", "rev"}) | CASTS
ELEMENTWISE = CASTS | {"add", "sub", "mul", "div", "neg", "abs", "max", "min", "square", "integer_pow", "pow"}
ELEMENTWISE |= {"exp", "exp2", "log", "log1p", "tanh", "logistic", "sqrt", "rsqrt"}


@dataclass(frozen=True, eq=False)
class ParameterBox:
    """Entries of a parameter: all of an array that it came in as, or a box of it."""

    leaf: int
    array: object
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Its first indices, and those it stops before."""

    def is_disjoint(self, other: "ParameterBox") -> bool:
        """Whether it is known to share no entry with another box."""
        if self.leaf != other.leaf:
            return True
        if self.array is not other.array or self.box is None or other.box is None:
            return False
        (starts, stops), (begins, ends) = self.box, other.box
        return any(a >= d or c >= b for a, b, c, d in zip(starts, stops, begins, ends, strict=True))


@dataclass(frozen=True, eq=False)
class Weight:
    """A value that depends on parameters and constants alone, and what it was made of."""

    value: Any
    boxes: frozenset[ParameterBox]
    varies: frozenset[int]
    """The axes along which its entries may differ; along the others it is constant."""
    form: "Form | None" = None
    provenance: tuple[Any, ...] = field(default_factory=lambda: (object(),))
    """Equal for equal values: the array it comes from, and the moves since. JAX arrays cannot be compared for this."""


@dataclass(frozen=True)
class Sum:
    """`sum_i part_i`, no two of which share a parameter."""

    parts: tuple[Weight, ...]


@dataclass(frozen=True)
class Scaled:
    """`of * by`, entry by entry; `by` is a scalar, or has the rank of `of`."""

    of: Weight
    by: Weight


@dataclass(frozen=True)
class Gated:
    """`of`, with a derivative only where `by`, of its shape, is true: the weight of a branch that data choose."""

    of: Weight
    by: Weight


@dataclass(frozen=True)
class StraightThrough:
    """Any value, with the derivative of `of`, which has its shape: a straight-through estimator."""

    of: Weight


@dataclass(frozen=True)
class Complex:
    """`real + i imag`, of real weights; None is 0."""

    real: Weight | None
    imag: Weight | None


@dataclass(frozen=True)
class Product:
    """The contraction of two weights: the free axes of the first, then those of the second, then permuted."""

    first: Weight
    second: Weight
    axes: tuple[tuple[int, ...], tuple[int, ...]]
    order: tuple[int, ...]

    def factor_axes(self) -> list[tuple[int, int]]:
        """For each axis of the result, which factor it comes from, and which axis of that it is."""
        factors = self.first, self.second
        free = [(i, a) for i in (0, 1) for a in range(rank_of(factors[i])) if a not in self.axes[i]]
        return [free[axis] for axis in self.order]


Form = Sum | Scaled | Gated | StraightThrough | Complex | Product


def evaluate_weights(eqn: Any, values: list[Weight]) -> list[Weight]:
    """The results of an equation of weights, with their forms where there are any."""
    if eqn.primitive.name == "integer_pow" and eqn.params["y"] == 1:
        return values
    results = bind(eqn, [value.value for value in values])
    if eqn.primitive.name in WITHOUT_DERIVATIVE:
        return [Weight(results[0], frozenset(), values[0].varies, provenance=values[0].provenance)]
    boxes = frozenset[ParameterBox]().union(*(value.boxes for value in values))
    # Slices of one array are compared by their boxes, so that `w[:2]` and `w[2:]` count as disjoint.
    if eqn.primitive.name == "slice":
        box = tuple(eqn.params["start_indices"]), tuple(eqn.params["limit_indices"])
        whole = [values[0].provenance == (piece.array,) for piece in boxes]
        boxes = frozenset(replace(p, box=box) if is_whole else p for p, is_whole in zip(boxes, whole, strict=True))
    if len(results) > 1:
        return [as_weight(result, boxes) for result in results]
    result = Weight(results[0], boxes, _varies(eqn, values, results[0]), _form(eqn, values) if boxes else None)
    if len(values) == 1 and eqn.primitive.name in MOVES:
        result = replace(result, provenance=(*values[0].provenance, eqn.primitive.name, str(eqn.params)))
    return [result]


def _form(eqn: Any, values: list[Weight]) -> Form | None:
    name = eqn.primitive.name
    if name == "neg":
        return Scaled(values[0], _number(-1, values[0]))
    if len(values) == 1:
        return _moved_form(eqn, values[0]) if name in MOVES else None
    if len(values) != 2 or not are_disjoint(*values):
        # `x (W + W V)` would make two uses of W whose inputs are the same data: two Kronecker terms, whose cross terms
        # are lost. As one computed weight, it gets an exact block or diagonal instead.
        return None
    first, second = values
    if name == "complex":
        return Complex(first, second)
    if name in ADDITIONS | {"sub"}:
        shape = eqn.outvars[0].aval.shape
        if isinstance(first.form, Complex) and isinstance(second.form, Complex) and name != "sub":
            return Complex(
                _sum_of_parts(first.form.real, second.form.real), _sum_of_parts(first.form.imag, second.form.imag)
            )
        return Sum((_broadcast(first, shape), _broadcast(_negative(second) if name == "sub" else second, shape)))
    if name == "div" and first.boxes and _broadcasts_to(second, first):
        return Scaled(first, Weight(1 / second.value, second.boxes, second.varies))
    if name == "mul":
        for number, weight in (values, values[::-1]):
            # As in `a + 1j * b`: a literal without a real part.
            is_number = not isinstance(number.value, jax.Array) and not jnp.shape(number.value)
            if isinstance(weight.form, Complex) and is_number and complex(number.value).real == 0:
                by, parts = complex(number.value).imag, weight.form
                return Complex(parts.imag and _scaled_by(parts.imag, -by), parts.real and _scaled_by(parts.real, by))
        # Either may be the scale. The one that varies along fewer axes can be moved out of more products.
        pairs = [(x, y) for x, y in ((first, second), (second, first)) if x.boxes and _broadcasts_to(y, x)]
        return Scaled(*min(pairs, key=lambda pair: len(pair[1].varies))) if pairs else None
    if name in DOTS and eqn.params["dimension_numbers"][1] == ((), ()):
        axes = tuple(map(tuple, eqn.params["dimension_numbers"][0]))
        rank = len(eqn.outvars[0].aval.shape)
        return Product(first, second, axes, tuple(range(rank)))  # type: ignore[arg-type]  # two of them
    return None


def _sum_of_parts(a: Weight | None, b: Weight | None) -> Weight | None:
    if a is None or b is None:
        return b if a is None else a
    parts = _broadcast(a, shape := jnp.shape(a.value + b.value)), _broadcast(b, shape)
    return Weight(a.value + b.value, a.boxes | b.boxes, a.varies | b.varies, Sum(parts))


def _scaled_by(weight: Weight, number: float) -> Weight:
    by = _number(number, weight)
    return Weight(weight.value * by.value, weight.boxes, weight.varies, Scaled(weight, by)) if number != 1 else weight


def gate(which: Any, cases: list[Weight], varies: frozenset[int]) -> Weight | None:
    """The choice, by data, of a weight or constant copies of it; None if it is another choice.

    `vmap` makes them where it turns branches chosen by data into selections: the branch with the weight, and those that
    pass on a copy behind `stop_gradient`. `varies` are the axes along which the choice may differ.
    """
    live = [number for number, case in enumerate(cases) if case.boxes]
    if len(live) != 1 or any(case.provenance != cases[live[0]].provenance for case in cases):
        return None
    weight = cases[live[0]]
    value = jax.lax.select_n(which, *(case.value for case in cases))
    chosen = jnp.broadcast_to(which == jnp.asarray(live[0]).astype(which.dtype), jnp.shape(value))
    return Weight(value, weight.boxes, weight.varies, Gated(weight, Weight(chosen, frozenset(), varies)))


def _broadcasts_to(by: Weight, weight: Weight) -> bool:
    """Whether `by` is a scalar, or has axes that are equal to the weight's or of length 1."""
    small, large = jnp.shape(by.value), jnp.shape(weight.value)
    return not small or (len(small) == len(large) and all(m in (1, n) for m, n in zip(small, large, strict=True)))


def _broadcast(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """A weight, broadcast; its own form is of another shape, and is dropped."""
    if jnp.shape(weight.value) == shape:
        return weight
    return Weight(jnp.broadcast_to(weight.value, shape), weight.boxes, weight.varies)


def _moved_form(eqn: Any, value: Weight) -> Form | None:
    """The form of a weight that is moved, or cast to a type that is no narrower."""
    form, name = value.form, eqn.primitive.name
    before, after = (jnp.dtype(var.aval.dtype) for var in (eqn.invars[0], eqn.outvars[0]))
    if before != after and not (
        jnp.issubdtype(before, jnp.inexact) and jnp.finfo(before).bits <= jnp.finfo(after).bits
    ):
        return None
    if jnp.issubdtype(after, jnp.complexfloating) and not is_complex(value):
        return Complex(value, None) if before == jnp.finfo(after).dtype else None
    if form is None:
        return None

    def move(part: Weight) -> Weight:
        return evaluate_weights(eqn, [part])[0]

    if isinstance(form, Sum):
        return Sum(tuple(map(move, form.parts)))
    if isinstance(form, Scaled):
        if not jnp.shape(form.by.value) and name not in CASTS:
            return Scaled(move(form.of), form.by)
        # A reshape may merge axes along which `by` has length 1, so it is broadcast before it is moved.
        return Scaled(move(form.of), move(_broadcast(form.by, jnp.shape(form.of.value))))
    if isinstance(form, Complex):
        parts = [part and move(part) for part in (form.real, form.imag)]
        return Complex(*parts) if before == after else None
    if isinstance(form, StraightThrough):
        return StraightThrough(move(form.of))
    if isinstance(form, Gated):
        return Gated(move(form.of), form.by if name in CASTS else move(form.by))
    if name in CASTS:
        return Product(move(form.first), move(form.second), form.axes, form.order)
    if name == "transpose":
        return Product(form.first, form.second, form.axes, tuple(form.order[a] for a in eqn.params["permutation"]))
    return None


def _varies(eqn: Any, values: list[Weight], result: Any) -> frozenset[int]:
    """The axes along which the result of an equation may differ; all of them where the equation does not tell."""
    name, shape = eqn.primitive.name, jnp.shape(result)
    if name in ELEMENTWISE and all(jnp.ndim(value.value) in (0, len(shape)) for value in values):
        return frozenset[int]().union(*(value.varies for value in values))
    if name == "broadcast_in_dim":
        return frozenset(eqn.params["broadcast_dimensions"][axis] for axis in values[0].varies)
    if name == "transpose":
        return frozenset(i for i, axis in enumerate(eqn.params["permutation"]) if axis in values[0].varies)
    if name in ("reshape", "squeeze"):
        long = [i for i, size in enumerate(jnp.shape(values[0].value)) if size > 1]
        longer = [i for i, size in enumerate(shape) if size > 1]
        if [jnp.shape(values[0].value)[i] for i in long] == [shape[i] for i in longer]:
            return frozenset(new for old, new in zip(long, longer, strict=True) if old in values[0].varies)
    return _all_axes(result)


def are_weights(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Weight) for value in values)


@dataclass(frozen=True)
class ComplexParts:
    """Complex data, and their real and imaginary parts; None is 0."""

    value: Any
    real: Any
    imag: Any


def map_complex_parts(fn: Callable[[Any], Any], x: Any) -> Any:
    """A function of data that acts on real and imaginary parts alike."""
    if not isinstance(x, ComplexParts):
        return fn(x)
    return ComplexParts(fn(x.value), fn(x.real), None if x.imag is None else fn(x.imag))


def array_of(value: Any) -> Any:
    return value.value if isinstance(value, Weight | ComplexParts) else value


def as_weight(value: Any, boxes: frozenset[ParameterBox] = frozenset()) -> Weight:
    return Weight(value, boxes, _all_axes(value))


def parameter_weight(value: Any, leaves: Iterable[int]) -> Weight:
    """The value of these parameters as it enters a jaxpr: a new array, in which boxes can be compared."""
    array = object()
    return replace(as_weight(value, frozenset(ParameterBox(leaf, array) for leaf in leaves)), provenance=(array,))


def are_disjoint(a: Weight, b: Weight) -> bool:
    """Whether two weights share no entry of a parameter."""
    return all(p.is_disjoint(q) for p in a.boxes for q in b.boxes)


def _number(number: float, like: Weight) -> Weight:
    return Weight(jnp.asarray(number, jnp.result_type(like.value)), frozenset(), frozenset())


def _negative(weight: Weight) -> Weight:
    form = Scaled(weight, _number(-1, weight)) if weight.boxes else None
    return Weight(-weight.value, weight.boxes, weight.varies, form)


def is_complex(weight: Weight) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(weight.value), jnp.complexfloating))


def _all_axes(value: Any) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(jnp.shape(value)) if size > 1)


def rank_of(weight: Weight) -> int:
    return jnp.ndim(weight.value)


def broadcast_scale(by: Weight, target_axes: dict[int, int], rank: int) -> Array:
    """A scale as an array of this rank, whose varying axes are these axes of the result; the others have length 1."""
    value = jnp.asarray(by.value)
    axes = sorted(by.varies)
    value = value[tuple(slice(None) if a in by.varies else 0 for a in range(value.ndim))]
    order = sorted(range(len(axes)), key=lambda i: target_axes[axes[i]])
    shape = [1] * rank
    for i in order:
        shape[target_axes[axes[i]]] = value.shape[i]
    return jnp.transpose(value, order).reshape(shape)
