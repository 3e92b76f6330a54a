"""The quadratic model of a batch's loss along a few directions."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ggn_jax._sharding import vary_like
from ggn_jax._weights import weighted_sum
from ggn_jax.operators.jacobian import Jacobian
from ggn_jax.operators.problem import Problem, WeightedProblems
from ggn_jax.optimizer.numbers import inner


class QuadraticForm(NamedTuple):
    """`M(c) = b^T c + c^T K c / 2`: the predicted change of the loss along `sum_i c_i d_i`."""

    b: Float[Array, " k"]
    k: Float[Array, "k k"]

    def change(self, c: Float[Array, " k"]) -> Float[Array, ""]:
        return self.b @ c + c @ (self.k @ c) / 2

    def minimum(self) -> Float[Array, " k"]:
        """The `c` of least norm that minimises it; directions of no length get 0."""
        scale = jnp.sqrt(jnp.maximum(jnp.diagonal(self.k), 0))
        safe = jnp.where(scale > 0, scale, 1)
        values, vectors = jnp.linalg.eigh(self.k / safe[:, None] / safe[None, :])
        keep = values > 1e-6 * jnp.max(values)
        coefficients = jnp.where(keep, vectors.T @ (-self.b / safe) / jnp.where(keep, values, 1), 0)
        return jnp.where(scale > 0, vectors @ coefficients / safe, 0)


def quadratic_model(
    problem: Problem | WeightedProblems, gradient: PyTree[Array], directions: Sequence[PyTree[Array]], damping: Array
) -> QuadraticForm:
    """`b_i = g^T d_i`, `K_ij = d_i^T (GGN + damping I) d_j`: the exact GGN of the batch, by one tangent a direction."""

    def part(problem: Problem, terms_at: Any, inputs: PyTree, operand: Any) -> Float[Array, "k k"]:
        jacobian = Jacobian.of(problem, inputs)
        terms = terms_at(jacobian.outputs, operand)
        tangents = [jacobian.jvp(_like(direction, problem.params)) for direction in directions]
        curved = [terms.product("mv", tangent) for tangent in tangents]
        return jnp.stack([jnp.stack([inner(tangent, c) for c in curved]) for tangent in tangents])

    k = _total(problem, lambda one: one.sum_over_chunks(partial(part, one)))
    lengths = jnp.stack([jnp.stack([inner(c, d) for d in directions]) for c in directions]).astype(k.dtype)
    k = k + damping.astype(k.dtype) * lengths
    return QuadraticForm(jnp.stack([inner(gradient, d) for d in directions]).astype(k.dtype), (k + k.T) / 2)


def reduction_ratio(
    problem: Problem | WeightedProblems, model: QuadraticForm, c: Float[Array, " k"], step: PyTree[Array]
) -> Float[Array, ""]:
    """How much of the predicted decrease of the batch's loss the step achieves.

    Minus infinity if an increase is predicted; 1/2, neither good nor bad, if nothing is, as for a step of no length.
    """
    moved = jax.tree.map(lambda p, s: p + s.astype(p.dtype), problem.params, step)
    predicted = model.change(c)
    achieved = (loss_at(problem, moved) - loss_at(problem, problem.params)).astype(predicted.dtype)
    ratio = achieved / jnp.where(predicted < 0, predicted, 1)
    return jnp.where(predicted == 0, 1 / 2, jnp.where((predicted < 0) & jnp.isfinite(ratio), ratio, -jnp.inf))


def loss_at(problem: Problem | WeightedProblems, params: PyTree[Array]) -> Float[Array, ""]:
    """The batch's loss, in at least float32."""

    def of_one(one: Problem) -> Array:
        found: Array = one.sum_over_chunks(
            lambda terms_at, inputs, operand: terms_at(one.model_fn(params, inputs), operand).wide_loss_value()
        )
        return found

    return _total(problem, of_one)


def _total(problem: Problem | WeightedProblems, fn: Callable[[Problem], Array]) -> Array:
    """`fn` of a problem, or the weighted sum of that of several."""
    if isinstance(problem, Problem):
        return fn(problem)
    total: Array = weighted_sum([fn(one) for one in problem.problems], problem.weights)
    return total


def _like(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    return vary_like(jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like), like)
