"""Factorisations shared out over the devices of a mesh."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ggn_jax.kronecker.algebra import Batch, one_by_one


def share_out(sizes: Sequence[int], devices: int) -> list[list[int]]:
    """For each device, which matrices `[d, d]` of these sizes it factorises: the costs `d^3` about even.

    The costliest first, each to the device with the least to do so far (Graham 1969): at most 4/3 of the best there is.
    """
    loads = [0] * devices
    shares: list[list[int]] = [[] for _ in range(devices)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i] ** 3
    return [sorted(share) for share in shares]


def shared_over(mesh: Mesh) -> Batch:
    """`kronecker.algebra.batched` in which each device of the mesh factorises its share, and all gather the results."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return partial(_shared, Mesh(mesh.devices, mesh.axis_names, axis_types=types))


def _shared(mesh: Mesh, fn: Callable[[Array], tuple[Array, ...]], matrices: Sequence[Array]) -> list[Any]:
    if not matrices:
        return []
    where = [(i, g) for i, matrix in enumerate(matrices) for g in range(matrix.shape[0])]
    sizes = [matrices[i].shape[1] for i, _ in where]
    shares = share_out(sizes, mesh.size)
    shapes = {size: jax.eval_shape(fn, jax.ShapeDtypeStruct((size, size), matrices[0].dtype)) for size in set(sizes)}
    entries = {size: sum(part.size for part in parts) for size, parts in shapes.items()}
    longest = max(sum(entries[sizes[i]] for i in share) for share in shares)
    axes = tuple(mesh.axis_names)

    def mine(share: list[int]) -> Callable[..., Array]:
        def run(*matrices: Array) -> Array:
            flat = []
            for size in sorted({sizes[i] for i in share}):
                stack = jnp.stack([matrices[where[i][0]][where[i][1]] for i in share if sizes[i] == size])
                parts = one_by_one(fn, stack)
                flat.append(jnp.concatenate([part.reshape(stack.shape[0], -1) for part in parts], axis=1).reshape(-1))
            joined = jnp.concatenate([*flat, jnp.zeros(0, matrices[0].dtype)])
            return jnp.pad(joined, (0, longest - joined.size))

        return run

    def body(*matrices: Array) -> Array:
        return jax.lax.switch(jax.lax.axis_index(axes), [mine(share) for share in shares], *matrices)

    shared = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(axes), check_vma=False)
    everything = shared(*matrices).reshape(mesh.size, longest)

    results: dict[tuple[int, int], tuple[Array, ...]] = {}
    for device, share in enumerate(shares):
        start = 0
        for size in sorted({sizes[i] for i in share}):
            for i in (i for i in share if sizes[i] == size):
                parts = []
                for part in shapes[size]:
                    parts.append(everything[device, start : start + part.size].reshape(part.shape))
                    start += part.size
                results[where[i]] = tuple(parts)
    return [
        tuple(jnp.stack(parts) for parts in zip(*(results[i, g] for g in range(matrix.shape[0])), strict=True))
        for i, matrix in enumerate(matrices)
    ]
