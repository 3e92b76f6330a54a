"""Checks that need no oracle: do examples depend on each other, and do the layers found explain the gradient?"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import compute_dtype, is_concrete, wide_dtype
from ggn_jax._fusion import stack_scalars
from ggn_jax._sharding import compiler_sharded
from ggn_jax.layers.capture import capture
from ggn_jax.layers.plan import Plan
from ggn_jax.layers.trace import Trace

EXAMPLES = 4  # that the checks are made on


def check_independent(
    model_fn: Any,
    params: PyTree[Array],
    inputs: PyTree[Array],
    dtype: Any,
    *,
    examples: int = EXAMPLES,
    allow_nan: bool = False,
) -> None:
    """Refuse a model whose examples depend on each other, where values can be looked at; `dtype` is its outputs'."""
    if not jax.tree.leaves(inputs):
        raise ValueError("inputs must hold an array, since model_fn is called on parts of the batch; got none.")
    leaves = jax.tree.leaves((params, inputs, model_fn))
    if not all(is_concrete(leaf) for leaf in leaves if isinstance(leaf, jax.Array)):
        return

    def measure() -> tuple[Array, Array]:
        return _coupling(model_fn, params, inputs, examples)

    result = measure()
    if not is_concrete(result[0]):
        with jax.ensure_compile_time_eval():  # constants are known inside of `jit`, too
            result = measure()
    gap, is_nan = map(float, result)
    # The root: accelerators may multiply a batch in lower precision, and batch statistics change outputs by far more.
    if gap > tolerance(dtype, *(leaf.dtype for leaf in jax.tree.leaves(params))) ** 0.5:
        raise ValueError(coupling_message(gap))
    if is_nan and not allow_nan:
        raise ValueError(
            "the outputs of model_fn are NaN for the first examples, or their gradients: look at params and inputs."
        )


@eqx.filter_jit
@compiler_sharded
def _coupling(model_fn: Any, params: PyTree[Array], inputs: PyTree[Array], examples: int) -> tuple[Array, Array]:
    """How far examples depend on each other, as far as it is told, and whether something is NaN."""
    inputs = jax.tree.map(lambda x: x[:examples], inputs)
    together, apart = _both_ways(model_fn, params, inputs)
    gap = output_gap(together.outputs, apart.outputs)
    # As with batch statistics of one example: only the batch has values.
    lost = jnp.isnan(gap) & jnp.all(jnp.isfinite(together.outputs))
    gaps = jnp.stack([jnp.where(lost, jnp.inf, gap), gradient_gap(together, apart)])
    return jnp.nanmax(gaps), jnp.any(jnp.isnan(gaps))


def coupling_message(gap: float) -> str:
    """What to do about examples that depend on each other."""
    return (
        f"the outputs of a batch differ from those of its examples one by one (relative distance {gap:.1e}):"
        " model_fn couples examples, as batch normalisation in training mode does, or draws the same dropout for each"
        " of them. Switch both to evaluation, or pass a key per example in the inputs."
    )


def coupling(model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree) -> Array:
    """How far the outputs of a batch are from those of its examples one by one."""
    together, apart = _both_ways(model_fn, params, inputs)
    return output_gap(together.outputs, apart.outputs)


class _Pass(NamedTuple):
    """The outputs of a batch, and the parameters' gradient for a random cotangent."""

    outputs: Array
    gradient: PyTree[Array]


def _both_ways(model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree) -> tuple[_Pass, _Pass]:
    """A batch as it is, and its examples one by one."""

    def one_by_one(params: PyTree, inputs: PyTree) -> Array:
        return jax.vmap(lambda x: model_fn(params, jax.tree.map(lambda leaf: leaf[None], x))[0])(inputs)

    def run(fn: Callable[[PyTree, PyTree], Array]) -> _Pass:
        outputs, vjp = jax.vjp(lambda params: fn(params, inputs), params)
        noise = jax.random.normal(jax.random.key(0), outputs.shape, compute_dtype(outputs.dtype))
        return _Pass(outputs, vjp(noise.astype(outputs.dtype))[0])

    return run(model_fn), run(one_by_one)


def output_gap(together: Array, apart: Array) -> Array:
    """How far the outputs of a batch are from those of its examples one by one, relative to their size."""
    same = together == apart  # also where both are infinite
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(together), together, 0).astype(compute_dtype(together.dtype)))
    return _distances([jnp.where(same, 0, together)], [jnp.where(same, 0, apart)], size)[0]


def gradient_gap(together: _Pass, apart: _Pass) -> Array:
    """The same of the parameters' gradients, the largest of all parameters.

    It also tells what does not show in the outputs, such as batch statistics before a head that starts at 0.
    """
    a, b = jax.tree.leaves(together.gradient), jax.tree.leaves(apart.gradient)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in [together.outputs, *a])
    total = jnp.sqrt(jnp.sum(_squares(a)))
    return jnp.max(_distances(a, b, eps**0.5 * total))


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
    """What rounding may amount to, with the coarsest of these dtypes."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return min(1000 * eps, 0.1)


def gradient_gaps(
    trace: Trace, plan: Plan, model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree
) -> Array:
    """For each parameter, how far the gradient put together from layers is from automatic differentiation's.

    The gradient is that of the outputs times a random cotangent; gaps are relative to its size, and where that is
    nothing but rounding, to the root of the coarsest dtype's precision times the size of all gradients.
    """
    leftovers = [left.leaf for left in plan.leftovers]
    captured = capture(trace, params, inputs, leftovers)
    outputs = captured.outputs
    noise = jax.random.normal(jax.random.key(0), outputs.shape, compute_dtype(outputs.dtype))
    vector = noise.astype(outputs.dtype)
    output_grads, per_datum = captured.pull_back(vector)
    flat = jax.tree.leaves(params)
    sizes = [leaf.size for leaf in flat]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    total = jnp.zeros(sum(sizes), compute_dtype(outputs.dtype))

    for layer in plan.layers:
        for number in layer.uses:
            use = trace.uses[number]
            a = use.arrange_inputs(captured.inputs[number])
            g = use.arrange_output_grads(output_grads[number]).astype(total.dtype)
            if use.kind == "embedding":
                rows = use.weight.shape[2]
                index = jnp.clip(a, 0, rows - 1)
                kept = (index == a) | (not use.fills)
                a = jnp.where(kept[..., None], jax.nn.one_hot(index, rows, dtype=total.dtype), 0)
            weight = jnp.einsum("gnso,gnsi->goi", g, a.astype(total.dtype))
            total = total.at[use.weight.entries.numbers().reshape(-1)].add(weight.reshape(-1))
            if layer.bias is not None:
                bias = jnp.sum(g, axis=(1, 2))
                total = total.at[layer.bias.entries.numbers().reshape(-1)].add(bias.reshape(-1))
    for leaf, gradient in zip(leftovers, per_datum, strict=True):
        total = total.at[starts[leaf] : starts[leaf] + sizes[leaf]].add(
            jnp.sum(gradient, axis=0).reshape(-1).astype(total.dtype)
        )

    (wanted,) = jax.vjp(lambda params: model_fn(params, inputs), params)[1](vector)
    dtypes = {outputs.dtype, *(leaf.dtype for leaf in flat), *(use.output_dtype for use in trace.uses)}
    least = max(float(jnp.finfo(dtype).eps) for dtype in dtypes) ** 0.5 * jnp.linalg.norm(total)
    mine = [total[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return _distances(mine, [leaf.reshape(-1) for leaf in jax.tree.leaves(wanted)], least)
