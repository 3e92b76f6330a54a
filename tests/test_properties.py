"""Random shapes, layouts, options and dtypes, against autodiff of torch's losses."""

from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_vectors import gram

import ggn_jax
from ggn_jax import LossHessian, make_batch_grad_output_fn, make_grad_output_fn

FEW = hypothesis.settings(max_examples=10)  # each is compiled anew
shapes = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)
reductions = st.sampled_from(["mean", "sum"])


@st.composite
def cross_entropies(draw: Any) -> tuple[Any, ...]:
    """A loss, torch's, outputs `[N, *out]`, targets, and the class axis of `[N, *out]`."""
    positions = draw(st.lists(st.integers(1, 3), min_size=0, max_size=2))
    classes, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    axis = draw(st.integers(0, len(positions)))
    out = [*positions[:axis], classes, *positions[axis:]]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    options = {"reduction": draw(reductions), "label_smoothing": draw(st.sampled_from([0.0, 0.25, 1.0]))}
    weight = rng.uniform(0.1, 2, size=classes) if draw(st.booleans()) else None
    outputs = rng.normal(size=(size, *out)) * draw(st.sampled_from([1.0, 10.0]))
    if draw(st.booleans()):
        targets = rng.uniform(size=outputs.shape)  # not normalised: torch takes them too
    else:
        targets = rng.integers(classes, size=(size, *positions))
        options["ignore_index"] = draw(st.sampled_from([-100, 0, classes - 1, 255]))
    negative = draw(st.booleans())
    ours = ggn_jax.CrossEntropyLoss(weight, class_axis=axis - len(out) if negative else axis, **options)
    theirs = torch.nn.CrossEntropyLoss(None if weight is None else torch.from_numpy(weight), **options)
    return ours, theirs, outputs, targets, axis + 1


def torch_hessian(theirs: torch.nn.Module, outputs: np.ndarray, targets: np.ndarray, axis: int | None) -> np.ndarray:
    y = torch.from_numpy(targets)
    if axis is not None and y.is_floating_point():
        y = y.movedim(axis, 1)

    def value(f: torch.Tensor) -> torch.Tensor:
        value = theirs(f if axis is None else f.movedim(axis, 1), y)
        return 0 * f.sum() if value.isnan() else value

    return torch.autograd.functional.hessian(value, torch.from_numpy(outputs)).numpy()


def check(
    ours: ggn_jax.Loss, theirs: torch.nn.Module, outputs: np.ndarray, targets: np.ndarray, axis: int | None
) -> None:
    size, out = outputs.shape[0], outputs[0].size
    full = torch_hessian(theirs, outputs, targets, axis).reshape(size, out, size, out)
    vectors = make_batch_grad_output_fn(ours, "type-2")(outputs, targets)
    v = np.random.default_rng(0).normal(size=outputs.shape)
    product = np.asarray(LossHessian(ours, outputs, targets).mv(v)).reshape(size, out)
    for n in range(size):
        np.testing.assert_allclose(gram(vectors[:, n]), full[n, :, n], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(product[n], full[n, :, n] @ v[n].ravel(), rtol=1e-11, atol=1e-12)
    one = torch_hessian(theirs, outputs[:1], targets[:1], axis).reshape(out, out)
    np.testing.assert_allclose(
        gram(make_grad_output_fn(ours, "type-2")(outputs[0], targets[0])), one, rtol=1e-11, atol=1e-12
    )


@FEW
@given(cross_entropies())
@pytest.mark.sweep
def test_cross_entropy(case: tuple[Any, ...]) -> None:
    check(*case)


@FEW
@given(shapes, st.data())
@pytest.mark.sweep
def test_binary_cross_entropy_and_broadcasting(shape: tuple[int, ...], data: Any) -> None:
    size = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    options = {}
    for name in ("weight", "pos_weight"):
        if data.draw(st.booleans()):
            # Any suffix of the example's shape, each axis kept or of length 1.
            suffix = shape[data.draw(st.integers(0, len(shape))) :]
            options[name] = rng.uniform(0, 3, size=[data.draw(st.sampled_from([1, n])) for n in suffix])
    reduction = data.draw(reductions)
    ours = ggn_jax.BCEWithLogitsLoss(**options, reduction=reduction)
    theirs = torch.nn.BCEWithLogitsLoss(**{k: torch.from_numpy(v) for k, v in options.items()}, reduction=reduction)
    check(ours, theirs, rng.normal(size=(size, *shape)) * 5, rng.uniform(size=(size, *shape)), None)


@FEW
@given(shapes, reductions, st.integers(1, 3))
def test_squared_error(shape: tuple[int, ...], reduction: str, size: int) -> None:
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(2, size, *shape))
    check(ggn_jax.MSELoss(reduction=reduction), torch.nn.MSELoss(reduction=reduction), outputs, targets, None)


@FEW
@given(
    st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    st.sampled_from(["type-2", "mc", "empirical", "forward-only"]),
    cross_entropies(),
    st.booleans(),
)
@pytest.mark.sweep
def test_results_have_the_outputs_dtype_and_shape(dtype: str, kind: str, case: tuple[Any, ...], batch: bool) -> None:
    loss, _, outputs, targets, _ = case
    f = jax.numpy.asarray(outputs, dtype)
    args = (f, targets) if batch else (f[0], targets[0])
    make = make_batch_grad_output_fn if batch else make_grad_output_fn
    vectors = make(loss, kind, 3)(*args, jax.random.key(0))
    num = {"type-2": f[0].size, "mc": 3, "empirical": 1, "forward-only": 0}[kind]
    assert (vectors.dtype, vectors.shape) == (f.dtype, (num, *args[0].shape))
    assert np.isfinite(np.asarray(vectors, np.float64)).all()
