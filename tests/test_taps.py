"""Factors that are made in the loops where the layers are: those of the same model without loops, in less memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggn_jax
from ggn_jax import KFACLinearOperator, MSELoss

L, T, D = 3, 4, 3
KEY = jax.random.key(0)
CE = ggn_jax.CrossEntropyLoss(class_axis=-1)
Model = Callable[[Any, Any], jax.Array]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) * 0.7)


PARAMS = {
    "in": normal(L, D, 5),
    "bias": normal(L, 5),
    "kernel": normal(L, 3, 5, D, seed=2),
    "table": normal(L, 6, D, seed=3),
    "head": normal(D, 2),
}
TOKENS, TARGETS = (jax.device_put(np.random.default_rng(high).integers(high, size=(4, T))) for high in (6, 2))
BATCH = (normal(4, T, D, seed=5), TOKENS), TARGETS
MASK = jnp.arange(T)[None] < jnp.array([T, 2, 3, 1])[:, None]


def body(x: jax.Array, p: Any, tokens: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["in"] + p["bias"][None, None])
    h = jax.lax.conv_general_dilated(h, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return x + jnp.tanh(h) * p["table"][tokens]


def looped(params: Any, inputs: Any) -> jax.Array:
    """A loop around a loop of one step, which is recomputed."""
    x, tokens = inputs
    layers = jax.tree.map(lambda w: w[:, None], {k: w for k, w in params.items() if k != "head"})

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return body(x, p, tokens), None

    x, _ = jax.lax.scan(lambda x, p: jax.lax.scan(jax.checkpoint(layer), x, p), x, layers)
    return x @ params["head"]


def unrolled(params: Any, inputs: Any) -> jax.Array:
    x, tokens = inputs
    for i in range(L):
        x = body(x, {k: w[i] for k, w in params.items() if k != "head"}, tokens)
    return x @ params["head"]


@pytest.mark.parametrize(
    "options",
    [
        {"fisher_type": "type-2", "key": KEY, "chunk_size": 2, "vector_chunk_size": 2, "mask": MASK},
        {"fisher_type": "empirical", "sharing": "reduce", "bias": "separate", "mask": MASK},
        {"fisher_type": "mc", "mc_samples": 2, "key": KEY, "max_dense_size": 3, "block_size": 2},
    ],
    ids=["type-2", "reduce", "cut"],
)
@pytest.mark.by_default("cut")
def test_loops_change_no_block(options: dict[str, Any]) -> None:
    matrices = [KFACLinearOperator(fn, CE, PARAMS, BATCH, **options).as_matrix() for fn in (looped, unrolled)]
    np.testing.assert_allclose(*matrices, atol=1e-14)


def test_deep_linear_network_in_a_loop_is_exact() -> None:
    """Against the Hessian by automatic differentiation, block by block."""
    params = {"w": normal(L, D, D), "b": normal(L, D, seed=1)}
    x, y = normal(5, D, seed=2), normal(5, D, seed=3)

    @jax.checkpoint
    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return x @ p["w"] + p["b"][None], None

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, x, params)[0]

    got = KFACLinearOperator(model_fn, MSELoss(), params, (x, y), fisher_type="type-2").as_matrix()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    want = jax.jit(jax.hessian(lambda flat: jnp.mean((model_fn(unravel(flat), x) - y) ** 2)))(flat)
    step = jnp.concatenate([jnp.repeat(jnp.arange(L), D), jnp.repeat(jnp.arange(L), D * D)])
    np.testing.assert_allclose(got, jnp.where(step[:, None] == step[None], want, 0), atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2, "factor_interval": 3}], ids=str)
@pytest.mark.sweep
def test_one_pass_of_an_optimizer(options: dict[str, Any]) -> None:
    """Value and gradient are those of automatic differentiation, and the factors those of the operator."""
    optimizer = ggn_jax.kfac(looped, CE, 0.1, example_inputs=BATCH[0], **options)
    state = optimizer.init(PARAMS)
    batch = (*BATCH, MASK)
    value, grads, factors = optimizer.value_and_grad_and_factors(PARAMS, batch, state, key=KEY)
    wanted = jax.jit(jax.value_and_grad(lambda params: CE(looped(params, BATCH[0]), BATCH[1])))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), (value, grads), wanted)
    operator = KFACLinearOperator(looped, CE, PARAMS, BATCH, fisher_type="mc", key=KEY, mask=MASK)
    found = jax.tree.leaves(factors.blocks)
    for a, b in zip(found, jax.tree.leaves(operator.blocks.blocks), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)


def test_activations_stay_in_the_loop() -> None:
    """Of many steps that are recomputed, each with much larger activations than factors."""
    steps, positions, width = 64, 256, 8
    params = {"w": jax.ShapeDtypeStruct((steps, width, width), "float32")}
    x = jax.ShapeDtypeStruct((8, positions, width), "float32")

    @jax.checkpoint
    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T @ p["w"]), None

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, x, params)[0]

    loss = MSELoss()
    optimizer = ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=x)
    state = jax.eval_shape(optimizer.init, params)

    def gradient(params: Any, x: jax.Array) -> Any:
        return jax.value_and_grad(lambda params: loss(model_fn(params, x), x))(params)

    def one_pass(params: Any, x: jax.Array, state: Any, key: jax.Array) -> Any:
        return optimizer.value_and_grad_and_factors(params, (x, x), state, key=key)

    def temporaries(fn: Callable[..., Any], *args: Any) -> int:
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    key = jax.eval_shape(jax.random.key, 0)
    assert temporaries(one_pass, params, x, state, key) < 1.5 * temporaries(gradient, params, x)
