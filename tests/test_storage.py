"""How averages are kept: one triangle, perhaps in bfloat16; and the sizes of states that follow."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_cases import CE, KEY, assert_close, batch_of, mlp, mlp_params, normal

import ggn_jax
from ggn_jax.optimizer.storage import dithered, pack_triangle, unpack_triangle


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
@pytest.mark.by_default("7", "1")
def test_a_triangle_holds_a_symmetric_matrix(size: int) -> None:
    x = normal(size, 3, size, size)
    x = x + jnp.swapaxes(x, 1, 2)
    packed = pack_triangle(x)
    assert packed.size == 3 * size * (size + 1) / 2
    np.testing.assert_array_equal(unpack_triangle(packed), x)


def test_rounding_is_right_in_the_mean() -> None:
    """Of 1,000 steps; each is one of the two numbers next to it."""
    x = normal(0, 50, dtype=jnp.float32)
    rounded = np.stack([dithered(x, jnp.asarray(step)) for step in range(1000)]).astype(float)
    wanted = np.asarray(x).astype(float)
    assert np.all(np.abs(rounded - wanted) <= 2.0**-7 * np.abs(wanted))
    np.testing.assert_allclose(rounded.mean(0), wanted, rtol=2.0**-7 / 200)


def test_what_bfloat16_holds_stays() -> None:
    x = normal(1, 20, dtype=jnp.bfloat16)
    for step in range(20):
        np.testing.assert_array_equal(dithered(x.astype(jnp.float32), jnp.asarray(step)), x)


def train(steps: int, **options: Any) -> tuple[Any, Any]:
    params = mlp_params(jnp.float32)
    batch = batch_of(dtype=jnp.float32)
    optimizer = ggn_jax.kfac(mlp, CE, 0.1, damping=0.1, example_inputs=batch[0], **options)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, key: Any) -> Any:
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, value

    for key in jax.random.split(KEY, steps):
        params, state, value = step(params, state, key)
    return state, value


@pytest.mark.parametrize("options", [{"damping_method": "exact"}, {"ekfac": True}], ids=str)
@pytest.mark.by_default("{'ekfac': True}")
def test_averages_in_bfloat16(options: Any) -> None:
    """Averages of 30 steps differ by rounding, inverses are float32, and half the bytes are kept."""
    (full, value), (half, found) = train(30, **options), train(30, factor_dtype="bfloat16", **options)
    averages = jax.tree.leaves(half.curvature.blocks)
    assert {x.dtype for x in averages} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(half.curvature.inverses)} == {jnp.dtype(jnp.float32)}
    for x, y in zip(averages, jax.tree.leaves(full.curvature.blocks), strict=True):
        assert np.linalg.norm(x.astype(jnp.float32) - y) < 0.02 * np.linalg.norm(y)
    assert int(half.rejected) == int(half.curvature.skipped) == 0
    assert float(found) == pytest.approx(float(value), rel=0.02)


def test_averages_in_the_dtype_of_the_computation() -> None:
    full, half = train(3), train(3, factor_dtype="float32")
    assert_close(half, full, 0)


def test_the_report_counts_bytes() -> None:
    batch = batch_of(dtype=jnp.float32)
    params = mlp_params(jnp.float32)
    sizes = []
    for dtype in (None, "bfloat16"):
        optimizer = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0], factor_dtype=dtype)
        report, state = optimizer.report(params), optimizer.init(params).curvature
        kept = jax.tree.leaves((state.blocks, state.inverses))
        assert report.state_bytes == sum(x.nbytes for x in kept)
        assert report.state_size == sum(x.size for x in kept)
        assert f"{report.state_bytes} bytes" in str(report)
        sizes.append(report.state_bytes)
    assert sizes[0] - sizes[1] == sum(x.nbytes for x in jax.tree.leaves(state.blocks))


@pytest.mark.parametrize("dtype", ["float16", "int32", "nonsense", 3])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="factor_dtype must be 'bfloat16', 'float32', 'float64' or None; got"):
        ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch_of()[0], factor_dtype=dtype)


@pytest.mark.sweep
def test_large_factors_are_cut_in_blocks_of_a_size() -> None:
    x, params = normal(0, 6, 30), {"w": normal(1, 30, 4)}
    batch = x, jax.device_put(np.arange(6) % 4)

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    def sizes(**options: Any) -> list[tuple[int, int]]:
        blocks = ggn_jax.KFACLinearOperator(model_fn, CE, params, batch, key=KEY, **options).blocks.blocks
        return [block.a[0].shape[:2] for block in blocks]

    assert sizes() == [(1, 30)]
    assert sizes(max_dense_size=29) == [(2, 15)]  # the size of blocks is at most that of dense factors
    assert sizes(max_dense_size=29, block_size=7) == [(5, 6)]
    assert sizes(max_dense_size=29, block_size=9) == [(2, 8), (2, 7)]
    assert sizes(block_size=10) == [(1, 30)]
