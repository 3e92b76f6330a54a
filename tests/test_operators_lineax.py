"""Curvature operators as operators of lineax: its solvers, algebra and tags, and damping."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from designs import covering
from problems import (
    CE,
    DAMPING,
    FACTORIES,
    MLP_PARAMS,
    PROBLEMS,
    X,
    assert_close,
    dense_solve,
    flat,
    mlp,
    names_of_classes,
    normal,
)

import ggn_jax
from ggn_jax import (
    DampedLinearOperator,
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
)


@covering(
    1,
    solver=[
        lx.CG(rtol=1e-10, atol=1e-10),
        lx.GMRES(rtol=1e-10, atol=1e-10, restart=40),
        lx.LSMR(rtol=1e-10, atol=1e-10),
        lx.Cholesky(),
        lx.LU(),
        lx.AutoLinearSolver(well_posed=True),
    ],
    cls=[GGNLinearOperator, EFLinearOperator],
    ids=names_of_classes,
)
@pytest.mark.by_default(
    "LU-GGNLinearOperator",
    "Cholesky-EFLinearOperator",
    "AutoLinearSolver-EFLinearOperator",
    "CG-GGNLinearOperator",
)
def test_solve(cls: Any, solver: lx.AbstractLinearSolver) -> None:
    operator = cls(*CE.args).damped(DAMPING)
    solution = lx.linear_solve(operator, CE.vector, solver).value
    assert jax.tree.structure(solution) == jax.tree.structure(CE.params)
    want = dense_solve(CE.ggn() if cls is GGNLinearOperator else CE.ef("term"), CE.vector)
    assert_close(flat(solution), want, 1e-6)


@pytest.mark.parametrize(
    "solver",
    [lx.GMRES(rtol=1e-10, atol=1e-10, restart=40), lx.LSMR(rtol=1e-10, atol=1e-10), lx.LU()],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.by_default("GMRES", "LU")
def test_solve_with_hessian(solver: lx.AbstractLinearSolver) -> None:
    solution = lx.linear_solve(HessianLinearOperator(*CE.args).damped(DAMPING), CE.vector, solver).value
    assert_close(flat(solution), dense_solve(CE.hessian(), CE.vector), 1e-6)


def test_cg_refuses_the_hessian() -> None:
    with pytest.raises(ValueError, match="positive"):
        lx.linear_solve(HessianLinearOperator(*CE.args).damped(DAMPING), CE.vector, lx.CG(rtol=1e-6, atol=1e-6))


@pytest.mark.sweep
def test_preconditioned_cg() -> None:
    """Badly scaled inputs: the diagonal saves steps, and both give the solution."""
    x = normal("many", 60, 12) * jnp.logspace(-1.0, 1.0, 12)[None]
    params, v = normal("linear", 12), normal("right-hand side", 12)
    args = (lambda params, x: x @ params), ggn_jax.MSELoss(), params, (x, normal("y", 60))
    ggn, damping = GGNLinearOperator(*args).damped(1e-3), 1e-3
    want = dense_solve(2 / 60 * np.asarray(x).T @ np.asarray(x), v, damping)
    solver = lx.CG(rtol=1e-9, atol=1e-9, max_steps=500)
    plain = lx.linear_solve(ggn, v, solver)
    options = {"preconditioner": GGNDiagonalLinearOperator(*args).damped(damping).inverse()}
    preconditioned = lx.linear_solve(ggn, v, solver, options=options)
    assert_close(plain.value, want, 1e-5)
    assert_close(preconditioned.value, want, 1e-5)
    assert preconditioned.stats["num_steps"] < plain.stats["num_steps"]


def test_diagonal_operator() -> None:
    diagonal = GGNDiagonalLinearOperator(*CE.args)
    want = np.diagonal(CE.ggn())
    assert_close(diagonal.as_matrix(), np.diag(want))
    assert_close(flat(diagonal.mv(CE.vector)), want * flat(CE.vector))
    assert_close(lx.diagonal(diagonal), want)
    damped = diagonal.damped(DAMPING)
    assert isinstance(damped, GGNDiagonalLinearOperator)
    assert_close(lx.diagonal(damped), want + DAMPING)
    with pytest.raises(ValueError, match="scale must not be negative"):
        damped.inverse(scale=-1.0)
    inverse = damped.inverse()
    assert lx.is_positive_semidefinite(inverse)
    assert lx.is_diagonal(inverse)
    assert_close(flat(inverse.mv(CE.vector)), flat(CE.vector) / (want + DAMPING))
    solution = lx.linear_solve(damped, CE.vector, lx.AutoLinearSolver(well_posed=True)).value
    assert_close(flat(solution), flat(CE.vector) / (want + DAMPING))


def test_algebra() -> None:
    ggn, ef, v = GGNLinearOperator(*CE.args), EFLinearOperator(*CE.args), CE.vector
    a, b = CE.ggn(), CE.ef("term")
    for operator, want in (
        (ggn.T, a),
        (ggn + ef, a + b),
        (ggn - ef, a - b),
        (2.0 * ggn, 2 * a),
        (ggn / 2.0, a / 2),
        (-ggn, -a),
        (ggn @ ef, a @ b),
        ((ggn @ ef).T, b @ a),
        (ggn.damped(DAMPING), a + DAMPING * np.eye(len(a))),
        (ggn.damped(DAMPING).T, a + DAMPING * np.eye(len(a))),
        (ggn.damped(DAMPING) @ ggn, a @ a + DAMPING * a),
    ):
        assert_close(operator.as_matrix(), want)
        assert_close(flat(operator.mv(v)), want @ flat(v))
    assert ggn.T is ggn
    assert ggn.in_size() == ggn.out_size() == len(a)
    assert ggn.in_structure() == ggn.out_structure() == jax.eval_shape(lambda: CE.params)


def test_tags() -> None:
    ggn, ef, hessian = GGNLinearOperator(*CE.args), EFLinearOperator(*CE.args), HessianLinearOperator(*CE.args)
    diagonal = GGNDiagonalLinearOperator(*CE.args)
    for operator in (ggn, ef, diagonal):
        assert lx.is_positive_semidefinite(operator)
        assert lx.is_positive_semidefinite(operator.damped(DAMPING))
        assert lx.is_positive_semidefinite(lx.linearise(operator.damped(DAMPING)))
        assert lx.is_positive_semidefinite(lx.materialise(operator.damped(DAMPING)))
    assert lx.is_positive_semidefinite(ggn + ef)
    assert not lx.is_positive_semidefinite(hessian)
    assert not lx.is_positive_semidefinite(hessian.damped(DAMPING))
    assert not lx.is_positive_semidefinite(lx.materialise(hessian))
    for operator in (ggn, ef, hessian, diagonal, hessian.damped(DAMPING)):
        assert lx.is_symmetric(operator)
        assert lx.is_symmetric(lx.materialise(operator))
        assert not lx.is_negative_semidefinite(operator)
        assert not lx.has_unit_diagonal(operator)
        assert lx.is_diagonal(operator) == (operator is diagonal)


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [("ggn", None), ("ef", 3), ("diagonal", None)],
)
@pytest.mark.by_default("diagonal-None")
def test_other_forms_of_the_same_operator(name: str, chunk_size: int | None) -> None:
    """Linearised, materialised, through `jit`: the same matrix; also with damping."""
    problem = PROBLEMS[2]
    operator = FACTORIES[name](*problem.args, chunk_size=chunk_size)
    matrix, v = np.asarray(operator.as_matrix()), flat(problem.vector)
    assert_close(lx.linearise(operator).as_matrix(), matrix)
    assert_close(flat(lx.conj(operator).mv(problem.vector)), matrix @ v)
    damped, want = operator.damped(DAMPING), matrix + DAMPING * np.eye(len(matrix))
    assert_close(lx.diagonal(damped), np.diagonal(want))
    assert_close(flat(lx.linearise(damped).mv(problem.vector)), want @ v)
    assert_close(lx.materialise(damped).as_matrix(), want)
    assert_close(flat(jax.jit(lambda operator, v: lx.linearise(operator).mv(v))(damped, problem.vector)), want @ v)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_matrix_of_linearised_damped_operator(chunk_size: int | None) -> None:
    linearised = lx.linearise(GGNLinearOperator(*CE.args, chunk_size=chunk_size).damped(DAMPING))
    assert_close(linearised.as_matrix(), CE.ggn() + DAMPING * np.eye(len(CE.ggn())))


def test_linearised_operator_solves() -> None:
    operator = lx.linearise(GGNLinearOperator(*CE.args).damped(DAMPING))
    solution = lx.linear_solve(operator, CE.vector, lx.CG(rtol=1e-10, atol=1e-10)).value
    assert_close(flat(solution), dense_solve(CE.ggn(), CE.vector), 1e-6)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), np.ones(1), jnp.zeros((2, 2))], ids=str)
def test_damping_must_be_a_number(damping: Any) -> None:
    for operator in (GGNLinearOperator(*CE.args), GGNDiagonalLinearOperator(*CE.args), HessianLinearOperator(*CE.args)):
        with pytest.raises(ValueError, match="damping must"):
            operator.damped(damping)


@pytest.mark.parametrize("damping", [True, np.True_, "1", None], ids=repr)
def test_damping_of_other_types(damping: Any) -> None:
    with pytest.raises(TypeError, match="damping must be"):
        GGNLinearOperator(*CE.args).damped(damping)


@pytest.mark.parametrize("damping", [np.float64(0.5), np.array(0.5)], ids=repr)
def test_numpys_numbers_are_narrowed_as_pythons_are(damping: Any) -> None:
    with jax.enable_x64(False):
        ones = lx.MatrixLinearOperator(jnp.ones((2, 2)), lx.positive_semidefinite_tag)
        assert DampedLinearOperator(ones, damping).damping.dtype == "float32"


@pytest.mark.parametrize("damping", [0, 1, 0.5, np.float32(0.5), np.array(0.5), jnp.asarray(2)], ids=repr)
def test_numbers_for_damping(damping: Any) -> None:
    matrix = CE.ggn() + float(damping) * np.eye(len(CE.ggn()))
    damped = GGNLinearOperator(*CE.args).damped(damping)
    assert isinstance(damped, DampedLinearOperator)
    assert_close(flat(damped.mv(CE.vector)), matrix @ flat(CE.vector))
    assert_close(flat(GGNDiagonalLinearOperator(*CE.args).damped(damping).entries), np.diagonal(matrix))


def test_solve_with_mixed_dtypes() -> None:
    params = {**MLP_PARAMS, "w2": MLP_PARAMS["w2"].astype("float32")}
    vector = jax.tree.map(lambda v, p: v.astype(p.dtype), CE.vector, params)

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return mlp({**params, "w2": params["w2"].astype("float64")}, x)

    operator = GGNLinearOperator(model_fn, CE.loss, params, (X, CE.targets)).damped(DAMPING)
    with jax.numpy_dtype_promotion("standard"):  # of lineax
        solution = lx.linear_solve(operator, vector, lx.LU()).value
    assert jax.tree.map(lambda x: x.dtype, solution) == jax.tree.map(lambda x: x.dtype, params)
    assert_close(flat(solution), dense_solve(CE.ggn(), CE.vector), 1e-3)


@pytest.mark.sweep
def test_conjugate_gradients_in_single_precision_need_a_scale() -> None:
    """lineax takes curvature below 100 eps P for a breakdown; a scaled preconditioner avoids it, as documented."""
    size = 20_000
    args = (
        lambda params, x: x * params["w"][None],
        ggn_jax.MSELoss(reduction="sum"),
        {"w": jnp.zeros(size, jnp.float32)},
        (jnp.full((1, size), 0.1, jnp.float32), jnp.ones((1, size), jnp.float32)),
    )
    b = {"w": jnp.linspace(1, 2, size, dtype=jnp.float32)}
    ggn = lx.linearise(GGNLinearOperator(*args)).damped(0.01)
    diagonal = GGNDiagonalLinearOperator(*args).damped(0.01)
    with jax.numpy_dtype_promotion("standard"):
        solver = lx.CG(rtol=1e-5, atol=1e-5)
        plain = lx.linear_solve(ggn, b, solver, throw=False).value["w"]
        options = {"preconditioner": diagonal.inverse(scale=1e3)}
        scaled = lx.linear_solve(ggn, b, solver, options=options).value["w"]
    assert jnp.isnan(plain).any()
    np.testing.assert_allclose(scaled, b["w"] / 0.03, rtol=1e-4)
