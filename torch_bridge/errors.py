"""What an operator says of arithmetic and of methods that it does not have, where Python would answer."""

from difflib import get_close_matches
from typing import Any, NoReturn

ELSEWHERE = {  # what others call something
    **dict.fromkeys(("mv", "matvec", "matmul", "dot", "mvp", "apply"), "operator @ tensors"),
    **dict.fromkeys(("as_matrix", "to_dense", "todense", "dense"), "operator @ torch.eye(operator.shape[0])"),
    **dict.fromkeys(("T", "mT", "H", "transpose", "adjoint"), "the operator itself, which is symmetric"),
}
BLOCKS = {"solve", "inverse", "trace", "det", "logdet", "frobenius_norm"}


class ExplainedOperator:
    """An operator whose errors say what to call instead."""

    def __getattr__(self, name: str) -> Any:
        kind = type(self)
        text = f"{kind.__name__} has no {name!r}"
        if name.startswith("_"):
            raise AttributeError(text)
        if name in ELSEWHERE:
            raise AttributeError(f"{text}: here that is {ELSEWHERE[name]}.")
        if name in BLOCKS:
            raise AttributeError(
                f"{text}: use SciPy's solvers and estimators with operator.damped(d).to_scipy(), or KFACLinearOperator,"
                " EKFACLinearOperator and GGNDiagonalLinearOperator, which have more methods."
            )
        near = get_close_matches(name, [known for known in dir(kind) if known[0] != "_"], 1, 0.7)
        raise AttributeError(f"{text}.{f' Did you mean {near[0]!r}?' if near else ''}")

    def __rmatmul__(self, other: Any) -> NoReturn:
        raise TypeError("an operator is multiplied from the left: operator @ tensors, which is symmetric.")

    def _combined(self, other: Any) -> NoReturn:
        raise TypeError(
            "operators of torch_bridge are not added or scaled: 2 * operator.to_scipy() + other.to_scipy() are SciPy's,"
            " and operator.damped(number) adds damping."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _combined
