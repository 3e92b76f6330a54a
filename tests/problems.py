"""Models, losses and batches with dense matrices of their curvature: the Jacobian from JAX, losses from torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import torch
from jax.flatten_util import ravel_pytree

import ggn_jax
from ggn_jax import (
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    LikelihoodLoss,
)

N = 5


def assert_close(got: Any, want: Any, tol: float = 1e-11) -> None:
    """To `tol` of the largest entry wanted."""
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=tol, atol=tol * max(np.abs(want).max(), 1e-3))


def normal(name: str, *shape: int) -> jax.Array:
    """Normal numbers, the same for each name."""
    return jax.device_put(np.random.default_rng(list(name.encode())).normal(size=shape))


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
        return np.asarray(jax.jit(self.model_fn)(self.params, self.inputs))

    @cache  # noqa: B019
    def jacobian(self) -> np.ndarray:
        theta, unravel = ravel_pytree(self.params)
        jacobian = jax.jit(jax.jacobian(lambda theta: self.model_fn(unravel(theta), self.inputs)))(theta)
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
        return np.asarray(jax.jit(jax.hessian(value))(theta))

    @cache  # noqa: B019
    def ef(self, per: str) -> np.ndarray:
        """`r sum_t g_t g_t^T` with one backward pass of torch per term, or the sum over each example of terms."""
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
    """Some tokens are ignored, and one example wholly."""
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
    """A weight of each example: chunks must take their share of it."""
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

OPERATORS = [GGNLinearOperator, GGNDiagonalLinearOperator, EFLinearOperator, HessianLinearOperator]
DAMPING = 0.3


def dense_solve(matrix: np.ndarray, vector: Any, damping: float = DAMPING) -> np.ndarray:
    return np.linalg.solve(matrix + damping * np.eye(len(matrix)), flat(vector))


def names_of_classes(value: Any) -> str | None:
    """For pytest: solvers are called as their classes are."""
    return type(value).__name__ if isinstance(value, lx.AbstractLinearSolver) else None
