"""Random choices that keep small probabilities exact.

A float32 uniform in [0, 1) has steps of 2^-23, so searching a cumulative sum with it distorts, or never draws, classes of
probability below about 1e-6. Here a class is found by walking down a binary tree of partial sums, one random word
per level. Every step draws the *smaller* side with a uniform that is finest near zero and compares unsummed masses, so
each class keeps its probability to a few units of rounding (down to 2^-33), in O(log C) random words per label.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt


def words(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> UInt[Array, "..."]:
    """Random words as wide as `dtype`."""
    return jax.random.bits(key, shape, jnp.uint64 if dtype == jnp.float64 else jnp.uint32)


def choose_right(word: UInt[Array, "..."], left: Float[Array, "..."], right: Float[Array, "..."]) -> Bool[Array, "..."]:
    """True with probability `right / (left + right)`; a side of mass zero is never chosen."""
    scale = 2.0 ** -(8 * word.dtype.itemsize)
    # The half keeps the uniform off zero: a mass of zero, or below half a step, must not be drawn.
    uniform = (word.astype(left.dtype) + 0.5) * scale
    small_side = uniform * (left + right) < jnp.minimum(left, right)
    return small_side == (right <= left)


def tree_depth(num_classes: int) -> int:
    """Random words per label."""
    return (num_classes - 1).bit_length()


def choose_class(words: UInt[Array, " depth"], mass: Float[Array, " C"]) -> Int[Array, ""]:
    """A class drawn with probability proportional to `mass`."""
    # Level k + 1 holds the sums of elements i and i + half of level k: contiguous halves, which vectorise.
    levels = [mass]
    while (size := levels[-1].shape[0]) > 1:
        half = (size + 1) // 2
        right = levels[-1][half:]
        levels.append(levels[-1][:half] + jnp.pad(right, (0, 2 * half - size)))
    index = jnp.zeros((), jnp.int32)
    for word, level in zip(words, reversed(levels[:-1]), strict=True):
        size = level.shape[0]
        half = (size + 1) // 2
        other = jnp.minimum(index + half, size - 1)
        right = jnp.where(index + half < size, level[other], 0)
        index = jnp.where(choose_right(word, level[index], right), other, index)
    return index
