"""Sums over chunks of the data are added in at least float32, whatever the parameters' dtype."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggn_jax
from ggn_jax._sums import sum_one_by_one
from ggn_jax.kronecker.parts import sum_in_parts

EXAMPLES = 2048
OPERATORS: dict[str, Any] = {
    "GGN": ggn_jax.GGNLinearOperator,
    "GGN, Monte-Carlo": partial(ggn_jax.GGNLinearOperator, mc_samples=3, key=jax.random.key(0)),
    "Hessian": ggn_jax.HessianLinearOperator,
    "empirical Fisher": ggn_jax.EFLinearOperator,
    "diagonal by layers": partial(ggn_jax.GGNDiagonalLinearOperator, method="layers"),
    "diagonal by data": partial(ggn_jax.GGNDiagonalLinearOperator, method="data"),
}


def product(operator: str, dtype: str, chunk_size: int | None) -> np.ndarray:
    """The product with ones for `x w` with inputs of 1 and 2, all of whose terms are positive."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 3, size=(EXAMPLES, 2)), rng.integers(-2, 1, size=(EXAMPLES, 1))
    params = jnp.ones((2, 1), dtype) / 2
    batch = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
    loss, model_fn = ggn_jax.MSELoss(), lambda w, x: x @ w
    made = OPERATORS[operator](model_fn, loss, params, batch, chunk_size=chunk_size)
    return np.asarray(made.mv(jnp.ones_like(params)), np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_one_example_at_a_time(operator: str, dtype: str) -> None:
    """Added in bfloat16, 2048 examples stop at about 256 of their terms."""
    if operator == "GGN, Monte-Carlo":  # draws differ between dtypes
        want, tol = product("GGN", "float64", None), 0.15
    else:
        want, tol = product(operator, "float64", None), 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(product(operator, dtype, 1), want, rtol=tol)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int32"])
@pytest.mark.parametrize(("num", "at_once"), [(0, 3), (1, 1), (3, 3), (5, 3), (1000, 1), (1001, 10)])
def test_dtypes_are_kept(num: int, at_once: int, dtype: str) -> None:
    got = sum_in_parts(lambda i: jnp.full((2,), len(i), dtype), num, at_once)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.full(2, float(jnp.asarray(num, dtype))))


def test_digits_of_float64_are_kept() -> None:
    parts = jnp.asarray([1.0, 2.0**-50, 2.0**-50])
    assert sum_one_by_one(lambda x: x, parts, jnp.asarray(2.0**-50)) == 1 + 3 * 2.0**-50
