"""Checks that need no oracle: do examples depend on each other, and do the layers found explain the gradient?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax.layers.capture import capture
from ggn_jax.layers.plan import Plan
from ggn_jax.layers.trace import Trace


def coupling(model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree) -> Array:
    """How far the outputs of a batch are from those of its examples one by one, relative to their size."""

    together = model_fn(params, inputs)
    apart = jax.vmap(lambda x: model_fn(params, jax.tree.map(lambda leaf: leaf[None], x))[0])(inputs)
    return _distance(together, apart)


def _distance(a: Array, b: Array) -> Array:
    a, b = (x.astype(compute_dtype(x.dtype)) for x in (a, b))
    size = jnp.maximum(jnp.linalg.norm(a), jnp.linalg.norm(b))
    return jnp.where(size == 0, 0, jnp.linalg.norm(a - b) / jnp.where(size == 0, 1, size))


def tolerance(*dtypes: jnp.dtype) -> float:
    """What rounding may amount to, with the coarsest of these dtypes."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return min(1000 * eps, 0.1)


def gradient_gaps(
    trace: Trace, plan: Plan, model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree
) -> Array:
    """For each parameter, how far the gradient put together from layers is from automatic differentiation's.

    The gradient is that of the outputs times a random cotangent; gaps are relative to the gradient's size.
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
    gaps = [
        _distance(total[start : start + size], leaf.reshape(-1).astype(total.dtype))
        for start, size, leaf in zip(starts, sizes, jax.tree.leaves(wanted), strict=True)
    ]
    return jnp.stack(gaps)
