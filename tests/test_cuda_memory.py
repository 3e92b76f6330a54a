"""What is done for GPUs, without a device: memory lent to copies, order, captures, and who takes how much."""

import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

import torch_bridge
from torch_bridge import _cuda, _op, tensors


class FakeEvent:
    """Of a stream on which nothing has run yet."""

    made: list["FakeEvent"]

    def __init__(self) -> None:
        self.recorded = self.done = False
        FakeEvent.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.done


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    FakeEvent.made = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(_cuda, "PENDING_COPIES", _cuda.PendingCopies())
    return FakeEvent.made


def test_memory_is_lent_until_the_copy_has_run(events: list[FakeEvent]) -> None:
    """Whatever the order in which copies on several streams end."""
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = [jnp.full(3, float(i)) for i in range(3)]
    places = [array.unsafe_buffer_pointer() for array in arrays]
    results = [_cuda.copy_to_torch(array) for array in arrays]
    del arrays

    def lent() -> list[int]:
        return [source.data_ptr() for _, source in _cuda.PENDING_COPIES.copies]

    assert [event.recorded for event in events] == [True] * 3
    assert lent() == places
    events[1].done = True
    _cuda.PENDING_COPIES.release_finished()
    assert lent() == [places[0], places[2]]
    for event in events:
        event.done = True
    _cuda.PENDING_COPIES.release_finished()
    assert lent() == []
    for i, result in enumerate(results):  # memory of its own
        assert result.data_ptr() not in places
        assert torch.equal(result, torch.full((3,), float(i), dtype=torch.float64))


def test_a_copy_gives_back_what_earlier_ones_lent(events: list[FakeEvent]) -> None:
    for _ in range(10):
        _cuda.copy_to_torch(jnp.zeros(3))
        for event in events:
            event.done = True
    assert len(_cuda.PENDING_COPIES.copies) == 1


def test_memory_lent_by_many_threads(events: list[FakeEvent]) -> None:
    """Each gives back only what was copied, whoever lent it."""

    def work(number: int) -> bool:
        right = True
        for i in range(20):
            result = _cuda.copy_to_torch(jnp.full(3, 100.0 * number + i))
            events[len(events) // 2].done = True
            right &= torch.equal(result, torch.full((3,), 100.0 * number + i, dtype=torch.float64))
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert len(events) == 80
    _cuda.PENDING_COPIES.release_finished()
    lent = {id(event) for event, _ in _cuda.PENDING_COPIES.copies}
    assert lent == {id(event) for event in events if not event.done}


class FakeStream:
    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_jax_reads_after_what_torch_has_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class Tensor:
        device = torch.device("cuda", 0)

        def __dlpack__(self, *, stream: int) -> str:
            log.append(f"memory, of which stream {stream} is ordered")
            return "capsule"

    monkeypatch.setattr(_cuda, "_stream", lambda number, device: FakeStream(f"JAX's {number}", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream("torch's", log))
    ordered: Any = _cuda.StreamOrderedTensor(Tensor())  # type: ignore[arg-type]
    assert ordered.__dlpack__(stream=7, max_version=(1, 0)) == "capsule"
    assert log == ["JAX's 7 waits for torch's", "memory, of which stream -1 is ordered"]


@pytest.mark.parametrize("how", ["call", "backward", "to_jax"])
def test_inputs_are_kept_until_torch_waits_for_jax(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that JAX borrows, copies that make it contiguous too, is there when torch's stream waits for the result."""
    borrowed, kept = [], []

    def borrow(tensor: torch.Tensor) -> jax.Array:
        array = jnp.asarray(real_borrow(tensor))
        borrowed.append(weakref.ref(array))
        return array

    def seen(fn: Any) -> Any:
        def run(array: jax.Array) -> Any:
            gc.collect()
            kept.append([ref() is not None for ref in borrowed])
            return fn(array)

        return run

    real_borrow = tensors.borrow
    monkeypatch.setattr(tensors, "borrow", borrow)
    monkeypatch.setattr(tensors, "wait_on_torch_stream", seen(lambda array: None))
    weight, targets = torch.ones(2), torch.tensor([0, 1, 0])
    vectors = torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(weight), "empirical")
    outputs = torch.randn(2, 3).T.requires_grad_(how == "backward")
    if how == "backward":
        result = vectors(outputs, targets)
    monkeypatch.setattr(_op, "borrow", borrow)
    monkeypatch.setattr(_op, "hand_over", seen(tensors.hand_over))
    if how == "call":
        vectors(outputs, targets)
    elif how == "backward":
        result.sum().backward()
    else:
        tensors.to_jax(outputs)
    assert kept == [[True] * {"call": 3, "backward": 4, "to_jax": 1}[how]]


WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::nonzero",
    "aten::_to_copy",
}


def test_a_step_of_a_module_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads no values of torch's, and JAX is given numbers by an explicit transfer only."""

    def to_jax(tensor: torch.Tensor) -> jax.Array:  # as with a GPU, not by way of the host
        return jax.dlpack.from_dlpack(tensor.detach().clone())

    monkeypatch.setattr("torch_bridge.optimizer.to_jax", to_jax)
    monkeypatch.setattr("torch_bridge.trained.to_jax", to_jax)
    monkeypatch.setattr(torch_bridge.KFAC, "_check_targets", lambda *_: None)  # on CPUs only
    batch = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    optimizer = torch_bridge.KFAC(torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss(), lr=0.1)
    optimizer.step(batch)
    with torch.profiler.profile() as profile, jax.transfer_guard("disallow"):
        optimizer.step(batch)
    called = {event.name for event in profile.events()}
    assert "aten::copy_" in called
    assert not called & WAITS


def test_captures_are_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        _cuda.refuse_capture()


def test_compiled_graphs_leave_the_operators_out() -> None:
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this PyTorch has no tag that says so; a capture is refused")
    for op in (torch.ops.torch_bridge.grad_output_vectors, torch.ops.torch_bridge.grad_output_vectors_vjp):
        assert torch.Tag.cudagraph_unsafe in op.default.tags


@pytest.mark.parametrize("name", [None, *_cuda.SETTINGS])
def test_who_says_how_much_memory_jax_takes(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in _cuda.SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")  # for it to be put back
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    if name is not None:
        monkeypatch.setenv(name, "true")
    before = dict(os.environ)
    assert _cuda.disable_preallocation() is (name is None)
    changed = {key: value for key, value in os.environ.items() if before.get(key) != value}
    assert changed == ({} if name else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})


class FakeDevice:
    def __init__(self, **stats: int) -> None:
        self.memory_stats = lambda: stats or None

    def __str__(self) -> str:
        return "cuda:0"


def test_who_started_jax_too_early_is_told() -> None:
    gib = 2**30
    with pytest.warns(UserWarning, match="holds 60 GiB of the memory of cuda:0.*import torch_bridge before"):
        _cuda.warn_if_preallocated(FakeDevice(pool_bytes=60 * gib, bytes_limit=60 * gib, peak_bytes_in_use=gib))
    _cuda.warn_if_preallocated(
        FakeDevice(pool_bytes=40 * gib, bytes_limit=60 * gib, peak_bytes_in_use=30 * gib)
    )  # in use
    _cuda.warn_if_preallocated(FakeDevice(pool_bytes=2**26, bytes_limit=60 * gib, peak_bytes_in_use=2**20))
    _cuda.warn_if_preallocated(FakeDevice())
