"""CUDA: two allocators on one card, each of which frees memory in the order of its own streams.

Memory that one shares with the other is freed as soon as Python drops it, although kernels that read it may still be
queued. So memory is shared only while the order of the streams is known:

* JAX reads torch's memory only if torch's current stream waits for that before it runs anything else
  (`StreamOrderedTensor`, and then `wait_on_torch_stream`);
* torch reads JAX's memory only to copy it, and JAX gets it back once that copy has run (`copy_to_torch`).
"""

import functools
import os
import threading
import warnings
from typing import Any

import jax
import torch

MAX_PREALLOCATED = 2**30  # bytes; JAX starts with far less, or with most of the card's memory

# The settings of how much memory JAX takes. If the user has set none of them, it takes what it needs.
SETTINGS = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
)


def disable_preallocation() -> bool:
    """Let JAX take memory as it needs it, and not three quarters of the card's in advance, if it has not started yet.

    Returns whether this package made that choice, and not the user.
    """
    ours = not any(name in os.environ for name in SETTINGS)
    if ours:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return ours


def warn_if_preallocated(device: jax.Device) -> None:
    """Warn if JAX was started too early for `disable_preallocation`."""
    stats = device.memory_stats() or {}
    held, limit = stats.get("pool_bytes", 0), stats.get("bytes_limit", 0)
    if held > max(MAX_PREALLOCATED, limit // 2) and held > 2 * stats.get("peak_bytes_in_use", 0):
        warnings.warn(
            f"JAX was started before torch_bridge was imported, and holds {held / 2**30:.0f} GiB of the memory of"
            f" {device}, which torch cannot have: import torch_bridge before JAX is first used, or set"
            " XLA_PYTHON_CLIENT_PREALLOCATE=false.",
            stacklevel=2,
        )


def refuse_capture() -> None:
    """Refuse to work while torch captures its current stream as a graph, which would not contain what JAX does."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "torch_bridge cannot be captured into a CUDA graph (torch.cuda.graph, torch.cuda.make_graphed_callables):"
            " JAX's kernels run on streams of its own. Call it before or after the capture; torch.compile with"
            " mode='reduce-overhead' leaves it out of its graphs by itself."
        )


class StreamOrderedTensor:
    """A tensor for `jax.dlpack.from_dlpack`, ordered after all work on torch's current stream.

    Strides, and lazy negation and conjugation, must be resolved. (The tensor itself does the same in twice the time.)
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, *, stream: int, **_: Any) -> Any:
        """`stream` is the one on which JAX orders its reading."""
        _stream(stream, self._tensor.device).wait_stream(torch.cuda.current_stream())
        return self._tensor.__dlpack__(stream=-1)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self._tensor.__dlpack_device__()


@functools.cache
def _stream(number: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(number, device)


class PendingCopies:
    """JAX's memory that is read by queued copies of torch, each with an event that says when its copy has run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.copies: list[tuple[Any, torch.Tensor]] = []

    def keep_until_copied(self, source: torch.Tensor) -> None:
        """Keep the memory until all work that is now on torch's current stream has run."""
        event = torch.cuda.Event()
        event.record()
        with self._lock:
            self.copies.append((event, source))

    def release_finished(self) -> None:
        """Release the memory of copies that have run, without waiting for others."""
        with self._lock:
            self.copies = [(event, source) for event, source in self.copies if not event.query()]


PENDING_COPIES = PendingCopies()


def wait_on_torch_stream(array: jax.Array) -> torch.Tensor:
    """Make torch's current stream wait until the array is computed, and so until JAX has read all inputs of it.

    Returns the array's memory as a tensor. It is JAX's: to be read on this stream only, and kept alive until then.
    """
    # Torch passes its current stream, on which JAX then orders the computation.
    return torch.utils.dlpack.from_dlpack(array)


def copy_to_torch(array: jax.Array) -> torch.Tensor:
    """A copy of the array in torch's memory, ordered on torch's current stream."""
    PENDING_COPIES.release_finished()
    source = wait_on_torch_stream(array)
    copy = source.clone(memory_format=torch.contiguous_format)
    PENDING_COPIES.keep_until_copied(source)
    return copy
