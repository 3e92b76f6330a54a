"""A loss at given outputs, split into its independent terms: the one place where reduction and weights are applied.

A loss states the mathematics of one term (`ggn_jax.loss`). Here that is mapped over all terms of one example or of a
batch, and scaled: with `r` the reduction factor and `w` the term's weight, curvature vectors carry `sqrt(r w)`, values
and gradients `r`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ggn_jax._checks import Shaped, are_known, as_array, as_outputs, compute_dtype
from ggn_jax._sharding import run_auto, vary_alike


def term_axes(loss: Any, outputs: Shaped, batch: bool) -> tuple[int, ...]:
    """`loss.term_axes`, which count the axes of one example, as sorted axes of `outputs`."""
    ndim = outputs.ndim - batch
    for axis in loss.term_axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{type(loss).__name__} takes axis {axis} of one example's output as part of a term, but one example's"
                f" output has shape {outputs.shape[batch:]}."
            )
    axes = tuple(sorted(axis % ndim + batch for axis in loss.term_axes))
    if len(set(axes)) != len(axes):
        raise ValueError(f"{type(loss).__name__}.term_axes = {loss.term_axes} names an axis twice.")
    return axes


def term_positions(loss: Any, outputs: Shaped, batch: bool) -> tuple[int, ...]:
    """The shape of all axes of `outputs` that are not part of a term."""
    axes = term_axes(loss, outputs, batch)
    return tuple(size for axis, size in enumerate(outputs.shape) if axis not in axes)


def map_positions(
    fn: Callable[..., Array],
    in_axes: tuple[tuple[int, ...] | None, ...],
    out_axes: tuple[int, ...],
    positions: int,
    leading: int | None = None,
) -> Callable[..., Array]:
    """`fn` of one term, as a function of arrays of terms.

    `in_axes` and `out_axes` name, for each argument and for the result, the axes that belong to a term; the remaining
    ones are the positions, in order. `None` passes an argument to every term. With `leading`, only that many positions
    are mapped over: `fn` takes the others as trailing axes.
    """

    def position_axes(axes: tuple[int, ...]) -> list[int]:
        """Each position's axis, once the positions before it are gone."""
        rest = [axis for axis in range(positions + len(axes)) if axis not in axes]
        return [axis - before for before, axis in enumerate(rest)]

    ins = [[None] * positions if axes is None else position_axes(axes) for axes in in_axes]
    outs = position_axes(out_axes)
    # The first position is mapped over last, so that positions keep their order: nothing is transposed.
    for i in reversed(range(positions if leading is None else leading)):
        fn = jax.vmap(fn, in_axes=tuple(axes[i] for axes in ins), out_axes=outs[i])
    return fn


def per_term(value: Array, like: Array) -> Array:
    """One number per term, `[*positions]`, made to broadcast against `[*term, *positions]`."""
    return value.reshape((1,) * (like.ndim - value.ndim) + value.shape)


class Terms(eqx.Module):
    """The terms of a loss at `outputs`, `[*out]` or `[N, *out]`; made by `split_terms`."""

    loss: Any
    outputs: Float[Array, "*shape"]  # in the compute dtype
    operand: Any  # for each term, its target and whatever else the loss needs
    scale: Float[Array, "*positions"]  # r w: the factor of a plain term's Hessian
    reduction_factor: Float[Array, ""]
    dtype: Any = eqx.field(static=True)  # of the results
    batch: bool = eqx.field(static=True)
    axes: tuple[int, ...] = eqx.field(static=True)  # of `outputs` that belong to one term
    operand_axes: tuple[int, ...] = eqx.field(static=True)

    @property
    def num_positions(self) -> int:
        """The number of axes that are not part of a term."""
        return self.outputs.ndim - len(self.axes)

    def map(
        self, fn: Callable[..., Array], *args: Array, in_axes: tuple[Any, ...] = (), out_axes: tuple[int, ...] = ()
    ) -> Array:
        """`fn(f, operand, *args)` of every term; arguments and result hold the term's axes named."""
        axes = (self.axes, self.operand_axes, *in_axes)
        # `vmap` moves axes to the front, which would transpose what comes before and after: positions that follow
        # the term's axes are left to the loss where it takes them.
        leading = (self.axes[0] if self.axes else 0) if self.loss.takes_trailing_axes else None
        mapped = map_positions(fn, axes, out_axes, self.num_positions, leading)
        return mapped(self.outputs, self.operand, *args)

    def loss_value(self) -> Float[Array, ""]:
        """The reduced loss."""
        return self.wide_loss_value().astype(self.dtype)

    def wide_loss_value(self) -> Float[Array, ""]:
        """The reduced loss in the compute dtype: differences of it are below the rounding of 16-bit outputs."""
        value = jnp.sum(self.map(self._weighted(self.loss.term_value)))
        # 0/0, where every term is ignored, is 0.
        reduction_factor = jnp.where(jnp.isinf(self.reduction_factor) & (value == 0), 0, self.reduction_factor)
        return reduction_factor * value

    def gradients(self) -> Float[Array, "*shape"]:
        """The gradient of the *sum-reduced* loss (weights included), in the compute dtype."""
        return self.map(self._weighted(self.loss.term_gradient), out_axes=self.axes)

    def empirical(self) -> Float[Array, "*shape"]:
        """`sqrt(r)` times the gradient of the sum-reduced loss, in the compute dtype."""
        gradients = self.gradients()
        # Where everything is ignored, r is infinite and the gradient 0.
        return jnp.where(gradients == 0, 0, jnp.sqrt(self.reduction_factor) * gradients)

    def empirical_product(self, tangent: Float[Array, "*shape"], per_term: bool) -> Float[Array, "*shape"]:
        """`g g^T tangent` with the `g` of `empirical`, of each example, or of each term, in the outputs' dtype."""
        g = self.gradients()
        axes = self.axes if per_term else tuple(range(1, g.ndim))
        inner = jnp.sum(g * tangent.astype(g.dtype), axis=axes, keepdims=True)
        # Where everything is ignored, r is infinite and g is 0.
        return jnp.where(g == 0, 0, self.reduction_factor * inner * g).astype(self.dtype)

    def term_indices(self, per_term: bool) -> tuple[Int[Array, "*shape"], int]:
        """For each output, the index of its example, or of its term; and how many there are."""
        shape = self.outputs.shape
        axes = self.axes if per_term else tuple(range(1, len(shape)))
        kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
        count = math.prod(kept)
        return jnp.broadcast_to(jnp.arange(count).reshape(kept), shape), count

    def part(self, outputs: Array, operand: Any) -> "Terms":
        """The terms of part of a batch: its outputs, and its slice of `operand`; the reduction is the whole's."""
        wanted = (jax.tree.leaves(operand)[0].shape[0], *self.outputs.shape[1:])
        if outputs.shape != wanted:
            raise ValueError(
                f"model_fn must treat data independently to be worked on in parts: it returned outputs of shape"
                f" {outputs.shape} for {wanted[0]} of {self.outputs.shape[0]} data; wanted {wanted}."
            )
        return _with_scale(
            replace(self, outputs=outputs.astype(self.outputs.dtype), operand=operand), self.reduction_factor
        )

    def _weighted(self, fn: Callable[..., Array]) -> Callable[..., Array]:
        """`fn` where the term counts, 0 where its weight is 0, NaN where its target is not of the loss's domain."""

        def weighted(f: Array, y: Any) -> Array:
            value = fn(f, y)
            value = jnp.where(per_term(self.loss.term_weight(f, y) == 0, value), 0, value)
            return jnp.where(per_term(self.loss.term_valid(f, y), value), value, jnp.nan)

        return weighted

    def draw(self, keys: Array, num: int) -> Array:
        """The draws for would-be gradients (a label per term, say), for `num` samples: `[num, *positions, ...]`.

        One example takes one key, and a batch one key per example, so that an example's draws depend on nothing else.
        """
        term = jax.ShapeDtypeStruct(tuple(self.outputs.shape[a] for a in self.axes), self.outputs.dtype)
        positions = self.scale.shape[self.batch :]

        def draw(key: Array) -> Array:
            return self.loss.draw(key, (num, *positions), term)

        words = jax.vmap(draw, out_axes=1)(keys) if self.batch else draw(keys)
        trailing = self._trailing_axes(words[0])
        return jax.vmap(lambda word: self.map(self.loss.settle, word, in_axes=(trailing,), out_axes=trailing))(words)

    def sampled_gradient(self, drawn: Array) -> Float[Array, "*shape"]:
        """A would-be gradient from one sample of `draw`, in the compute dtype.

        `E[g g^T]` is the Hessian of the reduced loss.
        """
        args = (drawn, jnp.sqrt(self.scale))
        in_axes = (self._trailing_axes(drawn), ())
        return self.map(self._scaled(self.loss.sampled_gradient), *args, in_axes=in_axes, out_axes=self.axes)

    def sampled_gradients(self, keys: Array, num: int) -> Float[Array, "num *shape"]:
        """The would-be gradients of `num` samples, all at once."""
        return jax.vmap(self.sampled_gradient)(self.draw(keys, num))

    def _trailing_axes(self, drawn: Array) -> tuple[int, ...]:
        """The axes of a sample that belong to one term: random numbers follow the positions."""
        return tuple(range(self.num_positions, drawn.ndim))

    def product(self, name: str, v: Array) -> Float[Array, "*shape"]:
        """The product `name` of `TermHessian` (`mv`, `sqrt_mv`, `sqrt_rmv`) with `v`, in the outputs' dtype."""
        scale = self.scale if name == "mv" else jnp.sqrt(self.scale)
        fn = self._scaled(lambda f, y, v: getattr(self.loss.term_hessian(f, y), name)(v))
        v = v.astype(self.outputs.dtype)
        return self.map(fn, v, scale, in_axes=(self.axes, ()), out_axes=self.axes).astype(self.dtype)

    def diagonal(self) -> Float[Array, "*shape"]:
        """The Hessian's diagonal, in the compute dtype."""
        fn = self._scaled(lambda f, y: self.loss.term_hessian(f, y).diagonal())
        return self.map(fn, self.scale, in_axes=((),), out_axes=self.axes)

    def columns(self) -> Float[Array, "V *shape"]:
        """The columns of the Hessian's square root: `V` runs over the entries of one example's output in C order."""
        lead, ndim, count = int(self.batch), self.outputs.ndim - self.batch, len(self.axes)
        fn = self._scaled(lambda f, y: self.loss.term_hessian(f, y).columns())
        out_axes = (*range(count), *(axis + count for axis in self.axes))
        columns = self.map(fn, jnp.sqrt(self.scale), in_axes=((),), out_axes=out_axes).astype(self.dtype)
        # [*term, *shape] -> [*out, *shape]: a column is zero at all positions but its own.
        out = self.outputs.shape[lead:]
        own_axes = [axis - lead for axis in range(lead, ndim + lead) if axis not in self.axes]
        columns = jnp.expand_dims(columns, own_axes)
        for axis in own_axes:
            own = jnp.eye(out[axis], dtype=bool)
            own = jnp.expand_dims(own, [i for i in range(columns.ndim) if i not in (axis, axis + ndim + lead)])
            columns = jnp.where(own, columns, 0)
        return columns.reshape(math.prod(out), *self.outputs.shape)

    def hessian_sum(self, start: int, stop: int) -> Float[Array, "K K"]:
        """The sum over positions of the terms' Hessians, for the entries of a term from `start` to `stop`.

        Where each entry is a term, for those of the last axis. Only of losses that take many terms at once.
        """
        count = len(self.axes)
        f = jnp.moveaxis(self.outputs, self.axes, range(count))
        y = jax.tree.map(lambda x: jnp.moveaxis(x, self.operand_axes, range(len(self.operand_axes))), self.operand)
        hessian = self.loss.term_hessian(f, y)
        if count:
            found: Array = hessian.summed(self.scale, start, stop)
            return found
        values = jnp.where(self.scale == 0, 0, self.scale * hessian.diagonal())[..., start:stop]
        return jnp.diag(jnp.sum(values.reshape(-1, stop - start), axis=0))

    @staticmethod
    def _scaled(fn: Callable[..., Array]) -> Callable[..., Array]:
        """`fn` with a last argument that multiplies its result; 0 times NaN is 0, so ignored terms stay 0."""

        def scaled(*args: Any) -> Array:
            *rest, scale = args
            value = fn(*rest)
            scale = per_term(scale, value)
            return jnp.where(scale == 0, 0, scale * value)

        return scaled


def check_terms(loss: Any, outputs: Any, targets: Any, batch: bool) -> tuple[Array, Array]:
    """Both as arrays, after all checks of shapes and dtypes and, if they are known, of values."""
    outputs, targets = check_shapes_and_dtypes(loss, outputs, targets, batch)
    check_values(loss, outputs, targets, batch)
    return outputs, targets


def check_shapes_and_dtypes(loss: Any, outputs: Any, targets: Any, batch: bool) -> tuple[Array, Array]:
    """Both as arrays, after all checks that need no values."""
    outputs, targets = as_outputs("outputs", outputs, batch), as_array("targets", targets)
    try:
        loss.check_shapes(outputs, targets, batch)
    except ValueError as error:
        raise ValueError(f"{error}{_batch_hint(loss, outputs, targets, batch)}") from None
    return outputs, targets


def _batch_hint(loss: Any, outputs: Array, targets: Array, batch: bool) -> str:
    """A hint for a batch passed as one example, or the other way round."""
    if not batch and not outputs.ndim:
        return ""
    try:
        loss.check_shapes(outputs, targets, not batch)
    except (TypeError, ValueError):
        return ""
    if batch:
        return " They fit as one example: make a batch of one of it, x[None], or use a function of one example."
    return " They fit as a batch: use make_batch_grad_output_fn, or map over the examples with jax.vmap."


def check_values(loss: Any, outputs: Shaped, targets: Any, batch: bool) -> None:
    """Refuse targets whose values the loss does not accept, if they are known."""
    loss.check_values(outputs, targets, batch)


def check_values_of_one_loss(loss: Any, outputs: Shaped, targets: Array, batch: bool) -> None:
    """`check_values` of a loss whose terms are of one kind."""
    if not loss.restricts_targets or not are_known((loss, targets)):
        return
    with jax.ensure_compile_time_eval():  # constants are known under `jit` as well
        count, first = np.asarray(_find_invalid(loss, targets, outputs.shape, outputs.dtype, batch)).tolist()
    if not count:
        return
    positions = term_positions(loss, outputs, batch)
    where = tuple(int(i) for i in np.unravel_index(first, positions))
    index: list[Any] = list(where)
    if targets.ndim > len(where):
        for axis in term_axes(loss, outputs, batch):
            index.insert(axis, slice(None))
    raise ValueError(
        f"targets must be {loss.target_domain(outputs.shape, batch)}; got {np.asarray(targets)[tuple(index)]} at"
        f" position {where} ({count} of {math.prod(positions)} terms are out of range)."
    )


@partial(jax.jit, static_argnames=("shape", "dtype", "batch"))
def _find_invalid(loss: Any, targets: Array, shape: tuple[int, ...], dtype: Any, batch: bool) -> Int[Array, "2"]:
    """How many terms have a target that is not valid, and the first of them."""

    def find(targets: Array, loss: Any) -> Array:
        invalid = ~find_valid(loss, jnp.zeros(shape, dtype), targets, batch)
        if invalid.size == 0:
            return jnp.zeros(2, jnp.int32)
        return jnp.stack([jnp.sum(invalid, dtype=jnp.int32), jnp.argmax(invalid).astype(jnp.int32)])

    return run_auto(find, targets, loss, keep=False)


def find_valid(loss: Any, outputs: Array, targets: Array, batch: bool) -> Bool[Array, "*positions"]:
    """Whether the target of each term is of the loss's domain."""
    terms = _arrange_terms(loss, outputs, targets, batch)
    return terms.map(loss.term_valid)


def _arrange_terms(loss: Any, outputs: Array, targets: Array, batch: bool) -> Terms:
    dtype = outputs.dtype
    loss, outputs, targets = vary_alike(loss, outputs, targets)
    outputs = outputs.astype(compute_dtype(dtype))
    operand, operand_axes = loss.operand(outputs, targets, batch)
    zero = jnp.zeros((), outputs.dtype)
    return Terms(loss, outputs, operand, zero, zero, dtype, batch, term_axes(loss, outputs, batch), operand_axes)


def _with_scale(terms: Terms, reduction_factor: Array | None) -> Terms:
    """`terms` with `scale` and `reduction_factor` filled in; the latter is that of these terms if it is None."""
    loss = terms.loss

    def or_nan(fn: Callable[..., Array]) -> Callable[..., Array]:
        return lambda f, y: jnp.where(loss.term_valid(f, y), fn(f, y), jnp.nan)

    weight = terms.map(or_nan(loss.term_weight))
    if reduction_factor is None:
        reduction_factor = jnp.ones((), terms.outputs.dtype)
        if loss.reduction == "mean":
            count = jnp.sum(terms.map(or_nan(loss.term_count)))
            reduction_factor = jnp.where(count == 0, jnp.inf, 1 / jnp.where(count == 0, 1, count))
    scale = jnp.where(weight == 0, 0, reduction_factor * weight)
    outputs = _shield_ignored(terms.outputs, jnp.expand_dims(weight == 0, terms.axes), (loss, terms.operand))
    return replace(terms, outputs=outputs, scale=scale, reduction_factor=reduction_factor)


@jax.custom_jvp
def _shield_ignored(outputs: Array, ignored: Array, others: Any) -> Array:
    """The outputs, which may be anything where they are ignored, even NaN; `others` is all else that terms depend on.

    Results for ignored terms are replaced by 0 later, and the outputs' tangents here, so derivatives in the outputs
    are clean. Derivatives in what terms share would still add up NaN times 0, so for these the outputs are replaced as
    well. Not always, since that costs a copy: XLA's CPU compiler does not fuse it with the sums over classes.
    """
    return outputs


@partial(_shield_ignored.defjvp, symbolic_zeros=True)
def _(primals: tuple[Array, Array, Any], tangents: tuple[Any, Any, Any]) -> tuple[Array, Array]:
    outputs, ignored, _ = primals
    zero = jax.custom_derivatives.SymbolicZero
    shared = any(not isinstance(leaf, zero) for leaf in jax.tree.leaves(tangents[2]))
    result = jnp.where(ignored, 0, outputs) if shared else _shield_ignored(*primals)
    if isinstance(tangents[0], zero):
        return result, jnp.zeros_like(outputs)
    return result, jnp.where(ignored, 0, tangents[0])


def split_terms(loss: Any, outputs: Array, targets: Any, *, batch: bool) -> Any:
    """The terms of `loss` at `outputs`, which have a leading batch axis or not.

    Targets that the loss does not accept, and whose values are unknown under `jit`, give NaN.
    """
    return loss.split(outputs, targets, batch)


def split_one_loss(loss: Any, outputs: Array, targets: Array, batch: bool) -> Terms:
    """`split_terms` of a loss whose terms are of one kind."""
    return _with_scale(_arrange_terms(loss, outputs, targets, batch), None)
