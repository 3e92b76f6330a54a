"""A module as a graph of ATen operators without writes in place, by `torch.export`."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch.export.graph_signature import InputKind, OutputKind

from torch_bridge._check_export import check_export, module_outputs
from torch_bridge._check_module import ModuleCallError, spectral_norms
from torch_bridge.batches import Call, unwrapped
from torch_bridge.tensors import borrow, jax_on

# Operators that return a new tensor: a write in place right after one of them is seen nowhere else.
RETURN_NEW_TENSORS = (
    "conv",
    "linear",
    "batch_norm",
    "layer_norm",
    "group_norm",
    "add",
    "sub",
    "mul",
    "div",
    "matmul",
    "bmm",
    "mm",
)
NO_GRAD = "wrap_with_set_grad_enabled"
AUTOCAST = "wrap_with_autocast"
NESTED = {NO_GRAD, AUTOCAST}  # operators that run a graph


@dataclass(frozen=True)
class Program:
    """An exported module."""

    graph: torch.fx.GraphModule
    parameters: dict[str, str]  # by placeholder: the parameter's name
    constants: dict[str, np.ndarray]  # by placeholder: buffers, and tensors that are neither
    inputs: tuple[str, ...]  # placeholders, in the order of the inputs' leaves
    outputs: Any  # a pytree of numbers: which of the graph's outputs
    sizes: tuple[tuple[int | None, ...], ...]  # of each input; None is the batch's
    buffers: dict[str, str]  # by placeholder: the buffer's name
    updated: tuple[str, ...]  # the buffers whose new values come before the outputs
    wide: tuple[str, ...]  # integers of more than 32 bits


class Flat(torch.nn.Module):
    """A module as a function of the leaves of its inputs, which also records the structure of its outputs."""

    def __init__(self, module: torch.nn.Module, structure: Any, call: Call, note: Callable[[Any], None]):
        super().__init__()
        # Attributes assigned while torch.export runs the module are lost, so the structure is recorded elsewhere.
        self.module, self.structure, self.call, self.note = module, structure, call, note

    def forward(self, *leaves: Any) -> Any:
        inputs = jax.tree.unflatten(self.structure, leaves)
        outputs = self.call(unwrapped(self.module), inputs)
        flat, structure = jax.tree.flatten(_plain(outputs))
        self.note(jax.tree.unflatten(structure, range(len(flat))))
        return tuple(flat)


def _plain(outputs: Any) -> Any:
    """Mappings and sequences of a library's own classes as dicts and tuples."""
    if isinstance(outputs, Mapping):
        return {key: _plain(value) for key, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        parts = map(_plain, outputs)
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else tuple(parts)
    if outputs is None or isinstance(outputs, torch.Tensor | torch.SymInt | int | float):
        return outputs
    raise NotImplementedError(
        f"module must return tensors, in tuples and dicts; got {type(outputs).__name__}: return what is in it, or,"
        " where it is a language model's cache, convert it with config.use_cache = False."
    )


def export(
    module: torch.nn.Module, leaves: list[Any], structure: Any, call: Call, *, dynamic: bool, updates: bool
) -> Program:
    """The module's graph for these inputs, for any size of batch if `dynamic`; if `updates`, it may change buffers.

    The module is left as it was.
    """
    size = next((leaf.shape[0] for leaf in leaves if leaf.ndim), None)
    batched = [bool(leaf.ndim) and leaf.shape[0] == size for leaf in leaves]
    free = [b and dynamic for b in batched]
    sizes = tuple((None, *x.shape[1:]) if f else tuple(x.shape) for x, f in zip(leaves, free, strict=True))
    if dynamic and size == 1:  # torch.export would specialise an axis of length 1 to that length
        leaves = [torch.cat([leaf, leaf]) if b else leaf for leaf, b in zip(leaves, batched, strict=True)]
    axis = torch.export.Dim("batch")
    shapes = tuple({0: axis} if b else None for b in batched)
    outputs: list[Any] = []
    flat = Flat(module, structure, call, outputs.append)
    with _quietly(), torch.enable_grad():
        try:
            wanted = module_outputs(flat, leaves)
        except NotImplementedError:
            raise
        except Exception as error:
            raise ModuleCallError(f"module itself fails on example_inputs, called by torch: {error}") from error
        exported = torch.export.export(flat, tuple(leaves), dynamic_shapes=(shapes,) if dynamic else None, strict=False)
        wide = check_export(flat, wanted, exported, leaves)
        if _writes(exported.graph_module):
            if paths := spectral_norms(module):
                raise NotImplementedError(
                    f"module has spectral norms that iterate in place when it is called ({', '.join(paths)}): put these"
                    " into evaluation, module.get_submodule(path).eval(), and convert with train=None, or as"
                    " the module then is; their vectors are constants. To iterate them, call each in training mode"
                    " between conversions."
                )
            if _calls(exported.graph_module, NO_GRAD):
                raise NotImplementedError(
                    "module uses both torch.no_grad() and operators in place, which torch.export cannot untangle with"
                    " the right gradients: use tensor.detach() instead of torch.no_grad(), or out-of-place operators."
                )
            _check_names(module)
            exported = exported.run_decompositions({})
    return _program(exported, module, outputs[-1], sizes, updates, tuple(wide))


def _check_names(module: torch.nn.Module) -> None:
    """Refuse buffers with two names if some are written: torch.export treats each name as a buffer of its own."""
    once = dict(module.named_buffers())
    more = [name for name, _ in module.named_buffers(remove_duplicate=False) if name not in once]
    if more:
        raise NotImplementedError(
            f"module has {', '.join(more)} under other names as well, and writes into buffers when it is called, which"
            " torch.export cannot untangle: let one attribute hold the part that is used twice."
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warnings about its own modules, compiled submodules, and fused operators of whole layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def operators(graph: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    """All calls of operators, including those in nested graphs."""
    for part in graph.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from (node for node in part.graph.nodes if node.op == "call_function")


def _calls(graph: torch.fx.GraphModule, name: str) -> bool:
    return any(str(node.target) == name for node in operators(graph))


def packet_name(node: torch.fx.Node) -> str:
    """`add_` for `aten.add_.Tensor`."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def writes_in_place(node: torch.fx.Node) -> bool:
    """Whether an operator writes into its first argument, by torch's naming."""
    name = packet_name(node)
    return name.endswith("_") and not name.endswith("__")


def _writes(graph: torch.fx.GraphModule) -> bool:
    """Whether there are writes in place that anything else may see."""
    return any(
        (writes_in_place(node) and not _is_unobserved(node)) or _updates_statistics(node) for node in operators(graph)
    )


def _updates_statistics(node: torch.fx.Node) -> bool:
    """Whether an operator is a normalisation that updates its running mean, which its name does not tell."""
    if packet_name(node) not in ("batch_norm", "instance_norm") or len(node.args) < 6:
        return False
    return node.args[3] is not None and node.args[5] is True


def _is_unobserved(node: torch.fx.Node) -> bool:
    """Whether the tensor that is written into is a new one that nothing else reads."""
    target = node.args[0]
    if not isinstance(target, torch.fx.Node) or target.op != "call_function" or len(target.users) != 1:
        return False
    if writes_in_place(target):
        return _is_unobserved(target)
    name = packet_name(target)
    return name in RETURN_NEW_TENSORS or name.startswith("conv")


def _program(
    exported: Any, module: torch.nn.Module, outputs: Any, sizes: Any, updates: bool, wide: tuple[str, ...]
) -> Program:
    signature = exported.graph_signature
    updated = []
    for spec in signature.output_specs:
        if updates and spec.kind is OutputKind.BUFFER_MUTATION:
            updated.append((spec.target or "").removeprefix("module."))
        elif spec.kind is not OutputKind.USER_OUTPUT:
            what = (
                "its inputs"
                if spec.kind is OutputKind.USER_INPUT_MUTATION
                else (spec.target or "").removeprefix("module.")
            )
            raise NotImplementedError(
                f"module writes into {what} when it is called, which a pure function cannot. In evaluation"
                " (module.eval(), or train=False), batch normalisation uses the statistics that it has and writes none;"
                " torch_bridge.from_module(..., train=True) returns the new buffers, for training with ggn_jax.kfac; or"
                " let the module return what is new."
            )
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters, constants, buffers = {}, {}, {}
    inputs = []
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
            continue
        target = (spec.target or "").removeprefix("module.")
        if spec.kind is InputKind.PARAMETER and module.get_parameter(target).is_floating_point():
            parameters[name] = first[id(module.get_parameter(target))]
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            value = exported.state_dict.get(spec.target)
            if spec.kind is InputKind.BUFFER:
                buffers[name] = target
            constants[name] = as_constant(exported.constants[spec.target] if value is None else value)
        else:
            raise NotImplementedError(f"module holds {target}, of a kind that is not supported ({spec.kind.name}).")
    graph = exported.graph_module
    return Program(graph, parameters, constants, tuple(inputs), outputs, sizes, buffers, tuple(updated), wide)


def as_constant(tensor: torch.Tensor) -> np.ndarray:
    """A copy in the host's memory."""
    host = tensor.detach().cpu()
    with jax_on(host.device):
        return np.array(borrow(host), copy=True)
