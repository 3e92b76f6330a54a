"""Stacks of blocks sharded over the devices of a mesh: each holds, inverts and multiplies with its own groups.

If the number of groups is not a multiple of that of devices, they are padded with zeros, so that a device has
`ceil(G / devices)` of them: the least that is possible without cutting a group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from ggn_jax.kronecker.algebra import Block

Groups = tuple[int, ...] | None
"""Indices of a device's groups; None for all."""


@dataclass(frozen=True)
class Spread:
    """How stacks are sharded over a mesh; without one, all is on one device."""

    mesh: Mesh | None

    @property
    def spec(self) -> P:
        """The sharding of stacks: groups over all axes of the mesh."""
        return P() if self.mesh is None else P(self.mesh.axis_names)

    @property
    def _auto(self) -> Mesh:
        """The mesh as it is inside `compiler_sharded`."""
        assert self.mesh is not None
        names = self.mesh.axis_names
        return Mesh(self.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def groups_per_device(self, block: Block) -> int:
        """How many groups of a padded block each device has."""
        groups: int = jax.tree.leaves(block)[0].shape[0]
        return groups // self.devices

    def pad(self, tree: PyTree[Float[Array, "G ..."]]) -> PyTree[Float[Array, "G ..."]]:
        """Zeros after the groups, up to a multiple of the devices."""

        def one(x: Array) -> Array:
            missing = -x.shape[0] % self.devices
            return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) if missing else x

        return jax.tree.map(one, tree)

    def constrain(self, tree: PyTree[Float[Array, "G ..."]]) -> PyTree[Float[Array, "G ..."]]:
        """The arrays, constrained to be sharded along their groups."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self._auto, self.spec))

    def shard(self, tree: PyTree[Float[Array, "G ..."]]) -> PyTree[Float[Array, "G ..."]]:
        """`constrain` for what is replicated: each device keeps its part, and nothing is sent.

        Left to XLA, each array of a stack would be assembled from parts on all devices, which are sent.
        """
        if self.mesh is None:
            return tree
        names = self.mesh.axis_names

        def mine(tree: PyTree[Array]) -> PyTree[Array]:
            return jax.tree.map(lambda x: self._by_device(x)[jax.lax.axis_index(names)], tree)

        cut = jax.shard_map(mine, mesh=self._auto, in_specs=P(), out_specs=self.spec, check_vma=False)
        shared: PyTree[Array] = cut(tree)
        return shared

    def map_shards(self, fn: Callable[..., Any], sharded: PyTree[Array], *whole: PyTree[Array]) -> Any:
        """`fn(sharded, *whole)` on each device, with its groups and all of `whole`; the results are sharded as well."""
        if self.mesh is None:
            return fn(sharded, *whole)
        specs = self.spec, *[P()] * len(whole)
        return jax.shard_map(fn, mesh=self._auto, in_specs=specs, out_specs=self.spec, check_vma=False)(sharded, *whole)

    def _by_device(self, x: Array) -> Array:
        return x.reshape(self.devices, -1, *x.shape[1:])


def take_groups(tree: PyTree[Float[Array, "G ..."]], groups: Groups) -> PyTree[Array]:
    """The arrays of these groups."""
    return tree if groups is None else jax.tree.map(lambda x: x[jnp.asarray(groups)], tree)


def put_groups(tree: PyTree[Float[Array, "G ..."]], groups: Groups, new: PyTree[Array]) -> PyTree[Array]:
    """The arrays with these groups replaced."""
    return new if groups is None else jax.tree.map(lambda x, y: x.at[jnp.asarray(groups)].set(y), tree, new)
