"""Layers are found in every way of writing them, and explain the gradient; what is none is named."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_cases import MODELS, PERMUTATION, model_of, normal, report_of

import ggn_jax
from ggn_jax.layers import capture, make_plan, trace_model


@pytest.fixture(autouse=True)
def flax_promotes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Flax's own code promotes dtypes; nothing of ours does."""
    flax = any(
        name in request.node.name for name in ("convolutions", "transformer", "recurrent", "nnx", "flax", "every")
    )
    with jax.numpy_dtype_promotion("standard" if flax else "strict"):
        yield


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.by_default(
    "transformer",
    "moved",
    "scan",
    "experts",
    "twice",
    "pytree inputs",
    "batch last",
    "merged axes",
    "gathered",
)
def test_layers_explain_the_gradient(name: str) -> None:
    found = report_of(name)
    assert found.passed, str(found)
    assert found.uncovered == (), str(found)
    assert str(found).endswith("2e-13.")


def kinds(name: str) -> dict[str, tuple[str, str, int]]:
    return {row.parameter: (row.kind, row.layer, row.uses) for row in report_of(name).rows}


def test_what_is_found() -> None:
    assert kinds("scan") == {
        "['again']": ("linear", "1 x 3 x 3", 1),
        "['head']": ("linear", "1 x 2 x 3", 1),
        "['shift']": ("bias", "1 x 3 x 3", 1),
        "['stack']['b']": ("bias", "4 x 3 x 3", 1),
        "['stack']['w']": ("linear", "4 x 3 x 3", 1),
    }
    assert kinds("twice")["['w']"] == ("linear", "1 x 3 x 3", 2)
    assert kinds("twice")["['b']"] == ("bias", "1 x 3 x 3", 2)
    assert kinds("experts")["['in']"] == ("linear", "1 x 8 x 3", 1)  # all experts have the same input
    assert kinds("experts")["['out']"] == ("linear", "2 x 3 x 4", 1)
    assert kinds("experts")["['bias']"][0] == "bias"
    assert kinds("pytree inputs")["['c']"][0] == "shift"  # one bias for two layers
    assert kinds("gathered") == {
        "['again']": ("linear", "1 x 4 x 4", 1),
        "['bias']": ("shift", "", 1),
        "['in']": ("linear", "1 x 4 x 3", 1),
        "['left']": ("linear", "1 x 2 x 4", 1),
        "['offsets']": ("embedding", "1 x 4 x 3", 1),
        "['positions']": ("embedding", "1 x 4 x 2", 1),
        "['right']": ("linear", "1 x 2 x 4", 1),
    }


def test_what_is_found_in_flax() -> None:
    transformer = kinds("transformer")
    assert transformer["['Embed_0']['embedding']"] == ("embedding+linear", "1 x 8 x 7, 1 x 7 x 8", 2)
    assert transformer["['position']['embedding']"][0] == "embedding"
    assert transformer["['MultiHeadDotProductAttention_0']['query']['bias']"][0] == "bias"
    assert transformer["['LayerNorm_0']['scale']"][0] == "scale"
    convolutions = kinds("convolutions")
    assert convolutions["['Conv_1']['kernel']"] == ("convolution", "2 x 3 x 12", 1)
    assert convolutions["['Conv_2']['kernel']"] == ("convolution", "6 x 1 x 4", 1)
    assert convolutions["['Conv_1']['bias']"] == ("bias", "2 x 3 x 12", 1)
    assert convolutions["['BatchNorm_0']['scale']"][0] == "scale"


@jax.custom_vjp
def opaque(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def masked_gradient(kept: Any, g: jax.Array) -> Any:
    """Of positive weights alone: no product of an input and an output gradient."""
    return jnp.where(kept[0] > 0, kept[1].T @ g, 0), g @ kept[0].T


opaque.defvjp(lambda w, x: (opaque(w, x), (w, x)), masked_gradient)


@jax.custom_jvp
def halved(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


halved.defjvp(
    lambda primals, tangents: (halved(*primals), primals[1] @ (primals[0] * tangents[0]) + tangents[1] @ primals[0])
)

UNCOVERED: dict[str, tuple[Callable[[Any, Any], jax.Array], str]] = {
    "custom_vjp": (lambda w, x: opaque(w, x), "custom_vjp"),
    "custom_jvp": (lambda w, x: jnp.tanh(halved(w, x)), "custom_jvp"),
    "weight norm": (lambda w, x: x @ (w / jnp.linalg.norm(w)), "goes through"),
    "low rank sum": (lambda w, x: x @ (w + w[:, :1] @ w[:1]), "goes through"),
    "in a loop": (
        lambda w, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ jnp.take(jnp.stack([w, w, w]), i, axis=0)), x),
        "known only when",
    ),
    "of repeated rows": (lambda w, x: x[:, :2] @ (w[jnp.array([0, 0])] ** 2), "goes through"),
    "two uses": (lambda w, x: x @ w + jnp.sum(w**2), "as well"),
    "as data": (lambda w, x: x @ w @ w.T @ w + jnp.sin(w[:1] * x[:, :1]), "as well"),
    "repeated": (lambda w, x: x @ jnp.concatenate([w, w], 1), "repeated"),
    "overlap": (lambda w, x: jnp.concatenate([x @ w[:, :2], x[:, :2] @ w[:2, 1:]], 1), "overlap"),
    "output": (lambda w, x: jnp.zeros((x.shape[0], 3)) + jnp.sum(w, 0)[None], "output"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_not_covered_is_named(name: str) -> None:
    model_fn, why = UNCOVERED[name]
    found = ggn_jax.report(lambda p, x: model_fn(p["w"], x), {"w": normal(3, 3)}, normal(4, 3))
    (row,) = found.rows
    assert (row.kind, row.curvature) == ("uncovered", "block")
    assert why in row.why
    assert "test_layers.py" in row.why or name in ("overlap", "output")
    assert found.uncovered == ("['w']",)
    if name != "output":
        assert found.passed, str(found)


def test_a_carry_that_is_only_added_to_is_a_shift() -> None:
    def model_fn(w: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, s: (jnp.sin(h) + s, None), jnp.broadcast_to(w[:1], x.shape), x[None])[0]

    found = ggn_jax.report(lambda p, x: model_fn(p["w"], x), {"w": normal(3, 3)}, normal(4, 3))
    (row,) = found.rows
    assert (row.kind, row.curvature) == ("shift", "block")
    assert found.passed, str(found)


def test_indices_of_an_outer_function_are_not_known() -> None:
    def kinds(places: jax.Array) -> tuple[str, ...]:
        trace = trace_model(lambda w, x: x @ w[places], normal(4, 2), normal(5, 4))
        return tuple(use.kind for use in trace.uses) + tuple(blocked.why for blocked in trace.uncovered)

    found = []
    jax.jit(lambda places: found.append(kinds(places)))(jnp.asarray(PERMUTATION))
    assert kinds(jnp.asarray(PERMUTATION)) == ("linear",)
    assert "known only when the program runs" in found[0][0]


@pytest.mark.sweep
def test_a_weight_at_known_places_has_the_blocks_of_the_moved_weight() -> None:
    batch, w = (normal(6, 4), jax.device_put(np.arange(6) % 3)), normal(4, 3)

    def block(model_fn: Callable[[Any, Any], jax.Array], w: jax.Array) -> jax.Array:
        loss = ggn_jax.CrossEntropyLoss()
        return ggn_jax.KFACLinearOperator(model_fn, loss, w, batch, fisher_type="type-2").mv(jnp.cos(w))

    moved = block(lambda w, x: jnp.tanh(x @ w), w[PERMUTATION])
    got = block(lambda w, x: jnp.tanh(x @ w[PERMUTATION]), w)
    np.testing.assert_allclose(got[PERMUTATION], moved, rtol=1e-13)


def test_stopped_gradients_are_unused() -> None:
    found = ggn_jax.report(
        lambda p, x: x @ jax.lax.stop_gradient(p["w"]) @ p["v"], {"w": normal(3, 3), "v": normal(3, 2)}, normal(4, 3)
    )
    assert [row.kind for row in found.rows] == ["linear", "unused"]
    assert found.passed


def test_a_position_embedding_is_no_bias() -> None:
    found = ggn_jax.report(
        lambda p, x: x @ p["w"] + p["e"][None], {"w": normal(3, 2), "e": normal(4, 2)}, normal(5, 4, 3)
    )
    assert [row.kind for row in found.rows] == ["shift", "linear"]
    assert found.passed


def test_a_bias_of_a_value_that_is_read_twice_is_a_shift() -> None:
    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        y = x @ p["w"]
        return y * jnp.tanh(y + p["b"][None])

    found = ggn_jax.report(model_fn, {"w": normal(3, 2), "b": normal(2)}, normal(5, 3))
    assert [row.kind for row in found.rows] == ["shift", "linear"]
    assert found.passed


def test_batch_normalisation_in_training_mode_is_told() -> None:
    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        y = x @ p
        return (y - jnp.mean(y, 0, keepdims=True)) / (1e-3 + jnp.std(y, 0, keepdims=True))

    found = ggn_jax.report(model_fn, normal(3, 2), normal(5, 3))
    assert found.passed is False
    assert "couples examples" in str(found)
    with pytest.raises(ValueError, match="couples examples"):
        ggn_jax.KFACLinearOperator(
            model_fn, ggn_jax.MSELoss(), normal(3, 2), (normal(5, 3), normal(5, 2)), key=jax.random.key(0)
        )


def test_shapes_are_enough() -> None:
    model_fn, params, inputs = model_of("twice")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, inputs))
    found = ggn_jax.report(model_fn, *shapes)
    assert found.passed is None
    assert "not made" in str(found)


@pytest.mark.parametrize("name", ["scan", "transformer", "convolutions"])
@pytest.mark.by_default("transformer")
def test_capture_returns_inputs_and_output_gradients(name: str) -> None:
    """Against one example's gradient by automatic differentiation, of each weight."""
    model_fn, params, inputs = model_of(name)
    trace = trace_model(model_fn, params, inputs)
    plan = make_plan(trace)
    outputs = jax.jit(lambda *args: model_fn(*args))(params, inputs)
    vectors = normal(*outputs.shape, seed=5)

    def gradient(use: Any, a: jax.Array, grads: jax.Array) -> jax.Array:
        """Of each example, `[n, group, out, in]`."""
        a = use.arrange_inputs(a)
        if use.kind == "embedding":
            a = jax.nn.one_hot(a, use.weight.shape[2], dtype=jnp.float64)
        return jnp.einsum("gnso,gnsi->ngoi", use.arrange_output_grads(grads), a)

    @jax.jit
    def captured(params: Any, inputs: Any) -> Any:
        found = capture(trace, params, inputs)
        grads, _ = found.vjp(vectors)
        products = [[gradient(trace.uses[i], found.inputs[i], grads[i]) for i in layer.uses] for layer in plan.layers]
        return found.outputs, products

    @jax.jit
    def flat(params: Any) -> list[jax.Array]:
        def example(params: Any, n: int) -> jax.Array:
            one = jax.tree.map(lambda x: x[n : n + 1], inputs)
            return jnp.sum(model_fn(params, one) * vectors[n : n + 1])

        return [jax.flatten_util.ravel_pytree(jax.grad(example)(params, n))[0] for n in range(len(vectors))]

    got, products = captured(params, inputs)
    np.testing.assert_allclose(got, outputs, atol=1e-14)
    wanted = [np.asarray(x) for x in flat(params)]
    for layer, of_uses in zip(plan.layers, products, strict=True):
        pairs = zip(map(np.asarray, of_uses), layer.swapped, strict=True)
        total = sum(np.swapaxes(product, -1, -2) if swapped else product for product, swapped in pairs)
        numbers = layer.weight.entries.indices().reshape(layer.weight.shape)
        for n, want in enumerate(wanted):
            np.testing.assert_allclose(total[n], want[numbers], atol=1e-13)


def test_the_trace_is_the_same_in_every_process() -> None:
    model_fn, params, inputs = model_of("transformer")
    assert trace_model(model_fn, params, inputs).uses == trace_model(model_fn, params, inputs).uses


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((None, {"w": 1}, 1), TypeError, "model_fn"),
        ((lambda p, x: x, {}, np.ones((2, 3))), ValueError, "params must hold"),
        ((lambda p, x: x, {"w": np.ones(2, int)}, np.ones((2, 3))), TypeError, r"params\['w'\]"),
        ((lambda p, x: x, {"w": np.ones(2)}, {"a": np.ones((2, 3)), "b": np.ones((3, 3))}), ValueError, "batch axis"),
        ((lambda p, x: x, {"w": np.ones(2)}, [1.0]), TypeError, r"inputs\[0\]"),
        ((lambda p, x: (x, x), {"w": np.ones(2)}, np.ones((2, 3))), TypeError, "one array"),
        ((lambda p, x: jnp.sum(x), {"w": np.ones(2)}, np.ones((2, 3))), ValueError, "batch of one"),
    ],
)
def test_errors(args: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ggn_jax.report(*args)
