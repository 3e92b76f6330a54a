"""From the preconditioned gradient to the update: learning rate, momentum, clipping, weight decay, new damping."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._checks import check_count, wide_dtype
from ggn_jax._eager import compiled
from ggn_jax._fusion import seal
from ggn_jax._sharding import vary_alike
from ggn_jax.operators.problem import Problem, WeightedProblems
from ggn_jax.optimizer.checks import (
    ABOVE_0,
    BELOW_1,
    check_decay_mask,
    check_number,
    check_schedule,
    check_static,
    is_function,
    spread_mask,
)
from ggn_jax.optimizer.curvature import Direction
from ggn_jax.optimizer.defaults import AUTO, QUADRATIC, SLOPE, is_word
from ggn_jax.optimizer.numbers import cast, combine, inner, tree_where, value_at, zeros_like
from ggn_jax.optimizer.quadratic import quadratic_model, reduction_ratio
from ggn_jax.optimizer.states import NEUTRAL, StepStatistics

USUAL_KL_CLIP = 1e-3
FASTEST = 19 / 20  # by which damping falls in a step
MOST_RAISES = 13  # by which damping rises in a step: about twice
MOST_DAMPING = 1e10  # that adaptation goes to


class Step(NamedTuple):
    """A step, and what there is to log of it."""

    velocity: PyTree[Array]
    """Without weight decay, in at least float32."""
    update: PyTree[Array]
    """With it, in the gradient's dtypes."""
    square: Float[Array, ""]
    """The update's squared norm: finite where all of it is, and no entry is too large for its square."""
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    kl: Float[Array, ""]
    clipped: Bool[Array, ""]
    slope_ratio: Float[Array, ""]
    """Along the last step; see `StepStatistics`."""

    def statistics(
        self, before: StepStatistics, moves: Bool[Array, ""], reduction_ratio: Float[Array, ""]
    ) -> StepStatistics:
        """Those of this step if it is one, else those before."""
        after = StepStatistics(
            step_norm=jnp.sqrt(self.square).astype(jnp.float32),
            kl=self.kl.astype(jnp.float32),
            learning_rate=self.learning_rate.astype(jnp.float32),
            momentum=self.momentum.astype(jnp.float32),
            clipped=before.clipped + self.clipped.astype(jnp.int32),
            reduction_ratio=reduction_ratio,
            slope_ratio=self.slope_ratio.astype(jnp.float32),
        )
        return tree_where(moves, after, before)


@dataclass(frozen=True)
class StepRule:
    """How `kfac` makes a step; see there."""

    learning_rate: Any
    damping: Any
    adapt_damping: int | str | None
    momentum: Any
    min_damping: Any
    kl_clip: Any
    weight_decay: Any
    weight_decay_mask: Any

    def __post_init__(self) -> None:
        if not is_word(self.learning_rate, QUADRATIC):
            check_schedule("learning_rate", self.learning_rate, ("'quadratic'",))
            if is_word(self.momentum, QUADRATIC):
                raise ValueError("momentum='quadratic' comes with learning_rate='quadratic': both minimise one model.")
        if self.momentum is not None and not is_word(self.momentum, QUADRATIC):
            check_number("momentum", self.momentum, BELOW_1, ("'quadratic'", "'auto'", "None"))
        if is_word(self.kl_clip, AUTO):
            object.__setattr__(self, "kl_clip", None if self.quadratic else USUAL_KL_CLIP)
        if self.kl_clip is not None:
            check_number("kl_clip", self.kl_clip, ABOVE_0, ("'auto'", "None"))
        check_schedule("damping", self.damping, ("'auto'",))
        check_number("min_damping", self.min_damping)
        check_schedule("weight_decay", self.weight_decay)
        if not is_function(self.weight_decay_mask):
            check_decay_mask(self.weight_decay_mask)
        check_static("adapt_damping", self.adapt_damping)
        if self.follows_slope:
            if not is_word(self.momentum, QUADRATIC):
                raise ValueError(
                    "adapt_damping='slope' comes with learning_rate='quadratic' and momentum='quadratic', which look"
                    f" along the last step; got momentum={self.momentum!r}. Or pass a number of steps."
                )
        elif isinstance(self.adapt_damping, str):
            wanted = "an integer of at least 1, 'slope', 'auto' or None"
            raise ValueError(f"adapt_damping must be {wanted}; got {self.adapt_damping!r}.")
        elif self.adapt_damping is not None:
            check_count("adapt_damping", self.adapt_damping)
        if self.adapt_damping is not None and callable(self.damping):
            raise ValueError("damping must be a number with adapt_damping, the one to start from; got a schedule.")

    @property
    def quadratic(self) -> bool:
        """Whether the learning rate is that of the quadratic model."""
        return isinstance(self.learning_rate, str)

    @property
    def needs_batch(self) -> bool:
        """Whether it looks at the batch's loss."""
        return self.quadratic or self.adapt_damping is not None

    @property
    def ratio(self) -> str:
        """Which of the ratios of a state the damping is adapted by; "" where it is not."""
        return "" if self.adapt_damping is None else f"{'slope' if self.follows_slope else 'reduction'}_ratio"

    @property
    def follows_slope(self) -> bool:
        return is_word(self.adapt_damping, SLOPE)

    def check_params(self, params: PyTree[Array]) -> None:
        """Refuse a mask that does not fit."""
        if self.weight_decay_mask is not None:
            spread_mask(self.weight_decay_mask, params)

    def step(
        self,
        problem: Problem | WeightedProblems | None,
        grads: PyTree[Array],
        direction: Direction,
        velocity: PyTree[Array] | None,
        params: PyTree[Array],
        count: Int[Array, ""],
        damping: Array,
    ) -> Step:
        """The step from a preconditioned gradient, and the last step."""
        wide = wide_dtype(grads)
        # The step is -a direction + m velocity.
        slope_ratio = jnp.asarray(NEUTRAL)
        if self.quadratic:
            assert problem is not None
            free = [direction.entries, velocity] if is_word(self.momentum, QUADRATIC) else [direction.entries]
            model = quadratic_model(problem, grads, free, damping)
            found = model.minimum()
            if len(free) > 1:
                bend = model.k[1, 1]
                slope_ratio = jnp.where(bend > 0, model.b[1] / jnp.where(bend > 0, bend, 1), slope_ratio)
            a, m = -found[0], found[1] if len(free) > 1 else self.momentum
        else:
            a, m = value_at("learning_rate", self.learning_rate, count), self.momentum
        rate = jnp.asarray(a).astype(wide)
        size, clipped = rate**2 * direction.slope.astype(wide), jnp.asarray(False)
        if self.kl_clip is not None:
            bound = jnp.asarray(self.kl_clip).astype(wide)
            clipped = size > bound
            rate = rate * jnp.where(clipped, jnp.sqrt(bound / jnp.where(clipped, size, 1)), 1)
            size = jnp.where(clipped, bound, size)
        terms = [(seal(-rate), direction.entries)]
        if velocity is not None:
            terms.append((seal(jnp.asarray(m).astype(wide)), velocity))
        step = combine(*terms)
        decayed = step
        if not isinstance(self.weight_decay, float | int) or self.weight_decay != 0:
            shrink = jnp.asarray(a).astype(wide) * value_at("weight_decay", self.weight_decay, count).astype(wide)
            decayed = combine((jnp.ones((), wide), step), (seal(-shrink), self._decaying(params)))
        update = cast(decayed, grads)
        momentum = jnp.asarray(0.0 if velocity is None else m)
        return Step(step, update, inner(update, update), rate, momentum, size, clipped, slope_ratio)

    def _decaying(self, params: PyTree[Array]) -> PyTree[Array]:
        """The parameters that decay, and 0 for the others."""
        if self.weight_decay_mask is None:
            return params
        mask = spread_mask(self.weight_decay_mask, params)
        return jax.tree.map(lambda p, keep: p if keep else jnp.zeros_like(p), params, mask)

    def new_damping(
        self,
        problem: Problem | WeightedProblems,
        grads: PyTree[Array],
        made: Step,
        damping: Array,
        count: Int[Array, ""],
        moves: Bool[Array, ""],
        ratio: Float[Array, ""],
    ) -> tuple[Array, Array]:
        """The damping after a step, and the last ratio that Levenberg and Marquardt's rule saw."""
        least = jnp.asarray(self.min_damping).astype(damping.dtype)
        if self.follows_slope:
            by = FASTEST ** -jnp.clip(4 * (made.slope_ratio - NEUTRAL), -1, MOST_RAISES).astype(damping.dtype)
            return jnp.where(moves, jnp.clip(damping * by, least, MOST_DAMPING), damping), ratio
        assert isinstance(self.adapt_damping, int)
        due = moves & ((count + 1) % self.adapt_damping == 0)
        step = tree_where(moves, made.update, zeros_like(made.update))
        return _adapt(due, problem, grads, step, (damping, ratio), least, FASTEST**self.adapt_damping)


@compiled
def _adapt(
    due: Bool[Array, ""],
    problem: Problem | WeightedProblems,
    grads: PyTree[Array],
    step: PyTree[Array],
    known: tuple[Array, Array],
    least: Array,
    factor: float,
) -> tuple[Array, Array]:
    def adapted(
        problem: Problem | WeightedProblems, grads: PyTree[Array], step: PyTree[Array], known: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        damping, last = known
        model = quadratic_model(problem, grads, [step], damping)
        ratio = reduction_ratio(problem, model, jnp.ones(1, model.b.dtype), step)
        by = jnp.asarray(factor, damping.dtype)
        changed = jnp.where(ratio > 3 / 4, damping * by, jnp.where(ratio < 1 / 4, damping / by, damping))
        return jnp.clip(changed, least, MOST_DAMPING), ratio.astype(last.dtype)

    args = vary_alike(problem, grads, step, known)
    result: tuple[Array, Array] = jax.lax.cond(due, adapted, lambda *args: args[-1], *args)
    return result
