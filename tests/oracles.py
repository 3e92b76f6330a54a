"""Dense matrices by automatic differentiation, that tests compare with."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def dense_ggn(model_fn: Any, loss: Any, params: Any, batch: Any) -> np.ndarray:
    """`J^T H J` of the whole batch, from Jacobians and JAX's Hessian of the loss."""
    return np.array(_dense_ggn(model_fn, loss, params, batch))


@eqx.filter_jit
def _dense_ggn(model_fn: Any, loss: Any, params: Any, batch: Any) -> jax.Array:
    flat, unravel = ravel_pytree(params)
    outputs, vjp = jax.vjp(lambda p: model_fn(unravel(p), batch[0]), flat)
    # One by one, since JAX cannot map all that it can differentiate.
    unit = jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)
    jacobian = jax.lax.map(lambda v: vjp(v)[0], unit)
    hessian = jax.hessian(lambda f: loss(f.reshape(outputs.shape), batch[1]))(outputs.reshape(-1))
    return jacobian.T @ hessian @ jacobian


def nearest_product(block: Any, out: int, inputs: int) -> np.ndarray:
    """The Kronecker product of these sizes nearest to a symmetric matrix: an SVD of its rearrangement."""
    rearranged = np.asarray(block).reshape(out, inputs, out, inputs).transpose(0, 2, 1, 3).reshape(out**2, inputs**2)
    u, s, vt = np.linalg.svd(rearranged)
    return np.asarray(s[0] * np.kron(u[:, 0].reshape(out, out), vt[0].reshape(inputs, inputs)))
