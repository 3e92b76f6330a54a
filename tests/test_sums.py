"""Sums over chunks of the data are added in at least float32, whatever the parameters' dtype."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designs import covering

import ggn_jax
from ggn_jax._sums import sum_sequentially
from ggn_jax.kronecker.chunked import sum_chunked

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


@covering(1, operator=OPERATORS, dtype=["bfloat16", "float16"])
@pytest.mark.by_default("GGN-bfloat16", "Hessian-bfloat16")
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
    got = sum_chunked(lambda i: jnp.full((2,), len(i), dtype), num, at_once)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.full(2, float(jnp.asarray(num, dtype))))


def test_digits_of_float64_are_kept() -> None:
    parts = jnp.asarray([1.0, 2.0**-50, 2.0**-50])
    assert sum_sequentially(lambda x: x, parts, jnp.asarray(2.0**-50)) == 1 + 3 * 2.0**-50


def mlp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["a"] + params["b"][None]) @ params["c"]


KRONECKER: dict[str, Any] = {
    "KFAC": partial(ggn_jax.KFACLinearOperator, fisher_type="type-2"),
    "EKFAC": partial(ggn_jax.EKFACLinearOperator, fisher_type="type-2"),
}


@covering(1, operator=["GGN", "diagonal by layers", "diagonal by data", *KRONECKER], dtype=["bfloat16", "float16"])
@pytest.mark.by_default("GGN-bfloat16")
def test_products_of_a_network_in_parts(operator: str, dtype: str) -> None:
    """The whole batch in float64 is the oracle."""
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 16), "b": (16,), "c": (16, 4)}
    params, vector = ({k: rng.normal(size=shape) / 4 for k, shape in shapes.items()} for _ in range(2))
    x, y = rng.normal(size=(1024, 8)), jax.device_put(np.arange(1024) % 4)

    def product(dtype: str, chunk_size: int | None) -> np.ndarray:
        p, v, inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, vector, x))
        made = (OPERATORS | KRONECKER)[operator](mlp, ggn_jax.CrossEntropyLoss(), p, (inputs, y), chunk_size=chunk_size)
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(made.mv(v))])

    want = product("float64", None)
    error = np.linalg.norm(product(dtype, 1) - want) / np.linalg.norm(want)
    assert error < float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("operator", KRONECKER)
@pytest.mark.by_default("KFAC")
def test_batches_of_one_example(operator: str) -> None:
    batches = [(jnp.ones((1, 2), jnp.bfloat16), jnp.zeros((1, 1), jnp.bfloat16))] * 300
    args = (lambda p, x: x @ p), ggn_jax.MSELoss(reduction="sum"), jnp.ones((2, 1), jnp.bfloat16), batches
    of = type(KRONECKER[operator](*args[:3], batches[0]))
    made = of.from_batches(*args, fisher_type="type-2")
    np.testing.assert_allclose(made.as_matrix().astype(float), np.full((2, 2), 600.0), rtol=2**-8)


def test_squares_that_16_bits_do_not_hold() -> None:
    """Each is 1e-8, below the smallest float16; there are 16 vectors of 1024 examples."""
    params = jnp.zeros((1, 16), "float16")
    batch = jnp.full((1024, 1), 1e-4, "float16"), jnp.zeros((1024, 16), "float16")
    args = (lambda p, x: x @ p), ggn_jax.MSELoss(reduction="sum"), params, batch
    for method in ("layers", "data"):
        got = ggn_jax.GGNDiagonalLinearOperator(*args, method=method, vector_chunk_size=4).entries
        np.testing.assert_allclose(got.astype(float), np.full((1, 16), 1024 * 2e-8), rtol=4e-3)


@pytest.mark.sweep
def test_the_loss_decreases_by_less_than_its_rounding() -> None:
    """From 225 by about 1/2, in bfloat16: as predicted, so that the damping is lowered."""
    params, x = {"w": jnp.ones((1, 1), jnp.bfloat16)}, jnp.ones((8, 1), jnp.bfloat16)
    batch, loss, model_fn = (x, 16 * x), ggn_jax.MSELoss(), lambda p, x: x @ p["w"]
    optimizer = ggn_jax.kfac(
        model_fn, loss, 1 / 480, example_inputs=x, fisher_type="type-2", damping_method="exact",
        damping=ggn_jax.LevenbergMarquardt(2.0, interval=1), momentum=None, kl_clip=None,
    )  # fmt: skip
    grads = jax.grad(lambda p: loss(model_fn(p, batch[0]), batch[1]))(params)
    updates, state = optimizer.update(grads, optimizer.init(params), params, batch=batch)
    np.testing.assert_allclose(updates["w"].astype(float), 1 / 64, rtol=1e-2)
    np.testing.assert_allclose(state.curvature.damping, 2 * 0.95, rtol=1e-6)


def linear(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["w"]


def test_means_over_micro_batches() -> None:
    params, x = {"w": jnp.ones((1, 1), jnp.bfloat16)}, jnp.ones((2, 1), jnp.bfloat16)
    inner = ggn_jax.kfac(linear, ggn_jax.MSELoss(), 0.1, example_inputs=x, fisher_type="type-2")
    optimizer = ggn_jax.multi_steps(inner, 1000)
    grads = jnp.asarray(np.random.default_rng(0).uniform(0, 0.5, size=(999, 1, 1)), jnp.bfloat16)

    def step(state: Any, grad: jax.Array) -> tuple[Any, None]:
        return optimizer.update({"w": grad}, state, params, batch=(x, x))[1], None

    state, _ = jax.lax.scan(step, optimizer.init(params), grads)
    np.testing.assert_allclose(state.gradient["w"][0, 0], np.asarray(grads, np.float64).mean(), rtol=1e-5)
    np.testing.assert_allclose(state.factors.blocks[0]["b"][0][0, 0, 0], 999 * 2, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.by_default("bfloat16")
def test_momentum_of_many_steps(dtype: str) -> None:
    """`v <- 0.999 v - 0.1 d` with the same direction `d`: in bfloat16, `0.999 v` rounds to `v`, which soon stands."""
    params, x = {"w": jnp.ones((1, 1), dtype)}, jnp.ones((2, 1), dtype)
    options: Any = {"damping": 1.0, "damping_method": "exact", "fisher_type": "type-2", "kl_clip": None}
    optimizer = ggn_jax.kfac(linear, ggn_jax.MSELoss(), 0.125, example_inputs=x, momentum=0.999, **options)
    grads = jax.tree.map(jnp.ones_like, params)

    def step(state: Any, _: Any) -> tuple[Any, jax.Array]:
        updates, state = optimizer.update(grads, state, params, batch=(x, x))
        return state, updates["w"][0, 0]

    state, updates = jax.lax.scan(step, optimizer.init(params), length=3000)
    want = -0.125 * float(jnp.asarray(1 / 3, dtype)) * (1 - 0.999**3000) / 0.001
    np.testing.assert_allclose(state.velocity["w"][0, 0], want, rtol=1e-4)
    assert updates.dtype == dtype
    np.testing.assert_allclose(float(updates[-1]), want, rtol=float(jnp.finfo(dtype).eps))
