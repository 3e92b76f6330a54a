"""Tensors of PyTorch as arrays of JAX, and back.

What `to_jax` and `to_torch` guarantee:

* aliasing: none. The result has memory of its own: write to either.
* order: on the CPU the result is complete when the function returns. On a GPU nothing is waited for: to torch, each
  function is like any of its own operations on its current stream; to JAX, like any of its own.
* dtype: kept, 64-bit types also where JAX has them switched off (compute with them under `jax.enable_x64(True)`).
* device: kept, CPU to CPU and GPU to the same GPU; nothing is copied to the host behind your back.
* values: those that the tensor stands for; strided, expanded, conjugate and negative views are resolved.
* gradients: not carried. Tensors are detached, and results do not require grad.
* lifetime: independent. Either may be deleted first.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torch_bridge._cuda import (
    StreamOrderedTensor,
    copy_to_torch,
    disable_preallocation,
    refuse_capture,
    wait_on_torch_stream,
    warn_if_preallocated,
)
from torch_bridge._fork import check_not_forked

P = ParamSpec("P")
R = TypeVar("R")

MAX_POLLS = 1000  # some hundred microseconds
CUDA_OF_JAX = (12, 13)  # the versions of CUDA with an extra of JAX
PREALLOCATION_DISABLED = disable_preallocation()

DTYPES = {
    torch.bool: np.dtype(bool),
    torch.uint8: np.dtype(np.uint8),
    torch.uint16: np.dtype(np.uint16),
    torch.uint32: np.dtype(np.uint32),
    torch.uint64: np.dtype(np.uint64),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(jnp.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.complex64: np.dtype(np.complex64),
    torch.complex128: np.dtype(np.complex128),
}


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """Copy a torch tensor to a JAX array with its values, dtype and device.

    - The array shares no memory with the tensor: write to either, or delete either first.
    - 64-bit types are kept also where JAX has them switched off (compute with them under `jax.enable_x64(True)`).
    - The device is kept, CPU to CPU and a GPU to the same GPU; nothing is copied to the host. On a GPU nothing is
      waited for: to torch, it is an operation on its current stream, to JAX one of its own.
    - Values are those that the tensor stands for: strided, expanded, conjugate and negative views are resolved.
      Gradients are not carried.

    Args:
        tensor: a dense `torch.Tensor` on the CPU or a CUDA device.

    Returns:
        The array.

    Raises:
        TypeError: for anything that is not a tensor, or has a dtype that JAX does not have.
        RuntimeError: for a CUDA tensor where JAX has no CUDA, and in a process forked after JAX was used.
        NotImplementedError: for other devices, for tensors that are not one dense array (sparse, nested, masked,
            distributed ones), and for tensors without values (fake tensors, tensors inside of `torch.vmap`).

    Example:
        >>> import torch
        >>> tensor = torch.arange(3)
        >>> array = to_jax(tensor)
        >>> tensor.zero_()
        tensor([0, 0, 0])
        >>> print(array, array.dtype)
        [0 1 2] int64
    """
    check_tensor("tensor", tensor)
    with jax_on(tensor.device):
        view = borrow(tensor)
        if isinstance(view, np.ndarray):
            # It copies, where device_put may take CPU memory over as it is, and takes half of the time of both.
            return jnp.array(view, copy=True).block_until_ready()
        copy = jnp.copy(view)
        wait_on_torch_stream(copy)
        return copy


def to_torch(array: jax.Array) -> torch.Tensor:
    """Copy a JAX array to a torch tensor with its values, dtype and device.

    - The tensor is contiguous and writable, and shares no memory with the array: either may be deleted first.
    - The device is kept, CPU to CPU and a GPU to the same GPU; nothing is copied to the host. On a GPU nothing is
      waited for: to torch, it is an operation on its current stream, to JAX one of its own.
    - The tensor does not require gradients.

    Args:
        array: a `jax.Array` on one CPU or CUDA device.

    Returns:
        The tensor.

    Raises:
        TypeError: for anything that is not a JAX array, is being traced, holds PRNG keys, or has a dtype that torch
            does not have.
        ValueError: for an array on several devices.
        NotImplementedError: for devices other than CPU and CUDA.

    Example:
        >>> import jax.numpy as jnp
        >>> array = jnp.arange(3.0)
        >>> tensor = to_torch(array)
        >>> tensor.mul_(2)
        tensor([0., 2., 4.])
        >>> print(array)
        [0. 1. 2.]
    """
    if not isinstance(array, jax.Array):
        raise TypeError(f"array must be a jax.Array; got {type(array).__name__}.")
    if array.dtype not in DTYPES.values():
        raise TypeError(f"array has dtype {array.dtype}, which torch does not have: cast it first.")
    try:
        devices = array.devices()
    except jax.errors.ConcretizationTypeError:
        raise TypeError(
            "array is being traced by a JAX transformation and has no values: call to_torch outside of it."
        ) from None
    if len(devices) != 1:
        raise ValueError(
            f"array is spread over {len(devices)} devices: gather it first, with jax.device_put(array, device)."
        )
    (device,) = devices
    check_not_forked()
    if device.platform == "cpu":
        copy = np.array(array, copy=True, order="C")
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(copy.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(copy)
    if device.platform not in ("gpu", "cuda"):
        raise NotImplementedError(f"array must be on a CPU or a CUDA device; it is on {device}.")
    return hand_over(array)


# From what is not a dense array of its own, by the name of its class: that is imported by those who use it.
WAYS_TO_DENSE = {
    "nested": "pass its components one by one, {0}.unbind(), or a padded tensor",
    "DTensor": "pass {0}.full_tensor(), or the part of this process, {0}.to_local()",
    "MaskedTensor": "pass {0}.to_tensor(value), with a value for what is masked",
}


def check_tensor(name: str, value: Any) -> None:
    """Refuse what is not a tensor that stands for one dense array."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}.")
    kind = "nested" if value.is_nested else type(value).__name__
    way_out = WAYS_TO_DENSE.get(kind)
    if way_out is None:
        if value.layout is torch.strided:
            return
        kind, way_out = str(value.layout), "pass {0}.to_dense()"
    raise NotImplementedError(
        f"{name} must be an ordinary, dense tensor; got one of kind {kind}: {way_out.format(name)}."
    )


def jax_dtype(name: str, tensor: torch.Tensor) -> np.dtype[Any]:
    """JAX's name of the tensor's dtype."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, which JAX does not have: cast it first.")
    return DTYPES[tensor.dtype]


def borrow(tensor: torch.Tensor) -> np.ndarray | jax.Array:
    """What JAX can read of the tensor without a copy, where there is one: only good until the tensor changes.

    To be used inside `jax_on(tensor.device)`, and with all work on it done, or ordered before whatever torch does next,
    when the caller returns.
    """
    jax_dtype("tensor", tensor)
    if tensor.device.type == "cuda":
        # DLPack refuses strides, and drops the bits of lazy negation and conjugation.
        return jax.dlpack.from_dlpack(StreamOrderedTensor(tensor.detach().resolve_conj().resolve_neg().contiguous()))
    try:
        # Through NumPy this is a quarter of the time that DLPack takes.
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy(force=True).view(jnp.bfloat16)
        return tensor.numpy(force=True)
    except (RuntimeError, TypeError) as error:
        raise NotImplementedError(
            f"tensor must be an ordinary one, with values; got {type(tensor).__name__} inside of a torch transformation"
            f" or of another layout ({error})."
        ) from None


def hand_over(array: jax.Array) -> torch.Tensor:
    """The array as a writable tensor. On a CPU, in its own memory: it must be fresh, and nobody may keep it."""
    devices = array.devices()
    if len(devices) != 1:
        raise RuntimeError("torch_bridge works on one device: call it outside of jax.set_mesh.")
    (device,) = devices
    if device.platform == "cpu":
        wait_for(array)  # and thus for everything that reads borrowed memory
        return torch.utils.dlpack.from_dlpack(array)
    with torch.cuda.device(device.local_hardware_id):
        refuse_capture()
        return copy_to_torch(array)


def wait_for(array: jax.Array) -> None:
    """Wait until the array is computed."""
    # To put a thread to sleep and wake it takes longer than most of these computations.
    for _ in range(MAX_POLLS):
        if array.is_ready():  # type: ignore[attr-defined]  # not in jax's annotations
            return
    array.block_until_ready()


def outside_graphs(fn: Callable[P, R]) -> Callable[P, R]:
    """A function that `torch.compile` leaves out of its graphs: JAX compiles it."""

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # to ask earlier would import all of the compiler
            reason = f"{fn.__qualname__} runs JAX: leave fullgraph=True out, or call it outside of torch.compile"
            disabled: Callable[P, R] = torch.compiler.disable(fn, reason=reason)
            return disabled(*args, **kwargs)
        return fn(*args, **kwargs)

    # The compiler counts how often it has compiled a code object: each function gets one of its own.
    whole: Any = run
    whole.__code__ = whole.__code__.replace(co_name=fn.__name__)
    return run


@contextlib.contextmanager
def jax_on(device: torch.device) -> Iterator[None]:
    """JAX with 64-bit types and one way to draw, working on the torch device, whatever JAX's own settings are."""
    check_not_forked()
    with (
        jax.enable_x64(True),
        jax.default_device(_jax_device(device.type, device.index or 0)),
        jax.threefry_partitionable(True),  # one state gives one result
    ):
        if device.type == "cuda":
            with torch.cuda.device(device):
                refuse_capture()
                yield
        else:
            yield


@functools.cache
def _jax_device(kind: str, index: int) -> jax.Device:
    if kind not in ("cpu", "cuda"):
        raise NotImplementedError(f"tensors must be on the CPU or a CUDA device; got one on {kind}: move it first.")
    try:
        devices = jax.local_devices(backend=kind)
    except RuntimeError:  # there is no such backend
        devices = []
    # By torch's number: JAX may see some of the process's devices only.
    device = next((d for d in devices if kind == "cpu" or d.local_hardware_id == index), None)
    if device is None:
        raise RuntimeError(f"a tensor is on {kind}:{index}, which this JAX does not have: {_way_to_device(kind)}.")
    if kind == "cuda" and PREALLOCATION_DISABLED:
        warn_if_preallocated(device)
    return device


def _way_to_device(kind: str) -> str:
    if kind == "cpu":
        return "keep cpu in JAX_PLATFORMS"
    if torch.version.hip is not None:
        return "this torch is for ROCm, and torch_bridge shares memory by CUDA only; move the tensor to the CPU"
    major = (torch.version.cuda or f"{CUDA_OF_JAX[-1]}").partition(".")[0]
    if int(major) not in CUDA_OF_JAX:
        builds = " or ".join(map(str, CUDA_OF_JAX))
        return f"this torch is for CUDA {major}; install one for CUDA {builds}, which JAX has, or move it to the CPU"
    return (
        f"install jax[cuda{major}], the CUDA version of this torch (JAX_PLATFORMS, if set, must have cuda), or move the"
        " tensor to the CPU"
    )
