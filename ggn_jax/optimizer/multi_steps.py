"""One step of KFAC from several micro-batches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import check_count
from ggn_jax._repr import fields
from ggn_jax._sharding import NOT_SHARDED, on_mesh, vary_alike, vary_like
from ggn_jax.optimizer.checks import check_structure, check_type
from ggn_jax.optimizer.curvature import Factors
from ggn_jax.optimizer.methods import KFACTransformation, pickled_as_called
from ggn_jax.optimizer.numbers import all_finite, tree_where, wide_zeros_like, zeros_like
from ggn_jax.optimizer.storage import as_plain


class MultiStepsState(NamedTuple):
    """The state of `multi_steps`: a pytree of arrays.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x)
        >>> int(ggn_jax.multi_steps(optimizer, every=4).init(params).micro_step)
        0
    """

    micro_step: Array
    """The number of micro-batches of this step so far."""
    bad: Array
    """The number of these that were left out, because their gradient or their factors were NaN or infinite."""
    skipped: Array
    """The number of micro-batches of all steps that were left out."""
    inner: Any
    """The state of the optimizer that takes the steps."""
    gradient: PyTree[Array]
    """The mean of the gradients of this step so far, in at least float32."""
    factors: Factors
    """The sum of the factors of this step so far."""

    def __repr__(self) -> str:
        return fields(self, **self._asdict())


@pickled_as_called
def multi_steps(optimizer: KFACTransformation, every: int) -> KFACTransformation:
    """Take a step every so many micro-batches, from the means of their gradients and of their factors.

    `optax.MultiSteps` would use the factors of the last micro-batch only, and invert for each of them. Micro-batches
    have equal weights; with equal sizes and a mean over all examples, a step is that of the whole batch. Updates are 0
    in between.

    A micro-batch whose gradient or factors are NaN or infinite is left out of both means, and `state.skipped` counts
    it; a step that has no other is rejected, as `kfac` rejects a gradient that is not finite. One in which every target
    is ignored is left out as well.

    Args:
        optimizer: an optimizer made by `kfac` or `scale_by_kfac`.
        every: how many micro-batches make a step, an integer of at least 1.

    Returns:
        A `KFACTransformation` whose `update` takes one micro-batch.

    Raises:
        TypeError, ValueError: for another optimizer, or an `every` that is not such an integer.
        NotImplementedError: for `learning_rate=QuadraticModel(...)` and dampings that adapt, which need the loss of all
            micro-batches.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
        >>> optimizer = multi_steps(ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=batch[0]), every=4)
        >>> state = optimizer.init(params)
        >>> grads = jax.grad(lambda params: loss(model_fn(params, batch[0]), batch[1]))(params)
        >>> updates, state = optimizer.update(grads, state, params, batch=batch, key=jax.random.key(0))
        >>> float(abs(updates["w"]).max())
        0.0
    """
    if not isinstance(optimizer, KFACTransformation):
        raise TypeError(f"optimizer must be made by kfac or scale_by_kfac; got {type(optimizer).__name__}.")
    if optimizer.needs_batch:
        raise NotImplementedError(
            "multi_steps keeps no micro-batches, but learning_rate=QuadraticModel(...), which is what kfac takes where"
            " none is given, and dampings that adapt look at the loss of all of them: pass a number or a schedule as"
            " learning_rate and as damping."
        )
    every = check_count("every", every)

    def init(params: PyTree[Array]) -> MultiStepsState:
        inner: Any = optimizer.init(params)
        micro_step, bad, skipped = (optimizer._core.placed(jnp.zeros((), jnp.int32), params) for _ in range(3))
        # For the stand-in without arrays that `Core.start` handles, one array stands for all factors.
        factors: Any = zeros_like(optimizer._core.known(params).factors) if jax.tree.leaves(params) else jnp.zeros(())
        factors = optimizer._core.placed(as_plain(factors), params)
        return MultiStepsState(micro_step, bad, skipped, inner, wide_zeros_like(params), factors)

    def update(
        updates: PyTree[Array], state: MultiStepsState, params: PyTree[Array] | None = None, **extra_args: Any
    ) -> tuple[PyTree[Array], MultiStepsState]:
        if params is None:
            raise ValueError("update needs params: pass the parameters that the gradient was taken at.")
        check_type("state", state, MultiStepsState)
        wanted = optimizer._core.known(params).factors
        mean, total = (
            check_structure("state.gradient", state.gradient, params),
            check_structure("state.factors", state.factors, wanted),
        )
        batch, seen, key = (extra_args.pop(name, None) for name in ("batch", "factors", "key"))
        if seen is None:
            if batch is None:
                raise TypeError("update needs batch=(inputs, targets) or factors=..., as those of kfac do.")
            seen = optimizer.factors(params, batch, state.inner, key=key, full_params=extra_args.get("full_params"))
        seen = check_structure("factors", seen, wanted)

        good = all_finite((updates, seen))
        bad = (~good).astype(jnp.int32)
        total = jax.tree.map(lambda t, x: t + jnp.where(good, x, 0), total, seen)
        n, counts = jnp.maximum(total.batches, 1), good & (seen.batches > 0)
        mean = jax.tree.map(
            lambda m, g: jnp.where(counts, m + (g.astype(m.dtype) - m) / n.astype(m.dtype), m), mean, updates
        )
        # Without any finite micro-batch the gradient is NaN, so that the optimizer rejects the step and counts it.
        lost = (total.batches == 0) & (state.bad + bad > 0)

        mean, total, previous, updates, params = vary_alike(mean, total, state.inner, updates, params)

        def act(mean: PyTree[Array], total: Factors, inner: Any) -> Any:
            grads = jax.tree.map(lambda m, g: jnp.where(lost, jnp.nan, m).astype(g.dtype), mean, updates)
            return vary_like(optimizer.update(grads, inner, params, factors=total, **extra_args), updates)

        def wait(mean: PyTree[Array], total: Factors, inner: Any) -> Any:
            return vary_like(zeros_like(updates), updates), inner

        done = state.micro_step + 1 >= every
        final, inner = jax.lax.cond(done, act, wait, mean, total, previous)

        def rest(x: PyTree[Array]) -> PyTree[Array]:
            return tree_where(done, zeros_like(x), x)

        step, left_out = rest(state.micro_step + 1), rest(state.bad + bad)
        return final, MultiStepsState(step, left_out, state.skipped + bad, inner, rest(mean), as_plain(rest(total)))

    def like(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        return updates, MultiStepsState(*(NOT_SHARDED,) * 3, state.inner, params, NOT_SHARDED)

    return KFACTransformation._make_of(optimizer._core, init, on_mesh(update, like), optimizer._rule)
