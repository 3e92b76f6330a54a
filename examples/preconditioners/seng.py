"""SENG (Yang et al. 2020, arXiv:2006.05924): the inverse of a layer's own GGN block, by Woodbury over examples.

A layer's block is `U U^T`, with a column `vec(g a^T)` of `U` for each vector and example. So

    (U U^T + damping I)^-1 grad = (grad - U (U^T U + damping I)^-1 U^T grad) / damping

needs a solve of the size of vectors times examples, and `U^T U = (g g^T) o (a a^T)` needs no gradient of an example
where a layer has one position. (The paper sketches `U` as well; here it is exact.)
"""

from typing import Any

import jax
import jax.numpy as jnp

import ggn_jax


def natural_gradient(layers: ggn_jax.Layers, io: ggn_jax.LayersIO, damping: float) -> Any:
    """`(block + damping I)^-1` of each layer times its gradient, like the parameters; the rest as it is."""
    matrices, rest = ggn_jax.to_matrices(layers, io.grads)
    return ggn_jax.from_matrices(layers, {n: _solve(io[n], m, damping) for n, m in matrices.items()}, rest)


def _solve(io: ggn_jax.LayerIO, grad: jax.Array, damping: float) -> jax.Array:
    if sum(io.layer.positions) == 1:
        a, g = io.inputs[:, :, 0], io.output_grads[:, :, :, 0]  # [G, N, in], [V, G, N, out]
        gram = jnp.einsum("vgno,wgmo,gni,gmi->gvnwm", g, g, a, a)
        inner = jnp.einsum("vgno,gni,goi->gvn", g, a, grad)
        back = lambda x: jnp.einsum("vgno,gni,gvn->goi", g, a, x)  # noqa: E731
    else:
        u = io.per_example_grads()
        gram, inner = jnp.einsum("vngoi,wmgoi->gvnwm", u, u), jnp.einsum("vngoi,goi->gvn", u, grad)
        back = lambda x: jnp.einsum("vngoi,gvn->goi", u, x)  # noqa: E731
    flat = inner.reshape(len(inner), -1, 1)
    damped = gram.reshape(*flat.shape[:2], -1) + damping * jnp.eye(flat.shape[1])[None]
    return (grad - back(jnp.linalg.solve(damped, flat).reshape(inner.shape))) / damping
