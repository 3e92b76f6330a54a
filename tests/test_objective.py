"""Sums of functions of the same parameters: against dense sums by automatic differentiation, in float64."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from oracles import nearest_product

import ggn_jax

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jax.device_put(RNG.normal(size=shape))


def classes(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]


def values(p: Any, x: jax.Array) -> jax.Array:
    """The last layer has no bias here, and one of its own."""
    return jnp.sin(x @ p["w"] + p["b"][None]) @ p["v"] @ p["u"]


PARAMS = {"w": normal(3, 4), "b": normal(4), "v": normal(4, 3), "c": normal(3), "u": normal(3, 2)}
CE = ggn_jax.CrossEntropyLoss(ignore_index=-1)
ONE = ggn_jax.Objective(classes, CE)
TWO = ggn_jax.Objective(values, ggn_jax.MSELoss())
SUM = ONE + 0.5 * TWO
LABELS = jnp.asarray([0, 2, -1, 1, 0])
BATCHES = [(normal(5, 3), LABELS), (normal(7, 3), normal(7, 2))]
FLAT, UNRAVEL = ravel_pytree(PARAMS)


def dense(k: int, params: Any = PARAMS, full: bool = False) -> np.ndarray:
    """The GGN, or the Hessian, of one function."""
    term, (x, y) = SUM.terms[k], BATCHES[k]
    flat, unravel = ravel_pytree(params)

    def outputs(f: jax.Array) -> jax.Array:
        return term.model_fn(unravel(f), x)

    @jax.jit
    def matrix(flat: jax.Array) -> jax.Array:
        if full:
            return jax.hessian(lambda f: term.loss(outputs(f), y))(flat)
        f = outputs(flat)
        jacobian = jax.jacrev(outputs)(flat).reshape(f.size, -1)
        return jacobian.T @ jax.hessian(lambda f: term.loss(f, y))(f).reshape(f.size, f.size) @ jacobian

    return np.asarray(matrix(flat))


@cache
def ggn_matrix() -> np.ndarray:
    return dense(0) + 0.5 * dense(1)


def test_arithmetic_and_errors() -> None:
    assert [term.weight for term in (2 * SUM / 4).terms] == [0.5, 0.25]
    assert repr(sum([ONE, 0.5 * TWO])) == repr(SUM)
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = 1 + ONE
    want = CE(classes(PARAMS, BATCHES[0][0]), LABELS) + 0.5 * jnp.mean(
        (values(PARAMS, BATCHES[1][0]) - BATCHES[1][1]) ** 2
    )
    np.testing.assert_allclose(SUM(PARAMS, BATCHES), want, rtol=1e-14)
    np.testing.assert_allclose(ONE(PARAMS, BATCHES[0]), ONE(PARAMS, BATCHES[:1]), rtol=0)
    with pytest.raises(TypeError, match="a list of 2, a batch for each function"):
        SUM(PARAMS, BATCHES[:1])
    with pytest.raises(ValueError, match="not negative"):
        _ = -1 * ONE
    with pytest.raises(NotImplementedError, match="loss must be"):
        ggn_jax.Objective(classes, jnp.mean)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a ggn_jax\.Objective"):
        ggn_jax.GGNLinearOperator.from_objective(classes, PARAMS, BATCHES)  # type: ignore[arg-type]
    masked = [(*BATCHES[0], jnp.ones((5, 1), bool)), BATCHES[1]]
    with pytest.raises(NotImplementedError, match="KFOC does not use a mask"):
        ggn_jax.KFOCLinearOperator.from_objective(SUM, PARAMS, masked)
    with pytest.raises(ValueError, match=r"batches\[0\]: a mask is for Kronecker factors"):
        ggn_jax.JacobianLinearOperator.from_objective(SUM, PARAMS, masked)
    with pytest.raises(TypeError, match="an objective has its losses"):
        ggn_jax.kfac(SUM, CE, 0.1, example_inputs=[x for x, _ in BATCHES])
    with pytest.raises(TypeError, match="learning_rate by name"):
        ggn_jax.kfac(SUM, 0.1, example_inputs=[x for x, _ in BATCHES])
    with pytest.raises(TypeError, match="example_inputs must be a list of 2"):
        ggn_jax.kfac(SUM, learning_rate=0.1, example_inputs=BATCHES[0][0])


def test_products() -> None:
    ggn = ggn_jax.GGNLinearOperator.from_objective(SUM, PARAMS, BATCHES)
    assert isinstance(ggn, ggn_jax.WeightedSumLinearOperator)
    assert lx.is_positive_semidefinite(ggn.damped(0.1))
    np.testing.assert_allclose(ggn.as_matrix(), ggn_matrix(), atol=1e-12)
    np.testing.assert_allclose(lx.linearise(ggn).as_matrix(), ggn_matrix(), atol=1e-12)
    hessian = ggn_jax.HessianLinearOperator.from_objective(SUM, PARAMS, BATCHES, chunk_size=3)
    np.testing.assert_allclose(hessian.as_matrix(), dense(0, full=True) + 0.5 * dense(1, full=True), atol=1e-12)
    assert not lx.is_positive_semidefinite(hessian)
    diagonal = ggn_jax.GGNDiagonalLinearOperator.from_objective(SUM, PARAMS, BATCHES)
    np.testing.assert_allclose(ravel_pytree(diagonal.entries)[0], np.diag(ggn_matrix()), atol=1e-12)
    parts = [ggn_jax.EFLinearOperator(t.model_fn, t.loss, PARAMS, b) for t, b in zip(SUM.terms, BATCHES, strict=True)]
    want = parts[0].as_matrix() + 0.5 * parts[1].as_matrix()
    np.testing.assert_allclose(
        ggn_jax.EFLinearOperator.from_objective(SUM, PARAMS, BATCHES).as_matrix(), want, atol=1e-13
    )


def blocks_of(matrix: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """The entries of these parameters."""
    sizes = {name: PARAMS[name].size for name in sorted(PARAMS)}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()])[:-1], strict=True))
    rows = np.concatenate([starts[name] + np.arange(sizes[name]) for name in names])
    return matrix[np.ix_(rows, rows)]


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.by_default("joint")
def test_kfac_is_the_sum(bias: Any) -> None:
    """Of each function's own, where they have the same layers; a bias that only one of them adds is an exact block."""
    options: Any = {"fisher_type": "type-2", "bias": bias}
    kfac = ggn_jax.KFACLinearOperator.from_objective(SUM, PARAMS, BATCHES, **options)
    matrix = np.asarray(kfac.as_matrix())
    alone = [
        np.asarray(ggn_jax.KFACLinearOperator(t.model_fn, t.loss, PARAMS, b, **options).as_matrix())
        for t, b in zip(SUM.terms, BATCHES, strict=True)
    ]
    total = alone[0] + 0.5 * alone[1]
    for names in (("b", "w"), ("v",), ("u",)):
        np.testing.assert_allclose(blocks_of(matrix, names), blocks_of(total, names), atol=1e-13)
    np.testing.assert_allclose(blocks_of(matrix, ("c",)), blocks_of(ggn_matrix(), ("c",)), atol=1e-13)
    assert "2 terms" in str(ggn_jax.kfac(SUM, learning_rate=0.1, example_inputs=[x for x, _ in BATCHES]).report(PARAMS))
    vector = UNRAVEL(normal(len(FLAT)))
    want = np.linalg.solve(matrix + 0.1 * np.eye(len(FLAT)), ravel_pytree(vector)[0])
    np.testing.assert_allclose(ravel_pytree(kfac.solve(vector, 0.1))[0], want, atol=1e-11)
    masked = [(*BATCHES[0],), (*BATCHES[1], jnp.ones((7, 1), bool))]
    again = ggn_jax.KFACLinearOperator.from_objective(SUM, PARAMS, masked, **options)
    np.testing.assert_allclose(again.as_matrix(), matrix, atol=1e-14)


LINEAR = ggn_jax.Objective(lambda p, x: x @ p["w"], ggn_jax.MSELoss(reduction="sum"))
DEEP = LINEAR + 3 * ggn_jax.Objective(lambda p, x: x @ p["w"] @ p["v"], ggn_jax.MSELoss(reduction="sum"))


def test_kfoc_is_nearest_to_the_sum() -> None:
    """Of Gauss-Newton blocks in closed form; the first function does not use the second layer."""
    params, (x, y) = {"w": normal(3, 2), "v": normal(2, 2)}, (normal(5, 3), normal(4, 3))
    batches = [(x, jnp.zeros((5, 2))), (y, jnp.zeros((4, 2)))]
    kfoc = ggn_jax.KFOCLinearOperator.from_objective(DEEP, params, batches, fisher_type="type-2")
    w, v, x, y = map(np.asarray, (*(params[name] for name in "wv"), x, y))
    block = 2 * np.kron(np.eye(2), x.T @ x) + 6 * np.kron(v @ v.T, y.T @ y)
    np.testing.assert_allclose(kfoc.block("w"), nearest_product(block, 2, 3), atol=1e-9)
    np.testing.assert_allclose(kfoc.block("v"), 6 * np.kron(np.eye(2), w.T @ y.T @ y @ w), atol=1e-9)


def test_jacobian() -> None:
    """Of the outputs of all functions, one under the other; losses and weights do not count."""
    params, (x, y) = {"w": normal(3, 2), "v": normal(2, 2)}, (normal(5, 3), normal(4, 3))
    jacobian = ggn_jax.JacobianLinearOperator.from_objective(DEEP, params, [(x, None), (y, None)])
    w, v, x, y = map(np.asarray, (*(params[name] for name in "wv"), x, y))
    eye = np.eye(2)
    first = np.concatenate([np.zeros((10, 4)), np.einsum("ni,kc->ncik", x, eye).reshape(10, 6)], 1)
    parts = np.einsum("nk,cd->nckd", y @ w, eye), np.einsum("ni,kc->ncik", y, v)
    dense = np.concatenate([first, np.concatenate([part.reshape(8, -1) for part in parts], 1)])
    us = normal(5, 2), normal(4, 2)
    np.testing.assert_allclose(jacobian.as_matrix(), dense, atol=1e-14)
    flat = ravel_pytree(params)[0]
    np.testing.assert_allclose(ravel_pytree(jacobian.mv(params))[0], dense @ flat, atol=1e-13)
    np.testing.assert_allclose(ravel_pytree(jacobian.T.mv(us))[0], dense.T @ ravel_pytree(us)[0], atol=1e-13)
    assert jacobian.to_scipy().shape == lx.linearise(jacobian).as_matrix().shape
    assert "JacobianLinearOperator(" in repr(jacobian)


def test_a_weight_of_0_and_ignored_targets() -> None:
    """What is left out adds nothing, and may be NaN."""
    options: Any = {"fisher_type": "type-2"}
    nans = BATCHES[1][0], jnp.full((7, 2), jnp.nan)
    ignored = [(BATCHES[0][0], LABELS * 0 - 1), BATCHES[1]]
    first = ggn_jax.KFACLinearOperator.from_objective(ONE + 0 * TWO, PARAMS, [BATCHES[0], nans], **options)
    second = ggn_jax.KFACLinearOperator.from_objective(SUM, PARAMS, ignored, **options)
    for got, want in ((first, dense(0)), (second, 0.5 * dense(1))):
        assert jnp.isfinite(got.as_matrix()).all()
        np.testing.assert_allclose(blocks_of(np.asarray(got.as_matrix()), ("c",)), blocks_of(want, ("c",)), atol=1e-13)
    alone = ggn_jax.KFACLinearOperator(classes, CE, PARAMS, BATCHES[0], **options)
    np.testing.assert_allclose(first.block("w"), alone.block("w"), atol=1e-13)
    ggn = ggn_jax.GGNLinearOperator.from_objective(ONE + 0 * TWO, PARAMS, [BATCHES[0], nans])
    np.testing.assert_allclose(ggn.as_matrix(), dense(0), atol=1e-13)


@pytest.mark.sweep
def test_ekfac_has_the_whole_diagonal_in_its_bases() -> None:
    """So its trace is the GGN's, and in the bases of one function's own it is the sum of both."""
    ekfac = ggn_jax.EKFACLinearOperator.from_objective(SUM, PARAMS, BATCHES, fisher_type="type-2", chunk_size=3)
    np.testing.assert_allclose(ekfac.trace(), np.trace(ggn_matrix()), rtol=1e-12)


@pytest.mark.sweep
def test_forward_only_and_draws() -> None:
    linear = ggn_jax.Objective(lambda p, x: x @ p["w"], ggn_jax.MSELoss())
    params, inputs = {"w": PARAMS["w"]}, [x for x, _ in BATCHES]
    batches = [(x, None) for x in inputs]
    got = ggn_jax.KFACLinearOperator.from_objective(linear + 3 * linear, params, batches, fisher_type="forward-only")
    a = sum(weight * x.T @ x / len(x) for weight, x in zip((1, 3), inputs, strict=True))
    np.testing.assert_allclose(got.block("w"), np.kron(np.eye(4), a), atol=1e-13)
    with pytest.raises(ValueError, match="key"):
        ggn_jax.KFACLinearOperator.from_objective(SUM, PARAMS, BATCHES)
    fn = jax.jit(
        lambda key: ggn_jax.KFACLinearOperator.from_objective(SUM, PARAMS, BATCHES, mc_samples=50, key=key).diagonal()
    )
    mean = jax.tree.map(lambda x: x.mean(0), jax.lax.map(fn, jax.random.split(jax.random.key(0), 50)))
    exact = ggn_jax.KFACLinearOperator.from_objective(SUM, PARAMS, BATCHES, fisher_type="type-2").diagonal()
    np.testing.assert_allclose(mean["w"], exact["w"], rtol=0.1)


INPUTS = [x for x, _ in BATCHES]


@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"factor_interval": 2, "tied": "concatenate"}])
@pytest.mark.by_default("options2")
def test_a_step(options: Any) -> None:
    """Value and gradient are the objective's; the direction is the damped inverse times the gradient."""
    scale = ggn_jax.scale_by_kfac(SUM, example_inputs=INPUTS, damping=0.1, fisher_type="type-2", **options)
    state = scale.init(PARAMS)
    value, grads, factors = jax.jit(scale.value_and_grad_and_factors)(PARAMS, BATCHES, state)
    np.testing.assert_allclose(value, SUM(PARAMS, BATCHES), rtol=1e-13)
    want = jax.jit(jax.grad(SUM))(PARAMS, BATCHES)
    np.testing.assert_allclose(ravel_pytree(grads)[0], ravel_pytree(want)[0], atol=1e-13)
    got, _ = scale.update(grads, state, PARAMS, factors=factors)
    kfac = ggn_jax.KFACLinearOperator.from_objective(SUM, PARAMS, BATCHES, fisher_type="type-2")
    if not options.get("ekfac"):
        expected = kfac.solve(grads, 0.1, "heuristic")
        np.testing.assert_allclose(ravel_pytree(got)[0], ravel_pytree(expected)[0], rtol=1e-8, atol=1e-10)
    assert jnp.isfinite(ravel_pytree(got)[0]).all()


@pytest.mark.sweep
def test_quadratic_model() -> None:
    """Its first step, along `d`, minimises the quadratic model with the whole GGN."""
    rule: Any = {"learning_rate": ggn_jax.QuadraticModel(momentum=False), "momentum": None, "fisher_type": "type-2"}
    optimizer = ggn_jax.kfac(SUM, example_inputs=INPUTS, damping=ggn_jax.LevenbergMarquardt(0.1, interval=1), **rule)
    state, grads = optimizer.init(PARAMS), jax.jit(jax.grad(SUM))(PARAMS, BATCHES)
    step, state = optimizer.update(grads, state, PARAMS, batch=BATCHES)
    kfac = ggn_jax.KFACLinearOperator.from_objective(SUM, PARAMS, BATCHES, fisher_type="type-2")
    d, g = (np.asarray(ravel_pytree(tree)[0]) for tree in (kfac.solve(grads, 0.1, "heuristic"), grads))
    want = -d * (g @ d) / (d @ (ggn_matrix() + 0.1 * np.eye(len(d))) @ d)
    np.testing.assert_allclose(ravel_pytree(step)[0], want, rtol=1e-6)
    assert state.curvature.damping < 0.1  # the decrease is about as predicted


# A Poisson equation, as physics-informed networks solve it.


def net(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["a"] + p["s"]) @ p["b"] + p["t"]) @ p["c"]


def by_hessian(p: Any, x: jax.Array) -> jax.Array:
    return jnp.trace(jax.hessian(lambda x: net(p, x)[0])(x))[None]


def by_tangents(p: Any, x: jax.Array) -> jax.Array:
    def second(v: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: jax.jvp(lambda x: net(p, x), (x,), (v,))[1], (x,), (v,))[1]

    return sum(second(v) for v in jnp.eye(2))


def poisson(laplacian: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """`-Laplacian u = 2 pi^2 sin(pi x) sin(pi y)` inside, `u = 0` on the boundary."""
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 8), "s": (8,), "b": (8, 8), "t": (8,), "c": (8, 1)}
    params = {
        name: jax.device_put(rng.normal(size=shape) / (3 if name in "bc" else 1)) for name, shape in shapes.items()
    }
    inside = jax.device_put(rng.uniform(size=(20, 2)))
    edge = jax.device_put(rng.uniform(size=(12, 2))).at[:6, 0].set(0).at[6:, 1].set(1)
    source = -2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * inside), axis=1, keepdims=True)
    interior = ggn_jax.Objective(lambda p, x: jax.vmap(laplacian, (None, 0))(p, x), ggn_jax.MSELoss())
    boundary = ggn_jax.Objective(lambda p, x: jax.vmap(net, (None, 0))(p, x), ggn_jax.MSELoss())
    return interior + 10 * boundary, params, [(inside, source), (edge, jnp.zeros((12, 1)))]


def test_layers_inside_of_a_hessian() -> None:
    """All uses of each weight are found: EKFAC's eigenvalues are the GGN's diagonal in their basis."""
    objective, params, batches = poisson(by_hessian)
    ekfac = ggn_jax.EKFACLinearOperator.from_objective(objective, params, batches, fisher_type="type-2")
    ggn = ggn_jax.GGNLinearOperator.from_objective(objective, params, batches)
    np.testing.assert_allclose(ekfac.trace(), np.trace(ggn.as_matrix()), rtol=1e-10)


@pytest.mark.sweep
def test_poisson() -> None:
    """With a term for each of the two functions, as Dangel et al. (2024) have it."""
    objective, params, batches = poisson(by_tangents)
    options: Any = {"fisher_type": "type-2", "tied": "concatenate", "inverse_interval": 1, "decay": 0.0}
    step_size: Any = {"damping": 1e-3}
    optimizer = ggn_jax.kfac(objective, example_inputs=[x for x, _ in batches], **options, **step_size)
    assert {row.curvature[-9:] for row in optimizer.report(params).rows if row.kind == "linear"} == {", 2 terms"}

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batches, state)
        updates, state = optimizer.update(grads, state, params, batch=batches, factors=factors)
        return optax.apply_updates(params, updates), state, value

    state, found = optimizer.init(params), []
    for _ in range(25):
        params, state, value = step(params, state)
        found.append(float(value))
    assert found[-1] < 0.1 * found[0]
