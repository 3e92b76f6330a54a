"""KFAC as optax transformations."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import check_count
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.layout import Bias, OnUncovered, Options, Sharing, Small, Tied
from ggn_jax.kronecker.vectors import Positions
from ggn_jax.loss import Loss
from ggn_jax.optimizer.core import Core
from ggn_jax.optimizer.curvature import Curvature, DampingMethod, Factors, Settings, follow, precondition
from ggn_jax.optimizer.numbers import (
    Number,
    Schedule,
    all_finite,
    check_number,
    check_schedule,
    choose,
    combine,
    inner,
    value_at,
    wide_dtype,
)
from ggn_jax.optimizer.quadratic import quadratic_model, reduction_ratio
from ggn_jax.optimizer.summary import CurvatureReport, summarise

QUADRATIC = "quadratic"
MOST_DAMPING = 1e10  # that adaptation goes to


class ScaleByKFACState(NamedTuple):
    """The state of `scale_by_kfac`."""

    curvature: Curvature
    rejected: Array
    """How many updates were zero because the gradient or its product was NaN or infinite."""


class KFACState(NamedTuple):
    """The state of `kfac`."""

    curvature: Curvature
    velocity: PyTree[Array]
    """The last step without weight decay; None without momentum."""
    rejected: Array
    """How many updates were zero because the gradient or the step was NaN or infinite."""


class KFACTransformation(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that also has a report, and shares a pass with the gradient.

    Made by `kfac` and `scale_by_kfac`.

    >>> import jax, jax.numpy as jnp, ggn_jax
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
    >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x)
    >>> print(optimizer.report(params))
    parameter  shape  kind    curvature
    ---------  -----  ------  -----------------------------
    ['w']      2 x 3  linear  Kronecker (3 x 3) (x) (2 x 2)
    State: 26 entries, 4.3 per parameter.
    """

    core: Core
    full_params: Any
    needs_batch: bool
    """Whether updates look at the batch's loss, also where they are given its factors."""

    @classmethod
    def make(
        cls, core: Core, full_params: Any, init: Callable[..., Any], update: Callable[..., Any], needs_batch: bool
    ) -> Self:
        made = cls(init, update)
        made.core, made.full_params, made.needs_batch = core, full_params, needs_batch
        return made

    def report(self, params: PyTree[Array]) -> CurvatureReport:
        """Which curvature each parameter gets: a table to print, and rows. Arrays or `jax.ShapeDtypeStruct`s."""
        return summarise(*self.core.blank(params, self.full_params))

    def factors(
        self, params: PyTree[Array], batch: Any, state: Any, *, key: Any = None, full_params: Any = None
    ) -> Factors:
        """What a batch says of the curvature at this step: a pytree to pass to `update(..., factors=...)`.

        Factors of several batches or processes may be averaged, leaf by leaf. `state` is the optimizer's, however
        wrapped; `batch` and `key` as for `update`.
        """
        problem, mask = self.core.problem(params, batch, _full(full_params, self.full_params))
        return self.core.look(problem, mask, key, find_curvature(state), gradient=False)[2]

    def value_and_grad_and_factors(
        self, params: PyTree[Array], batch: Any, state: Any, *, key: Any = None, full_params: Any = None
    ) -> tuple[Float[Array, ""], PyTree[Array], Factors]:
        """The loss, its gradient, and the batch's factors, from one forward pass.

        Without it, the gradient and the factors each run the model. Use it inside of `jit`, with the update:

        >>> import jax, jax.numpy as jnp, optax, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
        >>> optimizer = ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=batch[0])
        >>> @jax.jit
        ... def step(params, state, batch, key):
        ...     value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
        ...     updates, state = optimizer.update(grads, state, params, factors=factors)
        ...     return optax.apply_updates(params, updates), state, value
        >>> params, state, value = step(params, optimizer.init(params), batch, jax.random.key(0))
        """
        problem, mask = self.core.problem(params, batch, _full(full_params, self.full_params))
        return self.core.look(problem, mask, key, find_curvature(state), gradient=True)  # type: ignore[return-value]


def scale_by_kfac(
    model_fn: Callable[[PyTree, PyTree], Array],
    loss: Loss,
    *,
    example_inputs: PyTree,
    damping: Number | Schedule = 1e-3,
    decay: Number = 0.95,
    factor_interval: int = 1,
    inverse_interval: int = 10,
    staggered: bool = False,
    damping_method: DampingMethod = "heuristic",
    ekfac: bool = False,
    fisher_type: FisherType | str = Options.fisher_type,
    mc_samples: int = Options.mc_samples,
    sharing: Sharing = Options.sharing,
    bias: Bias = Options.bias,
    tied: Tied = Options.tied,
    positions: Positions = Options.positions,
    on_uncovered: OnUncovered = Options.on_uncovered,
    small: Small = Options.small,
    max_dense_size: int = Options.max_dense_size,
    max_small_size: int = Options.max_small_size,
    vector_chunk_size: int = Options.vector_chunk_size,
    mesh: Mesh | None = None,
    full_params: PyTree | None = None,
) -> KFACTransformation:
    r"""Precondition gradients with a damped KFAC or EKFAC inverse, for `optax.chain`.

    `update(grads, state, params, batch=(inputs, targets), key=key)` returns `(F + damping I)^-1 grads`, where `F` is
    the running average of the batches' KFAC (Martens & Grosse 2015) or EKFAC (George et al. 2018) matrices. `kfac`
    has the arguments explained, adds momentum, learning rate and the like, and is what most users want.

    >>> import jax, jax.numpy as jnp, optax, ggn_jax
    >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
    >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
    >>> scale = scale_by_kfac(model_fn, loss, example_inputs=batch[0], damping=1e-2)
    >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), scale, optax.scale_by_learning_rate(0.1))
    >>> state = optimizer.init(params)
    >>> grads = jax.grad(lambda params: loss(model_fn(params, batch[0]), batch[1]))(params)
    >>> updates, state = optimizer.update(grads, state, params, batch=batch, key=jax.random.key(0))
    """
    options = Options(
        fisher_type,  # type: ignore[arg-type]  # made one there
        mc_samples,
        sharing,
        bias,
        tied,
        positions,
        on_uncovered,
        small,
        max_dense_size,
        max_small_size,
        vector_chunk_size,
    )
    settings = Settings(options, decay, factor_interval, inverse_interval, staggered, damping_method, ekfac, mesh)
    check_schedule("damping", damping)
    core = Core(model_fn, loss, example_inputs, settings)

    def init(params: PyTree[Array]) -> ScaleByKFACState:
        return ScaleByKFACState(_start(core, params, damping, full_params), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree[Array],
        state: ScaleByKFACState,
        params: PyTree[Array] | None = None,
        *,
        batch: Any = None,
        key: Any = None,
        factors: Factors | None = None,
        full_params: Any = full_params,
        **extra_args: Any,
    ) -> tuple[PyTree[Array], ScaleByKFACState]:
        del extra_args  # other transformations'
        _, curvature, scaled = _precondition(
            core, updates, state.curvature, params, batch, key, factors, full_params, damping
        )
        fine = all_finite((updates, scaled))
        scaled = choose(fine, scaled, jax.tree.map(jnp.zeros_like, scaled))
        return scaled, ScaleByKFACState(curvature, state.rejected + (~fine).astype(jnp.int32))

    return KFACTransformation.make(core, full_params, init, update, needs_batch=False)


def kfac(
    model_fn: Callable[[PyTree, PyTree], Array],
    loss: Loss,
    learning_rate: Number | Schedule | Literal["quadratic"],
    *,
    example_inputs: PyTree,
    damping: Number | Schedule = 1e-3,
    adapt_damping: int | None = None,
    min_damping: Number = 1e-5,
    momentum: Number | Literal["quadratic"] | None = 0.9,
    kl_clip: Number | None = None,
    weight_decay: Number | Schedule = 0.0,
    weight_decay_mask: Any = None,
    decay: Number = 0.95,
    factor_interval: int = 1,
    inverse_interval: int = 10,
    staggered: bool = False,
    damping_method: DampingMethod = "heuristic",
    ekfac: bool = False,
    fisher_type: FisherType | str = Options.fisher_type,
    mc_samples: int = Options.mc_samples,
    sharing: Sharing = Options.sharing,
    bias: Bias = Options.bias,
    tied: Tied = Options.tied,
    positions: Positions = Options.positions,
    on_uncovered: OnUncovered = Options.on_uncovered,
    small: Small = Options.small,
    max_dense_size: int = Options.max_dense_size,
    max_small_size: int = Options.max_small_size,
    vector_chunk_size: int = Options.vector_chunk_size,
    mesh: Mesh | None = None,
    full_params: PyTree | None = None,
) -> KFACTransformation:
    r"""KFAC (Martens & Grosse 2015), or EKFAC (George et al. 2018), as an optax transformation.

    With the gradient `g` and the running average `F` of the batches' KFAC matrices,

    ```
    d = (F + damping I)^-1 g        step = momentum * last step - learning_rate * c * d
    update = step - learning_rate * weight_decay * params
    ```

    where `c = min(1, sqrt(kl_clip / (learning_rate^2 d^T g)))` (Ba et al. 2017) with `kl_clip`, else 1. Convolutions
    and shared weights are as in Grosse & Martens (2016) and Eschenhagen et al. (2023).

    `update(grads, state, params, batch=(inputs, targets), key=key)` needs the batch of the gradient, perhaps with a
    padding `mask` as third member, and a new key at each step for what is drawn. The state is one pytree of arrays:
    `jit` it, donate it, checkpoint it. Nothing is registered in the model or the loss; `optimizer.report(params)` shows
    which curvature each parameter gets. `optimizer.value_and_grad_and_factors` saves a forward pass.

    **What to tune first:** `learning_rate` (with momentum 0.9: 0.01 to 1) and `damping` (1e-4 to 1) together; then
    `inverse_interval` (larger is faster, and staler). `kl_clip` (1e-4 to 1e-2) makes large learning rates safe.

    **Arguments:**

    - `model_fn`, `loss`: `loss(model_fn(params, inputs), targets)` is what is minimised; `model_fn` treats examples
      independently.
    - `learning_rate`: a number, a function of the number of steps, or `"quadratic"`: the minimum, along `d`, of the
      quadratic model of the batch's loss with the exact GGN and the damping (Martens & Grosse 2015, section 6.4).
    - `example_inputs`: a batch of inputs, or `jax.ShapeDtypeStruct`s of one, to find the layers with.
    - `damping`: a number or a function of the number of steps.
    - `adapt_damping`: every so many steps, compare the change of the batch's loss with the quadratic model's, and
      multiply the damping by `(19/20)^adapt_damping` where the ratio is above 3/4, or divide it where it is below 1/4
      (Levenberg-Marquardt; Martens & Grosse 2015, section 6.5); `damping` is then the first one, a number. Let
      `inverse_interval` divide it, so that inverses know the new damping.
    - `min_damping`: what the adaptation does not go below: as the loss goes to 0, rounding and the draws need some.
    - `momentum`: a number, None for none, or `"quadratic"`, with that learning rate: both from the quadratic model
      (section 7).
    - `kl_clip`: the bound on the quadratic model of the KL divergence; None for none.
    - `weight_decay`, `weight_decay_mask`: decoupled, as in `optax.adamw`; the mask is a pytree of booleans, or a
      function of the parameters.
    - `decay`: of the averages of the factors, which are bias-corrected.
    - `factor_interval`, `inverse_interval`: how many steps pass between new factors, and between new inverses.
      `staggered` renews a share of the inverses at each step, so that no step takes longer than others.
    - `damping_method`: `"heuristic"` adds `pi sqrt(damping)` and `sqrt(damping) / pi` to the factors, and needs
      Cholesky factorisations; `"exact"` adds the damping to the Kronecker product's eigenvalues, and needs
      eigendecompositions, about ten times the time.
    - `ekfac`: follow the GGN's diagonal in KFAC's eigenbases between new bases (its first step is KFAC's); damping is
      exact.
    - `fisher_type`, `mc_samples`, `sharing`, `bias`, `tied`, `positions`, `on_uncovered`, `small`, `max_dense_size`,
      `max_small_size`, `vector_chunk_size`: as in `KFACLinearOperator`.
    - `mesh`: each of its devices factorises a share of the matrices, and all gather the results.
    - `full_params`: under `optax.masked` or `multi_transform`, all parameters (or their shapes); pass their values to
      each update as well.

    **NaN and infinities:** a batch whose factors are not finite is left out of the averages and counted in
    `state.curvature.skipped`; where the gradient or the step is not finite, the update is 0, momentum stays, and
    `state.rejected` counts it. An inverse that fails leaves the last one. A batch in which every target is ignored
    changes no average.

    **Raises:** ValueError, TypeError or NotImplementedError for arguments that do not fit, naming them.

    >>> import jax, jax.numpy as jnp, optax, ggn_jax
    >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
    >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
    >>> optimizer = kfac(model_fn, loss, 0.1, example_inputs=batch[0], damping=1e-2)
    >>> state = optimizer.init(params)
    >>> grads = jax.grad(lambda params: loss(model_fn(params, batch[0]), batch[1]))(params)
    >>> updates, state = optimizer.update(grads, state, params, batch=batch, key=jax.random.key(0))
    >>> params = optax.apply_updates(params, updates)
    """
    _check_choices(learning_rate, momentum, damping, adapt_damping, kl_clip, weight_decay)
    check_number("min_damping", min_damping, 0)
    scale = scale_by_kfac(
        model_fn,
        loss,
        example_inputs=example_inputs,
        damping=damping,
        decay=decay,
        factor_interval=factor_interval,
        inverse_interval=inverse_interval,
        staggered=staggered,
        damping_method=damping_method,
        ekfac=ekfac,
        fisher_type=fisher_type,
        mc_samples=mc_samples,
        sharing=sharing,
        bias=bias,
        tied=tied,
        positions=positions,
        on_uncovered=on_uncovered,
        small=small,
        max_dense_size=max_dense_size,
        max_small_size=max_small_size,
        vector_chunk_size=vector_chunk_size,
        mesh=mesh,
        full_params=full_params,
    )
    core, quadratic = scale.core, isinstance(learning_rate, str)

    def init(params: PyTree[Array]) -> KFACState:
        velocity = None if momentum is None else jax.tree.map(jnp.zeros_like, params)
        curvature = _start(core, params, damping, full_params)
        return KFACState(curvature, velocity, jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree[Array],
        state: KFACState,
        params: PyTree[Array] | None = None,
        *,
        batch: Any = None,
        key: Any = None,
        factors: Factors | None = None,
        full_params: Any = full_params,
        **extra_args: Any,
    ) -> tuple[PyTree[Array], KFACState]:
        del extra_args  # other transformations'
        if batch is None and (quadratic or adapt_damping is not None):
            raise TypeError(
                "update needs batch=(inputs, targets), also with factors, for learning_rate='quadratic' and"
                " adapt_damping."
            )
        last, grads = state.curvature, updates
        used = last.damping if adapt_damping is not None else damping
        problem, curvature, direction = _precondition(core, grads, last, params, batch, key, factors, full_params, used)
        wide, count = wide_dtype(grads), last.count
        velocity = state.velocity
        # The step is -a direction + m velocity.
        if quadratic:
            assert problem is not None
            free = [direction] if momentum != QUADRATIC else [direction, velocity]
            model = quadratic_model(problem, grads, free, curvature.damping)
            found = model.minimum()
            a, m = -found[0], found[1] if len(free) > 1 else momentum
        else:
            a, m = value_at(learning_rate, count), momentum
        rate = jnp.asarray(a).astype(wide)
        if kl_clip is not None:
            size = rate**2 * inner(direction, grads).astype(wide)
            bound = jnp.asarray(kl_clip).astype(wide)
            rate = rate * jnp.where(size > bound, jnp.sqrt(bound / jnp.where(size > bound, size, 1)), 1)
        terms = [(-rate, direction)]
        if velocity is not None:
            terms.append((jnp.asarray(m).astype(wide), velocity))
        step = combine(*terms, like=grads)
        final = step
        if not (isinstance(weight_decay, float | int) and weight_decay == 0):
            shrink = jnp.asarray(a).astype(wide) * value_at(weight_decay, count).astype(wide)
            final = combine((jnp.ones((), wide), step), (-shrink, _kept(params, weight_decay_mask)), like=grads)
        fine = all_finite((grads, final))
        final = choose(fine, final, jax.tree.map(jnp.zeros_like, final))
        if adapt_damping is not None:
            assert problem is not None
            due = fine & ((count + 1) % adapt_damping == 0)
            adapted = jax.lax.cond(
                due,
                partial(_adapted, adapt_damping, min_damping),
                lambda *args: args[-1],
                problem,
                grads,
                final,
                curvature.damping,
            )
            curvature = curvature._replace(damping=adapted)
        if velocity is not None:
            velocity = jax.tree.map(lambda s, v: jnp.where(fine, s.astype(v.dtype), v), step, velocity)
        return final, KFACState(curvature, velocity, state.rejected + (~fine).astype(jnp.int32))

    return KFACTransformation.make(core, full_params, init, update, needs_batch=quadratic or adapt_damping is not None)


def find_curvature(state: Any) -> Curvature:
    """The one `Curvature` in an optimizer's state, however it is wrapped."""
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_curvature) if _is_curvature(x)]
    if len(found) != 1:
        raise ValueError(
            f"state must be that of an optimizer with one kfac or scale_by_kfac; got {len(found)} of them."
        )
    return found[0]


def _is_curvature(node: Any) -> bool:
    return isinstance(node, Curvature)


def _start(core: Core, params: PyTree[Array], damping: Any, full_params: Any) -> Curvature:
    first = value_at(damping, jnp.zeros((), jnp.int32))
    if not jax.tree.leaves(params):
        # `optax.tree.map_params` asks for the state of a stand-in to learn where parameters are: nowhere in here.
        zero = jnp.zeros((), jnp.int32)
        return Curvature(zero, zero, jnp.zeros((), jnp.float32), first, zero, zero)
    return core.start(params, first, full_params)


def _precondition(
    core: Core,
    grads: PyTree[Array],
    curvature: Curvature,
    params: Any,
    batch: Any,
    key: Any,
    factors: Any,
    full_params: Any,
    damping: Any,
) -> tuple[Any, Curvature, PyTree[Array]]:
    """The problem, if there is a batch, the state after it, and the preconditioned gradient."""
    if params is None:
        raise ValueError("update needs params: pass the parameters that the gradient was taken at, as third argument.")
    if batch is None and factors is None:
        raise TypeError(
            "update needs batch=(inputs, targets), the batch of the gradient (and key=... for what is drawn), or"
            " factors=..., as value_and_grad_and_factors returns them."
        )
    if factors is not None and not isinstance(factors, Factors):
        raise TypeError(f"factors must be what value_and_grad_and_factors returns; got {type(factors).__name__}.")
    _check_like(grads, params)
    problem = mask = None
    if batch is not None:
        problem, mask = core.problem(params, batch, full_params)
    if factors is None:
        assert problem is not None
        factors = core.look(problem, mask, key, curvature, gradient=False)[2]
    current = value_at(damping, curvature.count).astype(curvature.damping.dtype)
    curvature = follow(curvature, factors, current, core.settings)
    return problem, curvature, precondition(curvature, core.places(params, full_params), core.settings, grads)


def _adapted(interval: int, least: Any, problem: Any, grads: Any, step: Any, damping: Array) -> Array:
    """Levenberg and Marquardt's rule."""
    model = quadratic_model(problem, grads, [step], damping)
    ratio = reduction_ratio(problem, model, jnp.ones(1, model.b.dtype), step)
    factor = jnp.asarray((19 / 20) ** interval, damping.dtype)
    changed = jnp.where(ratio > 3 / 4, damping * factor, jnp.where(ratio < 1 / 4, damping / factor, damping))
    return jnp.clip(changed, least, MOST_DAMPING)


def _kept(params: PyTree[Array], mask: Any) -> PyTree[Array]:
    """The parameters that decay, and 0 for the others."""
    if mask is None:
        return params
    mask = mask(params) if callable(mask) else mask
    return jax.tree.map(lambda m, p: p if m else jnp.zeros_like(p), mask, params)


def _check_like(grads: PyTree[Array], params: PyTree[Array]) -> None:
    wanted, got = jax.tree_util.tree_leaves_with_path(params), jax.tree_util.tree_leaves_with_path(grads)
    if jax.tree.structure(params) != jax.tree.structure(grads):  # type: ignore[operator]  # untyped in jaxlib
        raise ValueError(
            f"grads must be a pytree like params: wanted {jax.tree.structure(params)}, got {jax.tree.structure(grads)}."
        )
    for (path, p), (_, g) in zip(wanted, got, strict=True):
        if jnp.shape(p) != jnp.shape(g):
            raise ValueError(
                f"grads{jax.tree_util.keystr(path)} must have the parameter's shape {jnp.shape(p)}; got {jnp.shape(g)}."
            )


def _full(given: Any, default: Any) -> Any:
    return default if given is None else given


def _check_choices(
    learning_rate: Any, momentum: Any, damping: Any, adapt_damping: Any, kl_clip: Any, weight_decay: Any
) -> None:
    for name, value in (("learning_rate", learning_rate), ("momentum", momentum)):
        if isinstance(value, str) and value != QUADRATIC:
            raise ValueError(f"{name} must be a number or 'quadratic'; got {value!r}.")
    if not isinstance(learning_rate, str):
        check_schedule("learning_rate", learning_rate)
    if isinstance(momentum, str) and not isinstance(learning_rate, str):
        raise ValueError("momentum='quadratic' comes with learning_rate='quadratic': both minimise one model.")
    if momentum is not None and not isinstance(momentum, str):
        check_number("momentum", momentum, 0, 1)
    if kl_clip is not None:
        check_number("kl_clip", kl_clip, 0)
    check_schedule("weight_decay", weight_decay)
    if adapt_damping is not None:
        check_count("adapt_damping", adapt_damping)
        if callable(damping):
            raise ValueError("damping must be a number with adapt_damping, the one to start from; got a schedule.")
