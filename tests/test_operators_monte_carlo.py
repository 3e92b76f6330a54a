"""Curvature operators of drawn vectors: the same draws however they are computed, and no bias."""

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    CE,
    MLP_PARAMS,
    PROBLEMS,
    N,
    Problem,
    StudentLoss,
    StudentLossWithFactor,
    X,
    assert_close,
    flat,
    mlp,
    normal,
)

from ggn_jax import GGNDiagonalLinearOperator, GGNLinearOperator

# A plain one, one with ignored tokens, and a weight for each example; `test_vectors.py` has the draws of all losses.
drawn_problems = pytest.mark.parametrize("problem", [CE, PROBLEMS[2], PROBLEMS[5]], ids=lambda problem: problem.name)


@drawn_problems
@pytest.mark.by_default("ce-options")
def test_monte_carlo_draws(problem: Problem) -> None:
    """The same for every chunk size and for the diagonal; a function of the key."""
    key = jax.random.key(0)
    matrix = GGNLinearOperator(*problem.args, mc_samples=2, key=key).as_matrix()
    for chunk_size in (1, 3) if problem is CE else (3,):
        chunked = GGNLinearOperator(*problem.args, mc_samples=2, key=key, chunk_size=chunk_size)
        assert_close(flat(chunked.mv(problem.vector)), matrix @ flat(problem.vector))
    for chunk_size, vector_chunk_size in ((None, 1), (3, 2)) if problem is CE else ((3, 2),):
        options = {"chunk_size": chunk_size, "vector_chunk_size": vector_chunk_size}
        diagonal = GGNDiagonalLinearOperator(*problem.args, mc_samples=2, key=key, **options)
        assert_close(flat(diagonal.entries), np.diagonal(matrix))
    again = GGNLinearOperator(*problem.args, mc_samples=2, key=jax.random.key(0)).as_matrix()
    np.testing.assert_array_equal(again, matrix)
    other = GGNLinearOperator(*problem.args, mc_samples=2, key=jax.random.key(1)).as_matrix()
    assert not np.allclose(other, matrix)


def assert_unbiased(samples: np.ndarray, want: np.ndarray) -> None:
    """The mean over axis 0 is `want` within 6 standard errors, which must be small enough to see a wrong factor."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert np.linalg.norm(error) < 0.15 * np.linalg.norm(want)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - want), 6 * error + 1e-9)


@drawn_problems
@pytest.mark.by_default("bce-weight-of-batch")
def test_monte_carlo_is_unbiased(problem: Problem) -> None:
    def matrix(key: jax.Array) -> jax.Array:
        return GGNLinearOperator(*problem.args, mc_samples=1, key=key).as_matrix()

    keys = jax.random.split(jax.random.key(7), 3000)
    assert_unbiased(np.asarray(jax.jit(jax.vmap(matrix))(keys)), problem.ggn())


@pytest.mark.parametrize("problem", [CE, PROBLEMS[6]], ids=lambda problem: problem.name)
@pytest.mark.by_default("ce-options")
def test_monte_carlo_diagonal_is_unbiased(problem: Problem) -> None:
    def entries(key: jax.Array) -> jax.Array:
        return ravel_pytree(GGNDiagonalLinearOperator(*problem.args, mc_samples=3, key=key).entries)[0]

    keys = jax.random.split(jax.random.key(8), 1000)
    assert_unbiased(np.asarray(jax.jit(jax.vmap(entries))(keys)), np.diagonal(problem.ggn()))


@pytest.mark.sweep
def test_monte_carlo_converges_with_samples() -> None:
    """Many samples of one key: the error falls as their square root."""
    errors = [
        np.linalg.norm(GGNLinearOperator(*CE.args, mc_samples=num, key=jax.random.key(2)).as_matrix() - CE.ggn())
        for num in (1, 100, 10_000)
    ]
    assert errors[2] < 0.03 * np.linalg.norm(CE.ggn())
    assert errors[2] < errors[1] / 3 < errors[0] / 9


@pytest.mark.sweep
def test_monte_carlo_of_a_loss_without_hessian() -> None:
    """Student-t: the estimate's mean is the Fisher, not the indefinite Hessian."""
    batch = (X, normal("y", N, 3))
    exact = GGNLinearOperator(mlp, StudentLossWithFactor(), MLP_PARAMS, batch).as_matrix()
    jacobian = CE.jacobian()
    assert_close(exact, 0.75 / (3 * N) * jacobian.T @ jacobian)
    many = GGNLinearOperator(mlp, StudentLoss(), MLP_PARAMS, batch, mc_samples=20_000, key=jax.random.key(0))
    assert np.linalg.norm(many.as_matrix() - exact) < 0.05 * np.linalg.norm(exact)
