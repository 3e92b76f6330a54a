"""The Hessian H of one plain loss term and a square root S, S S^T = H, as products that never need the matrix.

Every class here is a function of one term (its output `f` of shape `[*term]`); arrays of terms are mapped over in
`ggn_jax.terms`. All have the same five methods.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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

    shifted: Float[Array, "C *at"]  # f - max f
    exp: Float[Array, "C *at"]

    def __init__(self, f: Float[Array, "C *at"]):
        # The shift is a constant to differentiation: p does not depend on it.
        self.shifted = f - jax.lax.stop_gradient(jnp.max(f, axis=0, keepdims=True))
        self.exp = jnp.exp(self.shifted)

    @property
    def _is_top(self) -> Bool[Array, "C *at"]:
        return self.shifted == 0

    @property
    def _rest(self) -> Float[Array, "1 *at"]:
        """The sum of the exponentials less one largest logit's 1."""
        count = _sum(self._is_top.astype(self.exp.dtype))
        # exp - 1 is exactly 0 at the top, but keeps its derivatives.
        return (count - 1) + _sum(self.exp - self._is_top.astype(self.exp.dtype))

    @property
    def log_p(self) -> Float[Array, "C *at"]:
        return self.shifted - jnp.log1p(self._rest)

    @property
    def p(self) -> Float[Array, "C *at"]:
        return self.exp / _sum(self.exp)

    @property
    def sqrt_p(self) -> Float[Array, "C *at"]:
        # Not the square root of p, which underflows far earlier.
        return jnp.exp(0.5 * self.shifted) / jnp.sqrt(_sum(self.exp))

    @property
    def one_minus_p(self) -> Float[Array, "C *at"]:
        rest = self._rest
        return jnp.where(self._is_top, (rest - (self.exp - 1)) / (1 + rest), 1 - self.p)

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


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=0, keepdims=True)


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

    def _sqrt(self) -> "MatrixSqrt":
        values, vectors = jnp.linalg.eigh(self._dense())
        slack = 8 * self.f.size * jnp.finfo(self.f.dtype).eps * jnp.max(jnp.abs(values))
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
        return jnp.tensordot(self.sqrt, v, self.ndim, precision="highest")

    def sqrt_rmv(self, u: Float[Array, "*term"]) -> Float[Array, "*term"]:
        return jnp.tensordot(u, self.sqrt, self.ndim, precision="highest")

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
