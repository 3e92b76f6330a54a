"""Which losses and arguments `torch_bridge` takes, and what it says of the others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss

import ggn_jax
import torch_bridge
from torch_bridge.unsupported import WAYS_OUT

MAKERS = [
    lambda loss: torch_bridge.make_grad_output_fn(loss, "type-2"),
    lambda loss: torch_bridge.make_batch_grad_output_fn(loss, "type-2"),
    torch_bridge.make_grad_output_sampler,
    lambda loss: torch_bridge.loss_hessian_matrix_sqrt(torch.zeros(3), torch.tensor(1), loss),
]


class FocalLoss(CrossEntropyLoss):
    """What a neighbour takes for cross-entropy."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(output, target) ** 2


class LoggedLoss(CrossEntropyLoss):
    """Cross-entropy all the same."""


class PoissonLoss(torch.nn.Module):
    """`exp(f) - y f`, times a rate per entry."""

    def __init__(self, rates: torch.Tensor | None = None, reduction: str = "mean"):
        super().__init__()
        self.register_buffer("rates", rates)
        self.reduction = reduction

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = output.exp() - target * output
        value = value if self.rates is None else self.rates * value
        return value.mean() if self.reduction == "mean" else value.sum()


class JaxPoissonLoss(ggn_jax.LikelihoodLoss):
    curvature = "hessian"
    rates: Any = None

    def nll(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(f) - y * f

    def sample(self, key: jax.Array, f: jax.Array) -> jax.Array:
        return jax.random.poisson(key, jnp.exp(f)).astype(f.dtype)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (FocalLoss(), ["FocalLoss", "subclass of CrossEntropyLoss", "register_loss"]),
        (torch.nn.HuberLoss(), ["HuberLoss", "CrossEntropyLoss", "register_loss"]),
        (torch.nn.functional.cross_entropy, ["function", "register_loss"]),
        (CrossEntropyLoss, ["type", "register_loss"]),
        (None, ["NoneType"]),
    ],
)
def test_unsupported_losses(make: Any, loss: Any, names: list[str]) -> None:
    with pytest.raises(NotImplementedError, match=r"loss_func must be") as info:
        make(loss)
    assert all(name in str(info.value) for name in names)


NO_ENTRY = {
    "NLLLoss": ["log-probabilities", "pass logits to CrossEntropyLoss"],
    "KLDivLoss": ["log-probabilities", "pass logits to CrossEntropyLoss"],
    "BCELoss": ["probabilities", "BCEWithLogitsLoss"],
    "SoftMarginLoss": ["BCEWithLogitsLoss"],
    "MultiLabelSoftMarginLoss": ["BCEWithLogitsLoss"],
    "PoissonNLLLoss": ["LikelihoodLoss"],
    "GaussianNLLLoss": ["LikelihoodLoss", "MSELoss"],
    "SmoothL1Loss": ["LikelihoodLoss"],
    "HuberLoss": ["LikelihoodLoss"],
    "L1Loss": ["piecewise linear"],
    "MultiMarginLoss": ["CrossEntropyLoss"],
    "CTCLoss": ["alignments"],
    "TripletMarginLoss": ["compares outputs"],
}


@pytest.mark.parametrize("name", NO_ENTRY)
def test_other_losses_of_torch_are_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"got {name}\. About {name}: .*register_loss") as info:
        torch_bridge.make_grad_output_fn(getattr(torch.nn, name)(), "type-2")
    assert all(words in str(info.value) for words in NO_ENTRY[name])


def test_all_losses_of_torch_are_known() -> None:
    """Each is taken, or has a way out."""
    names = {name for name in dir(torch.nn) if name.endswith("Loss")} - {"NLLLoss2d"}  # an alias
    assert names <= {"MSELoss", "CrossEntropyLoss", "BCEWithLogitsLoss", *WAYS_OUT}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("cls", [MSELoss, CrossEntropyLoss, BCEWithLogitsLoss])
def test_no_reduction_is_refused(make: Any, cls: Any) -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'; got 'none'"):
        make(cls(reduction="none"))


CHANGES = {
    "forward": lambda loss: setattr(loss, "forward", lambda output, target: (output - target).sum()),
    "forward hook": lambda loss: loss.register_forward_hook(lambda *args: 3 * args[-1]),
    "forward pre-hook": lambda loss: loss.register_forward_pre_hook(lambda module, args: (2 * args[0], args[1])),
    "backward hook": lambda loss: loss.register_full_backward_hook(lambda *args: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_modules_are_refused(name: str) -> None:
    loss = CrossEntropyLoss()
    fn = torch_bridge.make_grad_output_fn(loss, "type-2")
    CHANGES[name](loss)
    for call in (lambda: fn(X, Y), lambda: torch_bridge.make_grad_output_fn(loss, "mc")):
        with pytest.raises(NotImplementedError, match="hooks, or a forward of its own"):
            call()


GLOBAL_HOOKS = [
    torch.nn.modules.module.register_module_forward_hook,
    torch.nn.modules.module.register_module_forward_pre_hook,
    torch.nn.modules.module.register_module_full_backward_pre_hook,
    torch.nn.modules.module.register_module_full_backward_hook,
]


@pytest.mark.parametrize("register", GLOBAL_HOOKS, ids=lambda register: register.__name__)
def test_hooks_of_all_modules_are_refused(register: Any) -> None:
    loss = CrossEntropyLoss()
    fn = torch_bridge.make_grad_output_fn(loss, "type-2")
    handle = register(lambda *args: None)
    try:
        for call in (lambda: fn(X, Y), lambda: torch_bridge.make_grad_output_fn(loss, "mc")):
            with pytest.raises(NotImplementedError, match="hooks for all modules"):
                call()
    finally:
        handle.remove()
    fn(X, Y)


def test_a_replaced_forward_of_the_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fn = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "type-2")
    with monkeypatch.context() as patch:
        patch.setattr(CrossEntropyLoss, "forward", lambda self, output, target: output.sum())
        for call in (lambda: fn(X, Y), lambda: torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "mc")):
            with pytest.raises(NotImplementedError, match="CrossEntropyLoss, whose forward was replaced"):
                call()
    fn(X, Y)


def test_binary_targets_are_floating() -> None:
    """Torch refuses others in the loss itself."""
    for dtype in (torch.bool, torch.int64):
        with pytest.raises(TypeError, match=rf"target must be floating .*got {dtype}: cast it, target\.to\(output"):
            torch_bridge.make_grad_output_fn(BCEWithLogitsLoss(), "mc")(X, X.to(dtype))
        assert torch_bridge.make_grad_output_fn(MSELoss(), "mc")(X, X.to(dtype)).shape == (1, 3)  # as torch's


def test_no_samples() -> None:
    for loss in (MSELoss(), CrossEntropyLoss(), BCEWithLogitsLoss()):
        sampler = torch_bridge.make_grad_output_sampler(loss)
        generator = torch.Generator().manual_seed(0)
        state = generator.get_state()
        assert sampler(X, 0, Y if isinstance(loss, CrossEntropyLoss) else X, generator).shape == (0, 3)
        assert torch.equal(generator.get_state(), state)


def test_options_from_numpy() -> None:
    loss = CrossEntropyLoss(label_smoothing=np.float64(0.5), ignore_index=np.int64(-1))
    plain = CrossEntropyLoss(label_smoothing=0.5, ignore_index=-1)
    ours, expected = (torch_bridge.make_grad_output_fn(each, "empirical")(X, Y) for each in (loss, plain))
    assert torch.equal(ours, expected)


def test_legacy_arguments_of_torch() -> None:
    with pytest.warns(UserWarning, match="size_average"):
        loss = MSELoss(size_average=False)
    vectors = torch_bridge.make_grad_output_fn(loss, "type-2")(torch.zeros(2), torch.zeros(2))
    torch.testing.assert_close(vectors, 2**0.5 * torch.eye(2))


@pytest.mark.parametrize("fisher_type", ["type2", "MC", "", 2, None, True])
def test_bad_fisher_types(fisher_type: Any) -> None:
    for make in (torch_bridge.make_grad_output_fn, torch_bridge.make_batch_grad_output_fn):
        with pytest.raises(ValueError, match="fisher_type must be one of 'type-2', 'mc'"):
            make(MSELoss(), fisher_type)


@pytest.mark.parametrize(
    ("mc_samples", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_bad_numbers_of_samples(mc_samples: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="mc_samples must be an integer of at least 1"):
        torch_bridge.make_grad_output_fn(MSELoss(), "mc", mc_samples)
    if mc_samples == 0 and error is ValueError:
        return  # of the sampler, as in curvlinops, no draws
    with pytest.raises(error, match="num_samples must be an integer of at least 0"):
        torch_bridge.make_grad_output_sampler(MSELoss())(torch.zeros(2), mc_samples, torch.zeros(2))


@pytest.mark.parametrize("make", [torch_bridge.make_grad_output_fn, torch_bridge.make_batch_grad_output_fn])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
def test_numbers_of_samples_that_are_not_used(make: Any, fisher_type: str) -> None:
    """Callers that choose between exact and drawn vectors pass 0 for the exact ones, as in curvlinops' GGN."""
    outputs, targets = torch.zeros(2, 3), torch.ones(2, 3)
    for unused in (0, -1, None):
        assert torch.equal(
            make(MSELoss(), fisher_type, unused)(outputs, targets), make(MSELoss(), fisher_type)(outputs, targets)
        )


X, Y = torch.zeros(3), torch.tensor(1)
BAD_CALLS = [
    (CrossEntropyLoss(), ([0.0], Y), TypeError, "output must be a torch.Tensor; got list"),
    (CrossEntropyLoss(), (X, 1), TypeError, "target must be a torch.Tensor; got int"),
    (CrossEntropyLoss(), (X, Y, 0), TypeError, "generator must be a torch.Generator or None; got int"),
    (CrossEntropyLoss(), (X.long(), Y), TypeError, "output must be floating; got torch.int64"),
    (CrossEntropyLoss(), (X.to(torch.complex64), Y), TypeError, "output must be floating; got torch.complex64"),
    (CrossEntropyLoss(), (X, torch.tensor(3)), ValueError, "class indices from 0 to 2 .*got 3"),
    (CrossEntropyLoss(), (X, torch.tensor(-1)), ValueError, "class indices from 0 to 2 .*got -1"),
    (CrossEntropyLoss(), (X, torch.tensor([0, 1])), ValueError, r"targets must have shape \(\).*got \(2,\)"),
    (CrossEntropyLoss(), (torch.tensor(0.0), Y), ValueError, "outputs must have a class axis"),
    (CrossEntropyLoss(weight=torch.ones(4)), (X, Y), ValueError, "weight has 4 class weights"),
    (CrossEntropyLoss(weight=-torch.ones(3)), (X, Y), ValueError, "weight must be finite and not negative"),
    (MSELoss(), (X, torch.zeros(1)), ValueError, r"targets must have the outputs' shape \(3,\).*got \(1,\)"),
    (BCEWithLogitsLoss(), (X, torch.tensor([0.0, 2, 1])), ValueError, "targets must be between 0 and 1; got 2"),
    (BCEWithLogitsLoss(weight=torch.ones(5, 3)), (X, X), ValueError, "weight of shape .*make_batch_grad_output_fn"),
]


@pytest.mark.parametrize(("loss", "args", "error", "message"), BAD_CALLS, ids=[case[3] for case in BAD_CALLS])
def test_bad_calls(loss: Any, args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch_bridge.make_grad_output_fn(loss, "mc")(*args)


def test_bad_targets_in_a_batch_are_found() -> None:
    outputs, targets = torch.zeros(4, 3), torch.tensor([0, 1, 7, 2])
    fn = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "type-2")
    for call in (torch.func.vmap(fn), torch_bridge.make_batch_grad_output_fn(CrossEntropyLoss(), "type-2")):
        with pytest.raises(ValueError, match=r"class indices from 0 to 2 .*got 7"):
            call(outputs, targets)


def test_everything_ignored() -> None:
    fn = torch_bridge.make_batch_grad_output_fn(CrossEntropyLoss(ignore_index=-1), "type-2")
    assert torch.equal(fn(torch.zeros(2, 3), torch.tensor([-1, -1])), torch.zeros(3, 2, 3))


# register_loss


def test_registering_a_subclass_as_its_base() -> None:
    with pytest.raises(NotImplementedError, match="LoggedLoss"):
        torch_bridge.make_grad_output_fn(LoggedLoss(), "type-2")
    torch_bridge.register_loss(LoggedLoss, CrossEntropyLoss)
    weight = torch.tensor([1.0, 2, 3])
    ours = torch_bridge.make_grad_output_fn(LoggedLoss(weight, label_smoothing=0.1), "type-2")(X, Y)
    assert torch.equal(
        ours, torch_bridge.make_grad_output_fn(CrossEntropyLoss(weight, label_smoothing=0.1), "type-2")(X, Y)
    )


def test_registering_a_loss_of_ones_own() -> None:
    class Weighted(JaxPoissonLoss):
        def term_weight(self, f: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.ones_like(f) if self.rates is None else jnp.full_like(f, self.rates)

    torch_bridge.register_loss(PoissonLoss, Weighted, tensors=("rates",), options=("reduction",))
    output, target = torch.randn(3, dtype=torch.float64), torch.tensor([0.0, 1, 2]).double()
    for loss in (PoissonLoss(), PoissonLoss(reduction="sum"), PoissonLoss(torch.tensor(2.0).double())):
        root = torch_bridge.loss_hessian_matrix_sqrt(output, target, loss)
        hessian = torch.func.hessian(lambda f, loss=loss: loss(f[None], target[None]))(output)
        torch.testing.assert_close(root @ root.T, hessian, rtol=0, atol=1e-14)


def test_classes_of_one_name_are_not_confused() -> None:
    def make(factor: float) -> type[torch.nn.Module]:
        class Local(torch.nn.Module):
            pass

        class Jax(JaxPoissonLoss):
            def nll(self, f: jax.Array, y: jax.Array) -> jax.Array:
                return factor * jnp.exp(f) - y * f

        torch_bridge.register_loss(Local, Jax)
        return Local

    first, second = make(1.0), make(4.0)
    target = torch.zeros(2)
    torch.testing.assert_close(torch_bridge.loss_hessian_matrix_sqrt(target, target, first())[0, 0].item(), 0.5**0.5)
    torch.testing.assert_close(torch_bridge.loss_hessian_matrix_sqrt(target, target, second())[0, 0].item(), 2**0.5)


def test_registering_again() -> None:
    """Nothing compiled for the first entry is used for the second."""

    class Changed(torch.nn.Module):
        pass

    target = torch.zeros(2)
    torch_bridge.register_loss(Changed, lambda: ggn_jax.MSELoss(reduction="mean"))
    first = torch_bridge.make_grad_output_fn(Changed(), "type-2")(target, target)
    torch_bridge.register_loss(Changed, lambda: ggn_jax.MSELoss(reduction="sum"))
    second = torch_bridge.make_grad_output_fn(Changed(), "type-2")(target, target)
    torch.testing.assert_close(second, first * 2**0.5)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((3, MSELoss), {}, TypeError, "cls must be a class"),
        ((FocalLoss, FocalLoss), {}, ValueError, "must be a class that is registered"),
        ((FocalLoss, CrossEntropyLoss), {"options": ("reduction",)}, ValueError, "leave them out"),
        ((FocalLoss, 3), {}, TypeError, "convert must be a function"),
        ((FocalLoss, JaxPoissonLoss), {"tensors": "weight"}, TypeError, "tensors must be a sequence"),
    ],
)
def test_bad_registrations(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch_bridge.register_loss(*args, **kwargs)
    with pytest.raises(NotImplementedError):
        torch_bridge.make_grad_output_fn(FocalLoss(), "mc")


def test_a_registration_that_returns_no_loss() -> None:
    class Wrong(torch.nn.Module):
        option = object()

    torch_bridge.register_loss(Wrong, lambda: 3)
    with pytest.raises(TypeError, match="must return a ggn_jax loss; got 3"):
        torch_bridge.make_grad_output_fn(Wrong(), "mc")
    torch_bridge.register_loss(Wrong, JaxPoissonLoss, options=("option",))
    with pytest.raises(TypeError, match="options must be Python literals"):
        torch_bridge.make_grad_output_fn(Wrong(), "mc")


@pytest.mark.parametrize("indices", [True, False])
def test_classes_are_on_torchs_axis_where_shapes_leave_it_open(indices: bool) -> None:
    """`ggn_jax` refuses these shapes without a class axis; torch's is the first."""
    outputs = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 2, 1], [1, 1, 0]]) if indices else outputs.softmax(2)
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    gradient = torch_bridge.make_batch_grad_output_fn(loss, "empirical")(outputs, targets)[0]
    wanted = torch.func.grad(lambda f: loss(f, targets))(outputs)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
