"""Curvature in function space: products with `X^T X`, `X = J^T S`, and solves with `X X^T` by factorising `X^T X`."""

import abc
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import is_concrete
from ggn_jax._eager import compiled
from ggn_jax._weights import safe_sqrt, times, weighted_sum
from ggn_jax.layerwise.dots import gradients, inner_products
from ggn_jax.operators.base import SymmetricLinearOperator, check_vector
from ggn_jax.operators.damping import check_damping, leaf_dampings
from ggn_jax.operators.outputs import Linearised
from ggn_jax.operators.problem import Problem
from ggn_jax.terms import split_terms

Outputs = Sequence[Float[Array, "N *out"]]
"""For each function, an array like its outputs."""
Shapes = Sequence[jax.ShapeDtypeStruct]


class Root(eqx.Module):
    """`C S` at some outputs: the loss Hessian's square root `S`, and `C`, which subtracts the mean over examples."""

    terms: Any
    """The loss's terms; None for `S = I`."""
    centred: bool = eqx.field(static=True)

    @classmethod
    def of(cls, loss: Any, outputs: Array, targets: Any, centred: bool) -> "Root":
        return cls(None if loss is None else split_terms(loss, outputs, targets, batch=True), centred)

    @property
    def is_identity(self) -> bool:
        return self.terms is None and not self.centred

    def mv(self, u: Array) -> Array:
        """`C S u`."""
        return self._centre(u if self.terms is None else self.terms.product("sqrt_mv", u))

    def rmv(self, u: Array) -> Array:
        """`S^T C u`."""
        u = self._centre(u)
        return u if self.terms is None else self.terms.product("sqrt_rmv", u)

    def _centre(self, u: Array) -> Array:
        return u - jnp.mean(u, axis=0, keepdims=True) if self.centred else u


class FunctionSpace(eqx.Module):
    """The outputs of one or several functions, with the Jacobian of all of them."""

    @abc.abstractmethod
    def shapes(self) -> Shapes:
        """The shapes of each function's outputs."""

    @abc.abstractmethod
    def roots(self) -> Sequence[Root]:
        """The root of each function's loss."""

    @abc.abstractmethod
    def jvp(self, v: PyTree[Array]) -> Outputs:
        """`J v`."""

    @abc.abstractmethod
    def vjp(self, us: Outputs) -> PyTree[Array]:
        """`J^T u`."""

    @abc.abstractmethod
    def gram(self, damping: PyTree[Array] | None) -> Float[Array, "K K"]:
        """`J D^-1 J^T` in at least float32, with `D = I` for None."""


class Function(eqx.Module):
    """One function of a space: a problem, and the weight of its loss."""

    problem: Problem
    linearisation: Linearised | None
    weight: Float[Array, ""] | None
    with_loss: bool = eqx.field(static=True)
    centred: bool = eqx.field(static=True)


class Functions(FunctionSpace):
    """Functions of the same parameters, whose batches are in memory; the roots of weights are in the Jacobian."""

    functions: tuple[Function, ...]
    linearised: tuple[Linearised, ...]

    def __init__(self, functions: tuple[Function, ...]):
        self.functions = functions
        self.linearised = tuple(f.linearisation or Linearised.of(f.problem) for f in functions)

    def shapes(self) -> Shapes:
        return [f.problem.outputs for f in self.functions]

    def roots(self) -> Sequence[Root]:
        def one(f: Function, linearised: Linearised) -> Root:
            loss = f.problem.loss if f.with_loss else None
            return Root.of(loss, linearised.outputs(), f.problem.targets, f.centred)

        return [one(*pair) for pair in zip(self.functions, self.linearised, strict=True)]

    def jvp(self, v: PyTree[Array]) -> Outputs:
        pairs = zip(self._weights(), self.linearised, strict=True)
        return [times(weight, linearised.jvp(v)) for weight, linearised in pairs]

    def vjp(self, us: Outputs) -> PyTree[Array]:
        found = [linearised.vjp(u) for linearised, u in zip(self.linearised, us, strict=True)]
        return weighted_sum(found, self._weights())

    def gram(self, damping: PyTree[Array] | None) -> Float[Array, "K K"]:
        problems = [f.problem for f in self.functions]
        parts = gradients(problems, inverse_roots(damping, problems[0].params))
        weights = self._weights()

        def block(k: int, m: int) -> Float[Array, "K L"]:
            return times(weights[k] * weights[m], inner_products(parts[k], parts[m], problems[k].chunk_size))

        numbers = range(len(parts))
        return jnp.block([[block(k, m) for m in numbers] for k in numbers])

    def _weights(self) -> list[Array]:
        return [jnp.ones(()) if f.weight is None else safe_sqrt(f.weight) for f in self.functions]


def inverse_roots(damping: PyTree[Array] | None, params: PyTree[Array]) -> list[Array] | None:
    """`D^-1/2` for each parameter; those with one number in the damping share one array, which `dots` looks for."""
    if damping is None:
        return None
    numbers = leaf_dampings(damping, params)
    made = {id(number): jax.lax.rsqrt(number) for number in numbers}
    return [made[id(number)] for number in numbers]


def product(space: FunctionSpace, us: Outputs) -> Outputs:
    """`X^T X u`."""
    roots = space.roots()
    return _apply_roots_transposed(roots, space.jvp(space.vjp(_apply_roots(roots, us))))


def matrix(space: FunctionSpace, damping: PyTree[Array] | None = None) -> Float[Array, "K K"]:
    """`X^T D^-1 X`, in at least float32; rows and columns are the outputs' entries, one function after the other."""
    roots, gram = space.roots(), space.gram(damping)
    return gram if all(r.is_identity for r in roots) else _from_both_sides(roots, space.shapes(), gram)


def solve(space: FunctionSpace, v: PyTree[Array], number: Array, damping: PyTree[Array] | None) -> PyTree[Array]:
    """`(X X^T + d D)^-1 v = D^-1 (v - X (X^T D^-1 X + d I)^-1 X^T D^-1 v) / d`, with `D = I` for None."""
    # The Woodbury identity: one factorisation of the size of the outputs, not of the parameters.
    roots, gram = space.roots(), matrix(space, damping)
    inner = _apply_roots_transposed(roots, space.jvp(_divide_by_damping(v, damping)))
    back = space.vjp(_apply_roots(roots, _solve_dual(gram, number, inner, space.shapes())))
    return _finish_solve(v, back, number, damping)


# Each of these is one program, if it is called outside of `jit`.


@compiled
def _apply_roots_transposed(roots: Sequence[Root], us: Outputs) -> Outputs:
    return [r.rmv(u) for r, u in zip(roots, us, strict=True)]


@compiled
def _apply_roots(roots: Sequence[Root], us: Outputs) -> Outputs:
    return [r.mv(u) for r, u in zip(roots, us, strict=True)]


@compiled
def _from_both_sides(roots: Sequence[Root], shapes: Shapes, gram: Float[Array, "K K"]) -> Float[Array, "K K"]:
    def left(row: Float[Array, " K"]) -> Float[Array, " K"]:
        return _join([r.rmv(u) for r, u in zip(roots, _split(row, shapes), strict=True)], row.dtype)

    for _ in range(2):  # from both sides, since the matrix is symmetric
        gram = jax.vmap(left)(gram).T
    return gram


@compiled
def _solve_dual(gram: Float[Array, "K K"], number: Array, inner: Outputs, shapes: Shapes) -> Outputs:
    """`(gram + number I)^-1 inner`."""
    wide = gram.dtype
    damped = gram + number.astype(wide) * jnp.eye(len(gram), dtype=wide)
    factor = jax.scipy.linalg.cho_factor(damped, lower=True)
    found = _split(jax.scipy.linalg.cho_solve(factor, _join(inner, wide)), shapes)
    return [u.astype(s.dtype) for u, s in zip(found, shapes, strict=True)]


@compiled
def _divide_by_damping(v: PyTree[Array], damping: PyTree[Array] | None) -> PyTree[Array]:
    """`D^-1 v`."""
    if damping is None:
        return v
    leaves, tree = jax.tree.flatten(v)
    numbers = leaf_dampings(damping, v)
    return jax.tree.unflatten(tree, [x / d.astype(x.dtype) for x, d in zip(leaves, numbers, strict=True)])


@compiled
def _finish_solve(v: PyTree[Array], back: PyTree[Array], number: Array, damping: PyTree[Array] | None) -> PyTree[Array]:
    return _divide_by_damping(jax.tree.map(lambda x, y: (x - y) / number.astype(x.dtype), v, back), damping)


def _split(row: Float[Array, " K"], shapes: Shapes) -> Outputs:
    """A vector as one array for each function."""
    ends = list(accumulate(prod(s.shape) for s in shapes))
    return [part.reshape(s.shape) for part, s in zip(jnp.split(row, ends[:-1]), shapes, strict=True)]


def _join(parts: Outputs, dtype: Any) -> Float[Array, " K"]:
    return jnp.concatenate([part.reshape(-1).astype(dtype) for part in parts])


class FunctionSpaceLinearOperator(SymmetricLinearOperator):
    """An operator `X^T X` on outputs, with solves by `X X^T` in the parameters."""

    @abc.abstractmethod
    def _params(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The structure of the parameters."""

    @abc.abstractmethod
    def _solve(self, v: PyTree[Array], number: Array, damping: PyTree[Array] | None) -> PyTree[Array]:
        """`solve`, with a damping `number D`."""

    def solve_ggn(self, vector: PyTree[Array], damping: Any) -> PyTree[Array]:
        """Compute `(J^T S S^T J + D)^-1 vector`, by a Cholesky factorisation of the size of the outputs.

        The matrix is `J^T J + D` without a loss, and that of the centred Jacobian with `centred`. In float32, choose
        `damping` well above 1e-6 times the largest eigenvalue; the rest of `vector`, outside of the range, is divided
        by it.

        Args:
            vector: a pytree of arrays like the parameters.
            damping: a number above 0, for `D = damping * I`; or a pytree of such numbers that is a prefix of the
                parameters: one for each layer, as a prior precision. Where the parameters of one layer's weight (fused
                queries and keys, say) have different numbers, inner products in that layer are computed from its
                gradients.

        Returns:
            A pytree of arrays like the parameters.

        Raises:
            ValueError: for a vector that is not like the parameters, or a damping that is not above 0, or is not a
                prefix of the parameters.
        """
        checked = check_damping(damping, self._params())
        for path, number in jax.tree_util.tree_leaves_with_path(checked):
            if is_concrete(number) and not number > 0:
                raise ValueError(f"damping{jax.tree_util.keystr(path)} must be above 0; got {number}.")
        check_vector(lx.IdentityLinearOperator(self._params()), vector)
        is_number = isinstance(checked, jax.Array)
        return self._solve(vector, *((checked, None) if is_number else (jnp.ones(()), checked)))
