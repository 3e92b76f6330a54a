"""Curvature in function space: products with `X^T X`, `X = J^T S`, and solves with `X X^T` by factorising that."""

import abc
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ggn_jax._weights import root, times, weighted_sum
from ggn_jax.layerwise.dots import gradients, products
from ggn_jax.operators.base import leaf_dampings
from ggn_jax.operators.outputs import Linearised
from ggn_jax.operators.problem import Problem
from ggn_jax.terms import split_terms

Outputs = Sequence[Float[Array, "N *out"]]
"""For each function, an array like its outputs."""


class Root(eqx.Module):
    """`C S` at some outputs: the loss's square root `S`, and `C`, which subtracts the mean over examples."""

    terms: Any
    """Of the loss; None for `S = I`."""
    centred: bool = eqx.field(static=True)

    @classmethod
    def of(cls, loss: Any, outputs: Array, targets: Any, centred: bool) -> "Root":
        return cls(None if loss is None else split_terms(loss, outputs, targets, batch=True), centred)

    def right(self, u: Array) -> Array:
        """`C S u`."""
        return self._centre(u if self.terms is None else self.terms.product("sqrt_mv", u))

    def left(self, u: Array) -> Array:
        """`S^T C u`."""
        u = self._centre(u)
        return u if self.terms is None else self.terms.product("sqrt_rmv", u)

    def _centre(self, u: Array) -> Array:
        return u - jnp.mean(u, axis=0, keepdims=True) if self.centred else u


class Space(eqx.Module):
    """The outputs of one or several functions, with the Jacobian of all of them."""

    @abc.abstractmethod
    def shapes(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Of each function's outputs."""

    @abc.abstractmethod
    def roots(self) -> Sequence[Root]:
        """Of each function."""

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
    kept: Linearised | None
    weight: Float[Array, ""] | None
    with_loss: bool = eqx.field(static=True)
    centred: bool = eqx.field(static=True)


class Functions(Space):
    """Functions of the same parameters, whose batches are in memory; the Jacobian has the roots of their weights."""

    functions: tuple[Function, ...]
    linearised: tuple[Linearised, ...]

    def __init__(self, functions: tuple[Function, ...]):
        self.functions = functions
        self.linearised = tuple(f.kept or Linearised.of(f.problem) for f in functions)

    def shapes(self) -> Sequence[jax.ShapeDtypeStruct]:
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
            return times(weights[k] * weights[m], products(parts[k], parts[m], problems[k].chunk_size))

        numbers = range(len(parts))
        return jnp.block([[block(k, m) for m in numbers] for k in numbers])

    def _weights(self) -> list[Array]:
        return [jnp.ones(()) if f.weight is None else root(f.weight) for f in self.functions]


def inverse_roots(damping: PyTree[Array] | None, params: PyTree[Array]) -> list[Array] | None:
    """`D^-1/2` of each parameter; equal ones are one array where the damping has one number for them."""
    if damping is None:
        return None
    numbers = leaf_dampings(damping, params)
    made = {id(number): jax.lax.rsqrt(number) for number in numbers}
    return [made[id(number)] for number in numbers]


def product(space: Space, us: Outputs) -> Outputs:
    """`X^T X u`."""
    roots = space.roots()
    v = space.vjp([r.right(u) for r, u in zip(roots, us, strict=True)])
    return [r.left(u) for r, u in zip(roots, space.jvp(v), strict=True)]


def matrix(space: Space, damping: PyTree[Array] | None = None) -> Float[Array, "K K"]:
    """`X^T D^-1 X`, in at least float32; rows and columns are the outputs' entries, one function after the other."""
    roots, gram = space.roots(), space.gram(damping)
    if all(r.terms is None and not r.centred for r in roots):
        return gram

    def left(row: Float[Array, " K"]) -> Float[Array, " K"]:
        return _join([r.left(u) for r, u in zip(roots, _split(row, space), strict=True)], row.dtype)

    for _ in range(2):  # a symmetric matrix, from both sides
        gram = jax.vmap(left)(gram).T
    return gram


def solve(space: Space, v: PyTree[Array], number: Array, damping: PyTree[Array] | None) -> PyTree[Array]:
    """`(X X^T + d D)^-1 v = D^-1 (v - X (X^T D^-1 X + d I)^-1 X^T D^-1 v) / d`, with `D = I` for None."""
    roots, gram = space.roots(), matrix(space, damping)

    def divided(v: PyTree[Array]) -> PyTree[Array]:
        if damping is None:
            return v
        leaves, tree = jax.tree.flatten(v)
        numbers = leaf_dampings(damping, v)
        return jax.tree.unflatten(tree, [x / d.astype(x.dtype) for x, d in zip(leaves, numbers, strict=True)])

    wide = gram.dtype
    inner = [r.left(u) for r, u in zip(roots, space.jvp(divided(v)), strict=True)]
    factor = jax.scipy.linalg.cho_factor(gram + number.astype(wide) * jnp.eye(len(gram), dtype=wide), lower=True)
    found = _split(jax.scipy.linalg.cho_solve(factor, _join(inner, wide)), space)
    us = [u.astype(s.dtype) for u, s in zip(found, space.shapes(), strict=True)]
    back = space.vjp([r.right(u) for r, u in zip(roots, us, strict=True)])
    return divided(jax.tree.map(lambda x, y: (x - y) / number.astype(x.dtype), v, back))


def _split(row: Float[Array, " K"], space: Space) -> Outputs:
    """A vector as an array for each function."""
    shapes = space.shapes()
    ends = list(accumulate(prod(s.shape) for s in shapes))
    return [part.reshape(s.shape) for part, s in zip(jnp.split(row, ends[:-1]), shapes, strict=True)]


def _join(parts: Outputs, dtype: Any) -> Float[Array, " K"]:
    return jnp.concatenate([part.reshape(-1).astype(dtype) for part in parts])
