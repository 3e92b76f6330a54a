"""What a loss is: the contract between a loss and everything built on it."""

import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ggn_jax._checks import Shaped, is_concrete
from ggn_jax._repr import options
from ggn_jax._sharding import run_auto
from ggn_jax.term_hessian import TermHessian
from ggn_jax.terms import (
    Terms,
    check_shapes_and_dtypes,
    check_terms,
    check_values_of_one_loss,
    find_valid,
    split_one_loss,
    split_terms,
)


class Loss(eqx.Module):
    r"""A loss: a reduction factor times a sum of independent *terms*, such as one per position of a sequence.

    To add a loss of your own, subclass `LikelihoodLoss`, which derives everything from a log-likelihood. This class is
    for those who know closed forms. Each method is about **one plain term**; `ggn_jax.terms` maps it over all of them
    and applies reduction and weights.

    **Arguments:** `reduction`: `"mean"` or `"sum"`.

    **Calling** `loss(outputs, targets)` returns the loss of a batch, outputs `[N, *out]`.
    """

    curvature: ClassVar[Literal["hessian", "fisher"]]
    """Whether the terms' matrix is their Hessian, which is then positive semi-definite, or their Fisher."""
    term_axes: ClassVar[tuple[int, ...]] = ()
    """The axes of one example's output that belong to one term."""
    takes_trailing_axes: ClassVar[bool] = False
    """Whether the methods below also take many terms at once, as trailing axes: `f [*term, *positions]`."""
    reduction: str = eqx.field(default="mean", static=True, kw_only=True)

    def __check_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"reduction must be 'mean' or 'sum'; got {self.reduction!r}. (A loss that is not reduced has no"
                " Hessian: reduce it, or map over the data.)"
            )

    def __call__(self, outputs: Any, targets: Any) -> Float[Array, ""]:
        """The loss of a batch: outputs `[N, *out]` and their targets. `0/0` (everything ignored) counts as 0."""
        return _loss_value(self, *check_terms(self, outputs, targets, batch=True))

    def targets_valid(self, outputs: Any, targets: Any, *, batch: bool = True) -> Bool[Array, "*positions"]:
        """Whether the target of each term is of the loss's domain (a class index in range, say), `[*positions]`.

        Outside of `jit`, every function of this package raises ValueError where it is not. Under `jit`, where
        values are unknown, the results are NaN there, and this says so beforehand. `batch` says whether outputs and
        targets have a leading batch axis.
        """
        outputs, targets = check_shapes_and_dtypes(self, outputs, targets, batch)
        return find_valid(self, outputs, targets, batch)

    def __repr__(self) -> str:
        return options(self)

    def __hash__(self) -> int:
        # Modules with arrays have no hash; `jax.jit(loss)` needs one.
        leaves, structure = jax.tree.flatten(self)
        return hash((structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)))

    def __eq__(self, other: object) -> bool:
        (mine, structure), (theirs, their_structure) = jax.tree.flatten(self), jax.tree.flatten(other)
        same = structure == their_structure  # type: ignore[operator]  # jax's annotation is not a class
        return bool(same) and all(map(_is_same, mine, theirs))

    # One term: f is its output, y its part of `operand`.

    def term_weight(self, f: Float[Array, "*term"], y: Any) -> Float[Array, "..."]:
        """The factor of the term's curvature; 0 ignores the term."""
        return jnp.ones(f.shape[len(self.term_axes) :], f.dtype)

    def term_count(self, f: Float[Array, "*term"], y: Any) -> Float[Array, "..."]:
        """What the term adds to the denominator of `reduction="mean"`."""
        return jnp.ones(f.shape[len(self.term_axes) :], f.dtype)

    def term_valid(self, f: Float[Array, "*term"], y: Any) -> Bool[Array, "..."]:
        """Whether the target's values are of the loss's domain."""
        return jnp.ones(f.shape[len(self.term_axes) :], bool)

    @abc.abstractmethod
    def term_value(self, f: Float[Array, "*term"], y: Any) -> Float[Array, "..."]:
        """The value of the weighted term."""

    @abc.abstractmethod
    def term_gradient(self, f: Float[Array, "*term"], y: Any) -> Float[Array, "*term"]:
        """The gradient of the weighted term in `f`."""

    @abc.abstractmethod
    def term_hessian(self, f: Float[Array, "*term"], y: Any) -> TermHessian:
        """The curvature of the plain term."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...], f: jax.ShapeDtypeStruct) -> Array:
        """Random numbers for `shape` terms like `f`, with leading axes `shape`."""

    def settle(self, f: Float[Array, "*term"], y: Any, drawn: Array) -> Array:
        """What `sampled_gradient` needs of the term's share of `draw`: a label, say, where that is smaller."""
        return drawn

    @abc.abstractmethod
    def sampled_gradient(self, f: Float[Array, "*term"], y: Any, drawn: Array) -> Float[Array, "*term"]:
        """A would-be gradient `g` of the plain term, `E[g g^T]` its Hessian, from what `settle` returns."""

    def stand_in_targets(self, outputs: Shaped, batch: bool) -> Array:
        """Targets that give every example's curvature and weight where these depend on no target: for `targets=None`.

        With them, nothing is ignored. A loss that does not define it needs targets.
        """
        raise self._needs_targets("may depend on them")

    def _needs_targets(self, why: str) -> ValueError:
        return ValueError(f"targets must be given, not None: the curvature of {type(self).__name__} {why}.")

    def split(self, outputs: Array, targets: Any, batch: bool) -> Terms:
        """The terms at these outputs."""
        return split_one_loss(self, outputs, targets, batch)

    # Layout.

    @abc.abstractmethod
    def check_shapes(self, outputs: Shaped, targets: Array, batch: bool) -> None:
        """Refuse outputs and targets that do not fit; `batch` says whether they have a leading batch axis."""

    @abc.abstractmethod
    def operand(self, outputs: Array, targets: Array, batch: bool) -> tuple[Any, tuple[int, ...]]:
        """What each term needs besides its output (a pytree), and the axes of its leaves that belong to one term."""

    def check_values(self, outputs: Shaped, targets: Any, batch: bool) -> None:
        """Refuse targets that are not of the loss's domain, where values can be looked at."""
        check_values_of_one_loss(self, outputs, targets, batch)

    @property
    def restricts_targets(self) -> bool:
        """Whether there are targets of the right shape and dtype that are not of the loss's domain."""
        return type(self).term_valid is not Loss.term_valid

    def target_domain(self, shape: tuple[int, ...], batch: bool) -> str:
        """The targets that `term_valid` accepts, in words, for outputs of this shape."""
        return "in the domain of the loss"


def _is_same(a: Any, b: Any) -> bool:
    """Whether two leaves are known to be equal: traced values are so only to themselves."""
    if a is b or not isinstance(a, jax.Array) or not isinstance(b, jax.Array):
        return a is b or (type(a) is type(b) and bool(a == b))
    return is_concrete(a) and is_concrete(b) and a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


@jax.jit
def _loss_value(loss: Loss, outputs: Array, targets: Array) -> Float[Array, ""]:
    def value(outputs: Array, targets: Array, loss: Loss) -> Array:
        return split_terms(loss, outputs, targets, batch=True).loss_value()

    return run_auto(value, outputs, targets, loss, keep=False)
