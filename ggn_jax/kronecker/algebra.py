"""Blocks of a curvature matrix: Kronecker products, their eigendecompositions, and small dense or diagonal ones.

A block acts on matrices `[G, out, in]` of parameter entries. Factors are symmetric, `[G, d, d]`, or diagonal, `[G, d]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ggn_jax._fusion import largest
from ggn_jax.kronecker.inverse import inverse_by_cholesky

Factor = Float[Array, "G d *d"]


def is_diagonal(factor: Factor) -> bool:
    return factor.ndim == 2


def diagonal_of(factor: Factor) -> Float[Array, "G d"]:
    return factor if is_diagonal(factor) else jnp.diagonal(factor, axis1=1, axis2=2)


def dense(factor: Factor) -> Float[Array, "G d d"]:
    return jax.vmap(jnp.diag)(factor) if is_diagonal(factor) else factor


def multiply(b: Factor, m: Float[Array, "G out in"], a: Factor) -> Float[Array, "G out in"]:
    """`B M A` for each group."""
    m = b[:, :, None] * m if is_diagonal(b) else jnp.einsum("gop,gpi->goi", b, m)
    return m * a[:, None, :] if is_diagonal(a) else jnp.einsum("goj,gji->goi", m, a)


def inner(x: Factor, y: Factor) -> Float[Array, ""]:
    """The sum of the entries' products, over groups too."""
    if is_diagonal(x) or is_diagonal(y):
        return jnp.sum(diagonal_of(x) * diagonal_of(y))
    return jnp.sum(x * y)


def combine(factors: Sequence[Factor], weights: Array) -> Factor:
    """`sum_i weights[i] factors[i]`."""
    if not all(map(is_diagonal, factors)):
        factors = [dense(factor) for factor in factors]
    return sum((w * factor for w, factor in zip(weights, factors, strict=True)), start=jnp.zeros_like(factors[0]))


class Kronecker(eqx.Module):
    """`sum_t B_t (x) A_t`, one term per use of a weight."""

    a: tuple[Factor, ...]
    b: tuple[Factor, ...]

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        products = [multiply(b, m, a) for a, b in zip(self.a, self.b, strict=True)]
        return sum(products[1:], start=products[0])

    def trace(self) -> Float[Array, ""]:
        return sum(
            (
                jnp.sum(jnp.sum(diagonal_of(a), 1) * jnp.sum(diagonal_of(b), 1))
                for a, b in zip(self.a, self.b, strict=True)
            ),
            start=jnp.zeros((), self.a[0].dtype),
        )

    def squared_norm(self) -> Float[Array, ""]:
        def per_group(x: Factor, y: Factor) -> Array:
            return jax.vmap(lambda x, y: inner(x[None], y[None]))(x, y)

        pairs = [(s, t) for s in range(len(self.a)) for t in range(len(self.a))]
        return sum(
            (jnp.sum(per_group(self.a[s], self.a[t]) * per_group(self.b[s], self.b[t])) for s, t in pairs),
            start=jnp.zeros((), self.a[0].dtype),
        )

    def diagonal(self) -> Float[Array, "G out in"]:
        terms = zip(self.a, self.b, strict=True)
        products = [diagonal_of(b)[:, :, None] * diagonal_of(a)[:, None, :] for a, b in terms]
        return sum(products[1:], start=products[0])

    def nearest(self) -> "Kronecker":
        """The nearest single Kronecker product in Frobenius norm, for each group (Van Loan & Pitsianis 1993).

        Factors of positive semi-definite terms have inner products of at least 0, so the leading pair of the Gram
        matrices has no negative weight, and the result is positive semi-definite.
        """
        if len(self.a) == 1:
            return self

        def one(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, Array]:
            a, b = tuple(x[None] for x in a), tuple(x[None] for x in b)
            gram_a = jnp.stack([jnp.stack([inner(x, y) for y in a]) for x in a])
            gram_b = jnp.stack([jnp.stack([inner(x, y) for y in b]) for x in b])
            values, vectors = jnp.linalg.eigh(gram_a)
            root = (vectors * jnp.sqrt(jnp.maximum(values, 0))[None]) @ vectors.T
            # B = sum_i p_i B_i is the leading left singular vector of sum_i vec(B_i) vec(A_i)^T; for it, A is best.
            p = jnp.abs(root @ jnp.linalg.eigh(root @ gram_b @ root)[1][:, -1])
            q = gram_b @ p
            norm = p @ q
            return combine(a, jnp.where(norm > 0, q / jnp.where(norm > 0, norm, 1), 0))[0], combine(b, p)[0]

        a, b = one_by_one(one, self.a, self.b)
        return Kronecker((a,), (b,))


class Spectral(eqx.Module):
    """`(Q_B (x) Q_A) diag(values) (Q_B (x) Q_A)^T` with orthogonal `Q`; None stands for the identity."""

    qa: Float[Array, "G in in"] | None
    qb: Float[Array, "G out out"] | None
    values: Float[Array, "G out in"]

    def rotate(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        """`Q_B^T M Q_A`."""
        m = m if self.qb is None else jnp.einsum("gpo,gpi->goi", self.qb, m)
        return m if self.qa is None else jnp.einsum("goj,gji->goi", m, self.qa)

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        m = self.values * self.rotate(m)
        m = m if self.qb is None else jnp.einsum("gop,gpi->goi", self.qb, m)
        return m if self.qa is None else jnp.einsum("goj,gij->goi", m, self.qa)

    def map(self, fn: Callable[[Array], Array]) -> "Spectral":
        """The same function of all eigenvalues; negative ones, which rounding gives, count as 0."""
        return self.replace_values(fn(jnp.maximum(self.values, 0)))

    def replace_values(self, values: Float[Array, "G out in"]) -> "Spectral":
        return Spectral(self.qa, self.qb, values)

    def trace(self) -> Float[Array, ""]:
        return jnp.sum(self.values)

    def squared_norm(self) -> Float[Array, ""]:
        return jnp.sum(self.values**2)

    def diagonal(self) -> Float[Array, "G out in"]:
        m = self.values if self.qb is None else jnp.einsum("gop,gpi->goi", self.qb**2, self.values)
        return m if self.qa is None else jnp.einsum("goj,gij->goi", m, self.qa**2)


class Dense(eqx.Module):
    """For each group, a symmetric matrix over the entries."""

    matrix: Float[Array, "G d d"]

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        return jnp.einsum("gij,gj->gi", self.matrix, m.reshape(m.shape[0], -1)).reshape(m.shape)

    def trace(self) -> Float[Array, ""]:
        return jnp.sum(self.diagonal())

    def squared_norm(self) -> Float[Array, ""]:
        return jnp.sum(self.matrix**2)

    def diagonal(self) -> Float[Array, "G d"]:
        return jnp.diagonal(self.matrix, axis1=1, axis2=2)


class DenseSpectral(eqx.Module):
    """For each group, a symmetric matrix over the entries, by its eigendecomposition."""

    q: Float[Array, "G d d"]
    values: Float[Array, "G d"]

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        rotated = self.values * jnp.einsum("gij,gi->gj", self.q, m.reshape(m.shape[0], -1))
        return jnp.einsum("gij,gj->gi", self.q, rotated).reshape(m.shape)

    def map(self, fn: Callable[[Array], Array]) -> "DenseSpectral":
        return DenseSpectral(self.q, fn(jnp.maximum(self.values, 0)))

    def trace(self) -> Float[Array, ""]:
        return jnp.sum(self.values)

    def squared_norm(self) -> Float[Array, ""]:
        return jnp.sum(self.values**2)

    def diagonal(self) -> Float[Array, "G d"]:
        return jnp.einsum("gij,gj->gi", self.q**2, self.values)


class Diagonal(eqx.Module):
    """For each group, a diagonal matrix over the entries."""

    values: Float[Array, "G d"]

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        return (self.values * m.reshape(m.shape[0], -1)).reshape(m.shape)

    def map(self, fn: Callable[[Array], Array]) -> "Diagonal":
        return Diagonal(fn(jnp.maximum(self.values, 0)))

    def trace(self) -> Float[Array, ""]:
        return jnp.sum(self.values)

    def squared_norm(self) -> Float[Array, ""]:
        return jnp.sum(self.values**2)

    def diagonal(self) -> Float[Array, "G d"]:
        return self.values


Block = Kronecker | Spectral | Dense | DenseSpectral | Diagonal


def finite_groups(block: Block) -> Bool[Array, " G"]:
    """For each group, whether there is no NaN and no infinity."""
    leaves = jax.tree.leaves(block)
    return jnp.all(jnp.stack([jnp.isfinite(largest(leaf, range(1, leaf.ndim))) for leaf in leaves]), axis=0)


def one_by_one(fn: Callable[..., PyTree[Array]], *stacks: PyTree[Array]) -> PyTree[Array]:
    """`vmap(fn)(*stacks)`; on CPUs in a loop.

    There, LAPACK calls of a batch share XLA's threads, and with jaxlib 0.10 two such calls at a time wait for each
    other for ever on a machine of two cores. A loop takes about as long.
    """

    def loop(*stacks: PyTree[Array]) -> PyTree[Array]:
        return jax.lax.map(lambda members: fn(*members), stacks)

    # An outer `vmap` would make batches of them again.
    sequential = jax.custom_batching.sequential_vmap(loop)
    return jax.lax.platform_dependent(*stacks, cpu=sequential, default=jax.vmap(fn))


def batched(fn: Callable[[Array], tuple[Array, ...]], matrices: Sequence[Float[Array, "G d d"]]) -> list[Any]:
    """`fn` of each matrix `[d, d]`, batched over all matrices of one size."""
    results: list[Any] = [None] * len(matrices)
    sizes = dict.fromkeys((matrix.shape[1], matrix.dtype) for matrix in matrices)
    for size in sizes:
        members = [i for i, matrix in enumerate(matrices) if (matrix.shape[1], matrix.dtype) == size]
        stacked = one_by_one(fn, jnp.concatenate([matrices[i] for i in members]))
        start = 0
        for i in members:
            stop = start + matrices[i].shape[0]
            results[i] = tuple(part[start:stop] for part in stacked)
            start = stop
    return results


Batch = Callable[[Callable[[Array], tuple[Array, ...]], Sequence[Array]], list[Any]]  # `batched`, or another like it


def decompose(blocks: Sequence[Block], batch: Batch = batched) -> list[Spectral | DenseSpectral | Diagonal]:
    """All blocks by their eigendecompositions; sums of Kronecker terms by the nearest single one's."""
    nearest = [block.nearest() if isinstance(block, Kronecker) else block for block in blocks]
    wanted = []
    for block in nearest:
        if isinstance(block, Kronecker):
            wanted += [factor for factor in (block.a[0], block.b[0]) if not is_diagonal(factor)]
        elif isinstance(block, Dense):
            wanted.append(block.matrix)
    found = iter(batch(lambda x: tuple(jnp.linalg.eigh(x)), wanted))

    def one(block: Block) -> Spectral | DenseSpectral | Diagonal:
        if isinstance(block, Kronecker):
            pairs = [(f, None) if is_diagonal(f) else next(found) for f in (block.a[0], block.b[0])]
            (la, qa), (lb, qb) = pairs
            return Spectral(qa, qb, jnp.maximum(lb, 0)[:, :, None] * jnp.maximum(la, 0)[:, None, :])
        if isinstance(block, Dense):
            values, q = next(found)
            return DenseSpectral(q, values)
        return block

    return [one(block) for block in nearest]


def invert_heuristically(blocks: Sequence[Block], damping: Array, batch: Batch = batched) -> list[Block]:
    """Inverses with the damping split over both factors (Martens & Grosse 2015, section 6.3).

    `pi = sqrt((tr A / d_A) / (tr B / d_B))`; `(A + pi sqrt(damping) I)^-1` and `(B + sqrt(damping) / pi I)^-1`.
    """
    damped: list[tuple[Factor, Factor]] = []
    for block in blocks:
        if isinstance(block, Kronecker):
            near = block.nearest()
            a, b = near.a[0], near.b[0]
            mean_a, mean_b = (jnp.mean(diagonal_of(factor), axis=1) for factor in (a, b))
            usable = (mean_a > 0) & (mean_b > 0)
            pi = jnp.where(usable, jnp.sqrt(jnp.where(usable, mean_a, 1) / jnp.where(usable, mean_b, 1)), 1)
            root = jnp.sqrt(damping).astype(pi.dtype)
            damped.append((_shift(a, pi * root), _shift(b, root / pi)))
    dense_ones = [factor for pair in damped for factor in pair if not is_diagonal(factor)]
    found = iter(batch(lambda x: (inverse_by_cholesky(x),), dense_ones))
    pairs = iter([tuple(1 / f if is_diagonal(f) else next(found)[0] for f in pair) for pair in damped])

    rest = iter(decompose([block for block in blocks if not isinstance(block, Kronecker)], batch))
    result: list[Block] = []
    for block in blocks:
        if isinstance(block, Kronecker):
            a, b = next(pairs)
            result.append(Kronecker((a,), (b,)))
        else:
            result.append(next(rest).map(lambda values: 1 / (values + damping.astype(values.dtype))))
    return result


def _shift(factor: Factor, by: Float[Array, " G"]) -> Factor:
    if is_diagonal(factor):
        return factor + by[:, None]
    return factor + by[:, None, None] * jnp.eye(factor.shape[1], dtype=factor.dtype)[None]
