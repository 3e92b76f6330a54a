"""Meshes: explicit axes, where each result's sharding must be derivable, and axes that `jax.shard_map` maps over."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, auto_axes
from jaxtyping import Array, PyTree


def run_auto(fn: Callable[..., Array], outputs: Array, *args: Any, keep: bool) -> Array:
    """`fn(outputs, *args)`, inside which the compiler shards, also on a mesh with explicit axes.

    The result is sharded like `outputs`, after one leading axis, or with `keep=False` not at all.
    """
    mesh, sharding = explicit_mesh((outputs, args)), _explicit(outputs)
    if mesh is None:
        return fn(outputs, *args)
    spec = PartitionSpec(None, *sharding.spec) if keep and sharding is not None else PartitionSpec()
    return auto_axes(fn, out_sharding=NamedSharding(mesh, spec))(outputs, *args)


NOT_SHARDED: Any = 0


def compiler_sharded(fn: Callable[..., Any], like: Callable[..., PyTree] | None = None) -> Callable[..., Any]:
    """`fn`, inside which the compiler shards, also if arguments are on a mesh with explicit axes.

    `like` returns, for the arguments, a pytree with the structure of the results: each is sharded like its array there,
    or not at all if that is `NOT_SHARDED`. Without `like`, no result is sharded.
    """

    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        mesh = explicit_mesh((args, kwargs))
        if mesh is None:
            return fn(*args, **kwargs)
        whole = NamedSharding(mesh, PartitionSpec())
        wanted = whole if like is None else jax.tree.map(lambda x: _explicit(x) or whole, like(*args, **kwargs))
        arrays, static = eqx.partition((args, kwargs), eqx.is_array)

        def inside(arrays: Any) -> Any:
            args, kwargs = eqx.combine(arrays, static)
            return fn(*args, **kwargs)

        return auto_axes(inside, out_sharding=wanted)(arrays)

    return run


def on_mesh(fn: Callable[..., Any], like: Callable[..., PyTree]) -> Callable[..., Any]:
    """`compiler_sharded` for functions that may also be called outside of `jit`: on a mesh, they are compiled then."""
    jitted = eqx.filter_jit(compiler_sharded(fn, like))

    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (fn if explicit_mesh((args, kwargs)) is None else jitted)(*args, **kwargs)

    return run


@contextmanager
def sharding_errors_explained() -> Iterator[None]:
    """Add a note to errors about shardings that says how models are run."""
    try:
        yield
    except Exception as error:
        if re.search("shard|PartitionSpec|mesh", str(error)):
            error.add_note(
                "ggn_jax runs model_fn on one example and on parts of a batch, and on a mesh with explicit axes inside"
                " of jax.sharding.auto_axes: model_fn must not name shardings of explicit axes (jax.sharding.reshard,"
                " out_sharding=). Pass a function that leaves them out, or use a mesh with axes of AxisType.Auto and"
                " jax.lax.with_sharding_constraint."
            )
        raise


def explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    """The mesh with explicit axes that arrays are on; None if there is none."""
    found = [_explicit(leaf) for leaf in jax.tree.leaves(tree)]
    return next((sharding.mesh.abstract_mesh for sharding in found if sharding is not None), None)


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh that arrays with values are on; None if there is none."""
    found = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((x.mesh for x in found if isinstance(x, NamedSharding) and isinstance(x.mesh, Mesh)), None)


def _explicit(leaf: Any) -> NamedSharding | None:
    """The sharding of an array, or of its `jax.ShapeDtypeStruct`, if it is a part of its type."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.Array) else getattr(leaf, "sharding", None)
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def vary_alike(*trees: PyTree) -> tuple[PyTree, ...]:
    """All arrays varying over every axis of `jax.shard_map` that one of them varies over.

    Inside it (with `check_vma=True`, the default), the derivative in what does *not* vary is summed over all devices,
    since all of them use one value. Here each device has its own problem, that of its shard of the batch, so what it
    differentiates in must be its own as well. Outside, nothing happens.
    """
    axes = varying_axes(trees)
    return tuple(jax.tree.map(lambda leaf: _vary(leaf, axes), tree) for tree in trees)


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` varying over the axes that `like` varies over: for zeros that a loop starts from, say."""
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
