"""The empirical Fisher matrix."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import check_choice, wide_dtype
from ggn_jax._fusion import fusion_boundary
from ggn_jax._sharding import vary_like
from ggn_jax._sums import sum_sequentially
from ggn_jax.loss import Loss
from ggn_jax.operators.base import register, vectors_like
from ggn_jax.operators.jacobian import Jacobian
from ggn_jax.operators.passes import DataLinearOperator
from ggn_jax.operators.problem import Problem, make_problem
from ggn_jax.terms import Terms


class EFLinearOperator(DataLinearOperator):
    """The empirical Fisher matrix `r sum_n g_n g_n^T` (Kunstner et al. 2019).

    `g_n` is the gradient in the parameters of the `n`-th example's unreduced loss, the sum of its terms, class weights
    and masks included; `r` is the reduction (1 for `"sum"`, 1 / (number of terms) for `"mean"`). Positive
    semi-definite; not an approximation of the Hessian in general.

    An example is what is drawn independently, so its gradient is that of all of its terms: the tokens of a sequence,
    the entries of an image. The `"empirical"` vectors of `make_batch_grad_output_fn`, `KFACLinearOperator` and other
    libraries follow this as well. `per="term"` treats each term as an example instead: the diagonal blocks, over terms,
    of the same sum. The two agree where an example has one term.

    A product is one linearisation of the model. Where its derivatives can be taken in reverse mode only, and once (a
    fused function with a backward kernel), it is one gradient of the chunk for each term: pass `chunk_size=1`.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`. With `chunk_size` it must treat examples
            independently (no batch normalisation in training mode), which is checked on two examples outside of `jit`.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Inputs may be a pytree of arrays and of PRNG keys (one for each example, for
            dropout); every leading axis is the batch's, except in `ggn_jax.Unbatched` inputs. Targets must be given.
        per: `"example"` (default) sums over examples, whose terms' gradients are added first; `"term"` over all terms.
        chunk_size: how many examples to process at once; None (default) for all. For a sharded batch it counts the
            examples of all devices together: pass a multiple of their number, and each device processes some of its
            own.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> ef = EFLinearOperator(lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), params, batch)
        >>> ef.mv(params)["w"].shape
        (2, 3)

    References:
        - Kunstner, Balles and Hennig (2019), *Limitations of the empirical Fisher approximation for natural gradient
          descent*: https://arxiv.org/abs/1905.12558
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
        per: Literal["term", "example"] = "example",
        chunk_size: int | None = None,
        has_aux: bool = False,
    ):
        check_choice("per", per, ("term", "example"))
        self.problem, self.per = make_problem(model_fn, loss, params, batch, chunk_size, has_aux=has_aux), per
        self.problem.check_chunks()

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return vectors_like(self.problem.params)

    def _details(self) -> dict[str, Any]:
        return {"loss": self.problem.loss, "outputs": self.problem.outputs, "per": self.per}

    def _mv(self, v: PyTree[Array]) -> PyTree[Array]:
        problem = self.problem
        v = vary_like(v, problem.params)

        def product(terms_at: Any, inputs: PyTree, operand: Any) -> PyTree[Array]:
            jacobian = Jacobian.of(problem, inputs)
            terms = terms_at(jacobian.outputs, operand)
            try:
                tangent = fusion_boundary(jacobian.jvp(v))
            except NotImplementedError:  # reverse mode only, and once only
                return _map_sequential(jacobian, terms, self.per == "term", v)
            return jacobian.vjp(terms.empirical_product(tangent, self.per == "term"))

        return problem.sum_over_chunks(product)


def _map_sequential(jacobian: Jacobian, terms: Terms, per_term: bool, v: PyTree[Array]) -> PyTree[Array]:
    """`sum_t g_t (g_t^T v)` with the gradient of one term or example at a time, for models without forward mode."""
    g, wide = terms.empirical(), wide_dtype(v)
    index_of, count = terms.term_indices(per_term)

    def outer(index: Array) -> PyTree[Array]:
        gradient = jacobian.vjp(jnp.where(index_of == index, g, 0).astype(terms.dtype))
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(v), strict=True)
        inner = jnp.stack([jnp.sum(x.astype(wide) * y.astype(wide)) for x, y in pairs]).sum()
        return jax.tree.map(lambda x: inner.astype(x.dtype) * x, gradient)

    return sum_sequentially(outer, jnp.arange(count))


register(EFLinearOperator, positive_semidefinite=True)
