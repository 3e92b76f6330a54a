"""Block-diagonal operators: products, inverses, roots, determinants and dense blocks."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import is_concrete
from ggn_jax._fusion import stack_scalars
from ggn_jax._sharding import compiler_sharded
from ggn_jax.kronecker.algebra import Block, decompose, finite_groups, invert_heuristically
from ggn_jax.kronecker.stacks import Blocks, BlockSpec, Structure, multiply, write
from ggn_jax.operators.base import COLUMNS_AT_ONCE, SymmetricLinearOperator, check_number, check_vector, register

HEURISTIC = "heuristic inverse"


class BlockLinearOperator(SymmetricLinearOperator):
    """A block-diagonal positive semi-definite operator: a block per layer, and one per parameter that has no layer.

    What `KFACLinearOperator` and its like are, and their inverses and roots.

    >>> import jax.numpy as jnp, ggn_jax
    >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
    >>> args = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), params, batch
    >>> ggn_jax.KFACLinearOperator(*args, fisher_type="type-2").inverse(damping=0.1)
    BlockLinearOperator(params=float32[2, 3], blocks=1)
    """

    blocks: Blocks
    structure: Structure = eqx.field(static=True)

    @classmethod
    def _of(cls, blocks: Blocks, structure: Structure) -> Self:
        """An operator with these blocks, which constructors of subclasses compute from data."""
        operator = object.__new__(cls)
        object.__setattr__(operator, "blocks", blocks)
        object.__setattr__(operator, "structure", structure)
        return operator

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        shapes, dtypes, tree = self.structure
        return jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in zip(shapes, dtypes, strict=True)])

    def _details(self) -> dict[str, Any]:
        return {"blocks": len(self.blocks.each())}

    def mv(self, vector: PyTree[Any]) -> PyTree[Array]:
        """The product with `vector`, a pytree like the parameters."""
        check_vector(self, vector)
        return _mv(self, vector)

    def trace(self) -> Float[Array, ""]:
        """The trace."""
        return _sum([block.trace() for block in self.blocks.blocks])

    def frobenius_norm(self) -> Float[Array, ""]:
        """The Frobenius norm."""
        return jnp.sqrt(_sum([block.squared_norm() for block in self.blocks.blocks]))

    def diagonal(self) -> PyTree[Array]:
        """The diagonal, as a pytree like the parameters."""
        return _diagonal(self)

    def logdet(self, damping: Any = 0.0) -> Float[Array, ""]:
        """The logarithm of the determinant of `self + damping * I`; minus infinity where it is singular.

        Blocks that are a sum of Kronecker terms (tied weights) count as the nearest single one.
        """
        damping = check_number("damping", damping)
        blocks = decompose(self.blocks.blocks)
        logs = [jnp.sum(jnp.log(block.map(lambda x: x + damping.astype(x.dtype)).values)) for block in blocks]
        return _sum(logs)

    def det(self, damping: Any = 0.0) -> Float[Array, ""]:
        """The determinant of `self + damping * I`; `logdet` does not overflow."""
        return jnp.exp(self.logdet(damping))

    def inverse(self, damping: Any = 0.0, method: Literal["exact", "heuristic"] = "exact") -> "BlockLinearOperator":
        r"""The inverse of `self + damping * I`, an operator of the same kind and tagged positive semi-definite.

        `"exact"`: from the eigendecompositions of both factors, eigenvalues `1 / (l_A l_B + damping)`. `"heuristic"`:
        `(A + pi sqrt(damping) I)^-1` and `(B + sqrt(damping) / pi I)^-1` with `pi = sqrt((tr A / d_A) / (tr B / d_B))`
        (Martens & Grosse 2015, section 6.3), by Cholesky factorisations: cheaper, and not the inverse of the damped
        operator. Factors of one size are factorised in one call, in at least float32. A sum of Kronecker terms (tied
        weights) is inverted as the nearest single one. Blocks without factors to damp, such as EKFAC's, small ones and
        those of another inverse or root, are inverted exactly by either. A block that is singular but for rounding
        counts as invertible: its inverse is large, and of no use.

        **Raises:** ValueError for a damping that is not a number of at least 0, or an unknown method;
        FloatingPointError, naming the parameters, where a block is singular or not finite (outside of `jit`; inside,
        its entries are NaN or infinite).
        """
        if method not in ("exact", "heuristic"):
            raise ValueError(f"method must be 'exact' or 'heuristic'; got {method!r}.")
        return _mapped(self, damping, "inverse" if method == "exact" else HEURISTIC)

    def solve(
        self, vector: PyTree[Any], damping: Any = 0.0, method: Literal["exact", "heuristic"] = "exact"
    ) -> PyTree[Array]:
        """`inverse(damping, method).mv(vector)`."""
        return self.inverse(damping, method).mv(vector)

    def sqrt(self, damping: Any = 0.0) -> "BlockLinearOperator":
        """The symmetric square root `R` of `self + damping * I`: `R R = self + damping * I`."""
        return _mapped(self, damping, "square root")

    def inverse_sqrt(self, damping: Any = 0.0) -> "BlockLinearOperator":
        """The inverse of `sqrt(damping)`: times white noise, it is a sample of the Laplace approximation."""
        return _mapped(self, damping, "inverse square root")

    def block(self, path: str) -> Float[Array, "d d"]:
        """The dense block of the layer that owns a parameter, as `B (x) A` on row-major `[out, in]`.

        A joint bias is one more input, the last column; groups follow each other on the diagonal. `path` is written as
        `jax.tree_util.keystr` does: `"['dense']['kernel']"`, or with `/`: `"dense/kernel"`.
        """
        found = {
            name: (block, spec.shape)
            for name, (spec, block) in self._named()
            if path in (name, *spec.names, *map(_simple, spec.names))
        }
        if len(found) == 1:
            return _dense(*next(iter(found.values())))
        if found:
            names = ", ".join(map(repr, found))
            raise KeyError(f"{path!r} has entries in several blocks: pass one of {names}.")
        known = ", ".join(dict.fromkeys(name for spec, _ in self.blocks.each() for name in spec.names))
        raise KeyError(f"no parameter {path!r}; there are {known or 'none with entries'}.")

    def factors(self) -> dict[str, Block]:
        """The blocks by the path of their first parameter, numbered where it has several: a pytree of arrays."""
        return {name: block for name, (_, block) in self._named()}

    def _named(self) -> list[tuple[str, tuple[BlockSpec, Block]]]:
        """The blocks, each with the path of its first parameter, and `#1`, `#2`, ... where that has several."""
        pairs = self.blocks.each()
        firsts = [spec.names[0] for spec, _ in pairs]
        names = [
            f"{name}#{firsts[: i + 1].count(name)}" if firsts.count(name) > 1 else name for i, name in enumerate(firsts)
        ]
        return list(zip(names, pairs, strict=True))


register(BlockLinearOperator, positive_semidefinite=True)


@jax.jit
@partial(compiler_sharded, like=lambda operator, vector: vector)
def _mv(operator: BlockLinearOperator, vector: PyTree[Array]) -> PyTree[Array]:
    return multiply(operator.blocks, operator.structure, vector)


@jax.jit
@compiler_sharded
def _diagonal(operator: BlockLinearOperator) -> PyTree[Array]:
    parts = [block.diagonal() for block in operator.blocks.blocks]
    return write(operator.blocks.stacks, operator.structure, parts)


def _sum(parts: list[Array]) -> Array:
    return jnp.sum(stack_scalars(parts)) if parts else jnp.zeros(())


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "inverse": lambda x: 1 / x,
    "square root": jnp.sqrt,
    "inverse square root": jax.lax.rsqrt,
}


def _mapped(operator: BlockLinearOperator, damping: Any, what: str) -> BlockLinearOperator:
    """A function of `operator + damping * I`; refused where it is not finite and that can be looked at."""
    damping = check_number("damping", damping)
    result = _map_blocks(operator, damping, what)
    if not all(map(is_concrete, jax.tree.leaves(result.blocks))):
        return result
    for stack, block in zip(result.blocks.stacks, result.blocks.blocks, strict=True):
        finite = np.asarray(finite_groups(block))
        if not finite.all():
            bad = int(np.searchsorted(stack.starts, np.argmin(finite), side="right")) - 1
            raise FloatingPointError(
                f"the {what} with damping {damping} of the block of {', '.join(stack.specs[bad].names)} is not finite:"
                " it is singular, or holds NaN. Use a larger damping, or look at the model's outputs, and at a loss of"
                " your own with ggn_jax.check_loss."
            )
    return result


@partial(jax.jit, static_argnames="what")
def _map_blocks(operator: BlockLinearOperator, damping: Array, what: str) -> BlockLinearOperator:
    blocks: Sequence[Block]
    if what == HEURISTIC:
        blocks = invert_heuristically(operator.blocks.blocks, damping)
    else:
        fn = FUNCTIONS[what]
        blocks = [b.map(lambda x: fn(x + damping.astype(x.dtype))) for b in decompose(operator.blocks.blocks)]
    return BlockLinearOperator._of(Blocks(tuple(blocks), operator.blocks.stacks), operator.structure)


def _dense(block: Block, shape: tuple[int, int, int]) -> Float[Array, "d d"]:
    eye = jnp.eye(math.prod(shape), dtype=jax.tree.leaves(block)[0].dtype)
    return jax.lax.map(lambda e: block.mv(e.reshape(shape)).reshape(-1), eye, batch_size=COLUMNS_AT_ONCE)


def _simple(name: str) -> str:
    """`a/0/b` for `['a'][0].b`."""
    parts = re.findall(r"""\[(['"])(.*?)\1\]|\[(.*?)\]|\.(\w+)""", name)
    return "/".join(next(filter(None, part[1:]), "") for part in parts)
