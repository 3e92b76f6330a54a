"""Blocks of a curvature matrix: Kronecker products, their eigendecompositions, and dense or diagonal matrices.

A block acts on matrices `[G, out, in]` of parameter entries. Factors are symmetric, `[G, d, d]`, or diagonal, `[G, d]`.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ggn_jax._fusion import max_abs
from ggn_jax.kronecker.linalg import eigh, norm, safe_max_abs, zero_below_resolution

Factor = Float[Array, "G d *d"]


def is_diagonal(factor: Factor) -> bool:
    return factor.ndim == 2


def diagonal_of(factor: Factor) -> Float[Array, "G d"]:
    return factor if is_diagonal(factor) else jnp.diagonal(factor, axis1=1, axis2=2)


def dense(factor: Factor) -> Float[Array, "G d d"]:
    return jax.vmap(jnp.diag)(factor) if is_diagonal(factor) else factor


def kronecker_mv(b: Factor, m: Float[Array, "G out in"], a: Factor) -> Float[Array, "G out in"]:
    """`(B (x) A) vec(M)` as a matrix, `B M A`, for each group."""
    m = b[:, :, None] * m if is_diagonal(b) else jnp.einsum("gop,gpi->goi", b, m)
    return m * a[:, None, :] if is_diagonal(a) else jnp.einsum("goj,gji->goi", m, a)


def inner(x: Factor, y: Factor) -> Float[Array, " G"]:
    """The inner product `tr(X Y)` for each group."""
    if is_diagonal(x) or is_diagonal(y):
        return jnp.sum(diagonal_of(x) * diagonal_of(y), axis=1)
    return jnp.sum(x * y, axis=(1, 2))


def weighted_factor_sum(factors: Sequence[Factor], weights: Array) -> Factor:
    """`sum_i weights[i] factors[i]`."""
    if not all(map(is_diagonal, factors)):
        factors = [dense(factor) for factor in factors]
    return sum((w * factor for w, factor in zip(weights, factors, strict=True)), start=jnp.zeros_like(factors[0]))


class Kronecker(eqx.Module):
    """`sum_t B_t (x) A_t`, one term per use of a weight."""

    a: tuple[Factor, ...]
    b: tuple[Factor, ...]

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        products = [kronecker_mv(b, m, a) for a, b in zip(self.a, self.b, strict=True)]
        return sum(products[1:], start=products[0])

    def traces(self) -> Float[Array, " G"]:
        pairs = zip(self.a, self.b, strict=True)
        traces = [jnp.sum(diagonal_of(a), 1) * jnp.sum(diagonal_of(b), 1) for a, b in pairs]
        return sum(traces[1:], start=traces[0])

    def norms(self) -> Float[Array, " G"]:
        # <B_s (x) A_s, B_t (x) A_t> = <B_s, B_t> <A_s, A_t>: no product is formed.
        (a, size_a), (b, size_b) = normalise(self.a), normalise(self.b)
        return norm_of_sum(size_a * size_b, gram_matrix(a) * gram_matrix(b))

    def diagonal(self) -> Float[Array, "G out in"]:
        terms = zip(self.a, self.b, strict=True)
        products = [diagonal_of(b)[:, :, None] * diagonal_of(a)[:, None, :] for a, b in terms]
        return sum(products[1:], start=products[0])

    @property
    def size(self) -> int:
        """The number of rows of a group's matrix."""
        size: int = self.a[0].shape[1] * self.b[0].shape[1]
        return size

    def matrix(self) -> Float[Array, "G d d"]:
        """The dense matrix of each group, on row-major `[out, in]`."""
        products = [jnp.einsum("gop,gij->goipj", dense(b), dense(a)) for a, b in zip(self.a, self.b, strict=True)]
        return sum(products[1:], start=products[0]).reshape(-1, self.size, self.size)

    def nearest(self) -> "Kronecker":
        """The nearest single Kronecker product in Frobenius norm, for each group (Van Loan & Pitsianis 1993).

        Factors of positive semi-definite terms have inner products of at least 0, so the leading pair of the Gram
        matrices has no negative weight, and the result is positive semi-definite.
        """
        if len(self.a) == 1:
            return self
        (a, size_a), (b, size_b) = normalise(self.a), normalise(self.b)
        top_a, top_b = safe_max_abs(size_a, (1,)), safe_max_abs(size_b, (1,))
        weights = (size_a / top_a[:, None]) * (size_b / top_b[:, None])
        top = safe_max_abs(weights, (1,))
        weights = weights / top[:, None]
        # The rearranged block is R = sum_i w_i vec(B_i) vec(A_i)^T, of rank T, and the nearest product is its leading
        # singular pair. Its left vector is B = sum_i p_i w_i B_i with p the leading eigenvector of gram(A) gram(B), a
        # matrix of size T without negative entries. So p has none (Perron-Frobenius), and repeated squaring finds it:
        # each row sum of a high power is a multiple of p. Given B, the best A is a least squares solution.
        gram_b = gram_matrix(b) * weights[:, None, :] * weights[:, :, None]
        powers = jax.lax.fori_loop(0, SQUARINGS, lambda _, x: _square_and_rescale(x), gram_matrix(a) @ gram_b)
        p = jnp.sum(powers, axis=2)
        p = p / safe_max_abs(p, (1,))[:, None]
        q = jnp.einsum("gst,gt->gs", gram_b, p)
        square = jnp.sum(p * q, axis=1, keepdims=True)
        q = jnp.where(square > 0, q / jnp.where(square > 0, square, 1), 0)
        near_a, near_b = _combine(a, q * top_a[:, None]), _combine(b, p * weights * (top_b * top)[:, None])
        return Kronecker((near_a,), (near_b,))


def norm_of_sum(sizes: Float[Array, "G T"], gram_matrix: Float[Array, "G T T"]) -> Float[Array, " G"]:
    """The norm of a sum of `T` matrices from their norms, and the inner products of the matrices divided by them."""
    # Squares of norms may leave the dtype's range, so they are divided by the largest first.
    top = safe_max_abs(sizes, (1,))
    weights = sizes / top[:, None]
    square = jnp.einsum("gs,gst,gt->g", weights, gram_matrix, weights)
    return top * jnp.sqrt(jnp.where(square > 0, square, 1)) * jnp.where(square > 0, 1, square)


SQUARINGS = 40  # as many as 2^40 power iterations, since leading eigenvalues may be close together


def _square_and_rescale(x: Float[Array, "G T T"]) -> Float[Array, "G T T"]:
    x = x @ x
    return x / safe_max_abs(x, (1, 2))[:, None, None]


def normalise(factors: Sequence[Factor]) -> tuple[list[Factor], Float[Array, "G T"]]:
    """The factors divided by their norms, and the norms. All are dense unless all are diagonal, so that they add up.

    Products of norms may leave the dtype's range, and sums of squares even earlier: weights are rescaled separately.
    """
    if not all(map(is_diagonal, factors)):
        factors = [dense(factor) for factor in factors]
    sizes = [norm(factor, tuple(range(1, factor.ndim))) for factor in factors]
    safe = [jnp.where(size > 0, size, 1).reshape(-1, *[1] * (factors[0].ndim - 1)) for size in sizes]
    return [factor / size for factor, size in zip(factors, safe, strict=True)], jnp.stack(sizes, axis=1)


def gram_matrix(factors: Sequence[Factor]) -> Float[Array, "G T T"]:
    """The inner products of the factors with each other, for each group."""
    flat = jnp.stack([factor.reshape(factor.shape[0], -1) for factor in factors], axis=1)
    return jnp.einsum("gsi,gti->gst", flat, flat)


def _combine(factors: Sequence[Factor], weights: Float[Array, "G T"]) -> Factor:
    return jnp.einsum("gt...,gt->g...", jnp.stack(factors, axis=1), weights)


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
        return self.rotate_back(self.values * self.rotate(m))

    def rotate_back(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        """`Q_B M Q_A^T`."""
        m = m if self.qb is None else jnp.einsum("gop,gpi->goi", self.qb, m)
        return m if self.qa is None else jnp.einsum("goj,gij->goi", m, self.qa)

    def map(self, fn: Callable[[Array], Array]) -> "Spectral":
        """A function of all eigenvalues; negative ones, which are rounding, count as 0."""
        return self.replace_values(fn(jnp.maximum(self.values, 0)))

    def replace_values(self, values: Float[Array, "G out in"]) -> "Spectral":
        return Spectral(self.qa, self.qb, values)

    def traces(self) -> Float[Array, " G"]:
        return jnp.sum(self.values, axis=(1, 2))

    def norms(self) -> Float[Array, " G"]:
        return norm(self.values, (1, 2))

    def diagonal(self) -> Float[Array, "G out in"]:
        m = self.values if self.qb is None else jnp.einsum("gop,gpi->goi", self.qb**2, self.values)
        return m if self.qa is None else jnp.einsum("goj,gij->goi", m, self.qa**2)


class Dense(eqx.Module):
    """For each group, a symmetric matrix over the entries."""

    matrix: Float[Array, "G d d"]

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        return jnp.einsum("gij,gj->gi", self.matrix, m.reshape(m.shape[0], -1)).reshape(m.shape)

    def traces(self) -> Float[Array, " G"]:
        return jnp.sum(self.diagonal(), axis=1)

    def norms(self) -> Float[Array, " G"]:
        return norm(self.matrix, (1, 2))

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
        return self.replace_values(fn(jnp.maximum(self.values, 0)))

    def replace_values(self, values: Float[Array, "G d"]) -> "DenseSpectral":
        return DenseSpectral(self.q, values)

    def traces(self) -> Float[Array, " G"]:
        return jnp.sum(self.values, axis=1)

    def norms(self) -> Float[Array, " G"]:
        return norm(self.values, (1,))

    def diagonal(self) -> Float[Array, "G d"]:
        return jnp.einsum("gij,gj->gi", self.q**2, self.values)


class Diagonal(eqx.Module):
    """For each group, a diagonal matrix over the entries."""

    values: Float[Array, "G d"]

    def mv(self, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
        return (self.values * m.reshape(m.shape[0], -1)).reshape(m.shape)

    def map(self, fn: Callable[[Array], Array]) -> "Diagonal":
        return Diagonal(fn(jnp.maximum(self.values, 0)))

    def replace_values(self, values: Float[Array, "G d"]) -> "Diagonal":
        return Diagonal(values)

    def traces(self) -> Float[Array, " G"]:
        return jnp.sum(self.values, axis=1)

    def norms(self) -> Float[Array, " G"]:
        return norm(self.values, (1,))

    def diagonal(self) -> Float[Array, "G d"]:
        return self.values


Block = Kronecker | Spectral | Dense | DenseSpectral | Diagonal


def finite_groups(block: PyTree[Array]) -> Bool[Array, " G"]:
    """For each group, whether there is no NaN and no infinity."""
    leaves = jax.tree.leaves(block)
    return jnp.all(jnp.stack([jnp.isfinite(max_abs(leaf, range(1, leaf.ndim))) for leaf in leaves]), axis=0)


def decompose(blocks: Sequence[Block]) -> list[Spectral | DenseSpectral | Diagonal]:
    """The eigendecompositions of all blocks, with eigenvalues below the resolution set to 0.

    Of a sum of Kronecker terms, that of the nearest single term. All matrices of one size are decomposed together.
    """
    nearest = [block.nearest() if isinstance(block, Kronecker) else block for block in blocks]
    wanted = []
    for block in nearest:
        if isinstance(block, Kronecker):
            wanted += [factor for factor in (block.a[0], block.b[0]) if not is_diagonal(factor)]
        elif isinstance(block, Dense):
            wanted.append(block.matrix)
    found = ((zero_below_resolution(values), q) for values, q in eigh(wanted))

    def one(block: Block) -> Spectral | DenseSpectral | Diagonal:
        if isinstance(block, Kronecker):
            pairs = [(f, None) if is_diagonal(f) else next(found) for f in (block.a[0], block.b[0])]
            (la, qa), (lb, qb) = pairs
            return Spectral(qa, qb, lb[:, :, None] * la[:, None, :])
        if isinstance(block, Dense):
            values, q = next(found)
            return DenseSpectral(q, values)
        return block

    return [one(block) for block in nearest]
