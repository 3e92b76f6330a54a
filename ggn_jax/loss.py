"""What a loss is: the contract between a loss and everything built on it."""

import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ggn_jax._checks import Shaped, check_choice, is_concrete
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
    """A loss: a reduction factor times a sum of independent *terms*, such as one per position of a sequence.

    To add a loss of your own, subclass `LikelihoodLoss`, which derives everything from a log-likelihood. This class is
    for losses with known closed forms. Each method is about **one plain term**; `ggn_jax.terms` maps it over all terms
    and applies reduction and weights.

    `loss(outputs, targets)` returns the loss of a batch, outputs `[N, *out]`.

    Args:
        reduction: `"mean"` (default) or `"sum"`.

    Raises:
        ValueError: for another reduction.
    """

    curvature: ClassVar[Literal["hessian", "fisher"]]
    """Which matrix a term has: its Hessian, which is then positive semi-definite, or its Fisher."""
    term_axes: ClassVar[tuple[int, ...]] = ()
    """The axes of one example's output that belong to one term."""
    takes_trailing_axes: ClassVar[bool] = False
    """Whether the methods below also take many terms at once, as trailing axes: `f [*term, *positions]`."""
    reduction: str = eqx.field(default="mean", static=True, kw_only=True)

    def __check_init__(self) -> None:
        note = " (A loss that is not reduced has no Hessian: reduce it, or map over the data.)"
        check_choice("reduction", self.reduction, ("mean", "sum"), note)

    def __call__(self, outputs: Any, targets: Any) -> Float[Array, ""]:
        """Compute the loss of a batch; `0/0` (everything ignored) counts as 0.

        Args:
            outputs: the model's outputs, floating, `[N, *out]`.
            targets: their targets.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError, TypeError: for shapes, dtypes or values that do not fit the loss.
        """
        return _loss_value(self, *check_terms(self, outputs, targets, batch=True))

    def targets_valid(self, outputs: Any, targets: Any, *, batch: bool = True) -> Bool[Array, "*positions"]:
        """Tell which targets are in the loss's domain: a class index in range, say.

        Outside of `jit`, every function of this package raises ValueError for a target that is not. Under `jit`, where
        values are unknown, its results are NaN there, which this function tells beforehand.

        Args:
            outputs: a batch of model outputs, `[N, *out]`, or one example's, `[*out]`.
            targets: their targets.
            batch: whether outputs and targets have a leading batch axis; True by default.

        Returns:
            Booleans `[*positions]`, one for each term.

        Raises:
            ValueError, TypeError: for shapes or dtypes that do not fit.
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
        """Compute the factor of the term's curvature; 0 ignores the term.

        Args:
            f: the term's output, `[*term]`.
            y: what the term needs besides its output: its part of what `operand` returns.

        Returns:
            The factor; 1 unless overridden.
        """
        return jnp.ones(f.shape[len(self.term_axes) :], f.dtype)

    def term_count(self, f: Float[Array, "*term"], y: Any) -> Float[Array, "..."]:
        """Compute what the term adds to the denominator of `reduction="mean"`.

        Args:
            f: the term's output, `[*term]`.
            y: what the term needs besides its output: its part of what `operand` returns.

        Returns:
            The count; 1 unless overridden.
        """
        return jnp.ones(f.shape[len(self.term_axes) :], f.dtype)

    def term_valid(self, f: Float[Array, "*term"], y: Any) -> Bool[Array, "..."]:
        """Tell whether the target's values are in the loss's domain.

        Args:
            f: the term's output, `[*term]`.
            y: what the term needs besides its output: its part of what `operand` returns.

        Returns:
            A boolean; True unless overridden.
        """
        return jnp.ones(f.shape[len(self.term_axes) :], bool)

    @abc.abstractmethod
    def term_value(self, f: Float[Array, "*term"], y: Any) -> Float[Array, "..."]:
        """Compute the value of the weighted term.

        Args:
            f: the term's output, `[*term]`.
            y: what the term needs besides its output: its part of what `operand` returns.

        Returns:
            The value, a scalar.
        """

    @abc.abstractmethod
    def term_gradient(self, f: Float[Array, "*term"], y: Any) -> Float[Array, "*term"]:
        """Compute the gradient of the weighted term in `f`.

        Args:
            f: the term's output, `[*term]`.
            y: what the term needs besides its output: its part of what `operand` returns.

        Returns:
            The gradient, `[*term]`.
        """

    @abc.abstractmethod
    def term_hessian(self, f: Float[Array, "*term"], y: Any) -> TermHessian:
        """Compute the curvature of the plain term.

        Args:
            f: the term's output, `[*term]`.
            y: what the term needs besides its output: its part of what `operand` returns.

        Returns:
            Its Hessian in `f`, or its Fisher (`curvature`), with products and a square root.
        """

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...], f: jax.ShapeDtypeStruct) -> Array:
        """Draw the random numbers for `shape` terms like `f`.

        Args:
            key: a PRNG key.
            shape: the leading axes of what is drawn, one entry for each term.
            f: the shape and dtype of one term's output.

        Returns:
            An array whose leading axes are `shape`.
        """

    def settle(self, f: Float[Array, "*term"], y: Any, drawn: Array) -> Array:
        """Reduce one term's random numbers to what `sampled_gradient` needs: a label, say, where that is smaller.

        Args:
            f: the term's output, `[*term]`.
            y: what the term needs besides its output: its part of what `operand` returns.
            drawn: the term's part of what `draw` returned.

        Returns:
            An array; `drawn` itself unless overridden.
        """
        return drawn

    @abc.abstractmethod
    def sampled_gradient(self, f: Float[Array, "*term"], y: Any, drawn: Array) -> Float[Array, "*term"]:
        """Compute a sampled gradient `g` of the plain term, for which `E[g g^T]` is its Hessian.

        Args:
            f: the term's output, `[*term]`.
            y: what the term needs besides its output: its part of what `operand` returns.
            drawn: what `settle` returned.

        Returns:
            The gradient, `[*term]`.
        """

    def stand_in_targets(self, outputs: Shaped, batch: bool) -> Array:
        """Make the targets that stand for `targets=None`, where curvature and weights depend on no target.

        With them, nothing is ignored. A loss that does not define this method needs targets.

        Args:
            outputs: a batch of model outputs, `[N, *out]`, or one example's, `[*out]`.
            batch: whether outputs have a leading batch axis.

        Returns:
            Targets for these outputs.

        Raises:
            ValueError: for a loss that needs targets.
        """
        raise self._needs_targets("may depend on them")

    def _needs_targets(self, why: str) -> ValueError:
        return ValueError(f"targets must be given, not None: the curvature of {type(self).__name__} {why}.")

    def split(self, outputs: Array, targets: Any, batch: bool) -> Terms:
        """Split the loss at these outputs into its terms.

        Args:
            outputs: a batch of model outputs, `[N, *out]`, or one example's, `[*out]`.
            targets: their targets.
            batch: whether outputs and targets have a leading batch axis.

        Returns:
            The terms, with reduction and weights.
        """
        return split_one_loss(self, outputs, targets, batch)

    # Layout.

    @abc.abstractmethod
    def check_shapes(self, outputs: Shaped, targets: Array, batch: bool) -> None:
        """Refuse outputs and targets whose shapes or dtypes do not fit.

        Args:
            outputs: a batch of model outputs, `[N, *out]`, or one example's, `[*out]`.
            targets: their targets.
            batch: whether outputs and targets have a leading batch axis.

        Raises:
            ValueError: for shapes that do not fit.
            TypeError: for dtypes that do not fit.
        """

    @abc.abstractmethod
    def operand(self, outputs: Array, targets: Array, batch: bool) -> tuple[Any, tuple[int, ...]]:
        """Return what each term needs besides its output.

        Args:
            outputs: a batch of model outputs, `[N, *out]`, or one example's, `[*out]`.
            targets: their targets.
            batch: whether outputs and targets have a leading batch axis.

        Returns:
            A pytree of arrays, and the axes of its leaves that belong to one term.
        """

    def check_values(self, outputs: Shaped, targets: Any, batch: bool) -> None:
        """Refuse targets that are not in the loss's domain, where values are known.

        Args:
            outputs: a batch of model outputs, `[N, *out]`, or one example's, `[*out]`.
            targets: their targets.
            batch: whether outputs and targets have a leading batch axis.

        Raises:
            ValueError: for such a target.
        """
        check_values_of_one_loss(self, outputs, targets, batch)

    @property
    def restricts_targets(self) -> bool:
        """Whether some targets of the right shape and dtype are not in the loss's domain."""
        return type(self).term_valid is not Loss.term_valid

    def target_domain(self, shape: tuple[int, ...], batch: bool) -> str:
        """Describe the targets that `term_valid` accepts, for error messages.

        Args:
            shape: the shape of the outputs.
            batch: whether outputs and targets have a leading batch axis.

        Returns:
            Words that complete "targets must be ...".
        """
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
