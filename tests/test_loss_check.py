"""Losses of one's own that are not what they say."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_errors import raises
from test_user_losses import GammaLoss, GaussianLoss, StudentTLoss

import ggn_jax
from ggn_jax import CrossEntropyLoss, LikelihoodLoss, check_loss

KEY = jax.random.key(0)
F = jax.device_put(np.random.default_rng(0).normal(size=(6, 2)))


class Quadratic(ggn_jax.Loss):
    """Half a squared error times 3, in closed form, with one of several mistakes."""

    curvature = "hessian"
    mistake: str = eqx.field(static=True, default="")

    def check_shapes(self, outputs: Any, targets: Any, batch: bool) -> None:
        assert outputs.shape == targets.shape

    def operand(self, outputs: Any, targets: Any, batch: bool) -> Any:
        return targets, ()

    def term_weight(self, f: Any, y: Any) -> Any:
        return jnp.full_like(f, 3)

    def term_value(self, f: Any, y: Any) -> Any:
        return 1.5 * (f - y) ** 2

    def term_gradient(self, f: Any, y: Any) -> Any:
        return (f - y) if self.mistake == "term_gradient" else 3 * (f - y)

    def term_hessian(self, f: Any, y: Any) -> Any:
        h = jnp.full_like(f, 2.0 if self.mistake == "term_hessian" else 1.0)
        return Scalar(h, h / 2 if self.mistake == "S S^T" else jnp.sqrt(h))

    def draw(self, key: Any, shape: Any, f: Any) -> Any:
        return jax.random.normal(key, shape, f.dtype)

    def sampled_gradient(self, f: Any, y: Any, drawn: Any) -> Any:
        return {"draws is not 0": drawn + 0.3, "g g^T": 0.8 * drawn}.get(self.mistake, drawn)


class Scalar(eqx.Module):
    """A term's second derivative and its root, as a user would write them."""

    second: jax.Array
    root: jax.Array

    def mv(self, v: Any) -> Any:
        return self.second * v

    def sqrt_mv(self, v: Any) -> Any:
        return self.root * v

    sqrt_rmv = sqrt_mv


class WrongScale(LikelihoodLoss):
    """Draws with a fifth of the standard deviation."""

    curvature = "hessian"

    def nll(self, f: Any, y: Any) -> Any:
        return 0.5 * (f - y) ** 2

    def sample(self, key: Any, f: Any) -> Any:
        return f + 0.2 * jax.random.normal(key, f.shape, f.dtype)


class WrongMean(WrongScale):
    def sample(self, key: Any, f: Any) -> Any:
        return 0.2 + f + jax.random.normal(key, f.shape, f.dtype)


class WrongRoot(GaussianLoss):
    """The Fisher matrix itself."""

    def fisher_sqrt(self, f: Any) -> Any:
        root = super().fisher_sqrt(f)
        return root @ root.T


class NotConvex(StudentTLoss):
    curvature = "hessian"


@pytest.mark.parametrize(
    "case",
    [
        (Quadratic(), F, F + 1),
        (GammaLoss(), F, None),  # a Hessian that depends on the target
        (GaussianLoss(), F, None),  # a Fisher factor, and two entries to a term
        (StudentTLoss(reduction="sum"), F, F + 10),
        # Most draws are alike.
        (CrossEntropyLoss(ignore_index=-1, class_axis=-1), 30 * F, jax.device_put(np.arange(6) % 3 - 1)),
    ],
    ids=lambda case: type(case[0]).__name__,
)
@pytest.mark.by_default("CrossEntropyLoss")
def test_right_losses(case: Any) -> None:
    check_loss(*case)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ((WrongScale(), F), ("WrongScale.sample does not fit WrongScale.nll", "g g^T", "96% of the largest")),
        ((WrongMean(), F), ("WrongMean.sample does not fit", "is not 0", "the difference is 0.2")),
        ((WrongRoot(), F), ("WrongRoot.fisher_sqrt does not fit", "S S^T")),
        ((NotConvex(), F, F + 9), ("NotConvex declares curvature='hessian'", "12 of 12 terms", "fisher_sqrt")),
        *(((Quadratic(mistake), F, F + 1), (mistake,)) for mistake in ("term_gradient", "term_hessian")),
        *(((Quadratic(mistake), F, F + 1), (mistake,)) for mistake in ("S S^T", "draws is not 0", "g g^T")),
    ],
    ids=lambda case: getattr(case[0], "mistake", "") or type(case[0]).__name__,
)
def test_wrong_losses(case: Any, words: tuple[str, ...]) -> None:
    with raises(ValueError, *words):
        check_loss(*case, key=KEY)


def test_what_cannot_be_checked() -> None:
    with raises(TypeError, "check_loss", "outside of jit"):
        jax.jit(lambda f: check_loss(GammaLoss(), f, f))(F)
    with raises(ValueError, "targets", "nothing to check"):
        check_loss(CrossEntropyLoss(), F, jnp.full(6, -100))
    with raises(ValueError, "targets must be given", "Quadratic"):
        check_loss(Quadratic(), F)


def linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params


W = jnp.eye(2)


def test_operators_refuse_indefinite_hessians() -> None:
    """Of all terms, in chunks or not; those of the first five examples are positive."""
    targets = F.at[5].add(9.0)
    for make in (ggn_jax.GGNLinearOperator, ggn_jax.KFACLinearOperator, ggn_jax.GGNDiagonalLinearOperator):
        chunk_size = 4 if make is ggn_jax.GGNDiagonalLinearOperator else None
        with raises(ValueError, "NotConvex declares curvature='hessian'", "2 of 12 terms of this batch"):
            make(linear, NotConvex(), W, (F, targets), key=KEY, chunk_size=chunk_size)
    assert ggn_jax.EFLinearOperator(linear, NotConvex(), W, (F, targets))
    optimizer = ggn_jax.kfac(linear, NotConvex(), 0.1, example_inputs=F)
    with raises(ValueError, "NotConvex declares", "% of the targets that it draws"):
        optimizer.init(W)


class VectorNll(WrongScale):
    term_axes = (-1,)

    def sample(self, key: Any, f: Any) -> Any:
        return f + jax.random.normal(key, f.shape, f.dtype)


def test_a_likelihood_is_one_number() -> None:
    for call in (
        VectorNll(),
        ggn_jax.make_batch_grad_output_fn(VectorNll(), "type-2"),
        lambda f, y: check_loss(VectorNll(), f),
    ):
        with raises(ValueError, "VectorNll.nll must return one number", "shape (2,)", "got shape (2,)", "Add up"):
            call(F, F)


class LogNormalLoss(WrongScale):
    def nll(self, f: Any, y: Any) -> Any:
        return 0.5 * (f - jnp.log(y)) ** 2

    def term_valid(self, f: Any, y: Any) -> Any:
        return y > 0

    def target_domain(self, shape: tuple[int, ...], batch: bool) -> str:
        return "positive"


def test_a_domain_of_ones_own() -> None:
    loss, targets = LogNormalLoss(), jnp.ones_like(F).at[1, 0].set(-2.0)
    vectors = ggn_jax.make_batch_grad_output_fn(loss, "empirical")
    for call in (loss, vectors, lambda f, y: ggn_jax.GGNLinearOperator(linear, loss, W, (f, y))):
        with raises(ValueError, "targets must be positive", "-2.0 at position (1, 0)", "1 of 12 terms"):
            call(F, targets)
    assert jnp.isnan(jax.jit(loss)(F, targets))
    assert jax.jit(loss.targets_valid)(F, targets).tolist() == (targets > 0).tolist()
