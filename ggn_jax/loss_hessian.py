"""The Hessian of a loss in the model's outputs, as a structured object."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax._checks import as_array, as_outputs, check_real
from ggn_jax._outputs import flatten_outputs
from ggn_jax._repr import fields
from ggn_jax._sharding import compiler_sharded
from ggn_jax._supported import check_exact, check_supported, stand_in_targets
from ggn_jax.fisher_type import FisherType
from ggn_jax.joint import JointLoss, JointTerms, check_joint_terms
from ggn_jax.loss import Loss
from ggn_jax.terms import Terms, check_terms, split_terms


class LossHessian(eqx.Module):
    """The Hessian `H` of a loss in the model's outputs, and a square root `S` with `S S^T = H`.

    Terms are independent, so `H` is block diagonal, and each block has a closed form: for cross-entropy
    `diag(p) - p p^T` and `S = diag(sqrt p) - p sqrt(p)^T` per position. Products cost O(C) per position; `[*out, *out]`
    is never formed. Results have the outputs' dtype and are computed in at least float32.

    It is a pytree: pass it through `jax.jit`, make it under `jax.vmap` (with `batch=False`) or `jax.grad`.

    Args:
        loss: a `Loss` with `curvature="hessian"`, or with an exact Fisher factor (then `H` is the Fisher).
        outputs: a batch of outputs, `[N, *out]`; `H` is then the Hessian of the loss of the whole batch. For a
            `JointLoss` a dict of them; vectors, products and the diagonal are dicts then, too.
        targets: their targets. They may be None where `H` depends on no target (no class weights, say): nothing is
            ignored then.
        batch: True (default) for a batch; False for one example, `[*out]`, whose loss is that of a batch of one.

    Raises:
        ValueError, TypeError: for outputs and targets that do not fit the loss.
        NotImplementedError: for a loss without an exact square root.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> H = LossHessian(ggn_jax.MSELoss(), jnp.zeros((2, 4)), jnp.ones((2, 4)))
        >>> print(H.mv(jnp.ones((2, 4)))[0], H.trace())
        [0.25 0.25 0.25 0.25] 2.0
    """

    terms: Terms | JointTerms

    def __init__(self, loss: Loss, outputs: Any, targets: Any, *, batch: bool = True):
        check_exact(check_supported(loss))
        if isinstance(loss, JointLoss):
            self.terms = _split(*check_joint_terms(loss, outputs, targets, batch), batch)
            return
        if targets is None:
            outputs = as_outputs("outputs", outputs, batch)
            targets = stand_in_targets(loss, outputs, FisherType.TYPE2, batch=batch)
        self.terms = _split(loss, *check_terms(loss, outputs, targets, batch), batch)

    def __repr__(self) -> str:
        return fields(self, loss=self.terms.loss, outputs=self._like_outputs(self.terms.outputs))

    def mv(self, v: Any) -> Float[Array, "*shape"]:
        """Compute `H v`.

        Args:
            v: an array of the outputs' shape.

        Returns:
            An array of the outputs' shape.
        """
        return self._product("v", v, "mv")

    def sqrt_mv(self, v: Any) -> Float[Array, "*shape"]:
        """Compute `S v`.

        Args:
            v: an array of the outputs' shape.

        Returns:
            An array of the outputs' shape.
        """
        return self._product("v", v, "sqrt_mv")

    def sqrt_rmv(self, u: Any) -> Float[Array, "*shape"]:
        """Compute `S^T u`.

        Args:
            u: an array of the outputs' shape.

        Returns:
            An array of the outputs' shape.
        """
        return self._product("u", u, "sqrt_rmv")

    def diagonal(self) -> Float[Array, "*shape"]:
        """Return the diagonal of `H`, in the outputs' shape."""
        return self._like_outputs(_diagonal(self.terms).astype(self.terms.dtype))

    def trace(self) -> Float[Array, ""]:
        """Return the trace of `H`, a scalar."""
        return jnp.sum(_diagonal(self.terms)).astype(self.terms.dtype)

    def _product(self, name: str, v: Any, what: str) -> Any:
        if not isinstance(self.terms, JointTerms):
            return _product(self.terms, self._check(name, v, self.terms.outputs.shape), what)
        self.terms.loss._check_names(name, v)
        parts = self.terms.parts
        vs = {k: self._check(f"{name}[{k!r}]", v[k], terms.outputs.shape) for k, terms in parts.items()}
        return self._like_outputs(_product(self.terms, flatten_outputs(vs, int(self.terms.batch)), what))

    def _like_outputs(self, x: Array) -> Any:
        """What has an entry for each output, of a `JointLoss` as a dict."""
        if not isinstance(self.terms, JointTerms):
            return x
        return {k: found.astype(self.terms.parts[k].dtype) for k, (_, found) in self.terms.loss._heads(x).items()}

    def _check(self, name: str, v: Any, shape: tuple[int, ...]) -> Array:
        v = as_array(name, v)
        check_real(name, v)
        if v.shape != shape:
            raise ValueError(f"{name} must have the outputs' shape {shape}; got {v.shape}.")
        return v


@partial(jax.jit, static_argnames="batch")
@compiler_sharded
def _split(loss: Loss, outputs: Array, targets: Any, batch: bool) -> Terms | JointTerms:
    return split_terms(loss, outputs, targets, batch=batch)


@partial(jax.jit, static_argnames="name")
@partial(compiler_sharded, like=lambda terms, v, name: v)
def _product(terms: Terms | JointTerms, v: Array, name: str) -> Array:
    return terms.product(name, v)


@jax.jit
@compiler_sharded
def _diagonal(terms: Terms | JointTerms) -> Array:
    return terms.diagonal()
