"""Check that a graph of `torch.export` computes what the module does: torch runs both, and they are compared."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

CAUSES = (
    "hooks of tensors, torch.autograd.graph.saved_tensors_hooks, torch.inference_mode() inside of it (use"
    " tensor.detach()), checkpoints with use_reentrant=True (use False), buffers computed from parameters, and no"
    " torch.compiler.is_exporting()"
)


def module_outputs(flat: nn.Module, leaves: Sequence[Any]) -> list[Any]:
    """The module's outputs, with their autograd graph, from copies of its buffers; lazy parameters get shapes by this.

    Backward hooks and custom derivatives are refused by name.
    """
    with _all_require_gradients(flat), _same_random_numbers():
        _make_lazy_buffers(flat, leaves)
        copies = {id(buffer): buffer.clone() for buffer in flat.buffers()}
        # Each submodule once: if it has two names, torch would put the copies into it, and leave them there.
        parts = [(path, part.named_buffers("", False, False)) for path, part in flat.named_modules()]
        buffers = {f"{path}.{name}".removeprefix("."): copies[id(b)] for path, held in parts for name, b in held}
        inputs = tuple(leaf.clone() for leaf in leaves)
        outputs = list(torch.func.functional_call(flat, buffers, inputs, tie_weights=False))
        _check_nodes(outputs)
    return outputs


def _make_lazy_buffers(flat: nn.Module, leaves: Sequence[Any]) -> None:
    """Let lazy normalisations create their statistics; in evaluation mode, these keep their initial values."""
    if not any(nn.parameter.is_lazy(buffer) for buffer in flat.buffers()):
        return
    modes = {part: part.training for part in flat.modules()}
    try:
        with torch.no_grad():
            flat.eval()(*(leaf.clone() for leaf in leaves))
    finally:
        for part, training in modes.items():
            part.training = training


def check_export(flat: nn.Module, outputs: Sequence[Any], exported: Any, leaves: Sequence[Any]) -> list[str]:
    """Refuse a graph whose outputs or gradients differ from the module's, on the example inputs.

    Returns the names of integers in it that need more than 32 bits there.

    What torch.export does not follow, it drops silently: hooks, custom derivatives, grad modes. Instead of looking for
    each of these, the results are compared, with the same random numbers.
    """
    parameters = {name: p for name, p in flat.named_parameters() if p.is_floating_point()}
    with _all_require_gradients(flat), _same_random_numbers():
        results, wide = _run(flat, exported, leaves)
        pairs = zip(outputs, results[len(results) - len(outputs) :], strict=True)  # new buffers come first
        tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
        differ = [] if all(_same(a, b) for a, b in tensors) else ["outputs"]
        theirs = _gradients([a for a, _ in tensors], list(parameters.values()))
        ours = _gradients([b for _, b in tensors], list(parameters.values()))
    if theirs is not None and not differ:
        size = max((float(g.nan_to_num(0, 0, 0).abs().max()) for g in theirs if g.numel()), default=0.0)
        names = [name.removeprefix("module.") for name in parameters]
        differ = [
            f"gradient in {n!r}"
            for n, a, b in zip(names, theirs, ours or theirs, strict=True)
            if not _close(a, b, size)
        ]
    if differ:
        raise NotImplementedError(
            f"what torch.export makes of the module has other values than the module: {', '.join(differ)}. It follows"
            f" no {CAUSES}."
        )
    return wide


@contextlib.contextmanager
def _all_require_gradients(module: nn.Module) -> Iterator[None]:
    """Require gradients of all parameters: in JAX, frozen ones have them too, and they are compared."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    frozen = [p for p in parameters if not p.requires_grad and not p.is_inference()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """The same random numbers in each of these contexts; afterwards, generators are as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class _RecordingInterpreter(torch.fx.Interpreter):
    """Runs a graph, and records which integers in it do not fit in 32 bits."""

    def __init__(self, graph: torch.fx.GraphModule, names: dict[str, str]):
        super().__init__(graph)
        self.wide: list[str] = []
        self._names = names  # of the inputs, parameters, buffers and constants

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.uint64) and value.numel():
            limits = torch.iinfo(torch.int32 if value.dtype == torch.int64 else torch.uint32)
            if not limits.min <= int(value.min()) <= int(value.max()) <= limits.max:
                self.wide.append(self._names.get(n.name, str(n.target)))
        return value


def _run(flat: nn.Module, exported: Any, leaves: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """All outputs of the graph, run by torch with the module's parameters; and its integers of more than 32 bits."""
    given = iter(leaves)
    values: list[Any] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            values.append(next(given).clone())
        elif spec.kind is InputKind.PARAMETER:
            values.append(flat.get_parameter(spec.target))
        else:
            value = exported.state_dict.get(spec.target)
            value = exported.constants.get(spec.target) if value is None else value
            values.append(value.detach().clone() if isinstance(value, Tensor) else value)
    specs = exported.graph_signature.input_specs
    names = {spec.arg.name: (spec.target or "inputs").removeprefix("module.") for spec in specs}
    interpreter = _RecordingInterpreter(exported.graph_module, names)
    results = interpreter.run(*values)  # not by a call, which runs hooks
    return list(results), interpreter.wide


def _check_nodes(outputs: Sequence[Any]) -> None:
    """Refuse custom derivatives and backward hooks by name, before any of them runs."""
    nodes = [output.grad_fn for output in outputs if isinstance(output, Tensor) and output.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        # Those of a torch.library.custom_op have this name; the operator itself is in the graph.
        generated = node.name().startswith("GeneratedBackwardFor_")
        if node.name().startswith("BackwardHookFunction"):
            raise NotImplementedError(
                "module has backward hooks, which change gradients behind the function's back: remove them, by"
                " handle.remove(), where `handle` is what register_full_backward_hook returned."
            )
        if node.name() == "CheckpointFunctionBackward":
            raise NotImplementedError(
                "module uses torch.utils.checkpoint with use_reentrant=True, whose derivative torch.export drops: use"
                " use_reentrant=False, which it follows."
            )
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not generated:
            raise NotImplementedError(
                f"module uses a torch.autograd.Function ({node.name().removesuffix('Backward')}), whose own derivative"
                " torch.export drops: put plain operators in its place, if their derivative is the same, as"
                " torch.nn.GELU('tanh') for Bloom's gelu_impl; or make it a torch.library.custom_op, and say what it is"
                " in JAX with torch_bridge.register_operator."
            )
        more = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= more
        nodes += more


def _gradients(outputs: list[Tensor], parameters: list[nn.Parameter]) -> list[Tensor] | None:
    """The gradients of a weighted sum of all outputs, zeros for unused parameters; None if torch has no derivative."""
    outputs = [output for output in outputs if output.requires_grad]
    weights = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).to(o.dtype).reshape(o.shape) for o in outputs]
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not outputs or not wanted:
        return [torch.zeros_like(parameter) for parameter in parameters]
    try:
        found = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True))
    except RuntimeError:  # an operator without derivative
        return None
    grads = [next(found) if parameter.requires_grad else None for parameter in parameters]
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, grads, strict=True)]


def _same(wanted: Tensor, got: Any) -> bool:
    alike = isinstance(got, Tensor) and wanted.shape == got.shape and wanted.dtype == got.dtype
    return alike and _close(wanted, got, 0.0)


def _close(wanted: Tensor, got: Tensor, size: float) -> bool:
    """Equal to half of the digits, since rounding differs if torch takes another kernel.

    `size` is that of the largest of several tensors, in whose sums the rounding happened.
    """
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(wanted, got)
    if not wanted.numel():
        return True
    eps = torch.finfo(wanted.dtype).eps
    finite = torch.isfinite(wanted)
    scale = float(wanted.detach()[finite].abs().max()) if bool(finite.any()) else 0.0
    return torch.allclose(
        wanted.detach(), got.detach(), rtol=eps**0.5, atol=eps**0.5 * scale + 100 * eps * size, equal_nan=True
    )
