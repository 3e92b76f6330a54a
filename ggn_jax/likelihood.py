"""Losses defined by a log-likelihood: everything else comes from automatic differentiation."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ggn_jax._checks import Shaped, check_real, compute_dtype
from ggn_jax.loss import Loss
from ggn_jax.term_hessian import AutodiffHessian, MatrixSqrt, TermHessian, depends_on
from ggn_jax.terms import map_positions, term_axes, term_positions


class LikelihoodLoss(Loss):
    """A loss of your own, from **one term's** negative log-likelihood and a sampler of its predictive distribution.

    Batching, layout, reduction and scaling are done for you. A subclass defines:

    - `curvature` (class attribute, required): `"hessian"` if each term's Hessian in the output is positive
      semi-definite, `"fisher"` if it may not be (Student-t, a Gaussian with a learned variance). It says which matrix
      the vectors reproduce.
    - `term_axes` (class attribute): the axes of one example's output that make up one term: `()`, the default, if each
      entry is a term of its own; `(-1,)` if the last axis holds a term's parameters.
    - `nll(f, y)`: the negative log-likelihood of one term; `f` has the shape of one term, `y` that of one `sample`.
    - `sample(key, f)`: a target drawn at `f`. Its shape is that of one term's target: `()`, or the term's own.
    - `term_valid(f, y)` (optional): whether `y` is in the domain: targets that are not are refused, and give NaN inside
      of `jit`. `target_domain(shape, batch)` says in words what is, for the error.
    - `term_weight(f, y)` (optional): the factor, at least 0, of the term's value, gradient and curvature; it may use a
      part of the target that holds a weight for each example. 0 ignores the term. `term_count(f, y)` is what it adds to
      the denominator of `reduction="mean"`: without it 1, also where the term is ignored.
    - `fisher_sqrt(f)` (optional, for `curvature="fisher"`): an exact factor `S` of one term's Fisher matrix, shape
      `[*term, *term]`. Without it only `"mc"` and `"empirical"` vectors exist.

    Subclasses are Equinox modules: fields hold parameters, and no `__init__` is needed. Arrays and floats may be
    traced; anything else must be an `equinox.field(static=True)`.

    With `curvature="hessian"` the square root is an eigendecomposition of the `K x K` term Hessian; one that turns out
    not to be positive semi-definite gives NaN, and operators refuse it where values are known. `ggn_jax.check_loss`
    checks that these definitions, the sampler included, fit together: run it once in a test. Monte-Carlo vectors are
    gradients at sampled targets; where the Hessian depends on the target, so that it is not the Fisher, they are `S e`
    with random signs `e`, which is unbiased.

    Args:
        reduction: `"mean"` (default) or `"sum"`.

    Raises:
        ValueError: for another reduction.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> class PoissonLoss(LikelihoodLoss):
        ...     "Counts; the output is the log-rate."
        ...
        ...     curvature = "hessian"
        ...
        ...     def nll(self, f, y):
        ...         return jnp.exp(f) - y * f
        ...
        ...     def sample(self, key, f):
        ...         return jax.random.poisson(key, jnp.exp(f)).astype(f.dtype)
        >>> print(PoissonLoss(reduction="sum")(jnp.zeros((4, 3)), jnp.ones((4, 3))))
        12.0
    """

    def __check_init__(self) -> None:
        if getattr(self, "curvature", None) not in ("hessian", "fisher"):
            raise TypeError(
                f"{type(self).__name__} must declare curvature = 'hessian' (each term's Hessian is positive"
                f" semi-definite) or curvature = 'fisher' (it may not be); got {getattr(self, 'curvature', None)!r}."
            )

    @abc.abstractmethod
    def nll(self, f: Float[Array, "*term"], y: Array) -> Float[Array, ""]:
        """Compute the negative log-likelihood of one term.

        Args:
            f: the term's output, `[*term]`.
            y: its target, of the shape of one `sample`.

        Returns:
            The value, a scalar.
        """

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, f: Float[Array, "*term"]) -> Array:
        """Draw a target of one term from the predictive distribution at `f`.

        Args:
            key: a PRNG key.
            f: the term's output, `[*term]`.

        Returns:
            A target, a scalar or of the shape of the term.
        """

    def fisher_sqrt(self, f: Float[Array, "*term"]) -> Float[Array, "..."]:
        """Compute a factor `S` of one term's Fisher matrix, `S S^T`.

        Args:
            f: the term's output, `[*term]`.

        Returns:
            The factor, `[*term, *term]`.

        Raises:
            NotImplementedError: unless the subclass defines it.
        """
        raise missing_fisher_sqrt(self)

    def _has_fisher_sqrt(self) -> bool:
        """Whether the subclass defines `fisher_sqrt`."""
        return type(self).fisher_sqrt is not LikelihoodLoss.fisher_sqrt

    def term_value(self, f: Float[Array, "*term"], y: Any) -> Float[Array, ""]:
        return self.term_weight(f, y) * self.nll(f, y)

    def term_gradient(self, f: Float[Array, "*term"], y: Any) -> Float[Array, "*term"]:
        return jax.grad(self.term_value)(f, y)

    def term_hessian(self, f: Float[Array, "*term"], y: Any) -> TermHessian:
        if self.curvature == "hessian":
            return AutodiffHessian(lambda f: self.nll(f, y), f)
        sqrt = self.fisher_sqrt(f)
        if sqrt.shape != 2 * f.shape:
            raise ValueError(
                f"{type(self).__name__}.fisher_sqrt must return an array of shape {2 * f.shape}; got {sqrt.shape}."
            )
        return MatrixSqrt(sqrt, f.ndim)

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...], f: jax.ShapeDtypeStruct) -> Array:
        return jax.random.split(key, shape)

    def sampled_gradient(self, f: Float[Array, "*term"], y: Any, drawn: Array) -> Float[Array, "*term"]:
        # A sampler's loop need not end where the output is NaN, as it may be where the term is ignored.
        f = jnp.where(self.term_weight(f, y) == 0, 0, f)
        if self.curvature == "hessian" and depends_on(lambda f, y: jax.hessian(self.nll)(f, y), 1, f, y):
            return self.term_hessian(f, y).sqrt_mv(jax.random.rademacher(drawn, f.shape, f.dtype))
        return jax.grad(self.nll)(f, jax.lax.stop_gradient(self.sample(drawn, f)))

    def _indefiniteness(self, f: Float[Array, "*term"], y: Any) -> Float[Array, ""]:
        """How negative the least eigenvalue of the term's Hessian is, relative to the largest one; 0 if it is not."""
        hessian = self.term_hessian(f, y) if self.curvature == "hessian" else None
        return hessian.indefiniteness() if isinstance(hessian, AutodiffHessian) else jnp.zeros((), f.dtype)

    def draw_targets(self, key: PRNGKeyArray, outputs: Float[Array, "*shape"], batch: bool) -> Array:
        """Draw targets for outputs, each term's by `sample`.

        Args:
            key: a PRNG key.
            outputs: a batch of model outputs, `[N, *out]`, or one example's, `[*out]`.
            batch: whether outputs have a leading batch axis.

        Returns:
            Targets for these outputs.
        """
        axes, positions = term_axes(self, outputs, batch), term_positions(self, outputs, batch)
        trailing = axes if self._sample_structure(outputs, batch).ndim else ()
        sample = map_positions(lambda key, f: self.sample(key, f), ((), axes), trailing, len(positions))
        return sample(jax.random.split(key, positions), outputs)

    def check_shapes(self, outputs: Shaped, targets: Array, batch: bool) -> None:
        check_real("targets", targets)
        sample = self._sample_structure(outputs, batch)
        self._check_nll(outputs, sample, batch)
        wanted = outputs.shape if sample.ndim else term_positions(self, outputs, batch)
        if targets.shape != wanted:
            raise ValueError(
                f"targets must have shape {wanted} for outputs of shape {outputs.shape} and {type(self).__name__}; got"
                f" {targets.shape}. Targets are never broadcast."
            )
        if jnp.issubdtype(targets.dtype, jnp.floating) and not jnp.issubdtype(sample.dtype, jnp.floating):
            raise TypeError(
                f"targets must have a dtype like {type(self).__name__}.sample's, {sample.dtype}; got {targets.dtype}."
            )

    def stand_in_targets(self, outputs: Shaped, batch: bool) -> Array:
        sample, axes = self._sample_structure(outputs, batch), term_axes(self, outputs, batch)
        f = jax.ShapeDtypeStruct(tuple(outputs.shape[axis] for axis in axes), compute_dtype(outputs.dtype))

        def curvature(f: Array, y: Array) -> Any:
            hessian = jax.hessian(self.nll)(f, y) if self.curvature == "hessian" else None
            return self.term_weight(f, y), self.term_count(f, y), hessian

        if depends_on(curvature, 1, f, sample):
            raise self._needs_targets("may depend on them, by its Hessian, its weights or its counts")
        # Where not all targets are of the domain, one that is drawn is.
        drawn = self.restricts_targets
        one = self.sample(jax.random.key(0), jnp.zeros(f.shape, f.dtype)) if drawn else jnp.zeros((), sample.dtype)
        if not sample.ndim:
            return jnp.broadcast_to(one, term_positions(self, outputs, batch))
        shape = tuple(size if axis in axes else 1 for axis, size in enumerate(outputs.shape))
        return jnp.broadcast_to(one.reshape(shape if drawn else (1,) * len(shape)), outputs.shape)

    def operand(self, outputs: Array, targets: Array, batch: bool) -> tuple[Any, tuple[int, ...]]:
        sample = self._sample_structure(outputs, batch)
        return targets.astype(sample.dtype), (term_axes(self, outputs, batch) if sample.ndim else ())

    def _check_nll(self, outputs: Shaped, sample: jax.ShapeDtypeStruct, batch: bool) -> None:
        term = tuple(outputs.shape[axis] for axis in term_axes(self, outputs, batch))
        f = jax.ShapeDtypeStruct(term, compute_dtype(outputs.dtype))
        found = jax.eval_shape(_nll, self, f, sample)
        if getattr(found, "shape", None) != ():
            got = f"shape {found.shape}" if hasattr(found, "shape") else f"a {type(found).__name__}"
            raise ValueError(
                f"{type(self).__name__}.nll must return one number, for one term's output of shape {term} and target"
                f" of shape {sample.shape}; got {got}. Add up what belongs to one term, or leave term_axes ="
                f" {self.term_axes} out where each entry is a term of its own."
            )

    def _sample_structure(self, outputs: Shaped, batch: bool) -> jax.ShapeDtypeStruct:
        term = tuple(outputs.shape[axis] for axis in term_axes(self, outputs, batch))
        f = jax.ShapeDtypeStruct(term, outputs.dtype)
        sample = jax.eval_shape(_sample, self, jax.random.key(0), f)
        if sample.shape not in ((), term):
            raise ValueError(
                f"{type(self).__name__}.sample must return one number or an array of the term's shape {term}; got shape"
                f" {sample.shape}."
            )
        return sample


# Shapes are asked for at every call: these are traced once for losses and shapes that are equal.
@jax.jit
def _nll(loss: LikelihoodLoss, f: Array, y: Array) -> Any:
    return loss.nll(f, y)


@jax.jit
def _sample(loss: LikelihoodLoss, key: PRNGKeyArray, f: Array) -> Any:
    return loss.sample(key, f)


def missing_fisher_sqrt(loss: LikelihoodLoss) -> NotImplementedError:
    """The error for a loss without an exact factor."""
    return NotImplementedError(
        f"{type(loss).__name__} declares curvature='fisher' and has no exact factor: define fisher_sqrt(f), or use"
        " Monte-Carlo (fisher_type 'mc', mc_samples) or empirical vectors."
    )


def indefinite_error(loss: LikelihoodLoss, where: str) -> ValueError:
    """The error for a Hessian with a negative eigenvalue."""
    return ValueError(
        f"{type(loss).__name__} declares curvature='hessian', that each term's Hessian in the output is positive"
        f" semi-definite, but it has a negative eigenvalue for {where}: declare curvature='fisher', which takes"
        " Monte-Carlo vectors, and exact ones if you define fisher_sqrt(f)."
    )
