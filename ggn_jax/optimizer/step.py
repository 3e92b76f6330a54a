"""From the preconditioned gradient to the update: learning rate, momentum, clipping, weight decay, new damping."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._checks import is_word, wide_dtype
from ggn_jax._eager import compiled
from ggn_jax._fusion import seal
from ggn_jax._sharding import vary_alike
from ggn_jax.operators.problem import Problem, WeightedProblems
from ggn_jax.optimizer.checks import (
    ABOVE_0,
    BELOW_1,
    check_decay_mask,
    check_flag,
    check_number,
    check_schedule,
    check_static,
    is_function,
    spread_mask,
)
from ggn_jax.optimizer.curvature import Direction
from ggn_jax.optimizer.defaults import AUTO
from ggn_jax.optimizer.numbers import cast, combine, inner, tree_where, value_at, zeros_like
from ggn_jax.optimizer.quadratic import quadratic_model, reduction_ratio
from ggn_jax.optimizer.rules import LevenbergMarquardt, QuadraticModel, SlopeDamping
from ggn_jax.optimizer.states import NEUTRAL, StepStatistics

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
        self, before: StepStatistics, moves: Bool[Array, ""], reduction_ratio: Float[Array, ""] | None
    ) -> StepStatistics:
        """Those of this step if it is one, else those before."""
        after = StepStatistics(
            step_norm=jnp.sqrt(self.square).astype(jnp.float32),
            kl=self.kl.astype(jnp.float32),
            learning_rate=self.learning_rate.astype(jnp.float32),
            momentum=self.momentum.astype(jnp.float32),
            clipped=before.clipped + self.clipped.astype(jnp.int32),
            reduction_ratio=reduction_ratio,
            slope_ratio=None if before.slope_ratio is None else self.slope_ratio.astype(jnp.float32),
        )
        return tree_where(moves, after, before)


@dataclass(frozen=True)
class StepRule:
    """How `kfac` makes a step; see there."""

    learning_rate: Any
    damping: Any
    momentum: Any
    kl_clip: Any
    weight_decay: Any
    weight_decay_mask: Any
    nesterov: bool

    def __post_init__(self) -> None:
        check_static("nesterov", self.nesterov)
        check_flag("nesterov", self.nesterov)
        if not self.is_quadratic:
            check_schedule("learning_rate", self.learning_rate, ("ggn_jax.QuadraticModel(...)",))
        if self.chooses_momentum:
            if not is_word(self.momentum, AUTO):
                raise ValueError(
                    f"momentum={self.momentum!r} does not go with learning_rate=QuadraticModel(), which is what kfac"
                    " takes where none is given, and which chooses the momentum: leave momentum out, or pass"
                    " learning_rate=ggn_jax.QuadraticModel(momentum=False)."
                )
        elif self.momentum is not None:
            check_number("momentum", self.momentum, BELOW_1, ("'auto'", "None"))
        if self.nesterov and (self.chooses_momentum or self.momentum is None):
            reason = "learning_rate=QuadraticModel() chooses one" if self.chooses_momentum else "momentum is None"
            raise ValueError(
                f"nesterov=True is for a momentum that is a number, and {reason}: leave nesterov out, or pass a"
                " learning rate and a momentum."
            )
        if self.kl_clip is not None:
            check_number("kl_clip", self.kl_clip, ABOVE_0, ("'auto'", "None"))
        if isinstance(self.damping, SlopeDamping):
            if not self.chooses_momentum:
                raise ValueError(
                    "damping=SlopeDamping(...) comes with learning_rate=ggn_jax.QuadraticModel(), which looks along the"
                    f" last step; got learning_rate={self.learning_rate!r}. Or pass"
                    " damping=ggn_jax.LevenbergMarquardt(...)."
                )
        elif not self.adapts_damping:
            also = "'auto'", "ggn_jax.LevenbergMarquardt(...)", "ggn_jax.SlopeDamping(...)"
            check_schedule("damping", self.damping, also)
        check_schedule("weight_decay", self.weight_decay)
        if not is_function(self.weight_decay_mask):
            check_decay_mask(self.weight_decay_mask)

    @property
    def is_quadratic(self) -> bool:
        """Whether the learning rate is that of the quadratic model."""
        return isinstance(self.learning_rate, QuadraticModel)

    @property
    def chooses_momentum(self) -> bool:
        """Whether the momentum is, too."""
        return isinstance(self.learning_rate, QuadraticModel) and self.learning_rate.momentum

    @property
    def has_momentum(self) -> bool:
        """Whether the last step is kept."""
        return self.chooses_momentum or self.momentum is not None

    @property
    def adapts_damping(self) -> bool:
        return isinstance(self.damping, LevenbergMarquardt | SlopeDamping)

    @property
    def first_damping(self) -> Any:
        """A number, or a schedule."""
        return self.damping.initial if self.adapts_damping else self.damping

    @property
    def needs_batch(self) -> bool:
        """Whether it looks at the batch's loss."""
        return self.is_quadratic or self.adapts_damping

    @property
    def ratio(self) -> str:
        """Which of the ratios of a state the damping is adapted by; "" where it is not."""
        if not self.adapts_damping:
            return ""
        return "slope_ratio" if isinstance(self.damping, SlopeDamping) else "reduction_ratio"

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
        if self.is_quadratic:
            assert problem is not None
            free = [direction.entries, velocity] if self.chooses_momentum else [direction.entries]
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
        if self.chooses_momentum:
            size = (found @ model.k @ found).astype(wide)
        if self.kl_clip is not None:
            bound = jnp.asarray(self.kl_clip).astype(wide)
            clipped = size > bound
            shorter = jnp.where(clipped, jnp.sqrt(bound / jnp.where(clipped, size, 1)), 1)
            rate, size = rate * shorter, jnp.where(clipped, bound, size)
            if self.chooses_momentum:  # the model's minimum among steps of this length is its minimum, made shorter
                m = m * shorter.astype(m.dtype)
        terms = [(seal(-rate), direction.entries)]
        if velocity is not None:
            terms.append((seal(jnp.asarray(m).astype(wide)), velocity))
        step = combine(*terms)
        # Nesterov's step is the velocity that the next step would have for the same direction.
        moved = combine(terms[0], (terms[1][0], step)) if self.nesterov else step
        decayed = moved
        if not isinstance(self.weight_decay, float | int) or self.weight_decay != 0:
            shrink = jnp.asarray(a).astype(wide) * value_at("weight_decay", self.weight_decay, count).astype(wide)
            decayed = combine((jnp.ones((), wide), moved), (seal(-shrink), self._decaying(params)))
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
        ratio: Float[Array, ""] | None,
    ) -> tuple[Array, Array | None]:
        """The damping after a step, and the last ratio that Levenberg and Marquardt's rule saw."""
        rule = self.damping
        least = jnp.asarray(rule.minimum).astype(damping.dtype)
        if isinstance(rule, SlopeDamping):
            by = FASTEST ** -jnp.clip(4 * (made.slope_ratio - NEUTRAL), -1, MOST_RAISES).astype(damping.dtype)
            return jnp.where(moves, jnp.clip(damping * by, least, MOST_DAMPING), damping), ratio
        assert ratio is not None
        due = moves & ((count + 1) % rule.interval == 0)
        step = tree_where(moves, made.update, zeros_like(made.update))
        return _adapt(due, problem, grads, step, (damping, ratio), least, FASTEST**rule.interval)


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
