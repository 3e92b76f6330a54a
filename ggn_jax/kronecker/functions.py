"""Functions of damped blocks: inverses and roots, from eigendecompositions, with derivatives.

`f(K + damping I)` of a Kronecker product `K = B (x) A` has its eigenvectors, and eigenvalues `f(l_B l_A + damping)`.
Eigenvectors have no derivative if eigenvalues are equal, as those of an orthogonal weight's factors are; the function
has one: between eigenvectors `i` and `j` of `K` it is `dK_ij (f(l_i) - f(l_j)) / (l_i - l_j)` (Daleckii & Krein
1965; Higham 2008, theorem 3.11), with `f'(l_i)` where the two are equal. So derivatives are taken of the whole
function, in the factors. Second ones need eigenvalues that differ.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax.kronecker.algebra import Block, Dense, DenseSpectral, Diagonal, Factor, Kronecker, Spectral, is_diagonal
from ggn_jax.kronecker.linalg import eigh, norm, rotated, zero_below_resolution

FunctionName = Literal["inverse", "square root", "inverse square root", "shift", "multiple"]


class _Function(NamedTuple):
    """A function of eigenvalues and of a number, the damping or a factor."""

    value: Callable[[Array, Array], Array]
    divided_difference: Callable[[Array, Array, Array], Array]
    """`(f(x, n) - f(y, n)) / (x - y)`, by a formula that does not cancel where `x` is near `y`."""


def _of_damped(value: Callable[[Array], Array], divided_difference: Callable[[Array, Array], Array]) -> _Function:
    return _Function(lambda x, n: value(x + n), lambda x, y, n: divided_difference(x + n, y + n))


def _sqrt_divided_difference(x: Array, y: Array) -> Array:
    """`1 / (sqrt(x) + sqrt(y))`; 0 between null vectors, where the change of a matrix that stays PSD is 0 as well."""
    total = jnp.sqrt(x) + jnp.sqrt(y)
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


FUNCTIONS: dict[FunctionName, _Function] = {
    "inverse": _of_damped(lambda x: 1 / x, lambda x, y: -1 / (x * y)),
    "square root": _of_damped(jnp.sqrt, _sqrt_divided_difference),
    "inverse square root": _of_damped(
        jax.lax.rsqrt, lambda x, y: -jax.lax.rsqrt(x) * jax.lax.rsqrt(y) * _sqrt_divided_difference(x, y)
    ),
    "shift": _of_damped(lambda x: x, lambda x, y: jnp.ones_like(x * y)),
    "multiple": _Function(lambda x, n: n * x, lambda x, y, n: n * jnp.ones_like(x * y)),
}


class MatrixFunction(eqx.Module):
    """`f_n(... f_1(B (x) A, number_1) ..., number_n)`, such as `(B (x) A + damping I)^-1`."""

    a: Factor
    b: Factor
    qa: Float[Array, "G in in"] | None
    qb: Float[Array, "G out out"] | None
    la: Float[Array, "G in"]
    lb: Float[Array, "G out"]
    numbers: tuple[Float[Array, " G"], ...]
    names: tuple[FunctionName, ...] = eqx.field(static=True)

    def map(self, name: FunctionName, number: Float[Array, " G"]) -> "MatrixFunction":
        """A function of this function; they share the eigenvectors."""
        numbers = *self.numbers, number.astype(self.la.dtype)
        return MatrixFunction(self.a, self.b, self.qa, self.qb, self.la, self.lb, numbers, (*self.names, name))

    @property
    def values(self) -> Float[Array, "G out in"]:
        """The eigenvalues."""
        values = self.lb[:, :, None] * self.la[:, None, :]
        for name, number in zip(self.names, self.numbers, strict=True):
            values = FUNCTIONS[name].value(values, number[:, None, None])
        return values

    def divided_difference(self, x: Array, y: Array) -> Array:
        """`(f(x) - f(y)) / (x - y)` of eigenvalues `[G, n, n]` of `B (x) A`."""
        # The chain rule of divided differences: the product of those of each function, at the values before it.
        result = jnp.ones_like(x * y)
        for name, number in zip(self.names, self.numbers, strict=True):
            fn, number = FUNCTIONS[name], number[:, None, None]
            result = result * fn.divided_difference(x, y, number)
            x, y = fn.value(x, number), fn.value(y, number)
        return result

    def mv(self, m: Float[Array, "G ..."]) -> Float[Array, "G ..."]:
        shape = len(m), self.lb.shape[1], self.la.shape[1]
        return _matvec(self, m.reshape(shape)).reshape(m.shape)

    def diagonal(self) -> Float[Array, "G out in"]:
        return _diagonal(self)

    def traces(self) -> Float[Array, " G"]:
        return jnp.sum(self.values, axis=(1, 2))

    def norms(self) -> Float[Array, " G"]:
        return norm(self.values, (1, 2))


@jax.custom_jvp
def _matvec(f: MatrixFunction, m: Float[Array, "G out in"]) -> Float[Array, "G out in"]:
    return Spectral(f.qa, f.qb, f.values).mv(m)


@_matvec.defjvp
def _matvec_jvp(primals: Any, tangents: Any) -> Any:
    # In the eigenbasis, d(B (x) A) = dB (x) A + B (x) dA is zero between eigenvectors that differ in both factors. So
    # the function's change is that of its eigenvalues, and for each factor that between eigenvectors of this factor.
    (f, m), (df, dm) = primals, tangents
    basis = Spectral(f.qa, f.qb, jnp.ones_like(f.values))
    inside = basis.rotate(m)
    values, changes = jax.jvp(lambda g: g.values, (f,), (df,))
    change = changes * inside + values * basis.rotate(dm)
    for side in (0, 1):
        change = change + _off_diagonal_change(f, df, side, inside)
    return basis.rotate_back(values * inside), basis.rotate_back(change)


@jax.custom_jvp
def _diagonal(f: MatrixFunction) -> Float[Array, "G out in"]:
    return Spectral(f.qa, f.qb, f.values).diagonal()


@_diagonal.defjvp
def _diagonal_jvp(primals: Any, tangents: Any) -> Any:
    ((f,), (df,)) = primals, tangents
    values, changes = jax.jvp(lambda g: g.values, (f,), (df,))
    spectral = Spectral(f.qa, f.qb, values)
    change = spectral.replace_values(changes).diagonal()
    for side in (0, 1):
        change = change + _off_diagonal_change_of_diagonal(f, df, side)
    return spectral.diagonal(), change


def _rotated_change(f: MatrixFunction, df: MatrixFunction, side: int) -> tuple[Any, ...] | None:
    """One factor's change in its eigenbasis without the diagonal, its eigenvalues and the other's; None if diagonal."""
    q, change, own, other = ((f.qa, df.a, f.la, f.lb), (f.qb, df.b, f.lb, f.la))[side]
    if q is None or q.shape[1] == 1:
        return None
    inside = rotated(change, q)
    return inside * (1 - jnp.eye(q.shape[1], dtype=q.dtype))[None], own, other


def _map_rows(fn: Callable[[Array, Array], Array], other: Float[Array, "G k"], rows: Float[Array, "G k n"]) -> Array:
    """`fn(other[:, k], rows[:, k])` for each `k`, one at a time since each needs a matrix `[G, n, n]`: `[G, k, n]`."""
    mapped = jax.lax.map(lambda pair: fn(*pair), (other.T, jnp.swapaxes(rows, 0, 1)))
    return jnp.swapaxes(mapped, 0, 1)


def _change_between_eigenvectors(f: MatrixFunction, inside: Array, own: Array, other: Array) -> Float[Array, "G n n"]:
    """The function's change between one factor's eigenvectors, for one eigenvector of the other factor."""
    values = other[:, None] * own
    return f.divided_difference(values[:, :, None], values[:, None, :]) * other[:, None, None] * inside


def _off_diagonal_change(
    f: MatrixFunction, df: MatrixFunction, side: int, m: Array
) -> Float[Array, "G out in"] | float:
    """What the change between different eigenvectors of one factor adds to a product, in the eigenbasis."""
    found = _rotated_change(f, df, side)
    if found is None:
        return 0.0
    inside, own, other = found
    m = m if side == 0 else jnp.swapaxes(m, 1, 2)
    # The divided difference of the inverse is a product of a function of x and one of y: two matrix products, no loop.
    if f.names == ("inverse",):
        values = f.values if side == 0 else jnp.swapaxes(f.values, 1, 2)
        result = -values * other[:, :, None] * jnp.einsum("gij,gkj->gki", inside, values * m)
    else:
        result = _map_rows(
            lambda one, row: jnp.einsum("gij,gj->gi", _change_between_eigenvectors(f, inside, own, one), row), other, m
        )
    return result if side == 0 else jnp.swapaxes(result, 1, 2)


def _off_diagonal_change_of_diagonal(
    f: MatrixFunction, df: MatrixFunction, side: int
) -> Float[Array, "G out in"] | float:
    """The same for the diagonal."""
    found = _rotated_change(f, df, side)
    if found is None:
        return 0.0
    inside, own, other = found
    q, q_other = (f.qa, f.qb) if side == 0 else (f.qb, f.qa)
    rows = _map_rows(
        lambda one, _: jnp.einsum("gki,gij,gkj->gk", q, _change_between_eigenvectors(f, inside, own, one), q),
        other,
        jnp.zeros((*other.shape, 1), other.dtype),
    )
    rows = rows if q_other is None else jnp.einsum("gpo,gok->gpk", q_other**2, rows)
    return rows if side == 0 else jnp.swapaxes(rows, 1, 2)


MAX_DENSE_ROWS = 1024
"""Larger blocks that are not a single Kronecker product are not decomposed as dense matrices."""

Spectrum = MatrixFunction | Spectral | Diagonal


def spectra(blocks: Sequence[Block | MatrixFunction]) -> list[Spectrum]:
    """All blocks by their eigendecompositions, eigenvalues below the resolution as 0.

    Sums of Kronecker terms by their dense matrix if that has at most `MAX_DENSE_ROWS` rows, else by the nearest term.
    """
    plain = [_one_term(block) for block in blocks]
    pairs = [(block.a[0], block.b[0]) for block in plain if isinstance(block, Kronecker)]
    found = iter(eigh([factor for pair in pairs for factor in pair if not is_diagonal(factor)]))

    def spectrum(factor: Factor) -> tuple[Array, Array | None]:
        if is_diagonal(factor):
            return factor, None
        values, q = next(found)
        return zero_below_resolution(values), q

    def one(block: Kronecker | Spectrum) -> Spectrum:
        if isinstance(block, Kronecker):
            (la, qa), (lb, qb) = spectrum(block.a[0]), spectrum(block.b[0])
            return MatrixFunction(block.a[0], block.b[0], qa, qb, la, lb, (), ())
        if isinstance(block, Spectral):
            return block.replace_values(zero_below_resolution(block.values, (1, 2), squares=True))
        return block

    return [one(block) for block in plain]


def _one_term(block: Block | MatrixFunction) -> Kronecker | Spectrum:
    if isinstance(block, Kronecker) and len(block.a) > 1:
        block = Dense(block.matrix()) if block.size <= MAX_DENSE_ROWS else block.nearest()
    if isinstance(block, Dense):
        return Kronecker((block.matrix,), (jnp.ones((len(block.matrix), 1), block.matrix.dtype),))
    assert not isinstance(block, DenseSpectral)  # made by the optimizer only
    return block


def apply_function(spectrum: Spectrum, number: Float[Array, "G *d"], name: FunctionName) -> Spectrum:
    """A function of a block and of a damping; a diagonal block may have a damping for each entry."""
    if isinstance(spectrum, MatrixFunction):
        return spectrum.map(name, number)
    values = jnp.maximum(spectrum.values, 0)  # negative ones are rounding
    number = number.astype(values.dtype)
    number = number.reshape(*number.shape, *[1] * (values.ndim - number.ndim))
    return spectrum.replace_values(FUNCTIONS[name].value(values, number))
