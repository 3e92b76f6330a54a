"""The diagonal of the generalized Gauss-Newton matrix."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import Examples, as_array, check_count, is_concrete
from ggn_jax._weights import weighted_sum
from ggn_jax.kronecker.stacks import params_structure
from ggn_jax.loss import Loss
from ggn_jax.objective import Objective
from ggn_jax.operators.base import register
from ggn_jax.operators.batches import (
    check_iterable,
    check_unbatched,
    no_batches,
    refuse_mask,
    sum_batches,
    with_progress,
    with_reduction,
)
from ggn_jax.operators.entrywise import EntrywiseLinearOperator
from ggn_jax.operators.partial import PartialSums, Recipe, check_sums, loss_key
from ggn_jax.operators.problem import Problem, make_problem
from ggn_jax.operators.squares import DiagonalMaker, unreduced
from ggn_jax.operators.weighted import of_terms


class GGNDiagonalLinearOperator(EntrywiseLinearOperator):
    """The diagonal of the GGN: `d = sum_{n, v} (J_n^T s_{v, n})^2`, entrywise, as a diagonal operator.

    `J_n` is the Jacobian of example `n`'s outputs in the parameters; `s_{v, n}` are its gradient output vectors
    (`make_batch_grad_output_fn`): all columns of the loss Hessian's square root, one backward pass each, or
    `mc_samples` sampled ones. It is computed once, when the operator is made.

    As a preconditioner of CG on the damped GGN, which helps where parameters differ in scale (and may cost steps where
    they do not), pass `ggn_diagonal.damped(x).inverse()`, as in the example.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Inputs may be a pytree of arrays and of PRNG keys (one for each example, for
            dropout); every leading axis is the batch's, except in `ggn_jax.Unbatched` inputs. Targets may be None where
            the loss's curvature and weights depend on none (no class weights, no `pos_weight`): nothing is ignored
            then.
        mc_samples: the number of Monte-Carlo samples; 0 (default) for the exact diagonal.
        key: a PRNG key for `mc_samples`; ignored without.
        chunk_size: how many examples to process at once; None (default) for all. For a sharded batch it counts the
            examples of all devices together: pass a multiple of their number, and each device processes some of its
            own.
        vector_chunk_size: how many vectors of an example to back-propagate at once; 1 by default.
        method: `"layers"` (default) finds the linear layers (`ggn_jax.report`) and squares `sum_s g a^T` of their
            inputs `a` and output gradients `g`: where a weight is used at one position, as in a multi-layer perceptron,
            no example's gradient is formed. `"data"` squares each example's gradient, and needs no layers. Memory is
            about `chunk_size * vector_chunk_size` times the parameters that are used at several positions, or all of
            them.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
        examples: `"independent"` (default): `model_fn` is called on batches of one and mapped over the batch.
            `"coupled"`: it is called on the whole batch, each of whose entries has its own vectors, back-propagated
            through all examples; `chunk_size` is refused then.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax, jax.numpy as jnp, lineax as lx
        >>> import ggn_jax
        >>> def model_fn(params, x):
        ...     return jnp.tanh(x @ params["w"]) @ params["v"]
        >>> params = {"w": jnp.ones((2, 3)) / 2, "v": jnp.ones((3, 4)) / 3}
        >>> args = model_fn, ggn_jax.CrossEntropyLoss(), params, (jnp.ones((8, 2)), jnp.arange(8) % 4)
        >>> diagonal = GGNDiagonalLinearOperator(*args, chunk_size=4)
        >>> options = {"preconditioner": diagonal.damped(0.1).inverse()}
        >>> ggn = ggn_jax.GGNLinearOperator(*args).damped(0.1)
        >>> step = lx.linear_solve(ggn, params, lx.CG(rtol=1e-4, atol=1e-4), options=options).value
    """

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batch: tuple[PyTree, Any],
        *,
        mc_samples: int = 0,
        key: Any = None,
        chunk_size: int | None = None,
        vector_chunk_size: int = 1,
        method: Literal["layers", "data"] = "layers",
        has_aux: bool = False,
        examples: Examples = "independent",
    ):
        compute = DiagonalMaker(mc_samples, key, vector_chunk_size, method)
        kind = compute.fisher_type
        problem = make_problem(model_fn, loss, params, batch, chunk_size, kind, has_aux=has_aux, examples=examples)
        compute.check(problem)
        self.entries = compute(problem, 0)

    @classmethod
    def from_diagonal(cls, entries: PyTree[Any]) -> Self:
        """Make the operator of a diagonal that is known already: from a file, or a running average of squares.

        Args:
            entries: a pytree like the parameters, of real numbers of at least 0.

        Returns:
            The operator.

        Raises:
            TypeError: for entries that are not real arrays.
            ValueError: for negative entries, where values are known.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> diagonal = ggn_jax.GGNDiagonalLinearOperator.from_diagonal({"w": jnp.ones((2, 3)), "b": jnp.zeros(3)})
            >>> diagonal.solve({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, damping=0.5)["b"]
            Array([2., 2., 2.], dtype=float32)
        """
        return cls._of(jax.tree_util.tree_map_with_path(_check_entries, entries))

    @classmethod
    def from_objective(
        cls, objective: Objective, params: PyTree[Array], batches: Any, *, key: Any = None, **options: Any
    ) -> Self:
        """Make the diagonal of an objective's GGN: the weighted sum of those of its functions.

        Args:
            objective: an `Objective`: a sum of functions of the same parameters, each with a weight.
            params: the parameters, a pytree of floating arrays.
            batches: a list with a batch `(inputs, targets)` for each function; they may differ in size.
            key: a PRNG key for sampling; function `k` gets `jax.random.fold_in(key, k)`. Needed only where something is
                sampled.
            **options: further keyword arguments of the constructor: `mc_samples`, `chunk_size`, `vector_chunk_size`,
                `method`, `has_aux` and `examples`.

        Returns:
            The operator.

        Raises:
            TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them, and for a number of
                batches that differs from that of the functions.
        """
        operators, weights = of_terms(cls, objective, params, batches, key, options)
        entries = weighted_sum([operator.entries for operator in operators], weights)
        made: Self = operators[0]._replace(entries)
        return made

    @classmethod
    def from_batches(
        cls,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batches: Iterable[Any],
        *,
        mc_samples: int = 0,
        key: Any = None,
        chunk_size: int | None = None,
        vector_chunk_size: int = 1,
        method: Literal["layers", "data"] = "layers",
        has_aux: bool = False,
        examples: Examples = "independent",
        progress: bool = False,
    ) -> Self:
        """Compute the diagonal for an iterable of batches, as if they were one batch, in one pass.

        A mean is over the terms of all batches. What is sampled for an example depends on its place in the whole.

        Args:
            model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
            loss: a `Loss` without weights for single examples.
            params: the parameters, a pytree of floating arrays.
            batches: an iterable of `(inputs, targets)`, which may be a generator; batches may differ in size.
            mc_samples: the number of Monte-Carlo samples; 0 (default) for the exact diagonal.
            key: a PRNG key for `mc_samples`; ignored without.
            chunk_size: how many examples of a batch to process at once; None (default) for all.
            vector_chunk_size: how many vectors of an example to back-propagate at once; 1 by default.
            method: `"layers"` (default) or `"data"`, see the constructor.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
            examples: `"independent"` (default), or `"coupled"` for a model whose examples depend on each other.
            progress: whether to show a bar for each pass (needs tqdm); False by default.

        Returns:
            The operator.

        Raises:
            TypeError, NotImplementedError: for arguments that do not fit, naming them and the batch.
            ValueError: the same, and for an iterable that is empty.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.CrossEntropyLoss()
            >>> batches = ((jnp.ones((n, 2)), jnp.arange(n) % 3) for n in (8, 8, 5))
            >>> diagonal = GGNDiagonalLinearOperator.from_batches(lambda p, x: x @ p["w"], loss, params, batches)
            >>> diagonal.mv(params)["w"].shape
            (2, 3)
        """
        options = {"mc_samples": mc_samples, "key": key, "chunk_size": chunk_size, "has_aux": has_aux}
        options |= {"vector_chunk_size": vector_chunk_size, "method": method, "examples": examples}
        return cls.finish(cls.partial_sums(model_fn, loss, params, batches, progress=progress, **options))

    @classmethod
    def partial_sums(
        cls,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batches: Iterable[Any],
        *,
        start: int = 0,
        mc_samples: int = 0,
        key: Any = None,
        chunk_size: int | None = None,
        vector_chunk_size: int = 1,
        method: Literal["layers", "data"] = "layers",
        has_aux: bool = False,
        examples: Examples = "independent",
        progress: bool = False,
    ) -> PartialSums:
        """Compute the sums over some of the batches, of which `finish` makes a diagonal: a long fit, in parts.

        `partial_sums(first) + partial_sums(rest, start=n)`, with the `n` examples that `first` has, are the sums over
        both; `PartialSums` says how to save them.

        Args:
            model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
            loss: a `Loss` without weights for single examples.
            params: the parameters, a pytree of floating arrays.
            batches: an iterable of `(inputs, targets)`, which may be a generator; batches may differ in size.
            start: how many examples come before these, 0 by default: what is sampled for an example depends on its
                place in the whole.
            mc_samples: the number of Monte-Carlo samples; 0 (default) for the exact diagonal.
            key: a PRNG key for `mc_samples`; ignored without.
            chunk_size: how many examples of a batch to process at once; None (default) for all.
            vector_chunk_size: how many vectors of an example to back-propagate at once; 1 by default.
            method: `"layers"` (default) or `"data"`, see the constructor.
            has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
            examples: `"independent"` (default), or `"coupled"` for a model whose examples depend on each other.
            progress: whether to show a bar for each pass (needs tqdm); False by default.

        Returns:
            The sums, a `PartialSums`.

        Raises:
            TypeError, NotImplementedError: for arguments that do not fit, naming them and the batch.
            ValueError: the same, and for an iterable that is empty.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, loss = {"w": jnp.ones((2, 3))}, ggn_jax.CrossEntropyLoss()
            >>> args = lambda p, x: x @ p["w"], loss, params
            >>> parts = [[(jnp.ones((n, 2)), jnp.arange(n) % 3)] for n in (8, 5)]
            >>> first, second = (ggn_jax.GGNDiagonalLinearOperator.partial_sums(*args, part) for part in parts)
            >>> ggn_jax.GGNDiagonalLinearOperator.finish(first + second).mv(params)["w"].shape
            (2, 3)
        """
        compute = DiagonalMaker(mc_samples, key, vector_chunk_size, method)
        check_iterable(batches)
        start = check_count("start", start, 0)

        def sums(inputs: PyTree, targets: Any, mask: Any, seen: int) -> tuple[Problem, PyTree[Array]]:
            refuse_mask(mask)
            args = model_fn, loss, params, (inputs, targets), chunk_size, compute.fisher_type
            problem = make_problem(*args, has_aux=has_aux, examples=examples)
            if not seen:
                compute.check(problem)
                check_unbatched(problem)
            return problem, unreduced(problem, compute(problem, start + seen))

        problem, totals, seen = sum_batches(with_progress(batches, progress, "diagonal"), sums)
        if problem is None:
            raise no_batches(batches)
        made_of, options = (problem.loss.reduction, params_structure(params)), (loss_key(loss), mc_samples)
        drawn = (key, start) if compute.draws else None
        return PartialSums._of(Recipe(cls, (made_of, *options), made_of), problem, totals, seen, drawn)

    @classmethod
    def finish(cls, sums: PartialSums) -> Self:
        """Make the diagonal for all batches that `partial_sums` were summed over.

        Args:
            sums: what `partial_sums` returned, or sums of such.

        Returns:
            The operator.

        Raises:
            TypeError: for anything but partial sums of this operator.
        """
        check_sums("sums", sums, cls)
        reduction, (_, dtypes, tree) = sums.recipe.made_of
        entries, divisor = sums.totals
        return cls._of(with_reduction(reduction, entries, divisor, jax.tree.unflatten(tree, dtypes)))


def _check_entries(path: Any, value: Any) -> Array:
    """One of a diagonal's arrays."""
    name = f"entries{jax.tree_util.keystr(path)}"
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must hold floating-point numbers; got dtype {array.dtype}.")
    if is_concrete(array) and bool(jnp.any(array < 0)):
        raise ValueError(f"{name} must not be negative: a GGN's diagonal is a sum of squares.")
    return array


register(GGNDiagonalLinearOperator, positive_semidefinite=True, diagonal=True)


@lx.diagonal.register(GGNDiagonalLinearOperator)
def _flat(operator: GGNDiagonalLinearOperator) -> Float[Array, " P"]:
    with jax.numpy_dtype_promotion("standard"):  # parameters may have several dtypes
        return ravel_pytree(operator.entries)[0]
