"""Dampings of blocks: one number for all parameters of a block."""

import math
from typing import Any

import jax
from jaxtyping import Array, PyTree

from ggn_jax._checks import are_known, is_concrete
from ggn_jax.kronecker.algebra import Diagonal
from ggn_jax.kronecker.functions import MAX_DENSE_ROWS
from ggn_jax.kronecker.stacks import Blocks, ParamsStructure
from ggn_jax.kronecker.sums import is_representable, size_of
from ggn_jax.operators.block_functions import parameters_of
from ggn_jax.operators.damping import check_damping, leaf_dampings


def check_block_damping(blocks: Blocks, structure: ParamsStructure, damping: Any) -> PyTree[Array]:
    """The damping, which must be one number for all of a block."""
    parameters = parameters_of(structure)
    checked = check_damping(damping, parameters)
    if not isinstance(checked, jax.Array):
        numbers = leaf_dampings(checked, parameters)
        sizes = [math.prod(shape) for shape in structure[0]]
        for stack, block in zip(blocks.stacks, blocks.blocks, strict=True):
            for spec in () if isinstance(block, Diagonal) else stack.specs:
                own = [numbers[n] for view in spec.views for n in view.entries.owning_leaves(sizes)]
                if not _are_equal(own):
                    raise ValueError(
                        f"damping must be one number for all parameters of a block, but {', '.join(spec.names)} are"
                        f" one, with damping {', '.join(map(_format_number, own))}: give them the same number"
                        " (under jit, as one leaf of damping), or give the bias a block of its own with"
                        " bias='separate'."
                    )
    return checked


def check_functions(blocks: Blocks, structure: ParamsStructure, damping: Any) -> PyTree[Array]:
    """The damping, where functions of all blocks can be taken."""
    for stack, block in zip(blocks.stacks, blocks.blocks, strict=True):
        if not is_representable(block):
            raise NotImplementedError(
                f"the block of {', '.join(stack.specs[0].names)} is a sum of blocks with different eigenvectors"
                f" and has {size_of(block)} rows, more than {MAX_DENSE_ROWS}: it has no inverse, root or"
                " determinant here. Use lineax.linear_solve with lineax.CG, and the inverse of one of them as"
                " preconditioner."
            )
    return check_block_damping(blocks, structure, damping)


def _are_equal(numbers: list[Array]) -> bool:
    """Whether the numbers are known to be equal."""
    if all(number is numbers[0] for number in numbers):
        return True
    return are_known(numbers) and len({float(number) for number in numbers}) == 1


def _format_number(number: Array) -> str:
    return str(number) if is_concrete(number) else "(unknown under jit)"


def format_damping(damping: PyTree[Array]) -> str:
    return str(damping) if isinstance(damping, jax.Array) else str(jax.tree.map(_format_number, damping))
