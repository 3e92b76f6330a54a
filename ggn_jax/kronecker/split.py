"""Inverses with the damping split between the factors: of one Kronecker product, or of a sum of two."""

from collections.abc import Sequence

from jaxtyping import Array, Float

from ggn_jax.kronecker.algebra import Block, Factor, Kronecker, decompose, is_diagonal
from ggn_jax.kronecker.linalg import inverses
from ggn_jax.kronecker.pairs import PairInverse, damp_factors, invert_pairs


def invert_heuristically(blocks: Sequence[Block], damping: Float[Array, ""]) -> list[Block]:
    """Inverses with the damping split between the factors; blocks without factors are inverted exactly."""
    rest = decompose([block for block in blocks if not isinstance(block, Kronecker)])
    products = [block for block in blocks if isinstance(block, Kronecker)]
    inverted = iter(split_inverses(products, [damping] * len(products)))
    others = iter([block.map(lambda values: 1 / (values + damping.astype(values.dtype))) for block in rest])

    def one(block: Block) -> Block:
        found = next(inverted) if isinstance(block, Kronecker) else next(others)
        return found.spectral() if isinstance(found, PairInverse) else found

    return [one(block) for block in blocks]


def split_inverses(
    blocks: Sequence[Kronecker], dampings: Sequence[Float[Array, "*#G"]]
) -> list[Kronecker | PairInverse]:
    """The inverses of blocks, damped by `damp_factors`; of sums of several terms, by `invert_pairs`."""
    several = [pair for pair in zip(blocks, dampings, strict=True) if len(pair[0].a) > 1]
    sums = iter(invert_pairs([block for block, _ in several], [damping for _, damping in several]))
    damped = [damp_factors(*pair) for pair in zip(blocks, dampings, strict=True) if len(pair[0].a) == 1]
    dense_ones = [factor for block in damped for factor in (*block.a, *block.b) if not is_diagonal(factor)]
    found = iter(inverses(dense_ones))

    def inverse(factor: Factor) -> Factor:
        return 1 / factor if is_diagonal(factor) else next(found)

    singles = iter([Kronecker((inverse(block.a[0]),), (inverse(block.b[0]),)) for block in damped])
    return [next(singles) if len(block.a) == 1 else next(sums) for block in blocks]
