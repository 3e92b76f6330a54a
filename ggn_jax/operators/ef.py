"""The empirical Fisher matrix."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._fusion import fusion_boundary
from ggn_jax._sharding import vary_like
from ggn_jax.loss import Loss
from ggn_jax.operators.base import CurvatureLinearOperator, register, vectors_like
from ggn_jax.operators.problem import Problem, pose


class EFLinearOperator(CurvatureLinearOperator):
    r"""The empirical Fisher matrix `r sum_n g_n g_n^T` (Kunstner et al. 2019).

    `g_n` is the gradient in the parameters of the `n`-th example's unreduced loss, the sum of its terms, class weights
    and masks included; `r` is the reduction (1 for `"sum"`, 1 / (number of terms) for `"mean"`). Positive
    semi-definite; not an approximation of the Hessian in general.

    An example is what is drawn independently, so its gradient is that of all of its terms: the tokens of a sequence,
    the entries of an image. So it is for the `"empirical"` vectors of `make_batch_grad_output_fn` and
    `KFACLinearOperator`, and for other libraries. `per="term"` takes the terms' gradients apart instead, as if each
    were an example: the diagonal blocks, over terms, of the same sum. Both are one where an example has one term.

    **Arguments:** `model_fn`, `loss`, `params`, `batch`, `chunk_size` as for `GGNLinearOperator`, and

    - `per`: `"datum"` sums over examples, whose terms' gradients are added first; `"term"` over all terms.

    >>> import jax.numpy as jnp, ggn_jax
    >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
    >>> ef = EFLinearOperator(lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), params, batch)
    >>> ef.mv(params)["w"].shape
    (2, 3)
    """

    problem: Problem
    per: str = eqx.field(static=True)

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        params: PyTree[Array],
        batch: tuple[PyTree, Any],
        *,
        per: Literal["term", "datum"] = "datum",
        chunk_size: int | None = None,
    ):
        if per not in ("term", "datum"):
            raise ValueError(f"per must be 'term' or 'datum'; got {per!r}.")
        self.problem, self.per = pose(model_fn, loss, params, batch, chunk_size), per
        self.problem.check_chunks()

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return vectors_like(self.problem.params)

    def _details(self) -> dict[str, Any]:
        return {"loss": self.problem.loss, "outputs": self.problem.outputs, "per": self.per}

    def _mv(self, v: PyTree[Array]) -> PyTree[Array]:
        problem = self.problem
        v = vary_like(v, problem.params)

        def product(terms_at: Any, inputs: PyTree, operand: Any) -> PyTree[Array]:
            outputs, jvp = jax.linearize(lambda params: problem.model_fn(params, inputs), problem.params)
            terms = terms_at(outputs, operand)
            g = terms.gradients()
            axes = terms.axes if self.per == "term" else tuple(range(1, g.ndim))
            inner = jnp.sum(g * fusion_boundary(jvp(v)).astype(g.dtype), axis=axes, keepdims=True)
            # Where everything is ignored, r is infinite and g is 0.
            cotangent = jnp.where(g == 0, 0, terms.r * inner * g)
            return jax.linear_transpose(jvp, problem.params)(cotangent.astype(terms.dtype))[0]

        return problem.sum_over_chunks(product)


register(EFLinearOperator, positive_semidefinite=True)
