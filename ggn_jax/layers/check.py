"""Checks without an oracle: do examples depend on each other, and do the layers found explain the gradient?"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, count
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from ggn_jax._checks import are_known, compute_dtype, is_concrete, wide_dtype
from ggn_jax._fusion import stack_scalars
from ggn_jax._sharding import NOT_SHARDED, compiler_sharded
from ggn_jax._unbatched import batch_axes, batched_leaves, map_batched
from ggn_jax.layers.capture import capture
from ggn_jax.layers.jaxprs import narrowed_dtypes
from ggn_jax.layers.noise import hash_bits, noise
from ggn_jax.layers.plan import Plan
from ggn_jax.layers.trace import Trace
from ggn_jax.layers.uses import Use

NUM_CHECKED_EXAMPLES = 4


def check_independent(
    model_fn: Any,
    params: PyTree[Array],
    inputs: PyTree[Array],
    dtype: Any,
    way_out: str = "",
    *,
    examples: int = NUM_CHECKED_EXAMPLES,
    allow_nan: bool = False,
) -> None:
    """Refuse a model whose examples depend on each other, if values are known; `dtype` is that of its outputs.

    `way_out` says what to do if they are meant to, where that is possible.
    """
    if not batched_leaves(inputs):
        raise ValueError("inputs must hold an array, since model_fn is called on parts of the batch; got none.")
    if not are_known((params, inputs, model_fn)):
        return

    def measure(given: bool) -> tuple[float, bool, bool]:
        *passes, alike = _batched_and_single(model_fn, params, inputs, examples, jnp.asarray(given))
        if is_concrete(alike):
            return *_coupling_gap(*passes), bool(alike)
        with jax.ensure_compile_time_eval():  # constants are known under `jit` as well
            *passes, alike = _batched_and_single(model_fn, params, inputs, examples, jnp.asarray(given))
            return *_coupling_gap(*passes), bool(alike)

    gap, is_nan, alike = measure(True)
    if alike:
        # Two equal examples may hide that they depend on each other. But equal values may also be how they do (group
        # numbers), and other values may be outside of the model's domain: so the check is made with both.
        other_gap, other_is_nan, _ = measure(False)
        if not other_is_nan:
            gap = float(np.nanmax([gap, other_gap]))
        is_nan &= other_is_nan
    # The square root, since accelerators may multiply a batch in lower precision; batch statistics change outputs by
    # far more.
    if gap > tolerance(dtype, *(leaf.dtype for leaf in jax.tree.leaves(params))) ** 0.5:
        raise ValueError(coupling_message(gap, way_out))
    if is_nan and not allow_nan:
        raise ValueError(
            "the outputs of model_fn are NaN for the first examples, or their gradients: check params and inputs."
        )


class _Pass(NamedTuple):
    """The outputs of a batch, and the parameters' gradient for a random cotangent of them."""

    outputs: Any
    gradient: Any


def _as_parameters(model_fn: Any, params: PyTree, *_: Any) -> tuple[_Pass, _Pass, Any]:
    found = _Pass(NOT_SHARDED, params)
    return found, found, NOT_SHARDED


@eqx.filter_jit
@partial(compiler_sharded, like=_as_parameters)
def _batched_and_single(
    model_fn: Any, params: PyTree[Array], inputs: PyTree[Array], examples: int, given: Array
) -> tuple[_Pass, _Pass, Bool[Array, ""]]:
    """A few examples as a batch, and mapped; and whether some of them are alike, so that other values are of use.

    With `given`, the examples are taken as they are; else with other values where they are alike.
    """
    few = first_examples(inputs, examples)
    others = with_distinct_values(few)
    pairs = list(zip(jax.tree.leaves(few), jax.tree.leaves(others), strict=True))
    alike = jnp.any(jnp.stack([jnp.any(x != other) for x, other in pairs]))
    few = jax.tree.map(lambda x, other: jnp.where(given, x, other), few, others)

    def per_example(params: PyTree, inputs: PyTree) -> Array:
        def one(x: PyTree) -> Array:
            return model_fn(params, map_batched(lambda leaf: leaf[None], x))[0]

        try:
            return jax.vmap(one, [batch_axes(inputs)])(inputs)
        except NotImplementedError:  # of JAX, for `jax.lax.ragged_dot`
            numbers = jnp.arange(batched_leaves(inputs)[0].shape[0])
            return jax.lax.map(lambda i: one(map_batched(lambda x: x[i], inputs)), numbers)

    def run(fn: Callable[[PyTree, PyTree], Array]) -> _Pass:
        outputs, vjp = jax.vjp(lambda params: fn(params, few), params)
        return _Pass(outputs, vjp(_random_cotangent(outputs))[0])

    return run(model_fn), run(per_example), alike


def _coupling_gap(together: _Pass, apart: _Pass) -> tuple[float, bool]:
    """How far examples depend on each other, as far as can be told, and whether something is NaN.

    The largest of all parameters' gaps also tells what does not show in the outputs, such as batch statistics before a
    head that starts at 0. Arrays are compared one by one: in one program, the comparisons of a deep model's parameters
    take longer to build than both passes do.
    """
    a, b = jax.tree.leaves(together.gradient), jax.tree.leaves(apart.gradient)
    squares = np.array([_compare(*pair) for pair in zip(a, b, strict=True)], float).reshape(-1, 3)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in [together.outputs, *a])
    with np.errstate(all="ignore"):
        gaps, *sizes = np.sqrt(squares.T)
        least = eps**0.5 * np.linalg.norm(sizes[0])
        sizes = np.maximum(np.maximum(*sizes), least)
        gap_of_gradient = np.max(np.where(sizes == 0, 0, gaps / sizes), initial=0)
    found = [float(_output_gap_or_inf(together.outputs, apart.outputs)), float(gap_of_gradient)]
    known = [gap for gap in found if not np.isnan(gap)]
    return max(known, default=np.nan), len(known) < len(found)


@jax.jit
@compiler_sharded
def _compare(a: Array, b: Array) -> Float[Array, "3"]:
    """The squared norms of a difference and of both."""
    wide = wide_dtype([a, b])
    a, b = a.astype(wide), b.astype(wide)
    return jnp.stack([jnp.sum(jnp.square(x)) for x in (a - b, a, b)])


@jax.jit
@compiler_sharded
def _output_gap_or_inf(together: Array, apart: Array) -> Float[Array, ""]:
    gap = output_gap(together, apart)
    # As with batch statistics of one example: only the batch has values.
    lost = jnp.isnan(gap) & jnp.all(jnp.isfinite(together))
    return jnp.where(lost, jnp.inf, gap)


def first_examples(inputs: PyTree[Array], count: int) -> PyTree[Array]:
    """The first `count` examples, repeated if there are fewer."""

    def first(x: Array) -> Array:
        few = jnp.asarray(x[:count])
        return few if len(few) == count else jnp.concatenate([few] * count)[:count]

    return map_batched(first, inputs)


def with_distinct_values(inputs: PyTree[Array]) -> PyTree[Array]:
    """The examples, with other values in arrays in which two of them are equal.

    Equal examples hide that they depend on each other. Floating numbers get positive noise of their own size; integers
    are drawn from those present and 0 (from 0 and 1 if all are 0); truth values are drawn, and keys folded.
    """
    numbers = count(1)
    return map_batched(lambda x: _with_distinct_values(x, next(numbers)), inputs)


def _with_distinct_values(x: Array, number: int) -> Array:
    if not x.size:
        return x
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    rows = (jax.random.key_data(x) if is_key else x).reshape(len(x), -1)
    alike = jnp.any(jnp.stack([jnp.all(rows[i] == rows[j]) for i, j in combinations(range(len(x)), 2)]))
    if is_key:
        split = jax.vmap(jax.random.fold_in)(x.reshape(-1), jnp.arange(x.size, dtype=jnp.uint32)).reshape(x.shape)
        return jnp.where(alike, split, x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        size = jnp.max(jnp.abs(x))
        more = jnp.abs(noise(x.shape, compute_dtype(jnp.finfo(x.dtype).dtype), number))
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            more = jax.lax.complex(more, more[::-1])
        other = x + (jnp.where(size > 0, size, 1).astype(more.dtype) * more).astype(x.dtype)
    else:
        drawn = rows.reshape(-1)[hash_bits(x.shape, number) % np.uint32(x.size)]
        bits = (hash_bits(x.shape, number) >> np.uint32(31)).astype(x.dtype)
        other = bits if x.dtype == bool else jnp.where(jnp.all(x == 0), bits, jnp.where(bits == 0, 0, drawn))
    return jnp.where(alike, other, x)


COUPLED_WAY_OUT = "pass examples='coupled'"


def coupling_message(gap: float, way_out: str) -> str:
    """What to do about examples that depend on each other."""
    meant = way_out and f"; or, if it is meant, {way_out}"
    return (
        f"the outputs of a batch differ from those of its examples one by one (relative distance {gap:.1e}):"
        " model_fn couples examples, as batch normalisation in training mode does, or draws the same dropout for each"
        f" of them. Switch both to evaluation, or pass a key per example in the inputs{meant}."
    )


def _random_cotangent(outputs: Array) -> Array:
    return noise(outputs.shape, compute_dtype(outputs.dtype)).astype(outputs.dtype)


def output_gap(together: Array, apart: Array) -> Array:
    """How far the outputs of a batch are from those of its examples one by one, relative to their size."""
    same = together == apart  # also where both are infinite
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(together), together, 0).astype(compute_dtype(together.dtype)))
    return _distances([jnp.where(same, 0, together)], [jnp.where(same, 0, apart)], size)[0]


def _squares(leaves: Sequence[Array]) -> Float[Array, " n"]:
    """The squared norm of each array."""
    wide = wide_dtype(leaves)
    return stack_scalars([jnp.sum(jnp.square(leaf.astype(wide))) for leaf in leaves])


def _distances(a: Sequence[Array], b: Sequence[Array], least: Array) -> Float[Array, " n"]:
    """How far two lists of arrays are from each other, relative to the larger ones and to `least`."""
    wide = wide_dtype([*a, *b])
    a, b = ([leaf.astype(wide) for leaf in leaves] for leaves in (a, b))
    gaps = jnp.sqrt(_squares([x - y for x, y in zip(a, b, strict=True)]))
    sizes = jnp.maximum(jnp.sqrt(jnp.maximum(_squares(a), _squares(b))), least.astype(wide))
    return jnp.where(sizes == 0, 0, gaps / jnp.where(sizes == 0, 1, sizes))


def tolerance(*dtypes: jnp.dtype) -> float:
    """What rounding may amount to, in the coarsest of these dtypes."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return min(1000 * eps, 0.1)


def dtypes_of(trace: Trace) -> set[Any]:
    """The dtypes that a model computes in, and those that it rounds to in between."""
    computed = {*trace.dtypes, trace.outputs.dtype, *(use.output_dtype for use in trace.uses)}
    return computed | narrowed_dtypes(trace.closed)


class _Pair(NamedTuple):
    """Gradients to compare, flat or not."""

    found: Array
    wanted: Array
    squares: Array
    """The sum of the squares of what was added up: the gap's unit where the sum cancels."""
    leaves: tuple[int, ...]
    """The indices of the parameters."""


class _LayerGradient(NamedTuple):
    """What a use of a layer adds to the gradients, and the squares of its parts."""

    weight: Float[Array, "G out in"]
    weight_squares: Float[Array, ""]
    bias: Float[Array, "G out"]
    bias_squares: Float[Array, ""]


def compare_gradients(
    trace: Trace,
    plan: Plan,
    model_fn: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    inputs: PyTree,
    tolerance: float,
) -> tuple[Array, Float[Array, " 1+leaves"]]:
    """The outputs of a batch; their gap to those of its examples one by one; and, for each parameter, the gap between
    the gradient made from layers and that of the batch by automatic differentiation.

    The gradient is that of the outputs times a random cotangent. Gaps are relative to its size; or to what its parts
    would amount to if they did not cancel, as those of a bias before a normalisation do; or to the size at which a gap
    of `tolerance` is no more than rounding of the whole gradient.
    """
    unassigned = [parameter.leaf for parameter in plan.unassigned]
    captured = capture(trace, params, inputs, unassigned)
    together, vjp = jax.vjp(lambda params: model_fn(params, inputs), params)
    vector = _random_cotangent(together)
    output_grads, per_example = captured.vjp(vector)
    wide = compute_dtype(together.dtype)
    wanted = [leaf.reshape(-1).astype(wide) for leaf in jax.tree.leaves(vjp(vector)[0])]
    sizes = [leaf.size for leaf in wanted]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes_of(trace))
    least = 32 * eps / tolerance * jnp.sqrt(jnp.sum(_squares(wanted)))

    pairs: list[_Pair] = []
    for layer in plan.layers:
        parts = [_layer_gradient(trace.uses[n], captured.inputs[n], output_grads[n], wide) for n in layer.uses]
        weights = [
            part.weight.swapaxes(1, 2) if s else part.weight for part, s in zip(parts, layer.swapped, strict=True)
        ]
        found = [(layer.weight, weights, [part.weight_squares for part in parts])]
        if layer.bias is not None:
            found.append((layer.bias, [part.bias for part in parts], [part.bias_squares for part in parts]))
        for view, gradients, squares in found:
            owners = view.entries.owning_leaves(sizes)
            flat = jnp.concatenate(wanted[owners[0] : owners[-1] + 1])
            read = view.entries.shifted(-sum(sizes[: owners[0]])).gather_fn(flat.size)
            mine = sum(gradients[1:], gradients[0]).reshape(view.entries.shape)
            pairs.append(_Pair(mine, read(flat), sum(squares[1:], squares[0]), owners))
    for leaf, gradient in zip(unassigned, per_example, strict=True):
        gradient = gradient.reshape(len(gradient), -1).astype(wide)
        pairs.append(_Pair(jnp.sum(gradient, axis=0), wanted[leaf], jnp.sum(jnp.square(gradient)), (leaf,)))
    size = jnp.maximum(least, jnp.sqrt(stack_scalars([pair.squares for pair in pairs])))
    distances = _distances([pair.found for pair in pairs], [pair.wanted for pair in pairs], size)
    rows, owned = zip(*((row, leaf) for row, pair in enumerate(pairs) for leaf in pair.leaves), strict=True)
    gaps = jnp.zeros(len(sizes), distances.dtype).at[np.array(owned)].max(distances[np.array(rows)])
    return together, jnp.concatenate([output_gap(together, captured.outputs)[None], gaps])


def _layer_gradient(use: Use, inputs: Array, output_grads: Array, dtype: Any) -> _LayerGradient:
    a, g = use.arrange_inputs(inputs), use.arrange_output_grads(output_grads).astype(dtype)
    squares = jnp.sum(jnp.square(g), axis=-1)
    if use.kind == "embedding":
        rows = use.weight.shape[2]
        index = jnp.clip(a, 0, rows - 1)
        kept = (index == a) | (not use.fills)
        added = jnp.where(kept[..., None], g, 0).reshape(len(g), -1, g.shape[-1])
        number = index.reshape(len(g), -1)
        weight = jax.vmap(lambda g, n: jnp.zeros((rows, g.shape[-1]), dtype).at[n].add(g))(added, number)
        weight, size = weight.swapaxes(1, 2), jnp.sum(squares)
    else:
        a = a.astype(dtype)
        weight = jnp.einsum("gnso,gnsi->goi", g, a)
        size = jnp.sum(squares * jnp.sum(jnp.square(a), axis=-1))
    return _LayerGradient(weight, size, jnp.sum(g, axis=(1, 2)), jnp.sum(squares))
