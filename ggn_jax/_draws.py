"""Labels drawn by inverse CDF, one random word each, that keep small probabilities right.

A float32 uniform in [0, 1) has steps of 2^-23, and float32 cumulative sums round by as much: a search with them
distorts classes of probability 1e-6 and never draws some. Here probabilities are integers in units of 2^-31, whose sums
are exact, so that every class is drawn with its probability to within 2^-32, and a class of probability zero never. The
search descends a binary tree of partial sums: O(C) to build (cheaper than a cumulative sum) and O(log C) per label.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

UNIT = 2.0**31  # a sum of probabilities stays below 2^32 even if they add up to a little over 1
LARGE, FOLDS = 256, 4  # with more classes than LARGE, FOLDS levels are skipped


@partial(jax.jit, static_argnames="size")
def example_keys(key: Array, start: int | Array, size: int) -> Array:
    """A key for each example, which depends on its number (from `start` on) alone, and not on how batches are cut."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, start + jnp.arange(size, dtype=jnp.int32))


def to_fixed_point(p: Float[Array, "..."]) -> UInt32[Array, "..."]:
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
    return uniform_below(word, to_fixed_point(no) + to_fixed_point(yes)) >= to_fixed_point(no)


def draw_class(
    word: UInt32[Array, "*at"], p: Float[Array, "C *at"], scale: Float[Array, "1 *at"] | float = 1.0
) -> Int[Array, "*at"]:
    """A class drawn with probabilities `p scale`, at each position."""
    pieces = _fold(p.shape[0], FOLDS if p.shape[0] > LARGE else 0)
    # Level k + 1 holds the sums of entries i and i + half of level k: contiguous halves, which vectorise. The largest
    # levels are skipped, since each would take memory like `p`: the first is the sum of several pieces of `p` at once.
    levels = [_sum_pieces(p, scale, pieces)]
    while (size := levels[-1].shape[0]) > 1:
        half = (size + 1) // 2
        levels.append(levels[-1][:half] + _extend(levels[-1][half:], half))
    rest = uniform_below(word, levels[-1][0])
    index = jnp.zeros(word.shape, jnp.int32)
    for level in reversed(levels[:-1]):
        left = _look_up(level, index[None])[0]
        go_right = rest >= left
        rest = jnp.where(go_right, rest - left, rest)
        index = jnp.where(go_right, index + (level.shape[0] + 1) // 2, index)
    # The descent ends at an entry of the first level, which stands for one class of each piece.
    offsets, counts = (jnp.asarray(x, jnp.int32).reshape(-1, *(1,) * word.ndim) for x in zip(*pieces, strict=True))
    inside = index[None] < counts
    classes = jnp.where(inside, offsets + index[None], 0)
    ends = jnp.cumsum(jnp.where(inside, to_fixed_point(_look_up(p, classes) * scale), 0), axis=0, dtype=jnp.uint32)
    drawn = jnp.sum(rest[None] >= ends, axis=0, keepdims=True, dtype=jnp.int32)
    # XLA would recompute the whole descent for each entry of what uses the label; it never fuses a gather like that.
    return _look_up(classes, drawn)[0]


def _fold(size: int, times: int) -> list[tuple[int, int]]:
    """The pieces `[offset, offset + count)` of a level whose sum is the level `times` above.

    They are in the order in which a descent from that level meets their entries.
    """
    sizes = [size]
    for _ in range(times):
        sizes.append((sizes[-1] + 1) // 2)
    pieces = [(0, sizes[-1])]
    for larger, smaller in reversed(list(pairwise(sizes))):
        # An entry's right child is `smaller` further on, where the larger level has one.
        children = [
            ((offset, count), (offset + smaller, min(count, larger - smaller - offset))) for offset, count in pieces
        ]
        pieces = [child for pair in children for child in pair if child[1] > 0]
    return pieces


def _sum_pieces(
    p: Float[Array, "C *at"], scale: Float[Array, "1 *at"] | float, pieces: list[tuple[int, int]]
) -> UInt32[Array, "width *at"]:
    """The sum of all pieces in fixed point; those of one length are added first, which is one loop."""
    width, total = pieces[0][1], jnp.zeros((), jnp.uint32)
    for length in sorted({count for _, count in pieces}):
        parts = [to_fixed_point(p[offset : offset + count] * scale) for offset, count in pieces if count == length]
        total = total + _extend(sum(parts[1:], start=parts[0]), width)
    return total


def _extend(x: Shaped[Array, "size *at"], size: int) -> Shaped[Array, "longer *at"]:
    """`x` with zeros at the end."""
    return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _look_up(level: Shaped[Array, "size *at"], index: Int[Array, "some *at"]) -> Shaped[Array, "some *at"]:
    return jnp.take_along_axis(level, index, axis=0, mode="promise_in_bounds")
