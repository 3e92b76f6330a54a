"""Block-diagonal operators: products, inverses, roots, determinants and dense blocks."""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, Literal, Self, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import check_choice, is_concrete
from ggn_jax._sharding import compiler_sharded
from ggn_jax.kronecker.algebra import Block
from ggn_jax.kronecker.stacks import Blocks, BlockSpec, ParamsStructure, blocks_mv
from ggn_jax.kronecker.sums import (
    AnyBlock,
    Function,
    add,
    is_exact,
    scale,
)
from ggn_jax.operators.base import COLUMN_BATCH_SIZE, SymmetricLinearOperator, check_vector, matching_names, register
from ggn_jax.operators.block_damping import check_block_damping, check_functions, format_damping
from ggn_jax.operators.block_functions import (
    HEURISTIC,
    damped,
    dense_block,
    diagonal_of,
    logdet,
    map_blocks,
    norm_of,
    parameters_of,
    solve,
    trace_of,
)


class BlockLinearOperator(SymmetricLinearOperator):
    """A block-diagonal positive semi-definite operator: a block per layer, and one per parameter that has no layer.

    `KFACLinearOperator` and its like are such operators, and so are their inverses and roots; `ggn_jax.from_factors`
    makes one from known factors.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> args = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), params, batch
        >>> ggn_jax.KFACLinearOperator(*args, fisher_type="type-2").inverse(damping=0.1)
        BlockLinearOperator(params=float32[2, 3], blocks=1)
    """

    blocks: Blocks
    structure: ParamsStructure = eqx.field(static=True)

    @classmethod
    def _of(cls, blocks: Blocks, structure: ParamsStructure) -> Self:
        """An operator with these blocks, which constructors of subclasses compute from data."""
        operator = object.__new__(cls)
        object.__setattr__(operator, "blocks", blocks)
        object.__setattr__(operator, "structure", structure)
        return operator

    def _replace(self, blocks: Blocks) -> "BlockLinearOperator":
        """An operator on the same parameters."""
        return BlockLinearOperator._of(blocks, self.structure)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return parameters_of(self.structure)

    def _details(self) -> dict[str, Any]:
        return {"blocks": len(self.blocks.unstacked())}

    def mv(self, vector: PyTree[Any]) -> PyTree[Array]:
        """Compute the product with a vector.

        Args:
            vector: a pytree of arrays like the parameters.

        Returns:
            A pytree of arrays like the parameters.
        """
        check_vector(self, vector)
        return _mv(self, vector)

    def damped(self, damping: Any) -> "BlockLinearOperator":
        """Add damping: `self + damping * I`, again an operator with blocks and all methods of this one.

        Solve with `damped.solve(vector)`, or `lineax.linear_solve(damped, vector, ggn_jax.BlockSolver())`; lineax's
        default solver makes the dense matrix.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. All parameters of a block, such as a weight and a bias in one, need the
                same.

        Returns:
            The damped operator.

        Raises:
            ValueError, TypeError: for a damping that is not a number of at least 0, is not a prefix of the parameters,
                or differs within a block.
        """
        return self._replace(
            damped(self.blocks, self.structure, check_block_damping(self.blocks, self.structure, damping))
        )

    def trace(self) -> Float[Array, ""]:
        """Return the trace, a scalar."""
        return trace_of(self.blocks)

    def frobenius_norm(self) -> Float[Array, ""]:
        """Return the Frobenius norm, a scalar."""
        return norm_of(self.blocks)

    def diagonal(self) -> PyTree[Array]:
        """Return the diagonal, as a pytree like the parameters."""
        return diagonal_of(self.blocks, self.structure)

    def logdet(self, damping: Any = 0.0) -> Float[Array, ""]:
        """Compute the logarithm of the determinant of `self + damping * I`.

        See `inverse` for the blocks' eigenvalues. Its derivative is `tr((self + damping I)^-1 d(self + damping I))`.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default. All parameters of a block need the same.

        Returns:
            A scalar; minus infinity where the matrix is singular.

        Raises:
            ValueError, TypeError: for a damping that does not fit, as in `damped`.
            NotImplementedError: for a sum of blocks with different eigenvectors (EKFAC's) and more than 1,024 rows.
        """
        return logdet(self.blocks, self.structure, check_functions(self.blocks, self.structure, damping))

    def det(self, damping: Any = 0.0) -> Float[Array, ""]:
        """Compute the determinant of `self + damping * I`; `logdet` does not overflow.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default. All parameters of a block need the same.

        Returns:
            A scalar.

        Raises:
            ValueError, TypeError: for a damping that does not fit, as in `damped`.
            NotImplementedError: for a sum of blocks with different eigenvectors (EKFAC's) and more than 1,024 rows.
        """
        return jnp.exp(self.logdet(damping))

    def inverse(self, damping: Any = 0.0, method: Literal["exact", "heuristic"] = "exact") -> "BlockLinearOperator":
        """Compute the inverse of `self + damping * I`, again an operator with blocks.

        `"exact"`: from the eigendecompositions of both factors, with eigenvalues `1 / (l_A l_B + damping)`.
        `"heuristic"`: `(A + pi sqrt(damping) I)^-1` and `(B + sqrt(damping) / pi I)^-1` with
        `pi = sqrt((tr A / d_A) / (tr B / d_B))` (Martens & Grosse 2015, section 6.3), by Cholesky factorisations:
        cheaper, but not the inverse of the damped operator. Factors of one size are factorised in one call, in at least
        float32. Blocks without factors to damp, such as EKFAC's, small ones and those of another inverse or root, are
        inverted exactly by either. First derivatives are right for equal eigenvalues, too.

        **Resolution.** A factor's eigenvalues are known to about `eps` times its largest one, so those below four times
        that count as 0 in everything computed from eigenvalues (`logdet`, roots, `solve`): a singular block has the
        determinant 0, and a damped one that of its null space. EKFAC's eigenvalues are sums of squares, so their
        resolution is the square of that.

        **Sums of Kronecker terms** (tied weights, several objectives, sums of operators). Blocks with at most 1,024
        rows are decomposed as dense matrices. Larger ones, of two terms, are diagonalised by diagonalising both `A` and
        both `B` simultaneously, and the damping goes into the factors: with their mean eigenvalues `a_t = tr A_t / d_A`
        and `b_t`, the result is the inverse of

        ```
        sum_t (B_t + rho b_t I) (x) (A_t + rho a_t I)        rho = sqrt(damping / sum_t a_t b_t)
        ```

        which adds `damping * I` and mixed terms: exact without damping, and the definition of `"heuristic"`, for sums
        of any size. For more than two terms, similar ones are joined first, each group into its nearest single product.
        `solve` starts from there and is exact. Symmetric roots have no such form: they are those of the nearest single
        product (in Frobenius norm), with the damping added. `is_exact` tells.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default. All parameters of a block need the same.
            method: `"exact"` (default) or `"heuristic"`.

        Returns:
            The inverse.

        Raises:
            ValueError, TypeError: for a damping that does not fit, as in `damped`, or an unknown method.
            NotImplementedError: for a sum of blocks with different eigenvectors (EKFAC's) and more than 1,024 rows.
            FloatingPointError: naming the parameters, where a block is singular or not finite (outside of `jit`;
                inside, its entries are NaN or infinite).

        References:
            - Martens and Grosse (2015), *Optimizing neural networks with Kronecker-factored approximate curvature*:
              https://arxiv.org/abs/1503.05671
        """
        check_choice("method", method, ("exact", "heuristic"))
        return _map_blocks(self, damping, "inverse" if method == "exact" else HEURISTIC)

    def solve(
        self, vector: PyTree[Any], damping: Any = 0.0, method: Literal["exact", "heuristic"] = "exact"
    ) -> PyTree[Array]:
        """Compute `(self + damping * I)^-1 vector`, which is `inverse(damping, method).mv(vector)` where that is exact.

        Where it is not, for sums of Kronecker terms with more than 1,024 rows, `"exact"` takes at most 100 steps of
        conjugate gradients in matrix form, with that inverse as preconditioner, until the residual is below `100 eps`
        times the vector, block by block; each step takes two products with blocks. `"heuristic"` takes none.

        Args:
            vector: a pytree of arrays like the parameters.
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default. All parameters of a block need the same.
            method: `"exact"` (default) or `"heuristic"`, see `inverse`.

        Returns:
            A pytree of arrays like the parameters.

        Raises:
            ValueError, TypeError: for a damping that does not fit, as in `damped`, or an unknown method.
            NotImplementedError: for a sum of blocks with different eigenvectors (EKFAC's) and more than 1,024 rows.
            FloatingPointError: naming the parameters, where a block is singular or not finite (outside of `jit`).
        """
        check_vector(self, vector)
        inverse = self.inverse(damping, method)
        if method == "heuristic" or all(is_exact(block, "inverse", True) for block in self.blocks.blocks):
            return inverse.mv(vector)
        return self.damped(damping)._refined(inverse, vector)

    def _refined(self, inverse: "BlockLinearOperator", vector: PyTree[Any]) -> PyTree[Array]:
        """`self^-1 vector`, by conjugate gradients where `inverse` is not exact."""
        check_vector(self, vector)
        return solve(self.blocks, inverse.blocks, self.structure, vector)

    def sqrt(self, damping: Any = 0.0) -> "BlockLinearOperator":
        """Compute the symmetric square root `R`, with `R R = self + damping * I`; see `inverse`.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default. All parameters of a block need the same.

        Returns:
            The root, again an operator with blocks.

        Raises:
            ValueError, TypeError: for a damping that does not fit, as in `damped`.
            NotImplementedError: for a sum of blocks with different eigenvectors (EKFAC's) and more than 1,024 rows.
        """
        return _map_blocks(self, damping, "square root")

    def inverse_sqrt(self, damping: Any = 0.0) -> "BlockLinearOperator":
        """Compute the inverse of `sqrt(damping)`: applied to white noise, it samples the Laplace approximation.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default. All parameters of a block need the same.

        Returns:
            The inverse root, again an operator with blocks.

        Raises:
            ValueError, TypeError: for a damping that does not fit, as in `damped`.
            NotImplementedError: for a sum of blocks with different eigenvectors (EKFAC's) and more than 1,024 rows.
            FloatingPointError: naming the parameters, where a block is singular or not finite (outside of `jit`).
        """
        return _map_blocks(self, damping, "inverse square root")

    def is_exact(self, function: Function | None = None, *, damped: bool = True) -> bool:
        """Tell whether functions of the operator are exact, and not those of a nearby operator.

        They are not for some sums of Kronecker terms with more than 1,024 rows, see `inverse`.

        Args:
            function: `"inverse"` (and determinants), `"solve"`, `"root"` (square roots and their inverses), or None
                (default) for all of them.
            damped: whether there is damping besides that of the operator itself; True by default.

        Returns:
            A bool.

        Raises:
            ValueError: for another function.
        """
        check_choice("function", function, (*get_args(Function), None))
        asked = get_args(Function) if function is None else (function,)
        return all(is_exact(block, name, damped) for block in self.blocks.blocks for name in asked)

    def __add__(self, other: Any) -> lx.AbstractLinearOperator:
        """The sum; of two operators with the same blocks, an operator with blocks."""
        if isinstance(other, BlockLinearOperator) and are_alike(self, other):
            return add_operators((self, other), (None, None))
        return super().__add__(other)

    def _scaled(self, number: float) -> "BlockLinearOperator":
        return add_operators((self,), (jnp.asarray(number),))

    def block(self, path: str) -> Float[Array, "d d"]:
        """Compute the dense block of the layer that owns a parameter, as `B (x) A` on row-major `[out, in]`.

        A joint bias is one more input, the last column; groups follow each other on the diagonal.

        Args:
            path: the parameter's path, written as by `jax.tree_util.keystr`, `"['dense']['kernel']"`, or with `/`,
                `"dense/kernel"`; `*` stands for anything, where that fits parameters of one block: `"dense/*"`.

        Returns:
            An array `[d, d]`.

        Raises:
            KeyError: for a path that no parameter has, or with entries in several blocks.
        """
        named = self._named()
        names = [spec.names for _, (spec, _) in named]
        fitting = set(matching_names(path, [name for own in names for name in own]))
        found = {
            name: (block, spec.shape) for name, (spec, block) in named if name == path or fitting & set(spec.names)
        }
        if path in found:
            found = {path: found[path]}
        if len(found) == 1:
            return dense_block(*next(iter(found.values())), COLUMN_BATCH_SIZE)
        if found:
            raise KeyError(
                f"{path!r} has entries in several blocks: pass one of {', '.join(map(repr, found))}; submatrix takes"
                " several."
            )
        known = ", ".join(dict.fromkeys(name for own in names for name in own))
        raise KeyError(f"no parameter {path!r}; there are {known or 'none with entries'}.")

    def factors(self) -> dict[str, Block]:
        """Return the blocks by the path of their first parameter, numbered where it has several.

        Returns:
            A dict, a pytree of arrays, with the factors of each block, its eigendecomposition, or its dense or diagonal
            entries.
        """
        return {name: block for name, (_, block) in self._named()}

    def _named(self) -> list[tuple[str, tuple[BlockSpec, Block]]]:
        """The blocks, each with the path of its first parameter, and `#1`, `#2`, ... where that has several."""
        pairs = self.blocks.unstacked()
        firsts = [spec.names[0] for spec, _ in pairs]
        names = [
            f"{name}#{firsts[: i + 1].count(name)}" if firsts.count(name) > 1 else name for i, name in enumerate(firsts)
        ]
        return list(zip(names, pairs, strict=True))


register(BlockLinearOperator, positive_semidefinite=True)


def are_alike(x: BlockLinearOperator, y: BlockLinearOperator) -> bool:
    """Whether they have blocks of the same entries."""
    return x.blocks.stacks == y.blocks.stacks and x.structure == y.structure


@jax.jit
@partial(compiler_sharded, like=lambda operator, vector: vector)
def _mv(operator: BlockLinearOperator, vector: PyTree[Array]) -> PyTree[Array]:
    return blocks_mv(operator.blocks, operator.structure, vector)


@jax.jit
def add_operators(
    operators: Sequence[BlockLinearOperator], weights: Sequence[Float[Array, ""] | None]
) -> BlockLinearOperator:
    """`sum_i weights[i] operators[i]`, of operators with the same blocks."""

    def weighted(operator: BlockLinearOperator, weight: Float[Array, ""] | None) -> Sequence[AnyBlock]:
        blocks = operator.blocks.blocks
        return blocks if weight is None else [scale(block, weight) for block in blocks]

    terms = [weighted(*pair) for pair in zip(operators, weights, strict=True)]
    blocks = tuple(reduce(add, blocks) for blocks in zip(*terms, strict=True))
    return operators[0]._replace(Blocks(blocks, operators[0].blocks.stacks))


def _map_blocks(operator: BlockLinearOperator, damping: Any, what: str) -> BlockLinearOperator:
    """A function of `operator + damping * I`; refused if it is known not to be finite."""
    damping = check_functions(operator.blocks, operator.structure, damping)
    result, finite = map_blocks(operator.blocks, operator.structure, damping, what)
    for stack, flags in zip(result.stacks, finite, strict=True):
        if is_concrete(flags) and not np.asarray(flags).all():
            bad = int(np.searchsorted(stack.starts, np.argmin(flags), side="right")) - 1
            raise FloatingPointError(
                f"the {what} with damping {format_damping(damping)} of the block of"
                f" {', '.join(stack.specs[bad].names)} is not finite: it is singular, or holds NaN. Use a larger"
                " damping, or look at the model's outputs, and at a loss of your own with ggn_jax.check_loss."
            )
    return operator._replace(result)
