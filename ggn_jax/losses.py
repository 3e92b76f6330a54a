"""The losses of `torch.nn`, with torch's options and defaults."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ggn_jax._checks import Shaped, as_array, check_real, is_concrete
from ggn_jax._draws import draw_bit, draw_class
from ggn_jax.loss import Loss
from ggn_jax.term_hessian import ScalarHessian, Softmax, TermHessian, onehot
from ggn_jax.terms import term_axes, term_positions


class MSELoss(Loss):
    """The squared error, `torch.nn.MSELoss`: a term is `(f - y)^2`.

    Its Hessian is 2, so `S = sqrt(2)`; would-be gradients are `N(0, 2)`.

    **Arguments:** `reduction`: `"mean"` (over all entries) or `"sum"`.

    **Calling** `loss(outputs [N, *out], targets [N, *out])` returns the loss of a batch. Targets are never broadcast.

    >>> import jax.numpy as jnp
    >>> print(MSELoss()(jnp.zeros((2, 3)), jnp.ones((2, 3))))
    1.0
    """

    curvature = "hessian"
    takes_trailing_axes = True

    def check_shapes(self, outputs: Shaped, targets: Array, batch: bool) -> None:
        _check_same_shape(self, outputs, targets)

    def operand(self, outputs: Array, targets: Array, batch: bool) -> tuple[Array, tuple[int, ...]]:
        return targets.astype(outputs.dtype), ()

    def stand_in_targets(self, outputs: Shaped, batch: bool) -> Array:
        return jnp.zeros(outputs.shape, outputs.dtype)

    def term_value(self, f: Float[Array, "*at"], y: Float[Array, "*at"]) -> Float[Array, "*at"]:
        return (f - y) ** 2

    def term_gradient(self, f: Float[Array, "*at"], y: Float[Array, "*at"]) -> Float[Array, "*at"]:
        return 2 * (f - y)

    def term_hessian(self, f: Float[Array, "*at"], y: Float[Array, "*at"]) -> TermHessian:
        return ScalarHessian(jnp.full_like(f, 2), jnp.sqrt(jnp.full_like(f, 2)))

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...], f: jax.ShapeDtypeStruct) -> Array:
        return jax.random.normal(key, shape, f.dtype)

    def drawn_gradient(self, f: Float[Array, "*at"], y: Float[Array, "*at"], drawn: Array) -> Float[Array, "*at"]:
        return jnp.sqrt(jnp.full_like(f, 2)) * drawn


class CrossEntropyLoss(Loss):
    """The softmax cross-entropy, `torch.nn.CrossEntropyLoss`: a term is `-sum_c w_c t_c log softmax(f)_c`.

    With `p = softmax(f)` and the term's weight `sum_c w_c t_c`, the plain term's Hessian is `diag(p) - p p^T = S S^T`
    with `S = diag(sqrt p) - p sqrt(p)^T`; a would-be gradient is `p - onehot(k)` with `k ~ Categorical(p)`.

    **Arguments:**

    - `weight`: class weights `w`, `[C]`, not negative; default 1.
    - `ignore_index`: positions with this target contribute nothing. With class probabilities it must be negative.
    - `reduction`: `"mean"` or `"sum"`. As in torch, `"mean"` divides by the sum of `w_y` over the positions kept when
      targets are class indices, and by the number of positions when they are probabilities.
    - `label_smoothing`: `e` in `t = (1 - e) target + e / C`. As in torch, the mean is infinite where all kept `w_y` are
      0 and smoothing leaves a rest.
    - `class_axis`: the axis of **one example's** output that holds the classes, also when a batch comes in: 0 as in
      torch, -1 as in Flax and optax. If it is not given, it is 0, and refused where shapes fit -1 as well: for
      outputs of one example with several axes, where these are all of one length, or targets are class probabilities
      (which have the outputs' shape) and no class weights tell the number of classes.

    **Calling** `loss(outputs, targets)` returns the loss of a batch; unlike torch's NaN, it is 0 if everything is
    ignored. Outputs are `[N, C, *D]` (for `class_axis=0`), targets either class indices (integers, `[N, *D]`) or class
    probabilities (floating, the outputs' shape).

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
            weight = _check_weight("weight", weight)
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
                    f" got {targets.shape}.{_unit_axis_hint(indices_shape, targets.shape)}"
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
        """Whether nobody said where the classes are, and the last axis would do for them as well as the first."""
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

    def drawn_gradient(self, f: Float[Array, "C *at"], y: Array, drawn: Int[Array, "*at"]) -> Float[Array, "C *at"]:
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


class BCEWithLogitsLoss(Loss):
    """The binary cross-entropy of logits, `torch.nn.BCEWithLogitsLoss`.

    A term, with `p = sigmoid(f)`, is `-weight (pos_weight y log p + (1 - y) log(1 - p))`. Its Hessian is `m p (1 - p)`
    with `m = weight (1 + (pos_weight - 1) y)`; a would-be gradient of the plain term is `p - b` with
    `b ~ Bernoulli(p)`.

    **Arguments:**

    - `weight`: a factor of each entry, broadcast to the outputs `[N, *out]`, not negative. One with a batch axis can
      only be used with batched functions.
    - `reduction`: `"mean"` (over all entries; weights do not count) or `"sum"`.
    - `pos_weight`: the weight of positive entries, broadcast to the outputs, not negative.

    **Calling** `loss(outputs [N, *out], targets [N, *out])` returns the loss of a batch; targets are in `[0, 1]`, never
    broadcast.

    >>> import jax.numpy as jnp
    >>> print(f"{BCEWithLogitsLoss(reduction='sum')(jnp.zeros((2, 1)), jnp.ones((2, 1))):.4f}")  # 2 log 2
    1.3863
    """

    curvature = "hessian"
    takes_trailing_axes = True
    weight: Float[Array, "..."] | None
    pos_weight: Float[Array, "..."] | None

    def __init__(self, weight: Any = None, *, reduction: str = "mean", pos_weight: Any = None):
        self.weight = None if weight is None else _check_weight("weight", as_array("weight", weight))
        self.pos_weight = (
            None if pos_weight is None else _check_weight("pos_weight", as_array("pos_weight", pos_weight))
        )
        self.reduction = reduction

    def check_shapes(self, outputs: Shaped, targets: Array, batch: bool) -> None:
        _check_same_shape(self, outputs, targets)
        for name, value in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if value is not None:
                _broadcast(name, value, outputs, batch)

    def operand(self, outputs: Array, targets: Array, batch: bool) -> tuple[Any, tuple[int, ...]]:
        def broadcast(name: str, value: Array | None) -> Array | None:
            return None if value is None else _broadcast(name, value, outputs, batch).astype(outputs.dtype)

        weights = broadcast("weight", self.weight), broadcast("pos_weight", self.pos_weight)
        return (targets.astype(outputs.dtype), *weights), ()

    def stand_in_targets(self, outputs: Shaped, batch: bool) -> Array:
        if self.pos_weight is not None:
            raise self._needs_targets("depends on them by pos_weight")
        return jnp.zeros(outputs.shape, outputs.dtype)

    def target_domain(self, shape: tuple[int, ...], batch: bool) -> str:
        return "between 0 and 1"

    def term_valid(self, f: Float[Array, "*at"], y: Any) -> Bool[Array, "*at"]:
        return (y[0] >= 0) & (y[0] <= 1)

    def term_weight(self, f: Float[Array, "*at"], y: Any) -> Float[Array, "*at"]:
        positive, negative = self._mass(y)
        return positive + negative

    def term_value(self, f: Float[Array, "*at"], y: Any) -> Float[Array, "*at"]:
        positive, negative = self._mass(y)
        return positive * jax.nn.softplus(-f) + negative * jax.nn.softplus(f)

    def term_gradient(self, f: Float[Array, "*at"], y: Any) -> Float[Array, "*at"]:
        positive, negative = self._mass(y)
        return negative * jax.nn.sigmoid(f) - positive * jax.nn.sigmoid(-f)

    def term_hessian(self, f: Float[Array, "*at"], y: Any) -> TermHessian:
        sqrt = _sqrt_p_one_minus_p(f)
        return ScalarHessian(sqrt * sqrt, sqrt)

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...], f: jax.ShapeDtypeStruct) -> Array:
        return jax.random.bits(key, shape, jnp.uint32)

    def settle(self, f: Float[Array, "*at"], y: Any, drawn: Array) -> Bool[Array, "*at"]:
        return draw_bit(drawn, jax.nn.sigmoid(-f), jax.nn.sigmoid(f))

    def drawn_gradient(self, f: Float[Array, "*at"], y: Any, drawn: Bool[Array, "*at"]) -> Float[Array, "*at"]:
        return jnp.where(drawn, -jax.nn.sigmoid(-f), jax.nn.sigmoid(f))

    def _mass(self, y: Any) -> tuple[Array, Array]:
        """What multiplies `-log p` and `-log(1 - p)`."""
        target, weight, pos_weight = y
        positive = target if pos_weight is None else pos_weight * target
        negative = 1 - target
        return (positive, negative) if weight is None else (weight * positive, weight * negative)


@jax.custom_jvp
def _sqrt_p_one_minus_p(f: Array) -> Array:
    """`sqrt(p (1 - p)) = 1 / (2 cosh(f / 2))`; the textbook product is 0 from f = 16.75 on in float32."""
    half = jnp.exp(-0.5 * jnp.abs(f))
    return half / (1 + half * half)


@_sqrt_p_one_minus_p.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The absolute value above has the wrong second derivative at 0.
    (f,), (df,) = primals, tangents
    value = _sqrt_p_one_minus_p(f)
    return value, -0.5 * jnp.tanh(0.5 * f) * value * df


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


def _check_weight(name: str, value: Array) -> Array:
    check_real(name, value)
    if is_concrete(value) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) < np.inf)):
        raise ValueError(
            f"{name} must be finite and not negative (a negative weight has no real square root); got {value}."
        )
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


def _check_same_shape(loss: Loss, outputs: Shaped, targets: Array) -> None:
    check_real("targets", targets)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets must have the outputs' shape {outputs.shape} for {type(loss).__name__}; got {targets.shape}."
            f" Targets are never broadcast: reshape them.{_unit_axis_hint(outputs.shape, targets.shape)}"
        )


def _unit_axis_hint(wanted: tuple[int, ...], got: tuple[int, ...]) -> str:
    """For a last axis of length 1 too many or too few."""
    if got == (*wanted, 1):
        return " Pass targets[..., 0]."
    return " Pass targets[..., None]." if (*got, 1) == wanted else ""


def _broadcast(name: str, value: Array, outputs: Shaped, batch: bool) -> Array:
    """`value` broadcast against a batch of outputs, as torch does; one datum is a batch of one."""
    shape = outputs.shape if batch else (1, *outputs.shape)
    try:
        fits = np.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        hint = (
            "" if batch else "; a weight with a batch axis needs a batched function, such as make_batch_grad_output_fn"
        )
        raise ValueError(f"{name} of shape {value.shape} does not broadcast to outputs of shape {shape}{hint}.")
    return jnp.broadcast_to(value, shape).reshape(outputs.shape)


BUILT_IN: tuple[type[Loss], ...] = (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss)
