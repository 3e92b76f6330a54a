"""What Kronecker-factored operators are made of, each as one compiled function."""

from typing import Any

import equinox as eqx
from jaxtyping import Array

from ggn_jax._frozen import Frozen
from ggn_jax._sharding import compiler_sharded
from ggn_jax.kronecker.factors import assemble_blocks, batch_sums, compute_blocks, eigenbases, reduce_sums
from ggn_jax.kronecker.joined import JoinedLayout, joined_sums
from ggn_jax.kronecker.layout import Layout
from ggn_jax.kronecker.optimal import compute_optimal_blocks, joined_optimal_blocks
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.stacks import Blocks
from ggn_jax.operators.batches import fingerprint
from ggn_jax.operators.partial import PartialSums
from ggn_jax.operators.problem import Problem


@eqx.filter_jit
@compiler_sharded
def compute(problem: Problem, keys: Any, mask: Any, options: Options, method: str) -> Blocks:
    if method == "kfoc":
        return compute_optimal_blocks(problem, keys, mask, options)
    return compute_blocks(problem, Layout.of(problem, options), keys, mask, method == "ekfac")


@eqx.filter_jit
@compiler_sharded
def compute_joined(problems: Any, weights: Any, keys: Any, masks: Any, options: Options, method: str) -> Blocks:
    layout = JoinedLayout.of_all(problems, options)
    if method == "kfoc":
        return joined_optimal_blocks(layout, problems, weights, keys)
    given = layout, problems, weights, keys, masks
    sums = joined_sums(*given)
    if method == "kfac":
        return assemble_blocks(layout, sums)
    bases = eigenbases(layout, sums)
    return assemble_blocks(layout, sums, bases, joined_sums(*given, bases, unassigned=False))


@eqx.filter_jit
@compiler_sharded
def sums_of_batch(
    problem: Problem, keys: Array | None, mask: Array | None, options: Options, bases: Any, marked: bool
) -> tuple[tuple[dict[str, Any], Array | None], Frozen]:
    """A batch's summands, and their layout: the parameters' entries in each block, in the order of the sums.

    Where they are marked, with sums that tell data apart.
    """
    layout = Layout.of(problem, options)
    data = fingerprint(problem.inputs, (problem.targets, mask)) if marked else None
    return (batch_sums(problem, layout, keys, mask, bases), data), layout.signature()


@eqx.filter_jit
@compiler_sharded
def bases_of(sums: PartialSums) -> Any:
    layout, _ = sums.recipe.made_of
    return eigenbases(layout, reduce_sums(layout, sums.totals))


@eqx.filter_jit
@compiler_sharded
def finish_blocks(sums: PartialSums) -> Blocks:
    layout, _ = sums.recipe.made_of
    totals = reduce_sums(layout, sums.totals)
    if sums.factors is None:
        return assemble_blocks(layout, totals)
    # The bases again would be others where eigenvalues are equal.
    return assemble_blocks(layout, reduce_sums(layout, sums.factors.totals), sums.bases, totals)
