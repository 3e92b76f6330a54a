"""KFAC as optax transformations."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from ggn_jax._fusion import seal
from ggn_jax._keywords import takes
from ggn_jax._sharding import NOT_SHARDED, on_mesh
from ggn_jax.loss import Loss
from ggn_jax.objective import Objective
from ggn_jax.operators.problem import Problem
from ggn_jax.optimizer.checks import check_grads, check_schedule, check_structure
from ggn_jax.optimizer.core import Core
from ggn_jax.optimizer.curvature import Curvature, Direction, Factors, inverses_available, precondition, update_averages
from ggn_jax.optimizer.defaults import WITH_A_RATE, Tuned, with_defaults
from ggn_jax.optimizer.methods import KFACTransformation, pickled_as_called
from ggn_jax.optimizer.numbers import Number, Schedule, all_finite, tree_where, value_at, wide_zeros_like, zeros_like
from ggn_jax.optimizer.objectives import core_of
from ggn_jax.optimizer.rules import LevenbergMarquardt, QuadraticModel, SlopeDamping
from ggn_jax.optimizer.settings import DEFAULTS, INTERVALS, KFACOptions
from ggn_jax.optimizer.states import KFACState, ScaleByKFACState, check_rule, first_statistics
from ggn_jax.optimizer.step import StepRule
from ggn_jax.optimizer.storage import as_plain


@pickled_as_called
@takes(DEFAULTS)
def scale_by_kfac(
    model_fn: Callable[[PyTree, PyTree], Array] | Objective,
    loss: Loss | None = None,
    *,
    example_inputs: PyTree,
    damping: Number | Schedule = WITH_A_RATE.damping,
    **options: Unpack[KFACOptions],
) -> KFACTransformation:
    r"""Precondition gradients with a damped KFAC or EKFAC inverse, for `optax.chain`.

    `update(grads, state, params, batch=(inputs, targets), key=key)` returns `(F + damping I)^-1 grads`, where `F` is
    the running average of the batches' KFAC (Martens & Grosse 2015) or EKFAC (George et al. 2018) matrices. `kfac`
    adds momentum, learning rate and the like, and is what most users want.

    Args:
        model_fn: a function `model_fn(params, inputs)` that treats examples independently, unless
            `examples="coupled"`; or an `Objective` in place of it and `loss`, with lists of inputs and batches.
        loss: `loss(model_fn(params, inputs), targets)` is what the gradient is of.
        example_inputs: a batch of inputs, or `jax.ShapeDtypeStruct`s of one, to find the layers with.
        damping: a number, or a function of the number of steps (default 1e-3).
        **options: `KFACOptions`, shared with `kfac`, say how curvature is followed: `decay`, `factor_interval`,
            `inverse_interval`, `staggered`, `damping_method`, `ekfac`, `factor_dtype`, `chunk_size`, `mesh`,
            `full_params`, `has_aux` and `examples`. `KroneckerOptions`, shared with `KFACLinearOperator`, say how
            Kronecker factors are made: `fisher_type`, `mc_samples`, `sharing`, `bias`, `tied`, `positions`,
            `on_uncovered`, `small`, `large`, `max_dense_size`, `block_size`, `max_small_size` and
            `vector_chunk_size`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with more methods, a `KFACTransformation`.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax, jax.numpy as jnp, optax, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
        >>> scale = scale_by_kfac(model_fn, loss, example_inputs=batch[0], damping=1e-2)
        >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), scale, optax.scale_by_learning_rate(0.1))
        >>> state = optimizer.init(params)
        >>> grads = jax.grad(lambda params: loss(model_fn(params, batch[0]), batch[1]))(params)
        >>> updates, state = optimizer.update(grads, state, params, batch=batch, key=jax.random.key(0))
    """
    check_schedule("damping", damping)
    core = core_of(model_fn, loss, example_inputs, {**DEFAULTS, **options})

    def init(params: PyTree[Array]) -> ScaleByKFACState:
        rejected = core.placed(jnp.zeros((), jnp.int32), params)
        return ScaleByKFACState(core.start(params, _first(damping)), rejected)

    def update(
        updates: PyTree[Array],
        state: ScaleByKFACState,
        params: PyTree[Array] | None = None,
        *,
        batch: Any = None,
        key: Any = None,
        factors: Factors | None = None,
        full_params: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Array], ScaleByKFACState]:
        del extra_args  # other transformations'
        wanted: Any = ScaleByKFACState(_wanted(core, params), _COUNTER)
        state = check_structure("state", state, wanted)
        seen = _precondition_batch(
            core, updates, state.curvature, damping, params, batch, key, factors, full_params, value=False
        )
        fine = seen.usable & all_finite(seen.direction.entries)
        scaled = tree_where(seal(fine & seen.counts), seen.direction.entries, zeros_like(updates))
        return scaled, ScaleByKFACState(as_plain(seen.curvature), state.rejected + (~fine).astype(jnp.int32))

    def like(updates: Any, state: Any, *_: Any, **__: Any) -> Any:
        return updates, ScaleByKFACState(_sharding_of(state), NOT_SHARDED)

    update = on_mesh(update, like)
    return KFACTransformation._make_of(core, init, update, None)


@pickled_as_called
@takes(DEFAULTS)
def kfac(
    model_fn: Callable[[PyTree, PyTree], Array] | Objective,
    loss: Loss | None = None,
    learning_rate: Number | Schedule | QuadraticModel = QuadraticModel(),
    *,
    example_inputs: PyTree,
    damping: Number | Schedule | LevenbergMarquardt | SlopeDamping | Literal["auto"] = "auto",
    momentum: Number | Literal["auto"] | None = "auto",
    nesterov: bool = False,
    kl_clip: Number | Literal["auto"] | None = "auto",
    weight_decay: Number | Schedule = 0.0,
    weight_decay_mask: Any = None,
    **options: Unpack[KFACOptions],
) -> KFACTransformation:
    r"""KFAC (Martens & Grosse 2015), or EKFAC (George et al. 2018), as an optax transformation.

    With the gradient `g` and the running average `F` of the batches' KFAC matrices,

    ```
    d = (F + damping I)^-1 g        step = momentum * last step - learning_rate * c * d
    update = step - learning_rate * weight_decay * params
    ```

    where `c = min(1, sqrt(kl_clip / (learning_rate^2 d^T g)))` (Ba et al. 2017), or 1 without `kl_clip`. Where
    `QuadraticModel()` chooses the whole step `s`, all of it is multiplied by `c`, which is then
    `min(1, sqrt(kl_clip / s^T (GGN + damping I) s))`: among steps within that bound, this one minimises the model.
    With `nesterov=True` (Sutskever et al. 2013), the update has `momentum * step - learning_rate * c * d`
    in the place of `step`. Convolutions and shared weights are as in Grosse & Martens (2016) and Eschenhagen et al.
    (2023).

    `update(grads, state, params, batch=(inputs, targets), key=key)` needs the batch of the gradient, perhaps with a
    padding `mask` as third member, and a new key at each step for what is drawn. Targets may be None where nothing
    depends on them: the factors of losses without class weights or `pos_weight`, but for empirical ones. The state is
    one pytree of arrays: `jit` it, donate it, checkpoint it; another optimizer may go on from it with other numbers,
    schedules and learning-rate rules, but not with another rule for the damping. Nothing is registered in the model or
    the loss; `optimizer.report(params)` shows which curvature each parameter gets, and
    `optimizer.value_and_grad_and_factors` saves a forward pass.

    **With nothing set, there is nothing to tune:** `kfac(model_fn, loss, example_inputs=x)` takes the learning rate and
    the momentum from the quadratic model of each batch (`QuadraticModel()`), a damping from 1 on that follows the slope
    at the end of each step (`SlopeDamping()`), and new factors and inverses every 5 steps. `update` then needs `batch`
    also where it gets `factors`, and a step takes about two tangents of the model more.

    **With a learning rate, what to tune first:** `learning_rate` (with momentum 0.9: 0.01 to 1) and `damping` (1e-4 to
    1) together; then `inverse_interval` (larger is faster, and staler). `kl_clip` (1e-4 to 1e-2) makes large learning
    rates safe; without it, a learning rate of 0.1 diverges on most networks. `optimizer.diagnose(state, params, batch)`
    says what slows a run, `optimizer.statistics(state)` is what to log.

    **NaN and infinities:** a batch whose factors are not finite is left out of the averages and counted in
    `state.curvature.skipped`; where the gradient or the step is not finite, the update is 0, momentum stays, and
    `state.rejected` counts it. An inverse that fails leaves the last one; as long as a block has none, which happens
    with `damping=0`, updates are rejected as well. A batch in which every target is ignored does not count as a step:
    the update is 0, and averages, inverses, momentum and an adapted damping stay as they are.

    Args:
        model_fn: a function `model_fn(params, inputs)` that treats examples independently, unless
            `examples="coupled"`. Or an `Objective` in place of it and `loss`, `kfac(objective, learning_rate=...,
            example_inputs=[...])`: then `example_inputs` and the batch of each update are lists, with inputs and a
            batch for each of its functions.
        loss: `loss(model_fn(params, inputs), targets)` is what is minimised.
        learning_rate: a number, a function of the number of steps, or a `QuadraticModel` (default), which chooses the
            learning rate and the momentum of each step.
        example_inputs: a batch of inputs, or `jax.ShapeDtypeStruct`s of one, to find the layers with. `init` compares
            a batch with its examples one by one, and refuses a model that couples them, as batch normalisation in
            training mode does; it needs values for that: of `example_inputs` and of the parameters, so not inside of
            `jit`. With `full_params`, `kfac` does it itself.
        damping: a number, a function of the number of steps, or a rule that adapts it: `LevenbergMarquardt` or
            `SlopeDamping`. `"auto"` (default) is 1e-3 with a learning rate, `SlopeDamping()` with `QuadraticModel()`,
            and `LevenbergMarquardt()` with `QuadraticModel(momentum=False)`.
        momentum: a number below 1, or None for none. `"auto"` (default) is 0.9, or what `QuadraticModel()` chooses,
            with which nothing else may be given.
        nesterov: whether momentum is Nesterov's (default False), as in `optax.sgd`; for a `momentum` that is a number.
            On most of our tasks it needs a fourth to a half fewer steps.
        kl_clip: the bound on the quadratic model of the KL divergence; None for none. `"auto"` (default) is 1e-3, or
            None with a `QuadraticModel`, which bounds its steps itself.
        weight_decay: a number or a function of the number of steps; decoupled, as in `optax.adamw` (default 0).
        weight_decay_mask: which parameters decay: a pytree of booleans, perhaps one for a whole branch, or a function
            of the parameters that returns one; None (default) for all.
        **options: `KFACOptions`, shared with `scale_by_kfac`, say how curvature is followed: `decay`,
            `factor_interval`, `inverse_interval`, `staggered`, `damping_method`, `ekfac`, `factor_dtype`, `chunk_size`,
            `mesh`, `full_params`, `has_aux` and `examples`. `KroneckerOptions`, shared with `KFACLinearOperator`, say
            how Kronecker factors are made: `fisher_type`, `mc_samples`, `sharing`, `bias`, `tied`, `positions`,
            `on_uncovered`, `small`, `large`, `max_dense_size`, `block_size`, `max_small_size` and
            `vector_chunk_size`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with more methods, a `KFACTransformation`.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax, jax.numpy as jnp, optax, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
        >>> optimizer = kfac(model_fn, loss, 0.1, example_inputs=batch[0], damping=1e-2)
        >>> state = optimizer.init(params)
        >>> grads = jax.grad(lambda params: loss(model_fn(params, batch[0]), batch[1]))(params)
        >>> updates, state = optimizer.update(grads, state, params, batch=batch, key=jax.random.key(0))
        >>> params = optax.apply_updates(params, updates)

    References:
        - Sutskever et al. (2013), https://proceedings.mlr.press/v28/sutskever13.html
        - Martens & Grosse (2015), https://arxiv.org/abs/1503.05671
        - Grosse & Martens (2016), https://arxiv.org/abs/1602.01407
        - Ba et al. (2017), https://openreview.net/forum?id=SkkTMpjex
        - George et al. (2018), https://arxiv.org/abs/1806.03884
        - Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636
    """
    given: dict[str, Any] = {**DEFAULTS, **options}
    asked = Tuned(damping, momentum, kl_clip, given["factor_interval"], given["inverse_interval"])
    tuned = with_defaults(learning_rate, asked)
    given |= {name: getattr(tuned, name) for name in INTERVALS}
    numbers = tuned.damping, tuned.momentum, tuned.kl_clip
    rule = StepRule(learning_rate, *numbers, weight_decay, weight_decay_mask, nesterov)
    core = core_of(model_fn, loss, example_inputs, given)
    blank: Any = jax.eval_shape(lambda: first_statistics(rule.ratio))

    def init(params: PyTree[Array]) -> KFACState:
        curvature = core.start(params, _first(rule.first_damping))
        if jax.tree.leaves(params):
            rule.check_params(params)
        velocity = wide_zeros_like(params) if rule.has_momentum else None
        rejected, statistics = core.placed((jnp.zeros((), jnp.int32), first_statistics(rule.ratio)), params)
        return KFACState(curvature, velocity, rejected, statistics)

    def update(
        updates: PyTree[Array],
        state: KFACState,
        params: PyTree[Array] | None = None,
        *,
        batch: Any = None,
        key: Any = None,
        factors: Factors | None = None,
        full_params: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Array], KFACState]:
        del extra_args  # other transformations'
        if batch is None and rule.needs_batch:
            raise TypeError(
                "update needs batch=(inputs, targets), also with factors, for learning_rate=QuadraticModel(...), which"
                " is what kfac takes where none is given, and for a damping that adapts."
            )
        wanted: Any = KFACState(_wanted(core, params), params if rule.has_momentum else None, _COUNTER, blank)
        check_rule(state, rule.ratio)
        state = check_structure("state", state, wanted)
        last, grads = state.curvature, updates
        used = last.damping if rule.adapts_damping else rule.damping
        seen = _precondition_batch(
            core, grads, last, used, params, batch, key, factors, full_params, value=rule.needs_batch
        )
        made = rule.step(
            seen.problem, grads, seen.direction, state.velocity, params, last.count, seen.curvature.damping
        )
        fine = seen.usable & jnp.isfinite(made.square)
        moves = seal(fine & seen.counts)
        final = tree_where(moves, made.update, zeros_like(made.update))
        velocity = state.velocity
        if velocity is not None:
            velocity = jax.tree.map(lambda s, v: jnp.where(moves, s.astype(v.dtype), v), made.velocity, velocity)
        curvature, ratio = seen.curvature, state.statistics.reduction_ratio
        if rule.adapts_damping:
            assert seen.problem is not None
            adapted, ratio = rule.new_damping(seen.problem, grads, made, curvature.damping, last.count, moves, ratio)
            curvature = curvature._replace(damping=adapted)
        statistics = made.statistics(state.statistics, moves, ratio)
        rejected = state.rejected + (~fine).astype(jnp.int32)
        return final, KFACState(as_plain(curvature), velocity, rejected, statistics)

    def like(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        velocity = params if rule.has_momentum else None
        return updates, KFACState(_sharding_of(state), velocity, NOT_SHARDED, NOT_SHARDED)

    return KFACTransformation._make_of(core, init, on_mesh(update, like), rule)


def _sharding_of(state: Any) -> Any:
    """A state's curvature stays as it is sharded, if it is a state at all."""
    return getattr(state, "curvature", NOT_SHARDED)


_COUNTER: Any = jax.ShapeDtypeStruct((), jnp.int32)


def _first(damping: Number | Schedule) -> Array:
    return value_at("damping", damping, jnp.zeros((), jnp.int32))


def _wanted(core: Core, params: PyTree[Array] | None) -> Curvature:
    """The shapes of the curvature that the state must hold."""
    if params is None:
        raise ValueError("update needs params: pass the parameters that the gradient was taken at, as third argument.")
    return core.known(params).curvature


class _Preconditioned(NamedTuple):
    """What a step starts from."""

    problem: Problem | None
    curvature: Curvature
    direction: Direction
    """The preconditioned gradient."""
    counts: Bool[Array, ""]
    """Whether some target is not ignored."""
    usable: Bool[Array, ""]
    """Whether all blocks have an inverse, and the direction is finite."""


def _precondition_batch(
    core: Core,
    grads: PyTree[Array],
    curvature: Curvature,
    damping: Any,
    params: PyTree[Array],
    batch: Any,
    key: Any,
    factors: Factors | None,
    full_params: Any,
    *,
    value: bool,
) -> _Preconditioned:
    """Take a batch into the curvature, and precondition its gradient."""
    if batch is None and factors is None:
        raise TypeError(
            "update needs batch=(inputs, targets), the batch of the gradient (and key=... for what is drawn), or"
            " factors=..., as value_and_grad_and_factors returns them."
        )
    check_grads(grads, params)
    known, problem, mask = core.known(params), None, None
    if batch is not None:
        problem, mask = core.problem(params, batch, full_params, value=value)
    if factors is None:
        assert problem is not None
        factors = core.run_pass(problem, mask, key, curvature, gradient=False)[2]
    factors = check_structure("factors", factors, known.factors)
    current = value_at("damping", damping, curvature.count).astype(curvature.damping.dtype)
    settings = core.settings.fixed
    curvature = update_averages(curvature, factors, current, core.settings.decay, settings)
    direction = precondition(curvature, known.stacks, settings, grads)
    usable = inverses_available(curvature, known.stacks, settings) & direction.finite
    return _Preconditioned(problem, curvature, direction, factors.batches > 0, usable)
