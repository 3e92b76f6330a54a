"""What a batch holds: inputs, targets, and how many examples."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import as_array
from ggn_jax._hints import batch_hint, describe_value
from ggn_jax._unbatched import batched_leaves, is_unbatched


def as_batch(batch: Any) -> tuple[PyTree[Array], Any, int]:
    """Inputs, and targets where there are any, as arrays with one common leading axis, and its length."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"batch must be a pair (inputs, targets); got {describe_value(batch)}.{batch_hint(batch)}")
    if isinstance(batch[1], tuple | list) and batch_hint(batch):
        raise TypeError(
            f"batch must be a pair (inputs, targets); got {describe_value(batch)} of others.{batch_hint(batch)}"
        )
    inputs = jax.tree_util.tree_map_with_path(_as_input, batch[0])
    if any(map(is_unbatched, jax.tree.leaves(batch[1], is_leaf=is_unbatched))):
        raise TypeError("targets must have an entry for each example; got Unbatched, which is for inputs alone.")
    targets = batch[1]
    if isinstance(targets, Mapping):
        targets = {name: as_array(f"targets[{name!r}]", leaf) for name, leaf in targets.items()}
    elif targets is not None:
        targets = as_array("targets", targets)
    leaves = jax.tree_util.tree_leaves_with_path(inputs, is_leaf=is_unbatched)
    shapes = {f"inputs{jax.tree_util.keystr(path)}": x.shape for path, x in leaves if not is_unbatched(x)}
    if leaves and not shapes:
        raise ValueError("all inputs are Unbatched: one must have an entry for each example.")
    named_targets = jax.tree_util.tree_leaves_with_path(targets)
    shapes |= {f"targets{jax.tree_util.keystr(path)}": x.shape for path, x in named_targets}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or () in sizes:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        keys = any(is_key(x) and not x.ndim for x in batched_leaves(inputs))
        way_out = " Wrap inputs without batch axis: ggn_jax.Unbatched(x)." if len(leaves) > 1 else ""
        if keys:
            way_out = " A key for each example is jax.random.split(key, N); one for all, ggn_jax.Unbatched(key)."
        elif len(leaves) == 1 and () in sizes:
            way_out = " One example is a batch of one: x[None]."
        raise ValueError(f"inputs and targets must have one common leading batch axis; got {given}.{way_out}")
    ((size,),) = sizes
    if size == 0:
        raise ValueError("batch must hold at least one example; got a batch axis of length 0.")
    return inputs, targets, size


def unpack_batch(name: str, batch: Any, way_out: str = "") -> tuple[Any, Any]:
    """The pair of inputs and targets, and the mask or None."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        wanted = "(inputs, targets) or (inputs, targets, mask)"
        none = "" if isinstance(batch, tuple | list) else " Targets may be None if none are needed."
        raise TypeError(f"{name} must be {wanted}; got {describe_value(batch)}.{none}{batch_hint(batch)}{way_out}")
    return tuple(batch[:2]), batch[2] if len(batch) == 3 else None


def _as_input(path: Any, leaf: Any) -> Array:
    """A leaf of the inputs: numbers, or keys, one for each example that a model draws for."""
    return leaf if is_key(leaf) else as_array(f"inputs{jax.tree_util.keystr(path)}", leaf)


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
