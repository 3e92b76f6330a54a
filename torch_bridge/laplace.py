"""Backends for laplace-torch: the curvature by JAX, everything else as it is there.

    Laplace(model, "classification", hessian_structure="kron", backend=torch_bridge.laplace.JAXGGN)

This module needs laplace-torch (0.3); `import torch_bridge` does not import it.
"""

from typing import Any

import torch
from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn

from torch_bridge.converted import ConvertedModule
from torch_bridge.operators import EFLinearOperator, GGNLinearOperator
from torch_bridge.structured import GGNDiagonalLinearOperator, KFACLinearOperator


class _JAX(CurvatureInterface):
    """What both backends share: one conversion of the module for all batches."""

    _converted: ConvertedModule | None = None

    @property
    def _module(self) -> nn.Module:
        """The whole module: of a last layer, laplace-torch's `model` is a wrapper that keeps features."""
        module: nn.Module = self.model.model if self.last_layer else self.model
        return module

    def _args(self, x: Any, y: Tensor) -> tuple[Any, ...]:
        if self._converted is None or self._converted.module is not self._module:
            self._converted = ConvertedModule(self._module, x)
        return self._converted, self.lossfunc, self.params, [(x, y)]

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            loss: Tensor = self.factor * self.lossfunc(self._module(x), y)
        return loss

    def _kron(self, x: Tensor, y: Tensor, N: int, fisher_type: str, kwargs: dict[str, Any]) -> tuple[Tensor, Kron]:
        options: dict[str, Any] = {"fisher_type": fisher_type, "seed": _seed(), **kwargs}
        found = KFACLinearOperator(*self._args(x, y), **options).factors()
        kron = Kron(list(map(list, found.values())))  # in the order of the parameters
        for factors in kron.kfacs:
            if len(factors) == 2:  # so that the sums over batches of input factors are means over all data
                factors[1] = factors[1] * (len(y) / N)
        kron *= self.factor
        return self._loss(x, y), kron


def _seed() -> int:
    """From PyTorch's generator, as its own draws are."""
    return int(torch.randint(2**31 - 1, ()))


class JAXGGN(_JAX, GGNInterface):
    """The GGN by JAX, exact or (`stochastic`) by Monte-Carlo samples, as a backend of laplace-torch.

    Batches are pairs, or mappings, with which the module is called as laplace-torch calls it.

    For `hessian_structure` "kron", "diag" and "full", of all layers or the last one. Modules are those of
    `torch_bridge.from_module`. "kron" takes linear layers and convolutions without groups; biases, scales and shifts
    have their exact block.
    """

    def kron(self, x: Tensor, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """The loss, and the Kronecker factors of a batch of `N` data in all."""
        options = {"mc_samples": self.num_samples} | kwargs
        return self._kron(x, y, N, "mc" if self.stochastic else "type-2", options)

    def diag(self, x: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss, and the diagonal of the GGN of a batch."""
        if self.subnetwork_indices is not None:
            found: tuple[Tensor, Tensor] = super().diag(x, y, **kwargs)
            return found
        diagonal = GGNDiagonalLinearOperator(*self._args(x, y), **self._sampling()).diagonal()
        return self._loss(x, y), self.factor * torch.cat([entries.reshape(-1) for entries in diagonal])

    def full(self, x: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss, and the dense GGN of a batch."""
        if self.subnetwork_indices is not None:
            found: tuple[Tensor, Tensor] = super().full(x, y, **kwargs)
            return found
        operator = GGNLinearOperator(*self._args(x, y), **self._sampling())
        return self._loss(x, y), self.factor * _dense(operator)

    def _sampling(self) -> dict[str, Any]:
        return {"mc_samples": self.num_samples, "seed": _seed()} if self.stochastic else {}


class JAXEF(_JAX, EFInterface):
    """The empirical Fisher by JAX as a backend of laplace-torch: "kron" and "full"; "diag" is laplace-torch's own."""

    def kron(self, x: Tensor, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """The loss, and the Kronecker factors of a batch of `N` data in all."""
        return self._kron(x, y, N, "empirical", kwargs)

    def full(self, x: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss, and the dense empirical Fisher matrix of a batch."""
        if self.subnetwork_indices is not None:
            found: tuple[Tensor, Tensor] = super().full(x, y, **kwargs)
            return found
        return self._loss(x, y), self.factor * _dense(EFLinearOperator(*self._args(x, y)))


def _dense(operator: Any) -> Tensor:
    matrix: Tensor = operator @ torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)
    return matrix
