"""Curvature operators against dense matrices: the Jacobian from JAX, the loss's derivatives from torch's own losses."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import torch
from jax.flatten_util import ravel_pytree
from matfree import decomp, eig, funm, stochtrace

import ggn_jax
from ggn_jax import (
    DampedLinearOperator,
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    LikelihoodLoss,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a dependency, about torch.jit
    import curvlinops

N = 5


def assert_close(got: Any, want: Any, tol: float = 1e-11) -> None:
    """To `tol` of the largest entry wanted."""
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=tol, atol=tol * max(np.abs(want).max(), 1e-3))


def normal(name: str, *shape: int) -> jax.Array:
    """Normal numbers, the same for each name."""
    return jnp.asarray(np.random.default_rng(list(name.encode())).normal(size=shape))


def integers(name: str, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).integers(high, size=shape)


def flat(tree: Any) -> np.ndarray:
    """A pytree as one vector, in the order of the operators' matrices; leaves may have several dtypes."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


# The registry of problems. -------------------------------------------------------------------------------------------


class PoissonLoss(LikelihoodLoss):
    """A user's loss: counts; the output is the log-rate."""

    curvature = "hessian"

    def nll(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(f) - y * f

    def sample(self, key: jax.Array, f: jax.Array) -> jax.Array:
        return jax.random.poisson(key, jnp.exp(f)).astype(f.dtype)


class StudentLoss(LikelihoodLoss):
    """A user's loss whose Hessian may be indefinite and that gives no factor of its Fisher matrix."""

    curvature = "fisher"

    def nll(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return 3 * jnp.log1p((y - f) ** 2 / 5)

    def sample(self, key: jax.Array, f: jax.Array) -> jax.Array:
        return f + jax.random.t(key, 5.0, f.shape, f.dtype)


class StudentLossWithFactor(StudentLoss):
    def fisher_sqrt(self, f: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.full_like(f, 0.75))  # (nu + 1) / (nu + 3)


@dataclass(frozen=True, eq=False)
class Problem:
    """A model with parameters, a batch, a loss, and torch's way to write that loss."""

    name: str
    model_fn: Callable[[Any, Any], jax.Array]
    params: Any
    inputs: Any
    loss: ggn_jax.Loss
    targets: Any
    torch_loss: Callable[..., torch.nn.Module]
    to_torch: Callable[[torch.Tensor], torch.Tensor] = lambda outputs: outputs
    targets_to_torch: Callable[[torch.Tensor], torch.Tensor] = lambda targets: targets

    @property
    def args(self) -> tuple[Any, ...]:
        return self.model_fn, self.loss, self.params, (self.inputs, self.targets)

    @property
    def vector(self) -> Any:
        """A direction in parameter space."""
        return jax.tree.map(lambda x: normal(f"vector {x.shape}", *x.shape), self.params)

    # Dense oracles, in float64; rows of J are outputs in C order.

    @cache  # noqa: B019 (a handful of module-level constants)
    def outputs(self) -> np.ndarray:
        return np.asarray(self.model_fn(self.params, self.inputs))

    @cache  # noqa: B019
    def jacobian(self) -> np.ndarray:
        theta, unravel = ravel_pytree(self.params)
        jacobian = jax.jacobian(lambda theta: self.model_fn(unravel(theta), self.inputs))(theta)
        return np.asarray(jacobian).reshape(-1, theta.size)

    def torch_value(self, outputs: torch.Tensor, reduction: str) -> torch.Tensor:
        """Torch's loss; with reduction "none", of each term."""
        targets = self.targets_to_torch(torch.from_numpy(np.array(self.targets)))
        return self.torch_loss(reduction=reduction)(self.to_torch(outputs), targets)

    @cache  # noqa: B019
    def ggn(self) -> np.ndarray:
        f = torch.from_numpy(self.outputs().copy())
        value = lambda f: self.torch_value(f, self.loss.reduction)  # noqa: E731
        hessian = torch.autograd.functional.hessian(value, f).numpy().reshape(f.numel(), f.numel())
        return self.jacobian().T @ hessian @ self.jacobian()

    @cache  # noqa: B019
    def hessian(self) -> np.ndarray:
        theta, unravel = ravel_pytree(self.params)
        value = lambda theta: self.loss(self.model_fn(unravel(theta), self.inputs), self.targets)  # noqa: E731
        return np.asarray(jax.hessian(value)(theta))

    @cache  # noqa: B019
    def ef(self, per: str) -> np.ndarray:
        """`r sum_t g_t g_t^T` with one backward pass of torch per term, or the sum over each datum of terms."""
        f = torch.from_numpy(self.outputs().copy())

        def terms(f: torch.Tensor) -> torch.Tensor:
            values = self.torch_value(f, "none").reshape(N, -1)
            return values.reshape(-1) if per == "term" else values.sum(1)

        r = self.torch_value(f, self.loss.reduction) / terms(f).sum()
        gradients = torch.autograd.functional.jacobian(terms, f).numpy().reshape(-1, f.numel()) @ self.jacobian()
        return r.item() * gradients.T @ gradients


def mlp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(jnp.einsum("nd,dh->nh", x, params["w1"]) + params["b1"][None])
    return jnp.einsum("nh,hc->nc", hidden, params["w2"])


MLP_PARAMS = {"w1": normal("w1", 3, 4), "b1": normal("b1", 4), "w2": normal("w2", 4, 3)}
X = normal("x", N, 3)


def sequence(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """`[N, T, D]` to `[N, T, C]`; each step sees the steps before it."""
    hidden = jnp.cumsum(jnp.tanh(jnp.einsum("ntd,dh->nth", x, params[0])), axis=1)
    return jnp.einsum("nth,hc->ntc", hidden, params[1])


SEQUENCE_PARAMS = [normal("s1", 2, 3), normal("s2", 3, 4)]
SEQUENCE_X = normal("sx", N, 3, 2)


def ce_weighted_ignoring_smooth() -> Problem:
    options = {"ignore_index": 1, "label_smoothing": 0.2}
    weight = np.array([0.3, 1.7, 0.9])
    torch_loss = lambda reduction: torch.nn.CrossEntropyLoss(torch.from_numpy(weight), reduction=reduction, **options)  # noqa: E731
    targets = np.array([0, 1, 2, 2, 0])
    return Problem("ce-options", mlp, MLP_PARAMS, X, ggn_jax.CrossEntropyLoss(weight, **options), targets, torch_loss)


def ce_plain_sum() -> Problem:
    loss = ggn_jax.CrossEntropyLoss(reduction="sum")
    return Problem("ce-sum", mlp, MLP_PARAMS, X, loss, integers("y", 3, N), torch.nn.CrossEntropyLoss)


def ce_sequence_classes_first() -> Problem:
    """Some tokens are ignored, and one datum wholly."""
    targets = integers("tokens", 4, N, 3)
    targets[0, 1], targets[3] = -1, -1
    model_fn = lambda params, x: jnp.moveaxis(sequence(params, x), -1, 1)  # noqa: E731
    weight = np.array([0.5, 1.0, 2.0, 0.7])
    torch_loss = lambda reduction: torch.nn.CrossEntropyLoss(  # noqa: E731
        torch.from_numpy(weight), ignore_index=-1, reduction=reduction
    )
    loss = ggn_jax.CrossEntropyLoss(weight, ignore_index=-1)
    return Problem("ce-sequence-[N,C,T]", model_fn, SEQUENCE_PARAMS, SEQUENCE_X, loss, targets, torch_loss)


def ce_sequence_classes_last() -> Problem:
    """Class probabilities, in the outputs' layout."""
    targets = np.random.default_rng(0).dirichlet(np.ones(4), size=(N, 3))
    last = lambda tensor: tensor.movedim(-1, 1)  # noqa: E731
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1)
    args = "ce-sequence-[N,T,C]", sequence, SEQUENCE_PARAMS, SEQUENCE_X, loss, targets, torch.nn.CrossEntropyLoss
    return Problem(*args, to_torch=last, targets_to_torch=last)


def bce_weights() -> Problem:
    weight, pos_weight = np.array([0.0, 1.5, 0.8]), np.array([2.0, 0.4, 3.0])
    torch_loss = lambda reduction: torch.nn.BCEWithLogitsLoss(  # noqa: E731
        torch.from_numpy(weight), pos_weight=torch.from_numpy(pos_weight), reduction=reduction
    )
    loss = ggn_jax.BCEWithLogitsLoss(weight, pos_weight=pos_weight)
    targets = np.random.default_rng(0).uniform(size=(N, 3))
    return Problem("bce-options", mlp, MLP_PARAMS, X, loss, targets, torch_loss)


def bce_weight_of_batch() -> Problem:
    """A weight of each datum: chunks must take their share of it."""
    weight = np.linspace(0, 2, N)[:, None]
    torch_loss = lambda reduction: torch.nn.BCEWithLogitsLoss(torch.from_numpy(weight), reduction=reduction)  # noqa: E731
    loss = ggn_jax.BCEWithLogitsLoss(weight, reduction="sum")
    return Problem("bce-weight-of-batch", mlp, MLP_PARAMS, X, loss, integers("b", 2, N, 3) * 1.0, torch_loss)


def mse_images() -> Problem:
    def model_fn(kernel: jax.Array, x: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims))

    args = model_fn, normal("kernel", 2, 2, 1, 2), normal("image", N, 3, 2, 1)
    return Problem("mse-images", *args, ggn_jax.MSELoss(), normal("target", N, 3, 2, 2), torch.nn.MSELoss)


def mse_scalar() -> Problem:
    model_fn = lambda params, x: mlp(params, x)[:, 0]  # noqa: E731
    loss = ggn_jax.MSELoss(reduction="sum")
    return Problem("mse-scalar", model_fn, MLP_PARAMS, X, loss, normal("y", N), torch.nn.MSELoss)


def bce_dict_inputs() -> Problem:
    """Inputs and parameters are nested, and the output is a scalar."""

    def model_fn(params: Any, inputs: dict[str, Any]) -> jax.Array:
        left = jnp.tanh(jnp.einsum("nd,d->n", inputs["a"], params["left"]["w"]))
        return left * (inputs["b"][0] @ params["right"][0]) + params["right"][1]

    params = {"left": {"w": normal("left", 3)}, "right": (normal("right", 2), normal("bias"))}
    inputs = {"a": X, "b": (normal("b", N, 2),)}
    loss = ggn_jax.BCEWithLogitsLoss()
    return Problem("bce-dict", model_fn, params, inputs, loss, np.arange(N) % 2 * 1.0, torch.nn.BCEWithLogitsLoss)


def users_poisson() -> Problem:
    torch_loss = lambda reduction: torch.nn.PoissonNLLLoss(log_input=True, reduction=reduction)  # noqa: E731
    counts = integers("counts", 4, N, 3) * 1.0
    return Problem("poisson", mlp, MLP_PARAMS, X, PoissonLoss(), counts, torch_loss)


PROBLEMS = [
    ce_weighted_ignoring_smooth(),
    ce_plain_sum(),
    ce_sequence_classes_first(),
    ce_sequence_classes_last(),
    bce_weights(),
    bce_weight_of_batch(),
    mse_images(),
    mse_scalar(),
    bce_dict_inputs(),
    users_poisson(),
]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
CE, CE_SUM = PROBLEMS[:2]
MSE_ARGS = (mlp, ggn_jax.MSELoss(), MLP_PARAMS, (X, normal("y", N, 3)))

FACTORIES: dict[str, Any] = {
    "ggn": GGNLinearOperator,
    "mc": lambda *args, **kwargs: GGNLinearOperator(*args, mc_samples=2, key=jax.random.key(0), **kwargs),
    "ef": EFLinearOperator,
    "hessian": HessianLinearOperator,
    "diagonal": GGNDiagonalLinearOperator,
    "mc-diagonal": lambda *args, **kwargs: GGNDiagonalLinearOperator(
        *args, mc_samples=2, key=jax.random.key(0), **kwargs
    ),
}


# Exact matrices. -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@every_problem
def test_ggn(problem: Problem, chunk_size: int | None) -> None:
    ggn = GGNLinearOperator(*problem.args, chunk_size=chunk_size)
    if chunk_size != 3:
        assert_close(ggn.as_matrix(), problem.ggn())
        return
    product = ggn.mv(problem.vector)
    assert jax.tree.structure(product) == jax.tree.structure(problem.params)
    assert_close(flat(product), problem.ggn() @ flat(problem.vector))


@pytest.mark.parametrize("chunk_size", [N - 1, N, N + 2])
def test_other_chunk_sizes(chunk_size: int) -> None:
    """One less than, equal to and more than the batch."""
    for operator, want in (
        (GGNLinearOperator(*CE.args, chunk_size=chunk_size), CE.ggn()),
        (EFLinearOperator(*CE.args, chunk_size=chunk_size), CE.ef("term")),
    ):
        assert_close(flat(operator.mv(CE.vector)), want @ flat(CE.vector))


@every_problem
def test_oracle_in_jax_agrees(problem: Problem) -> None:
    """The dense GGN from torch's loss is the one from `jax.hessian` of our loss."""
    hessian = jax.hessian(lambda f: problem.loss(f, problem.targets))(problem.outputs())
    size = problem.outputs().size
    assert_close(problem.jacobian().T @ np.asarray(hessian).reshape(size, size) @ problem.jacobian(), problem.ggn())


@pytest.mark.parametrize("chunk_size", [None, 3])
@every_problem
def test_hessian(problem: Problem, chunk_size: int | None) -> None:
    hessian = HessianLinearOperator(*problem.args, chunk_size=chunk_size)
    assert_close(hessian.as_matrix(), problem.hessian())


@pytest.mark.parametrize(("per", "chunk_size"), [("term", None), ("term", 3), ("datum", 1)])
@every_problem
def test_ef(problem: Problem, chunk_size: int | None, per: str) -> None:
    ef = EFLinearOperator(*problem.args, per=per, chunk_size=chunk_size)
    assert_close(ef.as_matrix(), problem.ef(per))


def test_ef_of_terms_and_of_data_differ() -> None:
    """Else the test above could not tell them apart."""
    assert sum(not np.allclose(problem.ef("term"), problem.ef("datum")) for problem in PROBLEMS) >= 5


@pytest.mark.parametrize(("chunk_size", "vector_chunk_size"), [(None, 1), (3, 2), (N + 2, 100)])
@pytest.mark.parametrize("method", ["layers", "data"])
@every_problem
def test_diagonal(problem: Problem, chunk_size: int | None, vector_chunk_size: int, method: Any) -> None:
    options = {"chunk_size": chunk_size, "vector_chunk_size": vector_chunk_size}
    diagonal = GGNDiagonalLinearOperator(*problem.args, method=method, **options)
    assert jax.tree.structure(diagonal.entries) == jax.tree.structure(problem.params)
    assert_close(flat(diagonal.entries), np.diagonal(problem.ggn()))


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
        EFLinearOperator(*args, per="datum", chunk_size=2),
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
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["mse", "ce", "bce"])
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
        (EFLinearOperator(*args, per="datum"), curvlinops.EFLinearOperator),
    ):
        want = cls(net, torchs(reduction=reduction), list(net.parameters()), data) @ eye
        assert_close(operator.as_matrix(), want.detach().numpy())


# Monte Carlo. --------------------------------------------------------------------------------------------------------


@every_problem
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


@every_problem
def test_monte_carlo_is_unbiased(problem: Problem) -> None:
    def matrix(key: jax.Array) -> jax.Array:
        return GGNLinearOperator(*problem.args, mc_samples=1, key=key).as_matrix()

    keys = jax.random.split(jax.random.key(7), 3000)
    assert_unbiased(np.asarray(jax.jit(jax.vmap(matrix))(keys)), problem.ggn())


@pytest.mark.parametrize("problem", [CE, PROBLEMS[6]], ids=lambda problem: problem.name)
def test_monte_carlo_diagonal_is_unbiased(problem: Problem) -> None:
    def entries(key: jax.Array) -> jax.Array:
        return ravel_pytree(GGNDiagonalLinearOperator(*problem.args, mc_samples=3, key=key).entries)[0]

    keys = jax.random.split(jax.random.key(8), 1000)
    assert_unbiased(np.asarray(jax.jit(jax.vmap(entries))(keys)), np.diagonal(problem.ggn()))


def test_monte_carlo_converges_with_samples() -> None:
    """Many samples of one key: the error falls as their square root."""
    errors = [
        np.linalg.norm(GGNLinearOperator(*CE.args, mc_samples=num, key=jax.random.key(2)).as_matrix() - CE.ggn())
        for num in (1, 100, 10_000)
    ]
    assert errors[2] < 0.03 * np.linalg.norm(CE.ggn())
    assert errors[2] < errors[1] / 3 < errors[0] / 9


def test_monte_carlo_of_a_loss_without_hessian() -> None:
    """Student-t: the estimate's mean is the Fisher, not the indefinite Hessian."""
    batch = (X, normal("y", N, 3))
    exact = GGNLinearOperator(mlp, StudentLossWithFactor(), MLP_PARAMS, batch).as_matrix()
    jacobian = CE.jacobian()
    assert_close(exact, 0.75 / (3 * N) * jacobian.T @ jacobian)
    many = GGNLinearOperator(mlp, StudentLoss(), MLP_PARAMS, batch, mc_samples=20_000, key=jax.random.key(0))
    assert np.linalg.norm(many.as_matrix() - exact) < 0.05 * np.linalg.norm(exact)


# As lineax operators. ------------------------------------------------------------------------------------------------

DAMPING = 0.3


def dense_solve(matrix: np.ndarray, vector: Any, damping: float = DAMPING) -> np.ndarray:
    return np.linalg.solve(matrix + damping * np.eye(len(matrix)), flat(vector))


@pytest.mark.parametrize(
    "solver",
    [
        lx.CG(rtol=1e-10, atol=1e-10),
        lx.GMRES(rtol=1e-10, atol=1e-10, restart=40),
        lx.LSMR(rtol=1e-10, atol=1e-10),
        lx.Cholesky(),
        lx.LU(),
        lx.AutoLinearSolver(well_posed=True),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("cls", [GGNLinearOperator, EFLinearOperator])
def test_solve(cls: Any, solver: lx.AbstractLinearSolver) -> None:
    operator = cls(*CE.args).damped(DAMPING)
    solution = lx.linear_solve(operator, CE.vector, solver).value
    assert jax.tree.structure(solution) == jax.tree.structure(CE.params)
    want = dense_solve(CE.ggn() if cls is GGNLinearOperator else CE.ef("term"), CE.vector)
    assert_close(flat(solution), want, 1e-6)


@pytest.mark.parametrize(
    "solver",
    [lx.GMRES(rtol=1e-10, atol=1e-10, restart=40), lx.LSMR(rtol=1e-10, atol=1e-10), lx.LU()],
    ids=lambda solver: type(solver).__name__,
)
def test_solve_with_hessian(solver: lx.AbstractLinearSolver) -> None:
    solution = lx.linear_solve(HessianLinearOperator(*CE.args).damped(DAMPING), CE.vector, solver).value
    assert_close(flat(solution), dense_solve(CE.hessian(), CE.vector), 1e-6)


def test_cg_refuses_the_hessian() -> None:
    with pytest.raises(ValueError, match="positive"):
        lx.linear_solve(HessianLinearOperator(*CE.args).damped(DAMPING), CE.vector, lx.CG(rtol=1e-6, atol=1e-6))


def test_preconditioned_cg() -> None:
    """Badly scaled inputs: the diagonal saves steps, and both give the solution."""
    x = normal("many", 60, 12) * jnp.logspace(-1.0, 1.0, 12)[None]
    params, v = normal("linear", 12), normal("right-hand side", 12)
    args = (lambda params, x: x @ params), ggn_jax.MSELoss(), params, (x, normal("y", 60))
    ggn, damping = GGNLinearOperator(*args).damped(1e-3), 1e-3
    want = dense_solve(2 / 60 * np.asarray(x).T @ np.asarray(x), v, damping)
    solver = lx.CG(rtol=1e-9, atol=1e-9, max_steps=500)
    plain = lx.linear_solve(ggn, v, solver)
    options = {"preconditioner": GGNDiagonalLinearOperator(*args).damped(damping).inverse()}
    preconditioned = lx.linear_solve(ggn, v, solver, options=options)
    assert_close(plain.value, want, 1e-5)
    assert_close(preconditioned.value, want, 1e-5)
    assert preconditioned.stats["num_steps"] < plain.stats["num_steps"]


def test_diagonal_operator() -> None:
    diagonal = GGNDiagonalLinearOperator(*CE.args)
    want = np.diagonal(CE.ggn())
    assert_close(diagonal.as_matrix(), np.diag(want))
    assert_close(flat(diagonal.mv(CE.vector)), want * flat(CE.vector))
    assert_close(lx.diagonal(diagonal), want)
    damped = diagonal.damped(DAMPING)
    assert isinstance(damped, GGNDiagonalLinearOperator)
    assert_close(lx.diagonal(damped), want + DAMPING)
    inverse = damped.inverse()
    assert lx.is_positive_semidefinite(inverse)
    assert lx.is_diagonal(inverse)
    assert_close(flat(inverse.mv(CE.vector)), flat(CE.vector) / (want + DAMPING))
    solution = lx.linear_solve(damped, CE.vector, lx.AutoLinearSolver(well_posed=True)).value
    assert_close(flat(solution), flat(CE.vector) / (want + DAMPING))


def test_algebra() -> None:
    ggn, ef, v = GGNLinearOperator(*CE.args), EFLinearOperator(*CE.args), CE.vector
    a, b = CE.ggn(), CE.ef("term")
    for operator, want in (
        (ggn.T, a),
        (ggn + ef, a + b),
        (ggn - ef, a - b),
        (2.0 * ggn, 2 * a),
        (ggn / 2.0, a / 2),
        (-ggn, -a),
        (ggn @ ef, a @ b),
        ((ggn @ ef).T, b @ a),
        (ggn.damped(DAMPING), a + DAMPING * np.eye(len(a))),
        (ggn.damped(DAMPING).T, a + DAMPING * np.eye(len(a))),
        (ggn.damped(DAMPING) @ ggn, a @ a + DAMPING * a),
    ):
        assert_close(operator.as_matrix(), want)
        assert_close(flat(operator.mv(v)), want @ flat(v))
    assert ggn.T is ggn
    assert ggn.in_size() == ggn.out_size() == len(a)
    assert ggn.in_structure() == ggn.out_structure() == jax.eval_shape(lambda: CE.params)


def test_tags() -> None:
    ggn, ef, hessian = GGNLinearOperator(*CE.args), EFLinearOperator(*CE.args), HessianLinearOperator(*CE.args)
    diagonal = GGNDiagonalLinearOperator(*CE.args)
    for operator in (ggn, ef, diagonal):
        assert lx.is_positive_semidefinite(operator)
        assert lx.is_positive_semidefinite(operator.damped(DAMPING))
        assert lx.is_positive_semidefinite(lx.linearise(operator.damped(DAMPING)))
        assert lx.is_positive_semidefinite(lx.materialise(operator.damped(DAMPING)))
    assert lx.is_positive_semidefinite(ggn + ef)
    assert not lx.is_positive_semidefinite(hessian)
    assert not lx.is_positive_semidefinite(hessian.damped(DAMPING))
    assert not lx.is_positive_semidefinite(lx.materialise(hessian))
    for operator in (ggn, ef, hessian, diagonal, hessian.damped(DAMPING)):
        assert lx.is_symmetric(operator)
        assert lx.is_symmetric(lx.materialise(operator))
        assert not lx.is_negative_semidefinite(operator)
        assert not lx.has_unit_diagonal(operator)
        assert lx.is_diagonal(operator) == (operator is diagonal)


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [("ggn", None), ("ef", 3), ("diagonal", None)],
)
def test_other_forms_of_the_same_operator(name: str, chunk_size: int | None) -> None:
    """Linearised, materialised, through `jit`: the same matrix; also with damping."""
    problem = PROBLEMS[2]
    operator = FACTORIES[name](*problem.args, chunk_size=chunk_size)
    matrix, v = np.asarray(operator.as_matrix()), flat(problem.vector)
    assert_close(lx.linearise(operator).as_matrix(), matrix)
    assert_close(flat(lx.conj(operator).mv(problem.vector)), matrix @ v)
    damped, want = operator.damped(DAMPING), matrix + DAMPING * np.eye(len(matrix))
    assert_close(lx.diagonal(damped), np.diagonal(want))
    assert_close(flat(lx.linearise(damped).mv(problem.vector)), want @ v)
    assert_close(lx.materialise(damped).as_matrix(), want)
    assert_close(flat(jax.jit(lambda operator, v: lx.linearise(operator).mv(v))(damped, problem.vector)), want @ v)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_matrix_of_linearised_damped_operator(chunk_size: int | None) -> None:
    linearised = lx.linearise(GGNLinearOperator(*CE.args, chunk_size=chunk_size).damped(DAMPING))
    assert_close(linearised.as_matrix(), CE.ggn() + DAMPING * np.eye(len(CE.ggn())))


def test_as_an_argument_of_jit() -> None:
    @jax.jit
    def product(operator: lx.AbstractLinearOperator, v: Any) -> Any:
        return operator.mv(v)

    for cls in (GGNLinearOperator, EFLinearOperator, GGNDiagonalLinearOperator):
        operator = cls(*CE.args)
        for form in (operator, operator.damped(DAMPING)):
            assert_close(flat(product(form, CE.vector)), flat(form.mv(CE.vector)))


def test_linearised_operator_solves() -> None:
    operator = lx.linearise(GGNLinearOperator(*CE.args).damped(DAMPING))
    solution = lx.linear_solve(operator, CE.vector, lx.CG(rtol=1e-10, atol=1e-10)).value
    assert_close(flat(solution), dense_solve(CE.ggn(), CE.vector), 1e-6)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), np.ones(1), jnp.zeros((2, 2))], ids=str)
def test_damping_must_be_a_number(damping: Any) -> None:
    for operator in (GGNLinearOperator(*CE.args), GGNDiagonalLinearOperator(*CE.args), HessianLinearOperator(*CE.args)):
        with pytest.raises(ValueError, match="damping must"):
            operator.damped(damping)


@pytest.mark.parametrize("damping", [0, 1, 0.5, np.float32(0.5), np.array(0.5), jnp.asarray(2)], ids=repr)
def test_numbers_for_damping(damping: Any) -> None:
    matrix = CE.ggn() + float(damping) * np.eye(len(CE.ggn()))
    damped = GGNLinearOperator(*CE.args).damped(damping)
    assert isinstance(damped, DampedLinearOperator)
    assert_close(flat(damped.mv(CE.vector)), matrix @ flat(CE.vector))
    assert_close(flat(GGNDiagonalLinearOperator(*CE.args).damped(damping).entries), np.diagonal(matrix))


def test_constructed_under_jit_with_traced_targets() -> None:
    @jax.jit
    def solve(params: Any, x: jax.Array, targets: jax.Array, damping: jax.Array, v: Any) -> Any:
        ggn = GGNLinearOperator(CE.model_fn, CE.loss, params, (x, targets))
        diagonal = GGNDiagonalLinearOperator(CE.model_fn, CE.loss, params, (x, targets))
        options = {"preconditioner": diagonal.damped(damping).inverse()}
        return lx.linear_solve(ggn.damped(damping), v, lx.CG(rtol=1e-10, atol=1e-10), options=options).value

    solution = solve(CE.params, CE.inputs, CE.targets, DAMPING, CE.vector)
    assert_close(flat(solution), dense_solve(CE.ggn(), CE.vector), 1e-6)


def test_constructed_under_jit_with_constant_targets() -> None:
    """Targets from outside of the `jit`, JAX's or NumPy's, are constants in it."""
    want = CE.ggn() @ flat(CE.vector)
    for targets in (np.asarray(CE.targets), jnp.asarray(CE.targets)):
        batch = CE.inputs, targets
        product = jax.jit(lambda params, batch=batch: GGNLinearOperator(mlp, CE.loss, params, batch).mv(CE.vector))
        assert_close(flat(product(CE.params)), want)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    "solver", [lx.CG(rtol=1e-10, atol=1e-10), lx.Cholesky()], ids=lambda solver: type(solver).__name__
)
@pytest.mark.parametrize("cls", [GGNLinearOperator, EFLinearOperator])
def test_model_closes_over_traced_values(cls: Any, solver: Any, chunk_size: int | None) -> None:
    """Parameters that are not differentiated, batch statistics and the like, made in the same `jit`."""

    @jax.jit
    def solve(scale: jax.Array, v: Any) -> Any:
        scale = jnp.exp(scale)
        model_fn = lambda params, x: mlp(params, x) * scale[None]  # noqa: E731
        operator = cls(model_fn, CE.loss, CE.params, (CE.inputs, CE.targets), chunk_size=chunk_size)
        return lx.linear_solve(operator.damped(DAMPING), v, solver).value

    scale = jnp.array([0.1, -0.2, 0.3])
    model_fn = lambda params, x: mlp(params, x) * jnp.exp(scale)[None]  # noqa: E731
    matrix = cls(model_fn, CE.loss, CE.params, (CE.inputs, CE.targets)).as_matrix()
    assert_close(flat(solve(scale, CE.vector)), dense_solve(np.asarray(matrix), CE.vector), 1e-6)


def test_closed_over_values_may_differ_by_batch_element_of_a_vmap() -> None:
    def product(scale: jax.Array) -> Any:
        model_fn = lambda params, x: mlp(params, x) * scale  # noqa: E731
        return GGNLinearOperator(model_fn, ggn_jax.MSELoss(), MLP_PARAMS, MSE_ARGS[3]).mv(CE.vector)["w2"]

    scales = jnp.array([0.5, 1.0, 2.0])
    got = jax.vmap(product)(scales)
    for scale, value in zip(scales, got, strict=True):
        assert_close(value, product(scale))


def test_vmap_over_damping() -> None:
    ggn = GGNLinearOperator(*CE.args)

    def solve(damping: jax.Array) -> Any:
        return lx.linear_solve(ggn.damped(damping), CE.vector, lx.CG(rtol=1e-10, atol=1e-10)).value

    dampings = jnp.array([0.1, 1.0, 10.0])
    solutions = jax.vmap(solve)(dampings)
    for i, damping in enumerate(dampings):
        got = jax.tree.map(lambda x, i=i: x[i], solutions)
        assert_close(flat(got), dense_solve(CE.ggn(), CE.vector, float(damping)), 1e-6)


def test_gradient_through_a_solve() -> None:
    """In the damping: `d/dx (G + x)^-1 v = -(G + x)^-2 v`."""
    ggn = GGNLinearOperator(*CE.args)

    def value(damping: jax.Array) -> jax.Array:
        step = lx.linear_solve(ggn.damped(damping), CE.vector, lx.CG(rtol=1e-12, atol=1e-12)).value
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, step, CE.vector)))

    once = dense_solve(CE.ggn(), CE.vector)
    assert_close(jax.grad(value)(DAMPING), -once @ once, 1e-6)


# Tracing. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "chunk_size"), [*((name, 2) for name in FACTORIES), ("ggn", None), ("ef", None)])
def test_nothing_is_traced_anew(name: str, chunk_size: int | None) -> None:
    """A training loop makes a new operator each step, with values of the same shapes."""
    traces = 0

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return mlp(params, x)

    def step(i: int) -> Any:
        params = jax.tree.map(lambda p: p * (1 + 0.1 * i), MLP_PARAMS)
        loss = ggn_jax.CrossEntropyLoss(np.ones(3) + i, ignore_index=0)
        operator = FACTORIES[name](model_fn, loss, params, (X + i, integers(str(i), 3, N)), chunk_size=chunk_size)
        return operator.mv(params), operator.damped(0.1 * i).mv(params)

    first = step(0)
    before = traces
    assert before > 0
    second = step(1)
    assert traces == before
    assert not np.allclose(flat(first), flat(second))


# matfree. ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def usual_promotion() -> Any:
    """matfree does not keep to the strict promotion of our tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("usual_promotion")
def test_matfree_trace_and_diagonal() -> None:
    ggn = GGNLinearOperator(*CE.args)

    sampler = stochtrace.sampler_signs(CE.params, num=4000)
    estimate = stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace_and_diagonal(), sampler)
    mean, sem = jax.jit(lambda key: estimate(ggn.mv, key))(jax.random.key(0))

    assert abs(mean["trace"] - np.trace(CE.ggn())) < 6 * sem["trace"]
    assert sem["trace"] < 0.02 * np.trace(CE.ggn())
    assert jax.tree.structure(mean["diagonal"]) == jax.tree.structure(CE.params)
    error = np.abs(flat(mean["diagonal"]) - np.diagonal(CE.ggn()))
    np.testing.assert_array_less(error, 6 * flat(sem["diagonal"]) + 1e-12)


@pytest.mark.usefixtures("usual_promotion")
def test_matfree_lanczos_eigenvalues() -> None:
    hessian = HessianLinearOperator(*CE.args)
    theta, unravel = ravel_pytree(CE.params)

    def mv(v: jax.Array) -> jax.Array:
        return ravel_pytree(hessian.mv(unravel(v)))[0]

    v0 = jax.random.normal(jax.random.key(0), theta.shape, theta.dtype)
    values, _ = eig.eigh_partial(decomp.tridiag_sym(theta.size, reortho="full"))(mv, v0)
    want = np.linalg.eigvalsh(CE.hessian())
    assert_close(values[jnp.array([0, -1])], want[[0, -1]], 1e-8)


@pytest.mark.usefixtures("usual_promotion")
def test_matfree_log_determinant() -> None:
    """Stochastic Lanczos quadrature of `log det (G + damping I)`, as in a Laplace approximation's evidence."""
    ggn = GGNLinearOperator(*CE.args).damped(DAMPING)

    integrand = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(15))
    sampler = stochtrace.sampler_signs(CE.params, num=1000)
    estimate = stochtrace.estimator_monte_carlo_mean_and_sem(integrand, sampler)
    mean, sem = jax.jit(lambda key: estimate(ggn.mv, key))(jax.random.key(0))

    want = np.linalg.slogdet(CE.ggn() + DAMPING * np.eye(len(CE.ggn())))[1]
    assert abs(mean - want) < 6 * sem
    assert sem < 0.03 * abs(want)


# Precision. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tol"), [("float32", 1e-5), ("bfloat16", 0.06)])
@pytest.mark.parametrize("name", ["ggn", "mc", "ef", "hessian", "diagonal"])
def test_low_precision(name: str, dtype: str, tol: float) -> None:
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
        assert error < tol
    assert np.isfinite(error)
    assert jax.eval_shape(operator.as_matrix).dtype == dtype


@pytest.mark.parametrize("name", FACTORIES)
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
    assert_close(lx.diagonal(operator), np.diagonal(reference), 1e-5)


def test_solve_with_mixed_dtypes() -> None:
    params = {**MLP_PARAMS, "w2": MLP_PARAMS["w2"].astype("float32")}
    vector = jax.tree.map(lambda v, p: v.astype(p.dtype), CE.vector, params)

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return mlp({**params, "w2": params["w2"].astype("float64")}, x)

    operator = GGNLinearOperator(model_fn, CE.loss, params, (X, CE.targets)).damped(DAMPING)
    with jax.numpy_dtype_promotion("standard"):  # of lineax
        solution = lx.linear_solve(operator, vector, lx.LU()).value
    assert jax.tree.map(lambda x: x.dtype, solution) == jax.tree.map(lambda x: x.dtype, params)
    assert_close(flat(solution), dense_solve(CE.ggn(), CE.vector), 1e-3)


# Errors. -------------------------------------------------------------------------------------------------------------

OPERATORS = [GGNLinearOperator, GGNDiagonalLinearOperator, EFLinearOperator, HessianLinearOperator]
every_operator = pytest.mark.parametrize("cls", OPERATORS, ids=lambda cls: cls.__name__)
MODEL, LOSS, PARAMS, (INPUTS, TARGETS) = CE_SUM.args


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
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS, TARGETS)), {}, TypeError, "batch must be a pair"),
        ((MODEL, LOSS, PARAMS, (INPUTS, TARGETS[:-1])), {}, ValueError, r"common leading batch axis.*\(5, 3\).*\(4,\)"),
        ((MODEL, LOSS, PARAMS, ([INPUTS, INPUTS[:2]], TARGETS)), {}, ValueError, "common leading batch axis"),
        ((MODEL, LOSS, PARAMS, (INPUTS[0, 0], TARGETS)), {}, ValueError, "common leading batch axis"),
        ((MODEL, LOSS, PARAMS, (INPUTS[:0], TARGETS[:0])), {}, ValueError, "at least one datum"),
        ((MODEL, LOSS, PARAMS, ("text", TARGETS)), {}, TypeError, "inputs must be a JAX or NumPy array; got str"),
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
        ({"key": jax.random.key(0)}, ValueError, "key is only used with mc_samples"),
        ({"mc_samples": 2}, ValueError, "needs a key"),
        ({"mc_samples": 2, "key": 0}, TypeError, "key must be a JAX PRNG key"),
        ({"mc_samples": 2, "key": jax.random.split(jax.random.key(0), N)}, ValueError, "key must be one key"),
    ],
)
def test_refuses_monte_carlo(cls: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(*CE.args, **kwargs)


@pytest.mark.parametrize("cls", [GGNLinearOperator, GGNDiagonalLinearOperator], ids=lambda cls: cls.__name__)
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
    with pytest.raises(ValueError, match="per must be 'term' or 'datum'"):
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


@pytest.mark.parametrize("cls", [GGNLinearOperator, EFLinearOperator], ids=lambda cls: cls.__name__)
def test_bad_targets_that_nobody_saw_give_nan(cls: Any) -> None:
    """Under `jit` values cannot be looked at: the result says so."""
    args = CE.model_fn, CE.loss, CE.params
    product = jax.jit(lambda targets: cls(*args, (CE.inputs, targets)).mv(CE.vector))
    assert np.isfinite(flat(product(CE.targets))).all()
    assert np.isnan(flat(product(CE.targets + 7))).all()


def test_operators_are_pytrees_of_arrays() -> None:
    for cls in OPERATORS:
        leaves = jax.tree.leaves(cls(*CE.args).damped(DAMPING))
        assert leaves
        assert all(eqx.is_array(leaf) for leaf in leaves)


def test_conjugate_gradients_in_single_precision_need_a_scale() -> None:
    """lineax takes curvature below 100 eps P for a breakdown; a scaled preconditioner avoids it, as documented."""
    size = 20_000
    args = (
        lambda params, x: x * params["w"][None],
        ggn_jax.MSELoss(reduction="sum"),
        {"w": jnp.zeros(size, jnp.float32)},
        (jnp.full((1, size), 0.1, jnp.float32), jnp.ones((1, size), jnp.float32)),
    )
    b = {"w": jnp.linspace(1, 2, size, dtype=jnp.float32)}
    ggn = lx.linearise(GGNLinearOperator(*args)).damped(0.01)
    diagonal = GGNDiagonalLinearOperator(*args).damped(0.01)
    with jax.numpy_dtype_promotion("standard"):
        solver = lx.CG(rtol=1e-5, atol=1e-5)
        plain = lx.linear_solve(ggn, b, solver, throw=False).value["w"]
        options = {"preconditioner": diagonal.inverse(scale=1e3)}
        scaled = lx.linear_solve(ggn, b, solver, options=options).value["w"]
    assert jnp.isnan(plain).any()
    np.testing.assert_allclose(scaled, b["w"] / 0.03, rtol=1e-4)
