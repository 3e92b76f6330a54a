"""Loss modules of PyTorch as losses of `ggn_jax`.

A loss is serialised as options, which are Python literals, and tensors: so it passes through compiled and exported
graphs, in which the options are text and the tensors are inputs.
"""

import ast
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

import ggn_jax
from torch_bridge.tensors import check_tensor, jax_dtype
from torch_bridge.unsupported import way_out

# `torch.nn.Module` has no public names for these; if they are renamed, nothing is refused.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooks_of_all_modules() -> list[Any]:
    """The dictionaries in which torch keeps hooks for all modules; a hook's handle refers to its own."""
    module = torch.nn.modules.module
    registers = (
        module.register_module_forward_hook,
        module.register_module_forward_pre_hook,
        module.register_module_full_backward_pre_hook,
    )
    found = []
    for register in registers:
        handle = register(lambda *_: None)
        found.append(handle.hooks_dict_ref())
        handle.remove()
    # Registering a hook of this kind would forbid those of the older kind from then on.
    return [*found, getattr(module, "_global_backward_hooks", {})]


GLOBAL_HOOKS = _hooks_of_all_modules()


@dataclass(frozen=True)
class LossEntry:
    """How a class of loss modules becomes a loss of `ggn_jax`."""

    name: str
    convert: Callable[..., Any]
    tensors: tuple[str, ...]
    options: tuple[str, ...]
    floating_targets: bool
    forward: Any  # the class's forward when it was registered

    def serialise(self, module: torch.nn.Module) -> tuple[str, dict[str, torch.Tensor]]:
        """The module's options as text, and its tensors by name."""
        self._check_unchanged(module)
        names = [name for name in self.tensors if getattr(module, name) is not None]
        options = ", ".join([f"{name!r}: {_literal(getattr(module, name))!r}" for name in self.options])
        return f"({self.name!r}, {{{options}}}, {names!r})", {name: getattr(module, name) for name in names}

    def _check_unchanged(self, module: torch.nn.Module) -> None:
        """Refuse a module that may not compute what its class does."""
        cls = type(module)
        # `torch.compile` compiles again if a length changes, but not if a dictionary becomes true.
        if "forward" in vars(module) or any(len(getattr(module, hooks, ())) for hooks in HOOKS):
            raise NotImplementedError(
                f"loss_func has hooks, or a forward of its own, and so need not be {cls.__name__}: remove them, or make"
                " it a class of its own and add that with torch_bridge.register_loss."
            )
        if cls.forward is not self.forward:
            raise NotImplementedError(
                f"loss_func is a {cls.__name__}, whose forward was replaced, so that it may compute something else: put"
                " its own back, or replace it in a subclass and add that with torch_bridge.register_loss."
            )
        if any(len(hooks) for hooks in GLOBAL_HOOKS):
            raise NotImplementedError(
                f"loss_func need not be {cls.__name__} while there are hooks for all modules"
                " (torch.nn.modules.module.register_module_forward_hook and its like): remove them before torch_bridge"
                " is called."
            )


def _literal(value: Any) -> Any:
    """A Python number for a NumPy number, or for one that `torch.compile` made symbolic."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    # Through hexadecimal text, which makes a symbolic number concrete in every version of Python.
    return float.fromhex(float(value).hex()) if isinstance(value, float | np.floating) else value


_REGISTERED: dict[type, LossEntry] = {}
_BY_NAME: dict[str, LossEntry] = {}


def register_loss(
    cls: type[torch.nn.Module],
    convert: Callable[..., Any],
    *,
    tensors: Sequence[str] = (),
    options: Sequence[str] = (),
    floating_targets: bool = False,
) -> None:
    """Register a class of loss modules for all functions of this package.

    Modules are looked up by their exact class: a subclass may compute anything, and is refused until it is registered.
    Registering a class again replaces its entry for functions made from then on.

    Args:
        cls: the class of the modules.
        convert: a function that is called with the attributes named in `tensors` (as JAX arrays, `None` left out) and
            `options` as keyword arguments, and returns a `ggn_jax` loss, such as a `ggn_jax.LikelihoodLoss` of your
            own. Or a class that is registered already, such as `torch.nn.CrossEntropyLoss`, if its mathematics is that
            of `cls`.
        tensors: the names of attributes that are tensors, or None; `()` by default.
        options: the names of attributes that are Python literals (numbers, strings, bools, None, tuples of such); `()`
            by default.
        floating_targets: whether to refuse targets that are not floating, as the loss itself does; False by default.

    Raises:
        TypeError: for a `cls` that is not a class of modules.
        ValueError: for a `convert` that is a class which is not registered.

    Example:
        A loss that changes nothing about its base class's value:

        >>> import torch
        >>> class LoggedLoss(torch.nn.CrossEntropyLoss):
        ...     def forward(self, output, target):
        ...         loss = super().forward(output, target)
        ...         print(f"loss: {loss:.3f}")
        ...         return loss
        >>> register_loss(LoggedLoss, torch.nn.CrossEntropyLoss)

        A loss of your own, with a `ggn_jax` counterpart:

        >>> import ggn_jax, jax, jax.numpy as jnp
        >>> class JaxPoissonLoss(ggn_jax.LikelihoodLoss):
        ...     curvature = "hessian"
        ...     def nll(self, f, y):
        ...         return jnp.exp(f) - y * f
        ...     def sample(self, key, f):
        ...         return jax.random.poisson(key, jnp.exp(f)).astype(f.dtype)
        >>> class PoissonLoss(torch.nn.Module):
        ...     reduction = "mean"
        ...     def forward(self, output, target):
        ...         return (output.exp() - target * output).mean()
        >>> register_loss(PoissonLoss, JaxPoissonLoss, options=("reduction",))
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise TypeError(f"cls must be a class of torch.nn.Module; got {cls!r}.")
    if isinstance(convert, type) and issubclass(convert, torch.nn.Module):
        if convert not in _REGISTERED:
            raise ValueError(f"convert must be a class that is registered, or a function; got {convert.__name__}.")
        if tensors or options or floating_targets:
            raise ValueError(f"tensors, options and floating_targets are those of {convert.__name__}: leave them out.")
        like = _REGISTERED[convert]
        convert, tensors, options, floating_targets = like.convert, like.tensors, like.options, like.floating_targets
    if not callable(convert):
        raise TypeError(f"convert must be a function or a registered class of modules; got {convert!r}.")
    for argument, names in (("tensors", tensors), ("options", options)):
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{argument} must be a sequence of attributes' names; got {names!r}.")
    name = _new_name(cls)
    entry = LossEntry(name, convert, tuple(tensors), tuple(options), floating_targets, _own_forward(cls))
    _REGISTERED[cls] = _BY_NAME[name] = entry


def _own_forward(cls: type[torch.nn.Module]) -> Any:
    """The forward of `cls`; None if `cls` is one of torch's, and its forward was replaced before."""
    forward = cls.forward
    is_torchs = cls.__module__.startswith("torch.")
    return None if is_torchs and forward.__module__ != cls.__module__ else forward


def _new_name(cls: type) -> str:
    """A unique name for an entry, by which graphs and compiled functions refer to it.

    Classes made inside functions share their qualified name, and a class may be registered again.
    """
    name = qualified = f"{cls.__module__}.{cls.__qualname__}"
    number = 2
    while name in _BY_NAME:
        name, number = f"{qualified}#{number}", number + 1
    return name


def find_loss(module: Any) -> LossEntry:
    """The entry of the module's class."""
    entry = _REGISTERED.get(type(module))
    if entry is None:
        names = ", ".join(cls.__name__ for cls in _REGISTERED)
        bases = [cls.__name__ for cls in type(module).__mro__ if cls in _REGISTERED]
        hint = f" (a subclass of {bases[0]}, whose curvature need not be its own)" if bases else ""
        got = f"{type(module).__name__}{hint}. {way_out(module)}".strip()
        raise NotImplementedError(
            f"loss_func must be a module of one of the classes {names}; got {got} Use torch_bridge.register_loss to add"
            " a class."
        )
    return entry


def build_loss(text: str, tensors: Sequence[Any]) -> ggn_jax.Loss:
    """The `ggn_jax` loss of what `LossEntry.serialise` returned, with tensors as JAX arrays."""
    entry, options, names = _parse(text)
    loss = entry.convert(**dict(zip(names, tensors, strict=True)), **options)
    if not isinstance(loss, ggn_jax.Loss):
        raise TypeError(f"the function registered for {entry.name} must return a ggn_jax loss; got {loss!r}.")
    return loss


def check_loss(entry: LossEntry, module: torch.nn.Module, fisher_type: str) -> None:
    """Refuse invalid options, and shapes and dtypes of tensors: all that can be checked without values."""
    text, tensors = entry.serialise(module)
    for name, tensor in tensors.items():
        check_tensor(f"loss_func.{name}", tensor)
    with jax.enable_x64(True):
        shapes = [jax.ShapeDtypeStruct(t.shape, jax_dtype(f"loss_func.{name}", t)) for name, t in tensors.items()]

        def check(*arrays: jax.Array) -> tuple[()]:
            ggn_jax.make_grad_output_fn(build_loss(text, arrays), fisher_type)
            return ()

        jax.eval_shape(check, *shapes)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[LossEntry, dict[str, Any], list[str]]:
    try:
        name, options, tensors = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise TypeError(
            f"a loss's options must be Python literals, not tensors or other objects; got {text}."
        ) from None
    if name not in _BY_NAME:
        raise NotImplementedError(f"{name} is not registered in this process: call torch_bridge.register_loss first.")
    return _BY_NAME[name], options, tensors


register_loss(torch.nn.MSELoss, ggn_jax.MSELoss, options=("reduction",))
register_loss(
    torch.nn.CrossEntropyLoss,
    functools.partial(ggn_jax.CrossEntropyLoss, class_axis=0),
    tensors=("weight",),
    options=("ignore_index", "reduction", "label_smoothing"),
)
register_loss(
    torch.nn.BCEWithLogitsLoss,
    ggn_jax.BCEWithLogitsLoss,
    tensors=("weight", "pos_weight"),
    options=("reduction",),
    floating_targets=True,
)
