"""Function space of several functions and with a damping for each parameter, against dense `J^T H J` in float64."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import assert_close, flat, integers, normal

import ggn_jax
from ggn_jax import GramLinearOperator, Objective

MSE, CE = ggn_jax.MSELoss(), ggn_jax.CrossEntropyLoss(jnp.array([0.5, 2.0, 1.0]), ignore_index=-1)
LABELS = jnp.array([0, 2, -1, 1, 0])


def net(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]


def slopes(p: Any, x: jax.Array) -> jax.Array:
    """The same layers, each at three positions, and wide enough that no rows of `J` are made of them."""

    def one(x: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: jnp.sum(net(p, x[None])), (x,), (jnp.ones_like(x),))[1][None]

    return jax.vmap(one)(x)


def otherwise(p: Any, x: jax.Array) -> jax.Array:
    """One weight the other way round, and with a scale; a bias that is a scale here; another weight not used."""
    return jnp.sin((x @ p["w"].T) * p["b"][None, : p["w"].shape[0]])


def tokens(p: Any, rows: jax.Array) -> jax.Array:
    return jnp.einsum("ntd,dc->nc", jnp.tanh(p["w"].T[rows] + p["shift"][None, None]), p["v"][: p["w"].shape[0]])


def head(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["w"] + p["b"][None])[:, :3]


def linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


WIDE = {"w": normal("w", 16, 16) / 4, "b": normal("b", 16), "v": normal("v", 16, 1)}
SMALL = {"w": normal("w", 3, 4), "b": normal("b", 4), "v": normal("v", 4, 3)}
TABLE = {**SMALL, "shift": normal("shift", 3)}
X5, X3, ROWS = normal("x5", 5, 3), normal("x3", 3, 4), jax.device_put(integers("rows", 4, 5, 2))
Case = tuple[Any, Objective, list[Any]]
CASES: dict[str, Case] = {
    "slopes": (
        WIDE,
        Objective(net, MSE, 0.5) + Objective(slopes, MSE),
        [(normal("in", n, 16), normal("y", n, 1)) for n in (5, 3)],
    ),
    "otherwise": (
        SMALL,
        Objective(net, CE) + 3 * Objective(otherwise, MSE),
        [(X5, LABELS), (X3, normal("y3", 3, 3))],
    ),
    "table": (
        TABLE,
        2 * Objective(tokens, CE) + Objective(head, CE),
        [(ROWS, LABELS), (X5[:2], LABELS[:2])],
    ),
    "nothing shared": (
        SMALL,
        Objective(linear, MSE) + Objective(lambda p, x: x @ p["v"], MSE, jnp.asarray(0.1)),
        [(X5, normal("y5", 5, 4)), (X3, normal("y3", 3, 3))],
    ),
}


def jacobian(model_fn: Any, unravel: Any, x: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jax.jacrev(lambda theta: model_fn(unravel(theta), x)))


@cache
def dense(name: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """`sqrt(w) J` of each function, the GGN of the sum, and `X = J^T S`, with the vectors' `S`."""
    params, objective, batches = CASES[name]
    theta, unravel = ravel_pytree(params)
    ggn: Any = 0
    jacobians, columns = [], []
    for term, (x, y) in zip(objective.terms, batches, strict=True):
        f = term.model_fn(params, x)
        j = np.asarray(jacobian(term.model_fn, unravel, x)(theta)).reshape(f.size, -1)
        h = np.asarray(jax.jit(jax.hessian(term.loss))(f, y)).reshape(f.size, f.size)
        ggn = ggn + float(term.weight) * j.T @ h @ j
        vectors = np.asarray(ggn_jax.make_batch_grad_output_fn(term.loss, "type-2")(f, y))  # [V, N, *out]
        s = np.zeros((*f.shape, *f.shape))
        for n in range(len(f)):
            s[n, :, n] = vectors[:, n].T
        jacobians.append(np.sqrt(float(term.weight)) * j)
        columns.append(jacobians[-1].T @ s.reshape(f.size, f.size))
    return jacobians, ggn, np.concatenate(columns, axis=1)


def vector_of(name: str) -> Any:
    return jax.tree.map(lambda x: normal(f"vector {x.shape}", *x.shape), CASES[name][0])


@cache
def gram_of(name: str) -> GramLinearOperator:
    params, objective, batches = CASES[name]
    return GramLinearOperator.from_objective(objective, params, batches)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.by_default("slopes")
def test_gram_of_an_objective(name: str) -> None:
    """The rows of all functions, with the roots of losses and weights; as matrix, product and solve."""
    _, ggn, x = dense(name)
    gram, vector = gram_of(name), vector_of(name)
    assert_close(x @ x.T, ggn, 1e-12)
    assert_close(gram.as_matrix(), x.T @ x, 1e-12)
    u = tuple(normal(f"u {s.shape}", *s.shape) for s in gram.in_structure())
    assert_close(flat(gram.mv(u)), x.T @ x @ flat(u))
    assert_close(flat(gram.solve_ggn(vector, 0.1)), np.linalg.solve(ggn + 0.1 * np.eye(len(ggn)), flat(vector)), 1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.by_default("slopes")
def test_damping_for_each_parameter(name: str) -> None:
    """A prefix of the parameters, of which some share a number; all kinds of layers have scaled inner products."""
    _, ggn, _ = dense(name)
    params, vector = CASES[name][0], vector_of(name)
    damping = {key: 0.1 * (i + 1) for i, key in enumerate(params)}
    d = np.concatenate([np.full(params[key].size, damping[key]) for key in sorted(params)])
    want = np.linalg.solve(ggn + np.diag(d), flat(vector))
    assert_close(flat(gram_of(name).solve_ggn(vector, damping)), want, 1e-10)


def fused(p: Any, x: jax.Array) -> jax.Array:
    """One weight of two parameters, one of them with a bias of its own."""
    joined = jnp.concatenate([p["a"]["w"], p["c"]["w"]], axis=1)
    bias = jnp.concatenate([p["a"]["b"], jnp.zeros(5)])
    return jnp.tanh(x @ joined + bias[None]) @ p["v"]


@pytest.mark.parametrize("damping", [{"a": 0.1, "c": 0.3, "v": 0.2}, {"a": {"w": 0.1, "b": 0.4}, "c": 0.3, "v": 1}])
@pytest.mark.by_default("damping1")
def test_damping_inside_of_a_layer(damping: Any) -> None:
    params = {"a": {"w": normal("aw", 9, 4), "b": normal("ab", 4)}, "c": {"w": normal("cw", 9, 5)}, "v": normal("v", 9)}
    x, y = normal("x", 4, 9), normal("y", 4)
    theta, unravel = ravel_pytree(params)
    j = np.asarray(jacobian(fused, unravel, x)(theta))
    d = flat(jax.tree.map(lambda d, tree: jax.tree.map(lambda p: jnp.full(p.shape, float(d)), tree), damping, params))
    vector = unravel(normal("vector", theta.size))
    gram = GramLinearOperator(fused, params, x, loss=MSE, targets=y)
    want = np.linalg.solve(2 / 4 * j.T @ j + np.diag(d), flat(vector))
    assert_close(flat(gram.solve_ggn(vector, damping)), want, 1e-10)
    solve = jax.jit(lambda damping: gram.solve_ggn(vector, damping))
    assert_close(flat(solve(damping)), want, 1e-10)


@pytest.mark.sweep
def test_one_function_as_an_objective_and_linearised() -> None:
    """A batch for itself; lineax's solvers on tuples; the linearisation is kept."""
    params, _, batches = CASES["otherwise"]
    alone = GramLinearOperator.from_objective(3 * Objective(otherwise, MSE), params, batches[1], chunk_size=2)
    one = GramLinearOperator(otherwise, params, batches[1][0], loss=MSE, targets=batches[1][1])
    assert_close(alone.as_matrix(), 3 * one.as_matrix())
    gram = gram_of("otherwise")
    u = tuple(jnp.ones(s.shape) for s in gram.in_structure())
    assert_close(flat(lx.linearise(gram).mv(u)), flat(gram.mv(u)))
    damped = np.asarray(gram.as_matrix()) + 0.3 * np.eye(gram.in_size())
    with jax.numpy_dtype_promotion("standard"):
        found = lx.linear_solve(gram.damped(0.3), u, lx.CG(rtol=1e-13, atol=1e-13)).value
    assert_close(flat(found), np.linalg.solve(damped, flat(u)), 1e-9)
    assert "functions=2" in repr(gram)


def test_a_function_of_weight_0_is_left_out() -> None:
    """Even where its derivatives are infinite."""
    params, y = {"w": jnp.zeros((3, 2))}, normal("y", 5, 2)
    root = Objective(lambda p, x: jnp.sqrt(x @ p["w"]), MSE, 0.0)
    gram = GramLinearOperator.from_objective(Objective(linear, MSE) + root, params, [(X5, y), (X5, y)])
    one, zero = gram.mv((y, y))
    assert_close(one, 2 / 10 * X5 @ X5.T @ y)
    assert not zero.any()


def test_errors() -> None:
    params, objective, batches = CASES["otherwise"]
    make = GramLinearOperator.from_objective
    with pytest.raises(TypeError, match="a list of 2, a batch for each function"):
        make(objective, params, batches[:1])
    with pytest.raises(TypeError, match=r"must be a ggn_jax\.Objective; got function"):
        make(net, params, batches)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batches\[1\]: inputs and targets must have one common leading batch axis"):
        make(objective, params, [batches[0], (X3, normal("y", 2, 3))])
    with pytest.raises(ValueError, match=r"batches\[1\]: "):
        ggn_jax.GGNLinearOperator.from_objective(objective, params, [batches[0], (X3, normal("y", 2, 3))])
    with pytest.raises(TypeError, match="centred must be True or False"):
        make(objective, params, batches, centred=1)  # type: ignore[arg-type]
    gram, vector = gram_of("otherwise"), vector_of("otherwise")
    with pytest.raises(ValueError, match="vector must be a pytree like the outputs"):
        gram.mv(jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"damping\['b'\] must be above 0; got 0\.0"):
        gram.solve_ggn(vector, {"w": 1.0, "b": 0.0, "v": 1.0})


NUMBERS: list[tuple[Any, str]] = [
    (
        {"a": 1.0, "v": 1.0},
        r"damping must be a number, or a dict of \['a'\], \['c'\], \['v'\], as .* got a dict of \['a'\],",
    ),
    (
        {"a": {"w": 1.0}, "c": 1.0, "v": 1.0},
        r"damping\['a'\] must be a number, or a dict of \['b'\], \['w'\],.* got .*\['w'\]",
    ),
    ({"a": 1.0, "c": 1.0, "v": [1.0]}, r"damping\['v'\] must be one number.* got a list of \[0\]\. .* a prefix of the"),
    ({"a": 1.0, "c": [1.0], "v": 1.0}, r"damping\['c'\] must be a number, or a dict of \['w'\],.* got a list of \[0\]"),
    ({"a": 1.0, "c": None, "v": 1.0}, r"damping\['c'\] must be .*; got None"),
    ({"a": 1.0, "c": {}, "v": 1.0}, r"damping\['c'\] must be .*; got an empty dict"),
    ({"a": 1.0, "c": -1.0, "v": 1.0}, r"damping\['c'\] must not be negative"),
    ({"a": 1.0, "c": jnp.ones(2), "v": 1.0}, r"damping\['c'\] must be a number; got an array of shape \(2,\)"),
]


def test_a_damping_that_does_not_fit_names_the_path() -> None:
    params = {"a": {"w": normal("aw", 9, 4), "b": normal("ab", 4)}, "c": {"w": normal("cw", 9, 5)}, "v": normal("v", 9)}
    gram = GramLinearOperator(fused, params, normal("x", 4, 9))
    identity = lx.IdentityLinearOperator(jax.eval_shape(lambda: params))
    diagonal = ggn_jax.DampedLinearOperator(identity, 1.0)
    for damping, message in NUMBERS:
        with pytest.raises(ValueError, match=message):
            gram.solve_ggn(params, damping)
        with pytest.raises(ValueError, match=message):
            diagonal.damped(damping)
