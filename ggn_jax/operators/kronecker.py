"""Kronecker-factored approximations of the generalized Gauss-Newton matrix."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, Literal, Self

import equinox as eqx
from jaxtyping import Array, PyTree

from ggn_jax._checks import Examples
from ggn_jax._frozen import Frozen
from ggn_jax._sharding import compiler_sharded
from ggn_jax._supported import check_exact
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.checks import check_draws, check_mask
from ggn_jax.kronecker.factors import assemble_blocks, batch_sums, compute_blocks, eigenbases, reduce_sums
from ggn_jax.kronecker.joined import JoinedLayout, joined_sums
from ggn_jax.kronecker.layout import Layout
from ggn_jax.kronecker.optimal import compute_optimal_blocks
from ggn_jax.kronecker.options import Bias, Large, OnUncovered, Options, Sharing, Small, Tied
from ggn_jax.kronecker.stacks import Blocks, structure
from ggn_jax.kronecker.vectors import Positions
from ggn_jax.loss import Loss
from ggn_jax.objective import Objective, array_weights, parts_of
from ggn_jax.operators.base import register
from ggn_jax.operators.batches import add_up, check_iterable, check_unbatched, no_batches, with_progress
from ggn_jax.operators.blocks import BlockLinearOperator
from ggn_jax.operators.problem import Problem, pose, take_apart


class KFACLinearOperator(BlockLinearOperator):
    r"""KFAC: for each layer, the GGN's block as a Kronecker product `B (x) A` (Martens & Grosse 2015).

    Layers are found by tracing `model_fn` (`ggn_jax.report` shows them). With layer inputs `a`, output gradients `g` of
    the loss's gradient output vectors, `N` data and `S` positions that share the weight (Eschenhagen et al. 2023):

    ```
    A = sum_{n,s} a a^T / (N S)        B = sum_{v,n,s} g g^T        block = B (x) A on row-major [out, in]
    ```

    `g` carries the loss's reduction and weights. It equals the GGN's block for deep linear networks with squared error,
    and for one datum with one position. Grouped convolutions have a factor pair per group; weights used several times
    have a sum of Kronecker terms; embeddings a diagonal `A` of counts. Parameters that scale or shift data entry by
    entry (normalisation layers) have their exact GGN block.

    The operator is a pytree: build it inside `jax.jit`, differentiate what is computed from it (`logdet`, `solve`,
    roots, traces) in parameters, data or damping. Its leaves are the factors and the exact blocks, so `jax.tree.map`
    acts on `A` *and* `B`: three times each leaf is nine times the operator. Use `3 * operator`, `a + b`,
    `ggn_jax.average_operators`, or `ggn_jax.average_factors` for the means of the factors.

    As a preconditioner of conjugate gradients on the damped GGN, pass `kfac.inverse(damping)`. In float32, use
    `lineax.CG(rtol, atol, stabilise_every=None)`: by default lineax replaces the residual by `b - A x` every ten steps
    without a new start of the search directions. Near the smallest residual that float32 allows, that is rounding
    error, which the preconditioner multiplies by up to `1 / damping`, and the iteration diverges. Where lineax takes
    curvature for a breakdown (see `GGNLinearOperator`), pass `1e3 * kfac.inverse(damping)`: the factor cancels.

    **Arguments:** `model_fn`, `loss`, `params`, `batch`, `chunk_size`, `has_aux` as for `GGNLinearOperator`; and

    - `examples`: `"independent"`: `model_fn` is traced on one example, and treats each as if it were alone. Or
      `"coupled"`, for batch normalisation in training mode, attention within a batch, contrastive losses, or a graph as
      a batch: it is traced on the whole batch, which then is one datum with the positions of all examples. `A` and `B`
      are sums over all of these, and a gradient is the batch's, for each vector; what is drawn is drawn for each
      example. With `"type-2"`, `positions="exact"` back-propagates each example's vectors on their own, `"signs"` all
      examples together. `chunk_size` is refused.
    - `fisher_type`: `"type-2"` (exact in the loss), `"mc"`, `"empirical"`, or `"forward-only"` (`B = I`).
    - `mc_samples`, `key`: for what is drawn: `"mc"`, and the signs of type-2; not looked at where nothing is.
    - `sharing`: `"expand"` treats sharing positions as separate data, `"reduce"` averages inputs and adds gradients
      first.
    - `bias`: `"joint"` makes it one more input of its layer, `"separate"` gives it the block `B`.
    - `tied`: `"sum"` of Kronecker terms, one per use; or `"concatenate"` the uses' positions.
    - `positions`: how type-2 treats outputs with several loss positions, such as tokens: `"signs"` back-propagates all
      of them together with independent random signs (unbiased; needs a key), `"exact"` one by one.
    - `mask`: `[N, *positions]`, true for real inputs: layers with these sharing positions leave the others out of `A`.
      They have them where the lengths of their position axes are the mask's, in any order; axes of one length are in
      the order in which the inputs have them, and refused where the trace does not tell it. Axes of length 1, and those
      that weights made, such as heads, do not count. Position `i` of the mask is position `i` of the layer: a model
      that flips or shuffles positions needs a mask that is flipped as well. All other layers take all inputs.
    - `on_uncovered`: what parameters have that no layer covers: `"full"` the exact GGN block, `"diagonal"` the exact
      GGN diagonal; `"auto"` the block up to `max_small_size` entries, else the diagonal, with one
      `UncoveredParametersWarning` that names them; `"error"` refuses them.
    - `small`: `"full"` or `"diagonal"`: the exact block of scales and shifts.
    - `large`: what becomes of Kronecker factors larger than `max_dense_size`: `"block"` makes them block-diagonal, in
      parts of at most `block_size` and as even as possible, so that the layer's block is cut into Kronecker products of
      its own for each part; `"diagonal"` keeps their diagonal.
    - `max_dense_size`: the size of the largest dense factors; larger blocks of uncovered parameters are diagonal.
    - `max_small_size`: larger blocks of scales and shifts are diagonal; so are those with more entries than the model
      has parameters, and more than 128 x 128 (a position embedding that is added, say).
    - `vector_chunk_size`: how many vectors are back-propagated at once. On a CPU, one by one is fastest but for tiny
      models, and takes the least memory.

    **Raises:** ValueError, TypeError or NotImplementedError for arguments that do not fit, naming them; for a model
    whose examples depend on each other (checked on four, outside of `jit`); for parameters that are not covered.

    >>> import jax, jax.numpy as jnp, ggn_jax
    >>> params = {"w": jnp.ones((2, 3)) / 2, "b": jnp.zeros(3), "v": jnp.ones((3, 4)) / 3}
    >>> model_fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
    >>> batch = jnp.ones((8, 2)), jnp.arange(8) % 4
    >>> kfac = KFACLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), params, batch, key=jax.random.key(0))
    >>> step = kfac.inverse(damping=1e-3).mv(params)
    >>> kfac.block("w").shape  # (3 outputs) x (2 inputs and the bias)
    (9, 9)
    """

    _method: ClassVar[Literal["kfac", "ekfac", "kfoc"]] = "kfac"

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batch: tuple[PyTree, Any],
        *,
        fisher_type: FisherType | str = Options.fisher_type,
        mc_samples: int = Options.mc_samples,
        key: Any = None,
        sharing: Sharing = Options.sharing,
        bias: Bias = Options.bias,
        tied: Tied = Options.tied,
        positions: Positions = Options.positions,
        mask: Any = None,
        on_uncovered: OnUncovered = Options.on_uncovered,
        small: Small = Options.small,
        large: Large = Options.large,
        max_dense_size: int = Options.max_dense_size,
        block_size: int = Options.block_size,
        max_small_size: int = Options.max_small_size,
        chunk_size: int | None = None,
        vector_chunk_size: int = Options.vector_chunk_size,
        has_aux: bool = False,
        examples: Examples = "independent",
    ):
        options = Options(
            fisher_type,  # type: ignore[arg-type]  # made one there
            mc_samples,
            sharing,
            bias,
            tied,
            positions,
            on_uncovered,
            small,
            large,
            max_dense_size,
            block_size,
            max_small_size,
            vector_chunk_size,
        )
        kind = options.fisher_type
        problem = pose(model_fn, loss, params, batch, chunk_size, kind, has_aux=has_aux, examples=examples)
        self._check(problem, options, chunk_size)
        keys = check_draws(problem, options, key, 0)
        if mask is not None and self._method == "kfoc":
            raise NotImplementedError("KFOC has no use for mask: leave it out, or use KFAC.")
        mask = check_mask(mask, problem)
        problem.check_examples()
        self.blocks = _compute(problem, keys, mask, options, self._method)
        self.structure = structure(problem.params)

    @classmethod
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
        **options: Any,
    ) -> Self:
        """The operator of an objective: of the weighted sum of its functions' GGNs.

        A layer's block has a Kronecker term for each use of its weight, in all functions; with `tied="concatenate"`,
        one for each function that uses it, whose output factor has the weight in it. `inverse` says how sums of terms
        are inverted. What has no layer in one of the functions has an exact block of the whole GGN. EKFAC's eigenbases
        are those of the nearest single products, and its eigenvalues are of the whole GGN.

        Args:
            objective: a sum of functions of the same parameters, each with a weight.
            params: a pytree of floating arrays.
            batches: a list with a batch `(inputs, targets)`, or `(inputs, targets, mask)`, for each function; they may
                differ in size.
            key: a PRNG key, for what is drawn: that of function `k` is `jax.random.fold_in(key, k)`.
            chunk_size: how many examples are worked on at once.
            has_aux: whether each `model_fn` returns `(outputs, aux)`.
            examples: `"coupled"` for functions whose examples depend on each other.
            **options: those of the constructor.

        Raises:
            TypeError, ValueError, NotImplementedError: as the constructor; for batches that are not as many.
        """
        parts = parts_of(objective, batches, key)
        if cls._method == "kfoc":
            raise NotImplementedError("KFOC is made of one function: use KFAC or EKFAC for an objective.")
        unknown = set(options) - {field.name for field in fields(Options)}
        if unknown:
            raise TypeError(f"from_objective got unknown options {sorted(unknown)}; masks are part of the batches.")
        made = Options(**options)
        problems, keys, masks = [], [], []
        for i, (term, batch, own_key) in enumerate(parts):
            pair, mask = take_apart(f"batches[{i}]", batch)
            args = term.model_fn, term.loss, params, pair, chunk_size, made.fisher_type
            problem = pose(*args, has_aux=has_aux, examples=examples)
            cls._check(problem, made, chunk_size)
            problem.check_examples()
            problems.append(problem)
            keys.append(check_draws(problem, made, own_key, 0))
            masks.append(check_mask(mask, problem))
        blocks = _compute_joined(problems, array_weights(objective), keys, masks, made, cls._method == "ekfac")
        return cls._of(blocks, structure(problems[0].params))

    @classmethod
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
        **options: Any,
    ) -> Self:
        """The operator of all data of an iterable of batches, as if they were one batch.

        `batches` yields `(inputs, targets)`, or `(inputs, targets, mask)`; they may differ in size, and in the lengths
        of their sequences. A mean is over all their terms. What is drawn for a datum depends on its place in the whole,
        so that it does not matter how data are cut into batches. EKFAC goes over them twice, and wants an iterable that
        can be: a list, or a loader, but no generator. A function is compiled for each size of batch. `progress=True`
        shows a bar (needs tqdm); `options` are those of the constructor. Must be called outside of `jit` if `batches`
        are not arrays there.

        **Raises:** as the constructor, naming the batch; ValueError for a batch that does not fit the first, for a loss
        with a weight for each datum, for an iterable that is empty, or that differs between EKFAC's passes.

        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.CrossEntropyLoss()
        >>> batches = [(jnp.ones((n, 2)), jnp.arange(n) % 3) for n in (8, 8, 5)]
        >>> model_fn = lambda p, x: x @ p["w"]
        >>> kfac = KFACLinearOperator.from_batches(model_fn, loss, params, batches, fisher_type="type-2")
        >>> kfac.solve(params, damping=0.1)["w"].shape
        (2, 3)
        """
        unknown = set(options) - {field.name for field in fields(Options)}
        if unknown:
            raise TypeError(f"from_batches got unknown options {sorted(unknown)}; masks are part of the batches.")
        made, twice = Options(**options), cls._method == "ekfac"
        if cls._method == "kfoc":
            raise NotImplementedError("KFOC is made of all data at once: use KFAC or EKFAC for several batches.")
        check_iterable(batches, "EKFAC goes over the batches twice" if twice else "")

        layouts: set[Any] = set()  # of the batches: one

        def sums(bases: Any, inputs: PyTree, targets: Any, mask: Any, start: int) -> tuple[Problem, PyTree[Array]]:
            args = model_fn, loss, params, (inputs, targets), chunk_size, made.fisher_type
            problem = pose(*args, has_aux=has_aux, examples=examples)
            if not start and bases is None:
                cls._check(problem, made, chunk_size)
                check_unbatched(problem)
                problem.check_examples()
            keys = check_draws(problem, made, key, start)
            found, layout = _batch_sums(problem, keys, check_mask(mask, problem), made, bases)
            layouts.add(layout)
            if len(layouts) > 1:
                raise ValueError("the model's layers are others than for batch 0, or in another order.")
            return problem, found

        problem, total, seen = add_up(with_progress(batches, progress, "factors"), partial(sums, None))
        if problem is None:
            raise no_batches(batches)
        bases = corrections = None
        if twice:
            bases = _bases(problem, made, total)
            _, corrections, again = add_up(with_progress(batches, progress, "corrections"), partial(sums, bases))
            if again != seen:
                raise ValueError(
                    f"batches held {seen} data in the first pass and {again} in the second: EKFAC needs the same."
                )
        return cls._of(_finish(problem, made, total, bases, corrections), structure(problem.params))

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
                    f"KFOC is nearest to the exact block, and has no use for {name}={getattr(options, name)!r}: leave"
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


class EKFACLinearOperator(KFACLinearOperator):
    r"""EKFAC: KFAC's eigenbases, with the GGN's own diagonal in them (George et al. 2018).

    `(Q_B (x) Q_A) diag(E) (Q_B (x) Q_A)^T` with `Q` the eigenvectors of KFAC's factors and
    `E = sum_{v,n} (Q_B^T (sum_s g a^T) Q_A)^2` from each datum's weight gradients: no other diagonal in this basis is
    nearer to the GGN's block in Frobenius norm, so it is never farther than KFAC's.

    Two of them have different eigenbases, so their leaves cannot be averaged: use `ggn_jax.average_operators` or
    `(a + b) / 2`. Eigenvectors have derivatives where eigenvalues of a factor differ, or are both 0; between others
    that are equal, EKFAC depends on which ones the eigendecomposition chose, and derivatives leave that out.

    **Arguments:** as for `KFACLinearOperator`; `"forward-only"` has no gradients to correct with and is refused.

    >>> import jax, jax.numpy as jnp, ggn_jax
    >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
    >>> loss = ggn_jax.CrossEntropyLoss()
    >>> ekfac = EKFACLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
    >>> ekfac.solve(params, damping=0.1)["w"].shape
    (2, 3)
    """

    _method = "ekfac"


class KFOCLinearOperator(KFACLinearOperator):
    r"""KFOC: for each layer the Kronecker product nearest to the GGN's own block (Koroko et al. 2022).

    It minimises `|B (x) A - sum_{v,n} vec(G) vec(G)^T|` in Frobenius norm over all `A` and `B`, with each datum's
    weight gradients `G = sum_s g a^T`: the leading singular pair of the rearranged block, by power iterations that keep
    both factors positive semi-definite. It is never farther from the block than KFAC.

    **Arguments:** as for `KFACLinearOperator`, but for `chunk_size`, `mask`, `tied` and `sharing`, which it has no use
    for, and `"forward-only"`. All vectors of all data are kept at once.

    >>> import jax, jax.numpy as jnp, ggn_jax
    >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
    >>> loss = ggn_jax.CrossEntropyLoss()
    >>> kfoc = KFOCLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
    >>> kfoc.solve(params, damping=0.1)["w"].shape
    (2, 3)
    """

    _method = "kfoc"


register(KFOCLinearOperator, positive_semidefinite=True)
register(KFACLinearOperator, positive_semidefinite=True)
register(EKFACLinearOperator, positive_semidefinite=True)


@eqx.filter_jit
@compiler_sharded
def _compute(problem: Problem, keys: Any, mask: Any, options: Options, method: str) -> Blocks:
    if method == "kfoc":
        return compute_optimal_blocks(problem, keys, mask, options)
    return compute_blocks(problem, Layout.of(problem, options), keys, mask, method == "ekfac")


@eqx.filter_jit
@compiler_sharded
def _compute_joined(problems: Any, weights: Any, keys: Any, masks: Any, options: Options, correct: bool) -> Blocks:
    layout = JoinedLayout.of_all(problems, options)
    given = layout, problems, weights, keys, masks
    sums = joined_sums(*given)
    if not correct:
        return assemble_blocks(layout, sums)
    bases = eigenbases(layout, sums)
    return assemble_blocks(layout, sums, bases, joined_sums(*given, bases, leftovers=False))


@eqx.filter_jit
@compiler_sharded
def _batch_sums(
    problem: Problem, keys: Array | None, mask: Array | None, options: Options, bases: Any
) -> tuple[dict[str, Any], Frozen]:
    """What a batch adds, and what it is of: the parameters' entries in each block, in the order of the sums."""
    layout = Layout.of(problem, options)
    places = Frozen(tuple((member.spec, member.key) for member in layout.members))
    return batch_sums(problem, layout, keys, mask, bases), places


@eqx.filter_jit
@compiler_sharded
def _bases(problem: Problem, options: Options, total: dict[str, Any]) -> Any:
    return eigenbases(Layout.of(problem, options), reduce_sums(problem, total))


@eqx.filter_jit
@compiler_sharded
def _finish(problem: Problem, options: Options, total: Any, bases: Any, corrections: Any) -> Blocks:
    if corrections is not None:
        corrections = reduce_sums(problem, corrections)
    return assemble_blocks(Layout.of(problem, options), reduce_sums(problem, total), bases, corrections)
