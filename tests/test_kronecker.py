"""KFAC and EKFAC against dense algebra from Jacobians, exactness cases, and curvlinops."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import curvlinops
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import torch
from compiling import flags
from designs import covering
from jax.flatten_util import ravel_pytree
from oracles import dense_ggn as ggn
from oracles import nearest_product

import ggn_jax
from ggn_jax.kronecker import inverse
from ggn_jax.kronecker.algebra import Kronecker

KFAC, EKFAC, KFOC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator, ggn_jax.KFOCLinearOperator
BOTH = pytest.mark.parametrize("cls", [KFAC, EKFAC])


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def linear_net(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["1"]["w"] + p["1"]["b"][None]) @ p["2"]["w"] + p["2"]["b"][None]


def tanh_net(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["1"]["w"] + p["1"]["b"][None]) @ p["2"]["w"] + p["2"]["b"][None]


PARAMS = {"1": {"w": normal(3, 4), "b": normal(4)}, "2": {"w": normal(4, 2), "b": normal(2)}}
FIRST = 4 + 12  # entries of the first layer
INPUTS, LABELS = normal(7, 3), jnp.arange(7) % 2
CE = ggn_jax.CrossEntropyLoss()


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
@pytest.mark.by_default("_ModuleMeta-CrossEntropyLoss0", "_ModuleMeta-MSELoss1")
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
SEQUENCES = normal(4, 5, 3), jnp.arange(20).reshape(4, 5) % 3
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


class TorchNet(torch.nn.Sequential):
    """The networks that curvlinops knows, and the same in JAX with torch's own parameters."""


# Functions of the module: what is compiled for one case serves the others.


def mlp(p: list[jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p[0].T + p[1][None]) @ p[2].T + p[3][None]


def cnn(p: list[jax.Array], x: jax.Array) -> jax.Array:
    x = jax.lax.conv_general_dilated(x, p[0], (1, 2), ((1, 1), (1, 1))) + p[1][None, :, None, None]
    return jnp.tanh(x).reshape(x.shape[0], -1) @ p[2].T + p[3][None]


def torch_mlp() -> tuple[torch.nn.Module, Callable[[Any, jax.Array], jax.Array], torch.Tensor]:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    return net.double(), mlp, torch.randn(6, 3, dtype=torch.float64)


def torch_cnn() -> tuple[torch.nn.Module, Callable[[Any, jax.Array], jax.Array], torch.Tensor]:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=1),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(3 * 5 * 3, 3),
    )
    return net.double(), cnn, torch.randn(6, 2, 5, 5, dtype=torch.float64)


LOSSES = {"CrossEntropyLoss": 0, "MSELoss": 1, "BCEWithLogitsLoss": 2}


@pytest.mark.filterwarnings("ignore")
@covering(
    2,
    make=[torch_mlp, torch_cnn],
    loss=LOSSES,
    reduction=["mean", "sum"],
    fisher_type=["type-2", "empirical", "forward-only"],
    sharing=["expand", "reduce"],
    separate=[True, False],
)
@pytest.mark.by_default(
    "torch_cnn-CrossEntropyLoss-mean-type-2-reduce-False",
    "torch_mlp-BCEWithLogitsLoss-mean-empirical-expand-True",
    "torch_mlp-MSELoss-sum-forward-only-expand-True",
)
def test_curvlinops(make: Any, loss: str, reduction: str, fisher_type: str, sharing: Any, separate: bool) -> None:
    torch.manual_seed(0)
    net, model_fn, inputs = make()
    targets = [torch.arange(6) % 3, torch.randn(6, 3).double(), torch.rand(6, 3).double().round()][LOSSES[loss]]
    params = list(net.parameters())
    options = {"check_deterministic": False, "kfac_approx": sharing, "separate_weight_and_bias": separate}
    theirs = {
        cls: cls(
            net,
            getattr(torch.nn, loss)(reduction=reduction),
            params,
            [(inputs, targets)],
            fisher_type=fisher_type,
            **options,
        )
        for cls in ([curvlinops.KFACLinearOperator] if fisher_type == "forward-only" else THEIRS)
    }
    ours = [jnp.asarray(p.detach().numpy()) for p in params]
    batch = jnp.asarray(inputs.numpy()), jnp.asarray(targets.numpy())
    for their_cls, operator in theirs.items():
        cls = KFAC if their_cls is curvlinops.KFACLinearOperator else EKFAC
        mine = cls(
            model_fn,
            getattr(ggn_jax, loss)(reduction=reduction),
            ours,
            batch,
            fisher_type=fisher_type,
            sharing=sharing,
            bias="separate" if separate else "joint",
        )
        if cls is EKFAC and sharing == "reduce":
            # Averaged inputs of 6 data leave eigenvectors undetermined, but not the sum over them.
            np.testing.assert_allclose(mine.trace(), operator.trace.item(), rtol=1e-10)
            continue
        vector = normal(sum(p.size for p in ours))
        expected = (operator @ torch.from_numpy(np.array(vector))).detach().numpy()
        product = ravel_pytree(mine.mv(ravel_pytree(ours)[1](vector)))[0]
        np.testing.assert_allclose(product, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


THEIRS = [curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator]


@jax.jit
def algebra(operator: Any, vector: Any) -> dict[str, jax.Array]:
    """All that an operator computes, by one program."""
    return {
        "matrix": operator.as_matrix(),
        "trace": operator.trace(),
        "norm": operator.frobenius_norm(),
        "diagonal": ravel_pytree(operator.diagonal())[0],
        "logdet": operator.logdet(0.3),
        "det": operator.det(0.3),
        "inverse": operator.inverse(0.3).as_matrix(),
        "solution": ravel_pytree(operator.solve(vector, 0.3))[0],
        "root": operator.sqrt(0.3).as_matrix(),
        "inverse root": operator.inverse_sqrt(0.3).as_matrix(),
        "by lineax": ravel_pytree(lx.linear_solve(operator.damped(0.3), vector, lx.CG(1e-10, 1e-10)).value)[0],
    }


@covering(1, cls=[KFAC, EKFAC], bias=["joint", "separate"])
@pytest.mark.by_default("KFACLinearOperator-joint")
def test_algebra(cls: Any, bias: Any) -> None:
    operator = cls(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2", bias=bias)
    vector = jax.tree.map(lambda x: normal(*x.shape, seed=3), PARAMS)
    found = {name: np.asarray(value) for name, value in algebra(operator, vector).items()}
    matrix, root, inverse_root = found["matrix"], found["root"], found["inverse root"]
    size = len(matrix)
    damped = matrix + 0.3 * np.eye(size)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)
    np.testing.assert_allclose(found["trace"], np.trace(matrix), rtol=1e-13)
    np.testing.assert_allclose(found["norm"], np.linalg.norm(matrix), rtol=1e-13)
    np.testing.assert_allclose(found["diagonal"], np.diag(matrix), atol=1e-15)
    np.testing.assert_allclose(found["logdet"], np.linalg.slogdet(damped)[1], rtol=1e-12)
    np.testing.assert_allclose(found["det"], np.linalg.det(damped), rtol=1e-11)
    np.testing.assert_allclose(found["inverse"], np.linalg.inv(damped), atol=1e-12)
    np.testing.assert_allclose(damped @ found["solution"], ravel_pytree(vector)[0], atol=1e-12)
    np.testing.assert_allclose(root @ root, damped, atol=1e-13)
    np.testing.assert_allclose(inverse_root @ inverse_root @ damped, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(found["by lineax"], found["solution"], atol=1e-8)
    assert lx.is_positive_semidefinite(operator.inverse(0.3))


def test_heuristic_damping_is_its_formula() -> None:
    operator = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2")
    inverse = operator.inverse(0.3, "heuristic")
    for name, block in operator.factors().items():
        a, b = np.asarray(block.a[0][0]), np.asarray(block.b[0][0])
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(b) / len(b)))
        damped_a, damped_b = a + pi * 0.3**0.5 * np.eye(len(a)), b + 0.3**0.5 / pi * np.eye(len(b))
        expected = np.kron(np.linalg.inv(damped_b), np.linalg.inv(damped_a))
        np.testing.assert_allclose(inverse.block(name), expected, rtol=1e-10, atol=1e-12)


def test_inverse_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverse, "MIN_SPLIT_SIZE", 2)
    roots = [np.asarray(normal(size, size)) for size in (1, 2, 3, 4, 11)]
    matrices = [root @ root.T + np.eye(len(root)) for root in roots]
    found = jax.jit(lambda matrices: [inverse.inverse_by_cholesky(matrix) for matrix in matrices])(matrices)
    for got, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(got, np.linalg.inv(matrix), atol=1e-13)


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


def tied(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"]


TIED = {"v": normal(3, 2), "w": normal(3, 3)}


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


def scale_and_shift(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) * p["s"][None] + p["t"][None]


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


@pytest.mark.sweep
def test_transformations() -> None:
    """A pytree: built inside of `jit` from sharded data, mapped over keys, averaged."""
    cls = EKFAC  # its factors are KFAC's
    args = tanh_net, CE, PARAMS
    key = jax.random.key(3)
    eager = cls(*args, (INPUTS[:6], LABELS[:6]), key=key)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put((INPUTS[:6], LABELS[:6]), sharding)
    sharded = jax.jit(lambda batch, key: cls(*args, batch, key=key))(batch, key)
    np.testing.assert_allclose(sharded.as_matrix(), eager.as_matrix(), atol=1e-14)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, eager, sharded)
    np.testing.assert_allclose(mean.mv(PARAMS)["1"]["w"], eager.mv(PARAMS)["1"]["w"], atol=1e-13)
    keys = jax.random.split(key, 3).at[1].set(key)
    traces = jax.jit(jax.vmap(lambda k: cls(*args, (INPUTS[:6], LABELS[:6]), key=k).trace()))(keys)
    np.testing.assert_allclose(traces[1], np.trace(eager.as_matrix()))


def test_low_precision_has_float32_factors() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    batch = INPUTS.astype(jnp.bfloat16), LABELS
    operator = KFAC(tanh_net, CE, params, batch, fisher_type="type-2")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(operator.blocks)} == {"float32"}
    product = operator.inverse(0.1).mv(params)
    assert product["1"]["w"].dtype == jnp.bfloat16
    exact = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2")
    np.testing.assert_allclose(operator.trace(), exact.trace(), rtol=0.02)


def test_nothing_left_to_divide_by() -> None:
    """An all-masked batch has zero blocks; singular blocks are named."""
    loss = ggn_jax.CrossEntropyLoss(ignore_index=1)
    operator = KFAC(tanh_net, loss, PARAMS, (INPUTS, jnp.ones(7, int)), fisher_type="type-2")
    assert float(operator.trace()) == 0
    np.testing.assert_allclose(operator.inverse(0.5).mv(PARAMS)["1"]["w"], 2 * PARAMS["1"]["w"], rtol=1e-12)
    assert float(jnp.max(jnp.abs(operator.inverse(0.5, "heuristic").mv(PARAMS)["1"]["w"]))) < 10
    with pytest.raises(FloatingPointError, match=r"\['1'\]\['w'\]"):
        operator.inverse()


def test_unused_parameters_have_no_curvature() -> None:
    params = {"w": normal(3, 2), "unused": normal(2)}
    operator = KFAC(lambda p, x: x @ p["w"], CE, params, (INPUTS, LABELS), fisher_type="type-2")
    assert not np.any(operator.mv(params)["unused"])
    np.testing.assert_allclose(operator.inverse(0.5).mv(params)["unused"], 2 * params["unused"])


def test_empty_parameters() -> None:
    params = {"empty": jnp.zeros((0, 2)), "shift": jnp.zeros((0, 2)), "w": normal(3, 2)}

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + x[:, :0] @ p["empty"] + jnp.sum(p["shift"], 0)[None]

    assert ggn_jax.report(model_fn, params, INPUTS).passed
    operator = KFAC(model_fn, CE, params, (INPUTS, LABELS), fisher_type="type-2")
    assert operator.inverse(0.1).mv(params)["empty"].shape == (0, 2)
    nothing = KFAC(lambda p, x: x, ggn_jax.MSELoss(), {"n": params["empty"]}, (INPUTS, INPUTS), fisher_type="type-2")
    assert float(nothing.trace()) == 0
    with pytest.raises(KeyError, match="none with entries"):
        nothing.block("n")
    assert operator.block("w").shape == (6, 6)


@pytest.mark.sweep
def test_partly_used_parameters() -> None:
    params = {"w": normal(3, 4)}
    operator = KFAC(lambda p, x: x @ p["w"][:, :2], CE, params, (INPUTS, LABELS), fisher_type="type-2")
    matrix = np.asarray(operator.as_matrix())
    np.testing.assert_allclose(operator.inverse(0.5).as_matrix(), np.linalg.inv(matrix + 0.5 * np.eye(12)), atol=1e-12)


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.by_default("joint")
def test_kfoc_is_the_nearest_kronecker_product(bias: Any) -> None:
    """The leading singular pair of the exact block, rearranged, with positive semi-definite factors."""
    batch = INPUTS, LABELS
    operator = KFOC(tanh_net, CE, PARAMS, batch, fisher_type="type-2", bias=bias)
    exact = np.asarray(ggn(tanh_net, CE, PARAMS, batch))
    kfac = KFAC(tanh_net, CE, PARAMS, batch, fisher_type="type-2", bias=bias)
    for start, name, out, inputs in ((0, "1/w", 4, 3), (FIRST, "2/w", 2, 4)):
        order = start + out + np.arange(out * inputs).reshape(inputs, out).T  # [out, in]
        if bias == "joint":
            order = np.concatenate([order, start + np.arange(out)[:, None]], 1)
        block = exact[np.ix_(order.reshape(-1), order.reshape(-1))]
        width = order.shape[1]
        np.testing.assert_allclose(operator.block(name), nearest_product(block, out, width), atol=1e-10)
        assert np.linalg.norm(block - operator.block(name)) <= np.linalg.norm(block - kfac.block(name))
        factors = operator.factors()[f"['{name[0]}']['w']" if bias == "separate" else next(iter(names(operator, name)))]
        for factor in (*factors.a, *factors.b):
            assert np.linalg.eigvalsh(factor[0]).min() > -1e-14


def names(operator: Any, name: str) -> list[str]:
    """The key of the block that holds a parameter."""
    path = f"['{name[0]}']['{name[2]}']"
    return [spec.names[0] for spec, _ in operator.blocks.unstacked() if path in spec.names]


def test_kfoc_of_tied_and_shared_weights() -> None:
    batch = INPUTS, LABELS
    operator = KFOC(tied, CE, TIED, batch, fisher_type="type-2")
    exact = ggn(tied, CE, TIED, batch)[6:, 6:].reshape(3, 3, 3, 3).transpose(1, 0, 3, 2)  # [out, in, out, in]
    nearest = nearest_product(exact, 3, 3)
    np.testing.assert_allclose(operator.block("w"), nearest, atol=1e-10)
    inverse = operator.inverse(0.1).block("w")
    np.testing.assert_allclose(inverse, np.linalg.inv(nearest + 0.1 * np.eye(9)), atol=1e-8)
    with pytest.raises(NotImplementedError, match="chunk_size"):
        KFOC(tied, CE, TIED, batch, fisher_type="type-2", chunk_size=2)


def test_nearest_of_random_sums() -> None:
    rng = np.random.default_rng(0)
    nearest = jax.jit(lambda a, b: Kronecker(tuple(a), tuple(b)).nearest())
    for _ in range(10):
        roots = [rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 4, 4))]
        a, b = ([(r @ r.T)[None] for r in root] for root in roots)
        near = nearest(a, b)
        rearranged = sum(np.outer(y, x) for x, y in zip(a, b, strict=True))
        u, s, vt = np.linalg.svd(rearranged)
        np.testing.assert_allclose(
            np.outer(near.b[0], near.a[0]), s[0] * np.outer(u[:, 0], vt[0]), rtol=1e-8, atol=1e-8
        )


def test_large_blocks_of_scales_are_diagonal() -> None:
    params = {"s": normal(2), "t": normal(2), "w": normal(3, 2)}
    args = scale_and_shift, CE, params, (INPUTS, LABELS)
    full = KFAC(*args, fisher_type="type-2").block("s")
    assert abs(full[0, 1]) > 1e-3
    capped = KFAC(*args, fisher_type="type-2", max_small_size=1).block("s")
    np.testing.assert_allclose(capped, np.diag(np.diag(full)), atol=1e-15)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"fisher_type": "type2"}, ValueError, "fisher"),
        ({}, ValueError, "key"),
        ({"fisher_type": "mc", "mc_samples": 0}, ValueError, "mc_samples must be an integer of at least 1"),
        ({"fisher_type": "type-2", "sharing": "both"}, ValueError, "sharing must be 'expand' or 'reduce'; got"),
        ({"fisher_type": "type-2", "large": np.ones(2)}, ValueError, "large must be 'block' or 'diagonal'; got array"),
        ({"fisher_type": "type-2", "bias": None}, ValueError, "bias must be 'joint' or 'separate'; got"),
        ({"fisher_type": "type-2", "on_uncovered": "skip"}, ValueError, "on_uncovered must be"),
        ({"fisher_type": "type-2", "mask": np.ones(7, bool)}, ValueError, "mask must be boolean"),
        ({"fisher_type": "type-2", "mask": np.ones((7, 3), bool)}, ValueError, "no layer"),
        ({"fisher_type": "type-2", "max_dense_size": 0}, ValueError, "max_dense_size"),
        ({"fisher_type": "type-2", "max_small_size": 0}, ValueError, "max_small_size"),
        ({"fisher_type": "type-2", "vector_chunk_size": 1.5}, TypeError, "vector_chunk_size"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), **options)


def test_more_errors() -> None:
    operator = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2")
    with pytest.raises(ValueError, match="method must be"):
        operator.inverse(0.1, "fast")
    with pytest.raises(ValueError, match="must not be negative"):
        operator.inverse(-0.1)
    with pytest.raises(ValueError, match="must have shape"):
        operator.mv(jax.tree.map(lambda x: x[None], PARAMS))
    with pytest.raises(NotImplementedError, match="forward-only"):
        EKFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="forward-only")
    params = {"s": normal(2), "t": normal(2), "w": normal(3, 2)}
    with pytest.raises(NotImplementedError, match="forward-only"):
        KFAC(scale_and_shift, CE, params, (INPUTS, LABELS), fisher_type="forward-only")


@pytest.mark.sweep
def test_factorisations_of_many_sizes_end() -> None:
    # Two batched LAPACK calls at a time wait for each other for ever in jaxlib 0.10 on two cores.
    code = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp, ggn_jax
sizes = [60, 60, 120, 120, 250, 250, 30, 30, 10]
keys = jax.random.split(jax.random.key(0), len(sizes))
params = [jax.random.normal(k, s) / s[0] for k, s in zip(keys, zip(sizes[:-1], sizes[1:]))]
def model_fn(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x
batch = jnp.ones((16, 60)), jnp.zeros((16, 10))
kfac = ggn_jax.KFACLinearOperator(model_fn, ggn_jax.MSELoss(), params, batch, fisher_type="type-2")
for method in ("heuristic", "exact"):
    inverse = jax.jit(lambda kfac: kfac.inverse(1e-3, method))
    for _ in range(5):
        jax.block_until_ready([inverse(kfac) for _ in range(4)])
"""
    environment = os.environ | {"XLA_FLAGS": flags(1)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=180)


@pytest.mark.parametrize("make", [ggn_jax.KFACLinearOperator, ggn_jax.GGNDiagonalLinearOperator])
def test_coupled_examples_are_refused_also_where_outputs_hide_it(make: Any) -> None:
    """A branch with batch statistics that starts at 0 changes no output, but the gradients."""

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        hidden = x @ params["u"]
        hidden = (hidden - jnp.mean(hidden, 0, keepdims=True)) / jnp.sqrt(jnp.var(hidden, 0, keepdims=True) + 1e-5)
        return x @ params["w"] + hidden @ params["zero"]

    params = {"u": normal(3, 4), "w": normal(3, 2), "zero": jnp.zeros((4, 2))}
    with pytest.raises(ValueError, match="couples examples"):
        make(model_fn, ggn_jax.MSELoss(), params, (normal(6, 3), normal(6, 2)), **KEYS.get(make, {}))


KEYS: dict[Any, Any] = {ggn_jax.KFACLinearOperator: {"key": jax.random.key(0)}}


def test_nan_outputs_are_told_as_such() -> None:
    x = normal(6, 3).at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="are NaN for the first examples"):
        ggn_jax.KFACLinearOperator(
            lambda p, x: x @ p["w"], ggn_jax.MSELoss(), {"w": normal(3, 2)}, (x, normal(6, 2)), key=jax.random.key(0)
        )


@pytest.mark.parametrize("cls", [ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator])
def test_outputs_without_entries_have_no_curvature(cls: Any) -> None:
    params, batch = {"w": normal(5, 3)}, (normal(8, 5), jnp.zeros((8, 0)))
    operator = cls(lambda p, x: (x @ p["w"])[:, :0], ggn_jax.MSELoss(), params, batch, fisher_type="type-2")
    assert float(operator.trace()) == 0


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


@pytest.mark.parametrize("options", [{"sharing": "reduce"}, {"tied": "concatenate"}, {"mask": jnp.ones((6, 2), bool)}])
def test_kfoc_refuses_what_it_does_not_use(options: Any) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        ggn_jax.KFOCLinearOperator(
            lambda p, x: x @ p["w"],
            ggn_jax.MSELoss(),
            {"w": normal(3, 2)},
            (normal(6, 2, 3), normal(6, 2, 2)),
            fisher_type="empirical",
            **options,
        )
