"""Checks that need no oracle: do examples depend on each other, and do the layers found explain the gradient?"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import compute_dtype, is_concrete
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
    gap = coupling(model_fn, params, inputs)
    # As with batch statistics of one example: only the batch has values.
    apart = jnp.isnan(gap) & jnp.all(jnp.isfinite(model_fn(params, inputs)))
    gaps = jnp.stack([jnp.where(apart, jnp.inf, gap), gradient_coupling(model_fn, params, inputs)])
    return jnp.nanmax(gaps), jnp.any(jnp.isnan(gaps))


def coupling_message(gap: float) -> str:
    """What to do about examples that depend on each other."""
    return (
        f"the outputs of a batch differ from those of its examples one by one (relative distance {gap:.1e}):"
        " model_fn couples examples, as batch normalisation in training mode does, or draws the same dropout for each"
        " of them. Switch both to evaluation, or pass a key per example in the inputs."
    )


def coupling(model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree) -> Array:
    """How far the outputs of a batch are from those of its examples one by one, relative to their size."""

    together, apart = model_fn(params, inputs), _one_by_one(model_fn, params, inputs)
    same = together == apart  # also where both are infinite
    return _distance(jnp.where(same, 0, together), jnp.where(same, 0, apart), jnp.linalg.norm(_finite(together)))


def _one_by_one(model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree) -> Array:
    return jax.vmap(lambda x: model_fn(params, jax.tree.map(lambda leaf: leaf[None], x))[0])(inputs)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0).astype(compute_dtype(x.dtype))


def gradient_coupling(model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree) -> Array:
    """The same of the parameters' gradients for a random cotangent, the largest of all parameters.

    It also tells what does not show in the outputs, such as batch statistics before a head that starts at 0.
    """
    outputs, pull_back = jax.vjp(lambda params: model_fn(params, inputs), params)
    _, pull_back_apart = jax.vjp(lambda params: _one_by_one(model_fn, params, inputs), params)
    noise = jax.random.normal(jax.random.key(0), outputs.shape, compute_dtype(outputs.dtype)).astype(outputs.dtype)
    pairs = [jax.tree.leaves(tree) for tree in (pull_back(noise)[0], pull_back_apart(noise)[0])]
    dtype = compute_dtype(outputs.dtype)
    total = jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in pairs[0]))
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in [outputs, *pairs[0]])
    gaps = [_distance(a.astype(dtype), b.astype(dtype), eps**0.5 * total) for a, b in zip(*pairs, strict=True)]
    return jnp.max(jnp.stack(gaps))


def _distance(a: Array, b: Array, least: Array | float = 0.0) -> Array:
    a, b = (x.astype(compute_dtype(x.dtype)) for x in (a, b))
    size = jnp.maximum(jnp.maximum(jnp.linalg.norm(a), jnp.linalg.norm(b)), jnp.asarray(least, a.dtype))
    return jnp.where(size == 0, 0, jnp.linalg.norm(a - b) / jnp.where(size == 0, 1, size))


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
    gaps = [
        _distance(total[start : start + size], leaf.reshape(-1).astype(total.dtype), least)
        for start, size, leaf in zip(starts, sizes, jax.tree.leaves(wanted), strict=True)
    ]
    return jnp.stack(gaps)
