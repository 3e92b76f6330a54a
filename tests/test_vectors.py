"""Gradient output vectors against autodiff of torch's own losses in float64, every option, both oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALL, PER_DATUM, Case, N, torch_blocks

import ggn_jax
from ggn_jax import FisherType, LossHessian, make_batch_grad_output_fn, make_grad_output_fn

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def gram(vectors: jax.Array) -> np.ndarray:
    """`sum_v v v^T` as a matrix."""
    flat = np.asarray(vectors).reshape(vectors.shape[0], -1)
    return flat.T @ flat


@pytest.mark.parametrize("case", ALL)
def test_value_is_torchs(case: Case) -> None:
    import torch

    want = case.torch_value(torch.from_numpy(case.outputs), torch.from_numpy(np.asarray(case.targets)))
    np.testing.assert_allclose(case.loss(case.outputs, case.targets), want.item(), **EXACT)


@pytest.mark.parametrize("case", PER_DATUM)
def test_per_datum(case: Case) -> None:
    type2 = make_grad_output_fn(case.loss, "type-2")
    empirical = make_grad_output_fn(case.loss, "empirical")
    for n in range(N):
        f, y = case.outputs[n], case.targets[n]
        want = case.torch_hessian(f[None], y[None]).reshape(f.size, f.size)
        vectors = type2(f, y)
        assert vectors.shape == (f.size, *f.shape)
        np.testing.assert_allclose(gram(vectors), want, **EXACT)
        sqrt = ggn_jax.loss_hessian_matrix_sqrt(f, y, case.loss)
        assert sqrt.shape == 2 * f.shape
        np.testing.assert_array_equal(sqrt.reshape(f.size, f.size), vectors.reshape(f.size, f.size).T)
        # r * gradient of the sum = gradient of the reduced loss; the vector is sqrt(r) * gradient of the sum.
        gradient = case.torch_gradient(f[None], y[None])[0]
        vector = empirical(f, y)
        assert vector.shape == (1, *f.shape)
        np.testing.assert_allclose(vector[0] * np.sqrt(reduction_factor(case, n)), gradient, **EXACT)


def reduction_factor(case: Case, n: int | None) -> float:
    """`r` of one datum or (None) of the batch, written from torch's documentation."""
    targets = case.targets if n is None else case.targets[n][None]
    outputs = case.outputs if n is None else case.outputs[n][None]
    if case.loss.reduction == "sum":
        return 1.0
    if not isinstance(case.loss, ggn_jax.CrossEntropyLoss):
        return 1 / outputs.size
    if targets.dtype.kind == "f":
        return outputs.shape[case.loss.class_axis if case.loss.class_axis < 0 else 1] / outputs.size
    kept = targets[targets != case.loss.ignore_index]
    weight = np.ones(100) if case.loss.weight is None else np.asarray(case.loss.weight)
    total = weight[kept].sum()
    return 1 / total if total else 0.0


@pytest.mark.parametrize("case", ALL)
def test_batched(case: Case) -> None:
    blocks = torch_blocks(case)
    vectors = make_batch_grad_output_fn(case.loss, FisherType.TYPE2)(case.outputs, case.targets)
    assert vectors.shape == (case.outputs[0].size, *case.outputs.shape)
    for n in range(N):
        np.testing.assert_allclose(gram(vectors[:, n]), blocks[n], **EXACT)
    empirical = make_batch_grad_output_fn(case.loss, "empirical")(case.outputs, case.targets)
    gradient = case.torch_gradient(case.outputs, case.targets)
    assert empirical.shape == (1, *case.outputs.shape)
    np.testing.assert_allclose(empirical[0] * np.sqrt(reduction_factor(case, None)), gradient, **EXACT)


@pytest.mark.parametrize("case", ALL)
def test_structured_hessian(case: Case) -> None:
    blocks = torch_blocks(case)
    v = np.random.default_rng(0).normal(size=case.outputs.shape)
    u = np.random.default_rng(1).normal(size=case.outputs.shape)
    hessian = LossHessian(case.loss, case.outputs, case.targets)
    want = np.einsum("nij,nj->ni", blocks, v.reshape(N, -1)).reshape(v.shape)
    np.testing.assert_allclose(hessian.mv(v), want, **EXACT)
    np.testing.assert_allclose(hessian.sqrt_mv(hessian.sqrt_rmv(v)), want, **EXACT)
    np.testing.assert_allclose(jnp.vdot(hessian.sqrt_mv(v), u), jnp.vdot(v, hessian.sqrt_rmv(u)), **EXACT)
    diagonal = np.einsum("nii->ni", blocks)
    np.testing.assert_allclose(hessian.diagonal(), diagonal.reshape(v.shape), **EXACT)
    np.testing.assert_allclose(hessian.trace(), diagonal.sum(), **EXACT)
    # The factor is the one whose columns the vectors are.
    vectors = make_batch_grad_output_fn(case.loss, "type-2")(case.outputs, case.targets)
    np.testing.assert_allclose(
        hessian.sqrt_mv(v), np.einsum("vn...,nv->n...", vectors, v.reshape(N, -1)).reshape(v.shape), **EXACT
    )


def assert_mean(draws: np.ndarray, want: np.ndarray, bound: float) -> None:
    """The mean over axis 0 is `want`, within the empirical Bernstein bound (Maurer & Pontil 2009, theorem 4).

    It holds with probability `1 - delta` for draws of range `bound`, also where most of the variance is in labels too
    rare to be seen. `delta` = 1e-9 for each of the about 1e5 comparisons of this file; seeds are fixed.
    """
    num, log = draws.shape[0], np.log(2 / 1e-9)
    slack = np.sqrt(2 * draws.var(axis=0, ddof=1) * log / num) + 7 * bound * log / (3 * (num - 1))
    np.testing.assert_array_less(np.abs(draws.mean(axis=0) - want), slack + 1e-12)


def range_of_products(case: Case) -> float:
    """The range of a product of two entries of a drawn gradient."""
    r = reduction_factor(case, None)
    if isinstance(case.loss, ggn_jax.MSELoss):
        return 2 * r * 6**2  # up to 6 standard deviations of N(0, 2 r)
    weights = [case.loss.weight, getattr(case.loss, "pos_weight", None)]
    return 2 * r * float(np.prod([1.0 if w is None else max(1.0, np.max(w)) for w in weights]))


@pytest.mark.parametrize("case", ALL)
def test_monte_carlo(case: Case) -> None:
    blocks = torch_blocks(case)
    samples, size, bound = 2000, case.outputs[0].size, range_of_products(case)
    fn = make_batch_grad_output_fn(case.loss, "mc", mc_samples=samples)
    vectors = fn(case.outputs, case.targets, jax.random.key(1))
    assert vectors.shape == (samples, *case.outputs.shape)
    g = np.asarray(vectors).reshape(samples, N, size) * np.sqrt(samples)
    assert_mean(np.einsum("sni,snj->snij", g, g), blocks, bound)
    assert_mean(g, np.zeros((N, size)), np.sqrt(bound))
    # Independent across data: cross moments vanish.
    assert_mean(np.einsum("si,sj->sij", g[:, 0], g[:, -1]), np.zeros((size, size)), bound)


@pytest.mark.parametrize("case", PER_DATUM)
def test_per_datum_draws_are_the_batchs(case: Case) -> None:
    """The same labels are drawn for a datum's key, alone or in a batch; only the reduction differs."""
    keys = jax.random.split(jax.random.key(3), N)
    per_datum = jax.vmap(make_grad_output_fn(case.loss, "mc", 2))(case.outputs, case.targets, keys)
    batched = make_batch_grad_output_fn(case.loss, "mc", 2)(case.outputs, case.targets, jax.random.key(3))
    for n in range(N):
        r = reduction_factor(case, None) / (reduction_factor(case, n) or 1)
        np.testing.assert_allclose(batched[:, n], per_datum[n] * np.sqrt(r), **EXACT)
    sample = ggn_jax.make_grad_output_sampler(case.loss)(case.outputs[0], 2, case.targets[0], keys[0])
    np.testing.assert_allclose(sample, per_datum[0] * np.sqrt(2), **EXACT)


@pytest.mark.parametrize("case", PER_DATUM)
def test_forward_only_does_not_look_at_the_target(case: Case) -> None:
    vectors = make_grad_output_fn(case.loss, "forward-only")(case.outputs[0], None)
    assert vectors.shape == (0, *case.outputs.shape[1:])
    assert make_batch_grad_output_fn(case.loss, "forward-only")(case.outputs, None).shape == (0, *case.outputs.shape)
