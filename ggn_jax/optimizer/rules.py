"""What `kfac` may follow instead of a number: a learning rate by the quadratic model, and dampings that adapt."""

from dataclasses import dataclass

import jax

from ggn_jax._checks import check_count, is_concrete
from ggn_jax.optimizer.checks import ABOVE_0, check_flag, check_number, check_static
from ggn_jax.optimizer.numbers import Number


@dataclass(frozen=True)
class QuadraticModel:
    """The learning rate, and the momentum, that minimise the quadratic model of each batch's loss.

    For `kfac(learning_rate=...)`, whose default it is. With the preconditioned gradient `d`, the last step `v`, the
    gradient `g` and the exact GGN of the batch, a step is `-a d + m v` with the `a` and `m` that minimise

    ```
    M(s) = g^T s + s^T (GGN + damping I) s / 2
    ```

    (Martens & Grosse 2015, https://arxiv.org/abs/1503.05671, sections 6.4 and 7). It costs about two tangents of the
    model per step, and `update` requires `batch`, also where it gets `factors`.

    Args:
        momentum: whether `m` is chosen too (default). With False, `a` alone is, as the minimum of `M(-a d)`, and `m` is
            the momentum that `kfac` is given.

    Raises:
        TypeError: if `momentum` is not True or False.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> model_fn, loss, x = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), jnp.ones((8, 2))
        >>> rate = ggn_jax.QuadraticModel(momentum=False)
        >>> optimizer = ggn_jax.kfac(model_fn, loss, rate, momentum=0.9, damping=0.1, example_inputs=x)
        >>> optimizer.needs_batch
        True
    """

    momentum: bool = True

    def __post_init__(self) -> None:
        check_flag("momentum of QuadraticModel", self.momentum)


@dataclass(frozen=True)
class LevenbergMarquardt:
    """A damping by Levenberg and Marquardt's rule: how well the quadratic model predicts each step's gain.

    For `kfac(damping=...)`. After every `interval` steps, the change of the batch's loss is divided by the change that
    the quadratic model predicts for the step. Where that ratio is above 3/4, the damping is multiplied by
    `(19/20)^interval`; where it is below 1/4, divided by it (Martens & Grosse 2015, https://arxiv.org/abs/1503.05671,
    section 6.5). It costs a tangent and two forward passes of the model where it is due, and `update` requires `batch`.

    The batch is the one that the step was made for, which agrees with it, however small it is: batches should be large.

    Args:
        initial: the damping to start from, a number above 0 (default 1).
        interval: how many steps pass between comparisons (default 5). Let `inverse_interval` divide it, so that
            inverses know the new damping.
        minimum: what the damping does not fall below, at least 0 (default 1e-5): as the loss goes to 0, rounding and
            the draws need some. It does not rise above 1e10.

    Raises:
        ValueError, TypeError: for numbers out of range, and for arrays where Python's own are required.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> model_fn, loss, x = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), jnp.ones((8, 2))
        >>> damping = ggn_jax.LevenbergMarquardt(initial=0.1, interval=5)
        >>> optimizer = ggn_jax.kfac(model_fn, loss, 0.1, damping=damping, inverse_interval=5, example_inputs=x)
        >>> round(float(optimizer.init({"w": jnp.ones((2, 3))}).curvature.damping), 3)
        0.1
    """

    initial: Number = 1.0
    interval: int = 5
    minimum: Number = 1e-5

    def __post_init__(self) -> None:
        _check_range(self)
        check_static("interval", self.interval)
        object.__setattr__(self, "interval", check_count("interval of LevenbergMarquardt", self.interval))


@dataclass(frozen=True)
class SlopeDamping:
    """A damping that follows the slope of each new batch at the end of the last step.

    For `kfac(damping=...)` with `learning_rate=QuadraticModel()`, of which it is the default. At each step, with the
    last step `v`, and the gradient `g` and GGN of this batch, which has not seen that step,

    ```
    damping *= (20/19)^(min(max(4 (s - 1), -1), 13)),    s = v^T g / v^T (GGN + damping I) v
    ```

    The damping falls by a twentieth as long as steps do not overshoot by far, and rises by up to a factor of 2 where
    they do, as with batches that are too small for their model to be trusted. The quadratic model has `s` anyway, so
    that it costs nothing. The rule is this package's own.

    Args:
        initial: the damping to start from, a number above 0 (default 1).
        minimum: what the damping does not fall below, at least 0 (default 1e-5). It does not rise above 1e10.

    Raises:
        ValueError, TypeError: for numbers out of range.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> model_fn, loss, x = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), jnp.ones((8, 2))
        >>> optimizer = ggn_jax.kfac(model_fn, loss, damping=ggn_jax.SlopeDamping(initial=0.1), example_inputs=x)
        >>> round(float(optimizer.init({"w": jnp.ones((2, 3))}).curvature.damping), 3)
        0.1
    """

    initial: Number = 1.0
    minimum: Number = 1e-5

    def __post_init__(self) -> None:
        _check_range(self)


def _check_range(rule: LevenbergMarquardt | SlopeDamping) -> None:
    """Refuse numbers out of range; arrays of known values become numbers, so that rules are compared and hashed."""
    kind = type(rule).__name__
    check_number(f"initial of {kind}", rule.initial, ABOVE_0)
    check_number(f"minimum of {kind}", rule.minimum)
    for name in ("initial", "minimum"):
        value = getattr(rule, name)
        if not isinstance(value, jax.Array) or is_concrete(value):
            object.__setattr__(rule, name, float(value))
    if isinstance(rule.initial, int | float) and isinstance(rule.minimum, int | float) and rule.initial < rule.minimum:
        raise ValueError(f"initial of {kind} must not be below its minimum {rule.minimum}; got {rule.initial}.")
