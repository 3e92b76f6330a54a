"""Stacks of blocks shared out over the devices of a mesh: each holds, inverts and multiplies with its share.

The groups of a stack are cut over all devices; where their number is no multiple of the devices', blocks of zeros fill
the rest, so that a device has `ceil(G / devices)` of them, which is the least that whole blocks allow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from ggn_jax.kronecker.algebra import Block
from ggn_jax.kronecker.linalg import batched, map_sequentially

Groups = tuple[int, ...] | None
"""Which of a device's groups; None for all."""


@dataclass(frozen=True)
class Spread:
    """How stacks are shared out over a mesh; without one, all is on one device."""

    mesh: Mesh | None

    @property
    def spec(self) -> P:
        """How stacks are cut: along their groups, over all axes."""
        return P() if self.mesh is None else P(self.mesh.axis_names)

    @property
    def _auto(self) -> Mesh:
        """The mesh as it is inside of `compiler_sharded`."""
        assert self.mesh is not None
        names = self.mesh.axis_names
        return Mesh(self.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def share(self, block: Block) -> int:
        """How many groups of a padded block each device has."""
        groups: int = jax.tree.leaves(block)[0].shape[0]
        return groups // self.devices

    def pad(self, tree: PyTree[Float[Array, "G ..."]]) -> PyTree[Float[Array, "G ..."]]:
        """Zeros after the groups, up to a multiple of the devices."""

        def one(x: Array) -> Array:
            missing = -x.shape[0] % self.devices
            return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) if missing else x

        return jax.tree.map(one, tree)

    def place(self, tree: PyTree[Float[Array, "G ..."]]) -> PyTree[Float[Array, "G ..."]]:
        """The arrays cut over the devices along their groups."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self._auto, self.spec))

    def cut(self, tree: PyTree[Float[Array, "G ..."]]) -> PyTree[Float[Array, "G ..."]]:
        """`place` of what is on every device, of which each keeps its share: nothing is sent.

        XLA would put each array of a stack together from parts on all devices, and send those.
        """
        if self.mesh is None:
            return tree
        names = self.mesh.axis_names

        def mine(tree: PyTree[Array]) -> PyTree[Array]:
            return jax.tree.map(lambda x: self._cut(x)[jax.lax.axis_index(names)], tree)

        cut = jax.shard_map(mine, mesh=self._auto, in_specs=P(), out_specs=self.spec, check_vma=False)
        shared: PyTree[Array] = cut(tree)
        return shared

    def take(self, tree: PyTree[Array], groups: Groups) -> PyTree[Array]:
        """These of each device's groups."""
        if groups is None:
            return tree
        which = jnp.asarray(groups)
        return jax.tree.map(lambda x: self._cut(x)[:, which].reshape(-1, *x.shape[1:]), tree)

    def put(self, tree: PyTree[Array], groups: Groups, new: PyTree[Array]) -> PyTree[Array]:
        """The arrays with these of each device's groups replaced."""
        if groups is None:
            return new
        which = jnp.asarray(groups)

        def one(x: Array, y: Array) -> Array:
            cut = self._cut(x)
            return cut.at[:, which].set(y.reshape(cut.shape[0], -1, *cut.shape[2:])).reshape(x.shape)

        return jax.tree.map(one, tree, new)

    def _cut(self, x: Array) -> Array:
        return x.reshape(self.devices, -1, *x.shape[1:])

    def batch(self, fn: Callable[[Array], tuple[Array, ...]], matrices: Sequence[Float[Array, "G d d"]]) -> list[Any]:
        """`fn` of each matrix `[d, d]`; on a mesh, each device works on those that it has."""
        if self.mesh is None:
            return batched(fn, matrices)

        def mine(*matrices: Array) -> list[Any]:
            return [map_sequentially(fn, x) for x in matrices]

        shared = jax.shard_map(mine, mesh=self._auto, in_specs=self.spec, out_specs=self.spec, check_vma=False)
        return list(shared(*matrices)) if matrices else []
