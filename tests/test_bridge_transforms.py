"""The façade under `vmap`, and random state."""

from typing import Any

import jax
import pytest
import torch
from facade_cases import LOSSES, TYPES, as_curvlinops, batch, seeded
from torch.func import vmap
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss

import torch_bridge

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
