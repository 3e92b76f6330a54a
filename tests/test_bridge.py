"""`torch_bridge` against PyTorch's own losses: autodiff Hessians of every option, and curvlinops."""

import copy
import pickle
from typing import Any

import cases
import curvlinops
import numpy as np
import pytest
import torch
from cases import Case
from curvlinops.kfac_utils import loss_hessian_matrix_sqrt as curvlinops_sqrt
from designs import cover, covering
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss

import ggn_jax
import torch_bridge

N = cases.N
# Torch has the classes first only. Each value of each option: pairs of them are the same JAX as in `test_vectors.py`.
NAMES = [tuple(case.name.split("-")) for case in cases.CASES if not case.name.endswith("-last")]
EACH = {"-".join(name) for kind in ("mse", "bce", "ce") for name in cover([x for x in NAMES if x[0] == kind], 1)}
ALL = cases.params(lambda case: not case.name.endswith("-last"), EACH)
PER_DATUM = cases.params(lambda case: not (case.batched_only or case.name.endswith("-last")), EACH)


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(case.outputs), torch.from_numpy(np.asarray(case.targets))


def gram(vectors: torch.Tensor) -> np.ndarray:
    """`sum_v v v^T` of each example, `[N, K, K]`, from `[V, N, *out]`."""
    flat = vectors.reshape(*vectors.shape[:2], -1)
    return torch.einsum("vni,vnj->nij", flat, flat).numpy()


def vmapped(fn: Any, randomness: str = "error") -> Any:
    return torch.func.vmap(fn, in_dims=(0, 0, None), out_dims=1, randomness=randomness)


@pytest.mark.parametrize("case", PER_DATUM)
def test_type2_of_one_datum(case: Case) -> None:
    outputs, targets = tensors(case)
    vectors = vmapped(torch_bridge.make_grad_output_fn(case.torch_loss, "type-2"))(outputs, targets, None)
    assert vectors.dtype == outputs.dtype
    assert vectors.is_contiguous()
    size = case.outputs[0].size
    hessians = [case.torch_hessian(case.outputs[n : n + 1], case.targets[n : n + 1]) for n in range(N)]
    np.testing.assert_allclose(gram(vectors), np.reshape(hessians, (N, size, size)), atol=1e-12)


@pytest.mark.parametrize("case", ALL)
def test_type2_of_a_batch(case: Case) -> None:
    outputs, targets = tensors(case)
    vectors = torch_bridge.make_batch_grad_output_fn(case.torch_loss, "type-2")(outputs, targets)
    assert vectors.is_contiguous()
    np.testing.assert_allclose(gram(vectors), cases.torch_blocks(case), atol=1e-12)


@pytest.mark.parametrize("case", ALL)
def test_empirical_of_a_batch(case: Case) -> None:
    outputs, targets = tensors(case)
    vectors = torch_bridge.make_batch_grad_output_fn(case.torch_loss, "empirical")(outputs, targets)
    assert vectors.shape == (1, *outputs.shape)
    summed = copy.deepcopy(case.torch_loss)
    summed.reduction = "sum"
    gradient = Case(case.name, case.loss, summed, case.outputs, case.targets).torch_gradient(case.outputs, case.targets)
    # gradient of the reduced loss = r * gradient of the summed one, and the vector is sqrt(r) times the latter.
    reduced = case.torch_gradient(case.outputs, case.targets)
    np.testing.assert_allclose(vectors[0].numpy() ** 2, reduced * gradient, atol=1e-12)
    assert np.all(np.sign(vectors[0].numpy()) * gradient >= 0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [MSELoss, CrossEntropyLoss, BCEWithLogitsLoss])
def test_empirical_of_one_datum(loss: Any, reduction: str) -> None:
    """Without weights, sqrt(number of terms) times the gradient of the mean: curvlinops' vector."""
    torch.manual_seed(0)
    output = torch.randn(5, dtype=torch.float64)
    target = torch.tensor(3) if loss is CrossEntropyLoss else torch.rand(5, dtype=torch.float64)
    module = loss(reduction=reduction)
    gradient = torch.func.grad(lambda f: module(f[None], target[None]))(output)
    if reduction == "mean" and loss is not CrossEntropyLoss:
        gradient = gradient * 5**0.5
    vectors = torch_bridge.make_grad_output_fn(module, torch_bridge.FisherType.EMPIRICAL)(output, target)
    torch.testing.assert_close(vectors, gradient[None], rtol=0, atol=1e-14)


MONTE_CARLO = [
    (CrossEntropyLoss(), (4,)),
    (CrossEntropyLoss(weight=torch.tensor([0.5, 1, 2], dtype=torch.float64), label_smoothing=0.2), (3, 2)),
    (MSELoss(), (3,)),
    (BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 1, 2], dtype=torch.float64)), (3,)),
    (BCEWithLogitsLoss(), ()),
]


@pytest.mark.parametrize(("loss", "shape"), MONTE_CARLO, ids=[f"{x}-{y}" for x, y in MONTE_CARLO])
@pytest.mark.by_default("CrossEntropyLoss()-(3, 2)", "BCEWithLogitsLoss()-()", "MSELoss()-(3,)")
def test_monte_carlo(loss: Any, shape: tuple[int, ...]) -> None:
    """Means of outer products, against their variance: every entry's z-score; bounded for all at once by 5.5."""
    torch.manual_seed(1)
    output = torch.randn(shape, dtype=torch.float64)
    is_ce = isinstance(loss, CrossEntropyLoss)
    target = torch.randint(3, shape[1:]) if is_ce else torch.rand(shape, dtype=torch.float64)
    hessian = torch.func.hessian(lambda f: loss(f.reshape(1, *shape), target[None]))(output.flatten())
    size, samples = output.numel(), 40_000
    sampler = torch_bridge.make_grad_output_sampler(loss)
    drawn = sampler(output, samples, target, torch.Generator().manual_seed(0))
    assert drawn.shape == (samples, *shape)
    products = torch.einsum("si,sj->sij", drawn.reshape(samples, size), drawn.reshape(samples, size))
    error = products.mean(0) - hessian
    deviation = products.std(0) / samples**0.5
    assert torch.all(error.abs() <= 5.5 * deviation + 1e-12)
    # The vectors are the same draws, divided.
    vectors = torch_bridge.make_grad_output_fn(loss, "mc", samples)(output, target, torch.Generator().manual_seed(0))
    torch.testing.assert_close(vectors * samples**0.5, drawn, rtol=1e-13, atol=1e-13)


def test_monte_carlo_of_a_batch() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, -1, 2, 1, 0])
    loss = CrossEntropyLoss(weight=torch.tensor([0.5, 1, 2]).double(), ignore_index=-1)
    hessian = torch.autograd.functional.hessian(lambda f: loss(f, targets), outputs)
    samples = 20_000
    vectors = torch_bridge.make_batch_grad_output_fn(loss, "mc", samples)(outputs, targets) * samples**0.5
    products = torch.einsum("sni,snj->snij", vectors, vectors)
    error = products.mean(0) - torch.stack([hessian[n, :, n] for n in range(6)])
    assert torch.all(error.abs() <= 5.5 * products.std(0) / samples**0.5 + 1e-12)
    assert torch.all(vectors[:, 2] == 0)
    # Data are independent: the products of two of them have mean 0.
    cross = torch.einsum("si,sj->sij", vectors[:, 0], vectors[:, 5])
    assert torch.all(cross.mean(0).abs() <= 5.5 * cross.std(0) / samples**0.5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [MSELoss, CrossEntropyLoss, BCEWithLogitsLoss])
def test_square_root_is_that_of_curvlinops(loss: Any, reduction: str) -> None:
    """Up to the sign of zero and the order of columns there is one such root with this structure."""
    torch.manual_seed(0)
    output = torch.randn(4, dtype=torch.float64)
    target = torch.tensor(3) if loss is CrossEntropyLoss else torch.tensor([0.0, 1, 1, 0]).double()
    module = loss(reduction=reduction)
    ours = torch_bridge.loss_hessian_matrix_sqrt(output, target, module)
    theirs = curvlinops_sqrt(output[None], target[None], module)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    ours.mul_(2)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2)])
@pytest.mark.parametrize("loss", [MSELoss(), CrossEntropyLoss(), BCEWithLogitsLoss()])
def test_square_root_of_sequences(loss: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    output = torch.randn(shape, dtype=torch.float64)
    is_ce = isinstance(loss, CrossEntropyLoss)
    target = torch.randint(3, shape[1:]) if is_ce else torch.rand(shape, dtype=torch.float64)
    root = torch_bridge.loss_hessian_matrix_sqrt(output_one_datum=output, target_one_datum=target, loss_func=loss)
    assert root.shape == (*shape, *shape)
    assert root.is_contiguous()
    matrix = root.reshape(output.numel(), -1)
    hessian = torch.func.hessian(lambda f: loss(f.reshape(1, *shape), target[None]))(output.flatten())
    torch.testing.assert_close(matrix @ matrix.T, hessian, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fisher_type", curvlinops.FisherType, ids=lambda t: t.value)
def test_fisher_types_of_curvlinops(fisher_type: Any) -> None:
    output, target = torch.zeros(3), torch.tensor(1)
    fn = torch_bridge.make_grad_output_fn(loss_func=CrossEntropyLoss(), fisher_type=fisher_type, mc_samples=2)
    ours = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), fisher_type.value, 2)
    vectors = fn(output=output, target=target, generator=torch.Generator().manual_seed(0))
    assert vectors.shape == ({"type-2": 3, "mc": 2, "empirical": 1, "forward-only": 0}[fisher_type.value], 3)
    torch.testing.assert_close(vectors, ours(output, target, torch.Generator().manual_seed(0)), rtol=0, atol=0)


def test_one_enumeration() -> None:
    assert torch_bridge.FisherType is ggn_jax.FisherType


def test_forward_only_never_looks_at_the_target() -> None:
    fn = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "forward-only")
    assert fn(torch.zeros(3), None).shape == (0, 3)
    batched = vmapped(fn)(torch.zeros(5, 3), torch.full((5,), 99), None)
    assert batched.shape == (0, 5, 3)
    batched.mul_(2)


@covering(
    1, dtype=[torch.float16, torch.bfloat16, torch.float32, torch.float64], fisher_type=["type-2", "mc", "empirical"]
)
def test_dtypes(dtype: torch.dtype, fisher_type: str) -> None:
    """Half precision is float32, rounded once."""
    torch.manual_seed(0)
    outputs, targets = (3 * torch.randn(4, 3)).to(dtype), torch.tensor([0, 1, 2, 1])
    fn = torch_bridge.make_batch_grad_output_fn(CrossEntropyLoss(), fisher_type, 3)
    vectors = fn(outputs, targets, torch.Generator().manual_seed(0))
    assert vectors.dtype == dtype
    wide = fn(outputs.to(torch.promote_types(dtype, torch.float32)), targets, torch.Generator().manual_seed(0))
    torch.testing.assert_close(vectors, wide.to(dtype), rtol=0, atol=0)


HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)
NEARLY = 1 + 1e-9 * torch.tensor([1, -1], dtype=torch.float64)
PROMOTED = {
    "MSE, targets": (MSELoss(), 1e4, 1e4 + 1e-4 * NEARLY),
    "BCE, targets": (BCEWithLogitsLoss(), 0.0, HALF * NEARLY),
    "BCE, positive weight": (BCEWithLogitsLoss(pos_weight=NEARLY), 0.0, HALF.float()),
    "BCE, weight": (BCEWithLogitsLoss(NEARLY), 0.0, HALF * NEARLY),
    "CE, targets": (CrossEntropyLoss(), 0.0, HALF * NEARLY),
    "CE, class weights": (CrossEntropyLoss(NEARLY, label_smoothing=0.5), 0.0, HALF.float()),
}


@covering(1, dtype=[torch.float16, torch.bfloat16, torch.float32], name=PROMOTED)
def test_promotion_is_torchs(name: str, dtype: torch.dtype) -> None:
    """Beside float64, narrow outputs are computed with in float64: all digits of the gradients here depend on it."""
    loss, output, target = PROMOTED[name]
    outputs, targets = torch.full((1, 2), output, dtype=dtype), target[None]
    leaf = outputs.double().requires_grad_()
    copy.deepcopy(loss).double()(leaf, targets.double()).backward()
    assert leaf.grad is not None
    scale = 1 if isinstance(loss, CrossEntropyLoss) else 2**0.5  # the vector is sqrt(r) times the sum's gradient
    for fn in (
        vmapped(torch_bridge.make_grad_output_fn(loss, "empirical")),
        torch_bridge.make_batch_grad_output_fn(loss, "empirical"),
    ):
        vectors = fn(outputs, targets, None)
        assert vectors.dtype == dtype
        rounded = (scale * leaf.grad).to(dtype)
        torch.testing.assert_close(vectors[0], rounded, rtol=torch.finfo(dtype).eps, atol=0)


def test_promotion_of_scalars_and_domains() -> None:
    """As in torch, a tensor without axes promotes nothing; targets are looked at before they are rounded."""
    loss = BCEWithLogitsLoss(pos_weight=torch.tensor(1 + 1e-9, dtype=torch.float64))
    outputs = torch.zeros(1, 2)
    assert torch.all(torch_bridge.make_batch_grad_output_fn(loss, "empirical")(outputs, outputs + 0.5) == 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        torch_bridge.make_batch_grad_output_fn(BCEWithLogitsLoss(), "type-2")(outputs, (1 + 1e-12) * (HALF + 0.5)[None])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_class_indices_of_every_width(dtype: torch.dtype) -> None:
    outputs, targets = torch.eye(3, dtype=torch.float64), torch.tensor([2, 0, 1])
    fn = torch_bridge.make_batch_grad_output_fn(CrossEntropyLoss(), "empirical")
    assert torch.equal(fn(outputs, targets.to(dtype)), fn(outputs, targets))


def test_confident_logits_keep_their_curvature() -> None:
    """The textbook `p (1 - p)` is exactly 0 in bfloat16 from a logit of 6.25 on."""
    logit = torch.tensor([8.0], dtype=torch.bfloat16)
    root = torch_bridge.loss_hessian_matrix_sqrt(logit, torch.ones(1, dtype=torch.bfloat16), BCEWithLogitsLoss())
    exact = (logit.double().sigmoid() * (-logit.double()).sigmoid()).sqrt()
    torch.testing.assert_close(root[0].double(), exact, rtol=2**-8, atol=0)


def test_functions_can_be_pickled_and_copied() -> None:
    loss = CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    outputs, targets = torch.zeros(2, 3), torch.tensor([1, 2])
    functions = [
        (torch_bridge.make_grad_output_fn(loss, "mc", 4), (outputs[0], targets[0])),
        (torch_bridge.make_batch_grad_output_fn(loss, "type-2"), (outputs, targets)),
        (torch_bridge.make_grad_output_sampler(loss), (outputs[0], 4, targets[0])),
    ]
    for fn, args in functions:
        for again in (pickle.loads(pickle.dumps(fn)), copy.deepcopy(fn)):
            expected = fn(*args, generator=torch.Generator().manual_seed(0))
            assert torch.equal(again(*args, generator=torch.Generator().manual_seed(0)), expected)
    own, shared = copy.deepcopy(functions[1][0]), copy.copy(functions[1][0])
    before = own(outputs, targets)
    loss.reduction = "sum"  # a deep copy has a loss of its own
    assert torch.equal(own(outputs, targets), before)
    assert not torch.equal(shared(outputs, targets), before)


def test_options_are_read_at_each_call() -> None:
    loss = CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    fn = torch_bridge.make_grad_output_fn(loss, "empirical")
    output, target = torch.zeros(3), torch.tensor(1)
    before = fn(output, target)
    loss.weight.mul_(4)
    loss.reduction = "sum"
    # The mean divides by the weight's sum: sqrt(1 / 2) of a gradient of weight 2, then 1 of weight 8.
    torch.testing.assert_close(fn(output, target), before * 8 / (2 / 2**0.5))


def test_reduction_of_the_batch_is_not_that_of_each_datum() -> None:
    loss = CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    outputs, targets = torch.zeros(2, 3), torch.tensor([0, 2])
    per_datum = gram(vmapped(torch_bridge.make_grad_output_fn(loss, "type-2"))(outputs, targets, None))
    batch = gram(torch_bridge.make_batch_grad_output_fn(loss, "type-2")(outputs, targets))
    np.testing.assert_allclose(batch[0], per_datum[0] / 4, rtol=1e-6)
    np.testing.assert_allclose(batch[1], per_datum[1] * 3 / 4, rtol=1e-6)
