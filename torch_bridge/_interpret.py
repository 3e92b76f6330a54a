"""Running an exported graph in JAX, each operator by its function in the table."""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torch_bridge._export import AUTOCAST, NESTED, NO_GRAD, Program, operators, packet_name, writes_in_place
from torch_bridge.aten import find_operator
from torch_bridge.aten.dropout import NoKeyError
from torch_bridge.aten.dtypes import to_dtype
from torch_bridge.aten.registry import UnsupportedResult

# Arguments that mean nothing in JAX, and operators that have these names for other arguments.
IGNORED_KWARGS = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy", "generator"}
OPS_WITH_ALL_KWARGS = {"_assert_tensor_metadata"}


def name_of(node: torch.fx.Node) -> str:
    """The operator's name in the table; for one in place, that of the operator which returns the result."""
    name = str(node.target)
    if not writes_in_place(node):
        return name
    library, packet, *overload = name.split(".")
    return ".".join([library, packet[:-1], *overload])


def module_path(node: torch.fx.Node) -> str:
    """The path of the module that called the operator, in the module that was converted."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple)]
    path = paths[-1] if paths else ""
    return path.removeprefix("L['self'].").removeprefix("module").removeprefix(".")


def where(node: torch.fx.Node) -> str:
    path = module_path(node)
    return f"{node.target} of {path!r}" if path else f"{node.target} of the module itself"


def check_operators(program: Program) -> None:
    """Refuse operators that are not in the table, all of them at once."""
    missing: dict[str, list[str]] = {}
    for node in operators(program.graph):
        if not _is_python(node) and str(node.target) not in NESTED and find_operator(name_of(node)) is None:
            paths = missing.setdefault(str(node.target), [])
            paths += [] if module_path(node) in paths else [module_path(node)]
    if missing:
        found = "; ".join(
            f"{name} (in {', '.join(repr(path) if path else 'the module itself' for path in paths)})"
            for name, paths in missing.items()
        )
        raise NotImplementedError(
            f"module uses operators that have no JAX function here: {found}. Say what"
            " they are with torch_bridge.register_operator(torch.ops.<library>.<operator>, function). What is random,"
            f" or makes tensors whose sizes depend on data, cannot be converted.{_experts_hint(found)}"
        )


def _experts_hint(found: str) -> str:
    """The way out for kernels of mixtures of experts, for which Hugging Face's models have an alternative."""
    way_out = " For Hugging Face's mixtures of experts, call module.set_experts_implementation('batched_mm') first."
    return way_out if "grouped_mm" in found else ""


def check_dtypes(program: Program) -> None:
    """Refuse 64-bit floating numbers, and integers that need 64 bits, where JAX has none."""
    if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        return
    way_out = "convert it and call model_fn inside of `with jax.enable_x64(True)`"
    if program.wide:
        raise TypeError(
            f"module has integers of more than 32 bits with example_inputs ({', '.join(program.wide)}), but JAX's"
            f" 64-bit types are switched off: {way_out}, or make these smaller."
        )
    for node in program.graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex128):
            what = where(node) if node.op == "call_function" else program.parameters.get(node.name, node.name)
            raise TypeError(
                f"module computes in {value.dtype} ({what}), but JAX's 64-bit types are switched off: {way_out}, or"
                " use module.float()."
            )


def _is_python(node: torch.fx.Node) -> bool:
    """Whether a call is arithmetic on sizes, which are Python numbers."""
    return not str(node.target).startswith(("aten.", "prims.")) and getattr(node.target, "__module__", "") in (
        "_operator",
        "math",
        "torch",
        "builtins",
    )


def run(program: Program, params: Mapping[str, Any], leaves: Sequence[Any], key: jax.Array | None) -> Any:
    """The module's outputs, and its new buffers by name; `params` may hold buffers, and `key` is for random numbers."""
    check_dtypes(program)
    values: dict[str, Any] = {name: jnp.asarray(array) for name, array in program.constants.items()}
    values |= {name: params[parameter] for name, parameter in program.parameters.items()}
    for name, buffer in program.buffers.items():
        if buffer in params:  # as constants are, of 32 bits where JAX has no others
            values[name] = jnp.asarray(params[buffer], values[name].dtype)
    values |= dict(zip(program.inputs, leaves, strict=True))
    placeholders = [node for node in program.graph.graph.nodes if node.op == "placeholder"]
    keys = (None if key is None else jax.random.fold_in(key, number) for number in itertools.count())
    results = _run_graph(program.graph, [values.get(node.name) for node in placeholders], keys)
    count = len(program.updated)
    return jax.tree.map(lambda i: results[count + i], program.outputs), dict(
        zip(program.updated, results[:count], strict=True)
    )


def _run_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], keys: Iterator[jax.Array | None]) -> Any:
    values: dict[torch.fx.Node, Any] = {}
    rest = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(rest)
        elif node.op == "get_attr":
            values[node] = graph.get_submodule(node.target)
        elif node.op == "output":
            return torch.fx.node.map_arg(node.args[0], values.__getitem__)
        else:
            with jax.named_scope(module_path(node).replace(".", "/") or "module"):
                values[node] = _call(node, values, keys)
    raise AssertionError("a graph has an output")


def _call(node: torch.fx.Node, values: dict[torch.fx.Node, Any], keys: Iterator[jax.Array | None]) -> Any:
    args: Any = torch.fx.node.map_arg(node.args, values.__getitem__)
    kwargs: Any = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
    if str(node.target) == NO_GRAD:
        enabled, graph, *inputs = args
        results = _run_graph(graph, inputs, keys)
        return results if enabled else jax.tree.map(jax.lax.stop_gradient, results)
    if str(node.target) == AUTOCAST:
        _, _, enabled, _, graph, *inputs = args
        if enabled:
            raise NotImplementedError(
                f"torch.autocast is on in {where(node)}: convert the module without it, or in the lower precision"
                " itself, module.bfloat16()."
            )
        return _run_graph(graph, inputs, keys)
    if _is_python(node):
        result = node.target(*args, **kwargs)  # type: ignore[operator]  # a function
        if isinstance(result, UnsupportedResult) and node.users:
            raise NotImplementedError(
                f"the indices of {result.what} are used, which are not computed here: {where(node)}."
            )
        return result
    function = find_operator(name_of(node))
    assert function is not None  # see `check_operators`
    expected = node.meta.get("val")
    args, kwargs = jax.tree.map(_argument, (list(args), dict(kwargs)), is_leaf=_is_argument)
    if packet_name(node) not in OPS_WITH_ALL_KWARGS:
        kwargs = {name: value for name, value in kwargs.items() if name not in IGNORED_KWARGS}
    if kwargs.get("dtype") is None and isinstance(expected, torch.Tensor) and _takes(function, "dtype"):
        kwargs["dtype"] = to_dtype(expected.dtype)
    if _takes(function, "dropout_key"):
        kwargs["dropout_key"] = next(keys)
    try:
        result = function(*args, **kwargs)
    except NotImplementedError as error:
        kind = NoKeyError if isinstance(error, NoKeyError) else NotImplementedError
        raise kind(f"{where(node)}: {error}.") from error
    if writes_in_place(node) and isinstance(expected, torch.Tensor):
        shape = result.shape if result.ndim > expected.ndim else jnp.broadcast_shapes(result.shape, args[0].shape)
        result = jnp.broadcast_to(result.astype(args[0].dtype), shape)
    _check(node, result, expected)
    return result


def _is_argument(value: Any) -> bool:
    return value is None or isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format)


def _argument(value: Any) -> Any:
    return to_dtype(value) if isinstance(value, torch.dtype) else value


def _takes(function: Any, name: str) -> bool:
    """Whether the function has a keyword-only argument of this name."""
    try:
        parameter = inspect.signature(function).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _check(node: torch.fx.Node, result: Any, expected: Any) -> None:
    """Compare with torch's result: its dtype, its rank, and the sizes that do not depend on the batch size."""
    if isinstance(expected, list | tuple):
        for part, like in zip(result, expected, strict=False):
            _check(node, part, like)
    if not isinstance(expected, torch.Tensor) or isinstance(result, UnsupportedResult):
        return
    if not isinstance(result, jax.Array):
        raise TypeError(f"the function of {node.target} must return an array; got {type(result).__name__}.")
    wanted = [size if isinstance(size, int) else None for size in expected.shape]
    fits = len(wanted) == result.ndim and all(w in (None, s) for w, s in zip(wanted, result.shape, strict=True))
    if not fits or result.dtype != to_dtype(expected.dtype):
        shape = ", ".join("batch" if size is None else str(size) for size in wanted)
        raise TypeError(
            f"{where(node)} gave an array of shape {result.shape} and dtype {result.dtype}; torch has [{shape}] and"
            f" {expected.dtype}. Inputs and parameters must have the dtypes that module was converted with."
        )
