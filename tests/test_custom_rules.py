"""Layers inside calls with derivative rules of their own: `jax.custom_vjp` and `jax.custom_jvp`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.linen import fp8_ops
from oracles import dense_ggn
from zoo_layers import normal, params
from zoo_page import usual_promotion

import ggn_jax

MSE = ggn_jax.MSELoss()


def rounded(x: jax.Array) -> jax.Array:
    return jnp.round(8 * x) / 8


@jax.custom_vjp
def quantised(x: jax.Array, w: jax.Array) -> jax.Array:
    return rounded(x) @ rounded(w)


quantised.defvjp(
    lambda x, w: (quantised(x, w), (x, w)), lambda kept, g: (g @ rounded(kept[1]).T, 0.5 * (kept[0].T @ g))
)


OFFSETS = jnp.arange(5.0)  # closed over: an operand of the call without a gradient


@jax.custom_vjp
def fused(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w + b) + OFFSETS


def fused_backward(kept: Any, g: jax.Array) -> Any:
    x, w, y = kept
    before = g * (1 - (y - OFFSETS) ** 2)
    return before @ w.T, jnp.einsum("...i,...o->io", x, before), before.sum(tuple(range(g.ndim - 1)))


fused.defvjp(lambda x, w, b: (y := fused(x, w, b), (x, w, y)), fused_backward)


@jax.custom_vjp
def straight(w: jax.Array) -> jax.Array:
    return rounded(w)


straight.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))


@jax.custom_jvp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


product.defjvp(lambda primals, dots: (primals[0] @ primals[1], dots[0] @ primals[1] + primals[0] @ dots[1]))


def model_fn(p: Any, x: jax.Array) -> jax.Array:
    x = quantised(x, p["first"])
    x = jax.vmap(fused, (0, None, None))(x, p["fused"], p["bias"])
    x = jnp.tanh(product(x, straight(p["product"])))
    x = jax.lax.scan(lambda x, w: (quantised(x, w), None), x, p["stack"])[0]
    return x @ straight(p["out"])


PARAMS = params(first=(3, 4), fused=(4, 5), bias=(5,), product=(5, 4), stack=(2, 4, 4), out=(4, 2))


def test_products_in_rules_are_layers() -> None:
    """Of one example, blocks are the GGN's, with the Jacobian that the rules give; of several, EKFAC's trace is."""
    x, y = normal(3, 3), normal(3, 2)
    with usual_promotion():
        report = ggn_jax.report(model_fn, PARAMS, x)
        assert report.passed, str(report)
        kinds = {row.parameter: (row.kind, row.curvature) for row in report.rows}
        assert kinds.pop("['bias']") == ("bias", "Kronecker")
        assert set(kinds.values()) == {("linear", "Kronecker")}
        one = x[:1], y[:1]
        options: Any = {"fisher_type": "type-2", "bias": "separate"}
        found = np.asarray(ggn_jax.KFACLinearOperator(model_fn, MSE, PARAMS, one, **options).as_matrix())
        exact, start = dense_ggn(model_fn, MSE, PARAMS, one), 0
        for leaf in jax.tree.leaves(PARAMS):
            for _ in range(len(leaf) if leaf.ndim > 2 else 1):  # steps of the loop share nothing
                size = leaf[0].size if leaf.ndim > 2 else leaf.size
                part = slice(start, start := start + size)
                np.testing.assert_allclose(found[part, part], exact[part, part], atol=1e-15)
        trace = ggn_jax.EKFACLinearOperator(model_fn, MSE, PARAMS, (x, y), fisher_type="type-2").trace()
        np.testing.assert_allclose(trace, np.trace(dense_ggn(model_fn, MSE, PARAMS, (x, y))), rtol=1e-12)


@jax.custom_vjp
def shifted(x: jax.Array, w: jax.Array) -> jax.Array:
    return (rounded(x) - 0.5) @ w


shifted.defvjp(
    lambda x, w: (shifted(x, w), (x, w)),
    lambda kept, g: (g @ kept[1].T, rounded(kept[0]).T @ g - 0.5 * (jnp.ones_like(kept[0]).T @ g)),
)


def test_products_of_one_gradient_are_not_two_uses() -> None:
    """As two uses, whose product is left out, they would be no exact block of one example."""
    with usual_promotion():
        report = ggn_jax.report(lambda p, x: shifted(x, p["w"]), params(w=(3, 4)), normal(3, 3))
    assert [(row.kind, row.curvature) for row in report.rows] == [("uncovered", "block")]


def test_flax_products_in_8_bits() -> None:
    """From shapes alone: the kernels, whose rules also hand on scales in place of gradients, are layers."""
    inputs = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    for op in fp8_ops.Fp8DotGeneralOp, fp8_ops.Fp8DirectDotGeneralOp:
        with warnings.catch_warnings(), usual_promotion():
            warnings.simplefilter("ignore", DeprecationWarning)  # Flax's, of the first one
            module = linen.Dense(4, dot_general_cls=op)
            state = jax.tree.map(
                lambda leaf: jnp.ones(leaf.shape, leaf.dtype), jax.eval_shape(module.init, jax.random.key(0), inputs)
            )
            weights = state.pop("params")
            rows = ggn_jax.report(lambda p, x, m=module, s=state: m.apply({"params": p, **s}, x), weights, inputs).rows
        assert {row.parameter: row.kind for row in rows} == {"['bias']": "shift", "['kernel']": "linear"}
