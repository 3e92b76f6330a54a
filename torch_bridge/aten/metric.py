"""Distances between vectors."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from torch_bridge.aten.dtypes import promote
from torch_bridge.aten.reductions import vector_norm
from torch_bridge.aten.registry import aten


@aten("dist")
def dist(x: Array, y: Array, p: Any = 2) -> Array:
    x, y = promote(x, y)
    return vector_norm(x - y, p)


@aten("pairwise_distance")
def pairwise_distance(x: Array, y: Array, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Array:
    x, y = promote(x, y)
    return vector_norm(x - y + jnp.asarray(eps, x.dtype), p, -1, keepdim)


@aten("cdist")
def cdist(x: Array, y: Array, p: float = 2.0, compute_mode: int | None = None) -> Array:
    """Of each pair; the derivative is 0 where two are equal."""
    return vector_norm(x[..., :, None, :] - y[..., None, :, :], p, -1)


@aten("pdist")
def pdist(x: Array, p: float = 2.0) -> Array:
    rows, columns = np.triu_indices(x.shape[0], 1)
    return vector_norm(x[rows] - x[columns], p, -1)
