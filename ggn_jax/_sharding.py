"""Meshes with explicit axes, the default of `jax.make_mesh`, where each result's sharding must be derivable."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from jaxtyping import Array


def run_auto(fn: Callable[..., Array], outputs: Array, *args: Any, keep: bool) -> Array:
    """`fn(outputs, *args)`, inside of which the compiler shards, also where the mesh of `outputs` is explicit.

    The result is sharded like `outputs`, after one leading axis, or with `keep=False` not at all.
    """
    sharding = jax.typeof(outputs).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return fn(outputs, *args)
    spec = PartitionSpec(None, *sharding.spec) if keep else PartitionSpec()
    return auto_axes(fn, out_sharding=NamedSharding(sharding.mesh, spec))(outputs, *args)
