"""The states of `kfac` and `scale_by_kfac`, and what they say of a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ggn_jax._repr import fields
from ggn_jax.optimizer.curvature import Curvature, find_one

NEUTRAL = 1.0  # the slope ratio above which the damping rises


class StepStatistics(NamedTuple):
    """What to log of the last step that `kfac` took: numbers that its update computes anyway, and a norm.

    An update that is zero, because it was rejected or every target is ignored, leaves them as they were.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> state = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x).init(params)
        >>> int(state.statistics.clipped)
        0
    """

    step_norm: Float[Array, ""]
    """The update's Euclidean norm, weight decay included."""
    kl: Float[Array, ""]
    """`learning_rate^2 d^T g`, clipping included, which `kl_clip` bounds: the squared length of the new part of the
    step, without momentum, in the damped curvature, and twice the quadratic model of the KL divergence. With
    `QuadraticModel()`, `s^T (GGN + damping I) s` of the whole step `s`."""
    learning_rate: Float[Array, ""]
    """The factor of the preconditioned gradient `d`, clipping included."""
    momentum: Float[Array, ""]
    """The factor of the last step; 0 without momentum."""
    clipped: Int[Array, ""]
    """The number of all steps so far that `kl_clip` made shorter."""
    reduction_ratio: Float[Array, ""] | None = None
    """The decrease of the batch's loss divided by what the quadratic model predicted, when `LevenbergMarquardt`
    last compared them: minus infinity if an increase was predicted, and 1/2, neither good nor bad, before the first
    time. None for other dampings."""
    slope_ratio: Float[Array, ""] | None = None
    """`v^T g / v^T (GGN + damping I) v` with the last step `v` and the gradient and GGN of this batch, with
    `SlopeDamping`: below 0 where the last step could have been longer for this batch, at 1/2 where it has not
    lowered its loss. 1, which leaves the damping as it is, before the second step. None for other dampings."""

    def __repr__(self) -> str:
        return fields(self, **self._asdict())


class ScaleByKFACState(NamedTuple):
    """The state of `scale_by_kfac`: a pytree of arrays.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> state = ggn_jax.scale_by_kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), example_inputs=x).init(params)
        >>> int(state.rejected)
        0
    """

    curvature: Curvature
    """The averages of the factors, and their inverses."""
    rejected: Int[Array, ""]
    """How many updates were zero because the gradient or its product was not finite, or a block had no inverse yet."""

    def __repr__(self) -> str:
        return fields(self, **self._asdict())


class KFACState(NamedTuple):
    """The state of `kfac`: a pytree of arrays.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> state = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x).init(params)
        >>> state.velocity["w"].shape, int(state.rejected)
        ((2, 3), 0)
    """

    curvature: Curvature
    """The averages of the factors, and their inverses."""
    velocity: PyTree[Array]
    """The last step without weight decay, in at least float32; None without momentum."""
    rejected: Int[Array, ""]
    """How many updates were zero because the gradient or the step was not finite, or a block had no inverse yet."""
    statistics: StepStatistics
    """What to log of the last step; `optimizer.statistics(state)` returns it as a dict."""

    def __repr__(self) -> str:
        return fields(self, **self._asdict())


def find_state(state: Any) -> KFACState | ScaleByKFACState:
    """The one state of `kfac` or `scale_by_kfac` in an optimizer's, however it is wrapped."""
    found: KFACState | ScaleByKFACState = find_one(state, KFACState, ScaleByKFACState)
    return found


RATIOS = {"reduction_ratio": ("LevenbergMarquardt", 0.5), "slope_ratio": ("SlopeDamping", NEUTRAL)}
"""The damping that each ratio is of, and its value before the first step. A state has that of its damping only."""


def first_statistics(ratio: str) -> StepStatistics:
    """Those before the first step, with this ratio, or "" for none.

    Each array has its own buffer, since a state may be donated.
    """
    norm, kl, rate, momentum = (jnp.zeros((), jnp.float32) for _ in range(4))
    own = {ratio: jnp.full((), RATIOS[ratio][1], jnp.float32)} if ratio else {}
    return StepStatistics(norm, kl, rate, momentum, jnp.zeros((), jnp.int32), **own)


def check_rule(state: Any, ratio: str) -> None:
    """Refuse the state of another rule for the damping, which would go on from where that has brought it."""
    if isinstance(state, KFACState):
        found = next((name for name in RATIOS if getattr(state.statistics, name, None) is not None), "")
        if found != ratio:
            had, has = (RATIOS[name][0] if name else "no rule" for name in (found, ratio))
            raise ValueError(
                f"state must be that of an optimizer with the same rule for the damping, {has}; got one of {had}: make"
                " the optimizer as it was made for this state, or start with the state that `init` of this one returns."
            )


def statistics_of(state: Any, ratio: str) -> dict[str, Array]:
    """All scalars of a state by their names; of the ratios that damping is adapted by, the one that is used."""
    found = find_state(state)
    curvature = found.curvature
    numbers: dict[str, Any] = {"step": curvature.count, "damping": curvature.damping}
    if isinstance(found, KFACState):
        numbers |= found.statistics._asdict()
    numbers = {name: x for name, x in numbers.items() if name not in RATIOS or name == ratio}
    numbers |= {"rejected": found.rejected, "skipped": curvature.skipped}
    # Some libraries wrap each array of a state.
    return {name: jax.tree.leaves(x)[0] for name, x in numbers.items()}
