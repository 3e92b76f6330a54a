"""The GGN's diagonal, layer by layer."""

from jaxtyping import Array, PyTree

from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block, Spectral
from ggn_jax.kronecker.factors import factor_sums, with_other_blocks
from ggn_jax.kronecker.layout import Layout
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.stacks import params_structure, write_entries
from ggn_jax.operators.problem import Problem


def compute_diagonal(problem: Problem, keys: Array | None, mc_samples: int, vector_chunk_size: int) -> PyTree[Array]:
    """`sum_{v, n} (sum_s g a^T)^2` of each weight, and the summed squares of each example's gradients for the rest.

    This is EKFAC in the basis of the parameters themselves. For a weight that is used at one position only, no
    example's gradient is formed, since its square is `g^2 (a^2)^T`.
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
    layers: list[Block] = [Spectral(None, None, value) for group in sums["corrections"] for value in group]
    made = with_other_blocks(layout, layers, sums)
    return write_entries(made.stacks, params_structure(problem.params), [block.diagonal() for block in made.blocks])
