"""Dropout: the only operators that take a key."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from torch_bridge.aten.registry import UnsupportedResult, aten


class NoKeyError(NotImplementedError):
    """Something is drawn, but there is no key."""


def keep(x: Array, p: float, train: bool | None, shape: Sequence[int], key: Array | None) -> Array:
    """`x` times 0 with probability p, else times 1 / (1 - p); one draw along each axis of length 1 in `shape`."""
    if train is False or p == 0:
        return x
    if key is None:
        raise NoKeyError(
            "it is random in training mode: convert with train=True and call model_fn(params, inputs, key=...), use"
            " train=False, set its p to 0, or put it into evaluation mode yourself and pass train=None"
        )
    if p == 1:
        return jnp.zeros_like(x)
    return jnp.where(jax.random.bernoulli(key, 1 - p, tuple(shape)), x * (1 / (1 - p)), jnp.zeros((), x.dtype))


@aten("dropout")
def dropout(x: Array, p: float, train: bool, *, dropout_key: Array | None = None) -> Array:
    return keep(x, p, train, x.shape, dropout_key)


@aten("native_dropout")
def native_dropout(
    x: Array, p: float, train: bool | None, *, dropout_key: Array | None = None
) -> tuple[Array, UnsupportedResult]:
    return keep(x, p, train, x.shape, dropout_key), UnsupportedResult("what a dropout keeps")


@aten("feature_dropout")
def feature_dropout(x: Array, p: float, train: bool, *, dropout_key: Array | None = None) -> Array:
    return keep(x, p, train, (*x.shape[:2], *[1] * (x.ndim - 2)), dropout_key)


@aten("alpha_dropout", "feature_alpha_dropout")
def alpha_dropout(x: Array, p: float, train: bool) -> Array:
    if train and p > 0:
        raise NotImplementedError("alpha dropout is not supported in training mode: put it into evaluation mode")
    return x
