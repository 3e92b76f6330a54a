"""A module that was converted, for operators at many values of its parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import torch
from torch import Tensor, nn

from torch_bridge._check_module import names_with_hooks
from torch_bridge.batches import WRAPPERS, as_outputs
from torch_bridge.losses import GLOBAL_HOOKS
from torch_bridge.modules import convert
from torch_bridge.tensors import jax_on, to_jax


class Snapshot:
    """What a module was like but for the values of some of its parameters and buffers, `free`."""

    def __init__(self, module: nn.Module, free: Mapping[str, Tensor]):
        self._module, self._free = module, dict(free)
        self._constants = {name: tensor.clone() for name, tensor in self._fixed().items()}
        self._parts, self._values = self._modes(), self._attributes()

    def _fixed(self) -> dict[str, Tensor]:
        tensors = [*self._module.named_parameters(), *self._module.named_buffers()]
        return {name: tensor for name, tensor in tensors if name not in self._free}

    def _modes(self) -> dict[str, tuple[nn.Module, bool]]:
        return {name: (part, part.training) for name, part in self._module.named_modules()}

    def _attributes(self) -> dict[str, Any]:
        """Whatever else a forward may read: numbers, text, functions and hooks, by name."""
        found = {}
        for path, part in self._module.named_modules():
            for name, value in [] if isinstance(part, WRAPPERS) else vars(part).items():
                if name.endswith(("ward_hooks", "ward_pre_hooks")):
                    found[f"{path}.{name[1:]}".removeprefix(".")] = tuple(value.values())
                elif not name.startswith("_") and name != "training" and _is_plain(value):
                    found[f"{path}.{name}".removeprefix(".")] = _frozen(value)
            for name, value in _class_attributes(part).items():
                found.setdefault(f"{path}.{name}".removeprefix("."), _frozen(value))
        return found

    def changed(self) -> list[str]:
        """The names of what changed or was replaced since: parameters, buffers, parts and their modes."""
        tensors, parts = self._fixed(), self._modes()
        now = dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        names = [name for name, tensor in self._free.items() if now.get(name) is not tensor]
        names += sorted(tensors.keys() ^ self._constants.keys())
        names += [name for name, before in self._constants.items() if not _same(tensors.get(name), before)]
        values = self._attributes()
        values = {n: x for n, x in values.items() if n in self._values or not isinstance(x, Tensor)}  # calls keep some
        names += [n for n in {**self._values, **values} if not _equal(values.get(n, ()), self._values.get(n, ()))]
        names += [f"hooks of {name}" for name in names_with_hooks(dict(self._module.named_parameters()))]
        names += ["hooks of all modules"] if any(map(len, GLOBAL_HOOKS)) else []
        paths = sorted(parts.keys() | self._parts.keys())
        return names + [path or "the whole" for path in paths if parts.get(path) != self._parts.get(path)]


def _class_attributes(part: nn.Module) -> dict[str, Any]:
    """Plain class attributes of a submodule, except those of torch's own classes."""
    own = [cls for cls in type(part).__mro__ if not cls.__module__.startswith(("torch.", "builtins"))]
    held = {name: value for cls in reversed(own) for name, value in vars(cls).items()}
    return {name: value for name, value in held.items() if name[:1] != "_" and _is_plain(value) and not callable(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    if isinstance(value, Tensor):
        # A constant, unless it was computed from parameters and stored.
        return not value.requires_grad and not isinstance(value, nn.Parameter)
    function = callable(value) and not isinstance(value, nn.Module)
    return value is None or isinstance(value, bool | int | float | str) or function


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _frozen(entry)) for key, entry in value.items())
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _equal(now: Any, before: Any) -> bool:
    if isinstance(now, tuple) and isinstance(before, tuple):
        return len(now) == len(before) and all(map(_equal, now, before))
    if isinstance(now, Tensor) or isinstance(before, Tensor):
        return isinstance(now, Tensor) and isinstance(before, Tensor) and _same(now, before)
    return now is before or bool(now == before)


def _same(now: Tensor | None, before: Tensor) -> bool:
    return now is not None and torch.equal(now, before)


class ConvertedModule:
    """A module that is converted once, by `from_module`, for operators at many values of its parameters.

    The operators of `torch_bridge` take it in place of the module. Each of them is then made at the values that the
    parameters have at that time, without another export, and what was compiled for an operator of the same parameters
    is used again.

    Args:
        module: a `torch.nn.Module`, converted in the mode that it is in. Buffers, the parts and their modes must stay
            as they are, and so must hooks (those of gradients included) and attributes that are numbers, text, tensors
            or functions, or lists and dicts of them; parameters may change their values, but not be replaced: operators
            made after that raise RuntimeError. Attributes of other kinds, such as a config object, must not change
            either, which is not detected.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments, of tensors
            and nested containers of them, as for `from_module`. Inputs of operators have these shapes, except for the
            batch's size.

    Attributes:
        module: the module.
        model_fn: the function, as `from_module` returns it.
        output_fn: the same, but for a module that returns a mapping with `logits` it returns only these.

    Raises:
        NotImplementedError, TypeError, RuntimeError: for modules that `from_module` refuses.

    Example:
        >>> import torch, torch_bridge
        >>> module = torch.nn.Linear(2, 3)
        >>> converted, params = torch_bridge.ConvertedModule(module, torch.ones(1, 2)), list(module.parameters())
        >>> for batch in 2 * [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))]:
        ...     kfac = torch_bridge.KFACLinearOperator(converted, torch.nn.CrossEntropyLoss(), params, [batch])
        ...     with torch.no_grad():
        ...         _ = [p.add_(-0.1 * step) for p, step in zip(params, kfac.inverse(damping=0.1) @ params)]
    """

    def __init__(self, module: nn.Module, example_inputs: Any):
        try:
            with jax_on(next(module.parameters(), torch.zeros(())).device):  # as operators are made and used
                converted = convert(module, example_inputs, updates=False)
        except NotImplementedError as error:
            if "train=True" not in str(error):  # which is what changes in evaluation mode
                raise
            raise NotImplementedError(f"{error} The module is in training mode: call its eval() first.") from error
        self._run, self._names, self.graph = converted.run, list(converted.params), converted.graph
        # Objects whose compilations are found again.
        self.model_fn, self.output_fn, self.part_fn = self._call, self._outputs, self._part_outputs
        self.module = module
        parameters = dict(module.named_parameters())
        self._snapshot = Snapshot(module, {name: parameters[name] for name in self._names})

    def _call(self, params: dict[str, jax.Array], inputs: Any) -> Any:
        return self._run(params, inputs)[0]

    def _outputs(self, params: dict[str, jax.Array], inputs: Any) -> Any:
        return as_outputs(self.model_fn(params, inputs))

    def _part_outputs(self, params: dict[str, jax.Array], inputs: tuple[Any, dict[str, jax.Array]]) -> Any:
        """The outputs as a function of some parameters; the others come with the inputs."""
        given, others = inputs
        return self._outputs({**others, **params}, given)

    def params(self) -> dict[str, jax.Array]:
        """Return the parameters' present values.

        Returns:
            A dict of JAX arrays by the module's names.

        Raises:
            RuntimeError: where another part of the module has changed.
        """
        if changed := self._snapshot.changed():
            raise RuntimeError(
                f"{', '.join(changed)} of the module changed or were replaced since it was converted: convert it again."
            )
        parameters = dict(self.module.named_parameters())
        return {name: to_jax(parameters[name]) for name in self._names}
