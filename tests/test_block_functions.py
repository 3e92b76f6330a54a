"""Functions of operators with blocks: against dense algebra in float64, with derivatives, sums and multiples."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from block_cases import DAMPING, INPUTS, LOSS, PARAMS, TARGETS, VECTOR, N, flat, model_fn
from jax.flatten_util import ravel_pytree

import ggn_jax
from ggn_jax.kronecker import functions, sums
from ggn_jax.kronecker.algebra import Kronecker, Spectral
from ggn_jax.operators.blocks import BlockLinearOperator

SIZE = 28
SHARES = {"w": 0.1, "b": 0.1, "v": 0.7}  # a damping for each layer
DAMPINGS = np.diag(np.asarray(ravel_pytree(jax.tree.map(lambda d, p: np.full(p.shape, d), SHARES, PARAMS))[0]))


def make(cls: Any, params: Any = PARAMS, inputs: Any = INPUTS[0]) -> Any:
    return cls(model_fn, LOSS, params, (inputs, TARGETS), fisher_type="type-2")


@cache
def kfacs() -> list[Any]:
    return [make(ggn_jax.KFACLinearOperator, inputs=x) for x in INPUTS]


@cache
def ekfacs() -> list[Any]:
    return [make(ggn_jax.EKFACLinearOperator, inputs=x) for x in INPUTS]


@cache
def matrices() -> list[np.ndarray]:
    return [np.asarray(operator.as_matrix()) for operator in (*kfacs(), *ekfacs())]


EYE = np.eye(SIZE)

# How an operator is made of KFACs `a`, `b` and EKFACs `c`, `d`, and the matrix that it is.
MADE: dict[str, tuple[Callable[..., Any], Callable[..., np.ndarray]]] = {
    "damped": (lambda a, b, c, d: a.damped(0.3), lambda a, b, c, d: a + 0.3 * EYE),
    "damped by layers": (lambda a, b, c, d: a.damped(SHARES), lambda a, b, c, d: a + DAMPINGS),
    "sum": (lambda a, b, c, d: a + b, lambda a, b, c, d: a + b),
    "sum of EKFACs": (lambda a, b, c, d: c + d, lambda a, b, c, d: c + d),
    "mixed": (
        lambda a, b, c, d: 2.0 * a.damped(0.1) + c / 4,
        lambda a, b, c, d: 2 * a + 0.2 * EYE + c / 4,
    ),
    "inverse and sum": (
        lambda a, b, c, d: a.inverse(0.3) * 2 + b,
        lambda a, b, c, d: 2 * np.linalg.inv(a + 0.3 * EYE) + b,
    ),
    "damped inverse": (
        lambda a, b, c, d: a.inverse(0.3).damped(0.5),
        lambda a, b, c, d: np.linalg.inv(a + 0.3 * EYE) + 0.5 * EYE,
    ),
    "mean": (
        lambda a, b, c, d: ggn_jax.average_operators([a, b], [1, 3.0]),
        lambda a, b, c, d: a / 4 + 3 * b / 4,
    ),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.by_default("inverse and sum", "mixed", "damped by layers", "mean")
def test_operators_made_of_others(name: str) -> None:
    make_operator, matrix_of = MADE[name]
    operator, want = make_operator(*kfacs(), *ekfacs()), matrix_of(*matrices())
    assert isinstance(operator, BlockLinearOperator)
    assert lx.is_positive_semidefinite(operator)
    assert operator.is_exact()
    np.testing.assert_allclose(operator.as_matrix(), want, atol=1e-13)
    np.testing.assert_allclose(operator.trace(), np.trace(want), rtol=1e-13)
    np.testing.assert_allclose(operator.frobenius_norm(), np.linalg.norm(want), rtol=1e-13)
    np.testing.assert_allclose(flat(operator.diagonal()), np.diag(want), atol=1e-13)
    damped = want + 0.2 * EYE
    np.testing.assert_allclose(operator.logdet(0.2), np.linalg.slogdet(damped)[1], rtol=1e-12)
    np.testing.assert_allclose(flat(operator.solve(VECTOR, 0.2)), np.linalg.solve(damped, flat(VECTOR)), atol=1e-12)
    root = operator.sqrt(0.2)
    np.testing.assert_allclose(flat(root.mv(root.mv(VECTOR))), damped @ flat(VECTOR), atol=1e-12)
    np.testing.assert_allclose(operator.block("v"), want[np.ix_(ROWS, ROWS)], atol=1e-13)


ROWS = 4 + np.arange(12).reshape(4, 3).T.reshape(-1)  # of `v`, as [out, in]


def test_tags_of_multiples() -> None:
    for operator in (kfacs()[0], ggn_jax.GGNLinearOperator(model_fn, LOSS, PARAMS, (INPUTS[0], TARGETS))):
        for number in (2, 0.5, np.float32(2), jnp.asarray(2.0), 0):
            assert lx.is_positive_semidefinite(number * operator)
        for number in (-2, -0.5, jnp.asarray(-2.0)):
            assert not lx.is_positive_semidefinite(number * operator)
            assert not lx.is_positive_semidefinite(operator / number)
        assert not lx.is_positive_semidefinite(-operator)
        assert lx.is_positive_semidefinite(operator / 2)
        unknown = jax.jit(lambda x, operator=operator: int(lx.is_positive_semidefinite(x * operator)))(1.0)
        assert not unknown


def test_average_of_factors() -> None:
    """Of batches of one size it is KFAC of all data, which the mean of operators is not."""
    both = ggn_jax.KFACLinearOperator(
        model_fn,
        LOSS,
        PARAMS,
        (jnp.concatenate(INPUTS), jnp.concatenate([TARGETS, TARGETS])),
        fisher_type="type-2",
    )
    mean = ggn_jax.average_factors(kfacs())
    np.testing.assert_allclose(mean.as_matrix(), both.as_matrix(), atol=1e-14)
    a, b, *_ = matrices()
    assert np.abs(mean.as_matrix() - (a + b) / 2).max() > 1e-4
    with pytest.raises(TypeError, match=r"\['w'\], \['b'\] is a Spectral: use average_operators"):
        ggn_jax.average_factors(ekfacs())
    with pytest.raises(ValueError, match="2 numbers"):
        ggn_jax.average_factors(kfacs(), [1.0])
    with pytest.raises(ValueError, match="at least 0"):
        ggn_jax.average_operators(kfacs(), [1.0, -1.0])
    other = ggn_jax.KFACLinearOperator(
        model_fn, LOSS, PARAMS, (INPUTS[0], TARGETS), fisher_type="type-2", bias="separate"
    )
    with pytest.raises(ValueError, match=r"operators\[1\] has other blocks"):
        ggn_jax.average_operators([kfacs()[0], other])


def test_damping_by_layers_that_a_block_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"\['w'\], \['b'\] are one, with damping 0.1, 0.2"):
        kfacs()[0].damped({"w": 0.1, "b": 0.2, "v": 0.7})
    with pytest.raises(ValueError, match=r"must be a number, or a dict of .*a pytree of numbers that is a prefix"):
        kfacs()[0].logdet({"w": 0.1, "b": 0.2})
    with pytest.raises(ValueError, match=r"damping\['v'\] must not be negative"):
        kfacs()[0].inverse({"w": 0.1, "b": 0.1, "v": -1.0})
    with pytest.raises(ValueError, match="unknown under jit"):
        jax.jit(lambda d: kfacs()[0].logdet(d))(SHARES)
    ggn = ggn_jax.GGNLinearOperator(model_fn, LOSS, PARAMS, (INPUTS[0], TARGETS))
    want = ggn.mv(VECTOR)["v"] + 0.7 * VECTOR["v"]
    np.testing.assert_allclose(ggn.damped({"w": 0.1, "b": 0.2, "v": 0.7}).mv(VECTOR)["v"], want, rtol=1e-14)


@pytest.mark.sweep
def test_solves_by_lineax() -> None:
    """By blocks, with the derivative in the damping `-(K + x)^-2 v`."""

    def solve(x: jax.Array) -> jax.Array:
        return flat(lx.linear_solve(kfacs()[0].damped(x), VECTOR, ggn_jax.BlockSolver()).value)

    solution, change = jax.jvp(solve, (jnp.asarray(0.3),), (jnp.asarray(1.0),))
    inverse = np.linalg.inv(matrices()[0] + 0.3 * EYE)
    np.testing.assert_allclose(solution, inverse @ flat(VECTOR), atol=1e-13)
    np.testing.assert_allclose(change, -inverse @ inverse @ flat(VECTOR), atol=1e-12)
    np.testing.assert_allclose(flat(lx.linear_solve(kfacs()[0].damped(0.3), VECTOR).value), solution, atol=1e-12)
    with pytest.raises(ValueError, match="operators that have blocks"):
        ggn_jax.BlockSolver().init(lx.IdentityLinearOperator(kfacs()[0].in_structure()), {})


# Derivatives.


def dense_kfac(params: Any, inputs: jax.Array) -> list[jax.Array]:
    """The two blocks, by formula."""
    hidden = jnp.tanh(inputs @ params["w"] + params["b"][None])
    rows = jnp.concatenate([inputs, jnp.ones((N, 1))], 1)
    jacobian = params["v"].T[None] * (1 - hidden**2)[:, None]
    size = 2 / (3 * N)
    return [
        jnp.kron(size * jnp.einsum("noi,noj->ij", jacobian, jacobian), rows.T @ rows / N),
        jnp.kron(size * N * jnp.eye(3), hidden.T @ hidden / N),
    ]


ARRAYS = {name: np.asarray(x) for name, x in VECTOR.items()}
PARTS = [np.column_stack([ARRAYS["w"].T, ARRAYS["b"]]).reshape(-1), ARRAYS["v"].T.reshape(-1)]


@jax.custom_jvp
def dense_root(x: jax.Array) -> jax.Array:
    values, q = jnp.linalg.eigh(x)
    return (q * jnp.sqrt(values)[None]) @ q.T


@dense_root.defjvp
def _dense_root_jvp(primals: Any, tangents: Any) -> Any:
    """By the Sylvester equation `R dR + dR R = dX`."""
    root = dense_root(primals[0])
    eye = jnp.eye(len(root))
    solution = jnp.linalg.solve(jnp.kron(root, eye) + jnp.kron(eye, root), tangents[0].reshape(-1))
    return root, solution.reshape(root.shape)


DENSE: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "logdet": lambda x, v: jnp.linalg.slogdet(x)[1],
    "solve": lambda x, v: v @ jnp.linalg.solve(x, v),
    "sqrt": lambda x, v: v @ dense_root(x) @ v,
    "inverse_sqrt": lambda x, v: v @ jnp.linalg.inv(dense_root(x)) @ v,
    "diagonal": lambda x, v: v @ jnp.diag(jnp.linalg.inv(x)),
    "norm": lambda x, v: jnp.sum(jnp.linalg.inv(x) ** 2),
}
OURS: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "logdet": lambda x, d: x.logdet(d),
    "solve": lambda x, d: flat(VECTOR) @ flat(x.solve(VECTOR, d)),
    "sqrt": lambda x, d: flat(VECTOR) @ flat(x.sqrt(d).mv(VECTOR)),
    "inverse_sqrt": lambda x, d: flat(VECTOR) @ flat(x.inverse_sqrt(d).mv(VECTOR)),
    "diagonal": lambda x, d: flat(VECTOR) @ flat(x.inverse(d).diagonal()),
    "norm": lambda x, d: x.inverse(d).frobenius_norm() ** 2,
}


def test_derivatives() -> None:
    """In parameters, data and damping, forward and reverse, where eigenvalues are equal and factors are singular."""

    def dense(params: Any, inputs: jax.Array, damping: jax.Array) -> jax.Array:
        blocks = [block + damping * jnp.eye(len(block)) for block in dense_kfac(params, inputs)]
        return sum(jnp.stack([fn(block, v) for fn in DENSE.values()]) for block, v in zip(blocks, PARTS, strict=True))

    def ours(params: Any, inputs: jax.Array, damping: jax.Array) -> jax.Array:
        operator = make(ggn_jax.KFACLinearOperator, params, inputs)
        return jnp.stack([OURS[name](operator, damping) for name in DENSE])

    def with_rows(fn: Any) -> Any:
        """The values, and the gradient of each as a row."""
        rows = jax.jacrev(fn, (0, 1, 2))
        return jax.jit(
            lambda *at: (fn(*at), jnp.concatenate([j.reshape(6, -1) for j in jax.tree.leaves(rows(*at))], 1))
        )

    point = PARAMS, INPUTS[0], jnp.asarray(DAMPING)
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=float)).reshape(x.shape), point)
    along = np.asarray(flat(direction))
    changes = jax.jit(lambda *t: jax.jvp(ours, point, t)[1])(*direction)
    for name, value, gradient, got, slopes, change in zip(
        DENSE, *with_rows(dense)(*point), *with_rows(ours)(*point), changes, strict=True
    ):
        np.testing.assert_allclose(got, value, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(slopes, gradient, rtol=0, atol=1e-11 * np.abs(gradient).max(), err_msg=name)
        np.testing.assert_allclose(change, np.asarray(gradient) @ along, rtol=1e-10, err_msg=name)


@pytest.mark.sweep
def test_derivatives_of_ekfac_and_heuristic_inverses() -> None:
    """Against finite differences, in the parameters and in class weights, at eigenvalues that differ."""
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda p: jax.device_put(rng.normal(size=p.shape)), PARAMS)

    def values(params: Any, weight: jax.Array) -> jax.Array:
        args = model_fn, ggn_jax.CrossEntropyLoss(weight), params, (INPUTS[1], jax.device_put(np.arange(N) % 3))
        ekfac = ggn_jax.EKFACLinearOperator(*args, fisher_type="type-2")
        kfac = ggn_jax.KFACLinearOperator(*args, fisher_type="type-2")
        heuristic = flat(VECTOR) @ flat(kfac.solve(VECTOR, DAMPING, "heuristic"))
        return jnp.stack([ekfac.logdet(0.01), flat(VECTOR) @ flat(ekfac.solve(VECTOR, 0.1)), heuristic])

    point = params, jnp.asarray([0.5, 1.0, 2.0])
    jacobian = jax.jit(jax.jacrev(values, (0, 1)))(*point)
    direction = jax.tree.map(lambda x: jnp.sin(1 + jnp.arange(x.size, dtype=float)).reshape(x.shape), point)
    got = sum(
        jnp.tensordot(j, t, t.ndim) for j, t in zip(jax.tree.leaves(jacobian), jax.tree.leaves(direction), strict=True)
    )
    fn, step = jax.jit(values), 1e-5
    up, down = (fn(*jax.tree.map(lambda p, t, s=s: p + s * t, point, direction)) for s in (step, -step))
    np.testing.assert_allclose(got, (up - down) / (2 * step), rtol=1e-6)


# Singular operators, long sums and diagonals.


@pytest.mark.parametrize("operators", [kfacs, ekfacs], ids=["kfac", "ekfac"])
def test_singular_operators(operators: Any) -> None:
    """An input that is always 0."""
    operator = operators()[0]
    assert operator.logdet() == -jnp.inf
    assert operator.det() == 0
    with pytest.raises(FloatingPointError, match=r"\['w'\], \['b'\]"):
        operator.inverse()


@pytest.mark.sweep
def test_large_sums_of_kronecker_terms_by_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the dense matrix would be too large."""
    monkeypatch.setattr(functions, "MAX_DENSE_ROWS", 11)
    monkeypatch.setattr(sums, "MAX_DENSE_ROWS", 11)
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 4, 4))
    a, b = ([r @ r.T for r in root] for root in roots)
    block = Kronecker(*(tuple(jnp.asarray(x)[None] for x in xs) for xs in (a, b)))
    u, s, vt = np.linalg.svd(sum(np.outer(y, x) for x, y in zip(a, b, strict=True)))
    nearest = s[0] * np.kron(u[:, 0].reshape(4, 4), vt[0].reshape(3, 3))
    m = rng.normal(size=(1, 4, 3))
    (spectrum,) = functions.spectra([block])
    got = spectrum.map("inverse", jnp.asarray([0.1])).mv(jnp.asarray(m))
    np.testing.assert_allclose(got.reshape(-1), np.linalg.solve(nearest + 0.1 * np.eye(12), m.reshape(-1)), atol=1e-10)
    assert not sums.is_exact(block, "root", False)
    assert not sums.is_representable(sums.add(block, Spectral(None, None, jnp.ones((1, 4, 3)))))


def test_diagonal_operators() -> None:
    """All that operators with blocks have."""
    one, two = (ggn_jax.GGNDiagonalLinearOperator(model_fn, LOSS, PARAMS, (x, TARGETS)) for x in INPUTS)
    d, e = (np.asarray(flat(operator.entries)) for operator in (one, two))
    damped = d + np.diag(DAMPINGS)
    for operator, want in (
        (one.damped(SHARES), damped),
        (one.inverse(SHARES), 1 / damped),
        (one.inverse(SHARES, scale=10.0), 10 / damped),
        (one.sqrt(SHARES), damped**0.5),
        (one.inverse_sqrt(SHARES), damped**-0.5),
        (one + two, d + e),
        (3 * one / 2, 1.5 * d),
    ):
        assert lx.is_positive_semidefinite(operator)
        assert lx.is_diagonal(operator)
        np.testing.assert_allclose(flat(operator.mv(VECTOR)), want * flat(VECTOR), rtol=1e-13)
    np.testing.assert_allclose(flat(one.solve(VECTOR, SHARES)), flat(VECTOR) / damped, rtol=1e-13)
    np.testing.assert_allclose(one.trace(), d.sum(), rtol=1e-13)
    np.testing.assert_allclose(one.frobenius_norm(), np.linalg.norm(d), rtol=1e-13)
    np.testing.assert_allclose(one.logdet(SHARES), np.log(damped).sum(), rtol=1e-13)
    np.testing.assert_allclose(one.det(SHARES), damped.prod(), rtol=1e-12)
    assert one.logdet() == -jnp.inf  # of the weights of an input that is always 0
    np.testing.assert_array_equal(one.block("v"), np.diag(d[4:16]))
    assert one.diagonal() is one.entries
    with pytest.raises(KeyError, match="no parameter 'u'"):
        one.block("u")
    with pytest.raises(KeyError, match=r"'\*' fits several.*submatrix takes several"):
        one.block("*")
    again = ggn_jax.GGNDiagonalLinearOperator.from_diagonal(jax.tree.map(np.asarray, one.entries))
    np.testing.assert_array_equal(again.block("v*"), one.block("v"))
    with pytest.raises(TypeError, match=r"entries\['w'\] must hold floating-point numbers; got dtype int"):
        ggn_jax.GGNDiagonalLinearOperator.from_diagonal({"w": jnp.arange(3)})
    with pytest.raises(ValueError, match=r"entries\['w'\] must not be negative"):
        ggn_jax.GGNDiagonalLinearOperator.from_diagonal({"w": -jnp.ones(3)})
