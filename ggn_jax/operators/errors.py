"""What an operator says of arithmetic and of methods that it does not have, where lineax or Python would answer."""

from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from ggn_jax._hints import describe_value

ELSEWHERE = {  # what others call a method
    **dict.fromkeys(("matvec", "matmul", "dot", "mvp", "hvp", "jvp", "apply"), "mv"),
    **dict.fromkeys(("dense", "to_dense", "todense", "toarray", "to_matrix", "matrix"), "as_matrix"),
    **dict.fromkeys(("rmatvec", "adjoint", "H"), "T"),
    "shape": "in_structure",
    **dict.fromkeys(("inv", "pinv"), "inverse"),
    **dict.fromkeys(("norm", "fro"), "frobenius_norm"),
    "add_damping": "damped",
}
SOLVE = "lineax.linear_solve(operator.damped(d), vector, lineax.CG(rtol, atol)), or SciPy's with to_scipy()"
ESTIMATE = "matfree estimates it from products, and as_matrix() has all entries of a small one"
LEAST_SQUARES = "scipy.sparse.linalg.lsqr(operator.to_scipy(), flat), or GramLinearOperator in function space"
OTHERWISE = {  # what operators with blocks or a diagonal have, and another way to it
    **dict.fromkeys(("solve", "inverse"), SOLVE),
    **dict.fromkeys(("trace", "det", "logdet", "diagonal", "frobenius_norm", "sqrt", "inverse_sqrt"), ESTIMATE),
    "block": "submatrix(path)",
}


class ExplainedLinearOperator(lx.AbstractLinearOperator):
    """A lineax operator whose errors say what to call instead."""

    __array_ufunc__ = None  # NumPy's arrays leave `array @ operator` and the like to the operator

    def __getattr__(self, name: str) -> Any:
        kind = type(self)
        text = f"{kind.__name__} has no {name!r}"
        if name.startswith("_"):
            raise AttributeError(text)
        wanted = ELSEWHERE.get(name, name)
        if hasattr(kind, wanted):
            raise AttributeError(f"{text}: it is {wanted!r} here.")
        if wanted in OTHERWISE and hasattr(kind, "damped"):
            blocks = "KFACLinearOperator, EKFACLinearOperator and GGNDiagonalLinearOperator have it"
            raise AttributeError(f"{text}, which is known by its products: {OTHERWISE[wanted]}; {blocks}.")
        if wanted in ("solve", "inverse"):
            raise AttributeError(f"{text}: {LEAST_SQUARES}.")
        near = get_close_matches(name, [known for known in dir(kind) if known[0] != "_"], 1, 0.7)
        raise AttributeError(f"{text}.{f' Did you mean {near[0]!r}?' if near else ''}")

    def __matmul__(self, other: Any) -> lx.AbstractLinearOperator:
        if not isinstance(other, lx.AbstractLinearOperator):
            raise TypeError(
                f"operator @ other composes operators; got {describe_value(other)}. The product with a vector is"
                " operator.mv(vector), and with a flat array operator.to_scipy() @ array."
            )
        return super().__matmul__(other)

    def __rmatmul__(self, other: Any) -> Any:
        raise TypeError(
            f"other @ operator composes operators; got {describe_value(other)}. The product with a vector from the left"
            " is operator.T.mv(vector)."
        )

    def __add__(self, other: Any) -> lx.AbstractLinearOperator:
        self._check_operator("+", other)
        return super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        self._check_operator("+", other)
        return NotImplemented

    def __sub__(self, other: Any) -> lx.AbstractLinearOperator:
        self._check_operator("-", other)
        return super().__sub__(other)

    def __mul__(self, other: Any) -> lx.AbstractLinearOperator:
        _check_number("*", other)
        return super().__mul__(other)

    def __truediv__(self, other: Any) -> lx.AbstractLinearOperator:
        _check_number("/", other)
        return super().__truediv__(other)

    def _check_operator(self, sign: str, other: Any) -> None:
        if not isinstance(other, lx.AbstractLinearOperator):
            way_out = " Damping is operator.damped(number)." if hasattr(type(self), "damped") else ""
            raise TypeError(f"operator {sign} other is of two operators; got {describe_value(other)}.{way_out}")


def _check_number(sign: str, value: Any) -> None:
    kinds = int | float | complex | np.number | np.ndarray | jax.Array
    if not isinstance(value, kinds) or np.ndim(value) or jnp.issubdtype(jnp.result_type(value), jnp.bool_):
        got = repr(value) if isinstance(value, bool | str) else describe_value(value)
        way_out = "" if isinstance(value, bool | str) else " The product with a vector is operator.mv(vector)."
        raise TypeError(f"operator {sign} other is of an operator and a number; got {got}.{way_out}")
