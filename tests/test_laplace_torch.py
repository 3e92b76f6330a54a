"""Backends of laplace-torch beside its own, where it is installed; the factors they are made of, everywhere."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_bridge


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, outputs)
    return nn.Sequential(*layers).double().eval()


INPUTS = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.arange(10) % 3


def test_factors_make_up_the_operator() -> None:
    module = network()
    args = module, nn.CrossEntropyLoss(), list(module.parameters()), [(INPUTS, LABELS)]
    kfac = torch_bridge.KFACLinearOperator(*args, fisher_type="type-2")
    blocks = [torch.kron(*found) if len(found) == 2 else found[0] for found in kfac.factors().values()]
    dense = kfac @ torch.eye(kfac.shape[0], dtype=torch.float64)
    np.testing.assert_allclose(torch.block_diag(*blocks), dense, atol=1e-14)
    joint = torch_bridge.KFACLinearOperator(*args, fisher_type="type-2", separate_weight_and_bias=False)
    with pytest.raises(NotImplementedError, match=r"0\.weight of shape"):
        joint.factors()


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(2, 2, 3)], ids=["groups", "transposed"]
)
@pytest.mark.by_default("transposed")
def test_other_layouts_have_no_factors(layer: nn.Module) -> None:
    module = nn.Sequential(layer, nn.Flatten()).double()
    inputs = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    args = module, nn.MSELoss(), list(module.parameters()), [(inputs, torch.zeros_like(module(inputs)))]
    with pytest.raises(NotImplementedError, match=r"0\.weight of shape .* not one Kronecker product"):
        torch_bridge.KFACLinearOperator(*args, fisher_type="type-2").factors()


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_laplace_approximations(structure: str, subset: str, likelihood: str) -> None:
    """Precision and predictions, from batches of different sizes, equal those with laplace-torch's backends."""
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    curvlinops = pytest.importorskip("laplace.curvature.curvlinops", reason="laplace-torch is not installed")
    from torch_bridge.laplace import JAXGGN

    targets: Any = LABELS if likelihood == "classification" else torch.randn(10, 3, dtype=torch.float64)
    loader = DataLoader(TensorDataset(INPUTS, targets), batch_size=6)

    def fitted(backend: Any) -> Any:
        options = {"subset_of_weights": subset, "hessian_structure": structure, "backend": backend}
        approximation = laplace.Laplace(network(), likelihood, prior_precision=0.7, **options)
        approximation.fit(loader)
        return approximation

    ours, theirs = fitted(JAXGGN), fitted(curvlinops.CurvlinopsGGN)
    np.testing.assert_allclose(
        ours.log_marginal_likelihood().item(), theirs.log_marginal_likelihood().item(), rtol=1e-5
    )
    for x, y in zip(_tensors(ours(INPUTS)), _tensors(theirs(INPUTS)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8)


def _tensors(prediction: Any) -> list[np.ndarray]:
    return [part.detach().numpy() for part in (prediction if isinstance(prediction, tuple) else (prediction,))]


class Masked(nn.Module):
    """Of one mapping, as laplace-torch calls a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, data: Any) -> torch.Tensor:
        return self.layers(data["pixel_values"] * data["mask"])


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_mappings(structure: str) -> None:
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    curvlinops = pytest.importorskip("laplace.curvature.curvlinops", reason="laplace-torch is not installed")
    from torch_bridge.laplace import JAXGGN

    keep = (INPUTS > 0).double()
    data = [{"pixel_values": INPUTS[n], "mask": keep[n], "labels": LABELS[n]} for n in range(10)]

    def fitted(backend: Any) -> float:
        options = {"subset_of_weights": "all", "hessian_structure": structure, "backend": backend}
        options |= {"dict_key_x": "pixel_values"}
        approximation = laplace.Laplace(Masked(), "classification", prior_precision=0.7, **options)
        approximation.fit(DataLoader(data, batch_size=5))  # type: ignore[arg-type]
        return float(approximation.log_marginal_likelihood())

    np.testing.assert_allclose(fitted(JAXGGN), fitted(curvlinops.CurvlinopsGGN), rtol=1e-5)
