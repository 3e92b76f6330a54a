"""Tensors made from nothing, assertions and questions about sizes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from torch_bridge.aten.dtypes import default_float
from torch_bridge.aten.registry import aten

# A `dtype` that was not given is what torch made of it: see `torch_bridge.modules.run`.


@aten("zeros", "empty")
def zeros(size: Sequence[int], *, dtype: Any = None) -> Array:
    """What `empty` holds is not defined."""
    return jnp.zeros(tuple(size), dtype or default_float())


@aten("ones")
def ones(size: Sequence[int], *, dtype: Any = None) -> Array:
    return jnp.ones(tuple(size), dtype or default_float())


@aten("full")
def full(size: Sequence[int], value: Any, *, dtype: Any = None) -> Array:
    return jnp.full(tuple(size), value, dtype)


@aten("zeros_like", "empty_like", "zero")
def zeros_like(x: Array, *, dtype: Any = None) -> Array:
    return jnp.zeros(x.shape, dtype or x.dtype)


@aten("ones_like")
def ones_like(x: Array, *, dtype: Any = None) -> Array:
    return jnp.ones(x.shape, dtype or x.dtype)


@aten("full_like")
def full_like(x: Array, value: Any, *, dtype: Any = None) -> Array:
    return jnp.full(x.shape, value, dtype or x.dtype)


@aten("new_zeros", "new_empty")
def new_zeros(x: Array, size: Sequence[int], *, dtype: Any = None) -> Array:
    return jnp.zeros(tuple(size), dtype or x.dtype)


@aten("new_ones")
def new_ones(x: Array, size: Sequence[int], *, dtype: Any = None) -> Array:
    return jnp.ones(tuple(size), dtype or x.dtype)


@aten("new_full")
def new_full(x: Array, size: Sequence[int], value: Any, *, dtype: Any = None) -> Array:
    return jnp.full(tuple(size), value, dtype or x.dtype)


@aten("fill")
def fill(x: Array, value: Any) -> Array:
    return jnp.full(x.shape, value, x.dtype)


@aten("scalar_tensor")
def scalar_tensor(value: Any, *, dtype: Any = None) -> Array:
    return jnp.asarray(value, dtype)


@aten("arange")
def arange(*numbers: Any, dtype: Any = None) -> Array:
    """Counted in float64, as torch counts."""
    start, end, step = (0, *numbers, 1) if len(numbers) == 1 else (*numbers, 1)[:3]
    count = int(np.ceil((end - start) / step))
    if all(isinstance(number, int) for number in (start, end, step)) and jnp.issubdtype(dtype, jnp.integer):
        return jnp.arange(count, dtype=dtype) * step + start
    return jnp.asarray(start + step * np.arange(count, dtype=np.float64), dtype)


@aten("linspace")
def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None) -> Array:
    return jnp.asarray(np.linspace(start, end, steps), dtype or default_float())


@aten("logspace")
def logspace(start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None) -> Array:
    return jnp.asarray(base ** np.linspace(start, end, steps), dtype or default_float())


@aten("eye")
def eye(n: int, m: int | None = None, *, dtype: Any = None) -> Array:
    return jnp.eye(n, m, dtype=dtype or default_float())


@aten("tril_indices")
def tril_indices(row: int, col: int, offset: int = 0, *, dtype: Any = None) -> Array:
    return jnp.asarray(np.stack(np.tril_indices(row, offset, col)), dtype or int)


@aten("triu_indices")
def triu_indices(row: int, col: int, offset: int = 0, *, dtype: Any = None) -> Array:
    return jnp.asarray(np.stack(np.triu_indices(row, offset, col)), dtype or int)


@aten("sym_size")
def sym_size(x: Array, dim: int) -> int:
    return x.shape[dim]


@aten("sym_numel")
def sym_numel(x: Array) -> int:
    return x.size


@aten("_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size", "sym_constrain_range")
def nothing(*args: Any, **kwargs: Any) -> None:
    """Shapes and dtypes are checked at every operator; values, which are known when the program runs, are not."""


@aten("_assert_scalar")
def assert_scalar(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(f"the module requires other sizes: {message}")
