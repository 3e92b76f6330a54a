"""Which curvature each parameter gets, as a table to read and as rows to test against."""

import math
from dataclasses import dataclass

import jax

from ggn_jax.kronecker.algebra import Diagonal, Kronecker
from ggn_jax.kronecker.layout import Layout, is_whole
from ggn_jax.kronecker.stacks import BlockSpec
from ggn_jax.layers.table import dimensions, table
from ggn_jax.optimizer.curvature import Curvature, block_shapes, describe


@dataclass(frozen=True)
class CurvatureRow:
    """One parameter's part in one block, of a `CurvatureReport`.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x)
        >>> optimizer.report(params).rows[0].kind
        'linear'
    """

    parameter: str
    """Its path, as `jax.tree_util.keystr` writes it."""
    shape: tuple[int, ...]
    """The parameter's shape."""
    kind: str
    """What it is used as, as in `report`."""
    curvature: str
    """The block: "Kronecker (out x out) (x) (in x in)", "exact d x d", "diagonal d" or "none"."""
    why: str
    """Why the block is not what such a parameter gets by default; empty where it is."""


@dataclass(frozen=True)
class CurvatureReport:
    """What `optimizer.report(params)` returns, for `kfac` and `scale_by_kfac`: `print` it, or read its `rows`.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=x)
        >>> optimizer.report(params).rows[0].curvature
        'Kronecker (3 x 3) (x) (2 x 2)'
    """

    rows: tuple[CurvatureRow, ...]
    """A row for each part of a parameter in a block."""
    state_size: int
    """The number of entries of the averages and inverses in the state."""
    params_size: int
    """The number of entries of the parameters."""
    state_bytes: int
    """The bytes that the entries of the state take, in the dtypes in which they are kept."""

    def __str__(self) -> str:
        head = ("parameter", "shape", "kind", "curvature")
        lines = table(head, [(r.parameter, dimensions(r.shape), r.kind, r.curvature) for r in self.rows])
        lines += list(dict.fromkeys(f"{row.parameter}: {row.why}" for row in self.rows if row.why))
        lines.append(
            f"State: {self.state_size} entries, {self.state_size / max(self.params_size, 1):.1f} per parameter;"
            f" {self.state_bytes} bytes."
        )
        return "\n".join(lines)


def _cut_blocks(layout: Layout) -> dict[BlockSpec, str]:
    """The blocks that are part of a layer whose factors are too large, and why."""
    reasons: dict[BlockSpec, str] = {}
    for layer, members in zip(layout.plan.layers, layout.by_layer(layout.members), strict=True):
        for parts in layout.partitions(layer):
            if not is_whole(parts):
                count = sum(run.count for run in parts)
                size, most = parts[-1].stop, layout.options.max_dense_size
                why = f"a factor of size {size} is more than max_dense_size = {most}: {count} blocks on its diagonal"
                reasons.update(dict.fromkeys((member.spec for member in members), why))
    return reasons


def summarise(layout: Layout, curvature: Curvature, most_terms: int) -> CurvatureReport:
    """The report of blocks, whose arrays need no values; `most_terms` of a sum are inverted as they are."""
    trace = layout.trace
    shapes = dict(zip(trace.names, trace.shapes, strict=True))
    reasons = {
        trace.names[parameter.leaf]: parameter.why
        for parameter in layout.plan.unassigned
        if parameter.kind == "uncovered"
    }
    options, cut = layout.options, _cut_blocks(layout)
    rows = []
    blocks = jax.eval_shape(layout.unstack_all, block_shapes(layout))
    for spec, block in zip((member.spec for member in layout.members), blocks, strict=True):
        unused = spec.kind == "unused"
        why = cut.get(spec, "")
        if isinstance(block, Kronecker):
            wide = max(f.shape[1] for f in (*block.a, *block.b))
            if not why and wide > options.max_dense_size:
                why = f"a factor of size {wide} is more than max_dense_size = {options.max_dense_size}: diagonal"
            if not why and len(block.a) > most_terms:
                near = "one that is" if most_terms == 1 else "two that are"
                why = f"{len(block.a)} Kronecker terms are inverted as {near} near their sum"
        elif isinstance(block, Diagonal) and not unused and spec.kind != "uncovered" and options.small == "full":
            size = block.values.shape[1]
            why = f"size {size} is more than max_small_size = {options.max_small_size}: diagonal"
            if size <= options.max_small_size:
                why = f"{size} x {size} is more than the {sum(layout.sizes):,} parameters of the model: diagonal"
        for name in spec.names:
            reason = reasons.get(name, "")
            rows.append(
                CurvatureRow(
                    name,
                    shapes.get(name, ()),
                    spec.kind,
                    "none" if unused else describe(block),
                    f"uncovered, {reason}" if reason else why,
                )
            )
    kept = jax.tree.leaves((curvature.blocks, curvature.inverses))
    params_size = sum(map(math.prod, trace.shapes))
    return CurvatureReport(
        tuple(dict.fromkeys(rows)),
        sum(int(x.size) for x in kept),
        params_size,
        sum(int(x.size) * x.dtype.itemsize for x in kept),
    )
