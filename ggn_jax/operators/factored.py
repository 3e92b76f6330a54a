"""How operators with Kronecker factors are made: of a batch, of many, of an objective, or of sums kept from before."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, Self, Unpack

from jaxtyping import Array, PyTree

from ggn_jax._checks import Examples, check_count
from ggn_jax._keywords import takes
from ggn_jax._supported import check_exact
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.checks import check_draws, check_mask
from ggn_jax.kronecker.layout import find_layout
from ggn_jax.kronecker.options import DEFAULTS, KroneckerOptions, Options
from ggn_jax.kronecker.stacks import params_structure
from ggn_jax.loss import Loss
from ggn_jax.objective import Objective, array_weights, parts_of
from ggn_jax.operators.batches import check_iterable, check_unbatched, no_batches, sum_batches, with_progress
from ggn_jax.operators.blocks import BlockLinearOperator
from ggn_jax.operators.compiled import bases_of, compute, compute_joined, finish_blocks, sums_of_batch
from ggn_jax.operators.examples import unpack_batch
from ggn_jax.operators.nearest import nearest_blocks, refuse_kfoc_mask
from ggn_jax.operators.partial import PartialSums, Recipe, check_sums, loss_key, same_passes, same_program
from ggn_jax.operators.problem import Problem, make_problem

MASKS = " Masks are part of the batches."


class FactoredLinearOperator(BlockLinearOperator):
    """What KFAC, EKFAC and KFOC share: how they are made; what they can do is `BlockLinearOperator`'s."""

    _method: ClassVar[Literal["kfac", "ekfac", "kfoc"]]

    @takes(DEFAULTS)
    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batch: tuple[PyTree, Any],
        *,
        key: Any = None,
        mask: Any = None,
        chunk_size: int | None = None,
        has_aux: bool = False,
        examples: Examples = "independent",
        **options: Unpack[KroneckerOptions],
    ):
        made = Options(**options)  # type: ignore[arg-type]  # strings are made members
        kind = made.fisher_type
        problem = make_problem(model_fn, loss, params, batch, chunk_size, kind, has_aux=has_aux, examples=examples)
        self._check(problem, made, chunk_size)
        keys = check_draws(problem, made, key, 0)
        if self._method == "kfoc":
            refuse_kfoc_mask(mask)
        mask = check_mask(mask, problem)
        problem.check_examples()
        self.blocks = compute(problem, keys, mask, made, self._method)
        self.structure = params_structure(problem.params)

    @classmethod
    @takes(DEFAULTS, MASKS)
    def from_objective(
        cls,
        objective: Objective,
        params: PyTree[Array],
        batches: Any,
        *,
        key: Any = None,
        chunk_size: int | None = None,
        has_aux: bool = False,
        examples: Examples = "independent",
        **options: Unpack[KroneckerOptions],
    ) -> Self:
        """Make the operator of an objective: of the weighted sum of its functions' GGNs.

        A layer's block has a Kronecker term for each use of its weight, in all functions; with `tied="concatenate"`,
        one for each function that uses it, whose output factor has the weight in it. `inverse` explains how sums of
        terms are inverted. Parameters without a layer in one of the functions have an exact block of the whole GGN.
        EKFAC's eigenbases are those of the nearest single products, and its eigenvalues are of the whole GGN. KFOC's
        blocks are the products nearest to those of the whole GGN, with one term.

        Args:
            objective: an `Objective`: a sum of functions of the same parameters, each with a weight.
            params: the parameters, a pytree of floating arrays.
            batches: a list with a batch `(inputs, targets)`, or `(inputs, targets, mask)`, for each function; they may
                differ in size.
            key: a PRNG key for sampling; function `k` gets `jax.random.fold_in(key, k)`. Needed only where something is
                sampled.
            chunk_size: how many examples to process at once; None (default) for all.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
            examples: `"independent"` (default), or `"coupled"` for a model whose examples depend on each other: a batch
                is then one example with the positions of all.
            **options: options of `KroneckerOptions`, whose page has their values and defaults: `fisher_type` and
                `mc_samples` (which vectors are back-propagated), `positions`, `vector_chunk_size`, `sharing`, `bias`
                and `tied` (how factors are made), `on_uncovered`, `small` and `max_small_size` (parameters without a
                layer), `large`, `max_dense_size` and `block_size` (factors that are too large).

        Returns:
            The operator.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them, and for a number of
                batches that differs from that of the functions.
        """
        parts = parts_of(objective, batches, key)
        made = Options(**options)  # type: ignore[arg-type]  # strings are made members
        problems, keys, masks = [], [], []
        for i, (term, batch, own_key) in enumerate(parts):
            pair, mask = unpack_batch(f"batches[{i}]", batch)
            if cls._method == "kfoc":
                refuse_kfoc_mask(mask)
            args = term.model_fn, term.loss, params, pair, chunk_size, made.fisher_type
            problem = make_problem(*args, has_aux=has_aux, examples=examples)
            cls._check(problem, made, chunk_size)
            problem.check_examples()
            problems.append(problem)
            keys.append(check_draws(problem, made, own_key, 0))
            masks.append(check_mask(mask, problem))
        blocks = compute_joined(problems, array_weights(objective), keys, masks, made, cls._method)
        return cls._of(blocks, params_structure(problems[0].params))

    @classmethod
    @takes(DEFAULTS, MASKS)
    def from_batches(
        cls,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batches: Iterable[Any],
        *,
        key: Any = None,
        chunk_size: int | None = None,
        has_aux: bool = False,
        examples: Examples = "independent",
        progress: bool = False,
        **options: Unpack[KroneckerOptions],
    ) -> Self:
        """Make the operator of an iterable of batches, as if they were one batch.

        A mean is over the terms of all batches. What is sampled for an example depends on its place in the whole, so it
        does not matter how examples are cut into batches. KFAC takes one pass, EKFAC two, and KFOC two for each of its
        iterations (twenty passes or so). A function is compiled for each size of batch. Under `jit`, batches must be a
        list of arrays.

        Args:
            model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`, whose layers are found by tracing it.
            loss: a `Loss` without weights for single examples.
            params: the parameters, a pytree of floating arrays.
            batches: an iterable of `(inputs, targets)`, or `(inputs, targets, mask)`; batches may differ in size, and
                in the lengths of their sequences. EKFAC and KFOC need one that can be repeated: a list, or a loader,
                but no generator.
            key: a PRNG key for sampling: of the targets of `"mc"`, and of the signs of `"type-2"` with several loss
                positions. Ignored where nothing is sampled.
            chunk_size: how many examples of a batch to process at once; None (default) for all.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
            examples: `"independent"` (default), or `"coupled"` for a model whose examples depend on each other: a batch
                is then one example with the positions of all.
            progress: whether to show a bar for each pass (needs tqdm); False by default.
            **options: options of `KroneckerOptions`, whose page has their values and defaults: `fisher_type` and
                `mc_samples` (which vectors are back-propagated), `positions`, `vector_chunk_size`, `sharing`, `bias`
                and `tied` (how factors are made), `on_uncovered`, `small` and `max_small_size` (parameters without a
                layer), `large`, `max_dense_size` and `block_size` (factors that are too large).

        Returns:
            The operator.

        Raises:
            TypeError, NotImplementedError: for arguments that do not fit, naming them and the batch.
            ValueError: the same; for a batch that does not fit the first, for a loss with a weight for each example,
                for an iterable that is empty, or that yields different data in the passes of EKFAC and KFOC.

        Example:
            >>> import jax, jax.numpy as jnp, ggn_jax
            >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.CrossEntropyLoss()
            >>> batches = [(jnp.ones((n, 2)), jnp.arange(n) % 3) for n in (8, 8, 5)]
            >>> model_fn = lambda p, x: x @ p["w"]
            >>> kfac = ggn_jax.KFACLinearOperator.from_batches(model_fn, loss, params, batches, fisher_type="type-2")
            >>> kfac.solve(params, damping=0.1)["w"].shape
            (2, 3)
        """
        made = Options(**options)  # type: ignore[arg-type]  # strings are made members
        if cls._method == "kfoc":

            def make(inputs: PyTree, targets: Any) -> Problem:
                args = model_fn, loss, params, (inputs, targets), chunk_size, made.fisher_type
                return cls._checked(make_problem(*args, has_aux=has_aux, examples=examples), made, chunk_size)

            blocks, problem = nearest_blocks(make, batches, made, key, progress)
            return cls._of(blocks, params_structure(problem.params))
        args = model_fn, loss, params, batches
        given: dict[str, Any] = {
            **options,
            "key": key,
            "chunk_size": chunk_size,
            "has_aux": has_aux,
            "examples": examples,
            "progress": progress,
        }
        if cls._method != "ekfac":
            return cls.finish(cls.partial_sums(*args, **given))
        check_iterable(batches, "EKFAC goes over the batches twice")
        factors = cls.partial_sums(*args, **given)
        return cls.finish(cls.partial_sums(*args, factors=factors, **given))

    @classmethod
    @takes(DEFAULTS, MASKS)
    def partial_sums(
        cls,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batches: Iterable[Any],
        *,
        start: int = 0,
        factors: PartialSums | None = None,
        key: Any = None,
        chunk_size: int | None = None,
        has_aux: bool = False,
        examples: Examples = "independent",
        progress: bool = False,
        **options: Unpack[KroneckerOptions],
    ) -> PartialSums:
        """Compute the sums over some of the batches, of which `finish` makes an operator: a long fit, in parts.

        `partial_sums(first) + partial_sums(rest, start=n)`, with the `n` examples that `first` has, are the sums over
        both. They can be saved (`PartialSums`), or be made by several processes, each for its share. EKFAC takes two
        passes: `factors` are the sums of the first one, over all batches.

        Args:
            model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`, whose layers are found by tracing it.
            loss: a `Loss` without weights for single examples.
            params: the parameters, a pytree of floating arrays.
            batches: an iterable of `(inputs, targets)`, or `(inputs, targets, mask)`; batches may differ in size, and
                in the lengths of their sequences.
            start: how many examples come before these, 0 by default: what is sampled for an example depends on its
                place in the whole.
            factors: for EKFAC's second pass, what its first returned; or sums of the second pass, to use their
                eigenbases. None by default.
            key: a PRNG key for sampling: of the targets of `"mc"`, and of the signs of `"type-2"` with several loss
                positions. Ignored where nothing is sampled.
            chunk_size: how many examples of a batch to process at once; None (default) for all.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
            examples: `"independent"` (default), or `"coupled"` for a model whose examples depend on each other: a batch
                is then one example with the positions of all.
            progress: whether to show a bar for each pass (needs tqdm); False by default.
            **options: options of `KroneckerOptions`, whose page has their values and defaults: `fisher_type` and
                `mc_samples` (which vectors are back-propagated), `positions`, `vector_chunk_size`, `sharing`, `bias`
                and `tied` (how factors are made), `on_uncovered`, `small` and `max_small_size` (parameters without a
                layer), `large`, `max_dense_size` and `block_size` (factors that are too large).

        Returns:
            The sums, a `PartialSums`.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them and the batch; for
                `factors` of other data or another operator.

        Example:
            >>> import jax, jax.numpy as jnp, ggn_jax
            >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.CrossEntropyLoss()
            >>> args, key = (lambda p, x: x @ p["w"], loss, params), jax.random.key(0)
            >>> batches = [(jnp.ones((n, 2)), jnp.arange(n) % 3) for n in (8, 5)]
            >>> factors = ggn_jax.EKFACLinearOperator.partial_sums(*args, batches, key=key)
            >>> corrected = ggn_jax.EKFACLinearOperator.partial_sums(*args, batches, factors=factors, key=key)
            >>> ggn_jax.EKFACLinearOperator.finish(corrected)
            EKFACLinearOperator(params=float32[2, 3], blocks=1)
        """
        made = Options(**options)  # type: ignore[arg-type]  # strings are made members
        if cls._method == "kfoc":
            raise NotImplementedError("KFOC iterates over all data, and has no sums to keep: use from_batches.")
        check_iterable(batches)
        start = check_count("start", start, 0)
        if factors is not None:
            if cls._method != "ekfac":
                raise TypeError(f"factors are for EKFAC's second pass; {cls.__name__} takes one: leave them out.")
            check_sums("factors", factors, cls)
        bases = None
        if factors is not None:
            bases = bases_of(factors) if factors.bases is None else factors.bases
            factors = factors.factors or factors
        recipes: set[Recipe] = set()  # of the batches: one
        drawn: list[bool] = []  # whether something was, for each batch
        key_of_loss = loss_key(loss)

        def sums(inputs: PyTree, targets: Any, mask: Any, seen: int) -> tuple[Problem, PyTree[Array]]:
            args = model_fn, loss, params, (inputs, targets), chunk_size, made.fisher_type
            problem = make_problem(*args, has_aux=has_aux, examples=examples)
            if not recipes and factors is None:
                cls._checked(problem, made, chunk_size)
            kind = made, key_of_loss, params_structure(problem.params)
            if not recipes:
                layout = find_layout(problem, made)
                recipes.add(Recipe(cls, (layout.signature(), *kind), (layout, kind[2])))
                if factors is not None and {factors.recipe} != recipes:
                    raise ValueError("factors must be those of the same model, loss and options: these differ.")
            keys = check_draws(problem, made, key, start + seen)
            drawn.append(keys is not None)
            given = problem, keys, check_mask(mask, problem), made, bases, cls._method == "ekfac"
            found, places = sums_of_batch(*given)
            if recipes != {Recipe(cls, (places, *kind))}:
                raise ValueError("the model's layers differ from those of batch 0, or come in another order.")
            return problem, found

        problem, totals, seen = sum_batches(
            with_progress(batches, progress, "corrections" if factors else "factors"), sums
        )
        if problem is None:
            raise no_batches(batches, again=factors is not None)
        totals, data = totals
        made_of = recipes.pop(), problem, totals, seen, (key, start) if any(drawn) else None
        found = PartialSums._of(*made_of, factors=factors, bases=bases, data=data)
        if factors is not None:
            same_program("factors", factors, found)
        return found

    @classmethod
    def finish(cls, sums: PartialSums) -> Self:
        """Make the operator of all batches that `partial_sums` were summed over.

        Args:
            sums: what `partial_sums` returned, or sums of such; EKFAC's second pass.

        Returns:
            The operator.

        Raises:
            TypeError: for anything but partial sums of this operator.
            ValueError: for EKFAC's first pass, and for passes over different data.
        """
        check_sums("sums", sums, cls)
        if cls._method == "ekfac":
            if sums.factors is None:
                raise ValueError(
                    "EKFAC takes a second pass: sums must be those of partial_sums(..., factors=first), not the first."
                )
            same_passes(sums.factors, sums)
        return cls._of(finish_blocks(sums), sums.recipe.made_of[1])

    @classmethod
    def _checked(cls, problem: Problem, options: Options, chunk_size: int | None) -> Problem:
        """The first of several batches, after all checks."""
        cls._check(problem, options, chunk_size)
        check_unbatched(problem)
        problem.check_examples()
        return problem

    @classmethod
    def _check(cls, problem: Problem, options: Options, chunk_size: int | None) -> None:
        """Refuse what this operator cannot be made of."""
        if cls._method != "kfac" and options.fisher_type is FisherType.FORWARD_ONLY:
            raise NotImplementedError(
                f"fisher_type 'forward-only' back-propagates nothing, but {cls._method.upper()} is made of gradients:"
                " use KFACLinearOperator, or another fisher type."
            )
        for name in ("tied", "sharing"):
            if cls._method == "kfoc" and getattr(options, name) != getattr(Options, name):
                raise NotImplementedError(
                    f"KFOC is nearest to the exact block, and does not use {name}={getattr(options, name)!r}: leave"
                    " it out, or use KFAC."
                )
        if cls._method == "kfoc" and chunk_size is not None:
            raise NotImplementedError(
                "KFOC's power iterations go over all data many times, and keep them: leave chunk_size out, or use KFAC."
            )
        if options.fisher_type is FisherType.TYPE2:
            check_exact(problem.loss)
        if options.fisher_type in (FisherType.TYPE2, FisherType.MC):
            problem.check_curvature()
