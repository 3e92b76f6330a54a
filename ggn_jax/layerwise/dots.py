"""Inner products of the gradients of single outputs, layer by layer: `J J^T` without `J` where that takes less.

For outputs `c` of example `n` and `d` of example `m`, a layer of which `a` are the inputs and `g` the output gradients
adds `<G_nc, G_md> = sum_{s, t} (a_ns . a_mt) (g_ncs . g_mdt)`, since its gradient is `G_nc = sum_s g_ncs a_ns^T`.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax._sharding import vary_like
from ggn_jax.layers import capture, make_plan, trace_model
from ggn_jax.layerwise.found import LayerInfo, Layers
from ggn_jax.layerwise.io import LayerIO
from ggn_jax.layerwise.run import pulled_back
from ggn_jax.operators.base import structure_of
from ggn_jax.operators.outputs import map_over_chunks
from ggn_jax.operators.problem import Problem

EXAMPLES_AT_ONCE = 32  # of which rows are made together; bounds the memory


class _Pairs(eqx.Module):
    """Inputs and output gradients of each example."""

    inputs: Float[Array, "N G S in"]
    grads: Float[Array, "N V G S out"]

    def products(self, one: "_Pairs") -> Float[Array, "V N V"]:
        """Of the gradients of one example's outputs with those of all."""
        return _contract(jnp.einsum("gsi,ngti->ngst", one.inputs, self.inputs), one.grads, self.grads)


class _Rows(eqx.Module):
    """An embedding's row numbers in place of inputs: two of them have the product 1 if they are equal, else 0."""

    rows: Int[Array, "N G S"]
    grads: Float[Array, "N V G S out"]
    count: int = eqx.field(static=True)

    def products(self, one: "_Rows") -> Float[Array, "V N V"]:
        read = one.rows < self.count  # else none is read
        same = (one.rows[None, :, :, None] == self.rows[:, :, None, :]) & read[None, :, :, None]
        return _contract(same.astype(self.grads.dtype), one.grads, self.grads)


class _Whole(eqx.Module):
    """The gradients themselves."""

    grads: Float[Array, "N V P"]

    def products(self, one: "_Whole") -> Float[Array, "V N V"]:
        return jnp.einsum("vp,nwp->vnw", one.grads, self.grads)


def _contract(inner: Float[Array, "N G S S"], one: Float[Array, "V G S out"], grads: Array) -> Float[Array, "V N V"]:
    if len(one) == 1 or inner.shape[-1] == 1:
        outer = jnp.einsum("vgso,nwgto->vnwgst", one, grads)  # one product of matrices for all rows
        return jnp.sum(outer * inner[None, :, None], axis=(-3, -2, -1))
    mixed = jnp.einsum("ngst,nwgto->nwgso", inner, grads)
    return jnp.einsum("vgso,nwgso->vnw", one, mixed)


def dense_gram(problem: Problem) -> Float[Array, "K K"]:
    """`J J^T` of a problem's model, in at least float32: rows and columns are the outputs' entries in C order.

    The model runs on `chunk_size` examples at once, and rows are made for so many, or for `EXAMPLES_AT_ONCE`.
    """
    trace = trace_model(problem.model_fn, problem.params, problem.inputs)
    layers = Layers(problem.model_fn, trace, make_plan(trace), "joint", structure_of(problem.inputs), True)
    own = tuple(left.leaf for left in layers.plan.leftovers if left.kind != "unused")
    wide = compute_dtype(problem.outputs.dtype)
    count = math.prod(problem.outputs.shape[1:])
    seeds = jnp.eye(count, dtype=problem.outputs.dtype).reshape(count, 1, *problem.outputs.shape[1:])

    def parts(inputs: PyTree[Array]) -> Sequence[_Pairs | _Rows | _Whole]:
        captured = capture(trace, problem.params, inputs, own)
        vectors = vary_like(jnp.broadcast_to(seeds, (count, *captured.outputs.shape)), captured.outputs)
        found, grads = pulled_back(layers, captured, vectors, None)
        result = [part for io in found.values() for part in _parts_of(io, count)]
        rest = [jnp.moveaxis(g, 0, 1).reshape(g.shape[1], count, -1).astype(wide) for g in grads]
        return [*result, *map(_Whole, rest)]

    everything = map_over_chunks(problem, parts)

    def rows(one: Sequence[_Pairs | _Rows | _Whole]) -> Float[Array, "V N V"]:
        products = [part.products(mine) for part, mine in zip(everything, one, strict=True)]
        zero = jnp.zeros((count, problem.outputs.shape[0], count), wide)
        return sum(products, start=zero)

    size = problem.outputs.shape[0]
    at_once = min(problem.chunk_size or EXAMPLES_AT_ONCE, size)
    gram = jax.lax.map(rows, everything, batch_size=at_once)
    return gram.reshape(size * count, size * count)


def _parts_of(io: LayerIO, count: int) -> list[_Pairs | _Rows | _Whole]:
    """What a layer's inner products are made of; of a bias that is no column of its matrix apart."""
    bias = io.layer._plan.bias
    result: list[_Pairs | _Rows | _Whole] = []
    if bias is not None and not io.layer.has_bias:
        sums = jnp.einsum("vgnso->nvgo", io.output_grads)
        result.append(_Whole(sums.reshape(*sums.shape[:2], -1)))
    embeddings = [use.is_embedding for use in io.uses]
    if any(use.swapped for use in io.uses) or _rows_are_less(io.layer, count, all(embeddings)):
        each = jnp.swapaxes(io.per_example_grads(), 0, 1)
        return [*result, _Whole(each.reshape(*each.shape[:2], -1))]
    grads = jnp.moveaxis(io.output_grads, 2, 0)
    if all(embeddings):
        return [*result, _Rows(jnp.swapaxes(io.rows, 0, 1), grads, io.layer.in_)]
    return [*result, _Pairs(jnp.swapaxes(io.inputs, 0, 1), grads)]


def _rows_are_less(layer: LayerInfo, count: int, embedding: bool) -> bool:
    """Whether the gradients' products take fewer multiplications than those of inputs and of output gradients."""
    positions, inputs = sum(layer.positions), 1 if embedding else layer.in_
    by_pairs = positions**2 * (inputs + count * layer.out) + count**2 * positions * layer.out
    return count**2 * layer.out * layer.in_ < by_pairs
