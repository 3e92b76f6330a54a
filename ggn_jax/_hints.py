"""Hints for errors: what was probably meant by a call that fails. Each starts with a space, or is empty."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import numpy as np

MAX_NOTE_LENGTH = 300
OPTAX = {
    "softmax_cross_entropy": "CrossEntropyLoss(class_axis=-1)",
    "softmax_cross_entropy_with_integer_labels": "CrossEntropyLoss(class_axis=-1)",
    "safe_softmax_cross_entropy": "CrossEntropyLoss(class_axis=-1)",
    "sigmoid_binary_cross_entropy": "BCEWithLogitsLoss()",
    "squared_error": "MSELoss()",
    "l2_loss": "MSELoss(), which is twice that",
}


def is_a(value: Any, module: str, name: str) -> bool:
    """Whether a value is of another library's class, without importing it: if so, it is imported already."""
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and isinstance(value, cls)


def describe_value(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if is_array(value):
        return f"an array of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of length {len(value)}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return type(value).__name__


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct) or is_a(value, "torch", "Tensor")


def module_hint(value: Any) -> str:
    """For a module of a neural-network library, passed as a function or as parameters."""
    if is_a(value, "flax.nnx", "Module"):
        return " For an NNX module: model_fn, params = ggn_jax.from_nnx(module)."
    if is_a(value, "flax.linen", "Module"):
        return " For a linen module: model_fn, params = ggn_jax.from_linen(module, variables)."
    if is_a(value, "torch.nn", "Module"):
        return " For a PyTorch module: model_fn, params = torch_bridge.from_module(module, example_inputs)."
    if isinstance(value, eqx.Module):
        return " For an Equinox module: model_fn, params = ggn_jax.from_equinox(module)."
    return ""


def tensor_hint(value: Any) -> str:
    """For a tensor or a list passed as an array."""
    if is_a(value, "torch", "Tensor"):
        return " Pass torch_bridge.to_jax(tensor), or jnp.asarray(tensor.numpy())."
    return " jnp.asarray makes one." if isinstance(value, list) else ""


def params_hint(params: Any) -> str:
    """For something that contains parameters, or is passed in their place."""
    if hasattr(params, "opt_state") and hasattr(params, "params"):
        return f" For a {type(params).__name__}: pass state.params."
    if callable(params) and not isinstance(params, eqx.Module) and not module_hint(params):
        return " Arguments are model_fn, loss, params, batch, in this order."
    return module_hint(params)


def batch_hint(batch: Any) -> str:
    """For something that contains a batch's inputs and targets, but is not a pair of them."""
    if isinstance(batch, dict) and len(batch) in (2, 3):
        return f" Pass ({', '.join(f'batch[{name!r}]' for name in batch)}), inputs first."
    if isinstance(batch, tuple | list) and batch and all(isinstance(b, tuple | list) and len(b) > 1 for b in batch):
        return (
            " For a list of batches: KFACLinearOperator.from_batches or EKFACLinearOperator.from_batches; or one batch"
            " of all, with chunk_size to bound the memory."
        )
    return " Pass (inputs, targets)." if is_array(batch) else ""


def unit_axis_hint(wanted: tuple[int, ...], got: tuple[int, ...]) -> str:
    """For an extra or a missing last axis of length 1."""
    if got == (*wanted, 1):
        return " Pass targets[..., 0]."
    return " Pass targets[..., None]." if (*got, 1) == wanted else ""


def loss_hint(loss: Any) -> str:
    """For a loss of another library, or a function."""
    if isinstance(loss, type):
        return f" Pass an instance: {loss.__name__}()."
    if is_a(loss, "torch.nn", "Module"):
        return " Its counterpart in ggn_jax has the same name and options; torch_bridge takes losses of torch."
    if getattr(loss, "__module__", "").startswith("optax") and getattr(loss, "__name__", "") in OPTAX:
        return f" Pass ggn_jax.{OPTAX[loss.__name__]}."
    if callable(loss):
        return " A function does not tell its curvature: state its likelihood in a ggn_jax.LikelihoodLoss."
    return " Arguments are model_fn, loss, params, batch, in this order."


def check_model_fn(model_fn: Any) -> None:
    """Refuse what is not a function of parameters and inputs."""
    wanted = "model_fn must be a function of (params, inputs)"
    known = any(is_a(model_fn, library, "Module") for library in ("flax.nnx", "flax.linen", "torch.nn"))
    if known or type(model_fn).__module__.startswith("equinox.nn"):
        raise TypeError(f"{wanted}; got {describe_value(model_fn)}, a module.{module_hint(model_fn)}")
    if is_a(model_fn, "ggn_jax", "Objective"):
        raise TypeError(
            f"{wanted}; got an Objective, which has one for each of its terms. kfac, scale_by_kfac and the operators'"
            " from_objective take it as it is; elsewhere pass objective.terms[i].model_fn."
        )
    if not callable(model_fn):
        order = " Arguments are model_fn, loss, params, batch, in this order." if jax.tree.leaves(model_fn) else ""
        raise TypeError(f"{wanted}; got {describe_value(model_fn)}.{order}")
    try:
        signature = inspect.signature(model_fn)
    except (TypeError, ValueError):
        return  # built in
    try:
        signature.bind(None, None)
    except TypeError:
        way_out = (
            module_hint(model_fn) or " Parameters come first; close over anything else: lambda params, inputs: ..."
        )
        got = f"{describe_value(model_fn)}{signature}"
        raise TypeError(f"{wanted}, called with both by position; got {got}.{way_out}") from None


@contextmanager
def model_errors_explained(params: Any, inputs: Any, *, one_example: bool = False) -> Iterator[None]:
    """Add a note to a model's errors that says what it was called with."""
    try:
        yield
    except Exception as error:
        part = " (layers are found on one example, as a batch of one)" if one_example else ""
        shapes = f"{_shapes('params', params)} and {_shapes('inputs', inputs)}"
        error.add_note(
            f"ggn_jax calls model_fn(params, inputs), here with {shapes}{part}. Inputs are those of the model alone,"
            f" without targets, and their first axis is the batch's.{params_hint(params)}"
        )
        raise


@contextmanager
def example_inputs_named(batch: Any, example_inputs: Any, made: str = "optimizer was made") -> Iterator[None]:
    """Add a note to errors that says how a batch's inputs differ from those that the layers were found with."""

    def kinds(tree: Any) -> Any:
        return [(jax.tree_util.keystr(path), x.shape[1:]) for path, x in jax.tree_util.tree_leaves_with_path(tree)]

    try:
        yield
    except Exception as error:
        inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else None
        leaves = jax.tree.leaves(inputs)
        if leaves and all(map(is_array, leaves)) and kinds(inputs) != kinds(example_inputs):
            was = _shapes("example_inputs", example_inputs)
            error.add_note(f"The {made} with {was}; this batch has {_shapes('inputs', inputs)}.")
        raise


def _shapes(name: str, tree: Any) -> str:
    """The shapes of a pytree's leaves by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    text = ", ".join(
        f"{name}{jax.tree_util.keystr(path)} {getattr(x, 'dtype', type(x).__name__)}{list(getattr(x, 'shape', ()))}"
        for path, x in leaves
    )
    return text if len(text) <= MAX_NOTE_LENGTH else f"{text[:MAX_NOTE_LENGTH]}..."


@contextmanager
def ragged_errors_explained() -> Iterator[None]:
    """Explain the alternatives, if JAX cannot map a ragged product."""
    try:
        yield
    except NotImplementedError as error:
        if "ragged_dot vmap" not in str(error):
            raise
        raise NotImplementedError(
            "model_fn calls jax.lax.ragged_dot, which JAX cannot map over examples. Use what follows layers (KFAC,"
            ' EKFAC, kfac, the diagonal with method="layers"), or let all rows meet all matrices, and select.'
        ) from error
