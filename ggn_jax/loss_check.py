"""Check that a user's loss is consistent: its gradient, its Hessian, the root of that and its draws agree."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ggn_jax._checks import are_known, as_outputs, check_key
from ggn_jax._supported import check_supported
from ggn_jax.likelihood import LikelihoodLoss, indefinite_error
from ggn_jax.loss import Loss
from ggn_jax.terms import Terms, check_terms, split_terms

TERMS = 8  # of the batch, whose draws are checked
DIRECTIONS = 8  # in a term's output
DRAWS = 4096
DRAWS_PER_BATCH = 64  # draws
MAX_STANDARD_ERRORS = 6.0  # standard errors; two independent right estimates differ by more once in 10^8 times
MISSED_EVENTS = 9.0  # events that may have been missed, of the size of the largest one seen


def check_loss(loss: Loss, outputs: Any, targets: Any = None, *, key: Any = None) -> None:
    """Check that the parts of a loss of your own fit together, at some outputs of a model; for a test of yours.

    On some of the batch's terms, with `f` a term's output, `y` its target, `w` its weight, it checks that

    - the gradient and, with `curvature="hessian"`, `w` times the Hessian are the derivatives of the term's value; the
      Hessian is positive semi-definite (on all terms, for a `LikelihoodLoss`);
    - the square root `S` (`fisher_sqrt`, for a `LikelihoodLoss` with `curvature="fisher"`) has `S S^T = H`;
    - sampled gradients `g` have mean 0, and the mean of `g g^T` is `H`;
    - for a `LikelihoodLoss`, the same holds for the gradients of `nll` at what `sample` draws: mean 0, and a mean of
      `g g^T` that is the mean of the Hessians at these targets. This is what makes `nll` the likelihood of `sample`
      (Bartlett's identities), and the Monte-Carlo vectors right.

    Means are over 4,096 draws, and may differ from what they should be by 6 standard errors. Rare events may be missed:
    choose outputs that are not too confident, as those of a model before training. Terms with more than 8 entries are
    checked along 8 random directions.

    Args:
        loss: the loss, of any class.
        outputs: a batch of outputs, `[N, *out]`.
        targets: their targets; None (default) for targets that a `LikelihoodLoss` draws itself.
        key: a PRNG key for sampling; None (default) for `jax.random.key(0)`.

    Raises:
        ValueError: where something disagrees; it says what, by how much, and what to do.
        TypeError: inside of `jit`, where values are unknown.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> class Wrong(ggn_jax.LikelihoodLoss):
        ...     curvature = "hessian"
        ...     def nll(self, f, y):
        ...         return 0.5 * (f - y) ** 2
        ...     def sample(self, key, f):  # should have variance 1
        ...         return f + 0.2 * jax.random.normal(key, f.shape, f.dtype)
        >>> try:
        ...     check_loss(Wrong(), jnp.zeros((4, 3)))
        ... except ValueError as error:
        ...     print(str(error).partition(":")[0])
        Wrong.sample does not fit Wrong.nll
    """
    check_supported(loss)
    outputs = as_outputs("outputs", outputs, batch=True)
    key = jax.random.key(0) if key is None else check_key(key, wanted_by="check_loss", batch=True)
    if not are_known((loss, outputs, targets)):
        raise TypeError("check_loss needs values: call it outside of jit, vmap and grad.")
    first, second = jax.random.split(key)
    if targets is None:
        drawn = isinstance(loss, LikelihoodLoss)
        targets = loss.draw_targets(first, outputs, True) if drawn else loss.stand_in_targets(outputs, True)  # type: ignore[attr-defined]
    terms = split_terms(loss, *check_terms(loss, outputs, targets, batch=True), batch=True)
    counting = np.flatnonzero(np.asarray(terms.scale) != 0)
    if not counting.size:
        raise ValueError("targets must have one that is not ignored: there is nothing to check.")
    _check_definite(loss, terms)
    f, y = _pick(terms, counting[np.linspace(0, counting.size - 1, TERMS).astype(int)])
    _raise_for(loss, _measure(loss, f, y, second))


class _Gap(NamedTuple):
    """The distance between two results that should be equal, for each term."""

    distance: Float[Array, " T"]
    allowed: Float[Array, " T"]
    size: Float[Array, " T"]


def _check_definite(loss: Loss, terms: Terms) -> None:
    if not isinstance(loss, LikelihoodLoss):
        return
    found = np.asarray(jnp.where(terms.scale == 0, 0, terms.map(loss._indefiniteness)))
    if (found < 0).any():
        where = tuple(int(i) for i in np.unravel_index(np.argmin(found), found.shape))
        words = f"{np.sum(found < 0)} of {found.size} terms, at position {where} one of {found.min():.2g} times the"
        raise indefinite_error(loss, f"{words} largest")


def _pick(terms: Terms, indices: np.ndarray) -> tuple[Array, Any]:
    """The outputs and operands of some terms, `[T, *term]`."""

    def picked(x: Array, axes: tuple[int, ...]) -> Array:
        moved = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
        return moved.reshape(-1, *moved.shape[x.ndim - len(axes) :])[indices]

    return picked(terms.outputs, terms.axes), jax.tree.map(lambda x: picked(x, terms.operand_axes), terms.operand)


@eqx.filter_jit
def _measure(loss: Loss, f: Float[Array, "T *term"], y: Any, key: Array) -> dict[str, _Gap]:
    keys = jax.random.split(key, f.shape[0])
    found: dict[str, _Gap] = jax.lax.map(lambda args: _measure_term(loss, *args), (f, y, keys))
    return found


def _measure_term(loss: Any, f: Float[Array, "*term"], y: Any, key: Array) -> dict[str, _Gap]:
    direction_key, draw_key, sample_key = jax.random.split(key, 3)
    directions = _directions(direction_key, f)
    project = partial(jnp.tensordot, directions, axes=f.ndim, precision="highest")
    gaps = {"term_gradient": _rounding_gap(loss.term_gradient(f, y), jax.grad(loss.term_value)(f, y))}
    exact = not isinstance(loss, LikelihoodLoss) or loss.curvature == "hessian" or loss._has_fisher_sqrt()
    if exact:
        hessian = loss.term_hessian(f, y)
        matrix = project(jax.vmap(hessian.mv)(directions).reshape(-1, f.size).T.reshape(*f.shape, -1))
        root = jax.vmap(hessian.sqrt_rmv)(directions).reshape(len(directions), -1)
        gaps["sqrt"] = _rounding_gap(jnp.matmul(root, root.T, precision="highest"), matrix)
        if loss.curvature == "hessian":
            own = _projected_hessian(lambda f: loss.term_value(f, y), f, directions)
            gaps["term_hessian"] = _rounding_gap(loss.term_weight(f, y) * matrix, own)

    def sampled_moments(word: Array) -> tuple[Array, Array]:
        g = project(loss.sampled_gradient(f, y, loss.settle(f, y, word)))
        return g, jnp.outer(g, g) - (matrix if exact else jnp.outer(g, g))

    words = loss.draw(draw_key, (DRAWS,), jax.ShapeDtypeStruct(f.shape, f.dtype))
    size = jnp.max(jnp.abs(matrix)) if exact else jnp.ones((), f.dtype)
    gaps["mean"], gaps["square"] = _mean_gaps(sampled_moments, words, size)
    if isinstance(loss, LikelihoodLoss):

        def score(key: Array) -> tuple[Array, Array]:
            target = loss.sample(key, f)
            g = project(jax.grad(loss.nll)(f, target))
            if not exact:
                return g, jnp.zeros(2 * g.shape, g.dtype)
            likely = loss.curvature == "hessian"
            wanted = _projected_hessian(lambda f: loss.nll(f, target), f, directions) if likely else matrix
            return g, jnp.outer(g, g) - wanted

        gaps["score"], gaps["fisher"] = _mean_gaps(score, jax.random.split(sample_key, DRAWS), size)
    return gaps


def _directions(key: Array, f: Float[Array, "*term"]) -> Float[Array, "R *term"]:
    """Orthonormal directions in a term's output: all of its entries, or random ones."""
    if f.size <= DIRECTIONS:
        return jnp.eye(f.size, dtype=f.dtype).reshape(-1, *f.shape)
    q, _ = jnp.linalg.qr(jax.random.normal(key, (f.size, DIRECTIONS), f.dtype))
    return q.T.reshape(-1, *f.shape)


def _projected_hessian(
    value: Any, f: Float[Array, "*term"], directions: Float[Array, "R *term"]
) -> Float[Array, "R R"]:
    """The Hessian of a function, projected onto directions."""
    _, product = jax.linearize(jax.grad(value), f)
    columns = jax.vmap(product)(directions).reshape(len(directions), -1)
    return jnp.matmul(directions.reshape(len(directions), -1), columns.T, precision="highest")


def _rounding_gap(a: Array, b: Array) -> _Gap:
    """The gap of two results that may differ by rounding only."""
    size = jnp.max(jnp.abs(b))
    return _Gap(jnp.max(jnp.abs(a - b)), _rounding_error(jnp.maximum(size, jnp.max(jnp.abs(a)))), size)


def _rounding_error(size: Array) -> Array:
    """The rounding error of automatic differentiation: relative, and absolute where 1 - p cancels."""
    eps = float(jnp.finfo(size.dtype).eps)
    return eps**0.5 * size + 32 * eps


def _mean_gaps(fn: Any, draws: Array, size: Array) -> tuple[_Gap, ...]:
    """The gaps from 0 of two means over draws; the second, a mean square, is relative to `size`."""

    def gap(values: Array, size: Array) -> _Gap:
        values = values.reshape(len(values), -1)
        mean, spread = jnp.mean(values, axis=0), jnp.std(values, axis=0)
        most = jnp.max(jnp.max(values, axis=0) - jnp.min(values, axis=0))
        error = jnp.sqrt(spread**2 / DRAWS + MISSED_EVENTS * (most / DRAWS) ** 2)
        excess = jnp.abs(mean) / (MAX_STANDARD_ERRORS * error + _rounding_error(jnp.maximum(size, most)))
        worst = jnp.argmax(excess)
        # Where all draws are alike, as those of a class of probability 1, there is nothing to conclude from.
        allowed = jnp.where(most > 0, jnp.abs(mean[worst]) / excess[worst], jnp.inf)
        return _Gap(jnp.abs(mean[worst]), allowed, size)

    first, second = jax.lax.map(fn, draws, batch_size=DRAWS_PER_BATCH)
    return gap(first, jnp.sqrt(size)), gap(second, size)


def _raise_for(loss: Loss, gaps: dict[str, _Gap]) -> None:
    name = type(loss).__name__
    messages = {
        "term_gradient": f"{name}.term_gradient is not the derivative of {name}.term_value",
        "term_hessian": f"{name}.term_hessian, times term_weight, is not the second derivative of {name}.term_value",
        "sqrt": f"{name}.term_hessian: S S^T, of sqrt_mv and sqrt_rmv, is not the Hessian that mv multiplies with",
        "score": (
            f"{name}.sample does not fit {name}.nll: the mean of g, the gradient of nll at what sample draws, is not 0."
            " Draw from the density exp(-nll), as a function of y"
        ),
        "fisher": (
            f"{name}.sample does not fit {name}.nll: the mean of g g^T over gradients of nll at what sample draws is"
            " not that of the Hessians. Draw from the density exp(-nll), as a function of y, with its scale"
        ),
        "mean": f"the mean of {name}.sampled_gradient over what {name}.draw draws is not 0",
        "square": f"the mean of g g^T over {name}.sampled_gradient is not {name}.term_hessian",
    }
    if isinstance(loss, LikelihoodLoss) and loss.curvature == "fisher":
        messages["fisher"] = (
            f"{name}.fisher_sqrt does not fit {name}.nll and {name}.sample: the mean of g g^T over gradients of nll at"
            " what sample draws is not S S^T. S is a square root of the Fisher matrix, not its inverse or itself"
        )
    for check, message in messages.items():
        if check not in gaps:
            continue
        gap = jax.tree.map(np.asarray, gaps[check])
        bad = ~(gap.distance <= gap.allowed)
        if bad.any():
            worst = int(np.argmax(np.where(bad, gap.distance / gap.allowed, -1)))
            by, allowed, size = gap.distance[worst], gap.allowed[worst], gap.size[worst]
            part = f", {by / size:.0%} of the largest entry" if size and check not in ("score", "mean") else ""
            raise ValueError(f"{message} (the difference is {by:.2g}{part}; allowed is {allowed:.2g}).")
