"""Factors and gradients of one pass over a batch, and steps of several micro-batches."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from optimizer_cases import (
    CE,
    KEY,
    assert_close,
    batch_of,
    gradient,
    integers,
    is_zero,
    mlp,
    mlp_params,
    normal,
    objective,
)

import ggn_jax


def embedding_model(params: Any, x: jax.Array) -> jax.Array:
    h = params["table"][x] + params["position"][None]
    h = h * params["scale"][None, None] + jnp.tanh(h @ params["w"])
    return h @ params["table"].T


def embedding_problem() -> tuple[Any, Any]:
    params = {"table": normal(0, 7, 4), "position": normal(1, 5, 4), "scale": normal(2, 4), "w": normal(3, 4, 4)}
    tokens = integers(0, 7, 6, 5)
    return params, (tokens, (tokens + 1) % 7)


@pytest.mark.parametrize("ekfac", [False, True])
@pytest.mark.by_default("True")
def test_one_pass_equals_two(ekfac: bool) -> None:
    params, batch = embedding_problem()
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1, ignore_index=3)
    optimizer = ggn_jax.kfac(embedding_model, loss, 0.1, example_inputs=batch[0], ekfac=ekfac)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    _, state = update(params, state, params, batch=batch, key=KEY)  # bases, for EKFAC
    value, grads, factors = jax.jit(optimizer.value_and_grad_and_factors)(params, batch, state, key=KEY)
    wanted = jax.jit(jax.value_and_grad(partial(objective, embedding_model, loss)))(params, batch)
    assert_close((value, grads), wanted)
    assert_close(factors, optimizer.factors(params, batch, state, key=KEY))
    updates = update(grads, state, params, batch=batch, key=KEY)
    assert_close(update(grads, state, params, factors=factors), updates)


def with_aux(params: Any, x: jax.Array) -> Any:
    outputs = embedding_model(params, x)
    return outputs, {"outputs": outputs, "tokens": x.sum()}


@pytest.mark.parametrize(
    "options", [{}, {"ekfac": True}, {"chunk_size": 4}, {"has_aux": True}, {"examples": "coupled"}]
)
@pytest.mark.by_default("options2", "options3")
def test_every_other_step_has_factors(options: dict[str, Any]) -> None:
    """The gradient of each step is autodiff's; factors are those of each step, or 0."""
    params, batch = embedding_problem()
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1, ignore_index=3)
    has_aux = options.get("has_aux", False)
    model = with_aux if has_aux else embedding_model
    each, other = (
        ggn_jax.scale_by_kfac(model, loss, example_inputs=batch[0], factor_interval=n, **options) for n in (1, 2)
    )
    state, run = other.init(params), jax.jit(other.value_and_grad_and_factors)
    between = state._replace(curvature=state.curvature._replace(count=jnp.asarray(1), weight=jnp.ones(())))
    value, grads, factors = run(params, batch, state, key=KEY)
    later, later_grads, none = run(params, batch, between, key=KEY)
    wanted = jax.jit(jax.value_and_grad(partial(objective, embedding_model, loss)))(params, batch)
    if has_aux:
        _, aux = with_aux(params, batch[0])
        assert_close((value[1], later[1]), (aux, aux))
        value, later = value[0], later[0]
    assert_close((value, grads), wanted)
    assert_close((later, later_grads), wanted)
    assert_close(factors, each.factors(params, batch, state, key=KEY))
    assert is_zero(none._replace(batches=none.weight))
    assert none.batches == 1


def test_factors_are_the_operators() -> None:
    params, batch = embedding_problem()
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1)
    scale = ggn_jax.scale_by_kfac(embedding_model, loss, example_inputs=batch[0])
    seen = scale.factors(params, batch, scale.init(params), key=KEY)
    operator = ggn_jax.KFACLinearOperator(embedding_model, loss, params, batch, key=KEY)
    assert_close(seen.blocks, operator.blocks.blocks)
    report = scale.report(params)
    assert {row.parameter for row in report.rows} == {"['table']", "['position']", "['scale']", "['w']"}
    assert "2 terms" in str(report)


def test_multi_steps_are_one_step_of_the_whole() -> None:
    params, (x, y) = mlp_params(), batch_of(12)
    for ekfac in (False, True):
        inner = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=x, fisher_type="type-2", ekfac=ekfac, inverse_interval=1)
        parts = ggn_jax.multi_steps(inner, 4)
        whole_state, state = inner.init(params), parts.init(params)
        update = jax.jit(parts.update)
        for bad in (2, 3):
            grads = gradient(mlp, CE, params, (x, y))
            wanted, whole_state = inner.update(grads, whole_state, params, batch=(x, y))
            micro = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
            micro.insert(bad, (micro[0][0].at[0].set(jnp.nan), micro[0][1]))  # is left out
            for i, part in enumerate(micro):
                updates, state = update(gradient(mlp, CE, params, part), state, params, batch=part)
                assert is_zero(updates) == (i < 3)
            assert_close(updates, wanted, 1e-7)
            assert int(state.skipped) == bad - 1
        assert int(state.inner.rejected) == 0
