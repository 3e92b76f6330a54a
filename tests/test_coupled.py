"""Examples that depend on each other: the oracle is the GGN of the loss of a batch, `J^T H J`, by autodiff."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizer_cases import CE, KEY, MSE, assert_close, normal
from oracles import dense_ggn, nearest_product

import ggn_jax
from ggn_jax import Unbatched

KFAC, EKFAC, KFOC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator, ggn_jax.KFOCLinearOperator
N = 4
X, Y = normal(0, N, 3), jax.device_put(np.arange(N) % 2)
EXACT: dict[str, Any] = {"fisher_type": "type-2", "positions": "exact", "examples": "coupled"}


def batch_norm(p: Any, x: jax.Array) -> jax.Array:
    """A net with batch normalisation in training mode."""
    h = x @ p["w"]
    centred = h - jnp.mean(h, axis=0, keepdims=True)
    h = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=0, keepdims=True) + 1e-3)
    return jnp.tanh(h * p["s"][None] + p["c"][None]) @ p["v"]


PARAMS = {"c": normal(1, 2), "s": normal(2, 2), "v": normal(3, 2, 2), "w": normal(4, 3, 2)}


@cache
def dense() -> np.ndarray:
    return dense_ggn(batch_norm, CE, PARAMS, (X, Y))


PLACES = {"c": slice(0, 2), "s": slice(2, 4), "v": slice(4, 8), "w": slice(8, 14)}


def block_of(name: str) -> np.ndarray:
    """The dense block, on row-major `[out, in]`."""
    inputs, out = PARAMS[name].shape
    block = dense()[PLACES[name], PLACES[name]].reshape(inputs, out, inputs, out)
    return block.transpose(1, 0, 3, 2).reshape(inputs * out, inputs * out)


@pytest.mark.parametrize("method", ["layers", "data"])
def test_diagonal(method: Any) -> None:
    args = batch_norm, CE, PARAMS
    diagonal = ggn_jax.GGNDiagonalLinearOperator(*args, (X, Y), method=method, examples="coupled")
    assert_close(np.diag(diagonal.as_matrix()), np.diag(dense()))


def test_blocks() -> None:
    """Scales and shifts have their own blocks, EKFAC that of KFAC's eigenbases, KFOC the nearest product."""
    kfac, ekfac, kfoc = (cls(batch_norm, CE, PARAMS, (X, Y), **EXACT) for cls in (KFAC, EKFAC, KFOC))
    for name in "sc":
        assert_close(kfac.block(name), dense()[PLACES[name], PLACES[name]])
    for name in "wv":
        factors = kfac.factors()[f"['{name}']"]
        q_a, q_b = (np.linalg.eigh(np.asarray(x[0][0]))[1] for x in (factors.a, factors.b))
        basis = np.kron(q_b, q_a)
        exact = block_of(name)
        assert_close(ekfac.block(name), basis * np.diag(basis.T @ exact @ basis) @ basis.T)
        inputs, out = PARAMS[name].shape
        assert_close(kfoc.block(name), nearest_product(exact, out, inputs), 1e-6)
    assert_close(kfac.factors()["['w']"].a[0][0], X.T @ X / N)


def test_layers_in_the_open() -> None:
    """The GGN's block from what `layer_io` captures, of a batch of another size than the layers were found with."""
    layers = ggn_jax.find_layers(batch_norm, PARAMS, X[:2], examples="coupled")
    options: dict[str, Any] = {"fisher_type": "type-2", "positions": "exact"}

    io = jax.jit(lambda: ggn_jax.layer_io(layers, CE, PARAMS, (X, Y), **options, grads=False))()
    for name in "wv":
        assert io[name].inputs.shape[:3] == (1, 1, N)
        gradients = np.asarray(io[name].per_example_grads()).reshape(N * 2, -1)
        assert_close(gradients.T @ gradients, block_of(name))
    with pytest.raises(ValueError, match=r"couples examples.*examples='coupled'"):
        ggn_jax.find_layers(batch_norm, PARAMS, X)
    with pytest.raises(ValueError, match="chunk_size cuts the batch"):
        ggn_jax.sum_layer_io(lambda io: io.value, layers, CE, PARAMS, (X, Y), chunk_size=2, **options)
    with pytest.raises(ValueError, match="examples must be 'independent' or 'coupled'"):
        ggn_jax.scale_by_layers(batch_norm, CE, example_inputs=X, examples="both", init=id, update=id, precondition=id)


def mixed(p: Any, x: jax.Array) -> jax.Array:
    """A deep linear net that rotates examples into each other."""
    return rotation(x.shape[0]) @ (x @ p["u"]) @ p["v"]


def rotation(size: int) -> jax.Array:
    return jax.device_put(np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0])


def pooled(p: Any, x: jax.Array) -> jax.Array:
    """Examples that see each other's sums alone."""
    return jnp.arange(1.0, x.shape[0] + 1, dtype=x.dtype)[:, None] * jnp.sum(x @ p["u"], axis=0, keepdims=True) @ p["v"]


@pytest.mark.parametrize(("model_fn", "sharing"), [(mixed, "expand"), (pooled, "reduce")])
@pytest.mark.parametrize("cls", [KFAC, EKFAC])
@pytest.mark.by_default("KFACLinearOperator-mixed-expand", "EKFACLinearOperator-pooled-reduce")
def test_exact_for_deep_linear_nets(model_fn: Any, sharing: str, cls: Any) -> None:
    params = {"u": normal(5, 3, 2), "v": normal(6, 2, 2)}
    batch = X, normal(7, N, 2)
    dense = dense_ggn(model_fn, MSE, params, batch)
    operator = cls(model_fn, MSE, params, batch, sharing=sharing, **EXACT)
    fitting = (("u", slice(0, 6), 3), ("v", slice(6, 10), 2))[: 1 if sharing == "reduce" else 2]
    for name, places, inputs in fitting:
        got = np.asarray(operator.block(name)).reshape(2, inputs, 2, inputs).transpose(1, 0, 3, 2)
        assert_close(got.reshape(2 * inputs, 2 * inputs), dense[places, places])


@pytest.mark.sweep
def test_batches() -> None:
    """Each is coupled within itself; a mean is over all."""
    batches = [(X, Y), (normal(8, 3, 3), jax.device_put(np.arange(3) % 2))]
    loss = ggn_jax.CrossEntropyLoss(reduction="sum")
    want = sum(dense_ggn(batch_norm, loss, PARAMS, batch) for batch in batches) / 7
    args = batch_norm, CE, PARAMS, batches
    kfac = KFAC.from_batches(*args, **EXACT)
    assert_close(kfac.block("s"), want[2:4, 2:4])
    both = jnp.concatenate([X, batches[1][0]])
    assert_close(kfac.factors()["['w']"].a[0][0], both.T @ both / 7)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
@pytest.mark.by_default("mc")
def test_draws_are_right_in_the_mean(fisher_type: str) -> None:
    """Signs and labels are drawn for each example: means over keys have the exact block's mean."""

    @jax.jit
    @jax.vmap
    def block(key: jax.Array) -> jax.Array:
        options = {**EXACT, "positions": "signs", "fisher_type": fisher_type, "key": key}
        operator = KFAC(batch_norm, CE, PARAMS, (X, Y), **options)
        return operator.factors()["['s']"].matrix[0]

    found = np.asarray(block(jax.random.split(KEY, 3000)))
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - dense()[2:4, 2:4]) < 5 * error).all()
    assert found.std(axis=0).max() > 0


def test_empirical() -> None:
    """The batch is one example with one gradient."""
    kfac = KFAC(batch_norm, CE, PARAMS, (X, Y), fisher_type="empirical", examples="coupled")
    gradient = jax.grad(lambda p: CE(batch_norm(p, X), Y))(PARAMS)["s"]
    assert_close(kfac.block("s"), N * np.outer(gradient, gradient))


def attention(p: Any, x: jax.Array) -> jax.Array:
    """Tokens `[N, S, d]` that attend to all of the batch, and a mean over each example's."""
    tokens = (x @ p["in"]).reshape(-1, 2)
    mixed = jax.nn.softmax(tokens @ tokens.T) @ tokens
    return jnp.tanh(jnp.mean(mixed.reshape(*x.shape[:2], 2), axis=1)) @ p["out"]


@pytest.mark.sweep
def test_mask() -> None:
    """Layers with the positions of all examples leave padding out; layers with one for each example do not."""
    params = {"in": normal(9, 3, 2), "out": normal(10, 2, 2)}
    for length in (3, N):  # as many positions as examples, too
        x = normal(11, N, length, 3)
        mask = jnp.arange(length)[None] < jnp.array([1, 3, 2, 2])[:, None]
        kfac = KFAC(attention, CE, params, (x, Y), mask=mask, **EXACT)
        kept = np.asarray(x)[np.asarray(mask)]
        assert_close(kfac.factors()["['in']"].a[0][0], kept.T @ kept / len(kept))
        hidden = attention({**params, "out": jnp.eye(2)}, x)
        assert_close(kfac.factors()["['out']"].a[0][0], hidden.T @ hidden / N)


def contrastive(p: Any, inputs: Any) -> jax.Array:
    """How alike each pair of examples is: `[N, N]`."""
    return jnp.tanh(inputs["image"] @ p["i"]) @ jnp.tanh(inputs["text"] @ p["t"]).T


def graph(p: Any, inputs: Any) -> jax.Array:
    """Nodes as examples, and their edges."""
    nodes, (start, end) = inputs
    h = nodes @ p["i"]
    h = jnp.tanh(h + jnp.zeros_like(h).at[end].add(h[start]))
    return h @ p["t"][:2]


def normalised(h: jax.Array) -> jax.Array:
    axes = tuple(range(h.ndim - 1))
    return h / jnp.sqrt(jnp.mean(h**2, axis=axes, keepdims=True) + 1e-3)


def loop(p: Any, inputs: Any) -> jax.Array:
    """Layers in a scan, each normalised over the batch."""
    weights = jnp.stack([p["i"][:2], p["t"][:2]])
    return jax.lax.scan(lambda h, w: (jnp.tanh(normalised(h @ w)), None), inputs[:, :2], weights)[0]


def convolution(p: Any, inputs: Any) -> jax.Array:
    h = jax.lax.conv_general_dilated(inputs[:, None], p["i"].T[:, None], (1,), "SAME")  # [N, 2, 3]
    return jnp.mean(jnp.tanh(normalised(h.swapaxes(1, 2))), axis=1) @ p["t"][:2]


@pytest.mark.parametrize(
    ("model_fn", "inputs", "targets"),
    [
        (loop, X, Y),
        (convolution, X, Y),
        (contrastive, {"image": X, "text": normal(12, N, 3)}, jnp.arange(N)),
        (graph, (X, Unbatched(jnp.array([[0, 0, 1, 3], [1, 2, 3, 0]]))), Y),
    ],
    ids=["loop", "convolution", "contrastive", "graph"],
)
@pytest.mark.by_default("graph", "loop")
def test_other_coupled_models(model_fn: Any, inputs: Any, targets: Any) -> None:
    params = {"i": normal(13, 3, 2), "t": normal(14, 3, 2)}
    plain = jax.tree.map(
        lambda x: x.value if isinstance(x, Unbatched) else x, inputs, is_leaf=lambda x: isinstance(x, Unbatched)
    )
    want = np.diag(dense_ggn(lambda p, x: model_fn(p, plain), CE, params, (X, targets)))
    diagonal = ggn_jax.GGNDiagonalLinearOperator(model_fn, CE, params, (inputs, targets), examples="coupled")
    assert_close(np.diag(diagonal.as_matrix()), want)
    found = ggn_jax.report(model_fn, params, inputs, examples="coupled")
    assert found.passed
    assert not found.uncovered
    assert all(count % N == 0 for row in found.rows for count in row.positions)


def test_refused() -> None:
    with pytest.raises(ValueError, match="examples='coupled'"):
        KFAC(batch_norm, CE, PARAMS, (X, Y), fisher_type="type-2")
    with pytest.raises(ValueError, match="leave chunk_size out"):
        ggn_jax.GGNLinearOperator(batch_norm, CE, PARAMS, (X, Y), chunk_size=2)
    with pytest.raises(ValueError, match="chunk_size cuts the batch"):
        KFAC(batch_norm, CE, PARAMS, (X, Y), chunk_size=2, **EXACT)
    with pytest.raises(ValueError, match="chunk_size cuts the batch"):
        ggn_jax.kfac(batch_norm, CE, 0.1, example_inputs=X, chunk_size=2, examples="coupled")
    with pytest.raises(ValueError, match="'independent' or 'coupled'; got 'dependent'"):
        ggn_jax.report(batch_norm, PARAMS, X, examples="dependent")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="type-2' with coupled examples"):
        KFAC(batch_norm, CE, PARAMS, (X, Y), fisher_type="type-2", examples="coupled")
    assert "pass examples='coupled'" in str(ggn_jax.report(batch_norm, PARAMS, X))


BATCH = {
    "ones": jnp.ones((6, 2), int),
    "false": jnp.zeros((6, 2), bool),
    "complex": jnp.ones((6, 2), complex),
    "keys": jnp.broadcast_to(jax.random.key(0), (6, 2)),
}


@pytest.mark.parametrize("name", BATCH)
def test_examples_that_are_alike_hide_nothing(name: str) -> None:
    """As dummy batches are; each model is centred over the batch by what differs between its examples."""

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        if name == "keys":
            x = jax.vmap(lambda keys: jax.random.normal(keys[0], (2,)))(x)
        x = x.imag if name == "complex" else x.astype(float)
        h = jnp.tanh(x @ params)
        return h - h.mean(0, keepdims=True)

    params = jnp.ones((2, 3))
    optimizer = ggn_jax.kfac(model_fn, ggn_jax.MSELoss(), 0.1, example_inputs=BATCH[name])
    with pytest.raises(ValueError, match="couples examples"):
        optimizer.init(params)
