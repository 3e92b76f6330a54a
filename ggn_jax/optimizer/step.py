"""From the preconditioned gradient to the update: learning rate, momentum, clipping, weight decay, new damping."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

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
from ggn_jax.optimizer.numbers import cast, combine, value_at
from ggn_jax.optimizer.quadratic import quadratic_model, reduction_ratio

QUADRATIC = "quadratic"
AUTO = "auto"
USUAL_KL_CLIP = 1e-3
MOST_DAMPING = 1e10  # that adaptation goes to


@dataclass(frozen=True)
class StepRule:
    """How `kfac` makes a step; see there."""

    learning_rate: Any
    damping: Any
    adapt_damping: int | None
    min_damping: Any
    momentum: Any
    kl_clip: Any
    weight_decay: Any
    weight_decay_mask: Any

    def __post_init__(self) -> None:
        if not _is(self.learning_rate, QUADRATIC):
            check_schedule("learning_rate", self.learning_rate, ("'quadratic'",))
            if _is(self.momentum, QUADRATIC):
                raise ValueError("momentum='quadratic' comes with learning_rate='quadratic': both minimise one model.")
        if self.momentum is not None and not _is(self.momentum, QUADRATIC):
            check_number("momentum", self.momentum, BELOW_1, ("'quadratic'", "None"))
        if _is(self.kl_clip, AUTO):
            object.__setattr__(self, "kl_clip", None if self.quadratic else USUAL_KL_CLIP)
        if self.kl_clip is not None:
            check_number("kl_clip", self.kl_clip, ABOVE_0, ("'auto'", "None"))
        check_schedule("damping", self.damping)
        check_number("min_damping", self.min_damping)
        check_schedule("weight_decay", self.weight_decay)
        if not is_function(self.weight_decay_mask):
            check_decay_mask(self.weight_decay_mask)
        check_static("adapt_damping", self.adapt_damping)
        if self.adapt_damping is not None:
            check_count("adapt_damping", self.adapt_damping)
            if callable(self.damping):
                raise ValueError("damping must be a number with adapt_damping, the one to start from; got a schedule.")

    @property
    def quadratic(self) -> bool:
        """Whether the learning rate is that of the quadratic model."""
        return isinstance(self.learning_rate, str)

    @property
    def needs_batch(self) -> bool:
        """Whether it looks at the batch's loss."""
        return self.quadratic or self.adapt_damping is not None

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
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The step without weight decay, in at least float32, and with it, in the gradient's dtypes."""
        wide = wide_dtype(grads)
        # The step is -a direction + m velocity.
        if self.quadratic:
            assert problem is not None
            free = [direction.entries, velocity] if _is(self.momentum, QUADRATIC) else [direction.entries]
            found = quadratic_model(problem, grads, free, damping).minimum()
            a, m = -found[0], found[1] if len(free) > 1 else self.momentum
        else:
            a, m = value_at("learning_rate", self.learning_rate, count), self.momentum
        rate = jnp.asarray(a).astype(wide)
        if self.kl_clip is not None:
            size = rate**2 * direction.slope.astype(wide)
            bound = jnp.asarray(self.kl_clip).astype(wide)
            rate = rate * jnp.where(size > bound, jnp.sqrt(bound / jnp.where(size > bound, size, 1)), 1)
        terms = [(seal(-rate), direction.entries)]
        if velocity is not None:
            terms.append((seal(jnp.asarray(m).astype(wide)), velocity))
        step = combine(*terms)
        if isinstance(self.weight_decay, float | int) and self.weight_decay == 0:
            return step, cast(step, grads)
        shrink = jnp.asarray(a).astype(wide) * value_at("weight_decay", self.weight_decay, count).astype(wide)
        decayed = combine((jnp.ones((), wide), step), (seal(-shrink), self._decaying(params)))
        return step, cast(decayed, grads)

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
        step: PyTree[Array],
        damping: Array,
        count: Int[Array, ""],
        moves: Bool[Array, ""],
    ) -> Array:
        """The damping after a step, by Levenberg and Marquardt's rule where it is due."""
        assert self.adapt_damping is not None
        due = moves & ((count + 1) % self.adapt_damping == 0)
        least = jnp.asarray(self.min_damping).astype(damping.dtype)
        return _adapt(due, problem, grads, step, damping, least, (19 / 20) ** self.adapt_damping)


@compiled
def _adapt(
    due: Bool[Array, ""],
    problem: Problem | WeightedProblems,
    grads: PyTree[Array],
    step: PyTree[Array],
    damping: Array,
    least: Array,
    factor: float,
) -> Array:
    def adapted(
        problem: Problem | WeightedProblems, grads: PyTree[Array], step: PyTree[Array], damping: Array
    ) -> Array:
        model = quadratic_model(problem, grads, [step], damping)
        ratio = reduction_ratio(problem, model, jnp.ones(1, model.b.dtype), step)
        by = jnp.asarray(factor, damping.dtype)
        changed = jnp.where(ratio > 3 / 4, damping * by, jnp.where(ratio < 1 / 4, damping / by, damping))
        return jnp.clip(changed, least, MOST_DAMPING)

    result: Array = jax.lax.cond(due, adapted, lambda *args: args[-1], *vary_alike(problem, grads, step, damping))
    return result


def _is(value: Any, word: str) -> bool:
    return isinstance(value, str) and value == word
