"""Operators on flat NumPy vectors, for SciPy's solvers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import scipy.sparse.linalg  # type: ignore[import-untyped]
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ggn_jax._checks import compute_dtype

Product = Callable[[PyTree[Array]], PyTree[Array]]


def scipy_operator(operator: lx.AbstractLinearOperator, transposed: Product | None = None) -> Any:
    """A `scipy.sparse.linalg.LinearOperator`; `transposed` are products with its transpose, where that is another."""
    columns, unravel = _flat(operator.in_structure())
    rows, unravel_rows = _flat(operator.out_structure())
    dtype = np.dtype(compute_dtype(jnp.promote_types(rows.dtype, columns.dtype)))  # SciPy knows none of 16 bits

    def product(fn: Product, like: Array, unravel: Callable[[Array], PyTree[Array]]) -> Callable[[Any], np.ndarray]:
        def run(vector: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(vector):
                raise TypeError(
                    f"the operator is real; got a vector of dtype {vector.dtype}: pass its parts one by one."
                )
            with jax.numpy_dtype_promotion("standard"):
                result = ravel_pytree(fn(unravel(jnp.asarray(vector.reshape(-1), like.dtype))))[0]
            return np.asarray(result, dtype)

        return run

    forward = product(operator.mv, columns, unravel)
    backward = forward if transposed is None else product(transposed, rows, unravel_rows)
    return scipy.sparse.linalg.LinearOperator((rows.size, columns.size), forward, rmatvec=backward, dtype=dtype)


def _flat(structure: PyTree[jax.ShapeDtypeStruct]) -> tuple[Array, Callable[[Array], PyTree[Array]]]:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), structure)
    with jax.numpy_dtype_promotion("standard"):  # parameters may have several dtypes
        flat, unravel = ravel_pytree(zeros)
    return flat, unravel
