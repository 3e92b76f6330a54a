"""Layers in branches: `lax.cond` and `lax.switch`, chosen by data, where `vmap` makes selections of them, or not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import dense_ggn
from zoo_layers import conv, mlp, mlp_shapes, normal, params
from zoo_page import usual_promotion

import ggn_jax

CE, MSE = ggn_jax.CrossEntropyLoss(), ggn_jax.MSELoss()
KFAC, EKFAC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator
Branches = list[Callable[[Any, jax.Array], jax.Array]]

BRANCHES: Branches = [mlp, lambda p, x: jnp.tanh(x @ p["shared"]), lambda p, x: x @ (2 * p["shared"])]
PARAMS = params(**mlp_shapes(3, 4, 2), shared=(3, 2), out=(2, 2))
CHOICE = jnp.array([0, 1, 2, 1, 0, 0])


def switched(p: Any, inputs: Any) -> jax.Array:
    def one(choice: jax.Array, x: jax.Array) -> jax.Array:
        return lax.switch(choice, [lambda x, branch=branch: branch(p, x) for branch in BRANCHES], x)

    return jnp.tanh(jax.vmap(one)(inputs["choice"], inputs["x"])) @ p["out"]


def selected(p: Any, inputs: Any) -> jax.Array:
    """The same, with all branches written out."""
    results = jnp.stack([branch(p, inputs["x"]) for branch in BRANCHES])
    which = jax.nn.one_hot(inputs["choice"], 3, axis=0, dtype=results.dtype)
    return jnp.tanh((which[:, :, None] * results).sum(0)) @ p["out"]


def test_branches_that_data_choose_are_those_of_a_selection() -> None:
    batch = {"choice": CHOICE, "x": normal(6, 3)}, jax.device_put(np.arange(6) % 2)
    with usual_promotion():
        report = ggn_jax.report(switched, PARAMS, batch[0])
        assert report.passed, str(report)
        kinds = {row.parameter: (row.kind, row.uses) for row in report.rows}
        assert kinds["['first']['w']"] == kinds["['last']['w']"] == kinds["['out']"] == ("linear", 1)
        assert kinds["['shared']"] == ("linear", 2)
        assert kinds["['first']['b']"][0] == "shift"
        options: dict[str, Any] = {"fisher_type": "type-2", "bias": "separate"}
        found, like = (KFAC(fn, CE, PARAMS, batch, **options) for fn in (switched, selected))
        exact = dense_ggn(switched, CE, PARAMS, batch)
        for name in ("first/w", "last/w", "shared", "out"):
            np.testing.assert_allclose(found.block(name), like.block(name), atol=1e-14)
        np.testing.assert_allclose(found.block("first/b"), exact[:4, :4], atol=1e-14)
        np.testing.assert_allclose(
            ggn_jax.GGNDiagonalLinearOperator(switched, CE, PARAMS, batch).trace(), exact.trace()
        )


def test_positions_that_choose_for_themselves() -> None:
    """Tokens to experts: the choice is the router's, for each position."""

    def model_fn(p: Any, x: jax.Array, choose: Any = None) -> jax.Array:
        def token(x: jax.Array) -> jax.Array:
            scores = x @ p["router"]
            return scores.max() * choose(scores.argmax(), x)

        return jax.vmap(jax.vmap(token))(x).mean(1)

    def by_switch(p: Any, x: jax.Array) -> jax.Array:
        return model_fn(p, x, lambda best, x: lax.switch(best, [lambda x, w=w: jnp.tanh(x @ w.T) for w in p["w"]], x))

    def written_out(p: Any, x: jax.Array) -> jax.Array:
        return model_fn(p, x, lambda best, x: jnp.where(jnp.arange(2) == best, jnp.tanh(p["w"] @ x).T, 0).sum(1))

    weights, batch = params(router=(3, 2), w=(2, 2, 3)), (normal(4, 5, 3), normal(4, 2))
    with usual_promotion():
        rows = ggn_jax.report(by_switch, weights, batch[0]).rows
        assert [(row.kind, row.layer) for row in rows] == [("linear", "1 x 2 x 3")] * 2
        found, like = (KFAC(fn, MSE, weights, batch, fisher_type="type-2") for fn in (by_switch, written_out))
        got, wanted = (np.asarray(operator.as_matrix())[6:, 6:] for operator in (found, like))
        wanted = np.where(got == 0, 0, wanted)
        np.testing.assert_allclose(got, wanted, atol=1e-14)
        assert np.abs(np.diag(wanted)).min() > 0


@pytest.mark.sweep
def test_convolutions_in_branches() -> None:
    def by_switch(p: Any, inputs: Any) -> jax.Array:
        def one(choice: jax.Array, x: jax.Array) -> jax.Array:
            return lax.cond(choice, lambda x: conv(x[None], p["a"]), lambda x: jnp.sin(conv(x[None], 2 * p["b"])), x)

        return jnp.tanh(jax.vmap(one)(inputs["choice"], inputs["x"])).mean((1, 2, 3))

    def written_out(p: Any, inputs: Any) -> jax.Array:
        x, choice = inputs["x"], inputs["choice"][:, None, None, None]
        return jnp.tanh(jnp.where(choice, conv(x, p["a"]), jnp.sin(conv(x, 2 * p["b"])))).mean((1, 2))

    weights = params(a=(2, 1, 2, 2), b=(2, 1, 2, 2))
    batch = {"choice": jax.device_put(np.arange(4) % 3) == 0, "x": normal(4, 3, 2, 2)}, normal(4, 2)
    with usual_promotion():
        report = ggn_jax.report(by_switch, weights, batch[0])
        assert report.passed, str(report)
        assert {row.kind for row in report.rows} == {"convolution"}
        found, like = (
            KFAC(fn, MSE, weights, batch, fisher_type="type-2").as_matrix() for fn in (by_switch, written_out)
        )
        np.testing.assert_allclose(found, like, atol=1e-14)


def test_an_elementwise_choice_of_derivatives_is_no_layer() -> None:
    """Which entries have a derivative is data: the block is the GGN's."""

    def model_fn(p: Any, inputs: Any) -> jax.Array:
        def one(chosen: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ jnp.where(chosen, p["w"], lax.stop_gradient(p["w"])))

        return jax.vmap(one)(inputs["chosen"], inputs["x"])

    weights = {"w": normal(3, 2)}
    batch = {"chosen": normal(5, 3, 2) > 0, "x": normal(5, 3)}, normal(5, 2)
    assert ggn_jax.report(model_fn, weights, batch[0]).uncovered == ("['w']",)
    exact = dense_ggn(model_fn, MSE, weights, batch)
    np.testing.assert_allclose(KFAC(model_fn, MSE, weights, batch, fisher_type="type-2").as_matrix(), exact, atol=1e-15)


# The same for all examples: one branch runs. --------------------------------------------------------------------------


def hybrid(p: Any, x: jax.Array) -> jax.Array:
    """Blocks of two kinds, told apart by their number."""

    def block(x: jax.Array, item: Any) -> Any:
        number, q = item
        return lax.cond(number == 1, lambda x: x + mlp(q, x), lambda x: x * jnp.tanh(mlp(q, x)), x), None

    return lax.scan(block, x, (jnp.arange(3), p["blocks"]))[0] @ p["out"]


def hybrid_written_out(p: Any, x: jax.Array) -> jax.Array:
    for number in range(3):
        q = jax.tree.map(lambda leaf, number=number: leaf[number], p["blocks"])
        x = x + mlp(q, x) if number == 1 else x * jnp.tanh(mlp(q, x))
    return x @ p["out"]


STACK = params(blocks={"first": {"w": (3, 3, 4), "b": (3, 4)}, "last": {"w": (3, 4, 3), "b": (3, 3)}}, out=(3, 2))


@pytest.mark.sweep
def test_a_loop_over_blocks_of_two_kinds() -> None:
    """EKFAC's bases are those of KFAC's factors."""
    batch = normal(5, 3), jax.device_put(np.arange(5) % 2)
    with usual_promotion():
        report = ggn_jax.report(hybrid, STACK, batch[0])
        assert report.passed, str(report)
        assert {row.curvature for row in report.rows} == {"Kronecker"}
        found, like = (
            EKFAC(fn, CE, STACK, batch, fisher_type="type-2", bias="separate") for fn in (hybrid, hybrid_written_out)
        )
        np.testing.assert_allclose(found.as_matrix(), like.as_matrix(), atol=1e-14)


def flagged(p: Any, inputs: Any) -> jax.Array:
    """A branch by a flag; what is added to the result is not a bias of one of its layers."""
    flag, x = inputs["flag"], inputs["x"]
    token = lax.cond(flag, lambda x: p["token"] * jnp.ones_like(x), lambda x: p["token"], x[0])
    y = lax.cond(flag, lambda x: jnp.tanh(x @ p["w"] + p["b"]), lambda x: x @ p["v"] + p["b"], x)
    y = lax.cond(flag, lambda y: y + p["c"], lambda y: y, y @ p["u"])
    z = lax.cond(flag, lambda x: x @ p["v"], lambda x: jnp.broadcast_to(p["d"], (len(x), 2)), x)
    return jnp.concatenate([y, z @ lax.cond(flag, lambda: p["e"], lambda: p["u"]), y * token[:2]], -1)


@pytest.mark.parametrize("flag", [True, False])
def test_a_branch_by_a_flag(flag: bool) -> None:
    weights = params(b=(2,), c=(2,), d=(2,), e=(2, 2), token=(3,), u=(2, 2), v=(3, 2), w=(3, 2))
    inputs = {"flag": ggn_jax.Unbatched(jnp.asarray(flag)), "x": normal(1, 3)}
    batch = inputs, normal(1, 6, seed=1)
    with usual_promotion():
        report = ggn_jax.report(flagged, weights, inputs)
        assert report.passed, str(report)
        kinds = {row.parameter[2:-2]: row.kind for row in report.rows}
        assert (kinds["w"], kinds["v"], kinds["b"], kinds["c"], kinds["d"]) == (*2 * ["linear"], *3 * ["shift"])
        plain = {**inputs, "flag": jnp.asarray(flag)}
        exact = dense_ggn(flagged, MSE, weights, (plain, batch[1]))
        found = np.asarray(KFAC(flagged, MSE, weights, batch, fisher_type="type-2").as_matrix())
    start = 0
    for name, leaf in weights.items():
        part = slice(start, start := start + leaf.size)
        # Used twice where the flag is set: two terms.
        if not (name == "v" and flag):
            np.testing.assert_allclose(found[part, part], exact[part, part], atol=1e-14, err_msg=name)


def test_a_weight_of_some_steps_of_a_loop_has_the_exact_block() -> None:
    """As many positions as steps would be too many."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, number: jax.Array) -> Any:
            return lax.cond(number % 3 == 0, lambda x: x + jnp.tanh(x @ p["w"]), jnp.sin, x), None

        return lax.scan(step, x, jnp.arange(4))[0] @ p["out"]

    weights, batch = params(out=(3, 2), w=(3, 3)), (normal(5, 3), normal(5, 2))
    report = ggn_jax.report(model_fn, weights, batch[0])
    assert report.passed, str(report)
    assert report.uncovered == ("['w']",)
    assert "only some steps" in str(report)
    exact = dense_ggn(model_fn, MSE, weights, batch)[6:, 6:]
    np.testing.assert_allclose(KFAC(model_fn, MSE, weights, batch, fisher_type="type-2").block("w"), exact, atol=1e-14)


# Rows that are sorted by their groups. --------------------------------------------------------------------------------


def routed(p: Any, inputs: Any, product: Any = lax.ragged_dot) -> jax.Array:
    """Of several tokens for each example, some belong to no group."""
    x, sizes = inputs["x"], inputs["sizes"]
    outputs = []
    for rows, size in zip(x, sizes, strict=True):
        hidden = jnp.tanh(product(rows, p["in"], size))
        outputs.append(product(hidden, p["out"] - p["c"], size).sum(0))
    return jnp.stack(outputs)


def all_experts(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    group = jnp.repeat(jnp.arange(4), jnp.append(sizes, len(x) - sizes.sum()), total_repeat_length=len(x))
    return jnp.einsum("ngo,ng->no", jnp.einsum("gni,gio->ngo", jnp.stack([x] * 3), weights), jnp.eye(4)[group][:, :3])


def test_a_ragged_product_is_a_layer_for_each_group() -> None:
    weights = params(**{"in": (3, 2, 3), "c": (3, 3, 2), "out": (3, 3, 2)})
    inputs = {"x": normal(4, 5, 2), "sizes": jnp.array([[2, 0, 2], [1, 4, 0], [0, 0, 5], [1, 2, 2]])}
    batch = inputs, normal(4, 2, seed=1)
    written_out = lambda p, inputs: routed(p, inputs, all_experts)  # noqa: E731
    with usual_promotion():
        report = ggn_jax.report(routed, weights, inputs)
        assert report.passed, str(report)
        assert {(row.kind, row.layer[:1], row.positions) for row in report.rows} == {("linear", "3", (5,))}
        found, like = (KFAC(fn, MSE, weights, batch, fisher_type="type-2").as_matrix() for fn in (routed, written_out))
        np.testing.assert_allclose(found, like, atol=1e-14)
        exact = dense_ggn(routed, MSE, weights, batch)
        np.testing.assert_allclose(
            ggn_jax.GGNDiagonalLinearOperator(routed, MSE, weights, batch).trace(), exact.trace()
        )
        matrix = ggn_jax.GGNLinearOperator(routed, MSE, weights, batch).as_matrix()
        np.testing.assert_allclose(matrix, exact, atol=1e-14)
        batches = ggn_jax.GGNLinearOperator.from_batches(routed, MSE, weights, [batch])
        np.testing.assert_allclose(batches.as_matrix(), exact, atol=1e-14)
        jacobian = ggn_jax.JacobianLinearOperator(routed, weights, inputs).as_matrix()
        np.testing.assert_allclose(2 * jacobian.T @ jacobian / 8, exact, atol=1e-14)
        with pytest.raises(NotImplementedError, match=r"ragged_dot.*method=\"layers\".*and select"):
            ggn_jax.GGNDiagonalLinearOperator(routed, MSE, weights, batch, method="data")
