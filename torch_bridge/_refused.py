"""Modules that are no function of their parameters and inputs that could be converted, and what to do about it."""

import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def check_module(module: object) -> None:
    """Refuse what can be seen without running it."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}.")
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise NotImplementedError(
                f"torch.autocast is on for {device}: convert the module outside of it, as it is or in the lower"
                " precision itself, module.bfloat16()."
            )
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"{_name(path)} is a TorchScript module, of which torch.export knows nothing: convert the module that"
                " it was made of."
            )
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
            raise NotImplementedError(
                f"{_name(path)} has max_norm={part.max_norm}, which writes into its weight whenever it is called: set"
                " its max_norm to None, and scale the weight's rows yourself, between steps."
            )
    for path, parameter in module.named_parameters():
        if parameter.is_complex():
            raise NotImplementedError(
                f"parameter {path!r} is complex, in which curvature is not defined here: hold its real and imaginary"
                " parts as parameters, and put them together with torch.complex."
            )
        if _has_hooks(parameter):
            raise NotImplementedError(f"parameter {path!r} has {HOOKS}")


HOOKS = (
    "a hook, which changes its gradient behind the function's back: remove it, by handle.remove(), where `handle` is"
    " what register_hook returned."
)


def _has_hooks(tensor: torch.Tensor) -> bool:
    """Whether `register_hook` was called on a tensor: torch has a warning for who saves one."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.utils.hooks.warn_if_has_hooks(tensor)
    return bool(told)


class NoHooks(TorchFunctionMode):
    """Refuse hooks that `forward` puts on tensors, which are in no graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.register_hook:
            raise NotImplementedError(
                "module's forward puts a hook on a tensor by register_hook, which changes its gradient behind the"
                " function's back: leave it out, or make the change an operator (torch.library.custom_op)."
            )
        return func(*args, **(kwargs or {}))


def _name(path: str) -> str:
    return f"module's {path!r}" if path else "module"


def check_examples(leaves: list[torch.Tensor]) -> None:
    """Refuse inputs with nothing in them, of which torch.export would make a graph for that size only."""
    if any(leaf.ndim and not len(leaf) for leaf in leaves):
        raise ValueError("example_inputs must hold at least one example; got a tensor whose first axis has length 0.")


def of_export(error: Exception, dynamic: bool) -> Exception:
    """What to raise for an error of torch.export."""
    files = {Path(frame.filename).parts[-3:] for frame in traceback.extract_tb(error.__traceback__)}
    if files & {("nn", "modules", "rnn.py"), ("nn", "utils", "rnn.py")}:
        return NotImplementedError(
            "module has a recurrent layer that torch.export cannot follow. If it is given packed sequences, whose"
            " number of entries at each step depends on data: give it padded ones, take each one's output at its last"
            f" position, and leave the others out of the loss. It says: {error}"
        )
    way_out = "If it depends on the batch's size, pass dynamic_batch=False. " if dynamic else ""
    return RuntimeError(f"torch.export could not export module. {way_out}It says: {error}")
