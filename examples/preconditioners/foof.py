"""FOOF (Benzing 2022, arXiv:2201.12250): precondition each layer's gradient by its inputs alone.

With `A = E[a a^T]` of a layer's inputs, the update of `W` is `G (A + damping I)^-1`: what a least-squares fit of the
layer's outputs to `outputs - gradient` gives (LocoProp, Amid et al. 2022, is several such steps). No vector is
back-propagated, so it costs a forward pass and a solve.
"""

from typing import Any

import jax.numpy as jnp
import optax

import ggn_jax


def scale_by_foof(
    model_fn: Any, loss: ggn_jax.Loss, *, example_inputs: Any, damping: float = 1e-2, decay: float = 0.95
) -> optax.GradientTransformationExtraArgs:
    def init(layer: ggn_jax.LayerInfo) -> Any:
        return jnp.zeros((layer.groups, layer.in_, layer.in_)), jnp.zeros(())

    def update(state: Any, io: ggn_jax.LayerIO) -> Any:
        (average, weight), a = state, io.inputs
        moment = jnp.einsum("gnsi,gnsj->gij", a, a) / (a.shape[1] * a.shape[2])
        return decay * average + (1 - decay) * moment, decay * weight + (1 - decay)

    def precondition(state: Any, grad: Any) -> Any:
        average, weight = state
        damped = average / weight + damping * jnp.eye(average.shape[-1])[None]
        return jnp.swapaxes(jnp.linalg.solve(damped, jnp.swapaxes(grad, 1, 2)), 1, 2)

    functions = {"init": init, "update": update, "precondition": precondition}
    return ggn_jax.scale_by_layers(
        model_fn, loss, example_inputs=example_inputs, fisher_type="forward-only", **functions
    )
