"""INGD (Lin et al. 2023, arXiv:2302.09738), as SINGD (Lin et al. 2024, arXiv:2312.05705) states it: KFAC without
inverses.

`K K^T` and `C C^T` follow the inverses of the damped factors `A` and `B`, by products of matrices alone, so that it
runs in bfloat16. With `H_K = K^T A K`, `H_C = C^T B C`, and the sizes `d_i`, `d_o` of the two factors,

    m_K <- momentum m_K + (tr(H_C) H_K + damping tr(C^T C) K^T K - d_o I) / (2 d_o)        K <- K (I - rate m_K)
    m_C <- momentum m_C + (tr(H_K) H_C + damping tr(K^T K) C^T C - d_i I) / (2 d_i)        C <- C (I - rate m_C)

and the gradient is preconditioned to `C C^T G K K^T`.
"""

from typing import Any

import jax.numpy as jnp
import optax

import ggn_jax


def scale_by_ingd(
    model_fn: Any,
    loss: ggn_jax.Loss,
    *,
    example_inputs: Any,
    damping: float = 1e-3,
    rate: float = 0.05,
    momentum: float = 0.5,
    **vectors: Any,
) -> optax.GradientTransformationExtraArgs:
    def init(layer: ggn_jax.LayerInfo) -> Any:
        eyes = [jnp.tile(jnp.eye(size), (layer.groups, 1, 1)) for size in (layer.in_, layer.out)]
        return [(eye, jnp.zeros_like(eye)) for eye in eyes]

    def update(state: Any, io: ggn_jax.LayerIO) -> Any:
        a, g = io.inputs, io.output_grads
        (k, mk), (c, mc) = state
        hk = _inside(k, jnp.einsum("gnsi,gnsj->gij", a, a) / (a.shape[1] * a.shape[2]))
        hc = _inside(c, jnp.einsum("vgnso,vgnsp->gop", g, g))
        return [_follow(k, mk, hk, c, hc), _follow(c, mc, hc, k, hk)]

    def _follow(x: Any, m: Any, h: Any, other: Any, h_other: Any) -> Any:
        size, eye = other.shape[-1], jnp.eye(x.shape[-1])[None]
        m = momentum * m + (_trace(h_other) * h + damping * _trace(_square(other)) * _square(x) - size * eye) / (
            2 * size
        )
        return x @ (eye - rate * m), m

    def precondition(state: Any, grad: Any) -> Any:
        (k, _), (c, _) = state
        return c @ jnp.swapaxes(c, 1, 2) @ grad @ k @ jnp.swapaxes(k, 1, 2)

    functions = {"init": init, "update": update, "precondition": precondition}
    return ggn_jax.scale_by_layers(model_fn, loss, example_inputs=example_inputs, **functions, **vectors)


def _inside(x: Any, matrix: Any) -> Any:
    return jnp.swapaxes(x, 1, 2) @ matrix @ x


def _square(x: Any) -> Any:
    return jnp.swapaxes(x, 1, 2) @ x


def _trace(x: Any) -> Any:
    return jnp.trace(x, axis1=1, axis2=2)[:, None, None]
