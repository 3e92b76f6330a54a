"""Diagonal operators: products, inverses, roots and determinants, entry by entry."""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import wide_dtype
from ggn_jax._sharding import compiler_sharded
from ggn_jax.kronecker.linalg import norm
from ggn_jax.operators.base import SymmetricLinearOperator, check_vector, matching_names, vectors_like
from ggn_jax.operators.damping import check_damping, check_nonnegative_number, leaf_dampings


class EntrywiseLinearOperator(SymmetricLinearOperator):
    """A diagonal operator, whose functions are those of its entries."""

    entries: PyTree[Array]

    @classmethod
    def _of(cls, entries: PyTree[Array]) -> Self:
        made = object.__new__(cls)
        object.__setattr__(made, "entries", entries)
        return made

    def mv(self, vector: PyTree[Any]) -> PyTree[Array]:
        """Compute the product with a vector.

        Args:
            vector: a pytree of arrays like the parameters.

        Returns:
            A pytree of arrays like the parameters.
        """
        check_vector(self, vector)
        return jax.tree.map(jnp.multiply, self.entries, vector)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return vectors_like(self.entries)

    def damped(self, damping: Any) -> Self:
        """Add damping: `self + damping * I`, again a diagonal operator.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say.

        Returns:
            The damped operator.

        Raises:
            ValueError, TypeError: for a damping that is not a number, is negative, or is not a prefix of the
                parameters.
        """
        return self._map(damping, lambda d: d)

    def inverse(self, damping: Any = 0.0, *, scale: float = 1.0) -> Self:
        """Compute `scale` times the inverse of `self + damping * I`, again a diagonal operator: a preconditioner.

        The scale cancels in conjugate gradients, but not in lineax's check for a breakdown: see `GGNLinearOperator`.
        Entries that are 0 give infinity: damp.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default.
            scale: a number of at least 0; 1 by default.

        Returns:
            The inverse.

        Raises:
            ValueError, TypeError: for a damping or a scale that is not a number, or is negative.
        """
        number = check_nonnegative_number("scale", scale)
        return self._map(damping, lambda d: number.astype(d.dtype) / d)

    def solve(self, vector: PyTree[Any], damping: Any = 0.0) -> PyTree[Array]:
        """Compute `inverse(damping).mv(vector)`.

        Args:
            vector: a pytree of arrays like the parameters.
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default.

        Returns:
            A pytree of arrays like the parameters.
        """
        check_vector(self, vector)
        return self.inverse(damping).mv(vector)

    def sqrt(self, damping: Any = 0.0) -> Self:
        """Compute the square root of `self + damping * I`.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default.

        Returns:
            The root, again a diagonal operator.
        """
        return self._map(damping, jnp.sqrt)

    def inverse_sqrt(self, damping: Any = 0.0) -> Self:
        """Compute the inverse of `sqrt(damping)`.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default.

        Returns:
            The inverse root, again a diagonal operator.
        """
        return self._map(damping, jax.lax.rsqrt)

    def trace(self) -> Float[Array, ""]:
        """Return the trace, a scalar."""
        return _total(self.entries, jnp.sum)

    def frobenius_norm(self) -> Float[Array, ""]:
        """Return the Frobenius norm, a scalar."""
        return _norm(self.entries)

    def logdet(self, damping: Any = 0.0) -> Float[Array, ""]:
        """Compute the logarithm of the determinant of `self + damping * I`.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default.

        Returns:
            A scalar; minus infinity where an entry is 0.
        """
        return _total(self.damped(damping).entries, _sum_of_logs)

    def det(self, damping: Any = 0.0) -> Float[Array, ""]:
        """Compute the determinant of `self + damping * I`; `logdet` does not overflow.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say. 0 by default.

        Returns:
            A scalar.
        """
        return jnp.exp(self.logdet(damping))

    def diagonal(self) -> PyTree[Array]:
        """Return the diagonal, as a pytree like the parameters."""
        return self.entries

    def block(self, path: str) -> Float[Array, "d d"]:
        """Compute the dense, diagonal block of a parameter, row-major.

        Args:
            path: the parameter's path, written as by `jax.tree_util.keystr`, `"['dense']['kernel']"`, or with `/`,
                `"dense/kernel"`; `*` stands for anything.

        Returns:
            An array `[d, d]`.

        Raises:
            KeyError: for a path that no parameter has, or that several have.
        """
        leaves = {
            jax.tree_util.keystr(names): leaf for names, leaf in jax.tree_util.tree_leaves_with_path(self.entries)
        }
        found = matching_names(path, list(leaves))
        if len(found) == 1:
            return jnp.diag(leaves[found[0]].reshape(-1))
        if found:
            raise KeyError(
                f"{path!r} fits several parameters: pass one of {', '.join(found)}; submatrix takes several."
            )
        raise KeyError(f"no parameter {path!r}; there are {', '.join(leaves)}.")

    def __add__(self, other: Any) -> lx.AbstractLinearOperator:
        """The sum; of two diagonal operators on the same parameters, a diagonal operator."""
        if isinstance(other, EntrywiseLinearOperator) and other.in_structure() == self.in_structure():
            return self._replace(jax.tree.map(jnp.add, self.entries, other.entries))
        return super().__add__(other)

    def _scaled(self, number: float) -> Self:
        return self._replace(jax.tree.map(lambda d: number * d, self.entries))

    def _map(self, damping: Any, fn: Callable[[Array], Array]) -> Self:
        """A function of the damped entries."""
        numbers = leaf_dampings(check_damping(damping, self.in_structure()), self.entries)
        leaves, tree = jax.tree.flatten(self.entries)
        made = [fn(d + n.astype(d.dtype)) for d, n in zip(leaves, numbers, strict=True)]
        return self._replace(jax.tree.unflatten(tree, made))

    def _replace(self, entries: PyTree[Array]) -> Self:
        return eqx.tree_at(lambda operator: operator.entries, self, entries)


def _sum_of_logs(x: Array) -> Array:
    return jnp.sum(jnp.log(x))


@partial(jax.jit, static_argnames="fn")
@compiler_sharded
def _total(entries: PyTree[Array], fn: Callable[[Array], Array]) -> Float[Array, ""]:
    wide, leaves = wide_dtype(entries), jax.tree.leaves(entries)
    return jnp.sum(jnp.stack([fn(leaf.astype(wide)) for leaf in leaves])) if leaves else jnp.zeros(())


@jax.jit
@compiler_sharded
def _norm(entries: PyTree[Array]) -> Float[Array, ""]:
    wide, leaves = wide_dtype(entries), jax.tree.leaves(entries)
    return norm(jnp.stack([norm(leaf.astype(wide)) for leaf in leaves])) if leaves else jnp.zeros(())
