"""Kronecker-factored approximations of the generalized Gauss-Newton matrix."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, Literal, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import is_concrete
from ggn_jax._supported import check_exact
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block, decompose, invert_heuristically
from ggn_jax.kronecker.checks import check_draws, check_independent, check_mask
from ggn_jax.kronecker.factors import assemble, batch_sums, compute_blocks, eigenbases, reduce_sums
from ggn_jax.kronecker.layout import (
    Bias,
    Blocks,
    OnUncovered,
    Options,
    Sharing,
    Small,
    Tied,
    multiply,
    shape_of,
    structure,
    write,
)
from ggn_jax.kronecker.optimal import compute_optimal_blocks
from ggn_jax.kronecker.vectors import Positions
from ggn_jax.loss import Loss
from ggn_jax.operators.base import SymmetricLinearOperator, check_damping, check_vector, register, structure_of
from ggn_jax.operators.problem import Problem, pose


class BlockLinearOperator(SymmetricLinearOperator):
    """A block-diagonal positive semi-definite operator: a block per layer, and one per parameter that has no layer."""

    blocks: Blocks
    structure: Any = eqx.field(static=True)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        shapes, dtypes, tree = self.structure
        return jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in zip(shapes, dtypes, strict=True)])

    def mv(self, vector: PyTree[Any]) -> PyTree[Array]:
        """The product with `vector`, a pytree like the parameters."""
        check_vector(self, vector)
        return _mv(self, vector)

    def trace(self) -> Float[Array, ""]:
        """The trace."""
        return _sum([block.trace() for block in self.blocks.blocks])

    def frobenius_norm(self) -> Float[Array, ""]:
        """The Frobenius norm."""
        return jnp.sqrt(_sum([block.squared_norm() for block in self.blocks.blocks]))

    def diagonal(self) -> PyTree[Array]:
        """The diagonal, as a pytree like the parameters."""
        parts = [block.diagonal() for block in self.blocks.blocks]
        return write(self.blocks.places, self.structure, parts)

    def logdet(self, damping: Any = 0.0) -> Float[Array, ""]:
        """The logarithm of the determinant of `self + damping * I`; minus infinity where it is singular.

        Blocks that are a sum of Kronecker terms (tied weights) count as the nearest single one.
        """
        damping = check_damping(damping)
        blocks = decompose(self.blocks.blocks)
        logs = [jnp.sum(jnp.log(block.map(lambda x: x + damping.astype(x.dtype)).values)) for block in blocks]
        return _sum(logs)

    def det(self, damping: Any = 0.0) -> Float[Array, ""]:
        """The determinant of `self + damping * I`; `logdet` does not overflow."""
        return jnp.exp(self.logdet(damping))

    def inverse(self, damping: Any = 0.0, method: Literal["exact", "heuristic"] = "exact") -> "BlockLinearOperator":
        r"""The inverse of `self + damping * I`, an operator of the same kind and tagged positive semi-definite.

        `"exact"`: from the eigendecompositions of both factors, eigenvalues `1 / (l_A l_B + damping)`. `"heuristic"`:
        `(A + pi sqrt(damping) I)^-1` and `(B + sqrt(damping) / pi I)^-1` with `pi = sqrt((tr A / d_A) / (tr B / d_B))`
        (Martens & Grosse 2015, section 6.3), by Cholesky factorisations: cheaper, and not the inverse of the damped
        operator. Factors of one size are factorised in one call, in at least float32. A sum of Kronecker terms (tied
        weights) is inverted as the nearest single one.

        **Raises:** ValueError for a damping that is not a number of at least 0, or an unknown method;
        FloatingPointError, naming the parameters, where a block is singular or not finite (outside of `jit`; inside,
        its entries are NaN or infinite).
        """
        damping = check_damping(damping)
        if method not in ("exact", "heuristic"):
            raise ValueError(f"method must be 'exact' or 'heuristic'; got {method!r}.")
        result = _map_blocks(self, damping, "inverse" if method == "exact" else "heuristic")
        return _checked(result, f"inverse with damping {damping}")

    def solve(
        self, vector: PyTree[Any], damping: Any = 0.0, method: Literal["exact", "heuristic"] = "exact"
    ) -> PyTree[Array]:
        """`inverse(damping, method).mv(vector)`."""
        return self.inverse(damping, method).mv(vector)

    def sqrt(self, damping: Any = 0.0) -> "BlockLinearOperator":
        """The symmetric square root `R` of `self + damping * I`: `R R = self + damping * I`."""
        return _checked(_map_blocks(self, check_damping(damping), "sqrt"), "square root")

    def inverse_sqrt(self, damping: Any = 0.0) -> "BlockLinearOperator":
        """The inverse of `sqrt(damping)`: times white noise, it is a sample of the Laplace approximation."""
        return _checked(_map_blocks(self, check_damping(damping), "inverse_sqrt"), "inverse square root")

    def block(self, path: str) -> Float[Array, "d d"]:
        """The dense block of the layer that owns a parameter, as `B (x) A` on row-major `[out, in]`.

        A joint bias is one more input, the last column; groups follow each other on the diagonal. `path` is written as
        `jax.tree_util.keystr` does: `"['dense']['kernel']"`, or with `/`: `"dense/kernel"`.
        """
        found = {
            name: (block, shape_of(place))
            for name, block, place in zip(self._names(), self.blocks.blocks, self.blocks.places, strict=True)
            if path in (name, *place.names, *map(_simple, place.names))
        }
        if len(found) == 1:
            return _dense(*next(iter(found.values())))
        if found:
            names = ", ".join(map(repr, found))
            raise KeyError(f"{path!r} has entries in several blocks: pass one of {names}.")
        known = ", ".join(name for place in self.blocks.places for name in place.names)
        raise KeyError(f"no parameter {path!r}; there are {known}.")

    def factors(self) -> dict[str, Block]:
        """The blocks by the path of their first parameter, numbered where it has several: a pytree of arrays."""
        return dict(zip(self._names(), self.blocks.blocks, strict=True))

    def _names(self) -> list[str]:
        """A name for each block: the path of its first parameter, and `#1`, `#2`, ... where that has several."""
        firsts = [place.names[0] for place in self.blocks.places]
        return [
            f"{name}#{firsts[: i + 1].count(name)}" if firsts.count(name) > 1 else name for i, name in enumerate(firsts)
        ]


register(BlockLinearOperator, positive_semidefinite=True)


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

    The operator is a pytree: build it inside `jax.jit`, and average two of them with `jax.tree.map`.

    **Arguments:** `model_fn`, `loss`, `params`, `batch`, `chunk_size` as for `GGNLinearOperator`; `model_fn` is traced
    on one example and must treat examples independently; and

    - `fisher_type`: `"type-2"` (exact in the loss), `"mc"`, `"empirical"`, or `"forward-only"` (`B = I`).
    - `mc_samples`, `key`: for what is drawn: `"mc"`, and the signs of type-2.
    - `sharing`: `"expand"` treats sharing positions as separate data, `"reduce"` averages inputs and adds gradients
      first.
    - `bias`: `"joint"` makes it one more input of its layer, `"separate"` gives it the block `B`.
    - `tied`: `"sum"` of Kronecker terms, one per use; or `"concatenate"` the uses' positions.
    - `positions`: how type-2 treats outputs with several loss positions, such as tokens: `"signs"` back-propagates all
      of them together with independent random signs (unbiased; needs a key), `"exact"` one by one.
    - `mask`: `[N, *positions]`, true for real inputs: layers with these sharing positions leave the others out of `A`.
    - `on_uncovered`: `"error"`, or `"diagonal"` or `"full"` for the exact GGN diagonal or block of parameters that no
      layer covers.
    - `small`: `"full"` or `"diagonal"`: the exact block of scales and shifts.
    - `max_dense_size`: larger Kronecker factors, and larger blocks of uncovered parameters, are diagonal.
    - `max_small_size`: larger blocks of scales and shifts (a position embedding that is added, say) are diagonal.
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
        max_dense_size: int = Options.max_dense_size,
        max_small_size: int = Options.max_small_size,
        chunk_size: int | None = None,
        vector_chunk_size: int = Options.vector_chunk_size,
    ):
        problem = pose(model_fn, loss, params, batch, chunk_size)
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
        self._check(problem, options, chunk_size)
        keys = check_draws(problem, options, key, 0)
        mask = check_mask(mask, problem)
        if mask is not None and self._method == "kfoc":
            raise NotImplementedError("KFOC has no use for mask: leave it out, or use KFAC.")
        check_independent(problem.model_fn, problem.params, problem.inputs, problem.outputs.dtype)
        self.blocks = _compute(problem, keys, mask, options, self._method)
        self.structure = structure(problem.params)

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
        progress: bool = False,
        **options: Any,
    ) -> Self:
        """The operator of all data of an iterable of batches, as if they were one batch.

        `batches` yields `(inputs, targets)`, or `(inputs, targets, mask)`; they may differ in size, and a mean is over
        all their terms. What is drawn for a datum depends on its place in the whole, so that it does not matter how
        data are cut into batches. EKFAC goes over them twice, and wants an iterable that can be: a list, or a loader,
        but no generator. A function is compiled for each size of batch. `progress=True` shows a bar (needs tqdm);
        `options` are those of the constructor. Must be called outside of `jit` if `batches` are not arrays there.

        **Raises:** as the constructor; ValueError, naming the batch, for one that does not fit the first; for an
        iterable that is empty, or that differs between EKFAC's passes.

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
        made = Options(**options)
        operator = object.__new__(cls)
        if operator._method == "kfoc":
            raise NotImplementedError("KFOC is made of all data at once: use KFAC or EKFAC for several batches.")
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of (inputs, targets); got {type(batches).__name__}.")
        twice = operator._method == "ekfac"
        if twice and isinstance(batches, Iterator):
            raise TypeError(
                f"EKFAC goes over the batches twice, but {type(batches).__name__} is an iterator that is empty after"
                " one pass: pass a list, or a loader that starts anew."
            )

        def add_up(bases: Any, description: str) -> tuple[Problem, Any, int]:
            total, first, start = None, None, 0
            for number, batch in enumerate(_with_progress(batches, progress, description)):
                if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
                    raise TypeError(
                        f"batch {number} must be (inputs, targets) or (inputs, targets, mask);"
                        f" got {type(batch).__name__}."
                    )
                problem = pose(model_fn, loss, params, tuple(batch[:2]), chunk_size)
                if first is None:
                    first = problem
                    operator._check(problem, made, chunk_size)
                    check_independent(problem.model_fn, problem.params, problem.inputs, problem.outputs.dtype)
                keys = check_draws(problem, made, key, start)
                mask = check_mask(batch[2] if len(batch) == 3 else None, problem)
                sums = _batch_sums(problem, keys, mask, made, bases)
                if total is not None and structure_of(sums) != structure_of(total):
                    raise ValueError(
                        f"batch {number} has inputs {structure_of(problem.inputs)}, for which the model's layers are"
                        f" others than for those of batch 0, {structure_of(first.inputs)}."
                    )
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
                start += problem.targets.shape[0]
            if first is None:
                raise ValueError("batches must yield at least one batch; got none.")
            return first, total, start

        problem, total, seen = add_up(None, "factors")
        bases = corrections = None
        if twice:
            bases = _bases(problem, made, total)
            _, corrections, again = add_up(bases, "corrections")
            if again != seen:
                raise ValueError(
                    f"batches held {seen} data in the first pass and {again} in the second: EKFAC needs the same."
                )
        operator.__dict__["blocks"] = _finish(problem, made, total, bases, corrections)
        operator.__dict__["structure"] = structure(problem.params)
        return operator

    def _check(self, problem: Problem, options: Options, chunk_size: int | None) -> None:
        """Refuse what this operator cannot be made of."""
        if self._method != "kfac" and options.fisher_type is FisherType.FORWARD_ONLY:
            raise NotImplementedError(
                f"fisher_type 'forward-only' back-propagates nothing, but {self._method.upper()} is made of gradients:"
                " use KFACLinearOperator, or another fisher type."
            )
        for name in ("tied", "sharing"):
            if self._method == "kfoc" and getattr(options, name) != getattr(Options, name):
                raise NotImplementedError(
                    f"KFOC is nearest to the exact block, and has no use for {name}={getattr(options, name)!r}: leave"
                    " it out, or use KFAC."
                )
        if self._method == "kfoc" and chunk_size is not None:
            raise NotImplementedError(
                "KFOC's power iterations go over all data many times, and keep them: leave chunk_size out, or use KFAC."
            )
        if options.fisher_type is FisherType.TYPE2:
            check_exact(problem.loss)

    @property
    def _method(self) -> Literal["kfac", "ekfac", "kfoc"]:
        return "kfac"


class EKFACLinearOperator(KFACLinearOperator):
    r"""EKFAC: KFAC's eigenbases, with the GGN's own diagonal in them (George et al. 2018).

    `(Q_B (x) Q_A) diag(E) (Q_B (x) Q_A)^T` with `Q` the eigenvectors of KFAC's factors and
    `E = sum_{v,n} (Q_B^T (sum_s g a^T) Q_A)^2` from each datum's weight gradients: no other diagonal in this basis is
    nearer to the GGN's block in Frobenius norm, so it is never farther than KFAC's.

    **Arguments:** as for `KFACLinearOperator`; `"forward-only"` has no gradients to correct with and is refused.

    >>> import jax, jax.numpy as jnp, ggn_jax
    >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
    >>> loss = ggn_jax.CrossEntropyLoss()
    >>> ekfac = EKFACLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
    >>> ekfac.solve(params, damping=0.1)["w"].shape
    (2, 3)
    """

    @property
    def _method(self) -> Literal["kfac", "ekfac", "kfoc"]:
        return "ekfac"


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

    @property
    def _method(self) -> Literal["kfac", "ekfac", "kfoc"]:
        return "kfoc"


register(KFOCLinearOperator, positive_semidefinite=True)
register(KFACLinearOperator, positive_semidefinite=True)
register(EKFACLinearOperator, positive_semidefinite=True)


@eqx.filter_jit
def _compute(problem: Problem, keys: Any, mask: Any, options: Options, method: str) -> Blocks:
    if method == "kfoc":
        return compute_optimal_blocks(problem, keys, mask, options)
    return compute_blocks(problem, keys, mask, options, method == "ekfac")


_batch_sums = eqx.filter_jit(batch_sums)


@eqx.filter_jit
def _bases(problem: Problem, options: Options, total: dict[str, Any]) -> Any:
    return eigenbases(problem, options, reduce_sums(problem, total))


@eqx.filter_jit
def _finish(problem: Problem, options: Options, total: Any, bases: Any, corrections: Any) -> Blocks:
    if corrections is not None:
        corrections = reduce_sums(problem, corrections)
    return assemble(problem, options, reduce_sums(problem, total), bases, corrections)


def _with_progress(batches: Iterable[Any], progress: bool, description: str) -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("progress=True shows its bar with tqdm: pip install tqdm, or leave it out.") from error
    return tqdm(batches, desc=description, unit="batch")


@jax.jit
def _mv(operator: BlockLinearOperator, vector: PyTree[Array]) -> PyTree[Array]:
    return multiply(operator.blocks, operator.structure, vector)


def _sum(parts: list[Array]) -> Array:
    return jnp.sum(jnp.stack(parts))


def _dtype(block: Block) -> Any:
    return jax.tree.leaves(block)[0].dtype


@partial(jax.jit, static_argnames="what")
def _map_blocks(operator: BlockLinearOperator, damping: Array, what: str) -> BlockLinearOperator:
    if what == "heuristic":
        blocks: Any = invert_heuristically(operator.blocks.blocks, damping)
    else:
        fn = {"inverse": lambda x: 1 / x, "sqrt": jnp.sqrt, "inverse_sqrt": jax.lax.rsqrt}[what]
        blocks = [b.map(lambda x: fn(x + damping.astype(x.dtype))) for b in decompose(operator.blocks.blocks)]
    return _with_blocks(operator, blocks)


def _with_blocks(operator: BlockLinearOperator, blocks: Any) -> BlockLinearOperator:
    new = object.__new__(BlockLinearOperator)
    object.__setattr__(new, "blocks", Blocks(tuple(blocks), operator.blocks.places))
    object.__setattr__(new, "structure", operator.structure)
    return new


def _checked(operator: BlockLinearOperator, what: str) -> BlockLinearOperator:
    """`operator`, unless a block is not finite where that can be looked at."""
    leaves = jax.tree.leaves(operator.blocks.blocks)
    if all(is_concrete(leaf) for leaf in leaves):
        for block, place in zip(operator.blocks.blocks, operator.blocks.places, strict=True):
            if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(block)):
                raise FloatingPointError(
                    f"the {what} of the block of {', '.join(place.names)} is not finite: it is singular, or holds NaN."
                    " Use a larger damping, or look at the model's outputs."
                )
    return operator


def _dense(block: Block, shape: tuple[int, int, int]) -> Float[Array, "d d"]:
    size = math.prod(shape)
    dtype = _dtype(block)
    return jax.lax.map(lambda e: block.mv(e.reshape(shape)).reshape(-1), jnp.eye(size, dtype=dtype), batch_size=32)


def _simple(name: str) -> str:
    """`a/0/b` for `['a'][0].b`."""
    parts = re.findall(r"\['(.*?)'\]|\[(.*?)\]|\.(\w+)", name)
    return "/".join(next(filter(None, part), "") for part in parts)
