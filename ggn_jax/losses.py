"""Losses of single entries, as in `torch.nn`: squared errors, and the binary cross-entropy of logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ggn_jax._checks import Shaped, as_array, check_real, check_weight
from ggn_jax._draws import draw_bit
from ggn_jax._hints import unit_axis_hint
from ggn_jax.loss import Loss
from ggn_jax.term_hessian import ScalarHessian, TermHessian


class MSELoss(Loss):
    """The squared error, as `torch.nn.MSELoss`.

    A term is `(f - y)^2`. Its Hessian is 2, so `S = sqrt(2)`; sampled gradients are `N(0, 2)`.

    `loss(outputs [N, *out], targets [N, *out])` returns the loss of a batch. Targets are never broadcast.

    Args:
        reduction: `"mean"` (default; over all entries) or `"sum"`.

    Raises:
        ValueError: for an unknown reduction.

    Example:
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

    def sampled_gradient(self, f: Float[Array, "*at"], y: Float[Array, "*at"], drawn: Array) -> Float[Array, "*at"]:
        return jnp.sqrt(jnp.full_like(f, 2)) * drawn


class BCEWithLogitsLoss(Loss):
    """The binary cross-entropy of logits, as `torch.nn.BCEWithLogitsLoss`.

    With `p = sigmoid(f)`, a term is `-weight (pos_weight y log p + (1 - y) log(1 - p))`. Its Hessian is `m p (1 - p)`
    with `m = weight (1 + (pos_weight - 1) y)`; a sampled gradient of the plain term is `p - b` with `b ~ Bernoulli(p)`.

    `loss(outputs [N, *out], targets [N, *out])` returns the loss of a batch; targets are in `[0, 1]`, and never
    broadcast.

    Args:
        weight: a factor for each entry, not negative, broadcast to the outputs `[N, *out]`; None (default) for 1. A
            weight with a batch axis can only be used with functions of a batch.
        reduction: `"mean"` (default; over all entries, whatever their weights) or `"sum"`.
        pos_weight: the weight of positive entries, not negative, broadcast to the outputs; None (default) for 1.

    Raises:
        ValueError: for an unknown reduction, or a weight that is negative or not finite.
        TypeError: for a weight that is not an array or a number.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{BCEWithLogitsLoss(reduction='sum')(jnp.zeros((2, 1)), jnp.ones((2, 1))):.4f}")  # 2 log 2
        1.3863
    """

    curvature = "hessian"
    takes_trailing_axes = True
    weight: Float[Array, "..."] | None
    pos_weight: Float[Array, "..."] | None

    def __init__(self, weight: Any = None, *, reduction: str = "mean", pos_weight: Any = None):
        self.weight = None if weight is None else check_weight("weight", as_array("weight", weight))
        self.pos_weight = None if pos_weight is None else check_weight("pos_weight", as_array("pos_weight", pos_weight))
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

    def sampled_gradient(self, f: Float[Array, "*at"], y: Any, drawn: Bool[Array, "*at"]) -> Float[Array, "*at"]:
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


def _check_same_shape(loss: Loss, outputs: Shaped, targets: Array) -> None:
    check_real("targets", targets)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets must have the outputs' shape {outputs.shape} for {type(loss).__name__}; got {targets.shape}."
            f" Targets are never broadcast: reshape them.{unit_axis_hint(outputs.shape, targets.shape)}"
        )


def _broadcast(name: str, value: Array, outputs: Shaped, batch: bool) -> Array:
    """`value` broadcast against a batch of outputs, as torch does; one example is a batch of one."""
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
