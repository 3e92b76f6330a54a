"""A pytree like the parameters as one matrix for each layer, and back."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ggn_jax.kronecker.stacks import read_entries, write_entries
from ggn_jax.layerwise.found import Layers

Matrices = dict[str, Float[Array, "G out in"]]


def to_matrices(layers: Layers, tree: PyTree[Array]) -> tuple[Matrices, PyTree]:
    """Split a pytree like the parameters (a gradient, say) into a matrix `[G, out, in]` for each layer, and the rest.

    A joint bias is the last column (`find_layers`). Kernels of convolutions have `in` in the order of the kernel's own
    axes, channels first or last; the groups of a layer that is scanned over are its steps; rows of an embedding's table
    are columns, one for each input. A fused weight, as that of queries, keys and values, is one matrix where it is used
    once. `rest` is `tree` with `optax.MaskedNode()` in place of what layers own, as optax's transformations expect for
    a part of the parameters. Where layers own a part of an array, that part is 0 in it.

    `from_matrices(layers, *to_matrices(layers, tree))` is `tree`, exactly.

    Args:
        layers: the model's layers, what `find_layers` returned.
        tree: a pytree like the parameters, of any dtypes.

    Returns:
        A pair, of a dict of the matrices by the layers' names, and the rest.

    Raises:
        ValueError: for a pytree that is not like the parameters.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "s": jnp.ones(2)}
        >>> layers = ggn_jax.find_layers(lambda p, x: (x @ p["w"] + p["b"]) * p["s"], params, jnp.ones((5, 3)))
        >>> matrices, rest = ggn_jax.to_matrices(layers, params)
        >>> print(matrices["w"])
        [[[1. 1. 1. 0.]
          [1. 1. 1. 0.]]]
        >>> rest
        {'b': MaskedNode(), 's': Array([1., 1.], dtype=float32), 'w': MaskedNode()}
    """
    leaves = _leaves(layers, tree)
    matrices = dict(zip(layers.names, read_entries(layers._stacks, tree), strict=True))
    owned = free_entries(layers)
    rest: list[Any] = [
        leaf if free is None else optax.MaskedNode() if not free.any() else jnp.where(jnp.asarray(free), leaf, 0)
        for leaf, free in zip(leaves, owned, strict=True)
    ]
    return matrices, jax.tree.unflatten(layers._trace.structure, rest)


def from_matrices(layers: Layers, matrices: Mapping[str, Array], rest: PyTree) -> PyTree[Array]:
    """Make the pytree like the parameters from which `to_matrices` made these matrices: its inverse.

    A matrix in the dtype of the layer's parameters gives arrays of their dtypes, any other matrix arrays of its own:
    momentum in float32 of parameters in bfloat16 stays float32.

    Args:
        layers: the model's layers, what `find_layers` returned.
        matrices: a dict with a matrix `[G, out, in]` for each layer's name.
        rest: a pytree like the parameters, with anything in the place of what layers own.

    Returns:
        A pytree of arrays like the parameters.

    Raises:
        KeyError: for names that are not the layers'.
        ValueError: for matrices of other shapes, and a rest that is not like the parameters.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
        >>> layers = ggn_jax.find_layers(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((5, 3)))
        >>> matrices, rest = ggn_jax.to_matrices(layers, params)
        >>> doubled = ggn_jax.from_matrices(layers, {name: 2 * m for name, m in matrices.items()}, rest)
        >>> print(doubled["b"], doubled["w"][0])
        [0. 0.] [2. 2.]
    """
    if set(matrices) != set(layers.names):
        raise KeyError(f"matrices must be of the layers {', '.join(layers.names)}; got {', '.join(matrices)}.")
    for layer in layers:
        if jnp.shape(matrices[layer.name]) != layer.shape:
            raise ValueError(
                f"matrices[{layer.name!r}] must have shape {layer.shape} (groups, out, in); got"
                f" {jnp.shape(matrices[layer.name])}."
            )
    trace, owned = layers._trace, free_entries(layers)
    parts = [jnp.asarray(matrices[name]) for name in layers.names]
    dtypes: list[Any] = list(trace.dtypes)
    for stack, part in zip(layers._stacks, parts, strict=True):
        leaves = [leaf for view in stack.specs[0].views for leaf in view.entries.owning_leaves(layers._sizes)]
        with jax.numpy_dtype_promotion("standard"):
            usual = jnp.result_type(*(trace.dtypes[leaf] for leaf in leaves))
        # A matrix of the usual dtype goes back to each parameter's own; another one (momentum) keeps its dtype.
        if part.dtype != usual:
            for leaf in leaves:
                dtypes[leaf] = part.dtype
    given = rest_leaves(layers, rest)
    shapes = trace.shapes
    written = jax.tree.leaves(write_entries(layers._stacks, (shapes, tuple(dtypes), trace.structure), parts))
    result = []
    for leaf, free in enumerate(owned):
        if free is not None and not free.any():
            result.append(written[leaf])
            continue
        kept = given[leaf]
        if not hasattr(kept, "shape") or kept.shape != shapes[leaf]:
            got = getattr(kept, "shape", type(kept).__name__)
            raise ValueError(f"rest{trace.names[leaf]} must be an array of shape {shapes[leaf]}; got {got}.")
        kept = jnp.asarray(kept)
        result.append(kept if free is None else jnp.where(jnp.asarray(free), kept, written[leaf].astype(kept.dtype)))
    return jax.tree.unflatten(trace.structure, result)


def _leaves(layers: Layers, tree: PyTree[Array]) -> list[Array]:
    if jax.tree.structure(tree) != layers._trace.structure:
        raise ValueError(
            f"tree must be like the parameters: wanted {layers._trace.structure}, got {jax.tree.structure(tree)}."
        )
    leaves = jax.tree.leaves(tree)
    for leaf, shape, name in zip(leaves, layers._trace.shapes, layers._trace.names, strict=True):
        if jnp.shape(leaf) != shape:
            raise ValueError(f"tree{name} must have the parameter's shape {shape}; got {jnp.shape(leaf)}.")
    return leaves


def rest_leaves(layers: Layers, rest: PyTree) -> list[Any]:
    """What `rest` has in the place of each parameter."""
    try:
        return layers._trace.structure.flatten_up_to(rest)
    except ValueError as error:
        raise ValueError(f"rest must be a pytree like the parameters, {layers._trace.structure}: {error}") from error


def free_entries(layers: Layers) -> list[np.ndarray | None]:
    """For each parameter, a mask of the entries that no layer owns; None if no layer owns any."""
    sizes = layers._sizes
    views = [view for stack in layers._stacks for view in stack.specs[0].views]
    owners = {leaf for view in views for leaf in view.entries.owning_leaves(sizes)}
    counts = dict.fromkeys(owners, 0)
    whole = all(len(view.entries.owning_leaves(sizes)) == 1 for view in views)
    if whole:  # sizes are enough, without arrays of indices
        for view in views:
            counts[view.entries.owning_leaves(sizes)[0]] += view.entries.size
    free: list[np.ndarray | None] = [None] * len(sizes)
    for leaf in owners:
        if whole and counts[leaf] == sizes[leaf]:
            free[leaf] = np.zeros(layers._trace.shapes[leaf], bool)
            continue
        start = sum(sizes[:leaf])
        mine = np.ones(math.prod(layers._trace.shapes[leaf]), bool)
        for view in views:
            numbers = view.entries.indices().reshape(-1) - start
            mine[numbers[(numbers >= 0) & (numbers < sizes[leaf])]] = False
        free[leaf] = mine.reshape(layers._trace.shapes[leaf])
    return free
