"""Checks for modules that cannot become a pure function of parameters and inputs, and what to do about them."""

import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from torch_bridge.losses import GLOBAL_HOOKS


def check_module(module: object) -> None:
    """Refuse a module that cannot be converted, as far as can be seen without running it."""
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
        if isinstance(part, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
            raise NotImplementedError(
                f"{_name(path)} is a {type(part).__name__}, which draws its windows at each call, also in"
                " evaluation: use AdaptiveMaxPool2d or AdaptiveMaxPool3d for outputs of the same size."
            )
        if isinstance(part, nn.CrossMapLRN2d):
            raise NotImplementedError(
                f"{_name(path)} is a CrossMapLRN2d, a torch.autograd.Function that torch.export does not follow: use"
                " torch.nn.LocalResponseNorm, whose sums differ (these have a channel too many from number size on)."
            )
        if "quantized" in type(part).__module__.split("."):
            raise NotImplementedError(
                f"{_name(path)} is quantised ({type(part).__name__}), and so has no derivative: convert the module that"
                " it was made of."
            )
    if any(len(hooks) for hooks in GLOBAL_HOOKS):
        raise NotImplementedError(
            "there are hooks for all modules (torch.nn.modules.module.register_module_*), which torch.export does not"
            " follow: remove them, by handle.remove()."
        )
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise NotImplementedError(
                f"{path!r} is on the meta device, where tensors have no values: load the module's first, by"
                " module.to_empty(device=...) and load_state_dict."
            )
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            raise NotImplementedError(
                f"{path!r} is a sparse, nested or quantised tensor ({tensor.layout}, {tensor.dtype}), of which there is"
                " none in JAX: convert a module that holds to_dense() or dequantize() of it."
            )
    for path in names_with_hooks(dict(module.named_parameters())):
        raise NotImplementedError(
            f"parameter {path!r} has hooks, which a function of JAX does not run: remove them, by handle.remove(),"
            " where `handle` is what register_hook returned, and do what they do to the gradient that you take."
        )
    for path, parameter in module.named_parameters():
        if parameter.is_complex():
            raise NotImplementedError(
                f"parameter {path!r} is complex, in which curvature is not defined here: hold its real and imaginary"
                " parts as parameters, and put them together with torch.complex."
            )


def names_with_hooks(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors with hooks (`register_hook`). The public way to tell is torch's warning on saving one."""
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name, tensor in tensors.items():
            told.clear()
            torch.utils.hooks.warn_if_has_hooks(tensor)
            found += [name] if told else []
    return found


def _name(path: str) -> str:
    return f"module's {path!r}" if path else "module"


def spectral_norms(module: nn.Module) -> list[str]:
    """The paths of spectral norms in training mode, which update their vectors in place at each call."""
    found = []
    for path, part in module.named_modules():
        hooks = [type(hook).__name__ for hook in part._forward_pre_hooks.values()]
        if part.training and (type(part).__name__ == "_SpectralNorm" or "SpectralNorm" in hooks):
            found.append(path)
    return found


class ModuleCallError(RuntimeError):
    """An error of the module itself on the example inputs."""


def check_initialised(module: nn.Module) -> None:
    """Refuse lazy parameters that have no shape yet."""
    lazy = [name for name, parameter in module.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"{', '.join(lazy)} of the module have no shape yet, as those of lazy modules: call the module on a batch"
            " first."
        )


def check_examples(leaves: list[torch.Tensor]) -> None:
    """Refuse empty inputs, for which torch.export would make a graph of that size only."""
    if any(leaf.ndim and not len(leaf) for leaf in leaves):
        raise ValueError("example_inputs must hold at least one example; got a tensor whose first axis has length 0.")


def explain_export_error(error: Exception, dynamic: bool) -> Exception:
    """The error to raise for one of torch.export."""
    files = {Path(frame.filename).parts[-3:] for frame in traceback.extract_tb(error.__traceback__)}
    if files & {("nn", "modules", "rnn.py"), ("nn", "utils", "rnn.py")}:
        return NotImplementedError(
            "module has a recurrent layer that torch.export cannot follow. If it is given packed sequences, whose"
            " number of entries at each step depends on data: give it padded ones, take each one's output at its last"
            f" position, and leave the others out of the loss. It says: {error}"
        )
    if "found a fake tensor" in str(error):
        return NotImplementedError(
            "module uses tensor.data (use tensor.detach()), or derivatives of its own parts (torch.autograd.grad),"
            f" which torch.export does not follow. It says: {error}"
        )
    if "data-dependent" in str(error):
        return NotImplementedError(
            "module decides by values of its data which operators run, or how large tensors are, which one graph does"
            " not: compute all cases, and choose with torch.where or indices. A mixture of experts of Hugging Face does"
            f" so after module.set_experts_implementation('batched_mm'). It says: {str(error).partition(chr(10))[0]}"
        )
    way_out = "If it depends on the batch's size, pass dynamic_batch=False. " if dynamic else ""
    return RuntimeError(f"torch.export could not export module. {way_out}It says: {error}")
