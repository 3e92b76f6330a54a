"""Labels drawn by inverse CDF, one random word each, that keep small probabilities right.

A float32 uniform in [0, 1) has steps of 2^-23, and float32 cumulative sums round by as much: a search with them
distorts classes of probability 1e-6 and never draws some. Here probabilities are integers in units of 2^-31, whose sums
are exact, so that every class is drawn with its probability to within 2^-32, and a class of probability zero never. The
search descends a binary tree of partial sums: O(C) to build (cheaper than a cumulative sum) and O(log C) per label.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

UNIT = 2.0**31  # a sum of probabilities stays below 2^32 even if they add up to a little over 1


def masses(p: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Probabilities in units of `1 / UNIT`."""
    return jnp.round(p * UNIT).astype(jnp.uint32)


def uniform_below(word: UInt32[Array, "..."], total: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A random word scaled to the integers below `total`: the high half of their product, from 16-bit digits."""
    high, low = word >> 16, word & 0xFFFF
    total_high, total_low = total >> 16, total & 0xFFFF
    # The digits' carry is dropped: the sum is at most 2 short, never `total`.
    return high * total_high + ((high * total_low) >> 16) + ((low * total_high) >> 16)


def draw_bit(word: UInt32[Array, "..."], no: Float[Array, "..."], yes: Float[Array, "..."]) -> Bool[Array, "..."]:
    """True with probability `yes`, given both probabilities."""
    return uniform_below(word, masses(no) + masses(yes)) >= masses(no)


def draw_class(word: UInt32[Array, "*at"], p: Float[Array, "C *at"]) -> Int[Array, "*at"]:
    """A class drawn with probabilities `p`, at each position."""
    # Level k + 1 holds the sums of entries i and i + half of level k: contiguous halves, which vectorise.
    levels = [masses(p)]
    while (size := levels[-1].shape[0]) > 1:
        half = (size + 1) // 2
        pad = [(0, 2 * half - size)] + [(0, 0)] * (p.ndim - 1)
        levels.append(levels[-1][:half] + jnp.pad(levels[-1][half:], pad))
    rest = uniform_below(word, levels[-1][0])
    index = jnp.zeros(word.shape, jnp.int32)
    for level in reversed(levels[:-1]):
        left = jnp.take_along_axis(level, index[None], axis=0, mode="promise_in_bounds")[0]
        go_right = rest >= left
        rest = jnp.where(go_right, rest - left, rest)
        index = jnp.where(go_right, index + (level.shape[0] + 1) // 2, index)
    # XLA would fuse the whole descent into each entry of what is computed from the label; it never fuses a look-up so.
    return jnp.arange(p.shape[0], dtype=jnp.int32).at[index].get(mode="promise_in_bounds")
