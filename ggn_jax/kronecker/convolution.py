"""The input factor of a convolution, from patches along all but one axis of its kernel.

Along that axis, entry `(i, j)` of the factor sums products of the rows `d i + s p` and `d j + s p` of the padded input
over the output's positions `p` (stride `s`, dilation `d`). Entries with the same `j - i` (and the same `i` modulo the
stride) sum the same products, but for strips at the borders. So for a kernel of size `k` and stride 1, `k` products of
matrices are enough instead of `k^2`, and the matrices are `k` times smaller than those of patches.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ggn_jax.kronecker.chunked import sum_chunked
from ggn_jax.layers.uses import Patches, Use, all_indices

CHUNK_ENTRIES = {"cpu": 2**18, "default": 2**27}  # entries of rows; on a CPU they should stay in its cache


def input_factor(use: Use, x: Array, joint: bool, wide: Any) -> Float[Array, "G in in"]:
    """`sum_{n,s} a a^T` over patches `a`, with a joint bias's constant as last entry; `x` is `[N, *loops, *input]`."""
    patches = use.patches
    assert patches is not None
    loops = len(use.loops)
    own = tuple(axis + 1 for axis in use.input_axes.groups if axis < loops)  # loops with a weight for each step
    x = jnp.moveaxis(x.astype(wide), own, range(len(own)))
    steps = math.prod(x.shape[: len(own)])
    x = x.reshape(steps, -1, *x.shape[1 + loops :])
    factors = jax.vmap(lambda x: _platform_factor(patches, patches.pad_and_dilate(x), joint))(x)
    return factors.reshape(-1, *factors.shape[2:])


@partial(jax.jit, static_argnums=(0, 2))
def _platform_factor(patches: Patches, x: Array, joint: bool) -> Float[Array, "G in in"]:
    """The factor of a padded input `[B, *spatial, channels]`; under `jit`, so that equal layers are traced once."""

    def in_chunks(entries: int) -> Callable[[Array], Array]:
        return lambda x: _factor_in_chunks(patches, x, joint, entries)

    small, large = (in_chunks(CHUNK_ENTRIES[where]) for where in ("cpu", "default"))
    return jax.lax.platform_dependent(x, cpu=small, default=large)


def _factor_in_chunks(patches: Patches, x: Array, joint: bool, entries: int) -> Float[Array, "G in in"]:
    size = x.shape[0]
    one = jax.eval_shape(lambda x: _rows(patches, x, _main_axis(patches)), x[:1])
    # A sharded batch stays where it is: the first axis is that of devices (as many as can share the batch evenly), and
    # each works on a few of its own images at a time.
    devices = math.gcd(size, jax.device_count())
    images = x.reshape(devices, size // devices, *x.shape[1:])

    def part(indices: Array) -> tuple[Array, Array]:
        some = jax.lax.dynamic_slice_in_dim(images, indices[0], len(indices), axis=1)
        return _sums(patches, some.reshape(-1, *x.shape[1:]), joint)

    total, first = sum_chunked(part, size // devices, max(1, entries // (one.size * devices)))
    if not joint:
        return total
    count = size * math.prod(patches.count(x, axis) for axis in range(len(patches.kernel)))
    corner = jnp.full((*first.shape[:1], 1, 1), count, total.dtype)
    return jnp.block([[total, first[:, :, None]], [first[:, None, :], corner]])


def _main_axis(patches: Patches) -> int:
    """The axis along which no patches are formed: the kernel's longest."""
    return max(range(len(patches.kernel)), key=lambda axis: patches.kernel[axis])


def _rows(patches: Patches, x: Array, axis: int) -> Float[Array, "L M G D"]:
    """A padded input by its rows across `axis`; the entries of rows are patches along all other axes."""
    kernel = [None if a == axis else k for a, k in enumerate(patches.kernel)]
    offsets = all_indices(tuple(1 if k is None else k for k in kernel))
    windows = [
        patches.window_slice(x, tuple(None if a == axis else o for a, o in enumerate(offset))) for offset in offsets
    ]
    rows = jnp.stack(windows, axis=-2)  # [B, *positions and the axis, kernel, channels]
    rows = jnp.moveaxis(rows, axis + 1, 0)
    rows = rows.reshape(*rows.shape[:-1], patches.groups, -1)
    rows = jnp.moveaxis(rows, -2, -3)
    return rows.reshape(rows.shape[0], -1, patches.groups, math.prod(rows.shape[-2:]))


def _sums(patches: Patches, x: Array, joint: bool) -> tuple[Float[Array, "G in in"], Float[Array, "G in"]]:
    """`sum a a^T` and, for a joint bias, `sum a`."""
    axis = _main_axis(patches)
    size, stride, dilation = patches.kernel[axis], patches.strides[axis], patches.kernel_dilation[axis]
    rows, positions = _rows(patches, x, axis), patches.count(x, axis)
    step = math.gcd(stride, dilation)
    period, shift = stride // step, dilation // step  # `i` and `i + period` see the same rows, `shift` positions later

    def window(x: Float[Array, "L ..."], begin: int, start: int, stop: int) -> Float[Array, "l ..."]:
        """The rows from `begin` on, in strides: from number `start` to number `stop`."""
        return jax.lax.slice_in_dim(x, begin + stride * start, begin + stride * (stop - 1) + 1, stride)

    def gram(first: int, second: int, start: int, stop: int) -> Float[Array, "G D D"]:
        a, b = (window(rows, begin, start, stop) for begin in (first, second))
        return jnp.einsum("lmgi,lmgj->gij", a, b)

    blocks: dict[tuple[int, int], Array] = {}
    for difference in range(size):
        for i in range(min(period, size - difference)):
            members = range(i, size - difference, period)
            begin = dilation * i, dilation * (i + difference)
            last = shift * (len(members) - 1)  # windows are [shift * t, shift * t + positions)
            if positions <= last:
                sums = [gram(*begin, shift * t, shift * t + positions) for t in range(len(members))]
            else:
                # Windows overlap in a core, which is summed once. The next window drops a strip in front of the core,
                # and takes one in behind it.
                strips = [(shift * t, shift * (t + 1)) for t in range(len(members) - 1)]
                before = [gram(*begin, *strip) for strip in strips]
                after = [gram(*begin, positions + start, positions + stop) for start, stop in strips]
                core = gram(*begin, last, positions)
                sums = [sum([*before[t:], *after[:t]], start=core) for t in range(len(members))]
            for member, total in zip(members, sums, strict=True):
                blocks[member, member + difference] = total
                blocks[member + difference, member] = jnp.swapaxes(total, 1, 2)
    groups, width = rows.shape[2:]
    total = jnp.stack([jnp.stack([blocks[i, j] for j in range(size)], axis=2) for i in range(size)], axis=1)
    total = total.reshape(groups, size * width, size * width)  # [G, i, D, j, D] before
    first = jnp.zeros((groups, size * width), rows.dtype)
    if joint:
        by_row = jnp.sum(rows, axis=1)  # [L, G, D]: rows are read once, whatever the number of windows
        windows = [window(by_row, dilation * i, 0, positions) for i in range(size)]
        first = jnp.stack([jnp.sum(w, axis=0) for w in windows], axis=1).reshape(groups, -1)
    order = _order(patches, axis, width)
    return total[:, order][:, :, order], first[:, order]


def _order(patches: Patches, axis: int, width: int) -> Array:
    """For each of the weight's entries in order, its index among the entries that `_sums` has."""
    kernel = patches.kernel
    others = [a for a in range(len(kernel)) if a != axis]
    channels = width // math.prod(kernel[a] for a in others)
    numbers = jnp.arange(kernel[axis] * width).reshape(kernel[axis], *(kernel[a] for a in others), channels)
    numbers = jnp.moveaxis(numbers, 0, axis)
    return (jnp.moveaxis(numbers, -1, 0) if patches.channels_first else numbers).reshape(-1)
