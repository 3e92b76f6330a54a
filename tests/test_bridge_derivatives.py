"""Derivatives of the façade: those in the outputs, and those that are refused."""

from typing import Any

import pytest
import torch
from facade_cases import batch
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from torch.utils.checkpoint import checkpoint

import torch_bridge


@pytest.mark.parametrize(
    "wrap",
    [
        lambda of: functionalize(grad(of)),
        lambda of: grad(functionalize(of)),
        lambda of: grad(lambda f: functionalize(lambda s: s * of(f))(torch.tensor(1.0))),
        lambda of: lambda f: jvp(functionalize(of), (f,), (f,)),
        lambda of: lambda f: functionalize(of)(f.clone().requires_grad_()),
    ],
)
def test_functionalized_derivatives_raise(wrap: Any) -> None:
    fn = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "type-2")
    with pytest.raises(NotImplementedError, match="functionalize"):
        wrap(lambda f: fn(f, LABEL).square().sum())(torch.randn(3))


def native(loss: Any, fisher_type: str) -> Any:
    """An example's vectors in plain, differentiable PyTorch."""

    def fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if fisher_type == "empirical":
            gradient = grad(lambda f: loss(f[None], target[None]))(output)
            return (gradient if isinstance(loss, CrossEntropyLoss) else gradient * output.numel() ** 0.5)[None]
        p = output.softmax(0)
        if isinstance(loss, CrossEntropyLoss):
            return (torch.diag(p.sqrt()) - p[:, None] * p.sqrt()).T
        p = output.sigmoid()
        return torch.diag((p * (1 - p) / output.numel()).sqrt())

    return fn


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("loss", [CrossEntropyLoss(), BCEWithLogitsLoss()], ids=str)
@pytest.mark.by_default("CrossEntropyLoss()-type-2", "BCEWithLogitsLoss()-empirical")
def test_derivatives_in_the_outputs(loss: Any, fisher_type: str) -> None:
    ours, theirs = torch_bridge.make_grad_output_fn(loss, fisher_type), native(loss, fisher_type)
    outputs, targets = batch(loss)
    close = {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(jacrev(ours)(outputs[0], targets[0]), jacrev(theirs)(outputs[0], targets[0]), **close)

    def summed(fn: Any) -> Any:
        return lambda f, y: fn(f, y).sin().sum()

    torch.testing.assert_close(
        vmap(grad(summed(ours)))(outputs, targets), vmap(grad(summed(theirs)))(outputs, targets), **close
    )
    expected = grad(summed(vmap(theirs)))(outputs, targets)
    torch.testing.assert_close(grad(summed(vmap(ours)))(outputs, targets), expected, **close)
    for fn in (vmap(ours), torch.compile(vmap(ours), backend="aot_eager", fullgraph=True)):
        leaf = outputs.clone().requires_grad_()
        summed(fn)(leaf, targets).backward()
        torch.testing.assert_close(leaf.grad, expected, **close)
    traced = make_fx(grad(summed(vmap(ours))), tracing_mode="fake")(outputs, targets)
    torch.testing.assert_close(traced(outputs, targets), expected, **close)


def test_derivative_of_samples() -> None:
    """The label is held fixed: the vector is `p - onehot`, with the derivative of `p`."""
    fn = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "mc")
    output, target = torch.randn(4, dtype=torch.float64), torch.tensor(1)
    jacobian = jacrev(lambda f: fn(f, target, torch.Generator().manual_seed(0))[0])(output)
    p = output.softmax(0)
    torch.testing.assert_close(jacobian, torch.diag(p) - torch.outer(p, p))


FN = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "type-2")
LABEL = torch.tensor(1)


def of_output(output: torch.Tensor) -> torch.Tensor:
    return FN(output, LABEL)


def in_dual_level(fn: Any) -> Any:
    def run(output: torch.Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(fn(forward_ad.make_dual(output, torch.ones_like(output))))

    return run


def through_weight(output: torch.Tensor) -> Any:
    return grad(lambda w: torch_bridge.make_grad_output_fn(CrossEntropyLoss(w), "type-2")(output, LABEL).sum())(
        torch.ones(3)
    )


def backward_through_weight(output: torch.Tensor) -> None:
    weight = torch.ones(3, requires_grad=True)
    torch_bridge.make_grad_output_fn(CrossEntropyLoss(weight), "type-2")(output, LABEL).sum().backward()


def through_target(output: torch.Tensor) -> Any:
    return grad(lambda y: torch_bridge.make_grad_output_fn(MSELoss(), "empirical")(output, y).sum())(output)


def second_backward(output: torch.Tensor) -> None:
    leaf = output.clone().requires_grad_()
    (first,) = torch.autograd.grad(of_output(leaf).square().sum(), leaf, create_graph=True)
    first.sum().backward()


NOT_DIFFERENTIABLE = {
    "jvp": lambda f: jvp(of_output, (f,), (f,)),
    "jacfwd": jacfwd(of_output),
    "hessian": hessian(lambda f: of_output(f).sum()),
    "jvp of vmap": lambda f: jvp(lambda f: vmap(of_output)(f[None]), (f,), (f,)),
    "vmap of jvp": lambda f: vmap(lambda f: jvp(of_output, (f,), (f,)))(f[None]),
    "a constant of grad in jvp": lambda f: jvp(
        lambda f: grad(lambda s: s * of_output(f).sum())(torch.tensor(1.0)), (f,), (f,)
    ),
    "dual": in_dual_level(of_output),
    "dual under vmap": in_dual_level(lambda f: vmap(of_output)(f[None])),
    "weight": through_weight,
    "backward to weight": backward_through_weight,
    "target": through_target,
    "second backward": second_backward,
    "grad of grad": lambda f: grad(lambda f: grad(lambda f: of_output(f).square().sum())(f).sum())(f),
}


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_other_derivatives_raise(name: str) -> None:
    with pytest.raises(NotImplementedError, match="differentia"):
        NOT_DIFFERENTIABLE[name](torch.randn(3))


def test_checkpointing() -> None:
    """Saved tensors are unpacked once."""
    output = torch.randn(3, dtype=torch.float64)
    expected = grad(lambda f: of_output(f).sin().sum())(output)
    leaf = output.clone().requires_grad_()
    checkpoint(lambda f: of_output(f).sin().sum(), leaf, use_reentrant=False).backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_detached_outputs_are_constants() -> None:
    output = torch.randn(3)
    assert torch.all(grad(lambda f: of_output(f.detach()).sum() + f.sum())(output) == 1)
    assert torch.all(jvp(lambda f: of_output(f.detach()), (output,), (output,))[1] == 0)
    leaf = output.clone().requires_grad_()
    assert not of_output(leaf.detach()).requires_grad
    with torch.no_grad():
        vectors = of_output(leaf)
        vectors.mul_(2)
    assert not vectors.requires_grad
    with torch.inference_mode():
        of_output(output).mul_(2)
