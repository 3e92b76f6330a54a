"""A graph as text, for telling whether two modules compute alike."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from torch_bridge._export import Program


def graph_hash(program: Program) -> str:
    """The same for two programs with the same operators of the same parameters, buffers, constants and inputs.

    Values of parameters and buffers may differ, and so may devices.
    """
    text = "\n".join(_lines(program.graph, _names(program)))
    return hashlib.sha256(f"{text}\n{program.outputs}".encode()).hexdigest()


def array_hash(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def _names(program: Program) -> dict[str, str]:
    """What each placeholder stands for; constants by their hash, as their values are part of the function."""
    inputs = {name: f"input {number}" for number, name in enumerate(program.inputs)}
    buffers = {name: f"buffer {buffer}" for name, buffer in program.buffers.items()}
    return (
        {name: array_hash(value) for name, value in program.constants.items()} | program.parameters | inputs | buffers
    )


def _lines(graph: Any, names: dict[str, str]) -> Iterator[str]:
    """One line for each node; nodes are numbered, since their names depend on how the graph was traced."""
    numbers = {node: number for number, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            yield names.get(node.name, "")
        elif node.op == "get_attr":
            yield from _lines(graph.get_submodule(node.target), {})
        else:
            kwargs = {name: value for name, value in node.kwargs.items() if name != "device"}
            yield f"{node.target}{_text(node.args, numbers)}{_text(kwargs, numbers)}"


def _text(value: Any, numbers: dict[torch.fx.Node, int]) -> str:
    if isinstance(value, torch.fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, dict):
        return _text([(name, value[name]) for name in sorted(value)], numbers)
    if isinstance(value, list | tuple):  # which a graph may hold as classes of its own
        return f"[{','.join(_text(entry, numbers) for entry in value)}]"
    return repr(value)
