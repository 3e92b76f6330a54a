"""PyTorch's rules for the dtypes of results.

They differ from JAX's: tensors with axes count before tensors without, and those before Python's numbers; a lower rank
counts only if its kind (bool, integer, floating, complex) is higher.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from torch_bridge.tensors import DTYPES

TORCH = {dtype: name for name, dtype in DTYPES.items()}
HALF = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


def to_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype in JAX: with 64-bit types switched off, that of 32 bits."""
    return np.dtype(jax.dtypes.canonicalize_dtype(DTYPES[dtype]))


def is_floating(dtype: Any) -> bool:
    """Whether a dtype is floating or complex."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def default_float() -> np.dtype:
    """The dtype of integers where floating numbers are needed."""
    return to_dtype(torch.get_default_dtype())


def _kind(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 0 if dtype == torch.bool else 1


def result_dtype(*operands: Any) -> np.dtype:
    """The dtype of an elementwise function of arrays and Python numbers."""
    levels: list[torch.dtype | None] = [None, None, None]  # with axes, without, Python's numbers
    for operand in operands:
        if isinstance(operand, bool | int | float | complex):
            level, dtype = 2, _of_number(operand)
        else:
            level, dtype = 0 if jnp.ndim(operand) else 1, TORCH[np.dtype(operand.dtype)]
        before = levels[level]
        levels[level] = dtype if before is None else torch.promote_types(before, dtype)
    result = functools.reduce(_combine, levels)
    assert result is not None
    return to_dtype(result)


def _of_number(number: Any) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    if isinstance(number, int):
        return torch.int64
    default = torch.get_default_dtype()
    return default if isinstance(number, float) else torch.promote_types(default, torch.complex64)


def _combine(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    """Combine a level with a lower one, which counts only if its kind is higher."""
    if higher is None or lower is None:
        return higher if lower is None else lower
    if _kind(lower) <= _kind(higher):
        return higher
    if _kind(lower) == 3 and _kind(higher) == 2:
        return torch.promote_types(higher, torch.complex32 if higher == torch.float16 else torch.complex64)
    return lower


def promote(*operands: Any, floating: bool = False) -> list[Array]:
    """The operands as arrays of one dtype and rank; `floating` makes integers floating."""
    dtype = result_dtype(*operands)
    if floating and not is_floating(dtype):
        dtype = default_float()
    return align(*(as_dtype(operand, dtype) for operand in operands))


def as_dtype(value: Any, dtype: Any) -> Array:
    """A Python number or array as an array of this dtype."""
    return value.astype(dtype) if isinstance(value, jax.Array) else jnp.asarray(value, dtype)


def align(*arrays: Array) -> list[Array]:
    """The arrays with as many axes each, new ones in front."""
    rank = max(array.ndim for array in arrays)
    return [array.reshape((1,) * (rank - array.ndim) + array.shape) for array in arrays]


def as_floating(x: Array) -> Array:
    """Integers as floating numbers."""
    return x if is_floating(x.dtype) else x.astype(default_float())


def wide(x: Array) -> Array:
    """Half precision as float32, in which torch accumulates."""
    return x.astype(jnp.float32) if x.dtype in HALF else x


def widened(fn: Callable[..., Array]) -> Callable[..., Array]:
    """`fn(x, ...)` computed in at least float32, in the dtype of `x`; integers become floating."""

    @functools.wraps(fn)
    def wrapped(x: Array, *args: Any, **kwargs: Any) -> Array:
        x = as_floating(x)
        return fn(wide(x), *args, **kwargs).astype(x.dtype)

    return wrapped


def safe_sqrt(x: Array) -> Array:
    """The square root, with derivative 0 at 0, as norms and standard deviations of torch have it."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))
