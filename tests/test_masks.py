"""Padding masks: which axes of a layer are the mask's, and what is left out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggn_jax
from ggn_jax.layers import trace_model
from ggn_jax.layers.provenance import position_provenance

KFAC = ggn_jax.KFACLinearOperator
MSE = ggn_jax.MSELoss()
FORWARD: dict[str, Any] = {"fisher_type": "forward-only"}  # only input factors are of interest, and compile fast


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def random_mask(*shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(1).uniform(size=shape) < 0.6)


def batch_of(model_fn: Any, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, jnp.zeros(jax.eval_shape(model_fn, params, x).shape)


def assert_input_factor(operator: Any, name: str, rows: jax.Array) -> None:
    """The block's `A` is the mean of these rows' outer products."""
    rows = np.asarray(rows).reshape(-1, rows.shape[-1])
    np.testing.assert_allclose(operator.factors()[name].a[0][0], rows.T @ rows / len(rows), atol=1e-15)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.by_default("reduce")
def test_masked_positions_are_as_if_they_were_not_there(sharing: Any) -> None:
    def model_fn(p: Any, x: Any) -> jax.Array:
        h = jnp.tanh(x["x"] @ p["w"] + p["b"][None, None])
        return h @ p["v"]

    params = {"w": normal(3, 4), "b": normal(4), "v": normal(4, 2)}
    x, y = normal(3, 5, 3), jnp.arange(15).reshape(3, 5) % 2
    mask = jnp.arange(5)[None] < jnp.array([3, 3, 3])[:, None]
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1, ignore_index=-1)
    padded = {"x": jnp.where(mask[..., None], x, 9.0)}, jnp.where(mask, y, -1)
    options = {"fisher_type": "type-2", "positions": "exact", "sharing": sharing}
    masked = KFAC(model_fn, loss, params, padded, mask=mask, **options)
    short = KFAC(model_fn, loss, params, ({"x": x[:, :3]}, y[:, :3]), **options)
    np.testing.assert_allclose(masked.as_matrix(), short.as_matrix(), atol=1e-15)


def axial(p: Any, x: jax.Array) -> jax.Array:
    """Layers see the two axes of positions in both orders, with attention along one of them."""
    h = jnp.tanh(x @ p["a"]).transpose(0, 2, 1, 3)
    weights = jax.nn.softmax(jnp.einsum("nijc,nikc->nijk", h, h))
    h = h + jnp.einsum("nijk,nikc->nijc", weights, jnp.tanh(h @ p["b"]))
    return h.transpose(0, 2, 1, 3) @ p["v"]


AXIAL = {"a": normal(3, 3), "b": normal(3, 3, seed=1), "v": normal(3, 2)}


@pytest.mark.parametrize("sizes", [(4, 4), (4, 5)])
@pytest.mark.by_default("sizes1")
def test_layers_that_see_positions_transposed(sizes: tuple[int, int]) -> None:
    """Axes of one length in the order of the inputs, others by their length; also with what `jit` hides."""
    x, mask = normal(3, *sizes, 3), random_mask(3, *sizes)
    batch = batch_of(axial, AXIAL, x)
    operator = KFAC(axial, MSE, AXIAL, batch, mask=mask, chunk_size=2, **FORWARD)
    assert_input_factor(operator, "['a']", x[mask])
    assert_input_factor(operator, "['b']", jnp.tanh(x @ AXIAL["a"])[mask])
    traced = jax.jit(lambda mask: KFAC(axial, MSE, AXIAL, batch, mask=mask, **FORWARD))(mask)
    np.testing.assert_allclose(traced.trace(), operator.trace(), rtol=1e-13)


def attention(p: Any, x: jax.Array) -> jax.Array:
    """Two scanned layers, whose heads share a weight."""

    def body(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
        q = (h @ w["q"]).reshape(*h.shape[:2], 2, 2)
        scores = jax.nn.softmax(jnp.einsum("nshd,nthd->nhst", q, q @ w["s"]))
        return h + jnp.einsum("nhst,nthd->nshd", scores, q).reshape(h.shape), None

    return jax.lax.scan(body, x, p)[0]


ATTENTION = {"q": normal(2, 4, 4), "s": normal(2, 2, 2)}


def test_heads_are_masked_with_their_position() -> None:
    x, mask = normal(3, 5, 4), random_mask(3, 5)
    operator = KFAC(attention, MSE, ATTENTION, batch_of(attention, ATTENTION, x), mask=mask, **FORWARD)
    assert_input_factor(operator, "['q']", x[mask])
    assert_input_factor(operator, "['s']", (x @ ATTENTION["q"][0]).reshape(3, 5, 2, 2)[mask])


def recurrent(p: Any, x: jax.Array) -> jax.Array:
    def body(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(x @ p["w"] + h @ p["h"])
        return h, h

    states = jax.lax.scan(body, jnp.zeros((x.shape[0], 3)), x.transpose(1, 0, 2))[1]
    return states.transpose(1, 0, 2) @ p["v"]


def mixer(p: Any, x: jax.Array) -> jax.Array:
    """As many channels as positions; the first layer mixes positions."""
    h = jnp.tanh(x @ p["embed"])
    h = h + (h.transpose(0, 2, 1) @ p["mix"]).transpose(0, 2, 1)
    return h @ p["v"]


def images(p: Any, x: jax.Array) -> jax.Array:
    """Convolutions of images with channels first, then a mean over pixels."""
    x = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME")
    x = jax.lax.conv_general_dilated(jax.nn.relu(x), p["l"], (2, 2), "SAME")
    return jnp.mean(x, axis=(2, 3)) @ p["v"]


def patches(p: Any, x: jax.Array) -> jax.Array:
    """Patches by reshaping, transposed; then two layers, the second on merged positions."""
    x = x.reshape(-1, 4, 2, 4, 2, 3).transpose(0, 3, 1, 2, 4, 5).reshape(-1, 4, 4, 12)
    h = jax.nn.gelu(x @ p["w"])
    return h.reshape(-1, 16, 5) @ p["v"]


def tokens(p: Any, x: jax.Array) -> jax.Array:
    """Embeddings of tokens and of their places; the loop over layers is a checkpointed function."""
    h = p["e"][x] + p["pos"][None]
    return jax.checkpoint(lambda h: jnp.where(h > 0, h, 0) @ p["w"])(h)


def averages(p: Any, x: jax.Array) -> jax.Array:
    """A constant matrix makes positions of positions: they are not a weight's."""
    return jnp.einsum("st,ntc->nsc", jnp.tril(jnp.ones((5, 5))), x) @ p["w"]


@pytest.mark.parametrize(
    ("model_fn", "params", "inputs", "wanted"),
    [
        (attention, ATTENTION, normal(1, 5, 4), [[1], [1, 0]]),
        (recurrent, {"w": normal(4, 3), "h": normal(3, 3), "v": normal(3, 2)}, normal(1, 5, 4), [[1], [1], [1]]),
        (averages, {"w": normal(4, 2)}, normal(1, 5, 4), [[None]]),
        (mixer, {"embed": normal(3, 5), "mix": normal(5, 5), "v": normal(5, 2)}, normal(1, 5, 3), [[1], [0], [1]]),
        (
            images,
            {"k": normal(2, 3, 3, 3), "l": normal(4, 2, 3, 3), "v": normal(4, 2)},
            normal(1, 3, 6, 6),
            [[2, 3], [2, 3], []],
        ),
        (patches, {"w": normal(12, 5), "v": normal(5, 2)}, normal(1, 8, 8, 3), [[2, 1], [None]]),
        (tokens, {"e": normal(9, 3), "pos": normal(5, 3), "w": normal(3, 4)}, jnp.zeros((1, 5), int), [[1], [1]]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_where_axes_come_from(
    model_fn: Callable[..., jax.Array], params: Any, inputs: jax.Array, wanted: list[list[int | None]]
) -> None:
    found = position_provenance(trace_model(model_fn, params, inputs))
    assert [[source for size, source in axes if size > 1] for axes in found] == wanted


def test_what_the_trace_does_not_tell_is_refused() -> None:
    @jax.custom_vjp
    def turned(x: jax.Array) -> jax.Array:
        return x.transpose(0, 2, 1, 3)

    turned.defvjp(lambda x: (turned(x), None), lambda _, g: (turned(g),))

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return turned(x) @ p["w"]

    params = {"w": normal(3, 2)}

    def make(*sizes: int) -> Any:
        batch = batch_of(model_fn, params, normal(2, *sizes, 3))
        return KFAC(model_fn, MSE, params, batch, mask=random_mask(2, *sizes), **FORWARD)

    with pytest.raises(ValueError, match=r"mask of shape \(2, 4, 4\).*params\['w'\] \(.*test_masks.*Pad one of them"):
        make(4, 4)
    make(4, 5)


def network(p: Any, x: jax.Array) -> jax.Array:
    """A layer for each position, and a head for their mean."""
    return jnp.mean(jnp.tanh(x @ p["w"]), axis=1) @ p["v"]


NETWORK = {"w": normal(4, 4), "v": normal(4, 2)}


@pytest.mark.sweep
def test_one_position() -> None:
    x, y = normal(6, 3, 4), normal(6, 2)
    mask = jnp.arange(3)[None] < jnp.array([3, 2, 3, 1, 1, 1])[:, None]
    whole = KFAC(network, MSE, NETWORK, (x, y), mask=mask, **FORWARD)
    batches = [(x[:3], y[:3], mask[:3]), (x[3:, :1], y[3:], mask[3:, :1])]
    operator = KFAC.from_batches(network, MSE, NETWORK, batches, **FORWARD)
    np.testing.assert_allclose(operator.block("w"), whole.block("w"), atol=1e-14)
    # An example that is left out is so in layers that have the position only.
    single, kept = x[:, :1], jnp.array([[True], [False], [True], [True], [False], [True]])

    def make(mask: jax.Array) -> Any:
        return KFAC(network, MSE, NETWORK, (single, y), mask=mask, **FORWARD)

    for operator in (make(kept), jax.jit(make)(kept)):
        assert_input_factor(operator, "['w']", single[kept])
        assert_input_factor(operator, "['v']", jnp.tanh(single @ NETWORK["w"]))

    def merged(p: Any, x: jax.Array) -> jax.Array:
        return network(p, x.reshape(-1, 4)[:, None])

    with pytest.raises(ValueError, match=r"mask of shape \(6, 1\).*Pad to two positions"):
        KFAC(merged, MSE, NETWORK, (single, y), mask=kept, **FORWARD)
    KFAC(merged, MSE, NETWORK, (single, y), mask=kept | True, **FORWARD)
