"""What a KFAC transformation has besides `init` and `update`."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Self, TypeVar, cast

import optax
from jaxtyping import Array, PyTree

from ggn_jax._sharding import NOT_SHARDED, on_mesh
from ggn_jax.optimizer.core import Core
from ggn_jax.optimizer.curvature import Factors
from ggn_jax.optimizer.diagnosis import Diagnoser, Diagnosis
from ggn_jax.optimizer.states import statistics_of
from ggn_jax.optimizer.step import StepRule
from ggn_jax.optimizer.summary import CurvatureReport, summarise

F = TypeVar("F", bound=Callable[..., Any])


def pickled_as_called(make: F) -> F:
    """Let a `KFACTransformation` that `make` returns be pickled as the arguments that `make` was called with."""

    @wraps(make)
    def called(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        made.init.again = made.update.again = partial(called, *args, **kwargs)
        return made

    return cast(F, called)


class KFACTransformation(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that also has a report, and shares a pass with the gradient.

    Made by `kfac`, `scale_by_kfac` and `multi_steps`. These methods stay where one of `init` and `update` is replaced
    (`optimizer._replace(update=...)`), and where it is mapped over as a pytree. `optax.chain` and other transformations
    of optax return one without them: keep the `kfac` that you pass to them, whose methods find its state in theirs.
    `pickle` keeps the arguments that it was made with, which must allow it (a lambda does not), and the state is apart.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x)
        >>> print(optimizer.report(params))
        parameter  shape  kind    curvature
        ---------  -----  ------  -----------------------------
        ['w']      2 x 3  linear  Kronecker (3 x 3) (x) (2 x 2)
        State: 22 entries, 3.7 per parameter; 88 bytes.
    """

    @classmethod
    def _make_of(cls, core: Core, init: Any, update: Any, rule: StepRule | None) -> Self:
        """A transformation with its methods."""
        # Kept on the functions: where a named tuple is rebuilt, its fields are all that is left.
        init.made_of = update.made_of = core, rule, Diagnoser(core, rule)
        return cls(init, update)

    def __reduce__(self) -> Any:
        again: list[Any] = [getattr(fn, "again", None) for fn in self]
        replaced = again[0] is None or again[0] is not again[1]
        return (type(self), tuple(self)) if replaced else (again[0], ())

    def __copy__(self) -> Self:
        return type(self)(*self)

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)(*self)

    def _made_of(self) -> tuple[Core, StepRule | None, Diagnoser]:
        found = [fn.made_of for fn in self if hasattr(fn, "made_of")]
        if not found:
            raise TypeError("both init and update were replaced: call the methods of the optimizer that kfac returned.")
        return found[0]

    @property
    def _core(self) -> Core:
        """What traces the model and computes factors."""
        return self._made_of()[0]

    @property
    def _rule(self) -> StepRule | None:
        """How steps are made; None for `scale_by_kfac`, which makes none."""
        return self._made_of()[1]

    @property
    def needs_batch(self) -> bool:
        """Whether updates need the batch's loss, even when they are given its factors."""
        return self._rule is not None and self._rule.needs_batch

    def statistics(self, state: Any) -> dict[str, Array]:
        """Read what to log of the last step from the state, as scalars by name; nothing is computed.

        It works under `jit` as well as outside of it.

        Args:
            state: the optimizer's state, however wrapped.

        Returns:
            A dict of scalars. It has `step` (how many updates), `damping`, `rejected` and `skipped` (see `KFACState`
            and `Curvature`), and for `kfac` also those of `StepStatistics`, `step_norm`, `kl`, `learning_rate`,
            `momentum` and `clipped`, and the one of `reduction_ratio` and `slope_ratio` that the damping follows.

        Raises:
            TypeError, ValueError: for a state without exactly one of this optimizer's.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
            >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x)
            >>> sorted(optimizer.statistics(optimizer.init(params)))
            ['clipped', 'damping', 'kl', 'learning_rate', 'momentum', 'rejected', 'skipped', 'step', 'step_norm']
        """
        return statistics_of(state, "" if self._rule is None else self._rule.ratio)

    def diagnose(
        self, state: Any, params: PyTree[Array], batch: Any, *, key: Any = None, full_params: Any = None
    ) -> Diagnosis:
        """Find out why a run is slow: a report to print, with numbers, findings with advice, and a small plot.

        It compares the damping with the blocks' eigenvalues, and computes condition numbers, how far the inverses are
        from those of the present averages, the fractions of clipped and rejected steps, and the effect of the next
        step, with the inverses and the momentum of the state, on the loss of `batch`: as predicted by the quadratic
        model, and actual. Neither the state nor the averages change. It takes as long as some steps with new inverses,
        the first call compiles, and it is called outside of `jit`: now and then, not at each step (that is
        `statistics`).

        Args:
            state: the optimizer's state, however wrapped. It has taken at least one step.
            params: the parameters at which the next gradient would be taken.
            batch: a batch `(inputs, targets)`, or `(inputs, targets, mask)`; for an `Objective` a list of these. With
                small batches, one that the last steps have not seen tells more.
            key: ignored, since nothing is sampled.
            full_params: with masked parameters (`optax.masked` and the like), all parameters of the model; None by
                default.

        Returns:
            A `Diagnosis`.

        Raises:
            ValueError: for a state that has seen no batch.
            TypeError: under `jit`, where values are unknown.

        Example:
            >>> import jax, jax.numpy as jnp, ggn_jax
            >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
            >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
            >>> optimizer = ggn_jax.kfac(model_fn, loss, 1e-4, example_inputs=batch[0])
            >>> grads = jax.grad(lambda params: loss(model_fn(params, batch[0]), batch[1]))(params)
            >>> state, key = optimizer.init(params), jax.random.key(0)
            >>> _, state = jax.jit(optimizer.update)(grads, state, params, batch=batch, key=key)
            >>> [found.name for found in optimizer.diagnose(state, params, batch).findings]
            ['step-short']
        """
        del key
        return self._made_of()[2](state, params, batch, full_params)

    def report(self, params: PyTree[Array]) -> CurvatureReport:
        """Tell which curvature each parameter gets: a table to print, and rows.

        Args:
            params: the parameters, arrays or `jax.ShapeDtypeStruct`s.

        Returns:
            A `CurvatureReport`.
        """
        return summarise(*self._core.blank(params), self._core.settings.most_terms)

    def factors(
        self, params: PyTree[Array], batch: Any, state: Any, *, key: Any = None, full_params: Any = None
    ) -> Factors:
        """Compute the batch's factors at this step, to pass to `update(..., factors=...)`.

        Args:
            params: the parameters, a pytree of floating arrays.
            batch: the batch of the gradient: `(inputs, targets)`, or `(inputs, targets, mask)`; for an `Objective` a
                list of these.
            state: the optimizer's state, however wrapped.
            key: a PRNG key for sampling, a new one for each step; None (default) where nothing is sampled.
            full_params: with masked parameters (`optax.masked` and the like), all parameters of the model; None by
                default.

        Returns:
            The `Factors`, a pytree. Those of several batches or processes may be added or averaged, leaf by leaf.

        Raises:
            ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.
        """
        return self._compute_factors(params, batch, state, key, full_params, gradient=False)[2]

    def value_and_grad_and_factors(
        self, params: PyTree[Array], batch: Any, state: Any, *, key: Any = None, full_params: Any = None
    ) -> tuple[Any, PyTree[Array], Factors]:
        """Compute the loss, its gradient, and the batch's factors: with factors of each step, from one forward pass.

        Without it, the gradient and the factors each run the model. With a `factor_interval` above 1, it computes the
        gradient as `jax.value_and_grad` does, and factors, where they are due, by a pass of their own: steps in between
        cost what a gradient costs. Use it inside of `jit`, with the update, as in the example, and donate the state.

        Args:
            params: the parameters, a pytree of floating arrays.
            batch: the batch of the gradient: `(inputs, targets)`, or `(inputs, targets, mask)`; for an `Objective` a
                list of these.
            state: the optimizer's state, however wrapped.
            key: a PRNG key for sampling, a new one for each step; None (default) where nothing is sampled.
            full_params: with masked parameters (`optax.masked` and the like), all parameters of the model; None by
                default.

        Returns:
            `(value, grads, factors)`. With `has_aux=True`, `((value, aux), grads, factors)`, as from
            `jax.value_and_grad`: `aux` is what `model_fn` returns for the whole batch. With factors of each step, those
            of independent examples come from a model that is mapped over them, so that `aux` is computed by a second
            call, of which the compiler keeps what `aux` depends on. With masked parameters, the gradient is in those
            that are not masked.

        Raises:
            ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

        Example:
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
        if self._core.has_aux and self._core.settings.chunk_size is not None:
            raise NotImplementedError(
                "has_aux=True has no aux of a whole batch where chunk_size cuts it into parts: leave chunk_size out, or"
                " take the gradient and aux with jax.value_and_grad, and pass batch=batch to update."
            )
        return self._compute_factors(params, batch, state, key, full_params, gradient=True)

    def _compute_factors(
        self, params: Any, batch: Any, state: Any, key: Any, full_params: Any, *, gradient: bool
    ) -> Any:
        compute = partial(self._compute_factors_inside, gradient=gradient)
        like = NOT_SHARDED, params if gradient else NOT_SHARDED, NOT_SHARDED
        return on_mesh(compute, lambda *_: like)(params, batch, state, key, full_params)

    def _compute_factors_inside(
        self, params: Any, batch: Any, state: Any, key: Any, full_params: Any, *, gradient: bool
    ) -> Any:
        curvature = self._core.curvature_in(state, params)
        problem, mask = self._core.problem(params, batch, full_params, value=gradient)
        return self._core.run_pass(problem, mask, key, curvature, gradient=gradient)
