"""What was found in a model, as a table to read and as rows to test against."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ggn_jax._checks import Examples, check_coupled, have_values
from ggn_jax._hints import check_model_fn, is_array, model_errors_explained, params_hint, tensor_hint
from ggn_jax._model import Model
from ggn_jax._outputs import flat_model
from ggn_jax._sharding import compiler_sharded
from ggn_jax._unbatched import batched_leaves, map_batched
from ggn_jax.layers.check import (
    COUPLED_WAY_OUT,
    NUM_CHECKED_EXAMPLES,
    compare_gradients,
    coupling_message,
    dtypes_of,
    tolerance,
)
from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.plan import Plan, is_dense, make_plan
from ggn_jax.layers.table import dimensions, table
from ggn_jax.layers.trace import Trace, trace_model


@dataclass(frozen=True)
class ReportRow:
    """One parameter of a `Report`.

    Example:
        >>> import jax.numpy as jnp
        >>> report(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((5, 3))).rows[0].kind
        'linear'
    """

    parameter: str
    """Its path, as `jax.tree_util.keystr` writes it."""
    shape: tuple[int, ...]
    """The parameter's shape."""
    kind: str
    """What it is used as: "linear", "convolution", "embedding", "bias", "scale", "shift", "unused" or "uncovered"; with
    several layers' kinds joined by "+"."""
    layer: str
    """The sizes of its layer, `groups x out x in`; empty where there is none."""
    positions: tuple[int, ...]
    """The number of sharing positions of each use, in one example; in the batch, if examples are coupled."""
    uses: int
    """The number of places in the model that use it."""
    curvature: str
    """What KFAC uses for it by default: "Kronecker" for the weights and biases of layers; for all else the GGN's exact
    "block", or its "diagonal" where that would be large; "none" for what no output depends on."""
    why: str
    """Why it is not covered, with the primitive, the line and the module; empty where it is."""
    gap: float | None
    """The self-check's relative error of its gradient; None where it was not made."""


@dataclass(frozen=True)
class Report:
    """What `report` found: `print` it, or read its `rows`.

    Example:
        >>> import jax.numpy as jnp
        >>> found = report(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((5, 3)))
        >>> found.passed, found.uncovered
        (True, ())
    """

    rows: tuple[ReportRow, ...]
    """A row for each parameter."""
    tolerance: float
    """The largest gap that counts as rounding."""
    coupled: float | None
    """How far a batch's outputs are from those of its examples one by one; None where it was not checked."""

    @property
    def passed(self) -> bool | None:
        """The result of the self-check: None if it was not made, since the arrays had no values."""
        gaps = [row.gap for row in self.rows]
        if self.coupled is None or None in gaps:
            return None
        return all(value <= self.tolerance for value in [self.coupled, *gaps])  # type: ignore[operator]

    @property
    def uncovered(self) -> tuple[str, ...]:
        """The paths of the parameters that are used in a way that has no Kronecker form."""
        return tuple(row.parameter for row in self.rows if row.kind == "uncovered")

    def summary(self) -> str:
        """Summarise in one line how many parameters have which curvature, and the self-check.

        Returns:
            A string.

        Example:
            >>> import jax.numpy as jnp
            >>> report(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((5, 3))).summary()
            '1 parameter, 6 entries: 1 Kronecker (100 %); self-check passed'
        """
        entries = {row.parameter: math.prod(row.shape) for row in self.rows}
        total = max(sum(entries.values()), 1)
        parts = []
        for curvature in dict.fromkeys(row.curvature for row in self.rows):
            rows = [row for row in self.rows if row.curvature == curvature]
            share = 100 * sum(entries[row.parameter] for row in rows) / total
            parts.append(f"{len(rows)} {curvature} ({share:.3g} %)")
        verdict = {True: "passed", False: "FAILED", None: "not made"}[self.passed]
        number = f"{len(entries)} parameter{'s' * (len(entries) != 1)}"
        return f"{number}, {sum(entries.values())} entries: {', '.join(parts)}; self-check {verdict}"

    def __str__(self) -> str:
        head = ("parameter", "shape", "kind", "G x out x in", "positions", "uses", "curvature", "gap")
        cells = []
        for row in self.rows:
            gap = "" if row.gap is None else f"{row.gap:.0e}"
            positions = ", ".join(map(str, row.positions))
            own = row.parameter, dimensions(row.shape), row.kind, row.layer, positions
            cells.append((*own, str(row.uses), row.curvature, gap))
        lines = table(head, cells)
        lines += [f"{row.parameter}: {row.why}" for row in self.rows if row.why]
        if self.coupled is not None and self.coupled > self.tolerance:
            lines.append(f"Self-check FAILED: {coupling_message(self.coupled, COUPLED_WAY_OUT)}")
        elif self.passed is None:
            lines.append("Self-check: not made, since parameters or inputs have no values here.")
        elif self.passed:
            lines.append(f"Self-check passed: the layers explain every gradient to {self.tolerance:.0e}.")
        else:
            bad = ", ".join(row.parameter for row in self.rows if row.gap is not None and not row.gap <= self.tolerance)
            lines.append(
                f"Self-check FAILED: gradients of {bad} are not explained by the layers found. Please report it."
            )
        return "\n".join(lines)


def report(
    model_fn: Callable[[PyTree, PyTree], Any],
    params: PyTree,
    inputs: PyTree,
    *,
    has_aux: bool = False,
    examples: Examples = "independent",
) -> Report:
    """Find the linear layers of a model, and check that they explain its gradient.

    A layer is an equation of the model's jaxpr in which a parameter, possibly reshaped, sliced, transposed or stacked,
    first meets an input or an activation: a matrix product, a convolution, or rows of a table. Nothing needs to be
    tagged or registered, and no module system is needed. `model_fn` is traced on one example, a batch of one.

    For each parameter, the self-check compares the sum over examples and sharing positions of output gradient times
    input with the gradient by automatic differentiation, for a random cotangent, on at most four examples; and the
    outputs of these examples together with those one by one, which detects batch normalisation in training mode. It is
    made where parameters and inputs have values (not under `jit`, or for `jax.ShapeDtypeStruct`s).

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
        params: the parameters, a pytree of floating arrays.
        inputs: a batch of inputs, perhaps a pytree, whose leading axes are the batch's.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
        examples: `"independent"` (default), or `"coupled"` for a model whose examples depend on each other, which is
            traced on the whole batch.

    Returns:
        A `Report`, with a row for each parameter.

    Raises:
        TypeError, ValueError: for a model that does not return one array with a batch axis, parameters that are not
            floating, or inputs without a common batch axis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "s": jnp.ones(2)}
        >>> found = report(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) * p["s"], params, jnp.ones((5, 3)))
        >>> [(row.parameter, row.kind, row.curvature) for row in found.rows]
        [("['b']", 'bias', 'Kronecker'), ("['s']", 'scale', 'block'), ("['w']", 'linear', 'Kronecker')]
        >>> found.passed
        True
    """
    check_model(model_fn, params, inputs)
    coupled_examples, model_fn = check_coupled(examples), Model(model_fn, has_aux)
    size = batched_leaves(inputs)[0].shape[0]
    with model_errors_explained(params, inputs):
        whole = jax.eval_shape(model_fn, params, inputs)
        if isinstance(whole, Mapping):  # as for a JointLoss
            model_fn = Model(flat_model(model_fn))
            whole = jax.eval_shape(model_fn, params, inputs)
    with model_errors_explained(params, inputs, one_example=not coupled_examples):
        trace = trace_model(model_fn, params, inputs, coupled=coupled_examples)
    if whole.shape != (size, *trace.outputs.shape):
        raise ValueError(
            f"model_fn must return an array [N, *out]; it returned shape {whole.shape} for a batch of {size}, and"
            f" {(1, *trace.outputs.shape)} for a batch of one."
        )
    plan, most = make_plan(trace), tolerance(*dtypes_of(trace))
    gaps: list[float | None] = [None] * len(trace.shapes)
    coupled = None
    if have_values((params, inputs)):
        coupled, *gaps = np.asarray(_measure(model_fn, params, inputs, coupled_examples)).tolist()
    rows = tuple(_row(trace, plan, leaf, gap) for leaf, gap in enumerate(gaps))
    return Report(rows, most, coupled)


@eqx.filter_jit
@compiler_sharded
def _measure(model_fn: Any, params: PyTree[Array], inputs: PyTree[Array], coupled_examples: bool) -> Array:
    few = map_batched(lambda x: jnp.asarray(x if coupled_examples else x[:NUM_CHECKED_EXAMPLES]), inputs)
    trace = trace_model(model_fn, params, few, coupled=coupled_examples)
    return compare_gradients(trace, make_plan(trace), model_fn, params, few, tolerance(*dtypes_of(trace)))[1]


def check_model(model_fn: Any, params: Any, inputs: Any) -> None:
    """Refuse what is not a model, floating parameters, and a batch."""
    check_model_fn(model_fn)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"params must hold at least one array; got an empty pytree.{params_hint(params)}")
    for path, leaf in leaves:
        dtype: Any = getattr(leaf, "dtype", None)
        if not is_array(leaf) or tensor_hint(leaf) or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be a floating array; got"
                f" {type(leaf).__name__ if dtype is None else dtype}. Close model_fn over what is not a"
                f" parameter.{tensor_hint(leaf)}{params_hint(params)}"
            )
    batch = jax.tree_util.tree_leaves_with_path(inputs)
    for path, leaf in batch:
        if not is_array(leaf) or tensor_hint(leaf):
            raise TypeError(
                f"inputs{jax.tree_util.keystr(path)} must be an array; got {type(leaf).__name__}.{tensor_hint(leaf)}"
            )
    shapes = [tuple(leaf.shape) for leaf in batched_leaves(inputs)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        all_unbatched = (
            " All inputs are Unbatched: one must have an entry for each example." if batch and not shapes else ""
        )
        raise ValueError(
            "inputs must hold arrays with one common leading batch axis of at least 1; got shapes"
            f" {shapes}.{all_unbatched}"
        )


def _row(trace: Trace, plan: Plan, leaf: int, gap: float | None) -> ReportRow:
    name, shape = trace.names[leaf], trace.shapes[leaf]
    for parameter in plan.unassigned:
        if parameter.leaf == leaf:
            entries, total = math.prod(shape), sum(map(math.prod, trace.shapes))
            curvature = "block" if is_dense(parameter.kind, entries, total) else "diagonal"
            curvature = "none" if parameter.kind == "unused" else curvature
            why = parameter.why
            if parameter.kind != "unused" and why:
                why += f" at {parameter.source}" + (f" in {parameter.module}" if parameter.module else "")
            uses = sum(1 for use in trace.elementwise if leaf in use.leaves)
            return ReportRow(name, shape, parameter.kind, "", (), uses, curvature, why, gap)
    layers = [layer for layer in plan.layers if leaf in layer.leaves]
    kinds, positions, sizes, uses = [], [], [], 0
    for layer in layers:
        is_weight = _has_entries_of(trace, layer.weight.entries, leaf)
        kinds += [trace.uses[n].kind if is_weight else "bias" for n in layer.uses]
        positions += [trace.uses[n].num_positions for n in layer.uses]
        sizes += [dimensions(trace.uses[n].weight.shape) for n in layer.uses]
        uses += len(layer.uses)
    kind, size = "+".join(dict.fromkeys(kinds)), ", ".join(dict.fromkeys(sizes))
    return ReportRow(name, shape, kind, size, tuple(positions), uses, "Kronecker", "", gap)


def _has_entries_of(trace: Trace, entries: IndexMap, leaf: int) -> bool:
    return leaf in entries.owning_leaves([math.prod(shape) for shape in trace.shapes])
