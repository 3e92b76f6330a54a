"""Which blocks a traced model has, and where their entries are among the parameters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ggn_jax._checks import check_count
from ggn_jax._sharding import vary_like
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block
from ggn_jax.kronecker.vectors import Positions
from ggn_jax.layers import Layer, Leftover, Plan, Trace, make_plan, trace_model
from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.uses import View
from ggn_jax.loss import Loss
from ggn_jax.operators.problem import Problem

Sharing = Literal["expand", "reduce"]
Bias = Literal["joint", "separate"]
Tied = Literal["sum", "concatenate"]
OnUncovered = Literal["error", "diagonal", "full"]
Small = Literal["full", "diagonal"]
Structure = tuple[tuple[tuple[int, ...], ...], tuple[Any, ...], Any]  # of parameters: shapes, dtypes, the pytree's


@dataclass(frozen=True)
class Options:
    """How the factors are made; see `KFACLinearOperator`."""

    fisher_type: FisherType = FisherType.MC
    mc_samples: int = 1
    sharing: Sharing = "expand"
    bias: Bias = "joint"
    tied: Tied = "sum"
    positions: Positions = "signs"
    on_uncovered: OnUncovered = "error"
    small: Small = "full"
    max_dense_size: int = 8192
    max_small_size: int = 1024
    vector_chunk_size: int = 1

    def __post_init__(self) -> None:
        given = self.fisher_type
        checked: dict[str, Any] = {
            "fisher_type": FisherType(given) if isinstance(given, str) else FisherType._missing_(given)
        }
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {wanted}; got {getattr(self, name)!r}.")
        for name in ("mc_samples", "max_dense_size", "max_small_size", "vector_chunk_size"):
            checked[name] = check_count(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)


CHOICES: dict[str, tuple[str, ...]] = {
    "sharing": get_args(Sharing),
    "bias": get_args(Bias),
    "tied": get_args(Tied),
    "positions": get_args(Positions),
    "on_uncovered": get_args(OnUncovered),
    "small": get_args(Small),
}


@dataclass(frozen=True)
class Place:
    """Which parameters a block acts on, and what it is."""

    names: tuple[str, ...]
    kind: str
    views: tuple[View, ...]  # a weight, and a bias that is one more input; or one array


class Blocks(eqx.Module):
    """The blocks of a curvature matrix, and where they are."""

    blocks: tuple[Block, ...]
    places: tuple[Place, ...] = eqx.field(static=True)


class Layout:
    """What a trace and options say about blocks, before any value is known."""

    def __init__(self, loss: Loss, trace: Trace, options: Options):
        self.options, self.loss, self.trace = options, loss, trace
        self.plan: Plan = make_plan(trace)
        self.leaves = tuple(left.leaf for left in self.plan.leftovers if left.kind != "unused")
        uncovered = [left for left in self.plan.leftovers if left.kind == "uncovered"]
        if uncovered and options.on_uncovered == "error":
            raise NotImplementedError(_uncovered_message(self.trace, uncovered))
        forward_only = options.fisher_type is FisherType.FORWARD_ONLY
        if forward_only and self.leaves:
            names = ", ".join(self.trace.names[leaf] for leaf in self.leaves)
            raise NotImplementedError(
                f"fisher_type 'forward-only' back-propagates nothing, and has no curvature for {names}, which no layer"
                " owns: choose another fisher type."
            )

    @classmethod
    def of(cls, problem: Problem, options: Options) -> Self:
        return cls(problem.loss, trace_model(problem.model_fn, problem.params, problem.inputs), options)

    def joint(self, layer: Layer) -> bool:
        """Whether the bias is one more input; counts of rows stay diagonal, so an embedding's bias is apart."""
        kinds = {self.trace.uses[n].kind for n in layer.uses}
        return layer.bias is not None and self.options.bias == "joint" and "embedding" not in kinds

    def is_full(self, left: Leftover) -> bool:
        options = self.options
        uncovered = left.kind == "uncovered"
        wanted, most = (
            (options.on_uncovered, options.max_dense_size) if uncovered else (options.small, options.max_small_size)
        )
        return wanted == "full" and math.prod(self.trace.shapes[left.leaf]) <= most

    def places(self) -> tuple[Place, ...]:
        result: list[Place] = []
        starts = [sum(math.prod(s) for s in self.trace.shapes[:i]) for i in range(len(self.trace.shapes))]
        for layer in self.plan.layers:
            kind = "+".join(dict.fromkeys(self.trace.uses[n].kind for n in layer.uses))
            if self.joint(layer):
                assert layer.bias is not None
                names = tuple(self.trace.names[leaf] for leaf in layer.leaves)
                result.append(Place(names, kind, (layer.weight, layer.bias)))
                continue
            owners = {view: self._names(view) for view in (layer.weight, layer.bias) if view is not None}
            result += [Place(owners[layer.weight], kind, (layer.weight,))]
            if layer.bias is not None:
                result.append(Place(owners[layer.bias], "bias", (layer.bias,)))
        for left in self.plan.leftovers:
            size = math.prod(self.trace.shapes[left.leaf])
            if not size:
                continue
            entries = IndexMap.contiguous((1, 1, size), starts[left.leaf])
            result.append(Place((self.trace.names[left.leaf],), left.kind, (View(entries, (1, 1, size)),)))
        return (*result, *self.rest(result))

    def rest(self, places: list[Place]) -> list[Place]:
        """The entries that no output depends on, of parameters of which a layer uses a part."""
        sizes = [math.prod(shape) for shape in self.trace.shapes]
        views = [view for place in places for view in place.views]
        if sum(view.entries.size for view in views) == sum(sizes):
            return []
        free = np.ones(sum(sizes), bool)  # a byte per parameter, and only here
        for view in views:
            free[view.entries.numbers().reshape(-1)] = False
        (numbers,) = np.nonzero(free)
        view = View(IndexMap.explicit(numbers.reshape(1, 1, -1)), (1, 1, len(numbers)))
        return [Place((f"unused entries of {', '.join(self._names(view))}",), "unused", (view,))]

    def _names(self, view: View) -> tuple[str, ...]:
        return tuple(self.trace.names[i] for i in view.entries.owners([math.prod(s) for s in self.trace.shapes]))


def _uncovered_message(trace: Trace, uncovered: list[Leftover]) -> str:
    lines = []
    for left in uncovered:
        where = f" at {left.source}" if left.source else ""
        where += f" in {left.module}" if left.module else ""
        lines.append(f"params{trace.names[left.leaf]}: {left.why}{where}")
    return (
        "These parameters have no Kronecker form:\n  "
        + "\n  ".join(lines)
        + "\nPass on_uncovered='diagonal' (the GGN's"
        " diagonal) or 'full' (its dense block) for curvature without one; ggn_jax.report shows all parameters."
    )


def structure(params: PyTree[Array]) -> Structure:
    """What is static of parameters."""
    leaves, tree = jax.tree.flatten(params)
    return tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves), tree


def shape_of(place: Place) -> tuple[int, int, int]:
    groups, out, inputs = place.views[0].shape
    return groups, out, inputs + len(place.views) - 1


def reader(place: Place, shapes: Sequence[tuple[int, ...]]) -> Callable[[list[Array]], Array]:
    """A linear function of the flattened parameters that returns a block's entries, `[G, out, in]`."""
    sizes = [math.prod(shape) for shape in shapes]

    def read(leaves: list[Array]) -> Array:
        parts = []
        for view in place.views:
            owners = view.entries.owners(sizes)
            first, last = owners[0], owners[-1] + 1
            some = leaves[first:last]
            wide = _common(some)
            flat = some[0] if len(some) == 1 else jnp.concatenate([leaf.astype(wide) for leaf in some])
            start = sum(sizes[:first])
            parts.append(view.entries.shifted(-start).reader(flat.size)(flat).reshape(view.shape))
        wide = _common(parts)
        return parts[0] if len(parts) == 1 else jnp.concatenate([part.astype(wide) for part in parts], axis=-1)

    return read


def _common(arrays: list[Array]) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # parameters may have several dtypes
        return jnp.result_type(*(array.dtype for array in arrays))


def write(places: Sequence[Place], structure: Structure, parts: Sequence[Array]) -> PyTree[Array]:
    """The parameters with these entries at the blocks' places, and 0 elsewhere."""
    shapes, dtypes, tree = structure
    total = [jnp.zeros(math.prod(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    total = vary_like(total, parts)
    for part, place in zip(parts, places, strict=True):
        read = reader(place, shapes)
        dtype = jax.eval_shape(read, total).dtype
        (written,) = jax.linear_transpose(read, total)(vary_like(part.reshape(shape_of(place)).astype(dtype), parts))
        total = [a + b for a, b in zip(total, written, strict=True)]
    return jax.tree.unflatten(tree, [x.reshape(shape) for x, shape in zip(total, shapes, strict=True)])


def multiply(blocks: Blocks, structure: Structure, vector: PyTree[Array]) -> PyTree[Array]:
    """The blocks' product with a pytree like the parameters; the result has `structure`."""
    leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(vector)]
    parts = []
    for block, place in zip(blocks.blocks, blocks.places, strict=True):
        m = reader(place, structure[0])(leaves)
        parts.append(block.mv(m.astype(jax.tree.leaves(block)[0].dtype)))
    return write(blocks.places, structure, parts)
