"""What Jacobians share: products both ways, transposes, and several of the same parameters, one under the other."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ggn_jax._repr import fields
from ggn_jax.operators.base import check_vector, register
from ggn_jax.operators.errors import ExplainedLinearOperator
from ggn_jax.operators.flat import scipy_operator


class AbstractJacobian(ExplainedLinearOperator):
    """A Jacobian whose transpose has products, too."""

    @abc.abstractmethod
    def vjp(self, u: PyTree[Float[Array, "N *out"]]) -> PyTree[Array]:
        """Compute `J^T u`.

        Args:
            u: an array like the outputs, `[N, *out]`.

        Returns:
            A pytree of arrays like the parameters.
        """

    @abc.abstractmethod
    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]: ...

    def transpose(self) -> "JacobianTransposeLinearOperator":
        """Return the transpose, a `JacobianTransposeLinearOperator`."""
        return JacobianTransposeLinearOperator(self)

    def to_scipy(self) -> Any:
        """Make a SciPy operator with the same products.

        Returns:
            A `scipy.sparse.linalg.LinearOperator` of shape `[K, P]` on flat NumPy vectors, with the rows and columns of
            `as_matrix`.

        Example:
            >>> import jax.numpy as jnp, ggn_jax, numpy as np, scipy.sparse.linalg
            >>> jacobian = ggn_jax.JacobianLinearOperator(lambda p, x: x @ p, jnp.ones((2, 3)), jnp.eye(8, 2))
            >>> solution = scipy.sparse.linalg.lsqr(jacobian.to_scipy(), np.ones(24))[0]
        """
        return scipy_operator(self, self.vjp)


class JacobianTransposeLinearOperator(ExplainedLinearOperator):
    """The transpose of a model's Jacobian, `JacobianLinearOperator(...).T`.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> jacobian = ggn_jax.JacobianLinearOperator(lambda p, x: x @ p, jnp.ones((2, 3)), jnp.ones((8, 2)))
        >>> jacobian.T.as_matrix().shape, jacobian.T.T is jacobian
        ((6, 24), True)
    """

    jacobian: AbstractJacobian

    def __repr__(self) -> str:
        return fields(self, jacobian=self.jacobian)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shape and dtype of the vectors it acts on: those of the outputs."""
        return self.jacobian.out_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of its products: those of the parameters."""
        return self.jacobian.in_structure()

    def mv(self, vector: PyTree[Float[Array, "N *out"]]) -> PyTree[Array]:
        """Compute `J^T u`.

        Args:
            vector: `u`, an array like the outputs, `[N, *out]`.

        Returns:
            A pytree of arrays like the parameters.
        """
        check_vector(self, vector, "output")
        return self.jacobian.vjp(vector)

    def transpose(self) -> AbstractJacobian:
        """Return the Jacobian."""
        return self.jacobian

    def as_matrix(self) -> Float[Array, "P K"]:
        """Compute the dense matrix.

        Returns:
            An array `[P, K]`, whose rows are those of `jax.flatten_util.ravel_pytree(params)`, and columns outputs in C
            order.
        """
        return self.jacobian.as_matrix().T

    def to_scipy(self) -> Any:
        """Make a SciPy operator with the same products.

        Returns:
            A `scipy.sparse.linalg.LinearOperator` of shape `[P, K]` on flat NumPy vectors.
        """
        return scipy_operator(self, self.jacobian.mv)


class StackedJacobianLinearOperator(AbstractJacobian):
    """The Jacobians of several functions of the same parameters, one under the other.

    Made by `JacobianLinearOperator.from_objective`. Vectors of outputs are tuples, with an array for each function.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> one = ggn_jax.Objective(lambda p, x: x @ p, ggn_jax.MSELoss())
        >>> batches = [(jnp.ones((8, 2)), None), (jnp.ones((5, 2)), None)]
        >>> jacobian = ggn_jax.JacobianLinearOperator.from_objective(one + one, jnp.ones((2, 3)), batches)
        >>> type(jacobian).__name__, jacobian.T.mv((jnp.ones((8, 3)), jnp.ones((5, 3)))).shape
        ('StackedJacobianLinearOperator', (2, 3))
    """

    jacobians: tuple[AbstractJacobian, ...]

    def __repr__(self) -> str:
        return fields(self, jacobians=self.jacobians)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the parameters."""
        return self.jacobians[0].in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the outputs of each function, a tuple."""
        return tuple(jacobian.out_structure() for jacobian in self.jacobians)

    def mv(self, vector: PyTree[Array]) -> tuple[Float[Array, "N *out"], ...]:
        """Compute `J_k v` for each function.

        Args:
            vector: `v`, a pytree of arrays like the parameters.

        Returns:
            A tuple with an array like the outputs of each function.
        """
        check_vector(self, vector)
        return tuple(jacobian.mv(vector) for jacobian in self.jacobians)

    def vjp(self, u: PyTree[Float[Array, "N *out"]]) -> PyTree[Array]:
        """Compute `sum_k J_k^T u_k`.

        Args:
            u: a tuple with an array like the outputs of each function.

        Returns:
            A pytree of arrays like the parameters.
        """
        parts = [jacobian.vjp(own) for jacobian, own in zip(self.jacobians, u, strict=True)]
        return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *parts)

    def as_matrix(self) -> Float[Array, "K P"]:
        """Compute the dense matrix.

        Returns:
            An array `[K, P]`, whose rows are the first function's outputs in C order, then the next one's.
        """
        with jax.numpy_dtype_promotion("standard"):  # outputs may have several dtypes
            return jnp.concatenate([jacobian.as_matrix() for jacobian in self.jacobians])


for _cls in (JacobianTransposeLinearOperator, StackedJacobianLinearOperator):
    register(_cls, symmetric=False)
lx.linearise.register(JacobianTransposeLinearOperator, lambda operator: lx.linearise(operator.jacobian).T)


@lx.linearise.register(StackedJacobianLinearOperator)
def _linearise(operator: StackedJacobianLinearOperator) -> StackedJacobianLinearOperator:
    kept: list[Any] = [lx.linearise(jacobian) for jacobian in operator.jacobians]
    return StackedJacobianLinearOperator(tuple(kept))
