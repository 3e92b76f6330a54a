"""Odd data, vectors and options of operators and of the optimizer: exact, or refused by name."""

from collections.abc import Callable
from typing import Any

import curvlinops
import numpy as np
import pytest
import torch
from module_cases import draw
from torch import nn

import torch_bridge

LOSS = nn.CrossEntropyLoss()
X, Y = draw(5, 4), torch.tensor([0, 1, 1, 0, 1])


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def ggn(*batches: Any, module: nn.Module | None = None, **options: Any) -> Any:
    module = mlp() if module is None else module
    return torch_bridge.GGNLinearOperator(module, LOSS, list(module.parameters()), batches, **options)


def dense(operator: Any) -> torch.Tensor:
    return (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).detach()


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x.double())


@pytest.mark.parametrize(
    "x",
    [draw(4, 10).t()[::2], draw(4).expand(5, 4), torch.ones(5, 4, dtype=torch.bool), 2 * draw(5, 4).requires_grad_()],
    ids=["strided", "expanded", "bool", "with history"],
)
def test_data_that_are_taken(x: torch.Tensor) -> None:
    module = Casting()
    args = LOSS, list(module.parameters()), [(x.detach(), Y)]
    wanted = dense(curvlinops.GGNLinearOperator(module, *args))
    torch.testing.assert_close(dense(ggn((x, Y), module=module)), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("progress", [False, True])
def test_batches_of_no_examples_count_for_nothing(progress: bool) -> None:
    found = ggn((X[:0], Y[:0]), (X, Y), (X[:0], Y[:0]), progress=progress)
    torch.testing.assert_close(dense(found), dense(ggn((X, Y))), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="at least one example"):
        ggn((X[:0], Y[:0]), progress=progress)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([(X.to("meta"), Y)], NotImplementedError, r"data\[0\]\[0\] is on the meta device"),
        ([(X, Y), (X, Y.to("meta"))], NotImplementedError, r"data\[1\]\[1\] is on the meta device"),
        ([(X.to_sparse(), Y)], NotImplementedError, r"pass data\[0\]\[0\].to_dense\(\)"),
        ([({"input": 1.0}, Y)], TypeError, r"data\[0\]\[0\]\['input'\] must be a tensor; got float"),
        ([(X, Y), (X.float(), Y)], ValueError, r"Batch 1 has float32\[5, 4\] as inputs, batch 0 float64\[5, 4\]"),
        ([(X, Y), (X, Y[:, None])], ValueError, r"Batch 1 has int64\[5, 1\] as targets, batch 0 int64\[5\]"),
        ([(X.float(), Y)], RuntimeError, r"module itself fails on example_inputs.*same dtype"),
        ([(X, Y + 2)], ValueError, r"class indices from 0 to 1.*got 2"),
    ],
    ids=["meta", "meta targets", "sparse", "number", "dtypes", "shapes", "module's dtype", "classes"],
)
def test_data_that_are_refused(batches: list[Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ggn(*batches)


def test_vectors() -> None:
    operator = ggn((X, Y))
    assert (operator @ torch.ones(23, 0)).shape == (23, 0)
    for vector in (torch.ones(23, dtype=torch.complex128), [1j * p for p in mlp().parameters()]):
        with pytest.raises(TypeError, match=r"operator is real.*its real and imaginary parts"):
            operator @ vector
    with pytest.raises(TypeError, match="operator is real"):
        operator.to_scipy() @ (1j * np.ones(23))
    mistakes: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: 2 * operator, TypeError, r"2 \* operator.to_scipy"),
        (lambda: torch.ones(23) @ operator, TypeError, "from the left: operator @ tensors"),
        (lambda: operator.matvec, AttributeError, "'matvec': here that is operator @ tensors"),
        (lambda: operator.solve, AttributeError, r"GGNLinearOperator has no 'solve'.*damped\(d\).to_scipy\(\)"),
        (lambda: operator.dampd, AttributeError, "'dampd'. Did you mean 'damped'"),
    ]
    for mistake, error, message in mistakes:
        with pytest.raises(error, match=message):
            mistake()


def kfac(**options: Any) -> Any:
    module = mlp()
    return torch_bridge.KFACLinearOperator(module, LOSS, list(module.parameters()), [(X, Y)], **options)


def test_options() -> None:
    for options, message in (({"kfac_approx": "sum"}, "kfac_approx must be.*'sum'"), ({"seed": 1.5}, "seed.*1.5")):
        with pytest.raises((TypeError, ValueError), match=message):
            kfac(**options)
    with pytest.raises(TypeError, match=r"batch_size_fn \(the batches of data\), progressbar \(progress\)"):
        kfac(progressbar=True, batch_size_fn=len)
    operator = kfac(fisher_type="type-2")
    for kind in (operator, ggn_diagonal()):
        found, wanted = kind.inverse(torch.tensor(0.1, dtype=torch.float64)), kind.inverse(0.1)
        assert torch.equal(found @ torch.ones(23), wanted @ torch.ones(23))
    coupled = kfac(fisher_type="type-2", examples="coupled")  # examples that are not: the same sums
    module = mlp()
    theirs = curvlinops.KFACLinearOperator(module, LOSS, list(module.parameters()), [(X, Y)], fisher_type="type-2")
    torch.testing.assert_close(dense(coupled), dense(theirs), rtol=1e-8, atol=1e-10)


def ggn_diagonal() -> Any:
    module = mlp()
    return torch_bridge.GGNDiagonalLinearOperator(module, LOSS, list(module.parameters()), [(X, Y)])


def test_parameters() -> None:
    module = mlp()
    with pytest.raises(ValueError, match=r"in a list or dict; numbers \[1\] are not"):
        torch_bridge.GGNLinearOperator(module, LOSS, 2 * [module[0].weight], [(X, Y)])
    lazy = nn.Sequential(nn.LazyLinear(2))
    makers: list[Callable[[], Any]] = [
        lambda: torch_bridge.GGNLinearOperator(lazy, LOSS, list(lazy.parameters()), [(X.float(), Y)]),
        lambda: torch_bridge.KFAC(lazy, LOSS, lr=0.1),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=r"0.weight, 0.bias of the module have no shape yet.*call the module"):
            make()


def test_steps() -> None:
    """Bad batches are refused before anything changes."""
    module = mlp()
    optimizer = torch_bridge.KFAC(module, LOSS, lr=0.1)
    with pytest.raises(ValueError, match="NaN for the first examples"):
        optimizer.step((X * float("nan"), Y))
    optimizer.step((X, Y))
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=r"class indices from 0 to 1.*got 7 at position \(2,\)"):
        optimizer.step((X, torch.tensor([0, 1, 7, 1, 0])))
    with pytest.raises(ValueError, match="at least one example"):
        optimizer.step((X[:0], Y[:0]))
    with pytest.raises(NotImplementedError, match=r"batch\[1\] is on the meta device"):
        optimizer.step((X, Y.to("meta")))
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert optimizer.step((X, Y)) > 0


@pytest.mark.parametrize("inputs", [{}, ()])
def test_no_inputs(inputs: Any) -> None:
    with pytest.raises(ValueError, match="example_inputs must hold at least one tensor"):
        torch_bridge.from_module(mlp(), inputs)
