"""The Hessian H of one plain loss term and a square root S, S S^T = H, as products that never need the matrix.

Every class here is a function of one term (its output `f` of shape `[*term]`); arrays of terms are mapped over in
`ggn_jax.terms`. All have the same five methods.
"""

import abc
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ggn_jax._fusion import fusion_boundary
from ggn_jax._precision import full_precision


class TermHessian(eqx.Module):
    """The curvature of one plain term."""

    @abc.abstractmethod
    def mv(self, v: Float[Array, "*term"]) -> Float[Array, "*term"]:
        """`H v`."""

    @abc.abstractmethod
    def sqrt_mv(self, v: Float[Array, "*term"]) -> Float[Array, "*term"]:
        """`S v`."""

    @abc.abstractmethod
    def sqrt_rmv(self, u: Float[Array, "*term"]) -> Float[Array, "*term"]:
        """`S^T u`."""

    @abc.abstractmethod
    def diagonal(self) -> Float[Array, "*term"]:
        """The diagonal of `H`."""

    @abc.abstractmethod
    def columns(self) -> Float[Array, "..."]:
        """The columns of `S`, shape `[*term, *term]`, the column's index first."""


class ScalarHessian(TermHessian):
    """A term of one entry: its second derivative and the square root of that."""

    second: Float[Array, "*at"]
    sqrt: Float[Array, "*at"]

    def mv(self, v: Float[Array, "*at"]) -> Float[Array, "*at"]:
        return self.second * v

    def sqrt_mv(self, v: Float[Array, "*at"]) -> Float[Array, "*at"]:
        return self.sqrt * v

    def sqrt_rmv(self, u: Float[Array, "*at"]) -> Float[Array, "*at"]:
        return self.sqrt * u

    def diagonal(self) -> Float[Array, "*at"]:
        return self.second

    def columns(self) -> Float[Array, "*at"]:
        return self.sqrt


class Softmax(TermHessian):
    """The classes' axis is the first, any others are positions. `H = diag(p) - p p^T` with `p = softmax(f)`, and
    `S = diag(sqrt p) - p sqrt(p)^T`.

    The textbook formulas lose all digits of `1 - p` once one class dominates, which is where a trained classifier
    lives: here it comes from the sum of the *other* classes' exponentials. The products are projections
    (`v - (p^T v) 1`, `z - p (1^T z)`), done twice: the second time removes the rounding error of the first.
    """

    f: Float[Array, "C *at"]
    top: Float[Array, "1 *at"]  # max f

    def __init__(self, f: Float[Array, "C *at"]):
        # The shift is a constant to differentiation: p does not depend on it.
        self.f, self.top = f, fusion_boundary(jax.lax.stop_gradient(jnp.max(f, axis=0, keepdims=True)))

    @property
    def shifted(self) -> Float[Array, "C *at"]:
        return self.f - self.top

    @property
    def exp(self) -> Float[Array, "C *at"]:
        return jnp.exp(self.shifted)

    @property
    def _rest(self) -> Float[Array, "1 *at"]:
        """The sum of the exponentials, less the 1 of one largest logit."""
        return _sum_but_one(self.f, self.top)

    @property
    def scale(self) -> Float[Array, "1 *at"]:
        """The factor from exponentials to probabilities: XLA would not fuse a quotient with what follows."""
        return 1 / (1 + self._rest)

    @property
    def neg_log_p(self) -> Float[Array, "C *at"]:
        return jnp.log1p(self._rest) - self.shifted

    def neg_log_p_at(self, index: Int[Array, "*at"]) -> Float[Array, "*at"]:
        return (jnp.log1p(self._rest) + (self.top - _look_up(self.f, index[None])))[0]

    @property
    def p(self) -> Float[Array, "C *at"]:
        return self.exp * self.scale

    @property
    def sqrt_p(self) -> Float[Array, "C *at"]:
        # Not the square root of p, which underflows far earlier.
        return jnp.exp(0.5 * self.shifted) * jax.lax.rsqrt(1 + self._rest)

    @property
    def one_minus_p(self) -> Float[Array, "C *at"]:
        return self._one_minus(self.p)

    def _one_minus(self, p: Float[Array, "some *at"]) -> Float[Array, "some *at"]:
        """`1 - p` for some of the probabilities."""
        rest, difference = self._rest, 1 - p
        return _with_derivatives_of(difference, jnp.where(p == self.scale, rest / (1 + rest), difference))

    def less_onehot(self, index: Int[Array, "*at"]) -> Float[Array, "C *at"]:
        """`p - onehot`."""
        p = self.p
        own = self._one_minus(_look_up(p, index[None]))
        return jnp.where(onehot(index, p.shape[0]), -own, p)

    def _centred(self, v: Float[Array, "C *at"]) -> Float[Array, "C *at"]:
        v = v - _sum(self.p * v)
        return v - _sum(self.p * v)

    def mv(self, v: Float[Array, "C *at"]) -> Float[Array, "C *at"]:
        return self.p * self._centred(v)

    def sqrt_mv(self, v: Float[Array, "C *at"]) -> Float[Array, "C *at"]:
        z = self.sqrt_p * v
        z = z - self.p * _sum(z)
        return z - self.p * _sum(z)

    def sqrt_rmv(self, u: Float[Array, "C *at"]) -> Float[Array, "C *at"]:
        return self.sqrt_p * self._centred(u)

    def diagonal(self) -> Float[Array, "C *at"]:
        return self.p * self.one_minus_p

    def columns(self) -> Float[Array, "C C *at"]:
        sqrt_p, p, one_minus_p = self.sqrt_p, self.p, self.one_minus_p
        own = jnp.eye(p.shape[0], dtype=bool).reshape(2 * p.shape[:1] + (1,) * (p.ndim - 1))
        return sqrt_p[:, None] * jnp.where(own, one_minus_p[None], -p[None])

    def summed(self, scale: Float[Array, "*at"], start: int, stop: int) -> Float[Array, "K K"]:
        """`sum_at scale H` for the classes from `start` to `stop`, as one product of matrices.

        The diagonal comes from `p (1 - p)`, as `sum scale p - sum scale p^2` cancels where one class dominates.
        """
        counts, weights = (scale != 0)[None], scale[None]
        p = jnp.where(counts, self.p[start:stop], 0).reshape(stop - start, -1)
        own = jnp.sum(jnp.where(counts, weights * self.diagonal()[start:stop], 0).reshape(stop - start, -1), axis=1)
        product = jnp.einsum("ct,dt->cd", p * scale.reshape(1, -1), p)
        return jnp.where(jnp.eye(stop - start, dtype=bool), own[None], -product)


def onehot(index: Int[Array, "*at"], classes: int) -> Bool[Array, "C *at"]:
    return jnp.arange(classes, dtype=jnp.int32).reshape(-1, *(1,) * index.ndim) == index[None]


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=0, keepdims=True)


@jax.custom_jvp
def _with_derivatives_of(formula: Array, value: Array) -> Array:
    """`value`, which equals `formula` but for rounding, with the derivatives of `formula`."""
    return value


@_with_derivatives_of.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[1], tangents[0]


@jax.custom_jvp
def _sum_but_one(f: Float[Array, "C *at"], top: Float[Array, "1 *at"]) -> Float[Array, "1 *at"]:
    """The sum of `exp(f - top)` less one of the entries that are 1, with all digits of the others.

    XLA's CPU compiler keeps nothing of the size of `f` for sums of arithmetic that share no array of that size, nor a
    broadcast number, with each other or with anything else; comparisons are kept. Hence copies of the top, and `_step`.
    """
    minus_top = fusion_boundary(-top)
    below = f - fusion_boundary(-minus_top)
    others = -_sum(jnp.exp(below) * _step(below, top))
    return others + (f.shape[0] - 1 + _sum(_step(f + minus_top, minus_top)))


def _step(below: Float[Array, "C *at"], any_number: Float[Array, "1 *at"]) -> Float[Array, "C *at"]:
    """0 at 0 and -1 below: what is rounded down is limited by some number from -1 up to 0, which is not a constant."""
    return jnp.floor(jnp.maximum(below, -jax.lax.rsqrt(1 + jnp.abs(any_number))))


@_sum_but_one.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (f, top), (tangent, _) = primals, tangents  # the top is a constant
    return _sum_but_one(f, top), _sum(jnp.exp(f - top) * tangent)


@jax.custom_jvp
def _look_up(x: Float[Array, "C *at"], index: Int[Array, "1 *at"]) -> Float[Array, "1 *at"]:
    return jnp.take_along_axis(x, index, axis=0, mode="promise_in_bounds")


@_look_up.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    # A sum, whose transpose is fused with the other terms of a gradient; that of a look-up is a scatter.
    (x, index), (tangent, _) = primals, tangents
    own = onehot(index[0], x.shape[0])
    return _look_up(x, index), _sum(jnp.where(own, tangent, 0))


class AutodiffHessian(TermHessian):
    """The Hessian of any function `nll(f)` that is positive semi-definite at `f`.

    Products are Hessian-vector products; the square root is `Q sqrt(max(l, 0))` from an eigendecomposition of the
    K x K matrix. An eigenvalue that is negative beyond rounding gives NaN: the loss is not what it declares.
    """

    nll: Callable[[Array], Array] = eqx.field(static=True)
    f: Float[Array, "*term"]

    def mv(self, v: Float[Array, "*term"]) -> Float[Array, "*term"]:
        return jax.jvp(jax.grad(self.nll), (self.f,), (v,))[1]

    def _dense(self) -> Float[Array, "K K"]:
        size = self.f.size
        return jax.hessian(self.nll)(self.f).reshape(size, size)

    def indefiniteness(self) -> Float[Array, ""]:
        """The least eigenvalue as a part of the largest absolute one, if it is negative beyond rounding; else 0."""
        values = jnp.linalg.eigvalsh(self._dense())
        least = jnp.min(values / jnp.max(jnp.abs(values)))  # NaN where all are 0
        return jnp.where(least < -self._slack, least, 0)

    @property
    def _slack(self) -> float:
        return 8 * self.f.size * float(jnp.finfo(self.f.dtype).eps)

    def _sqrt(self) -> "MatrixSqrt":
        values, vectors = jnp.linalg.eigh(self._dense())
        slack = self._slack * jnp.max(jnp.abs(values))
        root = jnp.where(values < -slack, jnp.nan, jnp.sqrt(jnp.maximum(values, 0)))
        return MatrixSqrt((vectors * root[None]).reshape(2 * self.f.shape), self.f.ndim)

    def sqrt_mv(self, v: Float[Array, "*term"]) -> Float[Array, "*term"]:
        return self._sqrt().sqrt_mv(v)

    def sqrt_rmv(self, u: Float[Array, "*term"]) -> Float[Array, "*term"]:
        return self._sqrt().sqrt_rmv(u)

    def diagonal(self) -> Float[Array, "*term"]:
        return jnp.diagonal(self._dense()).reshape(self.f.shape)

    def columns(self) -> Float[Array, "..."]:
        return self._sqrt().columns()


class MatrixSqrt(TermHessian):
    """`H = S S^T` from a given factor `S` of shape `[*term, *term]`."""

    sqrt: Float[Array, "..."]
    ndim: int = eqx.field(static=True)

    def mv(self, v: Float[Array, "*term"]) -> Float[Array, "*term"]:
        return self.sqrt_mv(self.sqrt_rmv(v))

    def sqrt_mv(self, v: Float[Array, "*term"]) -> Float[Array, "*term"]:
        return full_precision(partial(jnp.tensordot, axes=self.ndim), self.sqrt, v)

    def sqrt_rmv(self, u: Float[Array, "*term"]) -> Float[Array, "*term"]:
        return full_precision(partial(jnp.tensordot, axes=self.ndim), u, self.sqrt)

    def diagonal(self) -> Float[Array, "*term"]:
        return jnp.sum(self.sqrt**2, axis=range(self.ndim, 2 * self.ndim))

    def columns(self) -> Float[Array, "..."]:
        rows, cols = tuple(range(self.ndim)), tuple(range(self.ndim, 2 * self.ndim))
        return jnp.transpose(self.sqrt, cols + rows)


def depends_on(fn: Callable[..., Any], index: int, *args: Any) -> bool:
    """Whether the result of `fn(*args)` may depend on `args[index]`, read off its jaxpr (never wrongly false)."""
    from jax.extend.core import Literal

    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    before = sum(len(jax.tree.leaves(a)) for a in args[:index])
    reached = set(jaxpr.invars[before : before + len(jax.tree.leaves(args[index]))])
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return any(not isinstance(v, Literal) and v in reached for v in jaxpr.outvars)
