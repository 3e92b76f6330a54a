"""A loss of several outputs of one model: the weighted sum of a loss for each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ggn_jax._checks import as_outputs, check_outputs, check_weight_number, errors_prefixed
from ggn_jax._model import Model
from ggn_jax._outputs import flat_model, flatten_outputs, split_outputs
from ggn_jax._repr import fields
from ggn_jax._weights import safe_sqrt, times
from ggn_jax.fisher_type import FisherType
from ggn_jax.loss import Loss
from ggn_jax.terms import Terms, check_terms, check_values, split_terms


class JointLoss(Loss):
    """The sum `sum_k weights[k] losses[k](outputs[k], targets[k])`, for a model that returns a dict of outputs.

    Outputs and targets are dicts with the names of the losses, of arrays with one batch axis: the policy and the value
    of an agent, or the tasks of a network with several heads. The Hessian in the outputs is block-diagonal, so that
    sampling is independent between heads: one draw serves all of them. Every operator, the optimizer, the vectors and
    `LossHessian` take it. Vectors are dicts of arrays `[V, *out]`: those of `"type-2"` are the columns for one head
    after the other, 0 for the others, so that `V` is the sum of their sizes; an `"empirical"` one is that of all heads,
    `sqrt(r_k) weights[k] g_k`, side by side.

    `from_batches` needs losses with reduction "sum": means over different kinds of terms have no common denominator.

    Args:
        losses: a dict with a `Loss` for each output, by its name.
        weights: a dict with a number of at least 0 for some or all of these names; 1 by default.

    Raises:
        TypeError, ValueError: for anything that is not a dict of losses, or weights that have other names or are
            negative.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> losses = {"policy": ggn_jax.CrossEntropyLoss(), "value": ggn_jax.MSELoss()}
        >>> loss = ggn_jax.JointLoss(losses, weights={"value": 0.5})
        >>> outputs = {"policy": jnp.zeros((8, 3)), "value": jnp.zeros((8, 1))}
        >>> targets = {"policy": jnp.arange(8) % 3, "value": jnp.ones((8, 1))}
        >>> print(round(float(loss(outputs, targets)), 3))  # log(3) + 1 / 2
        1.599
        >>> vectors = ggn_jax.make_batch_grad_output_fn(loss, "type-2")(outputs, targets)
        >>> vectors["policy"].shape, vectors["value"].shape
        ((4, 8, 3), (4, 8, 1))
    """

    losses: dict[str, Loss]
    weights: dict[str, Array]
    _shapes: tuple[tuple[str, tuple[int, ...]], ...] | None = eqx.field(static=True, default=None)
    """Of one example's outputs, where they come as one array (`ggn_jax._outputs`)."""

    def __init__(self, losses: Mapping[str, Loss], weights: Mapping[str, Any] | None = None):
        if not isinstance(losses, Mapping) or not losses or not all(isinstance(name, str) for name in losses):
            raise TypeError(f"losses must be a dict of losses by the names of outputs; got {losses!r}.")
        for name, loss in losses.items():
            if not isinstance(loss, Loss) or isinstance(loss, JointLoss):
                raise TypeError(f"losses[{name!r}] must be a loss of one output; got {loss!r}.")
        weights = {} if weights is None else weights
        if not isinstance(weights, Mapping) or not set(weights) <= set(losses):
            raise ValueError(f"weights must be a dict of numbers with names among {sorted(losses)}; got {weights!r}.")
        self.losses = {name: losses[name] for name in sorted(losses)}
        self.weights = {name: check_weight_number(f"weights[{name!r}]", weights.get(name, 1.0)) for name in self.losses}
        self._shapes = None
        self.reduction = "sum" if all(loss.reduction == "sum" for loss in losses.values()) else "mean"

    def __repr__(self) -> str:
        return fields(self, losses=dict(self.losses), weights={k: float(w) for k, w in self.weights.items()})

    def __call__(self, outputs: Any, targets: Any) -> Float[Array, ""]:
        """Compute the loss of a batch.

        Args:
            outputs: a dict of outputs, floating, `[N, *out]` each.
            targets: a dict of their targets.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError, TypeError: for names, shapes, dtypes or values that do not fit the losses.
        """
        self._check_names("outputs", outputs)
        self._check_names("targets", targets)
        values = [self.weights[k].astype(v.dtype) * v for k, v in self._values(outputs, targets)]
        with jax.numpy_dtype_promotion("standard"):  # outputs may have several dtypes
            return sum(values[1:], start=values[0])

    def _values(self, outputs: Any, targets: Any) -> Iterator[tuple[str, Array]]:
        for name, loss in self.losses.items():
            with errors_name_output(name):
                yield name, loss(outputs[name], targets[name])

    def targets_valid(self, outputs: Any, targets: Any, *, batch: bool = True) -> dict[str, Bool[Array, "..."]]:  # type: ignore[override]
        """Tell, for each loss, which targets are in its domain.

        Args:
            outputs: a dict of outputs, `[N, *out]` each, or one example's, `[*out]`.
            targets: a dict of their targets.
            batch: whether outputs and targets have a leading batch axis; True by default.

        Returns:
            A dict of booleans, `[*positions]` each.
        """
        return {k: loss.targets_valid(outputs[k], targets[k], batch=batch) for k, loss in self.losses.items()}

    # Outputs as one array.

    def _with_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> "JointLoss":
        """The same loss for the outputs of all heads in one array, `[N, entries]`; the shapes are of one example."""
        made = object.__new__(JointLoss)
        given = {"_shapes": tuple((name, tuple(shapes[name])) for name in self.losses)}
        for name in ("losses", "weights", "reduction", "_shapes"):
            object.__setattr__(made, name, given.get(name, getattr(self, name)))
        return made

    def _heads(self, entries: Any) -> dict[str, tuple[Loss, Any]]:
        """The loss and the outputs of each head, from those of all, `[*lead, entries]`, an array or a shape."""
        assert self._shapes is not None
        if isinstance(entries, jax.ShapeDtypeStruct):
            found = jax.eval_shape(lambda x: split_outputs(x, dict(self._shapes or ())), entries)
        else:
            found = split_outputs(entries, dict(self._shapes))
        return {name: (loss, found[name]) for name, loss in self.losses.items()}

    def split(self, outputs: Array, targets: Any, batch: bool) -> "JointTerms":  # type: ignore[override]
        """Split the loss at these outputs into the heads' terms, with their weights.

        Args:
            outputs: the outputs of all heads, `[N, entries]`, or one example's, `[entries]`.
            targets: a dict of their targets.
            batch: whether outputs and targets have a leading batch axis.

        Returns:
            The terms, with reduction and weights.
        """
        found = {k: split_terms(loss, f, targets[k], batch=batch) for k, (loss, f) in self._heads(outputs).items()}
        weights = {k: self.weights[k].astype(terms.outputs.dtype) for k, terms in found.items()}
        return JointTerms(self, found, weights, outputs.dtype, batch)

    def check_shapes(self, outputs: Any, targets: Any, batch: bool) -> None:
        self._check_names("targets", targets)
        for name, (loss, f) in self._heads(jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)).items():
            with errors_name_output(name):
                loss.check_shapes(f, targets[name], batch)

    def check_values(self, outputs: Any, targets: Any, batch: bool) -> None:
        """Refuse targets whose values a loss does not accept, where values are known.

        Args:
            outputs: the outputs of all heads, `[N, entries]`, or one example's, `[entries]`.
            targets: a dict of their targets.
            batch: whether outputs and targets have a leading batch axis.

        Raises:
            ValueError: for such a target.
        """
        for name, (loss, f) in self._heads(jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)).items():
            with errors_name_output(name):
                check_values(loss, f, targets[name], batch)

    def stand_in_targets(self, outputs: Any, batch: bool) -> Any:
        found = self._heads(jax.ShapeDtypeStruct(outputs.shape, outputs.dtype))
        return {name: loss.stand_in_targets(f, batch) for name, (loss, f) in found.items()}

    def _check_names(self, what: str, tree: Any) -> None:
        """Refuse anything but a dict with the losses' names."""
        if not isinstance(tree, Mapping) or set(tree) != set(self.losses):
            got = f"a dict of {sorted(map(str, tree))}" if isinstance(tree, Mapping) else type(tree).__name__
            raise TypeError(
                f"{what} must be a dict of arrays with the names of the losses, {list(self.losses)}; got {got}."
            )

    def _flattened(self, outputs: Any, batch: bool) -> tuple["JointLoss", Array]:
        """The loss of one array `[N, entries]`, and that array, for a dict of outputs."""
        self._check_names("outputs", outputs)
        arrays = {k: as_outputs(f"outputs[{k!r}]", outputs[k], batch) for k in self.losses}
        if batch and len({x.shape[0] for x in arrays.values()}) > 1:
            shapes = {k: x.shape for k, x in arrays.items()}
            raise ValueError(f"outputs must have one common batch axis; got shapes {shapes}.")
        return self._with_shapes({k: x.shape[batch:] for k, x in arrays.items()}), flatten_outputs(arrays, int(batch))

    # Its terms are of several kinds.

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a JointLoss has terms of several kinds: use those of its losses.")

    term_weight = term_count = term_valid = term_value = term_gradient = term_hessian = _refuse
    draw = settle = sampled_gradient = operand = _refuse


def errors_name_output(name: str) -> AbstractContextManager[None]:
    """Prefix errors with the name of the output that they are about."""
    return errors_prefixed(f"of output {name!r}: ")


class JointTerms(eqx.Module):
    """The terms of a `JointLoss` at outputs `[*lead, entries]`; what `ggn_jax.terms.Terms` is for one loss."""

    loss: JointLoss
    parts: dict[str, Terms]
    weights: dict[str, Array]
    dtype: Any = eqx.field(static=True)
    batch: bool = eqx.field(static=True)

    @property
    def outputs(self) -> Float[Array, "... entries"]:
        return self._join({name: terms.outputs for name, terms in self.parts.items()})

    @property
    def operand(self) -> PyTree[Array]:
        return {name: terms.operand for name, terms in self.parts.items()}

    @property
    def scale(self) -> Float[Array, " terms"]:
        """The factors of plain terms' Hessians, for all terms."""
        return jnp.concatenate([times(self.weights[k], t.scale).reshape(-1) for k, t in self.parts.items()])

    @property
    def reduction_factor(self) -> Float[Array, ""]:
        """The reduction, where all losses have the same: that of sums."""
        return jnp.ones((), self.outputs.dtype)

    def part(self, outputs: Array, operand: Any) -> "JointTerms":
        found = {k: self.parts[k].part(f, operand[k]) for k, (_, f) in self.loss._heads(outputs).items()}
        return JointTerms(self.loss, found, self.weights, self.dtype, self.batch)

    def loss_value(self) -> Float[Array, ""]:
        return self.wide_loss_value().astype(self.dtype)

    def wide_loss_value(self) -> Float[Array, ""]:
        values = [times(self.weights[k], terms.wide_loss_value()) for k, terms in self.parts.items()]
        return sum(values[1:], start=values[0])

    def empirical(self) -> Float[Array, "... entries"]:
        return self._join({k: times(self.weights[k], terms.empirical()) for k, terms in self.parts.items()})

    def empirical_product(self, tangent: Array, per_term: bool) -> Float[Array, "... entries"]:
        if not per_term:
            g = self.empirical()
            return (g * jnp.sum(g * tangent.astype(g.dtype), axis=-1, keepdims=True)).astype(self.dtype)
        tangents = self.loss._heads(tangent)
        products = {k: t.empirical_product(tangents[k][1], True) for k, t in self.parts.items()}
        return self._join({k: times(self.weights[k] ** 2, x) for k, x in products.items()}).astype(self.dtype)

    def term_indices(self, per_term: bool) -> tuple[Array, int]:
        if not per_term:
            shape = self.outputs.shape
            return jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape), shape[0]
        found: dict[str, Array] = {}
        total = 0
        for name, terms in self.parts.items():
            numbers, count = terms.term_indices(True)
            found[name], total = numbers + total, total + count
        return self._join(found), total

    def draw(self, keys: Array, num: int) -> dict[str, Array]:
        """As `Terms.draw`, for each head, with keys of its own."""
        return {k: terms.draw(fold_keys(keys, i), num) for i, (k, terms) in enumerate(self.parts.items())}

    def sampled_gradient(self, drawn: dict[str, Array]) -> Float[Array, "... entries"]:
        return self._join(
            {k: times(safe_sqrt(self.weights[k]), t.sampled_gradient(drawn[k])) for k, t in self.parts.items()}
        )

    def sampled_gradients(self, keys: Array, num: int) -> Float[Array, "num ... entries"]:
        return jax.vmap(self.sampled_gradient)(self.draw(keys, num))

    def product(self, name: str, v: Array) -> Float[Array, "... entries"]:
        vs = self.loss._heads(v)
        products = {k: terms.product(name, vs[k][1]) for k, terms in self.parts.items()}
        scales = {k: w if name == "mv" else safe_sqrt(w) for k, w in self.weights.items()}
        return self._join({k: times(scales[k], x) for k, x in products.items()}).astype(self.dtype)

    def diagonal(self) -> Float[Array, "... entries"]:
        return self._join({k: times(self.weights[k], terms.diagonal()) for k, terms in self.parts.items()})

    def weighted(self, name: str) -> Terms:
        """One head's terms, with its weight in their scale."""
        terms = self.parts[name]
        return replace(terms, scale=times(self.weights[name], terms.scale))

    def join(self, arrays: Sequence[Array], lead: int) -> Array:
        """The heads' arrays `[*lead, *out]` as one, in the order of their names."""
        return flatten_outputs(dict(zip(self.parts, arrays, strict=True)), lead)

    def _join(self, arrays: dict[str, Array]) -> Array:
        return flatten_outputs(arrays, int(self.batch))


def fold_keys(keys: Array, number: int) -> Array:
    """Keys for the head with this number."""
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)

    def fold(key: Array) -> Array:
        return jax.random.fold_in(key, number)

    return fold(keys) if keys.ndim == (0 if typed else 1) else jax.vmap(fold)(keys)


def flatten_problem(model_fn: Any, loss: Any, params: PyTree, inputs: PyTree, has_aux: bool = False) -> tuple[Any, Any]:
    """A model that returns one array, and a loss of it; of a `JointLoss` and a model that returns a dict."""
    if not isinstance(loss, JointLoss) or loss._shapes is not None:
        return model_fn, loss
    outputs = jax.eval_shape(Model(model_fn, has_aux), params, inputs)
    loss._check_names("the outputs of model_fn", outputs)
    for name, output in outputs.items():
        if not isinstance(output, jax.ShapeDtypeStruct) or not output.shape:
            raise TypeError(f"model_fn must return an array [N, *out] as output {name!r}; got {output}.")
        check_outputs(f"output {name!r} of model_fn", output)
    sizes = {name: output.shape for name, output in outputs.items()}
    if len({shape[0] for shape in sizes.values()}) > 1:
        raise ValueError(f"the outputs of model_fn must have one common batch axis; got shapes {sizes}.")
    return flat_model(model_fn, has_aux), loss._with_shapes({name: shape[1:] for name, shape in sizes.items()})


def joint_vectors(
    loss: JointLoss, make: Callable[[Loss], Callable[..., Array]], fisher_type: FisherType
) -> Callable[..., dict[str, Array]]:
    """A function of dicts of outputs and targets, and of a key, from one for each loss."""
    fns = {name: make(head) for name, head in loss.losses.items()}

    def fn(outputs: Any, *args: Any) -> dict[str, Array]:
        *numbers, targets, key = args
        loss._check_names("outputs", outputs)
        if targets is None:
            targets = dict.fromkeys(fns)
        loss._check_names("targets", targets)
        found = {}
        for i, (name, one) in enumerate(fns.items()):
            with errors_name_output(name):
                drawn = one(outputs[name], *numbers, targets[name], None if key is None else fold_keys(key, i))
            weight = loss.weights[name]
            found[name] = times(weight if fisher_type is FisherType.EMPIRICAL else safe_sqrt(weight), drawn)
        if fisher_type is not FisherType.TYPE2:
            return found
        sizes, start = [x.shape[0] for x in found.values()], 0
        for name, size in zip(found, sizes, strict=True):
            rest = (start, sum(sizes) - start - size)
            found[name] = jnp.pad(found[name], [rest, *[(0, 0)] * (found[name].ndim - 1)])
            start += size
        return found

    return fn


def check_joint_terms(loss: JointLoss, outputs: Any, targets: Any, batch: bool) -> tuple[JointLoss, Array, Any]:
    """The loss, outputs and targets as one array, and as arrays, after all checks."""
    flat, joined = loss._flattened(outputs, batch)
    if targets is None:
        targets = flat.stand_in_targets(joined, batch)
    loss._check_names("targets", targets)
    checked = {}
    for name, (head, f) in flat._heads(joined).items():
        with errors_name_output(name):
            checked[name] = check_terms(head, f, targets[name], batch)[1]
    return flat, joined, checked
