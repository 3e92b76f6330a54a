"""Sums, multiples and damping of blocks, which are blocks again."""

from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax.kronecker.algebra import (
    Block,
    Dense,
    Diagonal,
    Factor,
    Kronecker,
    Spectral,
    diagonal_of,
    inner,
    is_diagonal,
    norm_of_sum,
    normalise,
)
from ggn_jax.kronecker.functions import MAX_DENSE_ROWS, MatrixFunction, Spectrum, apply_function, spectra
from ggn_jax.kronecker.linalg import norm
from ggn_jax.kronecker.pairs import PairInverse, invert_pairs

Summand = Block | MatrixFunction | PairInverse
Function = Literal["inverse", "solve", "root"]


class Sum(eqx.Module):
    """`sum_i part_i + damping I`."""

    summands: tuple[Summand, ...]
    damping: Float[Array, " G"]

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        products = [part.mv(m) for part in self.summands]
        return sum(products, start=self.damping[:, None, None] * m)

    def diagonal(self) -> Float[Array, "G d"]:
        diagonals = [part.diagonal().reshape(len(self.damping), -1) for part in self.summands]
        return sum(diagonals, start=jnp.broadcast_to(self.damping[:, None], diagonals[0].shape))

    def traces(self) -> Float[Array, " G"]:
        traces = [part.traces() for part in self.summands]
        return sum(traces, start=self.damping * size_of(self.summands[0]))

    def norms(self) -> Float[Array, " G"]:
        if len({shape_of(part) for part in self.summands}) > 1:
            return norm(matrix_of(self), (1, 2))
        groups, out, inputs = shape_of(self.summands[0])
        ones = jnp.ones((groups, inputs), self.damping.dtype)
        identity = Kronecker((ones,), (jnp.broadcast_to(self.damping[:, None], (groups, out)),))
        forms = [form for part in (*self.summands, identity) for form in _with_cheap_inner(part)]
        sizes = jnp.stack([form.norms() for form in forms], axis=1)
        forms = [_normalised(form) for form in forms]
        products = [jnp.stack([_inner(x, y) for y in forms], axis=1) for x in forms]
        return norm_of_sum(sizes, jnp.stack(products, axis=1))


AnyBlock = Summand | Sum


def add(x: AnyBlock, y: AnyBlock) -> AnyBlock:
    """The sum of two blocks of the same entries."""
    if isinstance(x, Diagonal) and isinstance(y, Diagonal):
        return Diagonal(x.values + y.values)
    summands, total = list(_summands(x)), _damping(x) + _damping(y)
    for part in _summands(y):
        for i, own in enumerate(summands):
            joined = _merge(own, part)
            if joined is not None:
                summands[i] = joined
                break
        else:
            summands.append(part)
    is_damped = isinstance(x, Sum) or isinstance(y, Sum)
    return summands[0] if len(summands) == 1 and not is_damped else Sum(tuple(summands), total)


def damp(block: AnyBlock, damping: Float[Array, "G *d"]) -> AnyBlock:
    """`block + damping I`; a diagonal block may have a number for each entry."""
    damping = damping.astype(_damping(block).dtype)
    if isinstance(block, Diagonal):
        return Diagonal(block.values + (damping if damping.ndim == 2 else damping[:, None]))
    return Sum(_summands(block), _damping(block) + damping)


def scale(block: AnyBlock, by: Float[Array, ""]) -> AnyBlock:
    """`by * block` for a number of at least 0."""
    by = by.astype(_damping(block).dtype)
    if isinstance(block, Sum):
        return Sum(tuple(_scale(part, by) for part in block.summands), by * block.damping)
    return _scale(block, by)


def _scale(block: Summand, by: Float[Array, ""]) -> Summand:
    if isinstance(block, Kronecker):
        return Kronecker(block.a, tuple(by * b for b in block.b))
    if isinstance(block, Dense):
        return Dense(by * block.matrix)
    if isinstance(block, MatrixFunction):
        return block.map("multiple", jnp.broadcast_to(by, block.la.shape[:1]))
    if isinstance(block, PairInverse):
        return block.scaled(by)
    return block.replace_values(by * block.values)


def _merge(x: Summand, y: Summand) -> Summand | None:
    """The sum as one block of the same kind, if there is one."""
    if isinstance(x, Kronecker) and isinstance(y, Kronecker):
        return Kronecker(x.a + y.a, x.b + y.b)
    if isinstance(x, Dense) and isinstance(y, Dense):
        return Dense(x.matrix + y.matrix)
    return None


def _summands(block: AnyBlock) -> tuple[Summand, ...]:
    return block.summands if isinstance(block, Sum) else (block,)


def _damping(block: AnyBlock) -> Float[Array, " G"]:
    if isinstance(block, Sum):
        return block.damping
    leaf = jax.tree.leaves(block)[0]
    return jnp.zeros(leaf.shape[:1], leaf.dtype)


def shape_of(block: AnyBlock) -> tuple[int, int, int]:
    """`[G, out, in]` of the matrices that it acts on, or `[G, 1, d]` if it only knows them flattened."""
    if isinstance(block, Sum):
        return shape_of(block.summands[0])
    if isinstance(block, Kronecker):
        return len(block.a[0]), block.b[0].shape[1], block.a[0].shape[1]
    if isinstance(block, MatrixFunction):
        return len(block.la), block.lb.shape[1], block.la.shape[1]
    if isinstance(block, Spectral | PairInverse):
        groups, out, inputs = (block.congruence if isinstance(block, PairInverse) else block).values.shape
        return groups, out, inputs
    groups, size = block.diagonal().shape
    return groups, 1, size


def size_of(block: AnyBlock) -> int:
    """The number of rows of its matrix."""
    _, out, inputs = shape_of(block)
    return out * inputs


def matrix_of(block: AnyBlock) -> Float[Array, "G d d"]:
    """The dense matrix of each group, on row-major `[out, in]`."""
    if isinstance(block, Dense):
        return block.matrix
    if isinstance(block, Kronecker):
        return block.matrix()
    groups, out, inputs = shape_of(block)
    eye = jnp.eye(out * inputs, dtype=_damping(block).dtype).reshape(-1, out, inputs)
    columns = jax.vmap(lambda e: block.mv(jnp.broadcast_to(e[None], (groups, out, inputs))))(eye)
    return jnp.swapaxes(columns.reshape(-1, groups, out * inputs), 0, 1)


def is_representable(block: AnyBlock) -> bool:
    """Whether functions of the block can be computed."""
    return size_of(block) <= MAX_DENSE_ROWS or not (
        len(_summands(block)) > 1 or isinstance(_summands(block)[0], PairInverse)
    )


def kronecker_terms(block: AnyBlock) -> Kronecker | None:
    """The Kronecker terms of a sum of several (and damping), if it has too many rows to be decomposed as a matrix."""
    summands = _summands(block)
    several = len(summands) == 1 and isinstance(summands[0], Kronecker) and len(summands[0].a) > 1
    return summands[0] if several and size_of(block) > MAX_DENSE_ROWS else None  # type: ignore[return-value]


def is_exact(block: AnyBlock, function: Function, damped: bool) -> bool:
    """Whether a function of the block is exact, and not that of a nearby block."""
    terms = kronecker_terms(block)
    pair = terms is not None and len(terms.a) == 2 and not damped and not isinstance(block, Sum)
    return terms is None or function == "solve" or (function == "inverse" and pair)


def pair_inverses(blocks: Sequence[AnyBlock], dampings: Sequence[Float[Array, " G"]]) -> list[PairInverse]:
    """The inverses of blocks that have `kronecker_terms`, with their own and this damping in the factors."""
    terms = [kronecker_terms(block) for block in blocks]
    totals = [_damping(block) + d.astype(_damping(block).dtype) for block, d in zip(blocks, dampings, strict=True)]
    return invert_pairs([found for found in terms if found is not None], totals)


def spectra_of(blocks: Sequence[AnyBlock]) -> list[Spectrum]:
    """`spectra`, also of sums. Damping shifts eigenvalues, so it is applied to the spectrum of the undamped block."""

    def undamped(block: AnyBlock) -> Any:
        summands = _summands(block)
        if len(summands) > 1 or isinstance(summands[0], PairInverse):
            return Dense(matrix_of(Sum(summands, 0 * _damping(block))))
        return summands[0]

    found = spectra([undamped(block) for block in blocks])
    return [
        apply_function(spectrum, block.damping, "shift") if isinstance(block, Sum) else spectrum
        for block, spectrum in zip(blocks, found, strict=True)
    ]


# Inner products.


def _with_cheap_inner(part: Summand) -> list[Kronecker | Spectral]:
    """The summand as a sum of forms whose inner products are cheap: Kronecker products and eigendecompositions."""
    if isinstance(part, Kronecker):
        return [Kronecker((a,), (b,)) for a, b in zip(part.a, part.b, strict=True)]
    if isinstance(part, MatrixFunction):
        return [Spectral(part.qa, part.qb, part.values)]
    if isinstance(part, Spectral | PairInverse):
        return [part.spectral() if isinstance(part, PairInverse) else part]
    own = part.matrix if isinstance(part, Dense) else part.values
    return [Kronecker((own,), (jnp.ones((len(own), 1), own.dtype),))]


def _normalised(form: Kronecker | Spectral) -> Any:
    """The form divided by its norm."""
    if isinstance(form, Kronecker):
        return Kronecker(tuple(normalise(form.a)[0]), tuple(normalise(form.b)[0]))
    size = form.norms()
    return form.replace_values(form.values / jnp.where(size > 0, size, 1)[:, None, None])


def _inner(x: Kronecker | Spectral, y: Kronecker | Spectral) -> Float[Array, " G"]:
    if isinstance(x, Kronecker) and isinstance(y, Kronecker):
        return inner(x.a[0], y.a[0]) * inner(x.b[0], y.b[0])
    if isinstance(x, Kronecker):
        return _inner(y, x)
    if isinstance(y, Kronecker):
        a, b = _diagonal_in(y.a[0], x.qa), _diagonal_in(y.b[0], x.qb)
        return jnp.einsum("goi,go,gi->g", x.values, b, a)
    right, left = _overlap(x.qa, y.qa), _overlap(x.qb, y.qb)
    values = x.values if left is None else jnp.einsum("gop,goi->gpi", left, x.values)
    values = values if right is None else jnp.einsum("gij,goi->goj", right, values)
    return jnp.sum(values * y.values, axis=(1, 2))


def _diagonal_in(factor: Factor, q: Float[Array, "G d d"] | None) -> Float[Array, "G d"]:
    """The diagonal of `Q^T X Q`."""
    if q is None:
        return diagonal_of(factor)
    if is_diagonal(factor):
        return jnp.einsum("gki,gk->gi", q**2, factor)
    return jnp.einsum("gki,gkl,gli->gi", q, factor, q)


def _overlap(x: Array | None, y: Array | None) -> Float[Array, "G d d"] | None:
    """`(Q_x^T Q_y)^2`, entry by entry; None where that is the identity."""
    if x is None:
        return None if y is None else y**2
    return (jnp.swapaxes(x, 1, 2) if y is None else jnp.einsum("gki,gkj->gij", x, y)) ** 2
