"""Curvature operators against dense matrices: the Jacobian from JAX, the loss's derivatives from torch's own losses."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from designs import covering
from problems import (
    CE,
    CE_SUM,
    DAMPING,
    FACTORIES,
    MLP_PARAMS,
    PROBLEMS,
    N,
    Problem,
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
@pytest.mark.by_default("ce-sequence-[N,C,T]-3", "bce-dict-3", "poisson-None")
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
@pytest.mark.by_default("ce-sequence-[N,T,C]-3", "bce-weight-of-batch-3")
def test_hessian(problem: Problem, chunk_size: int | None) -> None:
    hessian = HessianLinearOperator(*problem.args, chunk_size=chunk_size)
    assert_close(hessian.as_matrix(), problem.hessian())


@covering(1, problem=PROBLEMS, chunk_size=[None, 3, 1], per=["term", "example"], ids=names)
@pytest.mark.by_default("ce-sequence-[N,C,T]-1-term", "mse-scalar-3-example")
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
@pytest.mark.by_default("ce-sum")
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
@pytest.mark.by_default("hessian")
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
