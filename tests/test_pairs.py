"""Inverses of sums of Kronecker terms: against dense algebra in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from block_cases import flat
from jax.flatten_util import ravel_pytree

import ggn_jax
from ggn_jax.kronecker.algebra import Kronecker
from ggn_jax.kronecker.pairs import near_pair
from ggn_jax.kronecker.refine import refined
from ggn_jax.kronecker.split import split_inverses

RNG = np.random.default_rng(0)


def psd(size: int, rank: int, scale: float = 1.0) -> jax.Array:
    root = RNG.normal(size=(2, size, rank))
    return jnp.asarray(scale * root @ np.swapaxes(root, 1, 2))


def positive(size: int) -> jax.Array:
    return jax.device_put(RNG.uniform(0.5, 2, size=(2, size)))


def dense(x: jax.Array) -> jax.Array:
    return jnp.diag(x) if x.ndim == 1 else x


def damped(a: Any, b: Any, damping: Any) -> jax.Array:
    """The documented formula, as a dense matrix."""
    a, b = [dense(x) for x in a], [dense(x) for x in b]
    means = [(jnp.trace(x) / len(x), jnp.trace(y) / len(y)) for x, y in zip(a, b, strict=True)]
    rho = jnp.sqrt(damping / sum(x * y for x, y in means))
    shifted = [
        jnp.kron(y + rho * mean_b * jnp.eye(len(y)), x + rho * mean_a * jnp.eye(len(x)))
        for x, y, (mean_a, mean_b) in zip(a, b, means, strict=True)
    ]
    return sum(shifted[1:], start=shifted[0])


ZERO = jnp.zeros((2, 3, 3))
PAIRS: dict[str, Any] = {
    "full rank": ([psd(4, 6), psd(4, 6, 3)], [psd(3, 5), psd(3, 5, 0.2)]),
    "low rank": ([psd(4, 1), psd(4, 2)], [psd(3, 1), psd(3, 1)]),
    "a term is 0": ([psd(4, 1), psd(4, 2)], [psd(3, 1), ZERO]),
    "diagonal": ([positive(4), positive(4)], [psd(3, 1), psd(3, 1)]),
    "one is diagonal": ([positive(4), psd(4, 2)], [psd(3, 1), positive(3)]),
    "equal": ([psd(4, 6)] * 2, [psd(3, 5)] * 2),
    "commuting, of equal eigenvalues": ([psd(4, 6)] * 2, [jnp.stack([jnp.eye(3)] * 2)] * 2),
    "of different sizes": ([psd(4, 6, 1e-12), psd(4, 6)], [psd(3, 5, 1e10), psd(3, 5)]),
}


M = jax.device_put(RNG.normal(size=(2, 3, 4)))


@jax.jit
def both(a: Any, b: Any, damping: Any) -> tuple[Any, Any]:
    """What is known of the inverses, and the dense matrices of which they are."""
    inverse = split_inverses([Kronecker(tuple(a), tuple(b))], [damping])[0]
    numbers = inverse.logdets(), inverse.traces(), inverse.norms()
    wanted = [damped([x[g] for x in a], [y[g] for y in b], damping) for g in range(2)]
    return (inverse.mv(M), inverse.diagonal(), *numbers), wanted


@jax.jit
def tangents_of(a: Any, b: Any, damping: Any, tangents: Any) -> Any:
    """Derivatives of products and determinants, and those of the dense formula."""

    def ours(a: Any, b: Any, damping: Any) -> Any:
        found = split_inverses([Kronecker(tuple(a), tuple(b))], [damping])[0]
        return found.mv(M)[0].reshape(-1), found.logdets()[0]

    def oracle(a: Any, b: Any, damping: Any) -> Any:
        matrix = damped([x[0] for x in a], [y[0] for y in b], damping)
        return jnp.linalg.solve(matrix, M[0].reshape(-1)), jnp.linalg.slogdet(matrix)[1]

    return [jax.jvp(fn, (a, b, damping), tangents)[1] for fn in (ours, oracle)]


@pytest.mark.by_default("low rank", "of different sizes", "a term is 0", "commuting, of equal eigenvalues")
@pytest.mark.parametrize("name", PAIRS)
def test_damped_inverse(name: str) -> None:
    """Products, determinant, diagonal, trace and norm; and derivatives of the first two."""
    a, b = PAIRS[name]
    damping = jnp.asarray(0.1)
    found, want = both(a, b, damping)
    for g, (product, diagonal, logdet, trace, norm) in enumerate(zip(*map(np.asarray, found), strict=True)):
        dense_inverse = np.linalg.inv(want[g])
        scale = np.abs(dense_inverse).max()
        np.testing.assert_allclose(product.reshape(-1), dense_inverse @ M[g].reshape(-1), atol=1e-11 * scale)
        np.testing.assert_allclose(logdet, np.linalg.slogdet(want[g])[1], atol=1e-10)
        np.testing.assert_allclose(diagonal.reshape(-1), np.diag(dense_inverse), atol=1e-11 * scale)
        np.testing.assert_allclose(trace, np.trace(dense_inverse), rtol=1e-10)
        np.testing.assert_allclose(norm, np.linalg.norm(dense_inverse), rtol=1e-10)

    if name in ("a term is 0", "diagonal", "of different sizes"):
        return  # the derivatives of the others are of the same kinds

    tangents = [x * 0.3 + 0.1 * dense_like(x) for x in a], [y * 0.2 + 0.1 * dense_like(y) for y in b], jnp.asarray(0.7)
    got, expected = tangents_of(a, b, damping, tangents)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9 * np.abs(y).max())


def dense_like(x: jax.Array) -> jax.Array:
    """A change of a factor that is positive semi-definite, and has other eigenvectors."""
    row = jnp.arange(1.0, x.shape[1] + 1)
    return jnp.broadcast_to(row if x.ndim == 2 else jnp.outer(row, row), x.shape)


def test_nothing_at_all() -> None:
    """Where all factors are 0, what is left is the damping."""
    (product, *_), _ = both([jnp.zeros((2, 4, 4))] * 2, [jnp.zeros((2, 3, 3))] * 2, jnp.asarray(0.1))
    np.testing.assert_allclose(product, 10 * M, rtol=1e-14)


@pytest.mark.parametrize("ranks", [(1, 2, 1, 1), (2, 2, 2, 1)])
def test_singular_without_damping(ranks: tuple[int, ...]) -> None:
    a, b = [psd(4, ranks[0]), psd(4, ranks[1])], [psd(3, ranks[2]), psd(3, ranks[3])]
    (product, _, logdets, *_), _ = both(a, b, jnp.asarray(0.0))
    assert (logdets == -jnp.inf).all()
    assert not jnp.isfinite(product).all()


def test_derivatives_that_are_refused() -> None:
    a, b = PAIRS["full rank"]

    def trace(a: Any) -> jax.Array:
        return split_inverses([Kronecker(tuple(a), tuple(b))], [jnp.asarray(0.1)])[0].traces().sum()

    with pytest.raises(NotImplementedError, match="no derivatives here"):
        jax.eval_shape(jax.grad(trace), a)


def test_several_terms_are_joined_where_they_are_alike() -> None:
    """Exact where there are two kinds of them; positive semi-definite always."""
    a, b = PAIRS["full rank"]
    block = Kronecker((a[0], a[1], 2 * a[0], a[1]), (b[0], b[1], b[0], 3 * b[1]))
    near = near_pair(block)
    assert len(near.a) == 2
    np.testing.assert_allclose(near.matrix(), block.matrix(), rtol=1e-12)
    other = near_pair(Kronecker((*a, psd(4, 2)), (*b, psd(3, 2))))
    assert np.linalg.eigvalsh(other.matrix()).min() > -1e-12
    one = near_pair(Kronecker((a[0],) * 3, (b[0],) * 3))  # nothing is left for the second
    np.testing.assert_allclose(one.matrix(), 3 * Kronecker((a[0],), (b[0],)).matrix(), rtol=1e-12)


def test_refinement() -> None:
    """Group by group, with derivatives; a zero vector stays one."""
    a, b = PAIRS["low rank"]
    block, damping = Kronecker(tuple(a), tuple(b)), jnp.asarray(0.1)
    m = jax.device_put(RNG.normal(size=(2, 3, 4))).at[1].set(0)

    def solution(block: Kronecker) -> jax.Array:
        inverse = split_inverses([block], [damping])[0]
        return refined(lambda x: block.mv(x) + damping * x, inverse, m)

    def oracle(block: Kronecker) -> jax.Array:
        return jnp.linalg.solve(block.matrix() + damping * jnp.eye(12)[None], m.reshape(2, 12, 1)).reshape(m.shape)

    change = Kronecker(tuple(a[::-1]), tuple(b))
    got, want = (jax.jvp(jax.jit(fn), (block,), (change,)) for fn in (solution, oracle))
    np.testing.assert_allclose(got[0], want[0], atol=1e-11)
    np.testing.assert_allclose(got[1], want[1], atol=1e-10 * np.abs(want[1]).max())


# A weight that is used twice, with 33 x 32 = 1056 rows: more than are decomposed as a matrix.
BIG = {"w": jax.device_put(RNG.normal(size=(32, 33)) / 6)}
X = tuple(jax.device_put(RNG.normal(size=(40, 32))) * s for s in (1.0, 0.3))
Y = jax.device_put(RNG.normal(size=(40, 33)))


def siamese(p: Any, x: Any) -> jax.Array:
    return jnp.tanh(x[0] @ p["w"]) * 2 + jnp.sin(x[1] @ p["w"])


@pytest.fixture(scope="module")
def large() -> Any:
    operator = ggn_jax.KFACLinearOperator(siamese, ggn_jax.MSELoss(), BIG, (X, Y), fisher_type="type-2")
    matrix = np.asarray(operator.block("w"))
    vector = {"w": jax.device_put(RNG.normal(size=(32, 33)))}
    return operator, matrix, vector, np.asarray(vector["w"].T.reshape(-1))


def as_block(tree: Any) -> np.ndarray:
    return np.asarray(tree["w"].T.reshape(-1))


def test_large_sum_of_two_terms(large: Any) -> None:
    operator, matrix, vector, v = large
    assert matrix.shape == (1056, 1056)
    np.testing.assert_allclose(as_block(operator.inverse().mv(vector)), np.linalg.solve(matrix, v), rtol=1e-8)
    np.testing.assert_allclose(operator.logdet(), np.linalg.slogdet(matrix)[1], rtol=1e-10)
    damping = 1e-3
    exact = np.linalg.solve(matrix + damping * np.eye(1056), v)
    np.testing.assert_allclose(as_block(operator.solve(vector, damping)), exact, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(as_block(operator.damped(damping).solve(vector)), exact, rtol=1e-8, atol=1e-9)
    solved = lx.linear_solve(operator.damped(damping), vector, ggn_jax.BlockSolver()).value
    np.testing.assert_allclose(as_block(solved), exact, rtol=1e-8, atol=1e-9)
    (kept,) = operator.factors().values()
    shifted = np.asarray(damped([x[0] for x in kept.a], [x[0] for x in kept.b], damping))
    want = np.linalg.solve(shifted, v)
    for method in ("exact", "heuristic"):
        np.testing.assert_allclose(as_block(operator.inverse(damping, method).mv(vector)), want, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(operator.logdet(damping), np.linalg.slogdet(shifted)[1], rtol=1e-10)
    np.testing.assert_allclose(as_block(operator.solve(vector, damping, "heuristic")), want, rtol=1e-8, atol=1e-9)
    scaled = 2 * operator.inverse(damping) / 4
    np.testing.assert_allclose(as_block(scaled.mv(vector)), want / 2, rtol=1e-8, atol=1e-9)
    with pytest.raises(NotImplementedError, match="1056 rows"):
        scaled.sqrt()


def test_what_is_exact(large: Any) -> None:
    operator = large[0]
    assert not operator.is_exact()
    assert operator.is_exact("solve")
    assert operator.is_exact("inverse", damped=False)
    assert not operator.is_exact("inverse")
    assert not operator.damped(0.1).is_exact("inverse", damped=False)
    assert not operator.is_exact("root", damped=False)
    with pytest.raises(ValueError, match="function must be"):
        operator.is_exact("logdet")


def test_norm_of_an_inverse_and_damping(large: Any) -> None:
    """As a form with vectors that are not orthogonal."""
    operator = large[0]
    inverse = operator.inverse(0.5)
    want = np.asarray(inverse.block("w")) + 0.25 * np.asarray(operator.block("w")) + 0.1 * np.eye(1056)
    total = (inverse + operator / 4).damped(0.1)
    np.testing.assert_allclose(total.frobenius_norm(), np.linalg.norm(want), rtol=1e-10)
    np.testing.assert_allclose(total.trace(), np.trace(want), rtol=1e-10)


def test_optimizer_of_tied_weights() -> None:
    """Its direction is the inverse of both terms, damped, times the gradient."""
    params = {"w": jax.device_put(RNG.normal(size=(3, 4)))}
    batch = tuple(x[:, :3] for x in X), Y[:, :4]
    loss = ggn_jax.MSELoss()
    options: Any = {"fisher_type": "type-2"}
    scale = ggn_jax.scale_by_kfac(siamese, loss, example_inputs=batch[0], damping=1e-2, **options)
    grads = jax.grad(lambda p: loss(siamese(p, batch[0]), batch[1]))(params)
    got, _ = scale.update(grads, scale.init(params), params, batch=batch)
    operator = ggn_jax.KFACLinearOperator(siamese, loss, params, batch, **options)
    (kept,) = operator.factors().values()
    shifted = damped([x[0] for x in kept.a], [x[0] for x in kept.b], 1e-2)
    want = np.linalg.solve(shifted, grads["w"].T.reshape(-1))
    np.testing.assert_allclose(as_block(got), want, rtol=1e-9)
    assert flat(got).shape == ravel_pytree(params)[0].shape
