"""Dense matrices by automatic differentiation, that tests compare with."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.flatten_util import ravel_pytree


def dense_ggn(model_fn: Any, loss: Any, params: Any, batch: Any) -> np.ndarray:
    """`J^T H J` of the whole batch, from Jacobians and JAX's Hessian of the loss."""
    return np.array(_dense_ggn(model_fn, loss, params, batch))


@eqx.filter_jit
def _dense_ggn(model_fn: Any, loss: Any, params: Any, batch: Any) -> jax.Array:
    flat, unravel = ravel_pytree(params)
    outputs = model_fn(params, batch[0])
    jacobian = jax.jacobian(lambda p: model_fn(unravel(p), batch[0]).reshape(-1))(flat)
    hessian = jax.hessian(lambda f: loss(f.reshape(outputs.shape), batch[1]))(outputs.reshape(-1))
    return jacobian.T @ hessian @ jacobian
