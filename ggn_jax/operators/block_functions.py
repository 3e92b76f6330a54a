"""Functions of all blocks at once, each with the damping of its parameters: inverses, roots, determinants, solves."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ggn_jax._fusion import stack_scalars
from ggn_jax._sharding import compiler_sharded
from ggn_jax.kronecker.algebra import Diagonal, Kronecker, finite_groups
from ggn_jax.kronecker.functions import MatrixFunction, apply_function
from ggn_jax.kronecker.linalg import norm
from ggn_jax.kronecker.refine import refined
from ggn_jax.kronecker.split import split_inverses
from ggn_jax.kronecker.stacks import Blocks, ParamsStructure, read_entries, write_entries
from ggn_jax.kronecker.sums import AnyBlock, damp, is_exact, kronecker_terms, pair_inverses, spectra_of
from ggn_jax.operators.damping import leaf_dampings

HEURISTIC = "heuristic inverse"


def parameters_of(structure: ParamsStructure) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of the parameters."""
    shapes, dtypes, tree = structure
    return jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in zip(shapes, dtypes, strict=True)])


def sum_scalars(parts: list[Array]) -> Array:
    """The sum of numbers, perhaps of none."""
    return jnp.sum(stack_scalars(parts)) if parts else jnp.zeros(())


def _group_dampings(blocks: Blocks, structure: ParamsStructure, damping: PyTree[Array]) -> list[Float[Array, "G *d"]]:
    """The damping of each group of each stack, and of each entry where the block is diagonal."""
    if isinstance(damping, jax.Array):
        return [jnp.broadcast_to(damping, stack.shape[:1]) for stack in blocks.stacks]
    shapes, _, tree = structure
    numbers = leaf_dampings(damping, parameters_of(structure))
    entries = jax.tree.unflatten(tree, [jnp.broadcast_to(d, s) for d, s in zip(numbers, shapes, strict=True)])
    parts = [part.reshape(len(part), -1) for part in read_entries(blocks.stacks, entries)]
    return [
        part if isinstance(block, Diagonal) else part[:, 0] for part, block in zip(parts, blocks.blocks, strict=True)
    ]


def _damped_pairs(blocks: Blocks, structure: ParamsStructure, damping: PyTree[Array]) -> list[tuple[Any, Array]]:
    return list(zip(blocks.blocks, _group_dampings(blocks, structure, damping), strict=True))


def _unzip(pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


@partial(jax.jit, static_argnames="structure")
def damped(blocks: Blocks, structure: ParamsStructure, damping: PyTree[Array]) -> Blocks:
    """`blocks + damping * I`."""
    result: list[Any] = [damp(*pair) for pair in _damped_pairs(blocks, structure, damping)]
    return Blocks(tuple(result), blocks.stacks)


@partial(jax.jit, static_argnames="structure")
@compiler_sharded
def logdet(blocks: Blocks, structure: ParamsStructure, damping: PyTree[Array]) -> Float[Array, ""]:
    """The logarithm of the determinant of `blocks + damping * I`."""
    pairs = _damped_pairs(blocks, structure, damping)
    large = [pair for pair in pairs if kronecker_terms(pair[0]) is not None]
    rest = [pair for pair in pairs if kronecker_terms(pair[0]) is None]
    spectra = spectra_of([block for block, _ in rest])
    shifted = [apply_function(spectrum, damping, "shift") for spectrum, (_, damping) in zip(spectra, rest, strict=True)]
    inverted = pair_inverses(*_unzip(large))
    return sum_scalars([jnp.sum(jnp.log(x.values)) for x in shifted] + [jnp.sum(x.logdets()) for x in inverted])


@partial(jax.jit, static_argnames="structure")
@partial(compiler_sharded, like=lambda blocks, inverse, structure, vector: vector)
def solve(blocks: Blocks, inverse: Blocks, structure: ParamsStructure, vector: PyTree[Array]) -> PyTree[Array]:
    """`blocks^-1 vector`: the product with `inverse`, and conjugate gradients from there where that is not exact."""
    triples = zip(blocks.blocks, inverse.blocks, read_entries(blocks.stacks, vector), strict=True)

    def one(block: Any, inverse: Any, m: Array) -> Array:
        m = m.astype(jax.tree.leaves(block)[0].dtype)
        return inverse.mv(m) if is_exact(block, "inverse", True) else refined(block.mv, inverse, m)

    return write_entries(blocks.stacks, structure, [one(*triple) for triple in triples])


@partial(jax.jit, static_argnames=("structure", "what"))
def map_blocks(
    blocks: Blocks, structure: ParamsStructure, damping: PyTree[Array], what: str
) -> tuple[Blocks, list[Bool[Array, " G"]]]:
    """A function of each block of `blocks + damping * I`, and for each group whether it is finite."""
    pairs = _damped_pairs(blocks, structure, damping)

    # All blocks of one method are computed together, so that factorisations of one size are one operation.
    def method_for(block: AnyBlock) -> str:
        if what == HEURISTIC and isinstance(block, Kronecker):
            return "split"
        return "pair" if what in ("inverse", HEURISTIC) and kronecker_terms(block) is not None else "spectrum"

    def pairs_by_method(name: str) -> tuple[list[Any], list[Any]]:
        return _unzip([pair for pair in pairs if method_for(pair[0]) == name])

    found, dampings = pairs_by_method("spectrum")
    name: Any = "inverse" if what == HEURISTIC else what
    by_spectrum = [apply_function(spectrum, d, name) for spectrum, d in zip(spectra_of(found), dampings, strict=True)]
    made = {
        "split": iter(split_inverses(*pairs_by_method("split"))),
        "pair": iter(pair_inverses(*pairs_by_method("pair"))),
        "spectrum": iter(by_spectrum),
    }
    result: list[Any] = [next(made[method_for(block)]) for block, _ in pairs]
    finite = [finite_groups(block.values if isinstance(block, MatrixFunction) else block) for block in result]
    return Blocks(tuple(result), blocks.stacks), finite


@partial(jax.jit, static_argnames=("shape", "batch_size"))
def dense_block(block: AnyBlock, shape: tuple[int, int, int], batch_size: int) -> Float[Array, "d d"]:
    """The block `[d, d]`, so many columns at a time."""
    eye = jnp.eye(math.prod(shape), dtype=jax.tree.leaves(block)[0].dtype)
    return jax.lax.map(lambda e: block.mv(e.reshape(shape)).reshape(-1), eye, batch_size=batch_size)


@partial(jax.jit, static_argnames="structure")
@compiler_sharded
def diagonal_of(blocks: Blocks, structure: ParamsStructure) -> PyTree[Array]:
    """The diagonal, like the parameters."""
    return write_entries(blocks.stacks, structure, [block.diagonal() for block in blocks.blocks])


@jax.jit
@compiler_sharded
def trace_of(blocks: Blocks) -> Float[Array, ""]:
    """The sum of the diagonal."""
    return sum_scalars([jnp.sum(block.traces()) for block in blocks.blocks])


@jax.jit
@compiler_sharded
def norm_of(blocks: Blocks) -> Float[Array, ""]:
    """The root of the sum of all squared entries."""
    norms = [norm(block.norms()) for block in blocks.blocks]
    return norm(stack_scalars(norms)) if norms else jnp.zeros(())
