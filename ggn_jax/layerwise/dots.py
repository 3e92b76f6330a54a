"""Inner products of the gradients of single outputs, layer by layer: `J J^T` without `J` where that takes less.

For outputs `c` of example `n` and `d` of example `m`, a layer of which `a` are the inputs and `g` the output gradients
adds `<G_nc, G_md> = sum_{s, t} (a_ns . a_mt) (g_ncs . g_mdt)`, since its gradient is `G_nc = sum_s g_ncs a_ns^T`.
The examples may be of two functions with the same parameters: one plan of layers is made for all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ggn_jax._checks import wide_dtype
from ggn_jax._sharding import vary_like
from ggn_jax.kronecker.stacks import Stack, read_entries
from ggn_jax.layers import Trace, capture, join_traces, make_plan, trace_model
from ggn_jax.layers.uses import ParameterView
from ggn_jax.layerwise.found import LayerInfo, Layers
from ggn_jax.layerwise.io import LayerIO
from ggn_jax.layerwise.run import back_propagated
from ggn_jax.operators.base import structure_of
from ggn_jax.operators.outputs import map_over_chunks
from ggn_jax.operators.problem import Problem

DEFAULT_CHUNK_SIZE = 32  # examples whose rows are computed together, which bounds the memory


class _InputGradPairs(eqx.Module):
    """Inputs and output gradients of each example."""

    inputs: Float[Array, "... G S in"]
    grads: Float[Array, "... V G S out"]

    def inner_products(self, one: "_InputGradPairs") -> Float[Array, "V N V"]:
        """The inner products of the gradients of one example's outputs with those of all."""
        return _contract(jnp.einsum("gsi,ngti->ngst", one.inputs, self.inputs), one.grads, self.grads)

    def densified(self) -> "_DenseGradients":
        return _DenseGradients.of(jnp.einsum("...vgso,...gsi->...vgoi", self.grads, self.inputs))


class _RowGradPairs(eqx.Module):
    """An embedding's row numbers in place of inputs: two of them have the product 1 if they are equal, else 0."""

    rows: Int[Array, "... G S"]
    grads: Float[Array, "... V G S out"]
    count: int = eqx.field(static=True)

    def inner_products(self, one: "_RowGradPairs") -> Float[Array, "V N V"]:
        read = one.rows < self.count  # a row number past the last stands for no row
        same = (one.rows[None, :, :, None] == self.rows[:, :, None, :]) & read[None, :, :, None]
        return _contract(same.astype(self.grads.dtype), one.grads, self.grads)

    def densified(self) -> "_DenseGradients":
        return _InputGradPairs(jax.nn.one_hot(self.rows, self.count, dtype=self.grads.dtype), self.grads).densified()


class _DenseGradients(eqx.Module):
    """The gradients themselves."""

    grads: Float[Array, "... V P"]

    @classmethod
    def of(cls, matrices: Float[Array, "... V G out in"]) -> "_DenseGradients":
        return cls(matrices.reshape(*matrices.shape[:-3], -1))

    def inner_products(self, one: "_DenseGradients") -> Float[Array, "V N V"]:
        return jnp.einsum("vp,nwp->vnw", one.grads, self.grads)

    def densified(self) -> "_DenseGradients":
        return self


_Part = _InputGradPairs | _RowGradPairs | _DenseGradients


class OutputGradients(eqx.Module):
    """The gradients of each output of a function's examples, in parts whose inner products add up."""

    parts: list[_Part | None]
    """For each layer its weight and its bias, and each parameter without a layer; None for what is unused."""
    examples: int = eqx.field(static=True)
    outputs: int = eqx.field(static=True)
    """The number of outputs of an example."""
    dtype: Any = eqx.field(static=True)


def _contract(inner: Float[Array, "N G S T"], one: Float[Array, "V G S out"], grads: Array) -> Float[Array, "V N W"]:
    if len(one) == 1 or inner.shape[-2:] == (1, 1):
        outer = jnp.einsum("vgso,nwgto->vnwgst", one, grads)  # one matrix product for all rows
        return jnp.sum(outer * inner[None, :, None], axis=(-3, -2, -1))
    # Contract positions first: the product of matrices then has no axis of pairs of positions.
    mixed = jnp.einsum("ngst,nwgto->nwgso", inner, grads)
    return jnp.einsum("vgso,nwgso->vnw", one, mixed)


def gradients(problems: Sequence[Problem], scales: Sequence[Array] | None = None) -> list[OutputGradients]:
    """The gradients of some functions of the same parameters, in at least float32, in chunks of `chunk_size` examples.

    `scales` has a number for each parameter, which its gradients are multiplied by.
    """
    traces = [trace_model(problem.model_fn, problem.params, problem.inputs) for problem in problems]
    joined = join_traces(traces)
    plan = make_plan(joined)
    layers = Layers(problems[0].model_fn, joined, plan, "joint", structure_of(problems[0].inputs), True)
    found, start = [], 0
    for problem, trace in zip(problems, traces, strict=True):
        stop = start + len(trace.uses)
        own = plan.restricted(start, stop).layers
        infos = [
            replace(info, _plan=layer, positions=tuple(trace.uses[n].num_positions for n in layer.uses))
            for info, layer in zip(layers, own, strict=True)
        ]
        found.append(_output_gradients(problem, trace, layers, infos, scales))
        start = stop
    return found


def _output_gradients(
    problem: Problem, trace: Trace, layers: Layers, infos: Sequence[LayerInfo], scales: Sequence[Array] | None
) -> OutputGradients:
    wide = wide_dtype(layers._trace.outputs)
    count = math.prod(problem.outputs.shape[1:])
    seeds = jnp.eye(count, dtype=problem.outputs.dtype).reshape(count, 1, *problem.outputs.shape[1:])
    unused = {parameter.leaf for parameter in make_plan(trace).unassigned if parameter.kind == "unused"}
    rest = [parameter.leaf for parameter in layers._plan.unassigned]
    own = tuple(leaf for leaf in rest if leaf not in unused)

    def parts(inputs: PyTree[Array]) -> list[_Part | None]:
        captured = capture(trace, problem.params, inputs, own)
        vectors = vary_like(jnp.broadcast_to(seeds, (count, *captured.outputs.shape)), captured.outputs)
        found, grads = back_propagated(trace, infos, captured, vectors, None)
        result: list[_Part | None] = []
        for info, stack in zip(infos, layers._stacks, strict=True):
            scale = _Scale() if scales is None else _scale_of(layers, info, stack, scales)
            result += _gradient_parts(found[info.name], count, wide, scale)
        own_grads = dict(zip(own, grads, strict=True))
        for leaf in rest:
            g = own_grads.get(leaf)
            if g is not None:
                g = jnp.moveaxis(g, 0, 1).reshape(g.shape[1], count, -1).astype(wide)
                g = g if scales is None else g * scales[leaf].astype(wide)
            result.append(None if g is None else _DenseGradients(g))
        return result

    return OutputGradients(map_over_chunks(problem, parts), problem.outputs.shape[0], count, wide)


class _Scale(NamedTuple):
    """The scales of a layer's matrix `[G, out, in]` and of a separate bias; None is 1."""

    matrix: Float[Array, " in"] | Float[Array, "G out in"] | None = None
    """A number for each column, if that is enough."""
    bias: Float[Array, "G out 1"] | None = None


def _scale_of(layers: Layers, info: LayerInfo, stack: Stack, scales: Sequence[Array]) -> _Scale:
    wide, (spec,), bias = wide_dtype(layers._trace.outputs), stack.specs, info._plan.bias
    pairs = zip(scales, layers._trace.shapes, strict=True)
    entries = [jnp.broadcast_to(scale.astype(wide), shape) for scale, shape in pairs]

    def whole(views: tuple[ParameterView, ...]) -> Float[Array, "G out in"]:
        return read_entries([Stack((replace(spec, views=views),))], entries)[0]

    apart = None if bias is None or info.has_bias else whole((bias,))
    owned = [[scales[leaf] for leaf in view.entries.owning_leaves(layers._sizes)] for view in spec.views]
    if not all(number is numbers[0] for numbers in owned for number in numbers):
        return _Scale(whole(spec.views), apart)
    sizes = [view.shape[-1] for view in spec.views]
    columns = [jnp.broadcast_to(own[0].astype(wide), (size,)) for own, size in zip(owned, sizes, strict=True)]
    return _Scale(jnp.concatenate(columns), apart)


def _times(x: Array, factor: Array | None) -> Array:
    """`x` times a factor that is broadcast to its last axes."""
    return x if factor is None else x * jnp.expand_dims(factor, tuple(range(x.ndim - factor.ndim)))


def _gradient_parts(io: LayerIO, count: int, wide: Any, scale: _Scale) -> list[_Part | None]:
    """The parts of a layer's gradients: its matrix (with a joint bias), and a separate bias."""
    if not io.uses:
        return [None, None]
    bias: _Part | None = None
    if io.layer._plan.bias is not None and not io.layer.has_bias:
        sums = jnp.einsum("vgnso->nvgo", io.output_grads.astype(wide))
        bias = _DenseGradients.of(_times(sums[..., None], scale.bias))
    embeddings, by_entry = [use.is_embedding for use in io.uses], scale.matrix is not None and scale.matrix.ndim > 1
    if by_entry or any(use.swapped for use in io.uses) or _dense_is_cheaper(io.layer, count, all(embeddings)):
        each = jnp.swapaxes(io.per_example_grads().astype(wide), 0, 1)
        return [_DenseGradients.of(_times(each, scale.matrix)), bias]
    grads = jnp.moveaxis(io.output_grads.astype(wide), 2, 0)
    if all(embeddings):
        grads = grads if scale.matrix is None else grads * scale.matrix[0]  # one number for all of the table
        return [_RowGradPairs(jnp.swapaxes(io.rows, 0, 1), grads, io.layer.in_), bias]
    return [_InputGradPairs(_times(jnp.swapaxes(io.inputs.astype(wide), 0, 1), scale.matrix), grads), bias]


def _dense_is_cheaper(layer: LayerInfo, count: int, embedding: bool) -> bool:
    """Whether inner products of dense gradients need fewer multiplications than those of inputs and gradients."""
    positions, inputs = sum(layer.positions), 1 if embedding else layer.in_
    by_pairs = positions**2 * (inputs + count * layer.out) + count**2 * positions * layer.out
    return count**2 * layer.out * layer.in_ < by_pairs


def inner_products(one: OutputGradients, many: OutputGradients, chunk_size: int | None = None) -> Float[Array, "K L"]:
    """The inner products of all gradients of `one` with those of `many`, outputs in C order.

    Rows are computed for `chunk_size` examples at once.
    """
    mine: list[Any] = []
    others: list[Any] = []
    for x, y in zip(one.parts, many.parts, strict=True):
        if x is not None and y is not None:
            # Functions may use a layer differently (once, or tied); then dense gradients are the common form.
            alike = type(x) is type(y)
            mine.append(x if alike else x.densified())
            others.append(y if alike else y.densified())

    def rows(mine: list[Any]) -> Float[Array, "V N W"]:
        found = [part.inner_products(own) for part, own in zip(others, mine, strict=True)]
        return sum(found[1:], start=found[0])

    shape = one.examples * one.outputs, many.examples * many.outputs
    if not mine:
        return jnp.zeros(shape, many.dtype)
    size = min(chunk_size or DEFAULT_CHUNK_SIZE, one.examples)
    return jax.lax.map(rows, mine, batch_size=size).reshape(shape)
