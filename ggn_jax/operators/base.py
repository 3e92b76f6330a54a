"""What all curvature operators share: they are symmetric, and act on pytrees like the parameters."""

import abc
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import as_array, is_sum_start
from ggn_jax._hints import is_array
from ggn_jax._repr import fields
from ggn_jax._sharding import compiler_sharded
from ggn_jax.operators.damping import check_damping, leaf_dampings, nonnegative_number
from ggn_jax.operators.errors import ExplainedLinearOperator
from ggn_jax.operators.flat import scipy_operator

COLUMN_BATCH_SIZE = 32  # of a dense matrix; bounds the memory of `as_matrix`


class SymmetricLinearOperator(ExplainedLinearOperator):
    """A symmetric operator on pytrees of arrays.

    It is a `lineax.AbstractLinearOperator`: it solves (`lineax.linear_solve`), adds (`a + b`), scales and composes.
    """

    @abc.abstractmethod
    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the vectors it acts on: those of the parameters."""

    def __repr__(self) -> str:
        return fields(self, params=self.in_structure(), **self._details())

    def _details(self) -> dict[str, Any]:
        """What else `repr` shows."""
        return {}

    def __hash__(self) -> int:
        try:
            return super().__hash__()
        except TypeError:
            raise TypeError(
                f"{type(self).__name__} holds arrays, and has no hash which jax.jit requires of a function: instead of"
                " jax.jit(operator.mv), use equinox.filter_jit(operator.mv), or pass the operator as an argument."
            ) from None

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of its products: those of the parameters."""
        return self.in_structure()

    def transpose(self) -> "SymmetricLinearOperator":
        """Return the operator itself, which is symmetric."""
        return self

    def as_matrix(self) -> Float[Array, "P P"]:
        """Compute the dense matrix.

        Returns:
            An array `[P, P]`, with rows and columns in the order of `jax.flatten_util.ravel_pytree(params)`.
        """
        return self._dense(tuple(range(len(jax.tree.leaves(self.in_structure())))))

    def submatrix(self, *paths: str) -> Float[Array, "d d"]:
        """Compute the dense matrix of some of the parameters.

        Args:
            *paths: which parameters, written as `"dense/kernel"`, with `*` for anything: `"encoder/*"`; or as `report`
                writes one: `"['dense']['kernel']"`. For all of one layer's, pass its kernel and its bias.

        Returns:
            An array `[d, d]`, with rows and columns in the order of `ravel_pytree` of these parameters.

        Raises:
            KeyError: for a path that no parameter has.
            TypeError: for anything that is not a path.

        Example:
            >>> import jax.numpy as jnp, ggn_jax
            >>> params, batch = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
            >>> model_fn, loss = lambda p, x: x @ p["w"] + p["b"], ggn_jax.CrossEntropyLoss()
            >>> ggn = ggn_jax.GGNLinearOperator(model_fn, loss, params, batch)
            >>> ggn.submatrix("w").shape, ggn.submatrix("w", "b").shape, ggn.submatrix("*").shape
            ((6, 6), (9, 9), (9, 9))
        """
        return self._dense(_leaves_at(paths, self.in_structure()))

    def _dense(self, leaves: tuple[int, ...]) -> Float[Array, "d d"]:
        """The dense matrix of the parameters with these numbers."""
        return _submatrix(self, leaves)

    def to_scipy(self) -> Any:
        """Make a SciPy operator with the same products.

        Returns:
            A `scipy.sparse.linalg.LinearOperator` on flat NumPy vectors, in the order of `ravel_pytree(params)`.

        Example:
            >>> import jax.numpy as jnp, ggn_jax, numpy as np, scipy.sparse.linalg
            >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
            >>> ggn = ggn_jax.GGNLinearOperator(lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss(), params, batch)
            >>> solution, failed = scipy.sparse.linalg.cg(ggn.damped(0.1).to_scipy(), np.ones(6))
        """
        return scipy_operator(self)

    def damped(self, damping: Any) -> "SymmetricLinearOperator":
        """Add damping: `self + damping * I`, still marked as positive semi-definite where `self` is.

        lineax's own `self + damping * lineax.IdentityLinearOperator(...)` loses that tag.

        Args:
            damping: a number of at least 0, or a pytree of such numbers that is a prefix of the parameters: a prior
                precision for each layer, say.

        Returns:
            The damped operator.

        Raises:
            ValueError, TypeError: for a damping that is not a number, is negative, or is not a prefix of the
                parameters.
        """
        return DampedLinearOperator(self, damping)

    def __radd__(self, other: Any) -> Self:
        return self if is_sum_start(other) else super().__radd__(other)

    def __mul__(self, other: Any) -> lx.AbstractLinearOperator:
        """`other * self`: positive semi-definite where `self` is, and `other` is known and at least 0."""
        number = None if isinstance(other, bool) else nonnegative_number(other)
        if number is None or not lx.is_positive_semidefinite(self):
            return super().__mul__(other)
        return self._scaled(number)

    def __truediv__(self, other: Any) -> lx.AbstractLinearOperator:
        number = None if isinstance(other, bool) else nonnegative_number(other)
        if not number or not lx.is_positive_semidefinite(self):
            return super().__truediv__(other)
        return self._scaled(1 / number)

    def _scaled(self, number: float) -> lx.AbstractLinearOperator:
        product = lx.MulLinearOperator(self, number)  # type: ignore[arg-type]  # whose dtype adapts to the vector's
        return lx.TaggedLinearOperator(product, lx.positive_semidefinite_tag)


class CurvatureLinearOperator(SymmetricLinearOperator):
    """A symmetric operator on the parameters that is defined by its products."""

    @abc.abstractmethod
    def _mv(self, v: PyTree[Array]) -> PyTree[Array]:
        """The product with `v`, like the parameters."""

    def mv(self, vector: PyTree[Any]) -> PyTree[Array]:
        """Compute the product with a vector.

        Args:
            vector: a pytree of arrays like the parameters.

        Returns:
            A pytree of arrays like the parameters.

        Raises:
            ValueError, TypeError: for a vector whose structure, shapes or dtypes differ from the parameters'.
        """
        check_vector(self, vector)
        return _jitted_mv(self, vector)


@jax.jit
@partial(compiler_sharded, like=lambda operator, v: operator.in_structure())
def _jitted_mv(operator: CurvatureLinearOperator, v: PyTree[Array]) -> PyTree[Array]:
    return operator._mv(v)


@eqx.filter_jit  # a damped operator may hold one of lineax's, with leaves that are not arrays
@compiler_sharded
def _submatrix(operator: SymmetricLinearOperator, leaves: tuple[int, ...]) -> Float[Array, "d d"]:
    shapes, tree = jax.tree.flatten(operator.in_structure())
    zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes]
    with jax.numpy_dtype_promotion("standard"):  # parameters may have several dtypes
        flat, unravel = ravel_pytree([zeros[leaf] for leaf in leaves])

        def column(e: Array) -> Array:
            given = list(zeros)
            for leaf, part in zip(leaves, unravel(e), strict=True):
                given[leaf] = part
            product = jax.tree.leaves(operator.mv(jax.tree.unflatten(tree, given)))
            return ravel_pytree([product[leaf] for leaf in leaves])[0]

        return map_in_batches(column, jnp.eye(flat.size, dtype=flat.dtype))


def map_in_batches(fn: Callable[[PyTree[Array]], PyTree[Array]], xs: PyTree[Array]) -> PyTree[Array]:
    """`fn` of each of `xs`, `COLUMN_BATCH_SIZE` of them together; one by one where JAX cannot map it."""
    try:
        return jax.lax.map(fn, xs, batch_size=min(COLUMN_BATCH_SIZE, len(jax.tree.leaves(xs)[0])))
    except NotImplementedError:  # JAX cannot map `jax.lax.ragged_dot`
        return jax.lax.map(fn, xs)


def _leaves_at(paths: tuple[str, ...], structure: PyTree[jax.ShapeDtypeStruct]) -> tuple[int, ...]:
    """The numbers of the parameters that these names or patterns fit."""
    whole = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(structure)]
    names = ", ".join(map(simple_path, whole)) if any(whole) else "one array, whose path is ''"
    found: set[int] = set()
    for path in paths:
        fits = matching_names(path, whole)
        if not fits:
            raise KeyError(f"no parameter {path!r}; there are {names}.")
        found.update(map(whole.index, fits))
    if not paths:
        raise KeyError(f"pass the paths of some parameters; there are {names}.")
    return tuple(sorted(found))


def matching_names(path: str, names: Sequence[str]) -> list[str]:
    """Those of `names`, as `jax.tree_util.keystr` writes them, that a path is, or that it fits as a pattern."""
    if not isinstance(path, str):
        got = type(path).__name__
        raise TypeError(f"a path must be a string, as 'encoder/*'; got {got}: pass several as arguments of submatrix.")
    fits = [name for name in names if path in (name, simple_path(name))]
    # A parameter's own name is not a pattern, and brackets are those of a name.
    pattern = path.replace("[", "[[]")
    return fits or [name for name in names if fnmatchcase(simple_path(name), pattern)]


def structure_of(tree: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a pytree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def vectors_like(params: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """The structure of vectors like the parameters, as lineax has it: on meshes, with shardings."""
    kinds = [jax.typeof(leaf) for leaf in jax.tree.leaves(params)]
    if all(kind.sharding.mesh.empty and not kind.weak_type for kind in kinds):  # a tenth of the time, in each product
        return structure_of(params)
    return jax.eval_shape(lambda params: params, params)


def simple_path(name: str) -> str:
    """`a/0/b` for `['a'][0].b`."""
    parts = re.findall(r"""\[(['"])(.*?)\1\]|\[(.*?)\]|\.(\w+)""", name)
    return "/".join(next(filter(None, part[1:]), "") for part in parts)


def check_vector(operator: lx.AbstractLinearOperator, vector: PyTree[Any], like: str = "parameter") -> None:
    """Refuse a vector that is not like the parameters, or the outputs, naming the first leaf that differs."""
    wanted = operator.in_structure()
    if jax.tree.structure(vector) != jax.tree.structure(wanted):  # type: ignore[operator]  # untyped in jaxlib
        raise ValueError(
            f"vector must be a pytree like the {like}s: wanted {jax.tree.structure(wanted)}, got"
            f" {jax.tree.structure(vector)}.{_flat_hint(vector, like)}"
        )
    wants, leaves = jax.tree.leaves(wanted), jax.tree.leaves(vector)
    if all(_is_like(leaf, want) for leaf, want in zip(leaves, wants, strict=True)):
        return
    pairs = zip(jax.tree_util.tree_leaves_with_path(wanted), leaves, strict=True)
    for (path, want), leaf in pairs:
        leaf = as_array(f"vector{jax.tree_util.keystr(path)}", leaf)
        if jnp.shape(leaf) != want.shape or jnp.result_type(leaf) != want.dtype:
            raise ValueError(
                f"vector{jax.tree_util.keystr(path)} must have shape {want.shape} and dtype {want.dtype}, like the"
                f" {like}; got {jnp.shape(leaf)} and {jnp.result_type(leaf)}."
            )


def _flat_hint(vector: Any, like: str) -> str:
    if is_array(vector) and vector.ndim == 1 and like == "parameter":
        return " For a flat one there is operator.to_scipy(), or jax.flatten_util.ravel_pytree(params)[1](vector)."
    return ""


def _is_like(leaf: Any, want: jax.ShapeDtypeStruct) -> bool:
    return isinstance(leaf, jax.Array) and leaf.shape == want.shape and leaf.dtype == want.dtype


def register(
    cls: type[lx.AbstractLinearOperator],
    *,
    symmetric: bool = True,
    positive_semidefinite: bool = False,
    diagonal: bool = False,
) -> type[lx.AbstractLinearOperator]:
    """Tell lineax what is known of a class of operators."""
    for question, answer in (
        (lx.is_symmetric, symmetric),
        (lx.is_diagonal, diagonal),
        (lx.is_tridiagonal, diagonal),
        (lx.is_lower_triangular, diagonal),
        (lx.is_upper_triangular, diagonal),
        (lx.has_unit_diagonal, False),
        (lx.is_positive_semidefinite, positive_semidefinite),
        (lx.is_negative_semidefinite, False),
    ):
        question.register(cls, lambda operator, answer=answer: answer)
    lx.conj.register(cls, lambda operator: operator)
    lx.linearise.register(cls, lambda operator: operator)
    lx.materialise.register(cls, _materialise)
    lx.diagonal.register(cls, lambda operator: jnp.diagonal(operator.as_matrix()))
    return cls


def _materialise(operator: Any) -> lx.AbstractLinearOperator:
    """The operator as a pytree of arrays in memory."""
    known = ((lx.is_positive_semidefinite, lx.positive_semidefinite_tag), (lx.is_symmetric, lx.symmetric_tag))
    tags = next((tag for question, tag in known if question(operator)), ())
    return lx.materialise(lx.FunctionLinearOperator(operator.mv, operator.in_structure(), tags))


class DampedLinearOperator(SymmetricLinearOperator):
    """The operator `operator + damping * I` for a symmetric `operator`; made by `operator.damped(damping)`.

    Args:
        operator: a symmetric `lineax.AbstractLinearOperator`.
        damping: a number of at least 0, or a pytree of such numbers that is a prefix of the operator's vectors: then it
            is a diagonal matrix.

    Raises:
        ValueError, TypeError: for a damping that is not a number, is negative, or is not such a prefix.

    Example:
        >>> import jax.numpy as jnp, lineax as lx
        >>> ones = lx.MatrixLinearOperator(jnp.ones((2, 2)), lx.positive_semidefinite_tag)
        >>> print(DampedLinearOperator(ones, 0.5).as_matrix())
        [[1.5 1. ]
         [1.  1.5]]
    """

    operator: lx.AbstractLinearOperator
    damping: PyTree[Float[Array, ""]]

    def __init__(self, operator: lx.AbstractLinearOperator, damping: Any):
        if not isinstance(operator, lx.AbstractLinearOperator) or not lx.is_symmetric(operator):
            raise ValueError(f"operator must be a symmetric lineax operator; got {type(operator).__name__}.")
        self.operator = operator
        self.damping = check_damping(damping, operator.in_structure())

    def __repr__(self) -> str:
        return fields(self, operator=self.operator, damping=self.damping)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.in_structure()

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """Compute the product with a vector.

        Args:
            vector: a pytree of arrays like the parameters.

        Returns:
            A pytree of arrays like the parameters.
        """
        product = self.operator.mv(vector)
        numbers = leaf_dampings(self.damping, self.in_structure())
        leaves, tree = jax.tree.flatten(vector)
        scaled = jax.tree.unflatten(tree, [d.astype(v.dtype) * v for d, v in zip(numbers, leaves, strict=True)])
        return jax.tree.map(jnp.add, product, scaled)


register(DampedLinearOperator)
lx.is_positive_semidefinite.register(DampedLinearOperator, lambda damped: lx.is_positive_semidefinite(damped.operator))
lx.linearise.register(
    DampedLinearOperator, lambda damped: DampedLinearOperator(lx.linearise(damped.operator), damped.damping)
)
