"""The head's output factor in closed form: against dense loss Hessians, and where there is no such form."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designs import thinned
from optimizer_cases import normal

import ggn_jax
from ggn_jax.kronecker.head import find_head
from ggn_jax.kronecker.layout import Layout
from ggn_jax.kronecker.options import Options
from ggn_jax.layers import trace_model

N, T, C = 5, 3, 4
PARAMS = {"u": normal(1, 2, 3), "w": normal(2, 3, C), "b": normal(3, C)}
TYPE2 = Options(fisher_type="type-2")  # type: ignore[arg-type]


def features(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["u"])


def plain(params: Any, x: jax.Array) -> jax.Array:
    y = features(params, x) @ params["w"]
    return y + params["b"].reshape((1,) * (y.ndim - 1) + (C,))


def without_bias(params: Any, x: jax.Array) -> jax.Array:
    return features(params, x) @ params["w"]


def classes_first(params: Any, x: jax.Array) -> jax.Array:
    return jnp.moveaxis(plain(params, x), -1, 1)


def in_half(params: Any, x: jax.Array) -> jax.Array:
    return plain(params, x).astype(jnp.float32).astype(jnp.float64)


def flattened(params: Any, x: jax.Array) -> jax.Array:
    flat = features(params, x).reshape(-1, 3) @ params["w"]
    return (flat + params["b"][None]).reshape(*x.shape[:-1], C)


MODELS = {"plain": plain, "no bias": without_bias, "classes first": classes_first, "flat": flattened, "cast": in_half}

LOSSES: list[tuple[Any, Any]] = [
    (ggn_jax.CrossEntropyLoss, {"weight": jnp.array([1.0, 0.5, 2.0, 0.0])}),
    (ggn_jax.CrossEntropyLoss, {"ignore_index": 1, "label_smoothing": 0.2, "reduction": "sum"}),
    (ggn_jax.MSELoss, {}),
    (ggn_jax.BCEWithLogitsLoss, {"pos_weight": jnp.array([1.0, 3.0, 0.2, 1.0])}),
]


def make_case(name: str, cls: Any, options: Any, positions: bool) -> tuple[Any, Any, Any]:
    """A model, its loss, and a batch."""
    model_fn = MODELS[name]
    inputs = normal(4, N, T, 2) if positions else normal(4, N, 2)
    if cls is ggn_jax.CrossEntropyLoss:
        axis = {"class_axis": 0 if name == "classes first" or not positions else -1}
        return (
            model_fn,
            cls(**options, **axis),
            (inputs, jnp.arange(inputs[..., 0].size).reshape(inputs.shape[:-1]) % C),
        )
    targets = jax.nn.sigmoid(normal(5, *jax.eval_shape(model_fn, PARAMS, inputs).shape))
    return model_fn, cls(**options), (inputs, targets)


def loss_hessian_sum(loss: Any, outputs: jax.Array, targets: jax.Array, axis: int) -> np.ndarray:
    """The sum of the blocks `[C, C]` of the loss's own Hessian, by automatic differentiation."""
    hessian = np.asarray(jax.jit(jax.hessian(lambda outputs: loss(outputs, targets)))(outputs))
    axis = axis % outputs.ndim
    size = outputs.size // outputs.shape[axis]
    moved = np.moveaxis(hessian, (axis, outputs.ndim + axis), (-2, -1)).reshape(size, size, C, C)
    return np.einsum("ssab->ab", moved)


HEADS = [  # with a term per entry, the last axis are the features
    (number, name, positions)
    for number, name, positions in itertools.product(range(len(LOSSES)), MODELS, [False, True])
    if name != "classes first" or (LOSSES[number][0] is ggn_jax.CrossEntropyLoss and positions)
]


@pytest.mark.parametrize(("number", "name", "positions"), thinned(HEADS, 2))
@pytest.mark.by_default("0-classes first-True", "2-flat-False", "1-cast-False")
def test_the_heads_factor_is_the_sum_of_loss_hessians(number: int, name: str, positions: bool) -> None:
    cls, options = LOSSES[number]
    model_fn, loss, batch = make_case(name, cls, options, positions)
    layout = Layout(loss, trace_model(model_fn, PARAMS, batch[0]), TYPE2)
    head = find_head(layout)
    assert head is not None
    assert layout.trace.uses[head].weight.shape == (1, C, 3)
    made = ggn_jax.KFACLinearOperator(model_fn, loss, PARAMS, batch, fisher_type="type-2", key=_key(layout))
    block = made.factors()["['w']"]
    wanted = loss_hessian_sum(loss, jax.jit(model_fn)(PARAMS, batch[0]), batch[1], 1 if name == "classes first" else -1)
    np.testing.assert_allclose(block.b[0][0], wanted, atol=1e-7 if name == "cast" else 1e-14)


def _key(layout: Layout) -> Any:
    return jax.random.key(0) if layout.trace.outputs.ndim > 1 else None


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.by_default("reduce")
def test_it_is_what_back_propagation_gives(sharing: Any) -> None:
    """The same layer, hidden from the finder of the head by a factor of 1 that is data."""
    model_fn, loss, batch = make_case("plain", *LOSSES[0], True)

    def hidden(params: Any, x: jax.Array) -> jax.Array:
        return model_fn(params, x) * jnp.ones_like(x[..., :1])  # that it is 1 nobody can see

    options = {"fisher_type": "type-2", "positions": "exact", "sharing": sharing}
    closed, wanted = (ggn_jax.KFACLinearOperator(fn, loss, PARAMS, batch, **options) for fn in (model_fn, hidden))
    for a, b in zip(jax.tree.leaves(closed.blocks), jax.tree.leaves(wanted.blocks), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)


@pytest.mark.parametrize("large", ["block", "diagonal"])
def test_large_heads(large: Any) -> None:
    model_fn, loss, batch = make_case("plain", *LOSSES[0], False)
    whole, cut = (
        ggn_jax.KFACLinearOperator(model_fn, loss, PARAMS, batch, fisher_type="type-2", max_dense_size=n, large=large)
        for n in (4, 2)
    )
    b = np.asarray(whole.factors()["['w']"].b[0][0])
    parts = [part for name, f in cut.factors().items() if name.startswith("['w']") for part in f.b[0]]
    if large == "diagonal":
        np.testing.assert_allclose(parts[0], np.diag(b), atol=1e-15)
    else:
        np.testing.assert_allclose(parts[0], b[:2, :2], atol=1e-15)
        np.testing.assert_allclose(parts[-1], b[2:, 2:], atol=1e-15)


def test_a_confident_head_keeps_its_digits() -> None:
    """`p (1 - p)` where one class dominates; the sum of `p - p^2` would be 0 in float32."""
    params = {"w": jnp.eye(2, dtype=jnp.float32) * 40}
    x = jnp.eye(2, dtype=jnp.float32)
    batch = x, jnp.array([0, 1])
    loss = ggn_jax.CrossEntropyLoss(reduction="sum")
    made = ggn_jax.KFACLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
    b = made.factors()["['w']"].b[0][0]
    np.testing.assert_allclose(np.diag(b), [2 * np.exp(-40.0)] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    "model_fn",
    [
        lambda p, x: jnp.tanh(plain(p, x)),
        lambda p, x: plain(p, x) * 2.0,
        lambda p, x: plain(p, x) + features(p, x) @ p["w"],
        lambda p, x: plain(p, x)[:, ::-1],
        lambda p, x: plain(p, x)[:, :3],
        lambda p, x: jnp.concatenate([plain(p, x), x], axis=1),
    ],
    ids=["nonlinear", "scaled", "twice", "reversed", "cut", "joined"],
)
def test_what_is_no_head(model_fn: Any) -> None:
    loss = ggn_jax.CrossEntropyLoss()
    assert (
        find_head(Layout(loss, trace_model(model_fn, PARAMS, normal(4, N, 2)), Options(fisher_type="type-2"))) is None
    )  # type: ignore[arg-type]


def test_many_classes_take_no_backward_pass() -> None:
    """64 examples, 128 features, 3,100 classes: one product of matrices."""
    params = {"w": jax.ShapeDtypeStruct((128, 3100), jnp.float32)}
    batch = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)

    def blocks(params: Any, batch: Any) -> Any:
        loss = ggn_jax.CrossEntropyLoss()
        return ggn_jax.KFACLinearOperator(
            lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2"
        ).blocks.blocks

    flops = jax.jit(blocks).lower(params, batch).compile().cost_analysis()["flops"]
    assert flops < 2 * 2 * 64 * 3100**2
