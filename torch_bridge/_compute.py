"""The JAX side: gradient output vectors of many independent items, and their derivative, as compiled functions.

An item is what one call of a `ggn_jax` function takes: one example, or with `batch` one batch of data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ggn_jax
from torch_bridge.generators import key_from_seed
from torch_bridge.losses import build_loss


class Request(NamedTuple):
    """What to compute; hashable, and of types that graphs can hold."""

    loss: str  # see `torch_bridge.losses`
    vectors: str  # a value of `ggn_jax.FisherType`, or "samples" for what `make_grad_output_sampler` draws
    num: int  # the number of Monte-Carlo vectors
    batch: bool


def vectors(
    outputs: Any, targets: Any, seeds: Any, weights: Any, *, request: Request
) -> tuple[jax.Array, jax.Array | None]:
    """The vectors `[V, B, *item]` of items `[B, *item]`, and whether the targets are in the loss's domain.

    The latter is None if they always are.

    `seeds` are `[B]` or None. `weights`, the loss's tensors, are `[1, *shape]`, the same for all items, or
    `[B, *shape]`.
    """
    dtype = outputs.dtype
    outputs = promoted(outputs, targets, weights)

    def item(output: jax.Array, target: jax.Array, seed: Any, weights: Any) -> tuple[jax.Array, jax.Array | None]:
        loss = build_loss(request.loss, weights)
        key = None if seed is None else key_from_seed(seed)
        valid = None
        if loss.restricts_targets:
            valid = jnp.all(loss.targets_valid(output, target, batch=request.batch))
        if request.vectors == "samples":
            return ggn_jax.make_grad_output_sampler(loss)(output, request.num, target, key), valid
        make = ggn_jax.make_batch_grad_output_fn if request.batch else ggn_jax.make_grad_output_fn
        return make(loss, request.vectors, request.num)(output, target, key), valid

    shared = [weight.shape[0] == 1 for weight in weights]
    weights = [weight[0] if same else weight for weight, same in zip(weights, shared, strict=True)]
    in_axes = (0, 0, 0, [None if same else 0 for same in shared])
    result, valid = jax.vmap(item, in_axes=in_axes, out_axes=(1, 0))(outputs, targets, seeds, weights)
    return result.astype(dtype), None if valid is None else jnp.all(valid)


def promoted(outputs: Any, targets: Any, weights: Sequence[Any]) -> Any:
    """The outputs in the dtype in which torch computes the loss: float64 if anything but a scalar is.

    `ggn_jax` itself computes in at least float32, so nothing else needs to be promoted.
    """
    others = [targets, *(weight for weight in weights if weight.ndim > 1)]
    return outputs.astype(np.float64) if any(other.dtype == np.float64 for other in others) else outputs


def vectors_vjp(
    cotangents: Any, outputs: Any, targets: Any, seeds: Any, weights: Any, *, request: Request
) -> jax.Array:
    """The vector-Jacobian product of `vectors` in `outputs`."""
    _, vjp = jax.vjp(lambda outputs: vectors(outputs, targets, seeds, weights, request=request)[0], outputs)
    return vjp(cotangents)[0]


def _compiled(fn: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`fn` compiled, by the type of the device."""
    # On CPUs, LLVM's highest level takes twice as long to compile, and makes these functions no faster.
    options = {"cpu": {"xla_backend_optimization_level": 2}, "cuda": None}
    return {
        device: jax.jit(fn, static_argnames="request", compiler_options=option) for device, option in options.items()
    }


VECTORS = _compiled(vectors)
VECTORS_VJP = _compiled(vectors_vjp)


def check_weights(weights: list[Any], request: Request) -> None:
    """Raise the loss's errors about the values of its tensors, which are unknown in compiled functions."""
    for i in range(max(weight.shape[0] for weight in weights)):
        build_loss(request.loss, [jnp.asarray(_of_item(weight, i)) for weight in weights])


def raise_invalid(outputs: Any, targets: Any, weights: list[Any], request: Request) -> None:
    """Raise the error of `ggn_jax` for the first item with a target outside of the loss's domain."""
    make = ggn_jax.make_batch_grad_output_fn if request.batch else ggn_jax.make_grad_output_fn
    outputs = promoted(outputs, targets, weights)
    for i, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        loss = build_loss(request.loss, [jnp.asarray(_of_item(weight, i)) for weight in weights])
        make(loss, ggn_jax.FisherType.EMPIRICAL)(output, target)


def _of_item(weight: Any, i: int) -> Any:
    return weight[0 if weight.shape[0] == 1 else i]
