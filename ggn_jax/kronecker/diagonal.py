"""The GGN's diagonal, layer by layer."""

from jaxtyping import Array, PyTree

from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block, Spectral
from ggn_jax.kronecker.factors import factor_sums, in_places
from ggn_jax.kronecker.layout import Layout
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.stacks import structure, write
from ggn_jax.operators.problem import Problem


def compute_diagonal(problem: Problem, keys: Array | None, mc_samples: int, vector_chunk_size: int) -> PyTree[Array]:
    """`sum_{v, n} (sum_s g a^T)^2` of each weight, and of everything else the squared gradients of each example.

    It is what EKFAC does in the basis of the parameters themselves. Where a weight is used at one position only, no
    example's gradient is formed: its square is `g^2 (a^2)^T`.
    """
    options = Options(
        FisherType.MC if mc_samples else FisherType.TYPE2,
        mc_samples or 1,
        bias="separate",
        positions="exact",
        on_uncovered="diagonal",
        small="diagonal",
        large="diagonal",
        vector_chunk_size=vector_chunk_size,
    )
    layout = Layout.of(problem, options)
    own = Spectral(None, None, None)  # type: ignore[arg-type]  # no rotation, and no eigenvalues needed
    bases = [[own] * len(members) for members in layout.by_layer(layout.members)]
    sums = factor_sums(problem, layout, keys, None, bases)
    layers: list[Block] = [Spectral(None, None, value) for group in sums["corrected"] for value in group]
    made = in_places(layout, layers, sums)
    return write(made.stacks, structure(problem.params), [block.diagonal() for block in made.blocks])
