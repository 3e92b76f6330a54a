"""Meshes: explicit axes, where each result's sharding must be derivable, and axes that `jax.shard_map` maps over."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from jaxtyping import Array, PyTree


def run_auto(fn: Callable[..., Array], outputs: Array, *args: Any, keep: bool) -> Array:
    """`fn(outputs, *args)`, inside of which the compiler shards, also where the mesh of `outputs` is explicit.

    The result is sharded like `outputs`, after one leading axis, or with `keep=False` not at all.
    """
    sharding = jax.typeof(outputs).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return fn(outputs, *args)
    spec = PartitionSpec(None, *sharding.spec) if keep else PartitionSpec()
    return auto_axes(fn, out_sharding=NamedSharding(sharding.mesh, spec))(outputs, *args)


def vary_alike(*trees: PyTree) -> tuple[PyTree, ...]:
    """All arrays varying over every axis of `jax.shard_map` that one of them varies over.

    Inside of it (with `check_vma=True`, the default), the derivative in what does *not* vary is summed over all
    devices, since one value is used by all. Here each device has a problem of its own, that of its shard of the batch,
    so what it differentiates in must be its own as well. Outside, nothing happens.
    """
    axes = varying_axes(trees)
    return tuple(jax.tree.map(lambda leaf: _vary(leaf, axes), tree) for tree in trees)


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` varying over the axes that `like` varies over as well: zeros that a loop starts from, say."""
    axes = varying_axes(like)
    return jax.tree.map(lambda leaf: _vary(leaf, axes), tree)


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes of `jax.shard_map` over which one of the arrays may vary."""
    return frozenset().union(*map(_axes, jax.tree.leaves(tree)))


def _axes(leaf: Any) -> frozenset[str]:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return frozenset()
    kind: Any = jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf
    if hasattr(kind, "vma"):  # until JAX 0.9
        return kind.vma or frozenset()
    return frozenset() if kind.manual_axis_type is None else kind.manual_axis_type.varying


def _vary(leaf: Any, axes: frozenset[str]) -> Any:
    more = tuple(sorted(axes - _axes(leaf)))
    if not more or not isinstance(leaf, jax.Array):
        return leaf
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(leaf, more, to="varying")
    return jax.lax.pvary(leaf, more)  # type: ignore[attr-defined]  # until JAX 0.8
