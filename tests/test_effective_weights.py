"""Layers whose weight is read row by row, scaled, or multiplied with a constant."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from oracles import dense_ggn as ggn

import ggn_jax

KFAC, EKFAC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator
CE, MSE = ggn_jax.CrossEntropyLoss(), ggn_jax.MSELoss()


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def kinds(model_fn: Any, params: Any, inputs: Any) -> dict[str, tuple[str, str, int]]:
    found = ggn_jax.report(model_fn, params, inputs)
    assert found.passed, str(found)
    return {row.parameter: (row.kind, row.curvature, row.uses) for row in found.rows}


TOKENS = jax.device_put(np.random.default_rng(0).integers(0, 5, (6, 4)))

ROWS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "one index": lambda w, x: jax.vmap(jax.vmap(lambda i: w[i]))(x),
    "dynamic index": lambda w, x: jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(w, i, keepdims=False)))(x),
    "equinox": lambda w, x: jax.vmap(jax.vmap(eqx.nn.Embedding(weight=w)))(x),
    "columns": lambda w, x: jax.vmap(jax.vmap(lambda i: w.T[:, i]))(x),
}


def reading(read: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda p, x: jnp.tanh(read(p["table"], x)).sum(1) @ p["w"]


TABLE = {"table": normal(5, 3), "w": normal(3, 2)}


def matrix_of_table(model_fn: Any) -> jax.Array:
    return KFAC(model_fn, CE, TABLE, (TOKENS, jax.device_put(np.arange(6) % 2)), fisher_type="type-2").as_matrix()


@cache
def taken() -> jax.Array:
    return matrix_of_table(reading(lambda w, x: jnp.take(w, x, axis=0)))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.by_default("columns")
def test_rows_read_one_by_one_are_an_embedding(name: str) -> None:
    model_fn = reading(ROWS[name])
    assert kinds(model_fn, TABLE, TOKENS)["['table']"] == ("embedding", "Kronecker", 1)
    np.testing.assert_allclose(matrix_of_table(model_fn), taken(), atol=1e-15)


@pytest.mark.parametrize("mode", ["fill", "clip"])
@pytest.mark.by_default("clip")
def test_several_tables_in_one_array(mode: str) -> None:
    """The table's number is data as well; an index that is out of range reads nothing, or the last row."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        rows = p["tables"].at[x[..., 0], :, x[..., 1]].get(mode=mode, fill_value=0)
        return jnp.tanh(rows).sum(1)

    def apart(p: Any, x: jax.Array) -> jax.Array:
        flat = jnp.swapaxes(p["tables"], 1, 2).reshape(-1, 3)
        number = jnp.clip(x[..., 0], 0, 1) * 5 + jnp.clip(x[..., 1], 0, 4)
        outside = (x < 0) | (x >= jnp.array([2, 5])[None, None])
        number = jnp.where(outside.any(-1) & (mode == "fill"), 10, number)
        return jnp.tanh(jnp.take(flat, number, axis=0, mode=mode, fill_value=0)).sum(1)

    x = jnp.stack([TOKENS % 3, TOKENS + 1], axis=-1)
    params, batch = {"tables": normal(2, 3, 5)}, (x, normal(6, 3))
    assert kinds(model_fn, params, x)["['tables']"] == ("embedding", "Kronecker", 1)
    found, like = (KFAC(f, MSE, params, batch, fisher_type="type-2") for f in (model_fn, apart))
    np.testing.assert_allclose(found.as_matrix(), like.as_matrix(), atol=1e-15)


SCALED: dict[str, tuple[float, Callable[[jax.Array], jax.Array]]] = {
    "equalised rate": (math.sqrt(2 / 3), lambda w: w * math.sqrt(2 / 3)),
    "muP, negative": (-1 / 3, lambda w: -w / 3),
    "array": (0.25, lambda w: jnp.full((3, 2), 0.5) * w * jnp.asarray(0.5)),
    "transposed": (2.0, lambda w: (2 * w.T.reshape(-1)).reshape(2, 3).T),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.by_default("transposed")
def test_a_scaled_weight_has_the_scaled_factors(name: str) -> None:
    scale, weight = SCALED[name]

    def model_fn(p: Any, x: jax.Array, weight: Any = weight) -> jax.Array:
        return jnp.tanh(x @ weight(p["w"]) + p["b"][None]) @ p["v"]

    params = {"b": normal(2), "v": normal(2, 2), "w": normal(3, 2)}
    batch = normal(6, 3), jax.device_put(np.arange(6) % 2)
    assert kinds(model_fn, params, batch[0])["['w']"] == ("linear", "Kronecker", 1)
    found = KFAC(model_fn, CE, params, batch, fisher_type="type-2").as_matrix()
    plain = {**params, "w": scale * params["w"]}
    like = KFAC(lambda p, x: model_fn(p, x, lambda w: w), CE, plain, batch, fisher_type="type-2").as_matrix()
    jacobian = jnp.concatenate([jnp.ones(6), jnp.full(6, scale)])
    np.testing.assert_allclose(found, jacobian[:, None] * like * jacobian[None], atol=1e-15)


@pytest.mark.sweep
def test_scales_that_are_no_number() -> None:
    """A mask and a number that depends on the loop have no Kronecker form; another parameter and 0 scale the layer."""
    params, x = {"w": normal(3, 3), "s": jnp.ones(())}, normal(4, 3)
    scaled = [("uncovered", lambda p: p["w"] * jnp.eye(3))]
    scaled += [("linear", lambda p: p["w"] * p["s"]), ("linear", lambda p: p["w"] * 0.0)]
    for kind, weight in scaled:
        found = kinds(lambda p, x, weight=weight: jnp.tanh(x @ weight(p)) * p["s"], params, x)
        assert found["['w']"][0] == kind

    def looped(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(1, 3, lambda i, h: jnp.tanh(h @ (p["w"] / i.astype(float))), x)

    assert kinds(looped, {"w": params["w"]}, x)["['w']"][0] == "uncovered"


@pytest.mark.sweep
def test_a_scaled_convolution_and_a_tied_weight_of_two_scales() -> None:
    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(x, p["kernel"] / 3, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
        return jnp.tanh(jnp.tanh(x).sum(1) @ (2 * p["w"])) @ p["w"]

    params, batch = {"kernel": normal(3, 2, 3), "w": normal(3, 3)}, (normal(5, 4, 2), normal(5, 3))
    found = kinds(model_fn, params, batch[0])
    assert found["['kernel']"] == ("convolution", "Kronecker", 1)
    assert found["['w']"] == ("linear", "Kronecker", 2)
    exact = np.diag(ggn(model_fn, MSE, params, batch))
    diagonal = ggn_jax.GGNDiagonalLinearOperator(model_fn, MSE, params, batch)
    np.testing.assert_allclose(ravel_pytree(diagonal.mv(jax.tree.map(jnp.ones_like, params)))[0], exact, atol=1e-14)


def net(p: Any, x: jax.Array) -> jax.Array:
    return (jnp.tanh(jnp.tanh(x @ p["1"] + p["b"]) @ p["2"]) @ p["3"])[0]


def laplacian(p: Any, x: jax.Array) -> jax.Array:
    def second(direction: jax.Array) -> jax.Array:
        def slope(x: jax.Array) -> jax.Array:
            return jax.jvp(lambda x: net(p, x), (x,), (direction,))[1]

        return jax.jvp(slope, (x,), (direction,))[1]

    return jax.vmap(second)(jnp.eye(2)).sum()


DERIVATIVES: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "Laplacian": lambda p, x: laplacian(p, x)[None],
    "Hessian": lambda p, x: jnp.trace(jax.hessian(lambda x: net(p, x))(x))[None],
    "value and force": lambda p, x: jnp.concatenate([net(p, x)[None], jax.grad(lambda x: net(p, x))(x)]),
}


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.by_default("value and force")
def test_derivatives_in_the_inputs_have_layers_with_constant_inputs(name: str) -> None:
    """Energy models and physics-informed networks: a weight meets a unit tangent, or a seed of ones, before data."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: DERIVATIVES[name](p, x))(x)

    params = {"1": normal(2, 3), "2": normal(3, 4), "3": normal(4, 1), "b": normal(3)}
    x = normal(5, 2)
    found = kinds(model_fn, params, x)
    for weight in "123":
        assert found[f"['{weight}']"][:2] == ("linear", "Kronecker"), found
    batch = x, normal(*jax.eval_shape(model_fn, params, x).shape, seed=1)
    exact = ggn(model_fn, MSE, params, batch)
    ones = jax.tree.map(jnp.ones_like, params)
    diagonal = ggn_jax.GGNDiagonalLinearOperator(model_fn, MSE, params, batch)
    np.testing.assert_allclose(ravel_pytree(diagonal.mv(ones))[0], np.diag(exact), atol=1e-14)
    ekfac = EKFAC(model_fn, MSE, params, batch, fisher_type="type-2")
    np.testing.assert_allclose(ekfac.trace(), np.trace(exact), rtol=1e-12)


def test_the_factors_of_a_weight_that_meets_a_constant() -> None:
    """`d/dx tanh(x w) v` along `e`: the inputs of `w` are `x`, and `e`."""
    direction = jnp.array([1.0, -2.0])

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (jnp.broadcast_to(direction, x.shape),))[1] @ p["v"]

    params, x = {"v": normal(3, 2), "w": normal(2, 3)}, normal(5, 2)
    found = KFAC(model_fn, MSE, params, (x, normal(5, 2)), fisher_type="type-2").factors()["['w']"]
    slopes = 1 - jnp.tanh(x @ params["w"]) ** 2
    curved = -2 * jnp.tanh(x @ params["w"]) * slopes * (direction @ params["w"])[None]
    inputs = jnp.stack([jnp.broadcast_to(direction, x.shape), x])  # [use, N, in]
    scale = math.sqrt(2 / x.shape[0] / 2)  # of the mean squared error over 2 outputs
    grads = scale * jnp.stack([slopes, curved])[:, :, :, None] * params["v"][None, None]  # [use, N, out, outputs]
    expected = [(a.T @ a / len(a), jnp.einsum("noc,npc->op", g, g)) for a, g in zip(inputs, grads, strict=True)]
    pairs = list(zip(found.a, found.b, strict=True))
    assert len(pairs) == 2
    for a, b in expected:
        assert any(np.allclose(a, f[0], atol=1e-14) and np.allclose(b, g[0], atol=1e-14) for f, g in pairs)


@pytest.mark.sweep
def test_constant_inputs_inside_loops() -> None:
    """Each step has a weight of its own, whose inputs are the same for all examples: a constant, or known rows."""
    constant = jnp.ones(3)

    def looped(p: Any, x: jax.Array) -> jax.Array:
        def step(h: jax.Array, q: Any) -> Any:
            return jnp.tanh(h + constant @ q["w"] + q["rows"][jnp.array([1, 1, 0])].sum(0)), None

        return jax.lax.scan(step, x, p)[0]

    def written_out(p: Any, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = jnp.tanh(x + constant @ p["w"][i] + p["rows"][i][jnp.array([1, 1, 0])].sum(0))
        return x

    params = {"w": normal(2, 3, 2), "rows": normal(2, 2, 2)}
    batch = normal(4, 2), normal(4, 2, seed=1)
    with jax.numpy_rank_promotion("allow"):
        found = [KFAC(f, MSE, params, batch, fisher_type="type-2") for f in (looped, written_out)]
        like = [EKFAC(f, MSE, params, batch, fisher_type="type-2") for f in (looped, written_out)]
        exact = np.trace(ggn(written_out, MSE, params, batch))
    for pair in (found, like):
        vector = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
        products = [ravel_pytree(operator.mv(vector))[0] for operator in pair]
        np.testing.assert_allclose(*products, atol=1e-14)
    np.testing.assert_allclose(like[0].trace(), exact, rtol=1e-12)


def test_a_derivative_of_its_own_around_a_product_with_a_constant() -> None:
    @jax.custom_jvp
    def rounded(w: jax.Array) -> jax.Array:
        return jnp.sign(jnp.ones(2) @ w)

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), jnp.ones(2) @ tangents[0]))

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x + rounded(p["w"])[None])

    params, batch = {"w": normal(2, 2)}, (normal(4, 2), normal(4, 2, seed=1))
    exact = ggn(model_fn, MSE, params, batch)
    np.testing.assert_allclose(KFAC(model_fn, MSE, params, batch, fisher_type="type-2").as_matrix(), exact, atol=1e-15)


def test_a_scale_that_repeats_the_weight() -> None:
    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return x @ (p["w"] * jnp.full((2, 2), 0.5))

    params, batch = {"w": normal(1, 2)}, (normal(4, 2), normal(4, 2, seed=1))
    exact = ggn(model_fn, MSE, params, batch)
    np.testing.assert_allclose(KFAC(model_fn, MSE, params, batch, fisher_type="type-2").as_matrix(), exact, atol=1e-15)
    assert ggn_jax.report(model_fn, params, batch[0]).passed


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
@pytest.mark.by_default("int8")
def test_indices_that_cannot_hold_the_rows_numbers(dtype: Any) -> None:
    numbers = jax.lax.GatherDimensionNumbers((1,), (0, 1), (0, 1))

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(jax.lax.gather(p["table"], x, numbers, (1, 1, 2), mode="clip"))

    x = jnp.array([[0, 7], [2, 99], [1, 120], [2, 3]], dtype)
    params = {"table": normal(3, 100, 2)}
    batch = x, normal(4, 2, seed=1)
    assert kinds(model_fn, params, x)["['table']"][0] == "embedding"
    diagonal = ggn_jax.GGNDiagonalLinearOperator(model_fn, MSE, params, batch)
    wide = ggn_jax.GGNDiagonalLinearOperator(model_fn, MSE, params, (x.astype(jnp.int32), batch[1]), method="data")
    np.testing.assert_allclose(diagonal.entries["table"], wide.entries["table"], atol=1e-15)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1)])
@pytest.mark.by_default("shape0")
def test_a_part_of_a_weight_that_is_scaled_along_some_axes(shape: tuple[int, ...]) -> None:
    """For one example, KFAC is the GGN, however the weight was made."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ (p["v"] * p["g"])[1:3]) @ p["w"]

    params, batch = {"v": normal(4, 3), "g": normal(*shape), "w": normal(3, 2)}, (normal(1, 2), jnp.array([1]))
    kfac = KFAC(model_fn, CE, params, batch, fisher_type="type-2")
    wanted = ggn(lambda p, x: model_fn(params | p, x), CE, {"v": params["v"]}, batch)
    start = params["g"].size
    np.testing.assert_allclose(kfac.as_matrix()[start : start + 12, start : start + 12], wanted, atol=1e-12)
