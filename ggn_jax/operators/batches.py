"""Sums over an iterable of batches, each checked against the first one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import are_known, compute_dtype
from ggn_jax._unbatched import batched_leaves
from ggn_jax.joint import JointLoss
from ggn_jax.operators.base import structure_of
from ggn_jax.operators.examples import as_batch, unpack_batch
from ggn_jax.operators.loaders import without_copies
from ggn_jax.operators.problem import Problem
from ggn_jax.terms import check_values

Sums = Callable[[PyTree[Array], Array | None, Any, int], tuple[Problem, PyTree[Array]]]
"""From a batch's inputs, targets and mask, and the number of examples before it, to its problem and its summands."""


def check_iterable(batches: Any, again: str = "") -> None:
    """Refuse what is not an iterable; and an iterator, if `again` says what goes over the batches several times."""
    if not isinstance(batches, Iterable):
        way_out = ": pass what it returns, as a list or a loader" if callable(batches) else ""
        raise TypeError(f"batches must be an iterable of (inputs, targets); got {type(batches).__name__}{way_out}.")
    if again and isinstance(batches, Iterator):
        raise TypeError(
            f"{again}, but {type(batches).__name__} is an iterator that is empty after one pass: pass a list, or a"
            " loader that can be iterated again."
        )


def no_batches(batches: Any, again: bool = False) -> ValueError:
    """The error for an iterable that yielded no batch; `again` if it did in an earlier pass."""
    if again:
        name = type(batches).__name__
        return ValueError(
            f"batches yielded none in a later pass; {name} is empty then: pass a list, or a loader that can be iterated"
            " again."
        )
    used = ", as an iterator does that was used before" if isinstance(batches, Iterator) else ""
    return ValueError(f"batches must yield at least one batch; {type(batches).__name__} yielded none{used}.")


def refuse_mask(mask: Any) -> None:
    """Refuse a mask, where there are no Kronecker factors."""
    if mask is not None:
        raise ValueError("a mask is for Kronecker factors, and is not used here: leave it out.")


def check_on_host(vectors: PyTree[Any]) -> None:
    """Refuse vectors without values, as under `jit`, for products that go over batches."""
    if not are_known(vectors):
        raise NotImplementedError(
            "products over batches are made on the host, not inside of jit, where lineax's solvers and matfree's"
            " estimators call them: use scipy.sparse.linalg with operator.to_scipy(), or one batch with chunk_size."
        )


class CachedByShapes:
    """A cache of `make(inputs, targets)` by the batch's shapes: what it makes is compiled once for each of these."""

    def __init__(self, make: Callable[[PyTree, Any], Any]):
        self._make = make
        self._made: dict[Any, Any] = {}
        self.first: Any = None
        """The result for the first batch."""

    def of(self, inputs: PyTree[Array], targets: Any) -> Any:
        """The result for the first batch of these shapes."""
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves((inputs, targets)))
        key = jax.tree.structure((inputs, targets)), shapes
        if key not in self._made:
            self._made[key] = self._make(inputs, targets)
            self.first = next(iter(self._made.values()))
        return self._made[key]


def with_batch(made: Problem, inputs: PyTree[Array], targets: Any, *, check: bool) -> Problem:
    """The problem with another batch of the same shapes; `check` checks the values of its targets."""
    if targets is None:
        targets = made.targets  # stand-ins, which have no meaning
    elif check:
        check_values(made.loss, made.outputs, targets, True)
    found: Problem = eqx.tree_at(lambda p: (p.inputs, p.targets), made, (inputs, targets))
    return found


def example_marks(inputs: PyTree[Array], targets: PyTree[Array]) -> Float[Array, "N arrays"]:
    """Numbers that tell examples apart: for each array, a weighted sum over an example's entries."""
    arrays = batched_leaves(inputs) + jax.tree.leaves(targets)

    def per_example(x: Array) -> Array:
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        parts = (x.real, x.imag) if jnp.issubdtype(x.dtype, jnp.complexfloating) else (x,)
        rows = jnp.concatenate([part.reshape(len(x), -1).astype(jnp.float32) for part in parts], axis=1)
        return rows @ jnp.cos(jnp.arange(rows.shape[1], dtype=jnp.float32))

    return jnp.stack([per_example(x) for x in arrays], axis=1)


def fingerprint(inputs: PyTree[Array], targets: PyTree[Array]) -> Float[Array, " n"]:
    """Sums over examples that tell data apart, in any order: their number, their marks, and a function of all marks."""
    found = example_marks(inputs, targets)
    sums = jnp.sum(jnp.abs(found), axis=0), jnp.sum(jnp.cos(jnp.sum(found, axis=1)) + 2)
    return jnp.stack([jnp.asarray(len(found), jnp.float32), *sums[0], sums[1]])


def same_data(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether sums of marks are those of the same data; in another order, they differ by rounding."""
    return one.shape == two.shape and np.allclose(one, two, rtol=1e-3, equal_nan=True)


DIFFERENT_DATA = (
    "two passes over the batches gave different data: switch off what draws data again (random crops, sampling with"
    " replacement, dropping the last batch of a shuffled loader)."
)


def sum_batches(batches: Iterable[Any], sums: Sums) -> tuple[Problem | None, PyTree[Array], int]:
    """The first batch's problem, the sums over all, and the number of examples. Errors name the batch."""
    first: Problem | None = None
    total, count = None, 0
    for number, batch in enumerate(batches):
        inputs = None
        pair, mask = unpack_batch(
            f"batch {number}", batch, " One is [batch]; ggn_jax.map_batches makes pairs of others."
        )
        try:
            inputs, targets, size = as_batch(without_copies(pair))
            if first is not None:
                _check_like(inputs, first.inputs)
            problem, more = sums(inputs, targets, without_copies(mask), count)
            if first is not None and structure_of(more) != structure_of(total):
                raise ValueError("the model's layers differ from those of batch 0.")
        except (TypeError, ValueError, NotImplementedError) as error:
            if type(error) not in (TypeError, ValueError, NotImplementedError):
                raise  # a subclass, which may take other arguments than a message
            raise type(error)(f"batch {number}: {error}{_sizes(inputs, first)}") from error
        first = first or problem
        total = more if total is None else jax.tree.map(jnp.add, total, more)
        count += size
    return first, total, count


def _check_like(inputs: PyTree[Array], first: PyTree[Array]) -> None:
    """Refuse inputs of another structure, rank or dtype than the first batch's; their sizes may differ."""
    if jax.tree.structure(inputs) != jax.tree.structure(first):  # type: ignore[operator]  # untyped in jaxlib
        raise ValueError(
            f"inputs must be like batch 0's, {jax.tree.structure(first)}; got {jax.tree.structure(inputs)}."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(inputs), jax.tree.leaves(first), strict=True)
    for (path, leaf), like in pairs:
        if leaf.ndim != like.ndim or leaf.dtype != like.dtype:
            raise ValueError(
                f"inputs{jax.tree_util.keystr(path)} must be like batch 0's, {like.dtype} of shape {like.shape} but for"
                f" sizes; got {leaf.dtype} of shape {leaf.shape}."
            )


def _sizes(inputs: PyTree[Array] | None, first: Problem | None) -> str:
    """A hint for errors, if sizes differ from those of the first batch."""
    if inputs is None or first is None:
        return ""
    pairs = zip(jax.tree_util.tree_leaves_with_path(inputs), jax.tree.leaves(first.inputs), strict=False)
    differ = [
        f"inputs{jax.tree_util.keystr(path)} {leaf.shape}, for batch 0 {like.shape}"
        for (path, leaf), like in pairs
        if leaf.shape[1:] != like.shape[1:]
    ]
    return f" Its sizes differ: {'; '.join(differ)}." if differ else ""


def with_progress(batches: Iterable[Any], progress: bool, description: str) -> Iterable[Any]:
    """`batches`, with a progress bar if one is asked for."""
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("progress=True shows its bar with tqdm: pip install tqdm, or leave it out.") from error
    return tqdm(batches, desc=description, unit="batch")


def check_unbatched(problem: Problem) -> None:
    """Refuse a loss with options for each example, which cannot be used for several batches."""
    output = jax.ShapeDtypeStruct(problem.outputs.shape[1:], problem.outputs.dtype)
    # Not the first one: JAX refuses to slice an axis that is sharded explicitly.
    target = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), problem.targets)
    if isinstance(problem.loss, JointLoss) and problem.loss.reduction != "sum":
        raise NotImplementedError(
            "a JointLoss of several batches needs losses with reduction='sum', since means of different terms have no"
            " common denominator: divide by the number of examples in its weights, or pass all data as one batch, with"
            " chunk_size to bound the memory."
        )
    try:
        problem.loss.check_shapes(output, target, False)
    except ValueError as error:
        raise ValueError(
            f"the loss must be the same for each batch, but holds something for each example of one ({error}). Pass all"
            " data as one batch, with chunk_size to bound the memory."
        ) from None


def without_reduction(tree: PyTree[Array], r: Array) -> PyTree[Array]:
    """Divide by a batch's reduction what is proportional to it, in at least float32: then it can be added up."""

    def divided(x: Array) -> Array:
        x = x.astype(compute_dtype(x.dtype))
        return jnp.where(jnp.isinf(r), 0, x / r.astype(x.dtype))  # if no term counts, r is infinite and x is 0

    return jax.tree.map(divided, tree)


def with_reduction(reduction: str, total: PyTree[Array], divisor: Array, dtypes: PyTree[Any]) -> PyTree[Array]:
    """Apply the reduction of all batches; `divisor` is the sum of their `1 / r`."""
    if reduction == "mean":
        total = jax.tree.map(lambda x: jnp.where(divisor == 0, 0, x / divisor.astype(x.dtype)), total)
    return jax.tree.map(lambda x, dtype: x.astype(dtype), total, dtypes)
