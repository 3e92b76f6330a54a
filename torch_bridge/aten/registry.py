"""Which JAX function stands for which operator of PyTorch."""

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]

OVERLOAD, PACKET = type(torch.ops.aten.relu.default), type(torch.ops.aten.relu)


class UnsupportedResult:
    """Stands for further results that are not computed here, such as the indices of maxima; an error if it is used."""

    def __init__(self, what: str):
        self.what = what


_TABLE: dict[str, Function] = {}


def aten(*names: str) -> Callable[[Function], Function]:
    """Enter a function for ATen operators: `"add"` for all overloads, `"add.Tensor"` for one."""

    def enter(function: Function) -> Function:
        _TABLE.update({f"aten.{name}": function for name in names})
        return function

    return enter


def find_operator(name: str) -> Function | None:
    """The function of an operator by its full name, such as `aten.add.Tensor`."""
    return _TABLE.get(name) or _TABLE.get(name.rpartition(".")[0])


def register_operator(operator: Any, function: Function) -> None:
    """Register the JAX function that stands for an operator of PyTorch in `torch_bridge.from_module`.

    An operator that is in the table already is replaced, for modules that are converted from then on.

    Args:
        operator: `torch.ops.aten.relu.default`, say, or `torch.ops.aten.relu` for all its overloads; operators of other
            libraries (`torch.library.custom_op`) are found in `torch.ops` as well.
        function: a pure JAX function that is called with the operator's arguments, in its schema's order and with its
            names for what is passed by keyword: arrays for tensors, Python numbers and lists as they are, NumPy's
            dtypes for torch's. Devices, layouts and memory formats are left out. It returns an array, or a tuple for
            several results, of the shape and dtype that torch gives. Its derivatives are those that the curvature is
            made of.

    Raises:
        TypeError: for an `operator` that is not one of `torch.ops`, or a `function` that cannot be called.

    Example:
        >>> import torch, jax, jax.numpy as jnp
        >>> @torch.library.custom_op("example::cube", mutates_args=())
        ... def cube(x: torch.Tensor) -> torch.Tensor:
        ...     return x**3
        >>> _ = cube.register_fake(torch.empty_like)
        >>> register_operator(torch.ops.example.cube, lambda x: x**3)
    """
    if not isinstance(operator, OVERLOAD | PACKET):
        raise TypeError(f"operator must be one of torch.ops, such as torch.ops.aten.relu.default; got {operator!r}.")
    if not callable(function):
        raise TypeError(f"function must be a function of JAX arrays; got {type(function).__name__}.")
    name = str(operator)
    if isinstance(operator, PACKET):  # what stands for single overloads would be found first
        for overload in [key for key in _TABLE if key.startswith(f"{name}.")]:
            del _TABLE[overload]
    _TABLE[name] = function
