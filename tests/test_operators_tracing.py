"""Curvature operators under `jit`, `vmap` and `grad`; nothing is traced twice."""

from typing import Any

import equinox as eqx
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
    MSE_ARGS,
    OPERATORS,
    N,
    X,
    assert_close,
    dense_solve,
    flat,
    integers,
    mlp,
    names_of_classes,
)

import ggn_jax
from ggn_jax import (
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
)


def test_as_an_argument_of_jit() -> None:
    @jax.jit
    def product(operator: lx.AbstractLinearOperator, v: Any) -> Any:
        return operator.mv(v)

    for cls in (GGNLinearOperator, EFLinearOperator, GGNDiagonalLinearOperator):
        operator = cls(*CE.args)
        for form in (operator, operator.damped(DAMPING)):
            assert_close(flat(product(form, CE.vector)), flat(form.mv(CE.vector)))


def test_constructed_under_jit_with_traced_targets() -> None:
    @jax.jit
    def solve(params: Any, x: jax.Array, targets: jax.Array, damping: jax.Array, v: Any) -> Any:
        ggn = GGNLinearOperator(CE.model_fn, CE.loss, params, (x, targets))
        diagonal = GGNDiagonalLinearOperator(CE.model_fn, CE.loss, params, (x, targets))
        options = {"preconditioner": diagonal.damped(damping).inverse()}
        return lx.linear_solve(ggn.damped(damping), v, lx.CG(rtol=1e-10, atol=1e-10), options=options).value

    solution = solve(CE.params, CE.inputs, CE.targets, DAMPING, CE.vector)
    assert_close(flat(solution), dense_solve(CE.ggn(), CE.vector), 1e-6)


def test_constructed_under_jit_with_constant_targets() -> None:
    """Targets from outside of the `jit`, JAX's or NumPy's, are constants in it."""
    want = CE.ggn() @ flat(CE.vector)
    for targets in (np.asarray(CE.targets), jnp.asarray(CE.targets)):
        batch = CE.inputs, targets
        product = jax.jit(lambda params, batch=batch: GGNLinearOperator(mlp, CE.loss, params, batch).mv(CE.vector))
        assert_close(flat(product(CE.params)), want)


@covering(
    1,
    cls=[GGNLinearOperator, EFLinearOperator],
    solver=[lx.CG(rtol=1e-10, atol=1e-10), lx.Cholesky()],
    chunk_size=[None, 2],
    ids=names_of_classes,
)
@pytest.mark.by_default("EFLinearOperator-Cholesky-2")
def test_model_closes_over_traced_values(cls: Any, solver: Any, chunk_size: int | None) -> None:
    """Parameters that are not differentiated, batch statistics and the like, made in the same `jit`."""

    @jax.jit
    def solve(scale: jax.Array, v: Any) -> Any:
        scale = jnp.exp(scale)
        model_fn = lambda params, x: mlp(params, x) * scale[None]  # noqa: E731
        operator = cls(model_fn, CE.loss, CE.params, (CE.inputs, CE.targets), chunk_size=chunk_size)
        return lx.linear_solve(operator.damped(DAMPING), v, solver).value

    scale = jnp.array([0.1, -0.2, 0.3])
    model_fn = lambda params, x: mlp(params, x) * jnp.exp(scale)[None]  # noqa: E731
    matrix = cls(model_fn, CE.loss, CE.params, (CE.inputs, CE.targets)).as_matrix()
    assert_close(flat(solve(scale, CE.vector)), dense_solve(np.asarray(matrix), CE.vector), 1e-6)


def test_closed_over_values_may_differ_by_batch_element_of_a_vmap() -> None:
    def product(scale: jax.Array) -> Any:
        model_fn = lambda params, x: mlp(params, x) * scale  # noqa: E731
        return GGNLinearOperator(model_fn, ggn_jax.MSELoss(), MLP_PARAMS, MSE_ARGS[3]).mv(CE.vector)["w2"]

    scales = jnp.array([0.5, 1.0, 2.0])
    got = jax.vmap(product)(scales)
    for scale, value in zip(scales, got, strict=True):
        assert_close(value, product(scale))


@pytest.mark.sweep
def test_vmap_over_damping() -> None:
    ggn = GGNLinearOperator(*CE.args)

    def solve(damping: jax.Array) -> Any:
        return lx.linear_solve(ggn.damped(damping), CE.vector, lx.CG(rtol=1e-10, atol=1e-10)).value

    dampings = jnp.array([0.1, 1.0, 10.0])
    solutions = jax.vmap(solve)(dampings)
    for i, damping in enumerate(dampings):
        got = jax.tree.map(lambda x, i=i: x[i], solutions)
        assert_close(flat(got), dense_solve(CE.ggn(), CE.vector, float(damping)), 1e-6)


def test_gradient_through_a_solve() -> None:
    """In the damping: `d/dx (G + x)^-1 v = -(G + x)^-2 v`."""
    ggn = GGNLinearOperator(*CE.args)

    def value(damping: jax.Array) -> jax.Array:
        step = lx.linear_solve(ggn.damped(damping), CE.vector, lx.CG(rtol=1e-12, atol=1e-12)).value
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, step, CE.vector)))

    once = dense_solve(CE.ggn(), CE.vector)
    assert_close(jax.grad(value)(DAMPING), -once @ once, 1e-6)


@pytest.mark.parametrize(("name", "chunk_size"), [("mc", 2), ("ef", None), ("hessian", 2), ("diagonal", 2)])
@pytest.mark.by_default("mc-2", "ef-None")
def test_nothing_is_traced_anew(name: str, chunk_size: int | None) -> None:
    """A training loop makes a new operator each step, with values of the same shapes."""
    traces = 0

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return mlp(params, x)

    def step(i: int) -> Any:
        params = jax.tree.map(lambda p: p * (1 + 0.1 * i), MLP_PARAMS)
        loss = ggn_jax.CrossEntropyLoss(np.ones(3) + i, ignore_index=0)
        operator = FACTORIES[name](model_fn, loss, params, (X + i, integers(str(i), 3, N)), chunk_size=chunk_size)
        return operator.mv(params), operator.damped(0.1 * i).mv(params)

    first = step(0)
    before = traces
    assert before > 0
    second = step(1)
    assert traces == before
    assert not np.allclose(flat(first), flat(second))


def test_operators_are_pytrees_of_arrays() -> None:
    for cls in OPERATORS:
        leaves = jax.tree.leaves(cls(*CE.args).damped(DAMPING))
        assert leaves
        assert all(eqx.is_array(leaf) for leaf in leaves)


@pytest.mark.parametrize("cls", [GGNLinearOperator, EFLinearOperator], ids=lambda cls: cls.__name__)
def test_bad_targets_that_nobody_saw_give_nan(cls: Any) -> None:
    """Under `jit` values cannot be looked at: the result says so."""
    args = CE.model_fn, CE.loss, CE.params
    product = jax.jit(lambda targets: cls(*args, (CE.inputs, targets)).mv(CE.vector))
    assert np.isfinite(flat(product(CE.targets))).all()
    assert np.isnan(flat(product(CE.targets + 7))).all()
