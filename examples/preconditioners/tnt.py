"""TNT (Ren & Goldfarb 2021, arXiv:2106.02925): gradients of examples as draws of a tensor-normal distribution.

If the gradient `G_n` of an example has covariance `U (x) V`, then `E[G G^T] = tr(V) U` and `E[G^T G] = tr(U) V`, so

    F = L (x) R        L = E[G G^T] / sqrt(c)        R = E[G^T G] / sqrt(c)        c = E[tr(G^T G)]

and the gradient is preconditioned to `(L + sqrt(damping) I)^-1 grad (R + sqrt(damping) I)^-1`. What stands for the
expectation here is `sum_{v, n}` of a batch's vectors, averaged over steps.
"""

from typing import Any

import jax.numpy as jnp
import optax

import ggn_jax


def scale_by_tnt(
    model_fn: Any,
    loss: ggn_jax.Loss,
    *,
    example_inputs: Any,
    damping: float = 1e-2,
    decay: float = 0.95,
    **vectors: Any,
) -> optax.GradientTransformationExtraArgs:
    def init(layer: ggn_jax.LayerInfo) -> Any:
        return [jnp.zeros((layer.groups, size, size)) for size in (layer.out, layer.in_)]

    def update(state: Any, io: ggn_jax.LayerIO) -> Any:
        each = io.per_example_grads()
        new = jnp.einsum("vngoi,vngpi->gop", each, each), jnp.einsum("vngoi,vngoj->gij", each, each)
        return [decay * old + (1 - decay) * moment for old, moment in zip(state, new, strict=True)]

    def precondition(state: Any, grad: Any) -> Any:
        left, right = (_damped(moment) for moment in state)
        half = jnp.linalg.solve(left, grad)
        return jnp.swapaxes(jnp.linalg.solve(right, jnp.swapaxes(half, 1, 2)), 1, 2)

    def _damped(moment: Any) -> Any:
        size = jnp.sqrt(jnp.trace(moment, axis1=1, axis2=2))[:, None, None]
        return moment / jnp.where(size > 0, size, 1) + damping**0.5 * jnp.eye(moment.shape[-1])[None]

    functions = {"init": init, "update": update, "precondition": precondition}
    return ggn_jax.scale_by_layers(model_fn, loss, example_inputs=example_inputs, **functions, **vectors)
