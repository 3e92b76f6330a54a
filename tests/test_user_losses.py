"""Losses as users write them: one term's likelihood and sampler, everything else derived."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_vectors import assert_mean

import ggn_jax
from ggn_jax import LikelihoodLoss, LossHessian, make_batch_grad_output_fn, make_grad_output_fn

N = 4
EXACT = {"rtol": 1e-11, "atol": 1e-12}


class PoissonLoss(LikelihoodLoss):
    """Counts; the output is the log-rate."""

    curvature = "hessian"

    def nll(self, f, y):
        return jnp.exp(f) - y * f

    def sample(self, key, f):
        return jax.random.poisson(key, jnp.exp(f)).astype(f.dtype)


class StudentTLoss(LikelihoodLoss):
    """Heavy tails, not convex: its curvature is the Fisher, `(nu + 1) / ((nu + 3) s^2)` (Lange et al. 1989)."""

    curvature = "fisher"
    df: float = 4.0
    scale: float = 0.7

    def nll(self, f, y):
        return 0.5 * (self.df + 1) * jnp.log1p(((y - f) / self.scale) ** 2 / self.df)

    def sample(self, key, f):
        return f + self.scale * jax.random.t(key, self.df, f.shape, f.dtype)

    def fisher_sqrt(self, f):
        return jnp.sqrt((self.df + 1) / (self.df + 3)) / self.scale * jnp.ones_like(f)


class GaussianLoss(LikelihoodLoss):
    """A mean and a log-variance per target, on the outputs' last axis; the Fisher is diag(exp(-s), 1/2)."""

    curvature = "fisher"
    term_axes = (-1,)

    def nll(self, f, y):
        return 0.5 * (f[1] + (y - f[0]) ** 2 * jnp.exp(-f[1]))

    def sample(self, key, f):
        return f[0] + jnp.exp(0.5 * f[1]) * jax.random.normal(key, (), f.dtype)

    def fisher_sqrt(self, f):
        return jnp.diag(jnp.stack([jnp.exp(-0.5 * f[1]), jnp.sqrt(jnp.asarray(0.5, f.dtype))]))


class SoftmaxLoss(LikelihoodLoss):
    """Cross-entropy written by a user; integer targets, class axis anywhere."""

    curvature = "hessian"
    axis: int = eqx.field(static=True, default=0)

    @property
    def term_axes(self):
        return (self.axis,)

    def nll(self, f, y):
        return -jax.nn.log_softmax(f)[y]

    def sample(self, key, f):
        return jax.random.categorical(key, f)


class GammaLoss(LikelihoodLoss):
    """Exponential waiting times, log-mean: the Hessian `y exp(-f)` depends on the target and is not the Fisher, 1."""

    curvature = "hessian"

    def nll(self, f, y):
        return f + y * jnp.exp(-f)

    def sample(self, key, f):
        return jnp.exp(f) * jax.random.exponential(key, f.shape, f.dtype)


class WeightedVectorLoss(LikelihoodLoss):
    """A Gaussian vector with a precision matrix, vector targets, and a weight that ignores negative ones."""

    curvature = "hessian"
    term_axes = (-1,)
    precision: jax.Array

    def nll(self, f, y):
        return 0.5 * (f - y) @ self.precision @ (f - y)

    def sample(self, key, f):
        return jax.random.multivariate_normal(key, f, jnp.linalg.inv(self.precision))

    def term_weight(self, f, y):
        return jnp.where(y[0] < 0, 0.0, 1.0)

    def term_count(self, f, y):
        return self.term_weight(f, y)


def _rng():
    return np.random.default_rng(0)


PRECISION = jnp.asarray([[2.0, 0.5], [0.5, 1.0]])
# name: loss, outputs, targets
CASES = {
    "poisson": (PoissonLoss(), _rng().normal(size=(N, 3)), _rng().poisson(2, size=(N, 3))),
    "poisson-scalar-sum": (PoissonLoss(reduction="sum"), _rng().normal(size=N), _rng().poisson(2, size=N)),
    "softmax-0": (SoftmaxLoss(), _rng().normal(size=(N, 3, 2)), _rng().integers(3, size=(N, 2))),
    "softmax-last": (SoftmaxLoss(axis=-1), _rng().normal(size=(N, 2, 3)), _rng().integers(3, size=(N, 2))),
    "gamma": (GammaLoss(), _rng().normal(size=(N, 3)), _rng().exponential(size=(N, 3))),
    "vector": (
        WeightedVectorLoss(PRECISION),
        _rng().normal(size=(N, 3, 2)),
        np.abs(_rng().normal(size=(N, 3, 2))) * np.where(np.arange(N) == 1, -1, 1)[:, None, None],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.by_default("softmax-last")
def test_hessian_losses(name: str) -> None:
    loss, outputs, targets = CASES[name]
    outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
    size = outputs[0].size
    full = jax.jit(jax.hessian(lambda f: loss(f, targets)))(outputs).reshape(N, size, N, size)
    blocks = np.stack([full[n, :, n] for n in range(N)])
    vectors = make_batch_grad_output_fn(loss, "type-2")(outputs, targets).reshape(size, N, size)
    np.testing.assert_allclose(np.einsum("vni,vnj->nij", vectors, vectors), blocks, **EXACT)
    hessian = LossHessian(loss, outputs, targets)
    v = jax.device_put(_rng().normal(size=outputs.shape))
    want = np.einsum("nij,nj->ni", blocks, v.reshape(N, size)).reshape(v.shape)
    np.testing.assert_allclose(hessian.mv(v), want, **EXACT)
    np.testing.assert_allclose(hessian.sqrt_mv(hessian.sqrt_rmv(v)), want, **EXACT)
    np.testing.assert_allclose(hessian.diagonal().reshape(N, size), np.einsum("nii->ni", blocks), **EXACT)
    gradient = make_batch_grad_output_fn(loss, "empirical")(outputs, targets)[0]
    plain = type(loss)(*jax.tree.leaves(loss), reduction="sum") if name == "vector" else None
    if plain is not None or loss.reduction == "sum":
        summed = jax.grad(lambda f: (plain or loss)(f, targets))(outputs)
        r = hessian.terms.reduction_factor
        np.testing.assert_allclose(gradient, jnp.sqrt(r) * summed, **EXACT)
    samples = 4000
    g = make_batch_grad_output_fn(loss, "mc", samples)(outputs, targets, jax.random.key(0))
    g = np.asarray(g).reshape(samples, N, size) * np.sqrt(samples)
    products = np.einsum("sni,snj->snij", g, g)
    assert_mean(products, blocks, float(np.abs(products).max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.by_default("sum")
def test_fisher_losses(reduction: str) -> None:
    """The oracle is the Fisher: exact from the factor, and by quadrature over targets for Student's t."""
    y = np.linspace(-400, 400, 400_001)
    density = (1 + (y / 0.7) ** 2 / 4) ** -2.5
    score = jax.vmap(jax.grad(StudentTLoss().nll), in_axes=(None, 0))(0.0, jnp.asarray(y))
    fisher = (np.asarray(score) ** 2 * density).sum() / density.sum()
    outputs = jax.device_put(_rng().normal(size=(N, 3, 2)))
    for loss, targets, blocks in (
        (StudentTLoss(reduction=reduction), outputs + 1, np.full(6, fisher)),
        (
            GaussianLoss(reduction=reduction),
            outputs[..., 0] + 1,
            np.stack([np.exp(-outputs[..., 1]), np.full((N, 3), 0.5)], -1).reshape(N, 6),
        ),
    ):
        terms = 1 if reduction == "sum" else targets.size
        want = np.stack([np.diag(np.broadcast_to(blocks, (N, 6))[n]) for n in range(N)]) / terms
        vectors = make_batch_grad_output_fn(loss, "type-2")(outputs, targets).reshape(6, N, 6)
        np.testing.assert_allclose(np.einsum("vni,vnj->nij", vectors, vectors), want, rtol=1e-6, atol=1e-12)
        g = make_batch_grad_output_fn(loss, "mc", 4000)(outputs, targets, jax.random.key(0))
        g = np.asarray(g).reshape(4000, N, 6) * np.sqrt(4000)
        products = np.einsum("sni,snj->snij", g, g)
        assert_mean(products, want, float(np.abs(products).max()))
        per_datum = make_grad_output_fn(loss, "type-2")(outputs[0], targets[0]).reshape(6, 6)
        np.testing.assert_allclose(
            per_datum.T @ per_datum, want[0] * (N if reduction == "mean" else 1), rtol=1e-6, atol=1e-12
        )


def test_poisson_draws_are_gradients_at_counts() -> None:
    f = jnp.asarray([0.3, -1.0])
    g = ggn_jax.make_grad_output_sampler(PoissonLoss(reduction="sum"))(f, 50, jnp.zeros(2), jax.random.key(0))
    counts = jnp.exp(f)[None] - g
    np.testing.assert_allclose(counts, jnp.round(counts), atol=1e-12)


def test_target_dependent_hessian_draws_do_not_estimate_the_fisher() -> None:
    f, y = jnp.zeros(1), jnp.full(1, 9.0)  # Hessian 9, Fisher 1
    g = ggn_jax.make_grad_output_sampler(GammaLoss(reduction="sum"))(f, 50, y, jax.random.key(0))
    np.testing.assert_allclose(jnp.abs(g), 3.0)
    assert 0 < (g > 0).sum() < 50


def test_what_is_refused() -> None:
    class NoFactor(StudentTLoss):
        fisher_sqrt = LikelihoodLoss.fisher_sqrt

    class NotDeclared(LikelihoodLoss):
        nll = PoissonLoss.nll
        sample = PoissonLoss.sample

    class WrongSample(PoissonLoss):
        def sample(self, key, f):
            return jnp.zeros(7)

    class Holder(PoissonLoss):
        name: str = "poisson"

    f, y = jnp.zeros(3), jnp.zeros(3)
    assert make_grad_output_fn(NoFactor(), "mc")(f, y, jax.random.key(0)).shape == (1, 3)
    with pytest.raises(NotImplementedError, match=r"NoFactor.*fisher_sqrt"):
        make_grad_output_fn(NoFactor(), "type-2")
    with pytest.raises(NotImplementedError, match=r"NoFactor.*fisher_sqrt"):
        LossHessian(NoFactor(), f[None], y[None])
    with pytest.raises(TypeError, match="NotDeclared must declare curvature"):
        NotDeclared()
    with pytest.raises(ValueError, match=r"WrongSample.sample.*\(7,\)"):
        make_grad_output_fn(WrongSample(), "mc")(f, y, jax.random.key(0))
    with pytest.raises(TypeError, match=r"Holder.name is a str.*static"):
        make_grad_output_fn(Holder(), "mc")
    with pytest.raises(ValueError, match=r"targets must have shape \(3,\).*got \(1,\)"):
        make_grad_output_fn(PoissonLoss(), "mc")(f, jnp.zeros(1), jax.random.key(0))
    with pytest.raises(TypeError, match="targets must have a dtype like"):
        make_grad_output_fn(SoftmaxLoss(), "mc")(f, jnp.zeros(()), jax.random.key(0))
    with pytest.raises(ValueError, match=r"SoftmaxLoss takes axis 2.*\(3,\)"):
        make_grad_output_fn(SoftmaxLoss(axis=2), "mc")(f, jnp.asarray(0), jax.random.key(0))


def test_hessian_that_is_not_positive_gives_nan() -> None:
    class Wrong(StudentTLoss):
        curvature = "hessian"

    vectors = make_grad_output_fn(Wrong(), "type-2")(jnp.zeros(2), jnp.asarray([0.1, 9.0]))
    assert jnp.isnan(vectors).tolist() == [[False, False], [False, True]]


def test_a_sampler_never_sees_what_is_ignored() -> None:
    """Its loops might not end where the output is NaN; nor do derivatives in the loss's fields see it."""
    seen: list[float] = []

    class Loss(LikelihoodLoss):
        curvature = "hessian"
        rate: jax.Array

        def nll(self, f, y):
            return 0.5 * self.rate * (f - y) ** 2

        def sample(self, key, f):
            jax.debug.callback(lambda f: seen.append(float(f)), f)
            return f + jax.random.normal(key, f.shape, f.dtype) / jnp.sqrt(self.rate)

        def term_weight(self, f, y):
            return jnp.where(y < 0, 0.0, 1.0)

        def term_value(self, f, y):
            return self.term_weight(f, y) * self.nll(f, y)

    outputs, targets = jnp.asarray([[0.5], [jnp.nan], [2.0]]), jnp.asarray([[1.0], [-1.0], [0.0]])
    vectors = ggn_jax.make_batch_grad_output_fn(Loss(jnp.asarray(2.0)), "mc", 4)(outputs, targets, jax.random.key(0))
    jax.effects_barrier()
    assert set(seen) == {0.0, 0.5, 2.0}
    np.testing.assert_array_equal(vectors[:, 1], 0)
    derivative = jax.grad(lambda rate: Loss(rate)(outputs, targets))(jnp.asarray(2.0))
    np.testing.assert_allclose(derivative, 0.5 * (0.5**2 + 2.0**2) / 3, rtol=1e-12)
