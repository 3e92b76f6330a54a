"""Curvature operators in matfree's estimators."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from matfree import decomp, eig, funm, stochtrace
from problems import (
    CE,
    DAMPING,
    assert_close,
    flat,
)

from ggn_jax import (
    GGNLinearOperator,
    HessianLinearOperator,
)


@pytest.fixture
def usual_promotion() -> Any:
    """matfree does not keep to the strict promotion of our tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("usual_promotion")
def test_matfree_trace_and_diagonal() -> None:
    ggn = GGNLinearOperator(*CE.args)

    sampler = stochtrace.sampler_signs(CE.params, num=4000)
    estimate = stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace_and_diagonal(), sampler)
    mean, sem = jax.jit(lambda key: estimate(ggn.mv, key))(jax.random.key(0))

    assert abs(mean["trace"] - np.trace(CE.ggn())) < 6 * sem["trace"]
    assert sem["trace"] < 0.02 * np.trace(CE.ggn())
    assert jax.tree.structure(mean["diagonal"]) == jax.tree.structure(CE.params)
    error = np.abs(flat(mean["diagonal"]) - np.diagonal(CE.ggn()))
    np.testing.assert_array_less(error, 6 * flat(sem["diagonal"]) + 1e-12)


@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.sweep
def test_matfree_lanczos_eigenvalues() -> None:
    hessian = HessianLinearOperator(*CE.args)
    theta, unravel = ravel_pytree(CE.params)

    def mv(v: jax.Array) -> jax.Array:
        return ravel_pytree(hessian.mv(unravel(v)))[0]

    v0 = jax.random.normal(jax.random.key(0), theta.shape, theta.dtype)
    values, _ = eig.eigh_partial(decomp.tridiag_sym(theta.size, reortho="full"))(mv, v0)
    want = np.linalg.eigvalsh(CE.hessian())
    assert_close(values[jnp.array([0, -1])], want[[0, -1]], 1e-8)


@pytest.mark.usefixtures("usual_promotion")
def test_matfree_log_determinant() -> None:
    """Stochastic Lanczos quadrature of `log det (G + damping I)`, as in a Laplace approximation's evidence."""
    ggn = GGNLinearOperator(*CE.args).damped(DAMPING)

    integrand = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(15))
    sampler = stochtrace.sampler_signs(CE.params, num=1000)
    estimate = stochtrace.estimator_monte_carlo_mean_and_sem(integrand, sampler)
    mean, sem = jax.jit(lambda key: estimate(ggn.mv, key))(jax.random.key(0))

    want = np.linalg.slogdet(CE.ggn() + DAMPING * np.eye(len(CE.ggn())))[1]
    assert abs(mean - want) < 6 * sem
    assert sem < 0.03 * abs(want)
