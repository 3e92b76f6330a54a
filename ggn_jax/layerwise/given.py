"""Operators of factors that are known already, on the layers that a model has."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ggn_jax._checks import as_array, check_real, compute_dtype, is_concrete
from ggn_jax.kronecker.algebra import Block, Diagonal, Factor, Kronecker
from ggn_jax.kronecker.stacks import Blocks, BlockSpec, Stack, entry_layout
from ggn_jax.layers.index_map import IndexMap
from ggn_jax.layers.uses import ParameterView
from ggn_jax.layerwise.found import LayerInfo, Layers
from ggn_jax.layerwise.matrices import free_entries, rest_leaves
from ggn_jax.operators.blocks import BlockLinearOperator


def from_factors(layers: Layers, factors: Mapping[str, tuple[Any, Any]], rest: PyTree = None) -> BlockLinearOperator:
    """Make the operator with the block `B (x) A` for each layer, from factors that are known already.

    It needs no model and no batch: the factors may follow a rule of your own, come from a file, or be made of what
    `layer_io` captures.

    Args:
        layers: the model's layers, what `find_layers` returned.
        factors: a dict with `(A, B)` for each layer's name: symmetric positive semi-definite `[groups, in, in]` and
            `[groups, out, out]`, or diagonal ones, without the last axis. A joint bias is the last input.
        rest: the diagonal for what no layer owns, as `to_matrices(layers, tree)` has it: a pytree like the parameters,
            with anything in the layers' places. None (default) for 0, so that inverses need damping.

    Returns:
        A `BlockLinearOperator`, with its inverses, roots, determinants, `damped` and sums.

    Raises:
        TypeError, ValueError, KeyError: for factors that do not fit, naming the layer or the parameter. Where values
            are known, also for entries that are not finite, matrices that are not symmetric, and negative diagonals;
            other indefinite ones are not detected.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params = {"w": jnp.ones((3, 2)), "s": jnp.ones(2)}
        >>> layers = ggn_jax.find_layers(lambda p, x: (x @ p["w"]) * p["s"], params, jnp.ones((5, 3)))
        >>> factors = {"w": (jnp.eye(3)[None], 2 * jnp.eye(2)[None])}
        >>> operator = ggn_jax.from_factors(layers, factors, rest={"w": None, "s": jnp.ones(2)})
        >>> float(operator.trace()), operator.solve(params, damping=1.0)["s"]
        (14.0, Array([0.5, 0.5], dtype=float32))
    """
    if not isinstance(layers, Layers):
        raise TypeError(f"layers must be what ggn_jax.find_layers returned; got {type(layers).__name__}.")
    names = ", ".join(layers.names)
    if not isinstance(factors, Mapping):
        raise TypeError(f"factors must be a dict of (A, B) for the layers {names}; got {type(factors).__name__}.")
    if set(factors) != set(layers.names):
        raise KeyError(f"factors must be of the layers {names}; got {', '.join(map(str, factors)) or 'none'}.")
    pairs: list[tuple[BlockSpec, Block]] = [
        (stack.specs[0], _kronecker(layer, factors[layer.name]))
        for layer, stack in zip(layers, layers._stacks, strict=True)
    ]
    pairs += _of_the_rest(layers, rest)
    groups: dict[Any, list[tuple[BlockSpec, Block]]] = {}
    for spec, block in pairs:
        kinds = [(x.ndim, x.dtype) for x in jax.tree.leaves(block)]
        groups.setdefault((type(block), entry_layout(spec, layers._sizes), tuple(kinds), spec.kind), []).append(
            (spec, block)
        )
    stacks = tuple(Stack(tuple(spec for spec, _ in group)) for group in groups.values())
    blocks = [jax.tree.map(lambda *x: jnp.concatenate(x), *(block for _, block in group)) for group in groups.values()]
    trace = layers._trace
    return BlockLinearOperator._of(Blocks(tuple(blocks), stacks), (trace.shapes, trace.dtypes, trace.structure))


def _kronecker(layer: LayerInfo, pair: Any) -> Kronecker:
    """The block of one layer."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            f"factors[{layer.name!r}] must be a pair (A, B), of inputs and outputs; got {type(pair).__name__}."
        )
    a, b = (
        _factor(f"{side} of factors[{layer.name!r}]", x, (layer.groups, size))
        for side, x, size in zip("AB", pair, (layer.in_, layer.out), strict=True)
    )
    return Kronecker((a,), (b,))


def _factor(name: str, value: Any, diagonal: tuple[int, int]) -> Factor:
    factor = _wide(name, value)
    wanted = (*diagonal, diagonal[1])
    if factor.shape not in (wanted, diagonal):
        raise ValueError(
            f"{name} must have shape {wanted} (groups first), or {diagonal} for a diagonal one; got {factor.shape}."
        )
    if is_concrete(factor):
        _check_values(name, np.asarray(factor), factor.shape == wanted)
    return factor


def _wide(name: str, value: Any) -> Array:
    """A real array, in the dtype in which blocks are computed."""
    array = as_array(name, value)
    check_real(name, array)
    return array.astype(compute_dtype(array.dtype))


def _check_values(name: str, factor: np.ndarray, is_dense: bool) -> None:
    """Refuse entries that are not finite or not symmetric, and negative ones on the diagonal."""
    if not np.all(np.isfinite(factor)):
        raise ValueError(f"{name} must be finite; it holds NaN or infinities.")
    transposed = np.swapaxes(factor, 1, 2) if is_dense else factor
    size, gap = np.max(np.abs(factor), initial=0), np.max(np.abs(factor - transposed), initial=0)
    if gap > np.finfo(factor.dtype).eps ** 0.5 * size:
        raise ValueError(
            f"{name} must be symmetric; it differs from its transpose by {gap:.1e}: is (x + x^T) / 2 meant?"
        )
    diagonal = np.diagonal(factor, axis1=1, axis2=2) if is_dense else factor
    if np.min(diagonal, initial=0) < 0:
        raise ValueError(f"{name} must be positive semi-definite; its diagonal holds {np.min(diagonal):.3g}.")


def _diagonal(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    if isinstance(value, optax.MaskedNode) or value is None:
        raise ValueError(f"{name} must have the parameter's shape {shape}, since no layer owns it; got nothing.")
    values = _wide(name, value)
    if values.shape != shape:
        raise ValueError(f"{name} must have the parameter's shape {shape}; got {values.shape}.")
    if is_concrete(values):
        _check_values(name, np.asarray(values), is_dense=False)
    return values


def _of_the_rest(layers: Layers, rest: PyTree) -> list[tuple[BlockSpec, Block]]:
    """Diagonal blocks of the entries that no layer owns; zeros without `rest`."""
    trace, sizes = layers._trace, layers._sizes
    given = [optax.MaskedNode()] * len(sizes) if rest is None else rest_leaves(layers, rest)
    pairs: list[tuple[BlockSpec, Block]] = []
    for leaf, (free, value) in enumerate(zip(free_entries(layers), given, strict=True)):
        start, shape = sum(sizes[:leaf]), trace.shapes[leaf]
        if not sizes[leaf] or (free is not None and not free.any()):
            continue
        if rest is None:
            values = jnp.zeros(shape, compute_dtype(trace.dtypes[leaf]))
        else:
            values = _diagonal(f"rest{trace.names[leaf]}", value, shape)
        if free is None:
            entries = IndexMap.contiguous((1, 1, math.prod(shape)), start)
            flat: Array = values.reshape(1, -1)
        else:
            (numbers,) = np.nonzero(free.reshape(-1))
            entries = IndexMap.explicit((start + numbers).reshape(1, 1, -1))
            flat = values.reshape(-1)[numbers][None]
        view = ParameterView(entries, (1, 1, flat.shape[1]))
        pairs.append((BlockSpec((trace.names[leaf],), "rest", (view,)), Diagonal(flat)))
    return pairs
