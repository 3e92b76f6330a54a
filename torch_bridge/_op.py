"""The operator that PyTorch sees: gradient output vectors of `[B, *item]`, `B` independent items.

Everything has the axis of the items, so that mapping an operator over one more axis is folding that into `B`.
Operators of `torch.library` have no derivatives under `torch.func` (and no forward mode at all: they give zeros), so
there, and wherever else a derivative may be asked for, `GradOutputVectors` wraps the operator.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bridge._compute import VECTORS, VECTORS_VJP, Request, check_weights, raise_invalid
from torch_bridge.tensors import borrow, hand_over, jax_on

# Not to be captured into CUDA graphs; torch before 2.9 does not know the tag, and the operator then refuses.
TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.library.custom_op("torch_bridge::grad_output_vectors", mutates_args=(), tags=TAGS)
def vectors_op(
    outputs: Tensor,
    targets: Tensor,
    seeds: Tensor | None,
    weights: Sequence[Tensor],
    loss: str,
    vectors: str,
    num: int,
    batch: bool,
) -> Tensor:
    """Vectors `[V, B, *item]`; for the arguments see `torch_bridge._compute`."""
    request = Request(loss, vectors, num, batch)
    with jax_on(outputs.device):
        arrays = [None if t is None else borrow(t) for t in (outputs, targets, seeds)]
        borrowed = [borrow(weight) for weight in weights]
        # Reading a GPU's values would stall its pipeline; there, invalid targets give NaN.
        values_known = outputs.device.type == "cpu"
        if values_known and borrowed:
            check_weights(borrowed, request)
        result, valid = VECTORS[outputs.device.type](*arrays, borrowed, request=request)
        tensor = hand_over(result)
        if values_known and valid is not None and not valid.item():
            raise_invalid(arrays[0], arrays[1], borrowed, request)
        return tensor


@torch.library.custom_op("torch_bridge::grad_output_vectors_vjp", mutates_args=(), tags=TAGS)
def vjp_op(
    cotangents: Tensor,
    outputs: Tensor,
    targets: Tensor,
    seeds: Tensor | None,
    weights: Sequence[Tensor],
    loss: str,
    vectors: str,
    num: int,
    batch: bool,
) -> Tensor:
    """The vector-Jacobian product of `vectors_op` in `outputs`, `[B, *item]`."""
    request = Request(loss, vectors, num, batch)
    with jax_on(outputs.device):
        arrays = [None if t is None else borrow(t) for t in (cotangents, outputs, targets, seeds)]
        borrowed = [borrow(weight) for weight in weights]
        return hand_over(VECTORS_VJP[outputs.device.type](*arrays, borrowed, request=request))


def _num_vectors(outputs: Tensor, vectors: str, num: int, batch: bool) -> Any:
    if vectors == "empirical":
        return 1
    return math.prod(outputs.shape[1 + batch :]) if vectors == "type-2" else num


@vectors_op.register_fake
def _(
    outputs: Tensor, targets: Any, seeds: Any, weights: Any, loss: str, vectors: str, num: int, batch: bool
) -> Tensor:
    return outputs.new_empty((_num_vectors(outputs, vectors, num, batch), *outputs.shape))


@vjp_op.register_fake
def _(cotangents: Tensor, outputs: Tensor, *_: Any) -> Tensor:
    return outputs.new_empty(outputs.shape)


# Mapping over one more axis.


def _fold(tensor: Any, dim: int | None, size: int, items: int = 0) -> Any:
    """`tensor` with its mapped axis, expanded if it has none, folded into the axis of the items."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(items).expand(*tensor.shape[:items], size, *tensor.shape[items:])
    else:
        tensor = tensor.movedim(dim, items)
    return tensor.flatten(items, items + 1)


def _fold_weight(weight: Tensor, dim: int | None, size: int, items: int) -> Any:
    if dim is None:
        return weight if weight.shape[0] == 1 else _fold(weight, None, size)
    weight = weight.movedim(dim, 0)
    return weight.expand(size, items, *weight.shape[2:]).flatten(0, 1)


def _fold_all(
    size: int, in_dims: Sequence[Any], outputs: Tensor, targets: Tensor, seeds: Tensor | None, *weights: Tensor
) -> tuple[int, list[Any]]:
    """The number of items before, and all tensors with the mapped axis folded in."""
    items = outputs.shape[0] if in_dims[0] is None else outputs.movedim(in_dims[0], 0).shape[1]
    folded = [_fold(tensor, dim, size) for tensor, dim in zip((outputs, targets, seeds), in_dims[:3], strict=True)]
    folded += [_fold_weight(weight, dim, size, items) for weight, dim in zip(weights, in_dims[3:], strict=True)]
    return items, folded


@vectors_op.register_vmap
def _(info: Any, in_dims: Any, outputs: Any, targets: Any, seeds: Any, weights: Any, *request: Any) -> Any:
    size, dims = info.batch_size, (*in_dims[:3], *in_dims[3])
    items, (outputs, targets, seeds, *weights) = _fold_all(size, dims, outputs, targets, seeds, *weights)
    # The mapped axis comes first, not where it was: torch.export refuses that.
    return vectors_op(outputs, targets, seeds, weights, *request).unflatten(1, (size, items)).movedim(1, 0), 0


@vjp_op.register_vmap
def _(
    info: Any, in_dims: Any, cotangents: Any, outputs: Any, targets: Any, seeds: Any, weights: Any, *request: Any
) -> Any:
    size, dims = info.batch_size, (*in_dims[1:4], *in_dims[4])
    items, (outputs, targets, seeds, *weights) = _fold_all(size, dims, outputs, targets, seeds, *weights)
    cotangents = _fold(cotangents, in_dims[0], size, items=1)
    return vjp_op(cotangents, outputs, targets, seeds, weights, *request).unflatten(0, (size, items)), 0


# Derivatives.


def _check_needs_grad(others: Sequence[bool]) -> None:
    if any(others):
        raise NotImplementedError(
            "gradient output vectors are not differentiable in targets and in the tensors of the loss: detach them."
        )


def _refuse_second_derivative(*_: Any) -> Any:
    raise NotImplementedError(
        "gradient output vectors can be differentiated once, in the outputs; this is a second derivative. Detach the"
        " outputs, or use ggn_jax, which can be differentiated any number of times."
    )


def _refuse_forward_mode(*_: Any) -> Any:
    raise NotImplementedError(
        "gradient output vectors cannot be differentiated in forward mode (torch.func.jvp, jacfwd, hessian, dual"
        " tensors): detach the outputs, use reverse mode (vjp, jacrev), or use ggn_jax."
    )


class GradOutputVectors(torch.autograd.Function):
    """`vectors_op`, differentiable in the outputs by reverse mode under all transformations.

    The tensors of the loss are arguments of their own: inside of a list, torch would not see that they require grad.
    """

    @staticmethod
    def forward(request: Request, outputs: Tensor, targets: Tensor, seeds: Tensor | None, *weights: Tensor) -> Tensor:
        return vectors_op(outputs, targets, seeds, list(weights), *request)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.request, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Any, ...]:
        _check_needs_grad(ctx.needs_input_grad[2:])
        tensors = ctx.saved_tensors  # once: hooks may recompute them
        gradient = GradOutputVectorsVjp.apply(ctx.request, cotangents, *tensors)
        return None, gradient, *[None] * (len(tensors) - 1)

    jvp = staticmethod(_refuse_forward_mode)  # type: ignore[assignment]

    @staticmethod
    def vmap(info: Any, in_dims: Any, request: Request, *tensors: Any) -> tuple[Tensor, int]:
        items, folded = _fold_all(info.batch_size, in_dims[1:], *tensors)
        return GradOutputVectors.apply(request, *folded).unflatten(1, (info.batch_size, items)), 1


class GradOutputVectorsVjp(torch.autograd.Function):
    """`vjp_op`, which refuses to be differentiated."""

    @staticmethod
    def forward(request: Request, cotangents: Tensor, *tensors: Any) -> Tensor:
        outputs, targets, seeds, *weights = tensors
        return vjp_op(cotangents, outputs, targets, seeds, weights, *request)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    backward = staticmethod(_refuse_second_derivative)  # type: ignore[assignment]
    jvp = staticmethod(_refuse_forward_mode)  # type: ignore[assignment]

    @staticmethod
    def vmap(info: Any, in_dims: Any, request: Request, cotangents: Tensor, *tensors: Any) -> tuple[Tensor, int]:
        items, folded = _fold_all(info.batch_size, in_dims[2:], *tensors)
        cotangents = _fold(cotangents, in_dims[1], info.batch_size, items=1)
        result = GradOutputVectorsVjp.apply(request, cotangents, *folded)
        return result.unflatten(0, (info.batch_size, items)), 0


# In graphs, which cannot hold the classes above.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    outputs, targets, seeds, weights, *ctx.request = inputs
    ctx.save_for_backward(outputs, targets, seeds, *weights)


def _backward(ctx: Any, cotangents: Tensor) -> tuple[Any, ...]:
    outputs, targets, seeds, *weights = ctx.saved_tensors
    _, targets_needed, seeds_needed, weights_needed, *_ = ctx.needs_input_grad
    _check_needs_grad([targets_needed, seeds_needed, *(weights_needed if weights else ())])
    gradient = vjp_op(cotangents, outputs, targets, seeds, weights, *ctx.request)
    return gradient, None, None, [None] * len(weights), *[None] * len(ctx.request)


vectors_op.register_autograd(_backward, setup_context=_save)
vjp_op.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)


def grad_output_vectors(
    request: Request, outputs: Tensor, targets: Tensor, seeds: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """The operator, through `GradOutputVectors` wherever a derivative may be asked for.

    Compiled graphs cannot hold that class. There the operator has its own formula for the backward pass, and forward
    mode gives zeros, since it cannot be detected under `vmap` inside `torch.compile`.
    """
    tensors = [outputs, targets, *weights]
    if not torch.compiler.is_compiling() and any(map(_may_be_differentiated, tensors)):
        try:
            return GradOutputVectors.apply(request, outputs, targets, seeds, *weights)
        except RuntimeError as error:
            if "Functionalize" not in str(error):
                raise
        # `torch.func.functionalize` does not support such classes. It wraps tensors as `grad` does, but only once.
        if any(_may_be_differentiated(tensor, functionalized=True) for tensor in tensors):
            raise NotImplementedError(
                "gradient output vectors cannot be differentiated inside of torch.func.functionalize, nor be told apart"
                " from those that are where it meets grad, vjp or jvp: leave functionalize out (these functions mutate"
                " nothing), or call them outside of it."
            )
    return vectors_op(outputs, targets, seeds, weights, *request)


def _may_be_differentiated(tensor: Tensor, functionalized: bool = False) -> bool:
    """Whether a derivative in the tensor may be asked for; `functionalized` says that one wrapper is not for that."""
    other_wrappers = int(functionalized)
    while True:
        if tensor.requires_grad or _is_dual(tensor):
            return True
        inside = torch.func.debug_unwrap(tensor, recurse=False)
        if inside is tensor:
            return False
        if inside.ndim == tensor.ndim:  # `torch.func.grad` or `jvp`; `vmap` hides an axis
            if not other_wrappers:
                return True
            other_wrappers -= 1
        tensor = inside


def _is_dual(tensor: Tensor) -> bool:
    try:
        return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # under `vmap`, which `unpack_dual` does not support
        return False
