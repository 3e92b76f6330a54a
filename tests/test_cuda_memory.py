"""What is done for GPUs without a device: memory lent to copies, captures, and who takes how much."""

import os

import jax
import jax.numpy as jnp
import pytest
import torch

from torch_bridge import _cuda


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
