"""Batches as loaders give them: pairs, or one mapping of inputs and labels, as Hugging Face's."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from torch import Tensor, nn

from torch_bridge.tensors import check_tensor

WRAPPERS = nn.DataParallel, nn.parallel.DistributedDataParallel
LABELS = "labels"  # Hugging Face's name, which its collators and models share
LOGITS = "logits"

Call = Callable[[nn.Module, Any], Any]


def unwrapped(module: nn.Module) -> nn.Module:
    """What is in a wrapper that passes all arguments on."""
    while isinstance(module, WRAPPERS):
        module = module.module
    return module


def how_to_call(module: nn.Module, inputs: Any) -> Call:
    """How the module takes inputs that are put together like these.

    Sequences are positional arguments. A mapping is keyword arguments where `forward` has these, and else the one
    argument, of the class that it has here.

    **Raises:** TypeError for a mapping some of whose keys are arguments of `forward`, but not all.
    """
    if not isinstance(inputs, Mapping):
        spread = isinstance(inputs, tuple | list)
        return lambda module, given: module(*given) if spread else module(given)
    signature = inspect.signature(unwrapped(module).forward)
    try:
        signature.bind(**inputs)
    except TypeError as error:
        known = inputs.keys() & signature.parameters.keys()
        if known:
            raise TypeError(
                f"{type(unwrapped(module)).__name__}.forward{signature} does not take keyword arguments"
                f" {list(inputs)} ({error}): leave out what it has no argument for, and give all that it needs."
            ) from None
        return lambda module, given: module(_of_kind(inputs, given))
    return lambda module, given: module(**given)


def _of_kind(like: Mapping[Any, Any], given: dict[Any, Any]) -> Any:
    """A mapping of the class of another one, which is made of a dict as dicts and Hugging Face's classes are."""
    return given if type(like) is dict else type(like)(given)  # type: ignore[call-arg]


def as_inputs(inputs: Any) -> Any:
    """Inputs as a pytree: a mapping of any class as a dict."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def as_pair(name: str, batch: Any) -> tuple[Any, Tensor]:
    """The inputs and targets of a batch, as it came: a pair, or a mapping whose targets are its `labels`.

    **Raises:** TypeError for other batches, calling them `name`.
    """
    if isinstance(batch, Mapping):
        if not isinstance(batch.get(LABELS), Tensor):
            raise TypeError(
                f"{name} is a {type(batch).__name__} with {list(batch)}: one that holds inputs and targets has a tensor"
                f" of targets as {LABELS!r}; for another name, pass pairs (inputs, targets)."
            )
        return _of_kind(batch, {key: value for key, value in batch.items() if key != LABELS}), batch[LABELS]
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise TypeError(
            f"{name} must be a pair (inputs, targets) with a tensor of targets, or a mapping of tensors with"
            f" {LABELS!r}; got a {type(batch).__name__} of another form."
        )
    return batch[0], batch[1]


def check_tensors(name: str, value: Any) -> None:
    """Refuse leaves that are not tensors with values, naming their paths."""
    if isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            check_tensors(f"{name}[{key!r}]", part)
        return
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor; got {type(value).__name__}. Fix other arguments in a module around this one."
        )
    check_tensor(name, value)
    if value.is_meta:
        raise NotImplementedError(f"{name} is on the meta device, where tensors have no values.")


def as_outputs(outputs: Any) -> Any:
    """What the loss is of: of a mapping, its `logits`.

    **Raises:** TypeError for several outputs without such a name.
    """
    if isinstance(outputs, Mapping) and LOGITS in outputs:
        return outputs[LOGITS]
    if not isinstance(outputs, jax.Array):
        got = f"a dict with {list(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise TypeError(
            f"module must return one tensor [N, *out], or a dict that has it as {LOGITS!r}, since loss_func is of one;"
            f" it returns {got}: wrap it in a module that returns what the loss is of."
        )
    return outputs
