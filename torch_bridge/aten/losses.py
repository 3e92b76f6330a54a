"""Losses inside modules. (Those that curvature is taken of are converted by `torch_bridge.losses`.)"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from torch_bridge.aten.dtypes import align, promote, result_dtype, wide
from torch_bridge.aten.elementwise import xlogy
from torch_bridge.aten.metric import pairwise_distance
from torch_bridge.aten.registry import aten

# The names and defaults of arguments are those of the operators' schemas.

NONE, MEAN, SUM = range(3)  # torch's reductions


def _reduced(terms: Array, reduction: int, dtype: Any, number: Any = None) -> Array:
    """Reduce terms, which are in at least float32; `number` is the divisor of a mean, if not the number of terms."""
    if reduction == MEAN:
        terms = jnp.mean(terms) if number is None else jnp.sum(terms) / number
    return (jnp.sum(terms) if reduction == SUM else terms).astype(dtype)


def _pair(x: Array, y: Array) -> tuple[Array, Array, Any]:
    """Both in one dtype, at least float32, and the dtype of the result."""
    dtype = result_dtype(x, y)
    x, y = (wide(a) for a in promote(x, y))
    return x, y, dtype


def _weighted(terms: Array, weight: Array | None) -> Array:
    return terms if weight is None else terms * align(weight.astype(terms.dtype), terms)[0]


@aten("mse_loss")
def mse_loss(x: Array, target: Array, reduction: int = MEAN) -> Array:
    x, y, dtype = _pair(x, target)
    return _reduced((x - y) ** 2, reduction, dtype)


@aten("l1_loss")
def l1_loss(x: Array, target: Array, reduction: int = MEAN) -> Array:
    x, y, dtype = _pair(x, target)
    return _reduced(jnp.abs(x - y), reduction, dtype)


@aten("smooth_l1_loss")
def smooth_l1_loss(x: Array, target: Array, reduction: int = MEAN, beta: float = 1.0) -> Array:
    x, y, dtype = _pair(x, target)
    size = jnp.abs(x - y)
    terms = size if beta == 0 else jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)
    return _reduced(terms, reduction, dtype)


@aten("huber_loss")
def huber_loss(x: Array, target: Array, reduction: int = MEAN, delta: float = 1.0) -> Array:
    x, y, dtype = _pair(x, target)
    size = jnp.abs(x - y)
    return _reduced(jnp.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)), reduction, dtype)


@aten("binary_cross_entropy")
def binary_cross_entropy(x: Array, target: Array, weight: Array | None = None, reduction: int = MEAN) -> Array:
    """Cross-entropy of probabilities, with torch's clamps: of logarithms at -100, and of the derivative's divisor.

    torch's derivative is not that of the clamped value, so it is given here.
    """
    x, y, dtype = _pair(x, target)

    @jax.custom_jvp
    def entropy(x: Array) -> Array:
        return (y - 1) * jnp.maximum(jnp.log1p(-x), -100) - y * jnp.maximum(jnp.log(x), -100)

    @entropy.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        (x,), (dx,) = primals, tangents
        return entropy(x), dx * (x - y) / jnp.maximum((1 - x) * x, 1e-12)

    terms = entropy(x)
    return _reduced(_weighted(terms, weight), reduction, dtype)


@aten("binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(
    x: Array, target: Array, weight: Array | None = None, pos_weight: Array | None = None, reduction: int = MEAN
) -> Array:
    x, y, dtype = _pair(x, target)
    positive = _weighted(y, pos_weight)
    terms = -(positive * jax.nn.log_sigmoid(x) + (1 - y) * jax.nn.log_sigmoid(-x))
    return _reduced(_weighted(terms, weight), reduction, dtype)


def _class_axis(x: Array) -> int:
    return 1 if x.ndim > 1 else 0


def _per_class(weight: Array, x: Array) -> Array:
    return weight.reshape([-1 if axis == _class_axis(x) else 1 for axis in range(x.ndim)])


@aten("nll_loss_nd", "nll_loss", "nll_loss2d")
def nll_loss(
    x: Array, target: Array, weight: Array | None = None, reduction: int = MEAN, ignore_index: int = -100
) -> Array:
    terms, counts = _picked(-wide(x), target, weight, ignore_index)
    return _reduced(terms, reduction, x.dtype, jnp.sum(counts))


def _picked(x: Array, target: Array, weight: Array | None, ignore_index: int) -> tuple[Array, Array]:
    """The entries of the targets' classes times their weights, and these weights; 0 where targets are ignored."""
    axis = _class_axis(x)
    kept = target != ignore_index
    classes = jnp.where(kept, target, 0)
    places = jnp.expand_dims(classes, axis)
    entries = jnp.squeeze(x.at[_along(places, axis)].get(mode="fill"), axis)
    weights = jnp.where(kept, jnp.ones((), x.dtype) if weight is None else weight[classes], 0)
    return jnp.where(kept, entries * weights, 0), weights


def _along(index: Array, axis: int) -> tuple[Array, ...]:
    grid = [jax.lax.broadcasted_iota(index.dtype, index.shape, i) for i in range(index.ndim)]
    return tuple(index if i == axis else own for i, own in enumerate(grid))


@aten("cross_entropy_loss")
def cross_entropy_loss(
    x: Array,
    target: Array,
    weight: Array | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Array:
    """Targets are class indices, or probabilities along the class axis."""
    axis = _class_axis(x)
    classes = x.shape[axis]
    log_p = jax.nn.log_softmax(wide(x), axis=axis)
    weighted = log_p if weight is None else log_p * _per_class(weight, x)
    if jnp.issubdtype(target.dtype, jnp.floating):
        mixed = target * (1 - label_smoothing) + label_smoothing / classes
        return _reduced(-jnp.sum(weighted * mixed, axis=axis), reduction, x.dtype, x.size / classes)
    terms, counts = _picked(-log_p, target, weight, ignore_index)
    if label_smoothing:
        even = jnp.where(target == ignore_index, 0, -jnp.sum(weighted, axis=axis))
        terms = (1 - label_smoothing) * terms + label_smoothing / classes * even
    return _reduced(terms, reduction, x.dtype, jnp.sum(counts))


@aten("kl_div")
def kl_div(x: Array, target: Array, reduction: int = MEAN, *, log_target: bool = False) -> Array:
    x, y, dtype = _pair(x, target)
    terms = jnp.exp(y) * (y - x) if log_target else xlogy(y, y) - y * x
    return _reduced(terms, reduction, dtype)


@aten("poisson_nll_loss")
def poisson_nll_loss(x: Array, target: Array, log_input: bool, full: bool, eps: float, reduction: int) -> Array:
    x, y, dtype = _pair(x, target)
    terms = jnp.exp(x) - y * x if log_input else x - y * jnp.log(x + eps)
    if full:
        large = jnp.where(y > 1, y, 1)
        stirling = large * jnp.log(large) - large + 0.5 * jnp.log(2 * jnp.pi * large)
        terms = terms + jnp.where(y > 1, stirling, 0)
    return _reduced(terms, reduction, dtype)


@aten("hinge_embedding_loss")
def hinge_embedding_loss(x: Array, target: Array, margin: float = 1.0, reduction: int = MEAN) -> Array:
    x, y, dtype = _pair(x, target)
    return _reduced(jnp.where(y != 1, _positive(margin - x), 0) + jnp.where(y != -1, x, 0), reduction, dtype)


def _positive(x: Array) -> Array:
    """`max(x, 0)` with derivative 1 at 0, as `torch.clamp` has it."""
    return jnp.where(x < 0, 0, x)


@aten("margin_ranking_loss")
def margin_ranking_loss(a: Array, b: Array, target: Array, margin: float = 0.0, reduction: int = MEAN) -> Array:
    dtype = result_dtype(a, b, target)
    a, b, sign = (wide(x) for x in promote(a, b, target))
    return _reduced(_positive(-sign * (a - b) + margin), reduction, dtype)


@aten("triplet_margin_loss")
def triplet_margin_loss(
    anchor: Array,
    positive: Array,
    negative: Array,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = MEAN,
) -> Array:
    far = pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = jnp.minimum(far, pairwise_distance(positive, negative, p, eps))
    return _reduced(_positive(margin + pairwise_distance(anchor, positive, p, eps) - far), reduction, far.dtype)


@aten("cosine_embedding_loss")
def cosine_embedding_loss(a: Array, b: Array, target: Array, margin: float = 0.0, reduction: int = MEAN) -> Array:
    # Unlike `cosine_similarity`, this adds its epsilon to the squared norms.
    a, b, dtype = _pair(a, b)
    squares = [jnp.sum(x * x, axis=-1) + 1e-12 for x in (a, b)]
    cosine = jnp.sum(a * b, axis=-1) / jnp.sqrt(squares[0] * squares[1])
    terms = jnp.where(target == 1, 1 - cosine, 0) + jnp.where(target == -1, _positive(cosine - margin), 0)
    return _reduced(terms, reduction, dtype)


@aten("soft_margin_loss")
def soft_margin_loss(x: Array, target: Array, reduction: int = MEAN) -> Array:
    x, y, dtype = _pair(x, target)
    return _reduced(jnp.log1p(jnp.exp(-y * x)), reduction, dtype)


@aten("multi_margin_loss")
def multi_margin_loss(
    x: Array, target: Array, p: int = 1, margin: Any = 1, weight: Array | None = None, reduction: int = MEAN
) -> Array:
    batched = x if x.ndim > 1 else x[None]
    classes = target.reshape(-1, 1)
    own = jnp.take_along_axis(batched, classes, axis=1)
    hinge = margin - own + batched
    terms = jnp.where(hinge > 0, hinge, 0) ** p
    terms = terms if weight is None else terms * weight[classes]
    others = jnp.arange(batched.shape[1])[None] != classes
    each = jnp.sum(jnp.where(others, terms, 0), axis=1) / batched.shape[1]
    return _reduced(each if x.ndim > 1 else each[0], reduction, x.dtype)
