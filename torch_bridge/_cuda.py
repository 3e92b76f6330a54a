"""CUDA: two allocators on one card, each of which frees memory in the order of its own streams.

What one of them lends to the other is taken back as soon as Python drops it, although kernels that read it may still be
queued. So nothing is lent for longer than the order of the streams is known:

* of torch's memory JAX reads only what torch's current stream waits for before anything else runs on it (`Readable`,
  and then `order`);
* of JAX's memory torch reads only to copy it, and JAX gets it back once that copy has run (`copy_to_torch`).
"""

import functools
import os
import threading
import warnings
from typing import Any

import jax
import torch

HELD_IN_ADVANCE = 2**30  # bytes of JAX's; it starts with far less, or with most of the card's

# What says how much memory JAX takes. Where the user has set none of them, it takes what it needs.
SETTINGS = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
)


def share_memory() -> bool:
    """Let JAX take memory as it needs it, if it is yet to start, rather than three quarters of the card's at once.

    Returns whether it was for this package to say.
    """
    ours = not any(name in os.environ for name in SETTINGS)
    if ours:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return ours


def check_shared(device: jax.Device) -> None:
    """Warn where JAX was started too early for `share_memory`."""
    stats = device.memory_stats() or {}
    held, limit = stats.get("pool_bytes", 0), stats.get("bytes_limit", 0)
    if held > max(HELD_IN_ADVANCE, limit // 2) and held > 2 * stats.get("peak_bytes_in_use", 0):
        warnings.warn(
            f"JAX was started before torch_bridge was imported, and holds {held / 2**30:.0f} GiB of the memory of"
            f" {device}, which torch cannot have: import torch_bridge before JAX is first used, or set"
            " XLA_PYTHON_CLIENT_PREALLOCATE=false.",
            stacklevel=2,
        )


def refuse_capture() -> None:
    """Refuse to work while torch records its current stream as a graph, which would hold nothing of what JAX does."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "torch_bridge cannot be captured into a CUDA graph (torch.cuda.graph, torch.cuda.make_graphed_callables):"
            " JAX's kernels run on streams of its own. Call it before or after the capture; torch.compile with"
            " mode='reduce-overhead' leaves it out of its graphs by itself."
        )


class Readable:
    """A tensor for `jax.dlpack.from_dlpack`, ordered after all that torch's current stream holds.

    Strides, and lazy negation and conjugation, are to be resolved. (The tensor would do the same in twice the time.)
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


class Lent:
    """JAX's memory that torch's queued copies read, each with the event that says that its copy has run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.copies: list[tuple[Any, torch.Tensor]] = []

    def until_now(self, source: torch.Tensor) -> None:
        """Keep the memory until all that torch's current stream holds now has run."""
        event = torch.cuda.Event()
        event.record()
        with self._lock:
            self.copies.append((event, source))

    def take_back(self) -> None:
        """Give up what has been copied; nothing is waited for."""
        with self._lock:
            self.copies = [(event, source) for event, source in self.copies if not event.query()]


LENT = Lent()


def order(array: jax.Array) -> torch.Tensor:
    """Have torch's current stream wait for the array to be computed, and with it for all that JAX reads for it.

    Returns the array's memory as a tensor: JAX's, to be read on this stream only, and kept by the caller until then.
    """
    # Torch passes its current stream, on which JAX then orders the computation.
    return torch.utils.dlpack.from_dlpack(array)


def copy_to_torch(array: jax.Array) -> torch.Tensor:
    """The array in memory of torch's own, in the order of torch's current stream."""
    LENT.take_back()
    source = order(array)
    copy = source.clone(memory_format=torch.contiguous_format)
    LENT.until_now(source)
    return copy
