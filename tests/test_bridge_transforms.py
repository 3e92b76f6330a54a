"""The façade under what PyTorch does to functions: vmap, make_fx, compile, export, derivatives, random state."""

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
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from torch.utils.checkpoint import checkpoint

import torch_bridge
from torch_bridge._compute import Request
from torch_bridge._compute import vectors as compute

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # as many processes as cores take longer to start

BACKENDS = ["eager", "inductor", "aot_eager"]
LOSSES = [CrossEntropyLoss(), MSELoss(), BCEWithLogitsLoss()]
TYPES = ["type-2", "mc", "empirical", "forward-only"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(loss: Any, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    outputs = torch.randn(size, 3, dtype=torch.float64, generator=generator)
    if isinstance(loss, CrossEntropyLoss):
        return outputs, torch.randint(3, (size,), generator=generator)
    return outputs, torch.rand(size, 3, dtype=torch.float64, generator=generator)


def as_curvlinops(loss: Any, fisher_type: str, mc_samples: int = 1, out_dims: int = 1) -> Any:
    fn = torch_bridge.make_grad_output_fn(loss, fisher_type, mc_samples)
    randomness = "different" if fisher_type == "mc" else "same"
    return vmap(fn, in_dims=(0, 0, None), out_dims=out_dims, randomness=randomness)


def seeded(fn: Any, *args: Any) -> Any:
    torch.manual_seed(0)
    return fn(*args)


# vmap


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.by_default(
    "CrossEntropyLoss()-mc",
    "BCEWithLogitsLoss()-empirical",
    "MSELoss()-type-2",
    "MSELoss()-forward-only",
)
def test_vmap_is_a_loop(loss: Any, fisher_type: str) -> None:
    outputs, targets = batch(loss)
    fn = torch_bridge.make_grad_output_fn(loss, fisher_type, 2)
    mapped = as_curvlinops(loss, fisher_type, 2)(outputs, targets, None)
    assert mapped.is_contiguous()
    mapped.mul_(2)
    looped = torch.stack([fn(output, target) for output, target in zip(outputs, targets, strict=True)], 1)
    assert mapped.shape == looped.shape
    if fisher_type != "mc":
        torch.testing.assert_close(mapped, 2 * looped, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (-1, 0), (None, 0), (0, None)])
@pytest.mark.parametrize("out_dims", [0, 1, -1])
def test_any_axis(fisher_type: str, in_dims: Any, out_dims: int) -> None:
    fn = torch_bridge.make_grad_output_fn(BCEWithLogitsLoss(), fisher_type)
    outputs, targets = batch(BCEWithLogitsLoss())
    whole = vmap(fn)(
        outputs if in_dims[0] is not None else outputs[:1].expand(5, 3),
        targets if in_dims[1] is not None else targets[:1].expand(5, 3),
    )
    args = [
        {None: t[0], 0: t}.get(dim, t.movedim(0, dim if dim else 0))
        for t, dim in zip((outputs, targets), in_dims, strict=True)
    ]
    torch.testing.assert_close(vmap(fn, in_dims=in_dims, out_dims=out_dims)(*args), whole.movedim(0, out_dims))


def test_nested_and_chunked() -> None:
    fn = torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "type-2")
    outputs = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    targets = torch.randint(5, (3, 4))
    flat = vmap(fn)(outputs.reshape(24, 5), targets.expand(2, 3, 4).reshape(24)).reshape(2, 3, 4, 5, 5)
    nested = vmap(vmap(vmap(fn), chunk_size=2), in_dims=(0, None))(outputs, targets)
    torch.testing.assert_close(nested, flat, rtol=0, atol=0)


def test_vmap_over_batches() -> None:
    loss = CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double(), ignore_index=0)
    fn = torch_bridge.make_batch_grad_output_fn(loss, "type-2")
    outputs, targets = torch.randn(4, 5, 3, dtype=torch.float64), torch.randint(3, (4, 5))
    looped = torch.stack([fn(o, t) for o, t in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(vmap(fn)(outputs, targets), looped, rtol=0, atol=1e-14)


def test_vmap_over_weights() -> None:
    """A loss's own tensors may be mapped as well, as `torch.func.functional_call` does with those of a model."""
    weights = torch.rand(4, 3, dtype=torch.float64) + 0.1
    outputs, targets = batch(CrossEntropyLoss(), 4)

    def vectors(weight: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = CrossEntropyLoss(weight, reduction="sum")
        return torch_bridge.make_grad_output_fn(loss, "type-2")(output, target)

    rows = zip(weights, outputs, targets, strict=True)
    torch.testing.assert_close(vmap(vectors)(weights, outputs, targets), torch.stack([vectors(*row) for row in rows]))
    shared = vmap(vectors, in_dims=(0, None, None))(weights, outputs[0], targets[0])
    torch.testing.assert_close(shared[2], vectors(weights[2], outputs[0], targets[0]))


# Random state


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.by_default("CrossEntropyLoss()")
def test_a_state_is_a_result(loss: Any) -> None:
    """`Generator().manual_seed(s)` and `torch.manual_seed(s)` are the same state."""
    outputs, targets = batch(loss)
    for fn in (as_curvlinops(loss, "mc", 3), torch_bridge.make_batch_grad_output_fn(loss, "mc", 3)):
        generator = torch.Generator().manual_seed(7)
        first, second = fn(outputs, targets, generator), fn(outputs, targets, generator)
        torch.manual_seed(7)
        assert torch.equal(fn(outputs, targets, None), first)
        assert torch.equal(fn(outputs, targets, None), second)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("partitionable", [True, False])
def test_settings_of_jax_change_nothing(partitionable: bool) -> None:
    fn = torch_bridge.make_batch_grad_output_fn(MSELoss(), "mc", 2)
    expected = seeded(fn, torch.zeros(5, 3), torch.zeros(5, 3))
    with jax.threefry_partitionable(partitionable), jax.enable_x64(False):
        assert torch.equal(seeded(fn, torch.zeros(5, 3), torch.zeros(5, 3)), expected)


def test_data_and_samples_differ() -> None:
    fn = as_curvlinops(MSELoss(), "mc", 4)
    vectors = fn(torch.zeros(5, 3), torch.zeros(5, 3), None).reshape(20, 3)
    assert len(torch.unique(vectors, dim=0)) == 20


def test_randomness_of_vmap() -> None:
    fn = torch_bridge.make_grad_output_fn(MSELoss(), "mc", 2)
    zeros = torch.zeros(5, 3)
    same = vmap(fn, randomness="same")(zeros, zeros)
    assert torch.equal(same, same[:1].expand(5, 2, 3))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(fn)(zeros, zeros)
    assert vmap(torch_bridge.make_grad_output_fn(MSELoss(), "type-2"))(zeros, zeros).shape == (5, 3, 3)


def test_the_sampler_as_curvlinops_calls_it() -> None:
    sampler = torch_bridge.make_grad_output_sampler(CrossEntropyLoss())
    mapped = vmap(sampler, in_dims=(0, None, 0, None), out_dims=1, randomness="different")
    outputs, targets = batch(CrossEntropyLoss())
    drawn = mapped(outputs, 7, targets, torch.Generator().manual_seed(0))
    assert drawn.shape == (7, 5, 3)
    drawn.div_(7**0.5)
    one = sampler(output_one_datum=outputs[0], num_samples=2, target_one_datum=targets[0], generator=None)
    assert one.shape == (2, 3)


# Graphs


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


# Derivatives


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
