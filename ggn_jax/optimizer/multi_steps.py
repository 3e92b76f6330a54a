"""One step of KFAC from several micro-batches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ggn_jax._checks import check_count
from ggn_jax.optimizer.curvature import Factors
from ggn_jax.optimizer.numbers import all_finite, choose
from ggn_jax.optimizer.transformation import KFACTransformation, find_curvature


class MultiStepsState(NamedTuple):
    """The state of `multi_steps`."""

    micro_step: Array
    inner: Any
    gradient: PyTree[Array]
    """The mean of the gradients of this step so far."""
    factors: Any
    """The sum of the factors of this step so far; their weight counts micro-batches."""


def multi_steps(optimizer: KFACTransformation, every: int) -> optax.GradientTransformationExtraArgs:
    """Take a step every so many micro-batches, from the means of their gradients and of their factors.

    As `optax.MultiSteps`, which would see the factors of the last micro-batch only, and would invert for each of them:
    it keeps nothing of the others. Micro-batches count alike; with equal sizes and a mean over all data, a step is that
    of the whole batch. Updates are 0 in between.

    **Arguments:** `optimizer`: made by `kfac` or `scale_by_kfac`; `every`: how many micro-batches make a step.

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
            "multi_steps keeps no micro-batches, but learning_rate='quadratic' and adapt_damping look at the loss of"
            " all of them: use a number or a schedule as learning_rate, and leave adapt_damping out."
        )
    every = check_count("every", every)

    def init(params: PyTree[Array]) -> MultiStepsState:
        inner = optimizer.init(params)
        curvature = find_curvature(inner)
        corrections: tuple[Array, ...] = ()
        if jax.tree.leaves(params) and optimizer.core.settings.ekfac:
            spectra = [block for block in curvature.inverses if hasattr(block, "qa")]
            corrections = tuple(jnp.zeros_like(block.values) for block in spectra)
        blocks = jax.tree.map(jnp.zeros_like, curvature.blocks)
        factors: Any = Factors(jnp.zeros((), jnp.float32), blocks, corrections)
        gradient = jax.tree.map(jnp.zeros_like, params)
        return MultiStepsState(jnp.zeros((), jnp.int32), inner, gradient, factors)

    def update(
        updates: PyTree[Array], state: MultiStepsState, params: PyTree[Array] | None = None, **extra_args: Any
    ) -> tuple[PyTree[Array], MultiStepsState]:
        if params is None:
            raise ValueError("update needs params: pass the parameters that the gradient was taken at.")
        seen = extra_args.pop("factors", None)
        if seen is None:
            if extra_args.get("batch") is None:
                raise TypeError("update needs batch=(inputs, targets) or factors=..., as those of kfac do.")
            known = {name: extra_args[name] for name in ("key", "full_params") if name in extra_args}
            seen = optimizer.factors(params, extra_args["batch"], state.inner, **known)
        good = (seen.weight > 0) & all_finite(seen)
        total = jax.tree.map(lambda t, x: t + jnp.where(good, x, jnp.zeros_like(x)), state.factors, seen)
        n = state.micro_step + 1
        gradient = jax.tree.map(lambda m, g: m + (g.astype(m.dtype) - m) / n.astype(m.dtype), state.gradient, updates)

        def act(gradient: PyTree[Array], total: Factors, inner: Any) -> Any:
            some = jnp.maximum(total.weight, 1)
            mean = jax.tree.map(lambda x: x / some.astype(x.dtype), total)
            grads = jax.tree.map(lambda m, g: m.astype(g.dtype), gradient, updates)
            return optimizer.update(grads, inner, params, factors=mean, **extra_args)

        def wait(gradient: PyTree[Array], total: Factors, inner: Any) -> Any:
            return jax.tree.map(jnp.zeros_like, updates), inner

        emit = n == every
        final, inner = jax.lax.cond(emit, act, wait, gradient, total, state.inner)
        gradient, total = (choose(emit, jax.tree.map(jnp.zeros_like, x), x) for x in (gradient, total))
        return final, MultiStepsState(n % every, inner, gradient, total)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]  # takes extra arguments
