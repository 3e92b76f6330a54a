"""KFAC and EKFAC against dense algebra from Jacobians, and exactness cases."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designs import covering
from kronecker_cases import (
    BOTH,
    CE,
    EKFAC,
    FIRST,
    INPUTS,
    KFAC,
    KFOC,
    LABELS,
    PARAMS,
    TIED,
    linear_net,
    normal,
    scale_and_shift,
    tanh_net,
    tied,
)
from oracles import dense_ggn as ggn
from oracles import nearest_product

import ggn_jax


def blocks_of(matrix: jax.Array) -> np.ndarray:
    """The two layers' blocks of a matrix over `PARAMS`."""
    matrix = np.array(matrix)
    matrix[:FIRST, FIRST:] = matrix[FIRST:, :FIRST] = 0
    return matrix


@covering(1, cls=[KFAC, EKFAC], reduction=["mean", "sum"], chunks=[{}, {"chunk_size": 3, "vector_chunk_size": 1}])
@pytest.mark.by_default("EKFACLinearOperator-sum-chunks7")
def test_exact_for_deep_linear_nets(cls: Any, reduction: str, chunks: dict[str, int]) -> None:
    loss, batch = ggn_jax.MSELoss(reduction=reduction), (INPUTS, normal(7, 2))
    # The number of samples is looked at for drawn vectors only.
    operator = cls(linear_net, loss, PARAMS, batch, fisher_type="type-2", mc_samples=0, **chunks)
    expected = blocks_of(ggn(linear_net, loss, PARAMS, batch))
    np.testing.assert_allclose(operator.as_matrix(), expected, atol=1e-13)


@covering(
    1,
    lambda value: type(value).__name__,
    cls=[KFAC, EKFAC],
    loss=[
        CE,
        ggn_jax.CrossEntropyLoss(weight=jnp.array([1.0, 3.0]), label_smoothing=0.2),
        ggn_jax.BCEWithLogitsLoss(pos_weight=jnp.array([2.0, 0.5])),
        ggn_jax.MSELoss(),
    ],
)
@pytest.mark.by_default("_ModuleMeta-CrossEntropyLoss0")
def test_exact_for_one_datum(cls: Any, loss: Any) -> None:
    targets = jnp.array([1]) if isinstance(loss, ggn_jax.CrossEntropyLoss) else jnp.array([[0.3, 0.9]])
    batch = INPUTS[:1], targets
    operator = cls(tanh_net, loss, PARAMS, batch, fisher_type="type-2")
    np.testing.assert_allclose(operator.as_matrix(), blocks_of(ggn(tanh_net, loss, PARAMS, batch)), atol=1e-15)


@BOTH
@pytest.mark.by_default("EKFACLinearOperator")
def test_exact_for_linear_convolutions_in_their_setting(cls: Any) -> None:
    """Expand for a loss term per position, reduce for averaged positions (Eschenhagen et al. 2023)."""

    def convolve(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, p, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))

    params, inputs = normal(2, 3, 2), normal(4, 5, 3)
    batch = inputs, normal(4, 4, 2)
    expand = cls(convolve, ggn_jax.MSELoss(), params, batch, fisher_type="type-2", positions="exact")
    expected = ggn(convolve, ggn_jax.MSELoss(), params, batch)
    np.testing.assert_allclose(expand.as_matrix(), expected, atol=1e-13)

    def pooled(p: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(convolve(p, x), axis=1)

    batch = inputs, normal(4, 2)
    reduce = cls(pooled, ggn_jax.MSELoss(), params, batch, fisher_type="type-2", sharing="reduce")
    np.testing.assert_allclose(reduce.as_matrix(), ggn(pooled, ggn_jax.MSELoss(), params, batch), atol=1e-13)


def attention(p: Any, x: jax.Array, eps: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A small attention network by hand, with something to add to its layers' outputs, and its layers' inputs."""
    kept: dict[str, jax.Array] = {}

    def dense(name: str, x: jax.Array) -> jax.Array:
        kept[name] = x
        y = x @ p[name]
        return y if eps is None else y + eps[name]

    q, k, v = dense("q", x), dense("k", x), dense("v", x)
    weights = jax.nn.softmax(jnp.einsum("nsd,ntd->nst", q, k))
    return dense("o", jnp.tanh(weights @ v)), kept


ATTENTION = {name: normal(3, 3, seed=i) for i, name in enumerate("koqv")}
SEQUENCES = normal(4, 5, 3), jax.device_put(np.arange(20).reshape(4, 5) % 3)
TOKENS = ggn_jax.CrossEntropyLoss(class_axis=-1, ignore_index=2)


def attention_factors(sharing: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`A` and `B` of every layer from Jacobians: the definition, in dense algebra."""

    @jax.jit
    def derivatives(inputs: jax.Array, targets: jax.Array) -> Any:
        outputs, kept = attention(ATTENTION, inputs)
        zeros = {name: jnp.zeros((4, 5, 3)) for name in ATTENTION}
        jacobian = jax.jacobian(lambda eps: attention(ATTENTION, inputs, eps)[0].reshape(-1))(zeros)
        hessian = jax.hessian(lambda f: TOKENS(f.reshape(outputs.shape), targets))(outputs.reshape(-1))
        return kept, jacobian, hessian

    kept, jacobian, hessian = derivatives(*SEQUENCES)
    factors = {}
    for name in ATTENTION:
        a, j = np.asarray(kept[name]), np.asarray(jacobian[name])  # [60, N, S, out]
        if sharing == "reduce":
            a, j = a.mean(1, keepdims=True), j.sum(2, keepdims=True)
        big_a = np.einsum("nsi,nsj->ij", a, a) / a[..., 0].size
        big_b = np.einsum("xnso,xy,ynsp->op", j, np.asarray(hessian), j)
        factors[name] = big_a, big_b
    return factors


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.by_default("reduce")
def test_attention_against_dense_algebra(sharing: Any) -> None:
    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return attention(p, x)[0]

    args = model_fn, TOKENS, ATTENTION, SEQUENCES
    exact = KFAC(*args, fisher_type="type-2", positions="exact", sharing=sharing, vector_chunk_size=4)
    expected = attention_factors(sharing)
    for name, (a, b) in expected.items():
        np.testing.assert_allclose(exact.block(name), np.kron(b, a), atol=1e-14)
    for options in ({"fisher_type": "type-2"}, {"fisher_type": "mc", "mc_samples": 3}):

        @jax.jit
        def draw(key: jax.Array, options: dict[str, Any] = options) -> list[jax.Array]:
            factors = KFAC(*args, key=key, sharing=sharing, **options).factors()
            return [factors[f"['{name}']"].b[0][0] for name in "koqv"]

        draws = jax.lax.map(draw, jax.random.split(jax.random.key(0), 1000))
        for drawn, name in zip(draws, "koqv", strict=True):
            error = np.std(drawn, axis=0) / 1000**0.5
            z = (np.mean(drawn, axis=0) - expected[name][1]) / np.maximum(error, 1e-12)
            assert np.abs(z).max() < 5  # 36 independent numbers: 2e-5


def test_block_layout() -> None:
    """Row-major `[out, in]`, the joint bias last."""
    operator = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2")
    a = np.concatenate([INPUTS, np.ones((7, 1))], 1)
    block = operator.factors()["['1']['w']"]
    np.testing.assert_allclose(block.a[0][0], a.T @ a / 7, atol=1e-15)
    expected = np.kron(np.asarray(block.b[0][0]), a.T @ a / 7)
    for path in ("['1']['w']", "1/w", "1/b", "1/*"):
        np.testing.assert_allclose(operator.block(path), expected, atol=1e-15)
    with pytest.raises(KeyError, match="no parameter"):
        operator.block("3/w")
    quoted = {"it's": normal(3, 2)}
    assert (
        KFAC(lambda p, x: x @ p["it's"], CE, quoted, (INPUTS, LABELS), fisher_type="forward-only").block("it's").any()
    )


def tied_factors() -> list[tuple[np.ndarray, np.ndarray]]:
    def first(y: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(y) @ TIED["w"]) @ TIED["v"]

    def second(y: jax.Array) -> jax.Array:
        return jnp.tanh(y) @ TIED["v"]

    @jax.jit
    def derivatives(inputs: jax.Array) -> Any:
        y = inputs @ TIED["w"]
        hidden, outputs = jnp.tanh(y), first(y)
        hessian = jax.hessian(lambda f: CE(f.reshape(outputs.shape), LABELS))(outputs.reshape(-1))
        return hessian, [(inputs, jax.jacobian(first)(y)), (hidden, jax.jacobian(second)(hidden @ TIED["w"]))]

    hessian, uses = derivatives(INPUTS)
    result = []
    for a, jacobian in uses:
        j = np.asarray(jacobian).reshape(-1, 7, 3)
        result.append((np.asarray(a.T @ a / 7), np.einsum("xno,xy,ynp->op", j, np.asarray(hessian), j)))
    return result


def test_tied_weights_are_a_sum_of_kronecker_terms() -> None:
    operator = KFAC(tied, CE, TIED, (INPUTS, LABELS), fisher_type="type-2")
    terms = tied_factors()
    expected = sum(np.kron(b, a) for a, b in terms)
    np.testing.assert_allclose(operator.block("w"), expected, atol=1e-14)
    np.testing.assert_allclose(operator.trace(), np.trace(operator.as_matrix()), rtol=1e-13)
    np.testing.assert_allclose(operator.frobenius_norm(), np.linalg.norm(operator.as_matrix()), rtol=1e-13)
    damped = expected + 0.1 * np.eye(9)
    np.testing.assert_allclose(operator.inverse(0.1).block("w"), np.linalg.inv(damped), atol=1e-11)
    root = operator.sqrt(0.1).block("w")
    np.testing.assert_allclose(root @ root, damped, atol=1e-13)
    inverse_root = operator.inverse_sqrt(0.1).block("w")
    np.testing.assert_allclose(inverse_root @ inverse_root, np.linalg.inv(damped), atol=1e-11)
    whole = np.linalg.slogdet(operator.as_matrix() + 0.1 * np.eye(15))[1]
    np.testing.assert_allclose(operator.logdet(0.1), whole, rtol=1e-12)
    assert operator.is_exact()
    together = KFAC(tied, CE, TIED, (INPUTS, LABELS), fisher_type="type-2", tied="concatenate")
    expected = np.kron(sum(b for _, b in terms), sum(a for a, _ in terms) / 2)
    np.testing.assert_allclose(together.block("w"), expected, atol=1e-14)


def test_ekfac_of_tied_weights_uses_whole_gradients() -> None:
    batch = INPUTS, LABELS
    block = EKFAC(tied, CE, TIED, batch, fisher_type="type-2").factors()["['w']"]
    exact = ggn(tied, CE, TIED, batch)[6:, 6:].reshape(3, 3, 3, 3).transpose(1, 0, 3, 2).reshape(9, 9)  # [out, in]
    q = np.kron(np.asarray(block.qb[0]), np.asarray(block.qa[0]))
    np.testing.assert_allclose(block.values.reshape(-1), np.diag(q.T @ exact @ q), atol=1e-14)


def embedding(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(p["e"][tokens]) @ p["e"].T


def test_embeddings_count_rows_and_may_be_tied_to_the_head() -> None:
    tokens, targets = jnp.array([[0, 1, 1], [3, 1, 0]]), jnp.array([[1, 1, 2], [0, 3, 3]])
    loss, params = ggn_jax.CrossEntropyLoss(class_axis=-1), {"e": normal(4, 2)}
    operator = KFAC(embedding, loss, params, (tokens, targets), fisher_type="type-2", positions="exact")
    block = operator.factors()["['e']"]
    np.testing.assert_allclose(block.a[0][0], np.array([2, 3, 0, 1]) / 6)
    assert block.a[0].ndim == 2  # diagonal
    assert [x.shape for x in (*block.a, *block.b)] == [(1, 4), (1, 4, 4), (1, 2, 2), (1, 2, 2)]
    matrix = operator.as_matrix()
    np.testing.assert_allclose(operator.frobenius_norm(), np.linalg.norm(matrix), rtol=1e-13)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12
    ekfac = EKFAC(embedding, loss, params, (tokens, targets), fisher_type="type-2", positions="exact")
    np.testing.assert_allclose(ekfac.trace(), jnp.trace(ggn(embedding, loss, params, (tokens, targets))), rtol=1e-12)
    with pytest.raises(NotImplementedError, match="concatenate"):
        KFAC(embedding, loss, params, (tokens, targets), fisher_type="empirical", tied="concatenate")


def dropout_net(p: Any, inputs: Any) -> jax.Array:
    h = jnp.tanh(inputs["x"] @ p["1"]["w"])
    return jnp.where(jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(inputs["key"]), h, 0) @ p["2"]["w"]


@pytest.mark.sweep
def test_keys_in_the_inputs() -> None:
    """A key for each example: the same for all data at once, in chunks, and in batches."""
    dropped = jax.jit(dropout_net)
    params = {name: {"w": layer["w"]} for name, layer in PARAMS.items()}
    batch = {"x": INPUTS[:6], "key": jax.random.split(jax.random.key(1), 6)}, LABELS[:6]
    exact = ggn(dropout_net, CE, params, batch)
    hidden = np.asarray(dropped({**params, "2": {"w": jnp.eye(4)}}, batch[0]))
    p = np.exp(dropped(params, batch[0]))
    p /= p.sum(1, keepdims=True)
    big_b = np.diag(p.mean(0)) - p.T @ p / 6
    kfac = KFAC(dropout_net, CE, params, batch, fisher_type="type-2")
    np.testing.assert_allclose(kfac.block("2/w"), np.kron(big_b, hidden.T @ hidden / 6), atol=1e-14)
    halves = [jax.tree.map(lambda x: x[:3], batch), jax.tree.map(lambda x: x[3:], batch)]
    whole = EKFAC(dropout_net, CE, params, batch, fisher_type="type-2", chunk_size=3)
    batches = EKFAC.from_batches(dropout_net, CE, params, halves, fisher_type="type-2")
    np.testing.assert_allclose(batches.as_matrix(), whole.as_matrix(), atol=1e-14)
    np.testing.assert_allclose(whole.trace(), jnp.trace(exact), rtol=1e-13)
    order = 12 + np.arange(8).reshape(4, 2).T.reshape(-1)  # [out, in]
    nearest = KFOC(dropout_net, CE, params, batch, fisher_type="type-2").block("2/w")
    np.testing.assert_allclose(nearest, nearest_product(exact[np.ix_(order, order)], 2, 4), atol=1e-10)


def test_scales_and_shifts_have_their_exact_block() -> None:
    params, batch = {"s": normal(2), "t": normal(2), "w": normal(3, 2)}, (INPUTS, LABELS)
    exact = np.asarray(ggn(scale_and_shift, CE, params, batch))
    full = KFAC(scale_and_shift, CE, params, batch, fisher_type="type-2", chunk_size=2)
    np.testing.assert_allclose(full.block("s"), exact[:2, :2], atol=1e-15)
    np.testing.assert_allclose(full.block("t"), exact[2:4, 2:4], atol=1e-15)
    diagonal = EKFAC(scale_and_shift, CE, params, batch, fisher_type="type-2", small="diagonal")
    np.testing.assert_allclose(diagonal.block("s"), np.diag(np.diag(exact[:2, :2])), atol=1e-15)


def test_large_factors_are_diagonal() -> None:
    operator = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2", max_dense_size=3, large="diagonal")
    full = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2")
    block, dense = operator.factors()["['1']['w']"], full.factors()["['1']['w']"]
    np.testing.assert_allclose(block.a[0][0], jnp.diag(dense.a[0][0]), atol=1e-15)
    np.testing.assert_allclose(block.b[0][0], jnp.diag(dense.b[0][0]), atol=1e-15)
    inverse = operator.inverse(0.1).as_matrix()
    np.testing.assert_allclose(inverse, np.linalg.inv(operator.as_matrix() + 0.1 * np.eye(26)), atol=1e-12)


@BOTH
@pytest.mark.by_default("KFACLinearOperator")
def test_monte_carlo_is_unbiased(cls: Any) -> None:
    """EKFAC's eigenvectors are random, so it is its trace that has the exact one as its mean."""
    args = tanh_net, CE, PARAMS, (INPUTS, LABELS)
    draw = jax.jit(lambda key: cls(*args, key=key, mc_samples=2).trace())
    draws = np.asarray(jax.lax.map(draw, jax.random.split(jax.random.key(0), 2000)))
    expected = cls(*args, fisher_type="type-2").trace()
    assert abs(draws.mean() - expected) < 5 * draws.std() / 2000**0.5


def test_low_precision_has_float32_factors() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    batch = INPUTS.astype(jnp.bfloat16), LABELS
    operator = KFAC(tanh_net, CE, params, batch, fisher_type="type-2")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(operator.blocks)} == {"float32"}
    product = operator.inverse(0.1).mv(params)
    assert product["1"]["w"].dtype == jnp.bfloat16
    exact = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2")
    np.testing.assert_allclose(operator.trace(), exact.trace(), rtol=0.02)


def test_large_blocks_of_scales_are_diagonal() -> None:
    params = {"s": normal(2), "t": normal(2), "w": normal(3, 2)}
    args = scale_and_shift, CE, params, (INPUTS, LABELS)
    full = KFAC(*args, fisher_type="type-2").block("s")
    assert abs(full[0, 1]) > 1e-3
    capped = KFAC(*args, fisher_type="type-2", max_small_size=1).block("s")
    np.testing.assert_allclose(capped, np.diag(np.diag(full)), atol=1e-15)


def test_blocks_of_a_stack_have_names() -> None:
    params = {"w": normal(2, 5, 5), "layers": [{"v": normal(5, 3)}]}
    operator = ggn_jax.KFACLinearOperator(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1]) @ p["layers"][0]["v"],
        ggn_jax.MSELoss(),
        params,
        (normal(6, 5), normal(6, 3)),
        fisher_type="type-2",
    )
    assert set(operator.factors()) == {"['w']#1", "['w']#2", "['layers'][0]['v']"}
    assert operator.block("layers/0/v").shape == (15, 15)
    assert operator.block("['w']#2").shape == (25, 25)
    with pytest.raises(KeyError, match="several blocks"):
        operator.block("w")
