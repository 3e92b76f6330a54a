"""Functions of blocks in float32: what is resolved, and numbers near the ends of its range."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from block_cases import INPUTS, LOSS, PARAMS, TARGETS, flat, model_fn

import ggn_jax
from ggn_jax.kronecker import functions
from ggn_jax.kronecker.algebra import Kronecker, Spectral
from ggn_jax.kronecker.linalg import norm, zero_below_resolution
from ggn_jax.kronecker.split import split_inverses


def test_float32_factors_of_few_data() -> None:
    """Rounding puts eigenvalues of a null space anywhere up to `eps * largest`: 1e-2 of this damping."""
    rng = np.random.default_rng(0)
    x, g = np.abs(rng.normal(size=(30, 120))), rng.normal(size=(200, 5))
    x[:, ::7] = 0  # dead pixels
    a, b = 50 * x.T @ x / 30, g.T @ g / 200
    block = Kronecker((jnp.asarray(a, jnp.float32)[None],), (jnp.asarray(b, jnp.float32)[None],))
    damping = jnp.full(1, 1e-3, jnp.float32)
    (spectrum,) = functions.spectra([block])
    inverse = spectrum.map("inverse", damping)
    dense = np.kron(b, a) + 1e-3 * np.eye(600)
    m = rng.normal(size=(1, 5, 120))
    want = np.linalg.solve(dense, m.reshape(-1))
    got = np.asarray(inverse.mv(jnp.asarray(m, jnp.float32)), float).reshape(-1)
    assert np.linalg.norm(got - want) < 2e-4 * np.linalg.norm(want)
    logdet = jnp.sum(jnp.log(spectrum.map("shift", damping).values))
    np.testing.assert_allclose(logdet, np.linalg.slogdet(dense)[1], rtol=1e-5)
    values = np.asarray(
        zero_below_resolution(jnp.asarray([[-1e-9, 1e-8, 4e-7, 1e-6, 1.0], [0.0, 0, 0, 0, np.nan]], jnp.float32))
    )
    np.testing.assert_array_equal(values[0], np.asarray([0, 0, 0, 1e-6, 1], np.float32))
    assert np.isnan(values[1]).any()


@jax.jit
def of_small_numbers(a: list[jax.Array], b: list[jax.Array]) -> Any:
    block = Kronecker(tuple(a), tuple(b))
    (inverse,) = split_inverses([block], [jnp.asarray(0.5, jnp.float32)])
    other = Spectral(None, None, jnp.full((1, 4, 3), 1e-25, jnp.float32))
    return block.norms(), norm(a[0]), block.nearest(), inverse, other.norms()


@pytest.mark.parametrize("size", [1e-20, 1e-10, 1.0, 1e10, 1e18])
def test_scales_in_float32(size: float) -> None:
    """Squares of what float32 holds are out of its range."""
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 4, 4))
    a, b = (np.stack([r @ r.T for r in root]) for root in roots)
    a[0] *= 1e3
    low = [[(x * s).astype(np.float32)[None] for x in xs] for xs, s in ((a, size), (b, 1 / size))]
    norms, first, near, inverse, small = of_small_numbers(*low)
    np.testing.assert_allclose(norms[0], np.linalg.norm(sum(map(np.kron, b, a))), rtol=1e-5)
    np.testing.assert_allclose(first, np.linalg.norm(low[0][0].astype(float)), rtol=1e-5)
    rearranged = sum(np.outer(y, x) for x, y in zip(a, b, strict=True))
    u, s, vt = np.linalg.svd(rearranged)
    got = np.outer(np.asarray(near.b[0][0], float), np.asarray(near.a[0][0], float))
    np.testing.assert_allclose(got, s[0] * np.outer(u[:, 0], vt[0]), rtol=0, atol=1e-5 * s[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(inverse))
    np.testing.assert_allclose(small[0], 1e-25 * 12**0.5, rtol=1e-6)


def test_kfoc_of_small_outputs_in_float32() -> None:
    """Entries of 1e-10 have fourth powers below float32's range."""
    inputs, targets, size = INPUTS[1].astype("float32"), TARGETS.astype("float32"), jnp.asarray(1e-10, "float32")
    params = {name: PARAMS[name].astype("float32") for name in "wbv"}

    def kfoc(by: jax.Array) -> jax.Array:
        def scaled(p: Any, x: jax.Array) -> jax.Array:
            return by * model_fn(p, x)

        args = scaled, LOSS, params, (inputs, targets)
        return ggn_jax.KFOCLinearOperator(*args, fisher_type="type-2").block("v")

    fn = jax.jit(kfoc)
    whole = fn(jnp.asarray(1.0, "float32"))
    np.testing.assert_allclose(fn(size) / size**2, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.sweep
def test_preconditioned_conjugate_gradients_in_float32() -> None:
    """To the accuracy that float32 allows, with the residual as the recurrence has it (`KFACLinearOperator`)."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for s in ((9, 20), (20, 10))]
    inputs, labels = jnp.asarray(rng.normal(size=(60, 9)), jnp.float32), jax.device_put(rng.integers(10, size=60))

    def net(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p[0]) @ p[1]

    loss, damping = ggn_jax.CrossEntropyLoss(), 1e-4
    args = net, loss, params, (inputs, labels)
    ggn = ggn_jax.GGNLinearOperator(*args).damped(damping)
    preconditioner = 1e3 * ggn_jax.KFACLinearOperator(*args, fisher_type="type-2").inverse(damping)
    gradient = jax.grad(lambda p: loss(net(p, inputs), labels))(params)
    with jax.numpy_dtype_promotion("standard"):
        solver = lx.CG(rtol=1e-6, atol=1e-7, stabilise_every=None, max_steps=2000)
        solution = lx.linear_solve(ggn, gradient, solver, options={"preconditioner": preconditioner}, throw=False)
    with jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda x: x.astype(float), (params, gradient))
        exact = ggn_jax.GGNLinearOperator(net, loss, wide[0], (inputs.astype(float), labels)).as_matrix()
    want = np.linalg.solve(exact + damping * np.eye(len(exact)), flat(wide[1]))
    assert np.linalg.norm(np.asarray(flat(solution.value), float) - want) < 1e-3 * np.linalg.norm(want)
