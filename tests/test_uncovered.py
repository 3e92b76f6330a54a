"""Parameters that have no Kronecker form, and models whose examples only seem to be independent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import dense_ggn as ggn

import ggn_jax

KFAC, EKFAC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator
BOTH = pytest.mark.parametrize("cls", [KFAC, EKFAC])
CE, MSE = ggn_jax.CrossEntropyLoss(), ggn_jax.MSELoss()
WARNING = ggn_jax.UncoveredParametersWarning


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def weight_normed(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"]))) @ p["v"]


PARAMS = {"v": normal(2, 2), "w": normal(3, 2)}
BATCH = normal(7, 3), jax.device_put(np.arange(7) % 2)


@BOTH
@pytest.mark.by_default("KFACLinearOperator")
def test_what_an_uncovered_parameter_gets(cls: Any) -> None:
    args, exact = (weight_normed, CE, PARAMS, BATCH), ggn(weight_normed, CE, PARAMS, BATCH)[4:, 4:]
    np.testing.assert_allclose(cls(*args, fisher_type="type-2").block("w"), exact, atol=1e-15)
    with pytest.raises(NotImplementedError, match=r"params\['w'\].*test_uncovered"):
        cls(*args, fisher_type="type-2", on_uncovered="error")
    with pytest.warns(WARNING, match=r"params\['w'\]: it goes through .*test_uncovered.*\n.*max_small_size = 5"):
        capped = cls(*args, fisher_type="type-2", max_small_size=5)
    full = cls(*args, fisher_type="type-2", on_uncovered="full", max_small_size=5)
    diagonal = cls(*args, fisher_type="type-2", on_uncovered="diagonal")
    np.testing.assert_allclose(full.block("w"), exact, atol=1e-15)
    for operator in (capped, diagonal):
        np.testing.assert_allclose(operator.block("w"), np.diag(np.diag(exact)), atol=1e-15)
    np.testing.assert_allclose(diagonal.inverse(0.1).block("w"), np.diag(1 / (np.diag(exact) + 0.1)), atol=1e-12)


def test_an_optimizer_warns_when_it_starts_and_not_at_its_steps() -> None:
    optimizer = ggn_jax.kfac(weight_normed, CE, 0.1, example_inputs=BATCH[0], max_small_size=5)
    with pytest.warns(WARNING, match=r"params\['w'\]") as caught:
        state = optimizer.init(PARAMS)
    assert len(caught) == 1

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        key = jax.random.key(0)
        _, grads, factors = optimizer.value_and_grad_and_factors(params, BATCH, state, key=key)
        return optimizer.update(grads, state, params, factors=factors)

    updates, _ = step(PARAMS, state)  # a warning would be an error here
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(updates))


@pytest.mark.sweep
def test_a_parameter_that_is_added_has_no_block_larger_than_the_model() -> None:
    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return (x + p["position"][None]) @ p["w"]

    params = {"position": normal(10, 20), "w": normal(20, 2)}
    batch = normal(3, 10, 20), jnp.zeros((3, 10), int)
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1)
    operator = KFAC(model_fn, loss, params, batch, fisher_type="empirical")
    block = np.asarray(operator.block("position"))
    np.testing.assert_array_equal(block, np.diag(np.diag(block)))
    rows = {row.parameter: row.curvature for row in ggn_jax.report(model_fn, params, batch[0]).rows}
    assert rows == {"['position']": "diagonal", "['w']": "Kronecker"}


@pytest.mark.parametrize(
    "inputs", [normal(1, 3), jnp.zeros((6, 3)), jnp.ones((2, 3)), {"rows": jnp.zeros((5, 1), int)}]
)
def test_examples_that_are_alike_do_not_hide_that_they_depend_on_each_other(inputs: Any) -> None:
    def model_fn(p: Any, x: Any) -> jax.Array:
        hidden = p["w"][x["rows"][:, 0]] if isinstance(x, dict) else x @ p["w"]
        return (hidden - hidden.mean(0, keepdims=True)) / jnp.sqrt(hidden.var(0, keepdims=True) + 1e-5)

    optimizer = ggn_jax.kfac(model_fn, MSE, 0.1, example_inputs=inputs)
    with pytest.raises(ValueError, match="couples examples"):
        optimizer.init({"w": normal(3, 2)})


def test_equal_examples_at_the_border_of_a_domain_are_taken_as_they_are() -> None:
    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.sqrt(1 - x) @ p["w"]

    ggn_jax.kfac(model_fn, MSE, 0.1, example_inputs=jnp.ones((4, 3)) / 2 + 0.49).init({"w": normal(3, 2)})


@pytest.mark.sweep
def test_batches_for_which_layers_come_in_another_order() -> None:
    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        names = ("a", "b") if x.shape[1] > 2 else ("b", "a")
        for name in names:
            x = jnp.tanh(x @ p[name])
        return x.sum(1)

    params = {"a": normal(3, 3), "b": normal(3, 3, seed=1)}
    batches = [(normal(4, size, 3), normal(4, 3)) for size in (4, 2)]
    with pytest.raises(ValueError, match=r"batch 1: .*another order"):
        KFAC.from_batches(model_fn, MSE, params, batches, fisher_type="type-2")
    optimizer = ggn_jax.kfac(model_fn, MSE, 0.1, example_inputs=batches[0][0])
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="layers"):
        optimizer.value_and_grad_and_factors(params, batches[1], state, key=jax.random.key(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.by_default("float32")
def test_the_report_explains_gradients_that_cancel(dtype: Any) -> None:
    """A bias before a normalisation has no gradient, but for rounding."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        for weight, bias in zip(p["w"], p["b"], strict=True):
            x = x @ weight + bias[None, None]
            x = x - x.mean(1, keepdims=True)
            x = jnp.tanh(x / jnp.sqrt((x**2).mean(1, keepdims=True) + 1e-5))
        return x.sum(1)

    for seed in range(10):
        p = {"w": [normal(4, 4, seed=seed + i) for i in range(3)], "b": [normal(4, seed=seed + i) for i in range(3)]}
        params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (p, normal(4, 9, 4, seed=seed)))
        found = ggn_jax.report(model_fn, params, x)
        assert found.passed, str(found)


def class_token(p: Any, x: jax.Array) -> jax.Array:
    token = jnp.broadcast_to(p["token"][None, None], (len(x), 1, 3))
    x = jnp.concatenate([token, x], axis=1)
    weights = jax.nn.softmax(jnp.einsum("nsi,nti->nst", x @ p["q"], x), axis=-1)
    return (weights @ x)[:, 0] @ p["w"]


def mask_token(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.where(x[..., :1] > 0, x, p["token"][None, None])
    return jnp.tanh(x @ p["q"]).mean(1) @ p["w"]


def written_token(p: Any, x: jax.Array) -> jax.Array:
    x = jax.lax.dynamic_update_slice(x, jnp.broadcast_to(p["token"][None, None], (len(x), 1, 3)), (0, 1, 0))
    return jnp.tanh(x @ p["q"]).mean(1) @ p["w"]


def first_state(p: Any, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ p["q"] + x), None

    return jax.lax.scan(step, jnp.broadcast_to(p["token"][None], (len(x), 3)), jnp.moveaxis(x, 1, 0))[0] @ p["w"]


@pytest.mark.parametrize("model_fn", [class_token, mask_token, written_token, first_state])
@pytest.mark.by_default("first_state", "class_token")
def test_tokens_and_first_states_are_shifts(model_fn: Any) -> None:
    """They are put beside data, in the place of some, or at the start of a loop: their block is the GGN's."""
    params, batch = {"q": normal(3, 3), "token": normal(3), "w": normal(3, 2)}, (normal(5, 4, 3), normal(5, 2, seed=1))
    report = ggn_jax.report(model_fn, params, batch[0])
    assert report.passed, str(report)
    assert {row.parameter: row.kind for row in report.rows}["['token']"] == "shift"
    exact = ggn(model_fn, MSE, params, batch)[9:12, 9:12]
    kfac = KFAC(model_fn, MSE, params, batch, fisher_type="type-2", on_uncovered="error")
    np.testing.assert_allclose(kfac.block("token"), exact, atol=1e-14)


def test_a_query_and_its_weight_are_layers() -> None:
    """A learned query is multiplied with a weight before it meets data."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        query = p["query"] @ p["w"]
        weights = jax.nn.softmax(jnp.einsum("qi,nti->nqt", query, x), axis=-1)
        return (weights @ x).reshape(len(x), -1) @ p["v"]

    params, batch = (
        {"query": normal(2, 3), "w": normal(3, 3), "v": normal(6, 2)},
        (normal(5, 4, 3), normal(5, 2, seed=1)),
    )
    report = ggn_jax.report(model_fn, params, batch[0])
    assert report.passed, str(report)
    kinds = {row.parameter: row.kind for row in report.rows}
    assert kinds == {"['query']": "linear", "['v']": "linear", "['w']": "linear"}


def attended(p: Any, x: jax.Array, query: jax.Array) -> jax.Array:
    scores = jnp.einsum("nqi,nti->nqt", jnp.broadcast_to(query, (len(x), 1, 3)) @ p["w"], x)
    return (jax.nn.softmax(scores, axis=-1) @ x)[:, 0] @ p["v"]


def unit(query: jax.Array) -> jax.Array:
    return query / jnp.sqrt(jnp.sum(query**2))


QUERIES = {
    "attends": lambda p, x: attended(p, x, unit(p["query"])),
    "is added": lambda p, x: jnp.tanh(x.mean(1) + (unit(p["query"]) @ p["w"])[None]) @ p["v"],
    "is added as it is": lambda p, x: jnp.tanh(x.mean(1) + (p["query"] @ p["w"])[None]) @ p["v"],
}


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.by_default("attends", "is added as it is")
def test_a_weight_whose_input_is_another_parameter(name: str) -> None:
    """As latent arrays that are normalised first: the weight is a layer, the latent array has its exact block."""
    params, batch = {"query": normal(3), "v": normal(3, 2), "w": normal(3, 3)}, (normal(1, 4, 3), normal(1, 2))
    report = ggn_jax.report(QUERIES[name], params, normal(3, 4, 3))
    assert report.passed, str(report)
    kinds = {row.parameter: row.kind for row in report.rows}
    assert (kinds["['v']"], kinds["['w']"]) == ("linear", "linear")
    exact = ggn(QUERIES[name], MSE, params, batch)
    found = np.asarray(KFAC(QUERIES[name], MSE, params, batch, fisher_type="type-2").as_matrix())
    for part in (slice(0, 3), slice(3, 9), slice(9, 18)):
        np.testing.assert_allclose(found[part, part], exact[part, part], atol=1e-14)


def test_the_self_check_knows_of_types_on_the_way() -> None:
    """A weight that is rounded to 16 bits on its way has a gradient that is."""
    params = {"v": normal(16, 3).astype(jnp.float32), "w": normal(4, 16).astype(jnp.float32)}

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32)) @ p["v"]

    report = ggn_jax.report(model_fn, params, normal(8, 4).astype(jnp.float32))
    assert report.passed, str(report)
    assert report.tolerance == 0.1


def grown_in_a_loop(p: Any, x: jax.Array) -> jax.Array:
    grow = lambda i, c: c * jnp.sin(p["v"]) + p["w"]  # noqa: E731
    return jnp.tanh(x @ jax.lax.fori_loop(0, 3, grow, jnp.ones((3, 3))))


def turned_in_a_loop(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ jax.lax.fori_loop(0, 3, lambda i, w: w.T, p["w"])) @ p["v"]


@pytest.mark.parametrize("model_fn", [grown_in_a_loop, turned_in_a_loop])
def test_weights_that_loops_make_without_data_have_their_exact_block(model_fn: Any) -> None:
    args = model_fn, MSE, {"v": normal(3, 3), "w": normal(3, 3, seed=1)}, (normal(1, 3), normal(1, 3, seed=1))
    found, exact = np.asarray(KFAC(*args, fisher_type="type-2").as_matrix()), ggn(*args)
    for part in (slice(0, 9), slice(9, 18)):
        np.testing.assert_allclose(found[part, part], exact[part, part], atol=1e-15)
