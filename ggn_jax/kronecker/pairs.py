"""Inverses of sums of two Kronecker products, by simultaneous diagonalisation, with the damping in their factors.

With `S = A_1 + A_2`, there is a `T_A` with `T_A^T S T_A = I` in which both are diagonal, `T_A^T A_1 T_A = diag(alpha)`
and `T_A^T A_2 T_A = diag(1 - alpha)`, and a `T_B` alike (Golub & Van Loan 2013, section 8.7). So

    (B_1 (x) A_1 + B_2 (x) A_2)^-1 = (T_B (x) T_A) diag(1 / l) (T_B (x) T_A)^T
    l_oi = beta_o alpha_i + (1 - beta_o) (1 - alpha_i)

and the determinant is the product of all `l`, over `det(T_B (x) T_A)^2`. `T` is not orthogonal, so symmetric roots of
the sum have no such form. Nor has `K + damping I`, since `T^T T` is not `I`: damping goes into the factors instead.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax._weights import safe_sqrt
from ggn_jax.kronecker.algebra import (
    Factor,
    Kronecker,
    Spectral,
    diagonal_of,
    gram_matrix,
    is_diagonal,
    normalise,
    weighted_factor_sum,
)
from ggn_jax.kronecker.linalg import (
    RESOLUTION,
    eigh,
    matmul_precisely,
    rotated_precisely,
    safe_max_abs,
    zero_below_resolution,
)


class Congruence(Spectral):
    """`(T_B (x) T_A) diag(values) (T_B (x) T_A)^T` with matrices `T` that need not be orthogonal."""

    def replace_values(self, values: Float[Array, "G out in"]) -> "Congruence":
        return Congruence(self.qa, self.qb, values)

    def traces(self) -> Float[Array, " G"]:
        return jnp.sum(self.diagonal(), axis=(1, 2))

    def norms(self) -> Float[Array, " G"]:
        right, left = (None if q is None else jnp.einsum("gki,gkj->gij", q, q) ** 2 for q in (self.qa, self.qb))
        other = self.values if left is None else jnp.einsum("gop,gpi->goi", left, self.values)
        other = other if right is None else jnp.einsum("goj,gji->goi", other, right)
        square = jnp.sum(self.values * other, axis=(1, 2))
        return jnp.sqrt(jnp.where(square > 0, square, 1)) * jnp.where(square > 0, 1, square)


class PairInverse(eqx.Module):
    """`(B_1 (x) A_1 + B_2 (x) A_2)^-1`; made by `invert_pairs`."""

    pair: Kronecker
    congruence: Congruence  # a constant for derivatives: those are taken of the pair, by the rules below
    logdet: Float[Array, " G"]
    """The logarithm of the determinant of the pair."""

    def mv(self, m: Float[Array, "G ..."]) -> Float[Array, "G ..."]:
        shape = self.congruence.values.shape
        return _solve(self, m.reshape(shape)).reshape(m.shape)

    def scaled(self, by: Float[Array, ""]) -> "PairInverse":
        """`by` times it."""
        pair = Kronecker(self.pair.a, tuple(b / by for b in self.pair.b))
        found = self.congruence.replace_values(jax.lax.stop_gradient(by) * self.congruence.values)
        return PairInverse(
            pair, found, self.logdet - self.congruence.values[0].size * jnp.log(jax.lax.stop_gradient(by))
        )

    def spectral(self) -> Congruence:
        """The inverse as a congruence, without derivatives."""
        return _without_derivatives(self)

    def logdets(self) -> Float[Array, " G"]:
        """The logarithm of the determinant of what is inverted."""
        return _logdets(self)

    def diagonal(self) -> Float[Array, "G out in"]:
        return self.spectral().diagonal()

    def traces(self) -> Float[Array, " G"]:
        return self.spectral().traces()

    def norms(self) -> Float[Array, " G"]:
        return self.spectral().norms()


@jax.custom_jvp
def _solve(f: PairInverse, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
    return f.congruence.mv(m)


@_solve.defjvp
def _solve_jvp(primals: Any, tangents: Any) -> Any:
    """`dK^-1 m = K^-1 (dm - dK K^-1 m)`."""
    (f, m), (df, dm) = primals, tangents
    solution = _solve(f, m)
    change = jax.jvp(lambda pair: pair.mv(solution), (f.pair,), (df.pair,))[1]
    return solution, _solve(f, dm - change)


@jax.custom_jvp
def _logdets(f: PairInverse) -> Float[Array, " G"]:
    return f.logdet


@_logdets.defjvp
def _logdets_jvp(primals: Any, tangents: Any) -> Any:
    """`tr(K^-1 dK)`."""
    ((f,), (df,)) = primals, tangents

    def inside(x: Factor, q: Array | None) -> Float[Array, "G d"]:
        if q is None:
            return diagonal_of(x)
        return jnp.einsum("gk,gki->gi", x, q**2) if is_diagonal(x) else jnp.einsum("gki,gkl,gli->gi", q, x, q)

    def trace(pair: Kronecker) -> Float[Array, " G"]:
        terms = zip(pair.a, pair.b, strict=True)
        parts = [inside(b, f.congruence.qb)[:, :, None] * inside(a, f.congruence.qa)[:, None, :] for a, b in terms]
        return jnp.sum(f.congruence.values * sum(parts[1:], start=parts[0]), axis=(1, 2))

    return f.logdet, jax.jvp(trace, (f.pair,), (df.pair,))[1]


@jax.custom_jvp
def _without_derivatives(f: PairInverse) -> Congruence:
    return f.congruence


@_without_derivatives.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "the diagonal, the trace and the norm of the inverse of a sum of two Kronecker products have no derivatives"
        " here: differentiate its products, or the determinant."
    )


def invert_pairs(blocks: Sequence[Kronecker], dampings: Sequence[Float[Array, "*#G"]]) -> list[PairInverse]:
    """The inverses of sums of two terms, damped by `damp_factors`; of several terms, of the `near_pair`."""
    pairs = [damp_factors(near_pair(block), damping) for block, damping in zip(blocks, dampings, strict=True)]
    constant = jax.lax.stop_gradient(pairs)
    sides = [side for pair in constant for side in (pair.a, pair.b)]
    found = iter(_diagonalise(sides))
    return [_assembled(pair, next(found), next(found)) for pair in pairs]


def damp_factors(block: Kronecker, damping: Float[Array, "*#G"]) -> Kronecker:
    """`sum_t (B_t + rho b_t I) (x) (A_t + rho a_t I)` with `rho = sqrt(damping / sum_t a_t b_t)`.

    `a_t = tr A_t / d_A` and `b_t` are the factors' mean eigenvalues. For one term this is Martens & Grosse's rule
    (2015, section 6.3); a term that is split in two, or joined by one that is 0, is damped as before. The products of
    identities add up to `damping * I`, and to that alone if all factors are 0.
    """
    means = [[jnp.mean(diagonal_of(x), axis=1) for x in side] for side in (block.a, block.b)]
    a, b = (
        tuple(_add_to_diagonal(x, by) for x, by in zip(side, shifts, strict=True))
        for side, shifts in zip((block.a, block.b), split_damping(means[0], means[1], damping), strict=True)
    )
    return Kronecker(a, b)


def split_damping(
    means_a: Sequence[Float[Array, " G"]], means_b: Sequence[Float[Array, " G"]], damping: Float[Array, "*#G"]
) -> tuple[list[Float[Array, " G"]], list[Float[Array, " G"]]]:
    """What `damp_factors` adds to each factor's diagonal, from the mean eigenvalues of all terms' factors."""
    # Products of means may leave the dtype's range, so they are rescaled first.
    top_a, top_b = (safe_max_abs(jnp.stack(side), (0,)) for side in (means_a, means_b))
    total = sum((a / top_a) * (b / top_b) for a, b in zip(means_a, means_b, strict=True))
    some = total > 0
    size = jnp.sqrt(top_a) * jnp.sqrt(top_b) * jnp.sqrt(jnp.where(some, total, 1))  # sqrt(sum_t a_t b_t)
    root = jnp.sqrt(damping).astype(size.dtype)
    rho = jnp.where(some, root / size, 0)
    alone = jnp.where(some, 0, root / jnp.sqrt(jnp.asarray(len(means_a), size.dtype)))
    return [rho * mean + alone for mean in means_a], [rho * mean + alone for mean in means_b]


def near_pair(block: Kronecker) -> Kronecker:
    """Two terms near a sum of several: the terms in two groups, each replaced by its nearest product.

    The first group is around the largest term, the second around the one with the largest part that is not a multiple
    of it; every other term joins the one that it is more alike. `Kronecker.nearest` keeps the result positive
    semi-definite, which the best sum of two need not be. A block of two terms is returned as it is.
    """
    if len(block.a) == 2:
        return block
    (a, size_a), (b, size_b) = (normalise(jax.lax.stop_gradient(side)) for side in (block.a, block.b))
    cosines = gram_matrix(a) * gram_matrix(b)
    weights = (size_a / jnp.max(size_a, axis=1, keepdims=True, initial=0)) * size_b
    weights = jnp.where(jnp.isfinite(weights), weights, 0)
    first = jnp.argmax(weights, axis=1)
    alike = jnp.take_along_axis(cosines, first[:, None, None], axis=1)[:, 0]
    second = jnp.argmax(weights**2 * (1 - alike**2), axis=1)
    other = jnp.take_along_axis(cosines, second[:, None, None], axis=1)[:, 0] > alike

    def group(which: Array) -> Kronecker:
        kept = [jnp.where(which[:, t].reshape(-1, *[1] * (x.ndim - 1)), x, 0) for t, x in enumerate(block.b)]
        return Kronecker(block.a, tuple(kept)).nearest()

    x, y = group(~other), group(other)
    return Kronecker(x.a + y.a, x.b + y.b)


def _add_to_diagonal(factor: Factor, by: Float[Array, " G"]) -> Factor:
    if is_diagonal(factor):
        return factor + by[:, None]
    return factor + by[:, None, None] * jnp.eye(factor.shape[1], dtype=factor.dtype)[None]


class _DiagonalisedPair(eqx.Module):
    """One side's factors: `T^T X T = diag(alpha)`, `T^T Y T = diag(rest)`, for factors divided by their scales."""

    t: Factor
    values: tuple[Float[Array, "G d"], Float[Array, "G d"]]
    scales: tuple[Float[Array, " G"], Float[Array, " G"]]
    logdet: Float[Array, " G"]
    """`log det(T^-T T^-1)` where that has no null space."""


def _diagonalise(sides: Sequence[Sequence[Factor]]) -> list[_DiagonalisedPair]:
    """Diagonalise each pair of positive semi-definite factors simultaneously; null vectors of both stay as they are.

    First `W` with `W^T (X + Y) W = I`, then the eigenvectors `U` of `W^T X W`: `T = W U`, and `Y` follows, since it is
    the rest of `I`. Eigenvalues below the resolution count as 0: `t^T X t` is known to `eps |X| |t|^2`.
    """
    scales = [(_mean_eigenvalue(side[0]), _mean_eigenvalue(side[1])) for side in sides]
    unit = [
        _same_structure([_divided(*x) for x in zip(side, own, strict=True)])
        for side, own in zip(sides, scales, strict=True)
    ]
    wide = [pair for pair in unit if not is_diagonal(pair[0])]
    bases = []
    for values, q in eigh([x + y for x, y in wide]):
        values = zero_below_resolution(values)
        bases.append((values, q * jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1)), 1)[:, None]))
    inner = []
    for (x, _), (values, w) in zip(wide, bases, strict=True):
        some = values > 0
        both = some[:, :, None] & some[:, None, :]
        null = jnp.eye(some.shape[1], dtype=x.dtype)[None] * jnp.where(some, 0, -1)[:, None].astype(x.dtype)
        inner.append(
            jnp.where(both, rotated_precisely(x, w), null)
        )  # eigenvalue -1: null vectors are not mixed with others
    turned = iter(zip(eigh(inner), bases, strict=True))
    result = []
    for pair, own in zip(unit, scales, strict=True):
        if is_diagonal(pair[0]):
            total = pair[0] + pair[1]
            some = total > 0
            safe = jnp.where(some, total, 1)
            result.append(
                _DiagonalisedPair(jax.lax.rsqrt(safe), (pair[0] / safe, pair[1] / safe), own, jnp.sum(jnp.log(safe), 1))
            )
            continue
        (alpha, u), (values, w) = next(turned)
        t = matmul_precisely(w, u)
        least = RESOLUTION * jnp.finfo(t.dtype).eps * jnp.max(values, axis=1, keepdims=True) * jnp.sum(t**2, axis=1)
        inside = alpha > -1 / 2
        kept = [jnp.where(inside & (x > least), x, 0) for x in (alpha, 1 - alpha)]
        logs = jnp.sum(jnp.log(jnp.where(values > 0, values, 1)), axis=1)
        result.append(_DiagonalisedPair(t, (kept[0], kept[1]), own, logs))
    return result


def _mean_eigenvalue(factor: Factor) -> Float[Array, " G"]:
    mean = jnp.mean(diagonal_of(factor), axis=1)
    return jnp.where(mean > 0, mean, 1)


def _divided(factor: Factor, scale: Float[Array, " G"]) -> Factor:
    return factor / scale.reshape(-1, *[1] * (factor.ndim - 1))


def _same_structure(factors: Sequence[Factor]) -> list[Factor]:
    """The factors, all dense unless all are diagonal."""
    ones = jnp.eye(len(factors), dtype=factors[0].dtype)
    return [weighted_factor_sum(factors, weights) for weights in ones]


def _assembled(pair: Kronecker, a: _DiagonalisedPair, b: _DiagonalisedPair) -> PairInverse:
    # Factors were divided by their scales, so the terms differ by the products of these. They are kept as square roots,
    # and applied in two steps, since the products may leave the dtype's range.
    roots = [safe_sqrt(x) * safe_sqrt(y) for x, y in zip(a.scales, b.scales, strict=True)]
    present = [jnp.any(x > 0, axis=1) & jnp.any(y > 0, axis=1) for x, y in zip(a.values, b.values, strict=True)]
    roots = [jnp.where(here, scale, 0) for here, scale in zip(present, roots, strict=True)]
    largest_scale = jnp.maximum(*roots)
    safe = jnp.where(largest_scale > 0, largest_scale, 1)[:, None, None]
    terms = zip(roots, a.values, b.values, strict=True)
    values = sum((scale[:, None, None] / safe) ** 2 * y[:, :, None] * x[:, None, :] for scale, x, y in terms)
    assert isinstance(values, jax.Array)
    out, inputs = values.shape[1:]
    logs = jnp.sum(jnp.log(values), axis=(1, 2)) + 2 * out * inputs * jnp.log(safe[:, 0, 0])
    logs = logs + out * a.logdet + inputs * b.logdet
    inverse = 1 / values / safe / safe
    if is_diagonal(a.t):
        inverse = inverse * a.t[:, None, :] ** 2
    if is_diagonal(b.t):
        inverse = inverse * b.t[:, :, None] ** 2
    qa, qb = (None if is_diagonal(side.t) else side.t for side in (a, b))
    return PairInverse(pair, Congruence(qa, qb, inverse), logs)
