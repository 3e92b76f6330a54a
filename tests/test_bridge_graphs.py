"""The façade in graphs: make_fx, functionalize, compile and export."""

import itertools
import os
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from designs import covering
from facade_cases import TYPES, as_curvlinops, batch, seeded
from torch.func import functionalize, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import CrossEntropyLoss, MSELoss

import torch_bridge
from torch_bridge._compute import Request
from torch_bridge._compute import vectors as compute

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # as many processes as cores take longer to start

BACKENDS = ["eager", "inductor", "aot_eager"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@covering(1, fisher_type=TYPES, mode=["real", "fake", "symbolic"])
@pytest.mark.by_default("mc-fake", "empirical-symbolic", "forward-only-real")
def test_make_fx(mode: str, fisher_type: str) -> None:
    loss = CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double())
    outputs, targets = batch(loss)
    fn = as_curvlinops(loss, fisher_type, 2)

    def scaled(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        vectors = fn(outputs.detach(), targets, None)
        vectors.mul_(3)
        return vectors

    # Traced with fake tensors, nothing may be looked at that is not an input.
    weight = loss.weight
    graph = make_fx(
        lambda outputs, targets, weight: (setattr(loss, "weight", weight), scaled(outputs, targets))[1],
        tracing_mode=mode,
    )(outputs, targets, weight)
    loss.weight = weight
    other, labels = batch(loss, 7) if mode == "symbolic" else (outputs + 1, targets.flip(0))
    expected = seeded(scaled, other, labels)
    torch.testing.assert_close(seeded(graph, other, labels, weight), expected, rtol=0, atol=0)
    if fisher_type == "mc":
        assert not torch.equal(graph(other, labels, weight), expected), "drawn once and for all"


def doubled(fn: Any, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return fn(outputs, targets, None).mul_(2)


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.by_default("mc", "forward-only")
def test_functionalize(fisher_type: str) -> None:
    loss = CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double())
    outputs, targets = batch(loss)
    for fn in (as_curvlinops(loss, fisher_type, 2), torch_bridge.make_batch_grad_output_fn(loss, fisher_type, 2)):
        expected = seeded(fn, outputs, targets, None)
        mutating = functionalize(partial(doubled, fn))
        assert torch.equal(seeded(mutating, outputs, targets), 2 * expected)
        assert torch.equal(seeded(make_fx(mutating)(outputs, targets), outputs, targets), 2 * expected)


def test_make_fx_of_defaults_and_keywords() -> None:
    fn = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "type-2")
    outputs, targets = batch(CrossEntropyLoss())
    for function, args in ((fn, (outputs[0], targets[0])), (vmap(fn), (outputs, targets))):
        assert torch.equal(make_fx(function)(*args)(*args), function(*args))
    graph = make_fx(lambda f, y: fn(target=y, output=f))(outputs[0], targets[0])
    assert torch.equal(graph(outputs[1], targets[1]), fn(outputs[1], targets[1]))


def assert_would_be_gradients(drawn: torch.Tensor, loss: Any, outputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Each is `sqrt(a) (p - onehot(k))` for some class k, `a` the weight of the example's term over its count."""
    e, weight = loss.label_smoothing, loss.weight
    scale = (((1 - e) * weight[targets] + e * weight.mean()) / weight[targets]).sqrt()
    labels = outputs.softmax(1) - drawn / scale[:, None]
    expected = torch.nn.functional.one_hot(labels.argmax(2), 3).double()
    torch.testing.assert_close(labels, expected, rtol=0, atol=1e-14)


@covering(1, fisher_type=TYPES, backend=BACKENDS)
@pytest.mark.by_default("empirical-aot_eager", "mc-inductor", "forward-only-eager")
def test_compile(fisher_type: str, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles C++, and there is no g++")
    loss = CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double(), label_smoothing=0.1)
    fn = as_curvlinops(loss, fisher_type, 2)

    def run(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.normal(outputs[:1, 0].detach() * 0, 1.0)
        return drawn, fn(outputs, targets, None) * 2

    # The second size makes it dynamic; inductor's C++ takes seconds for each.
    dynamic = True if backend == "inductor" else None
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=dynamic)
    for size in (5, 6, 7):
        outputs, targets = batch(loss, size)
        drawn, vectors = seeded(compiled, outputs, targets)
        wanted, expected = seeded(run, outputs, targets)
        # Compiled graphs draw what torch itself draws, but inductor's do not from torch 2.14 on.
        if fisher_type != "mc" or torch.equal(drawn, wanted):
            torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-15)
        else:
            assert torch.equal(vectors, seeded(compiled, outputs, targets)[1])
            assert not torch.equal(vectors, compiled(outputs, targets)[1])
            assert_would_be_gradients(vectors * 2**0.5 / 2, loss, outputs, targets)


@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.by_default("True", "None")
def test_compile_follows_the_options(dynamic: bool | None) -> None:
    loss = CrossEntropyLoss(label_smoothing=0.1)
    fn = torch_bridge.make_batch_grad_output_fn(loss, "empirical")
    compiled = torch.compile(lambda f, y: fn(f, y), backend="eager", fullgraph=True, dynamic=dynamic)
    for change in ({}, {"label_smoothing": 0.2}, {"label_smoothing": 0.3, "ignore_index": 1}, {"reduction": "sum"}):
        vars(loss).update(change)
        outputs, targets = batch(loss)
        torch.testing.assert_close(compiled(outputs, targets), fn(outputs, targets), rtol=0, atol=0)


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.by_default("type-2", "forward-only")
def test_compile_of_everything(fisher_type: str) -> None:
    """Also the making of the function is traced, as it is where an operator makes it at its first product."""
    loss = CrossEntropyLoss(label_smoothing=0.1)

    def product(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        fn = torch_bridge.make_grad_output_fn(loss, fisher_type, 2)
        vectors = vmap(fn, in_dims=(0, 0, None), randomness="different")(outputs.detach(), targets, None)
        return vectors.square().sum()

    outputs, targets = batch(loss)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    torch.testing.assert_close(seeded(compiled, outputs, targets), seeded(product, outputs, targets))


@pytest.mark.sweep
def test_losses_made_in_a_compiled_region() -> None:
    def vectors(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = MSELoss(reduction="sum") if targets.is_floating_point() else CrossEntropyLoss()
        return torch_bridge.make_batch_grad_output_fn(loss, "empirical")(outputs, targets)

    outputs, targets = batch(MSELoss())
    compiled = torch.compile(vectors, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(outputs, targets), 2 * (outputs - targets)[None])
    # Torch replaces this one by a function while it traces.
    with pytest.raises(RuntimeError, match="make it outside of it"):
        compiled(*batch(CrossEntropyLoss()))


def test_compile_sees_hooks_of_all_modules() -> None:
    """Those of one module it sees while it traces only: torch does not guard them."""
    loss = CrossEntropyLoss()
    fn = torch_bridge.make_batch_grad_output_fn(loss, "empirical")
    compiled = torch.compile(lambda f, y: fn(f, y), backend="eager")
    args = batch(loss)
    compiled(*args)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(NotImplementedError, match="hooks for all modules"):
            compiled(*args)
    finally:
        handle.remove()
    compiled(*args)


def pseudo_loss_product(fn: Any, outputs: torch.Tensor, targets: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A product with a Hessian, by differentiating a pseudo-loss twice, as curvlinops does for its MC-GGN."""

    def pseudo_loss(outputs: torch.Tensor) -> torch.Tensor:
        vectors = fn(outputs.detach(), targets, None)
        return 0.5 * torch.einsum("nk...,n...->nk", vectors, outputs).square().sum()

    return jvp(jacrev(pseudo_loss), (outputs,), (v,))[1]


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
@pytest.mark.by_default("type-2")
def test_nested_derivatives_of_a_pseudo_loss(fisher_type: str) -> None:
    loss = CrossEntropyLoss()
    outputs, targets = batch(loss)
    fn = as_curvlinops(loss, fisher_type, 3, out_dims=0)
    directions = torch.randn(4, 5, 3, dtype=torch.float64)
    vectors = seeded(fn, outputs, targets, None)
    expected = torch.einsum("nki,nkj,anj->ani", vectors, vectors, directions)
    mapped = vmap(lambda v: pseudo_loss_product(fn, outputs, targets, v), randomness="same")
    torch.testing.assert_close(seeded(mapped, directions), expected, rtol=1e-13, atol=1e-13)
    compiled = torch.compile(lambda v: pseudo_loss_product(fn, outputs, targets, v), backend="eager", fullgraph=True)
    torch.testing.assert_close(seeded(compiled, directions[0]), expected[0], rtol=1e-13, atol=1e-13)
    traced = make_fx(lambda f, y, v: pseudo_loss_product(fn, f, y, v), tracing_mode="fake")(
        outputs, targets, directions[0]
    )
    torch.testing.assert_close(seeded(traced, outputs, targets, directions[0]), expected[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mapped", [False, True])
def test_export(mapped: bool) -> None:
    class Vectors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double())
            make = torch_bridge.make_grad_output_fn if mapped else torch_bridge.make_batch_grad_output_fn
            fn = make(self.loss, "type-2")
            self.fn = vmap(fn) if mapped else fn

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.fn(outputs, targets)

    module = Vectors()
    size = torch.export.Dim("size", min=2)
    exported = torch.export.export(module, batch(module.loss), dynamic_shapes=({0: size}, {0: size}))
    outputs, targets = batch(module.loss, 8)
    torch.testing.assert_close(exported.module()(outputs, targets), module(outputs, targets), rtol=0, atol=0)


def test_tensors_without_values() -> None:
    fn = torch_bridge.make_batch_grad_output_fn(CrossEntropyLoss(), "mc", 4)
    with torch.device("meta"):
        assert fn(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)).shape == (4, 5, 3)


def opcheck_arguments() -> Iterator[tuple[Any, ...]]:
    for is_batch, vectors in itertools.product((False, True), ("type-2", "mc", "empirical", "samples")):
        if is_batch != (vectors in ("mc", "empirical")):  # that the axes differ is all that being a batch means here
            continue
        shape = (2, 4, 3) if is_batch else (2, 3)
        seeds = torch.randn(2, dtype=torch.float64) if vectors in ("mc", "samples") else None
        text = "('torch.nn.modules.loss.CrossEntropyLoss', {'reduction': 'mean'}, ['weight'])"
        request = (text, vectors, 2, is_batch)
        yield torch.randn(shape, dtype=torch.float64), torch.randint(3, shape[:-1]), seeds, [torch.rand(1, 3)], *request


@pytest.mark.parametrize("args", list(opcheck_arguments()), ids=lambda args: f"{args[5]}-{args[7]}")
@pytest.mark.by_default("mc-True", "type-2-False")
def test_opcheck(args: tuple[Any, ...]) -> None:
    outputs, *rest = args
    torch.library.opcheck(torch.ops.torch_bridge.grad_output_vectors, args)
    torch.library.opcheck(torch.ops.torch_bridge.grad_output_vectors, (outputs.clone().requires_grad_(), *rest))
    cotangents = torch.ops.torch_bridge.grad_output_vectors(*args)
    torch.library.opcheck(torch.ops.torch_bridge.grad_output_vectors_vjp, (cotangents, *args))


@pytest.mark.parametrize("vectors", ["type-2", "mc", "empirical"])
def test_the_operator_lowers_for_every_platform(vectors: str) -> None:
    outputs, targets = jnp.zeros((2, 3, 4)), jnp.zeros((2, 4), int)
    request = Request("('torch.nn.modules.loss.CrossEntropyLoss', {}, ['weight'])", vectors, 2, False)
    fn = jax.jit(partial(compute, request=request))
    seeds = jnp.zeros(2) if vectors == "mc" else None
    exported = jax.export.export(fn, platforms=("cpu", "cuda", "tpu"))(outputs, targets, seeds, [jnp.ones((1, 3))])
    assert exported.out_avals[0].shape == ({"type-2": 12, "mc": 2, "empirical": 1}[vectors], 2, 3, 4)
