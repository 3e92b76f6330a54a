"""A layer's inputs as rows, and their factor: with sharing, mask and bias applied."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax.kronecker.algebra import Factor
from ggn_jax.kronecker.convolution import input_factor
from ggn_jax.kronecker.layout import Partition, is_whole, split_parts
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.outer_products import sum_outer_products, sum_outer_products_with
from ggn_jax.layers import Use


class Inputs:
    """The inputs of one use, in matrix form, with sharing, mask and dtype applied."""

    def __init__(self, use: Use, captured: Array, mask: Array | None, options: Options, wide: Any):
        self.use, self.captured, self.options, self.wide = use, captured, options, wide
        self.mask = None if mask is None else mask.astype(wide)  # [N, S]
        self.embedding = use.kind == "embedding"
        if self.embedding:
            x = use.arrange_inputs(captured)  # row numbers [G, N, S]
            rows = use.weight.shape[2]
            index = jnp.clip(x, 0, rows - 1)
            weight = ((index == x) | (not use.fills)).astype(wide)
            self.index = index
            self.weight = weight if self.mask is None else weight * self.mask[None]

    @property
    def x(self) -> Float[Array, "G N S in"]:
        """The inputs in matrix form: for a convolution its patches, which are formed only where they are needed."""
        return self.use.arrange_inputs(self.captured).astype(self.wide)

    def rows(self, joint: bool) -> Float[Array, "G N S in"]:
        """The inputs, with the bias's constant where it is joint; averaged over positions for `reduce`."""
        return self._counted(_with_ones(self.x) if joint else self.x)

    def _counted(self, x: Float[Array, "G N S in"]) -> Float[Array, "G N S in"]:
        if self.mask is not None:
            x = x * self.mask[None, :, :, None]
        if self.options.sharing == "reduce":
            total = x.shape[2] if self.mask is None else jnp.maximum(jnp.sum(self.mask, 1), 1)[None, :, None, None]
            x = jnp.sum(x, axis=2, keepdims=True) / total
        return x

    def raw_rows(self, joint: bool) -> Array:
        """`[G, N, S, in]` of all positions, as in the weight's gradient (no mask, no sharing); one-hot for a table."""
        if self.embedding:
            return (
                jax.nn.one_hot(self.index, self.use.weight.shape[2], dtype=self.weight.dtype) * self.weight[..., None]
            )
        return _with_ones(self.x) if joint else self.x

    def width(self, joint: bool) -> int:
        """The length of these rows."""
        return self.use.weight.shape[2] + joint

    def factors(self, joint: bool, partitions: Partition) -> tuple[Factor, ...]:
        """The unnormalised `sum a a^T` of each part of the rows."""
        if is_whole(partitions):
            return (self._factor(joint),)
        if self.embedding:
            return tuple(split_parts(self._factor(joint), partitions, 0))
        return tuple(second_moment(part, self.options) for part in split_parts(self.rows(joint), partitions, 0))

    def _factor(self, joint: bool) -> Factor:
        if self.embedding:
            groups, rows = self.index.shape[0], self.use.weight.shape[2]
            weight = self.weight
            if self.options.sharing == "reduce":
                # The mean over positions of one-hot rows has count / S at a row, and the factor its square. Each of
                # the positions with that row adds count / S^2, which makes count^2 / S^2.
                same = jnp.where(self.index[..., :, None] == self.index[..., None, :], weight[..., None, :], 0)
                total = jnp.maximum(jnp.sum(weight, -1), 1) if self.mask is not None else weight.shape[-1]
                weight = weight * jnp.sum(same, axis=-1) / jnp.square(jnp.asarray(total, weight.dtype))[..., None]
            flat, values = self.index.reshape(groups, -1), weight.reshape(groups, -1)
            return jax.vmap(lambda i, v: jnp.zeros(rows, v.dtype).at[i].add(v))(flat, values)
        diagonal = self.width(joint) > self.options.max_dense_size
        patches = self.use.patches
        several = patches is not None and math.prod(patches.kernel) > 1
        # A convolution's factor needs patches along one axis less, but only as it is: not masked, averaged or diagonal.
        if several and self.mask is None and self.options.sharing == "expand" and not diagonal:
            return input_factor(self.use, self.captured, joint, self.wide)
        if not joint or diagonal:
            return second_moment(self.rows(joint), self.options)
        x, last = self.rows(False), self._counted(jnp.ones((1, *self.x.shape[1:3], 1), self.wide))
        return sum_outer_products_with(x.reshape(x.shape[0], -1, x.shape[-1]), last.reshape(1, -1))


def _with_ones(x: Float[Array, "G N S in"]) -> Float[Array, "G N S in+1"]:
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def second_moment(x: Float[Array, "G N S d"], options: Options) -> Factor:
    """`sum x x^T` over examples and positions; only its diagonal if it is larger than `max_dense_size`."""
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    return jnp.sum(x**2, axis=1) if x.shape[-1] > options.max_dense_size else sum_outer_products(x)
