"""Operators that are saved by torch and loaded again."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_cases import draw
from torch import nn

import torch_bridge
from torch_bridge import EKFACLinearOperator, GGNDiagonalLinearOperator, KFACLinearOperator

LOSS, EMPIRICAL = nn.CrossEntropyLoss(), {"fisher_type": torch_bridge.FisherType.EMPIRICAL}


def network() -> nn.Module:
    """A convolution, a scale and shift, an embedding of positions that is added, two layers of one shape."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2)
    return nn.Sequential(*layers).double()


def data(seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return [(torch.randn(n, 1, 3, 3).double(), torch.arange(n) % 2) for n in (4, 3)]


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (KFACLinearOperator, {"mc_samples": 2, "max_dense_size": 8, "block_size": 5, "small": "diagonal"}),
        (EKFACLinearOperator, {"kfac_approx": "reduce", "separate_weight_and_bias": False, **EMPIRICAL}),
        (GGNDiagonalLinearOperator, {}),
    ],
    ids=["kfac in parts", "ekfac", "diagonal"],
)
@pytest.mark.by_default("ekfac")
def test_products_are_equal_to_the_last_bit(kind: Any, options: dict[str, Any]) -> None:
    """Also inverses; for a module with other values, other data, and parameters in another order."""
    module = network()
    operator = kind(module, LOSS, list(module.parameters()), data(1), **options)
    state = saved_and_loaded(operator.state_dict())
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    backwards = list(other.parameters())[::-1]
    again = kind.from_state_dict(state, other, LOSS, backwards, data(2)[1:])
    vector = [draw(*parameter.shape) for parameter in module.parameters()]
    for ours, theirs in ((again, operator), (again.inverse(0.1), operator.inverse(0.1))):
        for product, wanted in zip((ours @ vector[::-1])[::-1], theirs @ vector, strict=True):
            assert torch.equal(product, wanted)
    torch.testing.assert_close(again.trace(), operator.trace(), rtol=1e-14, atol=0)  # a sum in another order
    assert saved_and_loaded(again.state_dict()).keys() == state.keys()


def transposed() -> nn.Module:
    """The same parameters in places of the same shapes, used otherwise."""

    class Transposed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.T, self.bias)

    torch.manual_seed(0)
    return Transposed(3, 3).double()


def linear(inputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inputs, 3).double()


def weighted() -> nn.Module:
    return nn.CrossEntropyLoss(torch.ones(3).double())


def state_of(kind: Any, module: nn.Module, loss: nn.Module = LOSS, **options: Any) -> Any:
    batch = draw(4, module.weight.shape[1]).to(module.weight.dtype), torch.arange(4) % 3
    return kind(module, loss, list(module.parameters()), [batch], **options).state_dict()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: linear().state_dict(), TypeError, r"state_dict\(\) of an operator.*got a mapping with \['weight'"),
        (lambda: state_of(EKFACLinearOperator, linear()), ValueError, "call EKFACLinearOperator.from_state_dict"),
        (
            lambda: state_of(KFACLinearOperator, linear(2)),
            ValueError,
            r"weight: \['torch.float64', 3, 2\] in the state",
        ),
        (lambda: state_of(KFACLinearOperator, linear().float()), ValueError, r"bias: \['torch.float32', 3\] in the st"),
        (lambda: state_of(KFACLinearOperator, transposed()), ValueError, "that of another forward"),
        (lambda: state_of(KFACLinearOperator, linear(), loss=weighted()), ValueError, "another loss, .*CrossEntropy"),
        (lambda: state_of(KFACLinearOperator, linear()) | {"layout": ""}, ValueError, "uses its parameters otherwise"),
    ],
    ids=["module's", "kind", "shape", "dtype", "forward", "loss", "layout"],
)
def test_states_of_something_else_are_refused(make: Callable[[], Any], error: type, message: str) -> None:
    module = linear()
    args = module, LOSS, list(module.parameters()), [(draw(4, 3), torch.arange(4) % 3)]
    with pytest.raises(error, match=message):
        KFACLinearOperator.from_state_dict(make(), *args)


def test_a_state_of_more_parameters_is_refused() -> None:
    module = linear()
    batch = draw(4, 3), torch.arange(4) % 3
    with pytest.raises(ValueError, match=r"bias: .* in the state, none here"):
        KFACLinearOperator.from_state_dict(state_of(KFACLinearOperator, module), module, LOSS, [module.weight], [batch])
