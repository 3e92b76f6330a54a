"""The softmax cross-entropy."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ggn_jax._checks import Shaped, as_array, check_weight
from ggn_jax._draws import draw_class
from ggn_jax._hints import unit_axis_hint
from ggn_jax.loss import Loss
from ggn_jax.term_hessian import Softmax, TermHessian, onehot
from ggn_jax.terms import term_axes, term_positions


class CrossEntropyLoss(Loss):
    """The softmax cross-entropy, as `torch.nn.CrossEntropyLoss`.

    A term is `-sum_c w_c t_c log softmax(f)_c`. With `p = softmax(f)` and the term's weight `sum_c w_c t_c`, the plain
    term's Hessian is `diag(p) - p p^T = S S^T` with `S = diag(sqrt p) - p sqrt(p)^T`; a sampled gradient is
    `p - onehot(k)` with `k ~ Categorical(p)`.

    `loss(outputs, targets)` returns the loss of a batch; if everything is ignored, it is 0 (torch: NaN). Outputs are
    `[N, C, *D]` (for `class_axis=0`), targets either class indices (integers, `[N, *D]`) or class probabilities
    (floating, of the outputs' shape).

    Args:
        weight: class weights `w`, `[C]`, not negative; None (default) for 1.
        ignore_index: positions with this target contribute nothing; -100 by default. With class probabilities it must
            be negative.
        reduction: `"mean"` (default) or `"sum"`. As in torch, `"mean"` divides by the sum of `w_y` over the positions
            kept when targets are class indices, and by the number of positions when they are probabilities.
        label_smoothing: `e` in `t = (1 - e) target + e / C`, 0 by default. As in torch, the mean is infinite where all
            kept `w_y` are 0 and smoothing leaves a positive numerator.
        class_axis: the axis of **one example's** output that holds the classes, also when a batch is passed: 0 as in
            torch, -1 as in Flax and optax. None (default) is 0, and is refused where shapes fit -1 as well: for outputs
            of one example with several axes, where these are all of one length, or targets are class probabilities
            (which have the outputs' shape) and no class weights tell the number of classes.

    Raises:
        ValueError: for an unknown reduction, class weights that are negative, not finite or not a vector, or a
            `label_smoothing` that is not in `[0, 1]`.
        TypeError: for a `weight` that is not an array, or an `ignore_index` or a `class_axis` that is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = CrossEntropyLoss(label_smoothing=0.1, ignore_index=-1)
        >>> print(f"{loss(jnp.zeros((2, 4)), jnp.array([3, -1])):.4f}")  # log 4
        1.3863
    """

    curvature = "hessian"
    takes_trailing_axes = True
    weight: Float[Array, " C"] | None
    ignore_index: int = eqx.field(static=True)
    label_smoothing: float = eqx.field(static=True)
    class_axis: int | None = eqx.field(static=True)

    def __init__(
        self,
        weight: Any = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        class_axis: int | None = None,
    ):
        if weight is not None:
            weight = as_array("weight", weight)
            if weight.ndim != 1:
                raise ValueError(f"weight must hold one number per class, shape [C]; got shape {weight.shape}.")
            weight = check_weight("weight", weight)
        if not isinstance(label_smoothing, int | float | np.integer | np.floating) or not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be a number between 0 and 1; got {label_smoothing!r}.")
        self.weight = weight
        self.ignore_index = _integer("ignore_index", ignore_index)
        self.label_smoothing = float(label_smoothing)
        self.class_axis = None if class_axis is None else _integer("class_axis", class_axis)
        self.reduction = reduction

    @property
    def term_axes(self) -> tuple[int]:  # type: ignore[override]
        return (self.class_axis or 0,)

    def check_shapes(self, outputs: Shaped, targets: Array, batch: bool) -> None:
        self._check_outputs(outputs, batch)
        (axis,) = term_axes(self, outputs, batch)
        indices_shape = outputs.shape[:axis] + outputs.shape[axis + 1 :]
        if _holds_indices(targets):
            if targets.shape == outputs.shape:
                raise ValueError(
                    f"targets are {targets.dtype}, thus class indices, and must have shape {indices_shape}; got the"
                    f" outputs' shape {targets.shape}. One-hot targets and probabilities must be floating."
                )
            if targets.shape != indices_shape:
                raise ValueError(
                    f"targets must have shape {indices_shape}, which is that of outputs {outputs.shape} less the class"
                    f" axis (class_axis={self.term_axes[0]} of one example; pass class_axis=-1 if classes come last);"
                    f" got {targets.shape}.{unit_axis_hint(indices_shape, targets.shape)}"
                )
        elif jnp.issubdtype(targets.dtype, jnp.floating):
            if targets.shape != outputs.shape:
                raise ValueError(
                    "targets are floating, thus class probabilities, and must have the outputs' shape"
                    f" {outputs.shape}; got {targets.shape}. Class indices must be integers, of shape {indices_shape}"
                    f" (class_axis={self.term_axes[0]})."
                )
            if self.ignore_index >= 0:
                raise ValueError(
                    f"ignore_index={self.ignore_index} cannot be used with class probabilities: pass class indices, or"
                    " leave ignore_index negative."
                )
        else:
            raise TypeError(
                f"targets must be integers (class indices) or floating (probabilities); got {targets.dtype}."
            )
        if self._fits_last_axis(outputs.shape[batch:], targets):
            raise self._open_axis(outputs, f"targets of shape {targets.shape}")

    def _check_outputs(self, outputs: Shaped, batch: bool) -> None:
        """Refuse outputs without the axis of classes, or with another number of them than the weights'."""
        example, class_axis = outputs.shape[batch:], self.term_axes[0]
        if not example:
            raise ValueError(
                f"outputs must have a class axis, but one example's output is a scalar (outputs have shape"
                f" {outputs.shape}). For one logit per example use BCEWithLogitsLoss."
            )
        if not -len(example) <= class_axis < len(example):
            raise ValueError(
                f"class_axis={class_axis} is not an axis of one example's output, which has shape {example}"
                " (class_axis never counts the batch axis)."
            )
        classes, axis = example[class_axis], class_axis % len(example) + batch
        if classes == 0:
            raise ValueError(f"outputs must have at least one class; axis {axis} of shape {outputs.shape} has none.")
        if self.weight is not None and self.weight.shape[0] != classes:
            raise ValueError(
                f"weight has {self.weight.shape[0]} class weights, but outputs of shape {outputs.shape} have {classes}"
                f" classes on axis {axis} (class_axis={class_axis} of one example)."
            )

    def _open_axis(self, outputs: Shaped, targets: str) -> ValueError:
        return ValueError(
            f"outputs of shape {outputs.shape} and {targets} fit classes on the first axis of one example's output as"
            " well as on the last: pass class_axis=0, as in torch, or class_axis=-1, as in Flax and optax, to"
            " CrossEntropyLoss."
        )

    def _fits_last_axis(self, example: tuple[int, ...], targets: Array | None) -> bool:
        """Whether it was not said where the classes are, and the last axis would do for them as well as the first."""
        if self.class_axis is not None or len(example) < 2 or math.prod(example) == 1:
            return False
        if self.weight is not None and self.weight.shape[0] != example[-1]:
            return False
        return targets is None or not _holds_indices(targets) or example[1:] == example[:-1]

    def operand(self, outputs: Array, targets: Array, batch: bool) -> tuple[Array, tuple[int, ...]]:
        if _holds_indices(targets):
            # Narrow integers cannot hold every class index to compare with.
            return (targets.astype(jnp.int32) if targets.dtype.itemsize < 4 else targets), ()
        return targets.astype(outputs.dtype), term_axes(self, outputs, batch)

    def stand_in_targets(self, outputs: Shaped, batch: bool) -> Array:
        self._check_outputs(outputs, batch)
        if self.weight is not None:
            raise self._needs_targets("depends on them by its class weights")
        if self._fits_last_axis(outputs.shape[batch:], None):
            raise self._open_axis(outputs, "no targets")
        (axis,) = term_axes(self, outputs, batch)
        # One of class 0 would be ignored with ignore_index=0.
        index = 1 if self.ignore_index == 0 and outputs.shape[axis] > 1 else 0
        return jnp.full(term_positions(self, outputs, batch), index, jnp.int32)

    def target_domain(self, shape: tuple[int, ...], batch: bool) -> str:
        classes = shape[batch:][self.term_axes[0]]
        indices = f"class indices from 0 to {classes - 1} (or ignore_index={self.ignore_index})"
        return f"{indices}, or probabilities of at least 0"

    def term_valid(self, f: Float[Array, "C *at"], y: Array) -> Bool[Array, "*at"]:
        if _holds_indices(y):
            return self._is_ignored(y) | ((y >= 0) & (y < f.shape[0]))
        return jnp.min(y, axis=0) >= 0  # as all(y >= 0), NaN included

    def term_weight(self, f: Float[Array, "C *at"], y: Array) -> Float[Array, "*at"]:
        e = self.label_smoothing
        weight = self._weight(f)
        if _holds_indices(y):
            if weight is None:
                kept_weight = jnp.ones(y.shape, f.dtype)
            else:
                kept_weight = (1 - e) * weight[self._safe_index(f, y)] + e * jnp.mean(weight)
            return jnp.where(self._is_ignored(y), 0, kept_weight)
        return jnp.sum(self._target(f, y), axis=0)

    def term_count(self, f: Float[Array, "C *at"], y: Array) -> Float[Array, "*at"]:
        if not _holds_indices(y):
            return jnp.ones(f.shape[1:], f.dtype)
        weight = self._weight(f)
        count = jnp.ones(y.shape, f.dtype) if weight is None else weight[self._safe_index(f, y)]
        return jnp.where(self._is_ignored(y), 0, count)

    def term_value(self, f: Float[Array, "C *at"], y: Array) -> Float[Array, "*at"]:
        softmax, e = Softmax(f), self.label_smoothing
        if not _holds_indices(y):
            return jnp.sum(_cost(self._target(f, y), softmax.neg_log_p), axis=0)
        # The classes that only smoothing gives mass to are left out where there is none.
        weight, index = self._weight(f), self._safe_index(f, y)
        own = 1.0 if weight is None else weight[index]
        value = _cost((1 - e) * own, softmax.neg_log_p_at(index))
        if not e:
            return value
        costs = softmax.neg_log_p if weight is None else _cost(_along_classes(weight, f), softmax.neg_log_p)
        return value + e * jnp.mean(costs, axis=0)

    def term_gradient(self, f: Float[Array, "C *at"], y: Array) -> Float[Array, "C *at"]:
        # (sum_c u_c) p - u, without the difference of nearly equal numbers at a confident, correct class.
        u, softmax = self._target(f, y), Softmax(f)
        return (self.term_weight(f, y)[None] - u) * softmax.p - u * softmax.one_minus_p

    def term_hessian(self, f: Float[Array, "C *at"], y: Array) -> TermHessian:
        return Softmax(f)

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...], f: jax.ShapeDtypeStruct) -> Array:
        return jax.random.bits(key, shape, jnp.uint32)

    def settle(self, f: Float[Array, "C *at"], y: Array, drawn: Array) -> Int[Array, "*at"]:
        softmax = Softmax(f)
        return draw_class(drawn, softmax.exp, softmax.scale)

    def sampled_gradient(self, f: Float[Array, "C *at"], y: Array, drawn: Int[Array, "*at"]) -> Float[Array, "C *at"]:
        return Softmax(f).less_onehot(drawn)

    def _weight(self, f: Array) -> Array | None:
        return None if self.weight is None else self.weight.astype(f.dtype)

    def _is_ignored(self, y: Array) -> Array:
        info = np.iinfo(y.dtype)
        if not info.min <= self.ignore_index <= info.max:
            return jnp.zeros(y.shape, bool)
        return y == self.ignore_index

    def _safe_index(self, f: Array, y: Array) -> Array:
        return jnp.where((y >= 0) & (y < f.shape[0]), y, 0).astype(jnp.int32)

    def _target(self, f: Float[Array, "C *at"], y: Array) -> Float[Array, "C *at"]:
        """`u = w t`, zero where ignored."""
        e, classes = self.label_smoothing, f.shape[0]
        weight = self._weight(f)
        if _holds_indices(y):
            t = jnp.where(onehot(self._safe_index(f, y), classes), 1 - e, 0.0) + e / classes
            t = jnp.where(self._is_ignored(y)[None], 0, t).astype(f.dtype)
        else:
            t = (1 - e) * y + e / classes
        return t if weight is None else _along_classes(weight, t) * t


def _holds_indices(targets: Array) -> bool:
    return jnp.issubdtype(targets.dtype, jnp.integer)


def _along_classes(weight: Float[Array, " C"], like: Float[Array, "C *at"]) -> Float[Array, "C ..."]:
    return weight.reshape(-1, *(1,) * (like.ndim - 1))


def _cost(mass: Any, neg_log_p: Array) -> Array:
    """A class without mass costs nothing, however small its probability."""
    return jnp.where(mass == 0, 0, mass * neg_log_p)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer; got {value!r}.")
    return int(value)
