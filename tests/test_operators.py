"""Curvature operators against dense matrices: the Jacobian from JAX, the loss's derivatives from torch's own losses."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from designs import covering
from jax.flatten_util import ravel_pytree
from problems import (
    CE,
    CE_SUM,
    DAMPING,
    FACTORIES,
    MLP_PARAMS,
    OPERATORS,
    PROBLEMS,
    N,
    Problem,
    StudentLoss,
    StudentLossWithFactor,
    X,
    assert_close,
    every_problem,
    flat,
    integers,
    mlp,
    normal,
)

import ggn_jax
from ggn_jax import EFLinearOperator, GGNDiagonalLinearOperator, GGNLinearOperator, HessianLinearOperator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a dependency, about torch.jit
    import curvlinops

# Exact matrices. -----------------------------------------------------------------------------------------------------


def names(value: Any) -> str | None:
    """For pytest: problems are called by their names."""
    return value.name if isinstance(value, Problem) else None


@covering(1, problem=PROBLEMS, chunk_size=[3, None], ids=names)  # the Hessian has the other chunk size
@pytest.mark.by_default("ce-sequence-[N,C,T]-3", "bce-dict-3", "mse-images-3", "poisson-None")
def test_ggn(problem: Problem, chunk_size: int | None) -> None:
    ggn = GGNLinearOperator(*problem.args, chunk_size=chunk_size)
    assert_close(ggn.as_matrix(), problem.ggn())
    assert jax.tree.structure(jax.eval_shape(ggn.mv, problem.vector)) == jax.tree.structure(problem.params)


@pytest.mark.parametrize("chunk_size", [1, N - 1, N, N + 2])
@pytest.mark.by_default("1", "5")
def test_other_chunk_sizes(chunk_size: int) -> None:
    """One; one less than, equal to and more than the batch."""
    for operator, want in (
        (GGNLinearOperator(*CE.args, chunk_size=chunk_size), CE.ggn()),
        (EFLinearOperator(*CE.args, chunk_size=chunk_size), CE.ef("term")),
    ):
        assert_close(flat(operator.mv(CE.vector)), want @ flat(CE.vector))


@every_problem
@pytest.mark.by_default("ce-options", "bce-dict", "mse-images")
def test_oracle_in_jax_agrees(problem: Problem) -> None:
    """The dense GGN from torch's loss is the one from `jax.hessian` of our loss."""
    hessian = jax.jit(jax.hessian(lambda f: problem.loss(f, problem.targets)))(problem.outputs())
    size = problem.outputs().size
    assert_close(problem.jacobian().T @ np.asarray(hessian).reshape(size, size) @ problem.jacobian(), problem.ggn())


@covering(1, problem=PROBLEMS, chunk_size=[None, 3], ids=names)
@pytest.mark.by_default("ce-sequence-[N,T,C]-3", "bce-weight-of-batch-3", "mse-scalar-3")
def test_hessian(problem: Problem, chunk_size: int | None) -> None:
    hessian = HessianLinearOperator(*problem.args, chunk_size=chunk_size)
    assert_close(hessian.as_matrix(), problem.hessian())


@covering(1, problem=PROBLEMS, chunk_size=[None, 3, 1], per=["term", "example"], ids=names)
@pytest.mark.by_default("ce-sequence-[N,C,T]-1-term", "bce-options-3-term", "mse-scalar-3-example")
def test_ef(problem: Problem, chunk_size: int | None, per: str) -> None:
    ef = EFLinearOperator(*problem.args, per=per, chunk_size=chunk_size)
    assert_close(ef.as_matrix(), problem.ef(per))


@pytest.mark.sweep
def test_ef_is_what_empirical_means_elsewhere() -> None:
    """An example with several terms, for which KFAC's block is exact: it has one sharing position."""

    def model_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return (x @ params).reshape(len(x), 3, 2)

    params, loss = normal("ef", 4, 6), ggn_jax.CrossEntropyLoss(class_axis=-1)
    x, y = normal("ef x", 1, 4), jnp.array([[0, 1, 1]])
    log_p = lambda params: jax.nn.log_softmax(model_fn(params, x)[0])[jnp.arange(3), y[0]]  # noqa: E731
    gradient = -flat(jax.jacobian(log_p)(params).sum(0))
    want = np.outer(gradient, gradient) / 3
    assert_close(EFLinearOperator(model_fn, loss, params, (x, y)).as_matrix(), want)
    kfac = ggn_jax.KFACLinearOperator(model_fn, loss, params, (x, y), fisher_type="empirical")
    assert_close(kfac.as_matrix(), want)


def test_ef_of_terms_and_of_data_differ() -> None:
    """Else the test above could not tell them apart."""
    assert sum(not np.allclose(problem.ef("term"), problem.ef("example")) for problem in PROBLEMS) >= 5


@covering(1, problem=PROBLEMS, chunks=[(None, 1), (3, 2), (N + 2, 100)], method=["layers", "data"], ids=names)
@pytest.mark.by_default(
    "ce-sequence-[N,T,C]-chunks19-data",
    "bce-options-chunks26-layers",
    "bce-dict-chunks52-layers",
    "poisson-chunks55-data",
)
def test_diagonal(problem: Problem, chunks: tuple[int | None, int], method: Any) -> None:
    options = dict(zip(("chunk_size", "vector_chunk_size"), chunks, strict=True))
    diagonal = GGNDiagonalLinearOperator(*problem.args, method=method, **options)
    assert jax.tree.structure(diagonal.entries) == jax.tree.structure(problem.params)
    assert_close(flat(diagonal.entries), np.diagonal(problem.ggn()))


def dropout(params: dict[str, jax.Array], inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    """A key of its own for each example."""
    x, keys = inputs
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, hidden.shape[1:]))(keys)
    return jnp.where(kept, 2 * hidden, 0) @ params["w2"]


def test_keys_in_the_inputs() -> None:
    inputs = X, jax.random.split(jax.random.key(1), N)
    problem = Problem("dropout", dropout, MLP_PARAMS, inputs, CE_SUM.loss, CE_SUM.targets, torch.nn.CrossEntropyLoss)
    assert_close(GGNLinearOperator(*problem.args, chunk_size=2).as_matrix(), problem.ggn())
    assert_close(HessianLinearOperator(*problem.args).as_matrix(), problem.hessian())
    assert_close(EFLinearOperator(*problem.args, chunk_size=2).as_matrix(), problem.ef("example"))
    for method in ("layers", "data"):
        diagonal = GGNDiagonalLinearOperator(*problem.args, chunk_size=2, method=method)
        assert_close(flat(diagonal.entries), np.diagonal(problem.ggn()))


@pytest.mark.sweep
def test_all_ignored_is_zero() -> None:
    """0/0 counts as 0."""
    loss = ggn_jax.CrossEntropyLoss(ignore_index=0)
    args = mlp, loss, MLP_PARAMS, (X, np.zeros(N, int))
    for operator in (
        GGNLinearOperator(*args),
        GGNLinearOperator(*args, chunk_size=2),
        GGNLinearOperator(*args, mc_samples=2, key=jax.random.key(0)),
        GGNDiagonalLinearOperator(*args),
        GGNDiagonalLinearOperator(*args, mc_samples=2, key=jax.random.key(0)),
        EFLinearOperator(*args),
        EFLinearOperator(*args, per="term", chunk_size=2),
        HessianLinearOperator(*args),
        HessianLinearOperator(*args, chunk_size=2),
    ):
        np.testing.assert_array_equal(flat(operator.mv(MLP_PARAMS)), 0)


def test_ggn_of_deep_linear_model_with_fixed_last_layer_is_hessian() -> None:
    """Linear in the parameters: no term with the model's second derivative."""
    fixed = normal("fixed", 4, 3)

    def model_fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return (x @ params["w"]) @ fixed + params["b"][None]

    params = {"w": normal("w", 3, 4), "b": normal("b", 3)}
    for loss, targets in ((ggn_jax.MSELoss(), normal("y", N, 3)), (ggn_jax.CrossEntropyLoss(), integers("y", 3, N))):
        args = model_fn, loss, params, (X, targets)
        assert_close(GGNLinearOperator(*args).as_matrix(), HessianLinearOperator(*args).as_matrix())


def test_ggn_of_deep_linear_net_that_fits_is_hessian() -> None:
    """A product of two layers with zero residual under MSE; away from the fit they differ."""

    def model_fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        return x @ params[0] @ params[1]

    params = [normal("w", 3, 2), normal("v", 2, 2)]
    fit = model_fn(params, X)
    at_fit = model_fn, ggn_jax.MSELoss(), params, (X, fit)
    assert_close(GGNLinearOperator(*at_fit).as_matrix(), HessianLinearOperator(*at_fit).as_matrix())
    away = model_fn, ggn_jax.MSELoss(), params, (X, fit + 1)
    assert not np.allclose(GGNLinearOperator(*away).as_matrix(), HessianLinearOperator(*away).as_matrix())
    assert_close(GGNLinearOperator(*away).as_matrix(), GGNLinearOperator(*at_fit).as_matrix())


# Against curvlinops. -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch
@covering(1, name=["mse", "ce", "bce"], reduction=["mean", "sum"])
@pytest.mark.by_default("ce-sum", "bce-mean")
def test_curvlinops(name: str, reduction: str) -> None:
    params = [normal("w1", 4, 3), normal("b1", 4), normal("w2", 3, 4), normal("b2", 3)]
    ours, torchs, targets = {
        "mse": (ggn_jax.MSELoss, torch.nn.MSELoss, np.array(normal("y", N, 3))),
        "ce": (ggn_jax.CrossEntropyLoss, torch.nn.CrossEntropyLoss, integers("y", 3, N)),
        "bce": (ggn_jax.BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss, integers("y", 2, N, 3) * 1.0),
    }[name]

    def model_fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        w1, b1, w2, b2 = params
        return jnp.tanh(x @ w1.T + b1[None]) @ w2.T + b2[None]

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    with torch.no_grad():
        for theirs, param in zip(net.parameters(), params, strict=True):
            theirs.copy_(torch.from_numpy(np.array(param)))
    data = [(torch.from_numpy(np.array(X)), torch.from_numpy(targets))]
    eye = torch.eye(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    args = model_fn, ours(reduction=reduction), params, (X, targets)
    for operator, cls in (
        (GGNLinearOperator(*args), curvlinops.GGNLinearOperator),
        (HessianLinearOperator(*args), curvlinops.HessianLinearOperator),
        (EFLinearOperator(*args), curvlinops.EFLinearOperator),
    ):
        want = cls(net, torchs(reduction=reduction), list(net.parameters()), data) @ eye
        assert_close(operator.as_matrix(), want.detach().numpy())


# Monte Carlo. --------------------------------------------------------------------------------------------------------


# A plain one, one with ignored tokens, and a weight for each example; `test_vectors.py` has the draws of all losses.
drawn_problems = pytest.mark.parametrize("problem", [CE, PROBLEMS[2], PROBLEMS[5]], ids=lambda problem: problem.name)


@drawn_problems
@pytest.mark.by_default("ce-options")
def test_monte_carlo_draws(problem: Problem) -> None:
    """The same for every chunk size and for the diagonal; a function of the key."""
    key = jax.random.key(0)
    matrix = GGNLinearOperator(*problem.args, mc_samples=2, key=key).as_matrix()
    for chunk_size in (1, 3) if problem is CE else (3,):
        chunked = GGNLinearOperator(*problem.args, mc_samples=2, key=key, chunk_size=chunk_size)
        assert_close(flat(chunked.mv(problem.vector)), matrix @ flat(problem.vector))
    for chunk_size, vector_chunk_size in ((None, 1), (3, 2)) if problem is CE else ((3, 2),):
        options = {"chunk_size": chunk_size, "vector_chunk_size": vector_chunk_size}
        diagonal = GGNDiagonalLinearOperator(*problem.args, mc_samples=2, key=key, **options)
        assert_close(flat(diagonal.entries), np.diagonal(matrix))
    again = GGNLinearOperator(*problem.args, mc_samples=2, key=jax.random.key(0)).as_matrix()
    np.testing.assert_array_equal(again, matrix)
    other = GGNLinearOperator(*problem.args, mc_samples=2, key=jax.random.key(1)).as_matrix()
    assert not np.allclose(other, matrix)


def assert_unbiased(samples: np.ndarray, want: np.ndarray) -> None:
    """The mean over axis 0 is `want` within 6 standard errors, which must be small enough to see a wrong factor."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert np.linalg.norm(error) < 0.15 * np.linalg.norm(want)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - want), 6 * error + 1e-9)


@drawn_problems
@pytest.mark.by_default("bce-weight-of-batch")
def test_monte_carlo_is_unbiased(problem: Problem) -> None:
    def matrix(key: jax.Array) -> jax.Array:
        return GGNLinearOperator(*problem.args, mc_samples=1, key=key).as_matrix()

    keys = jax.random.split(jax.random.key(7), 3000)
    assert_unbiased(np.asarray(jax.jit(jax.vmap(matrix))(keys)), problem.ggn())


@pytest.mark.parametrize("problem", [CE, PROBLEMS[6]], ids=lambda problem: problem.name)
@pytest.mark.by_default("ce-options")
def test_monte_carlo_diagonal_is_unbiased(problem: Problem) -> None:
    def entries(key: jax.Array) -> jax.Array:
        return ravel_pytree(GGNDiagonalLinearOperator(*problem.args, mc_samples=3, key=key).entries)[0]

    keys = jax.random.split(jax.random.key(8), 1000)
    assert_unbiased(np.asarray(jax.jit(jax.vmap(entries))(keys)), np.diagonal(problem.ggn()))


@pytest.mark.sweep
def test_monte_carlo_converges_with_samples() -> None:
    """Many samples of one key: the error falls as their square root."""
    errors = [
        np.linalg.norm(GGNLinearOperator(*CE.args, mc_samples=num, key=jax.random.key(2)).as_matrix() - CE.ggn())
        for num in (1, 100, 10_000)
    ]
    assert errors[2] < 0.03 * np.linalg.norm(CE.ggn())
    assert errors[2] < errors[1] / 3 < errors[0] / 9


@pytest.mark.sweep
def test_monte_carlo_of_a_loss_without_hessian() -> None:
    """Student-t: the estimate's mean is the Fisher, not the indefinite Hessian."""
    batch = (X, normal("y", N, 3))
    exact = GGNLinearOperator(mlp, StudentLossWithFactor(), MLP_PARAMS, batch).as_matrix()
    jacobian = CE.jacobian()
    assert_close(exact, 0.75 / (3 * N) * jacobian.T @ jacobian)
    many = GGNLinearOperator(mlp, StudentLoss(), MLP_PARAMS, batch, mc_samples=20_000, key=jax.random.key(0))
    assert np.linalg.norm(many.as_matrix() - exact) < 0.05 * np.linalg.norm(exact)


# Precision. ----------------------------------------------------------------------------------------------------------


@covering(1, name=["ggn", "mc", "ef", "hessian", "diagonal"], dtype=["float32", "bfloat16"])
@pytest.mark.by_default("mc-bfloat16")
def test_low_precision(name: str, dtype: str) -> None:
    params = jax.tree.map(lambda p: p.astype(dtype), MLP_PARAMS)
    vector = jax.tree.map(lambda p: p.astype(dtype), CE.vector)
    operator = FACTORIES[name](mlp, CE.loss, params, (X.astype(dtype), CE.targets), chunk_size=3).damped(DAMPING)
    product = operator.mv(vector)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(product))
    # Of the same problem, rounded as it was.
    wide = jax.tree.map(lambda p: p.astype("float64"), (params, X.astype(dtype), vector))
    reference = FACTORIES[name](mlp, CE.loss, wide[0], (wide[1], CE.targets)).damped(DAMPING).mv(wide[2])
    error = np.linalg.norm(flat(product) - flat(reference)) / np.linalg.norm(flat(reference))
    if not name.startswith("mc"):  # draws depend on the dtype
        assert error < {"float32": 1e-5, "bfloat16": 0.06}[dtype]
    assert np.isfinite(error)
    assert jax.eval_shape(operator.as_matrix).dtype == dtype


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.by_default("mc-diagonal", "hessian")
def test_mixed_dtypes(name: str) -> None:
    """A float32 leaf among float64 ones."""
    params = {**MLP_PARAMS, "w2": MLP_PARAMS["w2"].astype("float32")}
    wide = jax.tree.map(lambda p: p.astype("float64"), params)

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return mlp({**params, "w2": params["w2"].astype("float64")}, x)

    operator = FACTORIES[name](model_fn, CE.loss, params, (X, CE.targets), chunk_size=3)
    vector = jax.tree.map(lambda v, p: v.astype(p.dtype), CE.vector, params)
    reference = FACTORIES[name](mlp, CE.loss, wide, (X, CE.targets)).as_matrix()
    product = operator.mv(vector)
    assert jax.tree.map(lambda x: x.dtype, product) == jax.tree.map(lambda x: x.dtype, params)
    assert_close(flat(product), reference @ flat(vector), 1e-5)
    assert_close(operator.as_matrix(), reference, 1e-5)
    assert_close(flat(operator.damped(DAMPING).mv(vector)), flat(product) + DAMPING * flat(vector), 1e-6)


# Errors. -------------------------------------------------------------------------------------------------------------

every_operator = pytest.mark.parametrize("cls", OPERATORS, ids=lambda cls: cls.__name__)
MODEL, LOSS, PARAMS, (INPUTS, TARGETS) = CE_SUM.args
KEYS = jax.random.split(jax.random.key(0), N)


class SubclassedCrossEntropyLoss(ggn_jax.CrossEntropyLoss):
    pass


@every_operator
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (("mlp", LOSS, PARAMS, (INPUTS, TARGETS)), {}, TypeError, "model_fn must be a function .* got str"),
        ((MODEL, LOSS, {}, (INPUTS, TARGETS)), {}, ValueError, "params must hold at least one array"),
        (
            (MODEL, LOSS, {**PARAMS, "deep": [PARAMS, {"step": jnp.arange(3)}]}, (INPUTS, TARGETS)),
            {},
            TypeError,
            re.escape("params['deep'][1]['step'] must be a floating JAX array; got int"),
        ),
        ((MODEL, LOSS, {**PARAMS, "rate": 0.1}, (INPUTS, TARGETS)), {}, TypeError, r"params\['rate'\] .* got float"),
        ((MODEL, LOSS, {**PARAMS, "w1": np.ones((3, 4))}, (INPUTS, TARGETS)), {}, TypeError, r"\['w1'\] .* ndarray"),
        ((MODEL, LOSS, PARAMS, INPUTS), {}, TypeError, r"batch must be a pair \(inputs, targets\)"),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS, TARGETS)), {}, TypeError, "batch must be a pair .* tuple of length 3"),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS[:-1])), {}, ValueError, r"common leading batch axis.*\(5, 3\).*\(4,\)"),
        ((MODEL, LOSS, PARAMS, ([INPUTS, INPUTS[:2]], TARGETS)), {}, ValueError, "common leading batch axis"),
        ((MODEL, LOSS, PARAMS, (INPUTS[0, 0], TARGETS)), {}, ValueError, "common leading batch axis"),
        ((MODEL, LOSS, PARAMS, (INPUTS[:0], TARGETS[:0])), {}, ValueError, "at least one example"),
        (
            (MODEL, LOSS, PARAMS, ("text", TARGETS)),
            {},
            TypeError,
            "inputs must be a JAX or NumPy array, or a number; got str",
        ),
        (
            (MODEL, LOSS, PARAMS, ([X, "text"], TARGETS)),
            {},
            TypeError,
            r"inputs\[1\] must be a JAX or NumPy .* got str",
        ),
        ((MODEL, LOSS, PARAMS, (INPUTS, torch.zeros(N))), {}, TypeError, "targets must be .* got Tensor"),
        ((lambda p, x: {"logits": mlp(p, x)}, LOSS, PARAMS, (INPUTS, TARGETS)), {}, TypeError, "must return one array"),
        ((lambda p, x: mlp(p, x).T, LOSS, PARAMS, (INPUTS, TARGETS)), {}, ValueError, r"N = 5; got shape \(3, 5\)"),
        ((lambda p, x: jnp.sum(mlp(p, x)), LOSS, PARAMS, (INPUTS, TARGETS)), {}, ValueError, r"N = 5; got shape \(\)"),
        (
            (lambda p, x: mlp(p, x).astype(int), LOSS, PARAMS, (INPUTS, TARGETS)),
            {},
            TypeError,
            "outputs of model_fn must have one of the dtypes",
        ),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS), None), {}, TypeError, "positional"),
        ((MODEL, LOSS, {"w": KEYS}, (INPUTS, TARGETS)), {}, TypeError, r"params\['w'\] must be a floating JAX array"),
        ((MODEL, LOSS, PARAMS, (INPUTS, KEYS)), {}, TypeError, "targets must be an array of numbers; got a PRNG key"),
        (
            (MODEL, LOSS, PARAMS, ({"x": INPUTS, "key": KEYS[0]}, TARGETS)),
            {},
            ValueError,
            r"inputs\['key'\] \(\), inputs\['x'\] \(5, 3\), targets \(5,\)\. A key for each .*split\(key, N\)",
        ),
        (CE_SUM.args, {"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1; got 0"),
        (CE_SUM.args, {"chunk_size": -3}, ValueError, "chunk_size must be an integer of at least 1; got -3"),
        (CE_SUM.args, {"chunk_size": 2.0}, TypeError, "chunk_size must be an integer"),
        (CE_SUM.args, {"chunk_size": True}, TypeError, "chunk_size must be an integer"),
        ((MODEL, jnp.square, PARAMS, (INPUTS, TARGETS)), {}, NotImplementedError, "loss must be one of"),
        ((MODEL, torch.nn.MSELoss(), PARAMS, (INPUTS, TARGETS)), {}, NotImplementedError, "CrossEntropyLoss"),
        ((MODEL, SubclassedCrossEntropyLoss(), PARAMS, (INPUTS, TARGETS)), {}, NotImplementedError, "is a subclass of"),
        ((MODEL, LOSS, PARAMS, (INPUTS, np.full(N, 3))), {}, ValueError, "class indices from 0 to 2 .*got 3"),
        ((MODEL, ggn_jax.BCEWithLogitsLoss(), PARAMS, (INPUTS, 2 + INPUTS * 0)), {}, ValueError, "between 0 and 1"),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS[:, None])), {}, ValueError, r"targets must have shape \(5,\)"),
        ((MODEL, ggn_jax.MSELoss(), PARAMS, (INPUTS, TARGETS * 1.0)), {}, ValueError, "must have the outputs' shape"),
    ],
)
def test_refuses(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(*args, **kwargs)


@pytest.mark.parametrize("cls", [GGNLinearOperator, GGNDiagonalLinearOperator], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mc_samples": -1, "key": jax.random.key(0)}, ValueError, "mc_samples must be an integer of at least 1"),
        ({"mc_samples": 1.0, "key": jax.random.key(0)}, TypeError, "mc_samples must be an integer"),
        ({"mc_samples": True, "key": jax.random.key(0)}, TypeError, "mc_samples must be an integer"),
        ({"mc_samples": False}, TypeError, "mc_samples must be an integer"),
        ({"mc_samples": None, "key": jax.random.key(0)}, TypeError, "mc_samples must be an integer"),
        ({"mc_samples": 2}, ValueError, "needs a key"),
        ({"mc_samples": 2, "key": 0}, TypeError, "key must be a JAX PRNG key"),
        ({"mc_samples": 2, "key": jax.random.split(jax.random.key(0), N)}, ValueError, "key must be one key"),
    ],
)
def test_refuses_monte_carlo(cls: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(*CE.args, **kwargs)


@pytest.mark.parametrize("cls", [GGNLinearOperator, EFLinearOperator, HessianLinearOperator])
def test_chunks_need_independent_examples(cls: Any) -> None:
    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, x - jnp.mean(x, 0, keepdims=True))

    args = model_fn, LOSS, PARAMS, (INPUTS, TARGETS)
    with pytest.raises(ValueError, match="couples examples"):
        cls(*args, chunk_size=2)
    cls(*args), cls(*args, chunk_size=N)


def test_models_of_no_inputs() -> None:
    args = (lambda params, _: mlp(params, X)), LOSS, PARAMS, ((), TARGETS)
    assert_close(GGNLinearOperator(*args).as_matrix(), CE_SUM.ggn())
    for make in (GGNDiagonalLinearOperator, lambda *args: GGNLinearOperator(*args, chunk_size=2)):
        with pytest.raises(ValueError, match="inputs must hold an array"):
            make(*args)


@pytest.mark.parametrize("cls", [GGNLinearOperator, GGNDiagonalLinearOperator], ids=lambda cls: cls.__name__)
@pytest.mark.by_default("GGNDiagonalLinearOperator")
def test_loss_without_exact_factor(cls: Any) -> None:
    args = mlp, StudentLoss(), MLP_PARAMS, (X, normal("y", N, 3))
    with pytest.raises(NotImplementedError, match="StudentLoss declares curvature='fisher' and has no exact factor"):
        cls(*args)
    operator = cls(*args, mc_samples=2, key=jax.random.key(0), chunk_size=2)
    assert np.linalg.norm(flat(operator.mv(MLP_PARAMS))) > 0


@pytest.mark.parametrize("cls", [EFLinearOperator, HessianLinearOperator], ids=lambda cls: cls.__name__)
def test_ef_and_hessian_need_no_factor(cls: Any) -> None:
    args = mlp, StudentLoss(), MLP_PARAMS, (X, normal("y", N, 3))
    assert np.linalg.norm(flat(cls(*args).mv(MLP_PARAMS))) > 0


def test_refuses_other_arguments() -> None:
    with pytest.raises(ValueError, match="per must be 'term' or 'example'"):
        EFLinearOperator(*CE.args, per="token")
    with pytest.raises(ValueError, match="method must be 'layers' or 'data'"):
        GGNDiagonalLinearOperator(*CE.args, method="fast")
    for value, error in ((0, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match="vector_chunk_size must be an integer of at least 1"):
            GGNDiagonalLinearOperator(*CE.args, vector_chunk_size=value)


@every_operator
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["w1"], "vector must be a pytree like the parameters"),
        (lambda v: {**v, "w3": v["w1"]}, "vector must be a pytree like the parameters"),
        (lambda v: {**v, "w1": v["w1"].T}, r"vector\['w1'\] must have shape \(3, 4\) and dtype float64.* got \(4, 3\)"),
        (lambda v: {**v, "b1": v["b1"].astype("float32")}, r"vector\['b1'\] .*dtype float64.* float32"),
        (lambda v: {**v, "b1": v["b1"].astype("int32")}, r"vector\['b1'\] .*dtype float64.* int32"),
    ],
)
@pytest.mark.parametrize("damped", [False, True])
def test_refuses_vectors(cls: Any, damped: bool, change: Callable[[Any], Any], message: str) -> None:
    operator = cls(*CE.args)
    with pytest.raises(ValueError, match=message):
        (operator.damped(DAMPING) if damped else operator).mv(change(CE.vector))
