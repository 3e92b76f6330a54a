"""TNT (Ren & Goldfarb 2021, arXiv:2106.02925): gradients of examples as draws of a tensor-normal distribution.

If the gradient `G_n` of an example has covariance `U (x) V`, then `E[G G^T] = tr(V) U` and `E[G^T G] = tr(U) V`, so

    F = L (x) R        L = E[G G^T] / (d_i s)        R = E[G^T G] / (d_o s)        s = sqrt(E[tr(G^T G)] / (d_i d_o))

of `G` `[d_o, d_i]`. How F is divided between its factors matters to damping: these have the same mean eigenvalue `s`,
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
        outer, inner = state
        left, right = _damped(outer, inner.shape[-1]), _damped(inner, outer.shape[-1])
        half = jnp.linalg.solve(left, grad)
        return jnp.swapaxes(jnp.linalg.solve(right, jnp.swapaxes(half, 1, 2)), 1, 2)

    def _damped(moment: Any, other: int) -> Any:
        own = moment.shape[-1]
        mean = jnp.sqrt(jnp.trace(moment, axis1=1, axis2=2) / (own * other))[:, None, None]
        return moment / (other * jnp.where(mean > 0, mean, 1)) + damping**0.5 * jnp.eye(own)[None]

    functions = {"init": init, "update": update, "precondition": precondition}
    return ggn_jax.scale_by_layers(model_fn, loss, example_inputs=example_inputs, **functions, **vectors)
