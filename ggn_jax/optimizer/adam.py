"""Adam in KFAC's eigenbases, as an optax transformation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax._eager import compiled
from ggn_jax._fusion import seal
from ggn_jax._keywords import takes
from ggn_jax._sharding import NOT_SHARDED, on_mesh, vary_alike
from ggn_jax.kronecker.stacks import params_structure, read_entries, write_entries
from ggn_jax.loss import Loss
from ggn_jax.objective import Objective
from ggn_jax.optimizer.checks import (
    BELOW_1,
    check_decay_mask,
    check_grads,
    check_number,
    check_schedule,
    check_structure,
    is_function,
    spread_mask,
    zero_where_not,
)
from ggn_jax.optimizer.curvature import Factors, inverses_available, renewed, update_averages
from ggn_jax.optimizer.inverse_updates import diagonal_in
from ggn_jax.optimizer.methods import KFACTransformation
from ggn_jax.optimizer.numbers import Number, Schedule, all_finite, cast, combine, tree_where, value_at, zeros_like
from ggn_jax.optimizer.objectives import core_of
from ggn_jax.optimizer.settings import DEFAULTS, KFACOptions
from ggn_jax.optimizer.states import KFACAdamState
from ggn_jax.optimizer.storage import as_plain

FIXED = {"ekfac": False, "damping_method": "exact", "staggered": False}
OPTIONS = {name: x for name, x in DEFAULTS.items() if name not in FIXED} | {
    "factor_interval": 5,
    "inverse_interval": 20,
}


class Moments(NamedTuple):
    """Running averages of the gradient and of its squares in the eigenbases, for each stack of blocks."""

    first: tuple[Float[Array, "G out in"], ...]
    second: tuple[Float[Array, "G out in"], ...]


@takes(OPTIONS)
def kfac_adam(
    model_fn: Callable[[PyTree, PyTree], Array] | Objective,
    loss: Loss | None = None,
    learning_rate: Number | Schedule = 3e-3,
    *,
    example_inputs: PyTree,
    b1: Number = 0.95,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    weight_decay: Number | Schedule = 0.0,
    weight_decay_mask: Any = None,
    **options: Unpack[KFACOptions],
) -> KFACTransformation:
    r"""Adam in the eigenbases of KFAC's factors, as an optax transformation.

    With a layer's gradient `G [out, in]`, its bias as last column, and the eigenvectors `Q_A`, `Q_B` of the running
    averages of its factors `A` and `B`, as `kfac` has them, step `t` is

    ```
    R = Q_B^T G Q_A      M = b1 M + (1 - b1) R      V = b2 V + (1 - b2) R^2
    step = Q_B (M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)) Q_A^T
    update = -learning_rate * (step + weight_decay * params)
    ```

    with entrywise squares, roots and quotients. It is to KFAC what SOAP (Vyas et al. 2024) is to Shampoo. Beside EKFAC
    (George et al. 2018), it has the squares of a batch's gradient in place of those of examples' gradients, their
    root, and momentum before it. An update is about as large as the learning rate, whatever the curvature's scale:
    there is no damping to choose. Exact blocks are rotated into their own eigenbases; what has a diagonal, and a factor
    that is diagonal, is not rotated. Of a sum of Kronecker terms, the nearest single one counts.

    Every `inverse_interval` steps, and after 1, 2, 4, 8, ... below the first, bases are computed anew; `M` becomes what
    it is in these, `R_B M R_A^T` with `R = Q_new^T Q_old`, and `V` the diagonal there of the matrix that has it as
    eigenvalues in the old ones, `R_B^2 V (R_A^2)^T`.

    `update(grads, state, params, batch=(inputs, targets), key=key)` is that of `kfac`, with or without
    `factors=...`, which `value_and_grad_and_factors` returns; `report`, `statistics` and `factors` are, too. There is
    no `diagnose`, which is about damping.

    As with `kfac`, a batch whose factors are not finite is left out of the averages; where the gradient or the step is
    not finite, or a block has no basis yet, the update is 0, no moment takes the gradient, and `state.rejected` counts
    it. A batch in which every target is ignored does not count as a step.

    Args:
        model_fn: a function `model_fn(params, inputs)` that treats examples independently, unless
            `examples="coupled"`; or an `Objective` in place of it and `loss`, with lists of inputs and batches.
        loss: `loss(model_fn(params, inputs), targets)` is what is minimised.
        learning_rate: a number, or a function of the number of steps (default 3e-3); 3e-3 to 1e-2, as for SOAP, are
            worth a try.
        example_inputs: a batch of inputs, or `jax.ShapeDtypeStruct`s of one, to find the layers with.
        b1: the decay of `M`, at least 0 and below 1 (default 0.95).
        b2: the decay of `V`, at least 0 and below 1 (default 0.95).
        eps: what is added to the root, at least 0 (default 1e-8).
        weight_decay: a number or a function of the number of steps; decoupled, as in `optax.adamw` (default 0).
        weight_decay_mask: which parameters decay: a pytree of booleans, perhaps one for a whole branch, or a function
            of the parameters that returns one; None (default) for all.
        **options: `KFACOptions`, shared with `kfac`, say how curvature is followed: `decay`, `factor_interval` (5
            here), `inverse_interval` (that of the bases, 20 here), `factor_dtype`, `chunk_size`, `mesh` (each device
            holds the bases and moments of its share of the blocks), `full_params`, `has_aux` and `examples`; but
            `damping_method`, `ekfac` and `staggered`, which are about inverses, are refused. `KroneckerOptions`, shared
            with `KFACLinearOperator`, say how Kronecker factors are made: `fisher_type`, `mc_samples`, `sharing`,
            `bias`, `tied`, `positions`, `on_uncovered`, `small`, `large`, `max_dense_size`, `block_size`,
            `max_small_size` and `vector_chunk_size`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with more methods, a `KFACTransformation`; its state is a
        `KFACAdamState`.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax, jax.numpy as jnp, optax, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
        >>> optimizer = kfac_adam(model_fn, loss, 0.01, example_inputs=batch[0])
        >>> @jax.jit
        ... def step(params, state, batch, key):
        ...     value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
        ...     updates, state = optimizer.update(grads, state, params, factors=factors)
        ...     return optax.apply_updates(params, updates), state, value
        >>> params, state, value = step(params, optimizer.init(params), batch, jax.random.key(0))

    References:
        - Vyas et al. (2024), https://arxiv.org/abs/2409.11321
        - George et al. (2018), https://arxiv.org/abs/1806.03884
    """
    check_schedule("learning_rate", learning_rate)
    check_number("b1", b1, BELOW_1)
    check_number("b2", b2, BELOW_1)
    check_number("eps", eps)
    check_schedule("weight_decay", weight_decay)
    if not is_function(weight_decay_mask):
        check_decay_mask(weight_decay_mask)
    core = core_of(model_fn, loss, example_inputs, {**OPTIONS, **options, **FIXED})
    settings = core.settings.fixed
    spread = settings.spread

    def init(params: PyTree[Array]) -> KFACAdamState:
        curvature = core.start(params, jnp.zeros((), jnp.float32))
        moments = Moments((), ())
        if jax.tree.leaves(params):
            if weight_decay_mask is not None:
                spread_mask(weight_decay_mask, params)
            moments = core.placed(zeros_like(_moment_shapes(params)), params, spread.spec)
        steps, rejected = core.placed((jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), params)
        return KFACAdamState(curvature, steps, moments.first, moments.second, rejected)

    def _moment_shapes(params: PyTree[Array]) -> Moments:
        known = core.known(params)
        parts = jax.eval_shape(lambda params: spread.pad(read_entries(known.stacks, params)), params)
        blocks = known.curvature.inverses
        like: Any = tuple(
            jax.ShapeDtypeStruct(x.shape, jax.tree.leaves(block)[0].dtype)
            for x, block in zip(parts, blocks, strict=True)
        )
        return Moments(like, like)

    def update(
        updates: PyTree[Array],
        state: KFACAdamState,
        params: PyTree[Array] | None = None,
        *,
        batch: Any = None,
        key: Any = None,
        factors: Factors | None = None,
        full_params: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Array], KFACAdamState]:
        del extra_args  # other transformations'
        if params is None:
            raise ValueError(
                "update needs params: pass the parameters that the gradient was taken at, as third argument."
            )
        if batch is None and factors is None:
            raise TypeError(
                "update needs batch=(inputs, targets), the batch of the gradient (and key=... for what is drawn), or"
                " factors=..., as value_and_grad_and_factors returns them."
            )
        check_grads(updates, params)
        known = core.known(params)
        number: Any = jax.ShapeDtypeStruct((), jnp.int32)
        shapes = KFACAdamState(known.curvature, number, *_moment_shapes(params), number)
        state = check_structure("state", state, shapes)
        if factors is None:
            problem, mask = core.problem(params, batch, full_params, value=False)
            factors = core.run_pass(problem, mask, key, state.curvature, gradient=False)[2]
        factors = check_structure("factors", factors, known.factors)
        before = state.curvature
        curvature = update_averages(before, factors, before.damping, core.settings.decay, settings)
        due = renewed(before, curvature, factors, settings)
        parts = spread.constrain(spread.pad(read_entries(known.stacks, updates)))
        bases, moments = (before.inverses, curvature.inverses), Moments(state.first, state.second)
        moments = _in_new_bases(due, bases, moments)
        steps, new = _advance(curvature.inverses, moments, parts, state.steps + 1, (b1, b2, eps))
        steps = [x[: stack.shape[0]] for stack, x in zip(known.stacks, steps, strict=True)]
        rate, shrink = (
            value_at(name, value, before.count)
            for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay))
        )
        made = cast(combine((-rate, write_entries(known.stacks, params_structure(updates), steps))), updates)
        if not isinstance(weight_decay, float | int) or weight_decay != 0:
            decaying = (
                params if weight_decay_mask is None else zero_where_not(params, spread_mask(weight_decay_mask, params))
            )
            made = cast(combine((jnp.ones(()), made), (-rate * shrink, decaying)), updates)
        fine = inverses_available(curvature, known.stacks, settings) & all_finite((updates, made, new))
        moves = seal(fine & (factors.batches > 0))
        moments = tree_where(moves, new, moments)  # in the new bases in any case
        state = KFACAdamState(
            as_plain(curvature),
            state.steps + moves.astype(jnp.int32),
            spread.constrain(moments.first),
            spread.constrain(moments.second),
            state.rejected + (~fine).astype(jnp.int32),
        )
        return tree_where(moves, made, zeros_like(made)), state

    def like(updates: Any, state: Any, *_: Any, **__: Any) -> Any:
        kept = (getattr(state, name, NOT_SHARDED) for name in ("curvature", "first", "second"))
        curvature, first, second = kept
        return updates, KFACAdamState(curvature, NOT_SHARDED, first, second, NOT_SHARDED)

    return KFACTransformation.make(core, init, on_mesh(update, like), None)


@compiled
def _in_new_bases(due: Bool[Array, ""], bases: tuple[Sequence[Any], Sequence[Any]], moments: Moments) -> Moments:
    """The moments in the bases after, from those in the bases before."""
    old, new = bases

    def carry(moments: Moments) -> Moments:
        first = [b.rotate(a.rotate_back(m)) for a, b, m in zip(old, new, moments.first, strict=True)]
        second = [diagonal_in(a, b, v) for a, b, v in zip(old, new, moments.second, strict=True)]
        return Moments(tuple(first), tuple(second))

    due, moments = vary_alike(due, moments)
    carried: Moments = jax.lax.cond(due, carry, lambda moments: moments, moments)
    return carried


@compiled
def _advance(
    bases: Sequence[Any],
    moments: Moments,
    parts: Sequence[Float[Array, "G ..."]],
    steps: Int[Array, ""],
    numbers: tuple[Any, Any, Any],
) -> tuple[list[Float[Array, "G ..."]], Moments]:
    """The direction of a step, and the new moments, from a gradient's entries."""
    made: list[Array] = []
    first, second = [], []
    for basis, part, m, v in zip(bases, parts, *moments, strict=True):
        b1, b2, eps = (jnp.asarray(x).astype(m.dtype) for x in numbers)
        count = steps.astype(m.dtype)
        rotated = basis.rotate(part.astype(m.dtype))
        m, v = b1 * m + (1 - b1) * rotated, b2 * v + (1 - b2) * rotated**2
        first.append(m)
        second.append(v)
        made.append(basis.rotate_back(m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)))
    return made, Moments(tuple(first), tuple(second))
