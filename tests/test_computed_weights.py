"""Layers of parameters that meet each other, or constants, before they meet data."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import dense_ggn

import ggn_jax
from ggn_jax import EKFACLinearOperator, KFACLinearOperator

CE, MSE = ggn_jax.CrossEntropyLoss(), ggn_jax.MSELoss()


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


W, A, B, IN, OUT, LAST = normal(5, 6), normal(5, 2), normal(2, 6), normal(5), normal(6), normal(6, 4)
ROTATION = jnp.linalg.qr(normal(5, 5))[0]
NOISE, MASK = normal(5, 6, seed=1), (normal(5, 6, seed=2) > 0).astype(float)
L, S, U = "linear", "scale", "uncovered"


def straight_through(w: jax.Array) -> jax.Array:
    return w + jax.lax.stop_gradient(jnp.round(4 * w) / 4 - w)


# Name: parameters, the weight [5, 6] of them, and what the report says of each, in the order of their names.
WEIGHTS: dict[str, tuple[Any, Callable[[Any], jax.Array], str]] = {
    "merged adapter": ({"a": A, "b": B, "w": W}, lambda p: p["w"] + 0.5 * p["a"] @ p["b"], f"{L} {L} {L}"),
    "transposed adapter in jit": (
        {"a": A, "b": B, "w": W.T},
        jax.jit(lambda p: (p["w"] - (p["a"] @ p["b"]).T).T),
        f"{L} {L} {L}",
    ),
    "three factors": ({"a": A, "b": normal(2, 2), "c": B}, lambda p: p["a"] @ p["b"] @ p["c"], f"{L} {L} {L}"),
    "scaled both": ({"w": W}, lambda p: -p["w"] * IN[:, None] / (OUT[None] + 3), L),
    "learned scale": ({"s": OUT, "w": W}, lambda p: p["w"] * jnp.exp(p["s"][None]), f"{S} {L}"),
    "straight through": ({"w": W}, lambda p: straight_through(p["w"]), L),
    "mean and deviation": (
        {"mean": W, "rho": normal(5, 6, seed=3)},
        lambda p: p["mean"] + jax.nn.softplus(p["rho"]) * NOISE,
        f"{L} {U}",
    ),
    "rotated": ({"w": W}, lambda p: ROTATION @ p["w"], L),
    "difference": ({"a": W, "b": normal(5, 6, seed=4)}, lambda p: p["a"] - p["b"], f"{L} {L}"),
    "plus a constant": ({"w": W}, lambda p: p["w"] ** 1 + 0.0 + jnp.eye(5, 6), L),
    # Without a Kronecker form: the exact block.
    "normalised": (
        {"g": OUT, "w": W},
        lambda p: p["g"][None] * p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True),
        f"{U} {U}",
    ),
    "masked": ({"w": W}, lambda p: p["w"] * MASK, U),
    "symmetric": ({"w": normal(5, 5)}, lambda p: (p["w"] + p["w"].T) @ normal(5, 6), U),
}


def model_of(weight: Callable[[Any], jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda p, x: jnp.tanh(x @ weight(p["hidden"]) + p["bias"][None]) @ p["last"]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.by_default("merged adapter", "normalised", "straight through")
def test_blocks_are_exact_for_one_example(name: str) -> None:
    """There, KFAC's block of each parameter is the GGN's: J^T H J by automatic differentiation."""
    hidden, weight, kinds = WEIGHTS[name]
    model_fn, params = model_of(weight), {"bias": OUT, "hidden": hidden, "last": LAST}
    batch = normal(1, 5), normal(1, 4)
    report = ggn_jax.report(model_fn, params, normal(3, 5))
    assert report.passed, str(report)
    found = {row.parameter: row.kind for row in report.rows}
    assert " ".join(found[f"['hidden']['{key}']"] for key in sorted(hidden)) == kinds
    exact = dense_ggn(model_fn, MSE, params, batch)
    kfac = KFACLinearOperator(model_fn, MSE, params, batch, fisher_type="type-2", bias="separate").as_matrix()
    start = 0
    for leaf in jax.tree.leaves(params):
        block = slice(start, start := start + leaf.size)
        np.testing.assert_allclose(kfac[block, block], exact[block, block], atol=1e-13)


@pytest.mark.parametrize("name", ["merged adapter", "scaled both", "learned scale"])
@pytest.mark.by_default("scaled both")
def test_factors_are_those_of_the_layers_written_out(name: str) -> None:
    """Of several examples, the blocks of the model in which data meet the parameters one by one."""
    apart: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
        "merged adapter": lambda p, x: x @ p["w"] + (0.5 * (x @ p["a"])) @ p["b"],
        "scaled both": lambda p, x: -((x * IN[None]) @ p["w"]) / (OUT[None] + 3),
        "learned scale": lambda p, x: (x @ p["w"]) * jnp.exp(p["s"][None]),
    }
    hidden, weight, _ = WEIGHTS[name]
    params, batch = {"bias": OUT, "hidden": hidden, "last": LAST}, (normal(7, 5), jax.device_put(np.arange(7) % 4))

    def written_out(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(apart[name](p["hidden"], x) + p["bias"][None]) @ p["last"]

    for cls in (KFACLinearOperator, EKFACLinearOperator) if name == "merged adapter" else (KFACLinearOperator,):
        options: dict[str, Any] = {"fisher_type": "type-2", "bias": "separate"}
        found, like = (cls(fn, CE, params, batch, **options) for fn in (model_of(weight), written_out))
        np.testing.assert_allclose(found.as_matrix(), like.as_matrix(), atol=1e-14)


@pytest.mark.sweep
def test_adapters_of_a_stack_of_layers() -> None:
    """In a scan, of dense layers with heads, and under vmap: blocks of one position are the GGN's."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            weight = p["w"] + jnp.einsum("ir,rhd->ihd", p["a"], p["b"])
            return jnp.tanh(jnp.einsum("ni,ihd->nhd", x, weight)).reshape(-1, 6), None

        return jax.lax.scan(layer, x, p)[0]

    params = {"a": normal(3, 6, 2), "b": normal(3, 2, 2, 3), "w": normal(3, 6, 2, 3)}
    batch = normal(1, 6), normal(1, 6, seed=1)
    assert {row.kind for row in ggn_jax.report(model_fn, params, batch[0]).rows} == {"linear"}
    exact = dense_ggn(model_fn, MSE, params, batch)
    kfac = KFACLinearOperator(model_fn, MSE, params, batch, fisher_type="type-2").as_matrix()
    starts = np.cumsum([0] + [leaf[0].size for leaf in jax.tree.leaves(params) for _ in range(3)])
    for start, stop in pairwise(starts):
        np.testing.assert_allclose(kfac[start:stop, start:stop], exact[start:stop, start:stop], atol=1e-13)


@pytest.mark.sweep
def test_kernels_and_tables() -> None:
    """Scales of a kernel's channels, and of a whole table, against the layers with scaled data."""
    scale = jnp.array([0.5, 2.0])

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def model_fn(p: Any, tokens: jax.Array) -> jax.Array:
        x = (0.5 * p["table"] + 0.0)[tokens]
        x = jnp.tanh(conv(x, p["first"] * scale[None, :, None] + jax.lax.stop_gradient(p["first"])))
        return conv(x, p["second"] * jnp.exp(p["s"][None, None])).sum(1)

    def written_out(p: Any, tokens: jax.Array) -> jax.Array:
        x = 0.5 * p["table"][tokens]
        x = jnp.tanh(conv(x * scale[None, None], p["first"]) + conv(x, jax.lax.stop_gradient(p["first"])))
        return (conv(x, p["second"]) * jnp.exp(p["s"][None, None])).sum(1)

    params = {"table": normal(5, 2), "first": normal(3, 2, 2), "second": normal(3, 2, 3), "s": normal(3)}
    batch = jnp.arange(12).reshape(3, 4) % 5, jnp.arange(3)
    kinds = {row.parameter: row.kind for row in ggn_jax.report(model_fn, params, batch[0]).rows}
    wanted = {"first": "convolution", "s": "scale", "second": "convolution", "table": "embedding"}
    assert kinds == {f"['{name}']": kind for name, kind in wanted.items()}
    found, like = (KFACLinearOperator(fn, CE, params, batch, fisher_type="type-2") for fn in (model_fn, written_out))
    np.testing.assert_allclose(found.as_matrix(), like.as_matrix(), atol=1e-14)


@pytest.mark.sweep
def test_multipliers_follow_the_parameters() -> None:
    """A step of the optimizer is that of the model written out, also at other parameters than `init` saw."""
    hidden, weight, _ = WEIGHTS["merged adapter"]
    params, batch = {"bias": OUT, "hidden": hidden, "last": LAST}, (normal(7, 5), jax.device_put(np.arange(7) % 4))

    def written_out(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["hidden"]["w"] + 0.5 * (x @ p["hidden"]["a"]) @ p["hidden"]["b"]
        return jnp.tanh(h + p["bias"][None]) @ p["last"]

    def train(model_fn: Any) -> Any:
        optimizer = ggn_jax.kfac(model_fn, CE, 0.3, example_inputs=batch[0], fisher_type="type-2", bias="separate")

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            params, state = carry
            value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state)
            updates, state = optimizer.update(grads, state, params, factors=factors)
            return (optax.apply_updates(params, updates), state), value

        return jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=4)[1])(params)

    np.testing.assert_allclose(train(model_of(weight)), train(written_out), rtol=1e-11)


def test_values_are_rounded_as_the_model_rounds_them() -> None:
    """A weight that is computed in float32 and cast to 16 bits is not taken apart, since its rounding would differ."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return x @ (p["w"] + p["a"] @ p["b"]).astype(jnp.bfloat16)

    params = jax.tree.map(lambda x: x.astype(jnp.float32), {"a": A, "b": B, "w": W})
    rows = ggn_jax.report(model_fn, params, normal(3, 5).astype(jnp.bfloat16)).rows
    assert {row.kind for row in rows} == {"uncovered"}
