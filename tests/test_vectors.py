"""Gradient output vectors against autodiff of torch's own losses in float64, every option, both oracles."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from cases import CORE, FEW, PER_DATUM, Case, N, params, torch_blocks

import ggn_jax
from ggn_jax import FisherType, LossHessian, make_batch_grad_output_fn, make_grad_output_fn

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def gram(vectors: jax.Array) -> np.ndarray:
    """`sum_v v v^T` as a matrix."""
    flat = np.asarray(vectors).reshape(vectors.shape[0], -1)
    return flat.T @ flat


def reduction_factor(case: Case, n: int | None) -> float:
    """`r` of one example or (None) of the batch, written from torch's documentation."""
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


# Each case is two compiled programs, which is where the time goes: one of what is exact, one of what is drawn.


@pytest.mark.parametrize("case", params(by_default=FEW))
def test_exact_functions(case: Case) -> None:
    """The value, vectors of a batch and of one example, and the Hessian as products."""
    v = np.random.default_rng(0).normal(size=case.outputs.shape)
    u = np.random.default_rng(1).normal(size=case.outputs.shape)

    @jax.jit
    def run(f: jax.Array, y: jax.Array, v: jax.Array, u: jax.Array) -> dict[str, Any]:
        hessian = LossHessian(case.loss, f, y)
        of_batch = {
            "value": case.loss(f, y),
            "type-2": make_batch_grad_output_fn(case.loss, FisherType.TYPE2)(f, y),
            "empirical": make_batch_grad_output_fn(case.loss, "empirical")(f, y),
            "mv": hessian.mv(v),
            "gram": hessian.sqrt_mv(hessian.sqrt_rmv(v)),
            "sqrt": hessian.sqrt_mv(v),
            "sqrt^T": hessian.sqrt_rmv(u),
            "diagonal": hessian.diagonal(),
            "trace": hessian.trace(),
        }
        return of_batch if case.batched_only else {**of_batch, "each": jax.vmap(of_datum)(f, y)}

    def of_datum(f: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        kinds = (make_grad_output_fn(case.loss, kind)(f, y) for kind in ("type-2", "empirical"))
        return *kinds, ggn_jax.loss_hessian_matrix_sqrt(f, y, case.loss)

    got = jax.tree.map(np.asarray, run(case.outputs, case.targets, v, u))
    blocks, gradient = torch_blocks(case), case.torch_gradient(case.outputs, case.targets)
    value = case.torch_value(torch.from_numpy(case.outputs), torch.from_numpy(np.asarray(case.targets)))
    np.testing.assert_allclose(got["value"], value.item(), **EXACT)

    vectors = got["type-2"]
    assert vectors.shape == (case.outputs[0].size, *case.outputs.shape)
    for n in range(N):
        np.testing.assert_allclose(gram(vectors[:, n]), blocks[n], **EXACT)
    assert got["empirical"].shape == (1, *case.outputs.shape)
    # r * gradient of the sum = gradient of the reduced loss; the vector is sqrt(r) * gradient of the sum.
    np.testing.assert_allclose(got["empirical"][0] * np.sqrt(reduction_factor(case, None)), gradient, **EXACT)

    want = np.einsum("nij,nj->ni", blocks, v.reshape(N, -1)).reshape(v.shape)
    np.testing.assert_allclose(got["mv"], want, **EXACT)
    np.testing.assert_allclose(got["gram"], want, **EXACT)
    np.testing.assert_allclose(np.vdot(got["sqrt"], u), np.vdot(v, got["sqrt^T"]), **EXACT)
    diagonal = np.einsum("nii->ni", blocks)
    np.testing.assert_allclose(got["diagonal"], diagonal.reshape(v.shape), **EXACT)
    np.testing.assert_allclose(got["trace"], diagonal.sum(), **EXACT)
    # The factor is the one whose columns the vectors are.
    columns = np.einsum("vn...,nv->n...", vectors, v.reshape(N, -1)).reshape(v.shape)
    np.testing.assert_allclose(got["sqrt"], columns, **EXACT)

    for n, (type2, empirical, sqrt) in enumerate(zip(*got.get("each", ((), (), ())), strict=True)):
        f, y = case.outputs[n], case.targets[n]
        assert type2.shape == (f.size, *f.shape)
        np.testing.assert_allclose(gram(type2), case.torch_hessian(f[None], y[None]).reshape(f.size, f.size), **EXACT)
        assert sqrt.shape == 2 * f.shape
        np.testing.assert_array_equal(sqrt.reshape(f.size, f.size), type2.reshape(f.size, f.size).T)
        assert empirical.shape == (1, *f.shape)
        one = case.torch_gradient(f[None], y[None])[0]
        np.testing.assert_allclose(empirical[0] * np.sqrt(reduction_factor(case, n)), one, **EXACT)


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


@pytest.mark.by_default(
    "mse-mean-(3,)",
    "mse-sum-(2, 3)",
    "bce-mean-()-plain-hard",
    "bce-sum-(2, 3)-weight+pos_weight-hard",
    "bce-mean-weight-of-batch",
    "ce-mean-(3,)-plain-0.3-probabilities",
    "ce-mean-(3, 2)-weighted-0.0-ignored-last",
    "ce-mean-(5,)-weighted-0.3-ignored",
)
@pytest.mark.parametrize("case", params(lambda case: case.name in CORE))
def test_monte_carlo(case: Case) -> None:
    """Means of a batch's draws; an example's key gives the same labels alone, and only the reduction differs."""
    samples, size, bound = 2000, case.outputs[0].size, range_of_products(case)

    @jax.jit
    def run(f: jax.Array, y: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        vectors = make_batch_grad_output_fn(case.loss, "mc", mc_samples=samples)(f, y, key)
        if case.batched_only:
            return (vectors,)
        keys = jax.random.split(key, N)
        each = jax.vmap(make_grad_output_fn(case.loss, "mc", samples))(f, y, keys)
        return vectors, each, ggn_jax.make_grad_output_sampler(case.loss)(f[0], samples, y[0], keys[0])

    vectors, *alone = map(np.asarray, run(case.outputs, case.targets, jax.random.key(1)))
    assert vectors.shape == (samples, *case.outputs.shape)
    g = vectors.reshape(samples, N, size) * np.sqrt(samples)
    assert_mean(np.einsum("sni,snj->snij", g, g), torch_blocks(case), bound)
    assert_mean(g, np.zeros((N, size)), np.sqrt(bound))
    # Independent across data: cross moments vanish.
    assert_mean(np.einsum("si,sj->sij", g[:, 0], g[:, -1]), np.zeros((size, size)), bound)
    if case.batched_only:
        return
    each, sample = alone
    for n in range(N):
        r = reduction_factor(case, None) / (reduction_factor(case, n) or 1)
        np.testing.assert_allclose(vectors[:, n], each[n] * np.sqrt(r), **EXACT)
    np.testing.assert_allclose(sample, each[0] * np.sqrt(samples), **EXACT)


@pytest.mark.parametrize("case", PER_DATUM)
def test_forward_only_does_not_look_at_the_target(case: Case) -> None:
    vectors = make_grad_output_fn(case.loss, "forward-only")(case.outputs[0], None)
    assert vectors.shape == (0, *case.outputs.shape[1:])
    assert make_batch_grad_output_fn(case.loss, "forward-only")(case.outputs, None).shape == (0, *case.outputs.shape)
