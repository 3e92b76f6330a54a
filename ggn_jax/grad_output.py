"""Gradient output vectors: the seam between a loss and every curvature approximation built on it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax._checks import as_outputs, check_count, check_key
from ggn_jax._sharding import run_auto
from ggn_jax._supported import check_exact, check_supported, stand_in_targets
from ggn_jax.fisher_type import FisherType
from ggn_jax.joint import JointLoss, joint_vectors
from ggn_jax.loss import Loss
from ggn_jax.terms import check_terms, split_terms


def make_grad_output_fn(loss: Loss, fisher_type: FisherType | str, mc_samples: int = 1) -> Callable[..., Any]:
    """Make a function of **one example** that returns its gradient output vectors.

    With `L` the loss of a **batch of one**, `loss(output[None], target[None])`, including its reduction and weights,
    the vectors are:

    ============== ======================================================= =============
    `fisher_type`  vectors                                                 V
    ============== ======================================================= =============
    `type-2`       columns of `S`, `S S^T` the Hessian of `L`              `output.size`
    `mc`           sampled gradients / sqrt(mc_samples); the sum of their  `mc_samples`
                   outer products is the Hessian in expectation
    `empirical`    `sqrt(r)` times the gradient of the sum-reduced `L`     1
    `forward-only` none; the target is not used                            0
    ============== ======================================================= =============

    where `r` is the reduction: 1 for `"sum"`, 1 / (sum of the terms' counts) for `"mean"`. For what these stand for in
    Fisher matrices see Kunstner et al. (2019), and Eschenhagen et al. (2023) for KFAC.

    Args:
        loss: `MSELoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss`, a `JointLoss` of these or your own `LikelihoodLoss`.
        fisher_type: a `FisherType` or its value: `"type-2"`, `"mc"`, `"empirical"` or `"forward-only"`.
        mc_samples: the number of Monte-Carlo vectors, at least 1 (default); used for `"mc"` only.

    Returns:
        `fn(output [*out], target, key=None) -> vectors [V, *out]`, pure, jittable and vmappable.

        **Each example needs its own key**: one shared key gives every example the same draws. Without `"mc"` the key is
        ignored. `target` may be None where vectors do not depend on it: `"type-2"` and `"mc"` of losses whose curvature
        and weights depend on no target (no class weights, no `pos_weight`); nothing is ignored then. Under `jit`, where
        values are unknown, a target outside of the loss's domain gives NaN.

    Raises:
        ValueError: for an unknown fisher type, or `mc_samples` below 1 with `"mc"`; from `fn`, for a missing key,
            shapes that do not fit, or, outside of `jit`, a target outside of the loss's domain.
        TypeError: from `fn`, for a dtype that does not fit.
        NotImplementedError: for a loss that is not supported, or has no exact factor for `"type-2"`.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> outputs, targets = jnp.zeros((5, 3)), jnp.array([0, 1, 2, 1, 0])  # 5 examples, 3 classes
        >>> fn = make_grad_output_fn(ggn_jax.CrossEntropyLoss(), "mc", mc_samples=2)
        >>> keys = jax.random.split(jax.random.key(0), 5)  # one key per example
        >>> jax.vmap(fn)(outputs, targets, keys).shape
        (5, 2, 3)

    References:
        - Kunstner, Balles and Hennig (2019), *Limitations of the empirical Fisher approximation for natural gradient
          descent*: https://arxiv.org/abs/1905.12558
        - Eschenhagen, Immer, Turner, Schneider and Hennig (2023), *Kronecker-factored approximate curvature for modern
          neural network architectures*: https://arxiv.org/abs/2311.00636
    """
    fisher_type, mc_samples = _check_request(loss, fisher_type, mc_samples)
    if isinstance(loss, JointLoss):
        made = joint_vectors(loss, lambda head: make_grad_output_fn(head, fisher_type, mc_samples), fisher_type)
        return lambda output, target, key=None: made(output, target, key)

    def fn(output: Any, target: Any, key: Any = None) -> Float[Array, "V *out"]:
        return _checked_vectors(loss, output, target, key, fisher_type, mc_samples, batch=False)

    return fn


def make_batch_grad_output_fn(loss: Loss, fisher_type: FisherType | str, mc_samples: int = 1) -> Callable[..., Any]:
    """Make a function of **a batch** that returns the gradient output vectors of all its examples.

    As with `make_grad_output_fn`, but `L` is the loss of the **whole batch**: for each `n`, the sum over `v` of
    `V[v, n] V[v, n]^T` is the `n`-th diagonal block of its Hessian. For a weighted or masked mean the two differ by
    more than `1 / N`, since the denominator is the batch's.

    Args:
        loss: `MSELoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss`, a `JointLoss` of these or your own `LikelihoodLoss`.
        fisher_type: a `FisherType` or its value: `"type-2"`, `"mc"`, `"empirical"` or `"forward-only"`.
        mc_samples: the number of Monte-Carlo vectors, at least 1 (default); used for `"mc"` only.

    Returns:
        `fn(outputs [N, *out], targets, key=None) -> vectors [V, N, *out]`. It takes one key and samples independently
        for each example, as with `jax.random.split(key, N)`.

    Raises:
        ValueError: for an unknown fisher type, or `mc_samples` below 1 with `"mc"`; from `fn`, for a missing key,
            shapes that do not fit, or, outside of `jit`, a target outside of the loss's domain.
        TypeError: from `fn`, for a dtype that does not fit.
        NotImplementedError: for a loss that is not supported, or has no exact factor for `"type-2"`.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> outputs, targets = jnp.zeros((5, 3)), jnp.array([0, 1, 2, 1, 0])
        >>> fn = make_batch_grad_output_fn(ggn_jax.CrossEntropyLoss(), "type-2")
        >>> fn(outputs, targets).shape
        (3, 5, 3)
    """
    fisher_type, mc_samples = _check_request(loss, fisher_type, mc_samples)
    if isinstance(loss, JointLoss):
        made = joint_vectors(loss, lambda head: make_batch_grad_output_fn(head, fisher_type, mc_samples), fisher_type)
        return lambda outputs, targets, key=None: made(outputs, targets, key)

    def fn(outputs: Any, targets: Any, key: Any = None) -> Float[Array, "V N *out"]:
        return _checked_vectors(loss, outputs, targets, key, fisher_type, mc_samples, batch=True)

    return fn


def make_grad_output_sampler(loss: Loss) -> Callable[..., Any]:
    """Make a function that samples gradients of one example.

    Args:
        loss: `MSELoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss`, a `JointLoss` of these or your own `LikelihoodLoss`.

    Returns:
        `fn(output [*out], num_samples, target, key=None) -> [num_samples, *out]` with `E[g g^T]` the Hessian of the
        loss of a batch of one: the `"mc"` vectors of `make_grad_output_fn`, not divided by `sqrt(num_samples)`.

    Raises:
        ValueError: from `fn`, for a missing key, or shapes that do not fit.
        TypeError: from `fn`, for a dtype that does not fit.
        NotImplementedError: for a loss that is not supported.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> sample = make_grad_output_sampler(ggn_jax.MSELoss(reduction="sum"))
        >>> sample(jnp.zeros(3), 10, jnp.ones(3), jax.random.key(0)).shape
        (10, 3)
    """
    check_supported(loss)
    if isinstance(loss, JointLoss):
        made = joint_vectors(loss, make_grad_output_sampler, FisherType.MC)
        return lambda output, num_samples, target, key=None: made(output, num_samples, target, key)

    def sampler(output: Any, num_samples: int, target: Any, key: Any = None) -> Float[Array, "S *out"]:
        num_samples = check_count("num_samples", num_samples)
        key = check_key(key, wanted_by="A gradient output sampler", batch=False)
        output, target = _checked(loss, output, target, FisherType.MC, batch=False)
        return _vectors(loss, output, target, key, FisherType.MC, num_samples, False, False)

    return sampler


def loss_hessian_matrix_sqrt(output_one_datum: Any, target_one_datum: Any, loss_func: Loss) -> Float[Array, "..."]:
    """Compute the square root `S` of the Hessian of one example's loss as a dense array.

    As a matrix (rows: the first `*out`), `S S^T` is the Hessian of `loss_func(output[None], target[None])`. For
    cross-entropy `S = sqrt(a) (diag(sqrt p) - p sqrt(p)^T)` per position, with `a` reduction times weight. Prefer
    `LossHessian`, which never forms it.

    Args:
        output_one_datum: one example's output, floating, `[*out]`.
        target_one_datum: its target.
        loss_func: a `Loss`.

    Returns:
        `S`, an array `[*out, *out]`.

    Raises:
        ValueError, TypeError: for an output and a target that do not fit the loss.
        NotImplementedError: for a loss that is not supported, or has no exact square root.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> S = loss_hessian_matrix_sqrt(jnp.zeros(2), jnp.ones(2), ggn_jax.MSELoss())
        >>> print((S @ S.T).round(3))  # the mean of two squares: Hessian I
        [[1. 0.]
         [0. 1.]]
    """
    if isinstance(loss_func, JointLoss):
        raise NotImplementedError(
            "the outputs of a JointLoss have no common axis for a dense square root: use LossHessian, or the vectors of"
            " make_grad_output_fn(loss, 'type-2')."
        )
    columns = make_grad_output_fn(loss_func, FisherType.TYPE2)(output_one_datum, target_one_datum)
    return jnp.moveaxis(columns.reshape(2 * columns.shape[1:]), range(columns.ndim - 1), range(1 - columns.ndim, 0))


def _check_request(loss: Any, fisher_type: Any, mc_samples: Any) -> tuple[FisherType, int]:
    fisher_type = FisherType(fisher_type) if isinstance(fisher_type, str) else FisherType._missing_(fisher_type)
    # Callers that choose the vectors later pass 0 for exact ones.
    mc_samples = check_count("mc_samples", mc_samples) if fisher_type is FisherType.MC else 1
    check_supported(loss)
    if fisher_type is FisherType.TYPE2:
        check_exact(loss)
    return fisher_type, mc_samples


def _checked_vectors(
    loss: Loss, output: Any, target: Any, key: Any, fisher_type: FisherType, mc_samples: int, *, batch: bool
) -> Float[Array, "V *shape"]:
    if fisher_type is FisherType.FORWARD_ONLY:
        output = as_outputs("outputs" if batch else "output", output, batch)
        return jnp.zeros((0, *output.shape), output.dtype)
    key = check_key(key, wanted_by="fisher_type 'mc'", batch=batch) if fisher_type is FisherType.MC else None
    output, target = _checked(loss, output, target, fisher_type, batch)
    return _vectors(loss, output, target, key, fisher_type, mc_samples, batch, True)


def _checked(loss: Loss, output: Any, target: Any, fisher_type: FisherType, batch: bool) -> tuple[Array, Array]:
    if target is None:
        output = as_outputs("outputs" if batch else "output", output, batch)
        target = stand_in_targets(loss, output, fisher_type, batch=batch)
    return check_terms(loss, output, target, batch)


@partial(jax.jit, static_argnames=("fisher_type", "num", "batch", "divide"))
def _vectors(
    loss: Loss, output: Array, target: Array, key: Any, fisher_type: FisherType, num: int, batch: bool, divide: bool
) -> Float[Array, "V *shape"]:
    def vectors(output: Array, target: Array, key: Any, loss: Loss) -> Array:
        terms = split_terms(loss, output, target, batch=batch)
        if fisher_type is FisherType.TYPE2:
            return terms.columns()
        if fisher_type is FisherType.MC:
            drawn = terms.sampled_gradients(jax.random.split(key, output.shape[0]) if batch else key, num)
            return (drawn / jnp.sqrt(num) if divide else drawn).astype(terms.dtype)
        return terms.empirical().astype(terms.dtype)[None]

    return run_auto(vectors, output, target, key, loss, keep=True)
