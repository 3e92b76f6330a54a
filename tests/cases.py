"""The registry of loss cases: one maker per combination of options, all test files run over all of them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from designs import SWEEP, cover

import ggn_jax

N = 4
SWEPT = [pytest.mark.sweep]


@dataclass(frozen=True)
class Case:
    """Our loss and torch's, a batch of outputs and targets, and how our layout maps to torch's."""

    name: str
    loss: ggn_jax.Loss
    torch_loss: torch.nn.Module
    outputs: np.ndarray
    targets: np.ndarray
    to_torch: Callable[[torch.Tensor], torch.Tensor] = lambda outputs: outputs
    targets_to_torch: Callable[[torch.Tensor], torch.Tensor] = lambda targets: targets
    batched_only: bool = False

    def torch_value(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Torch's loss of a batch, 0/0 counted as 0."""
        value = self.torch_loss(self.to_torch(outputs), self.targets_to_torch(targets))
        return torch.zeros_like(value) + 0 * outputs.sum() if value.isnan() else value

    def torch_hessian(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """`[*outputs, *outputs]`, by autodiff of torch's own loss."""
        y = torch.from_numpy(np.asarray(targets))
        hessian = torch.autograd.functional.hessian(lambda f: self.torch_value(f, y), torch.from_numpy(outputs))
        return hessian.numpy()

    def torch_gradient(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        f = torch.from_numpy(outputs).requires_grad_()
        self.torch_value(f, torch.from_numpy(np.asarray(targets))).backward()
        return f.grad.numpy()


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(sum(map(ord, name)))


def _mse() -> list[Case]:
    cases = []
    for reduction in ("mean", "sum"):
        for shape in ((), (1,), (3,), (2, 3), (2, 2, 2)):
            name = f"mse-{reduction}-{shape}"
            rng = _rng(name)
            ours, torchs = ggn_jax.MSELoss(reduction=reduction), torch.nn.MSELoss(reduction=reduction)
            cases.append(Case(name, ours, torchs, rng.normal(size=(N, *shape)), rng.normal(size=(N, *shape))))
    return cases


def _bce() -> list[Case]:
    cases = []
    options: list[dict[str, Any]] = [{}, {"weight": True}, {"pos_weight": True}, {"weight": True, "pos_weight": True}]
    for reduction in ("mean", "sum"):
        for shape in ((), (1,), (3,), (2, 3)):
            for option in options:
                for soft in (False, True):
                    name = f"bce-{reduction}-{shape}-{'+'.join(option) or 'plain'}-{'soft' if soft else 'hard'}"
                    rng = _rng(name)
                    # Zero among the weights: that entry is ignored.
                    arrays = {key: rng.uniform(0.2, 3, size=shape) for key in option}
                    for array in arrays.values():
                        array.flat[0] = 0.0 if shape else 0.7
                    targets = rng.uniform(size=(N, *shape))
                    if not soft:
                        targets = np.round(targets)
                    ours = ggn_jax.BCEWithLogitsLoss(reduction=reduction, **arrays)
                    kwargs = {key: torch.from_numpy(array) for key, array in arrays.items()}
                    torchs = torch.nn.BCEWithLogitsLoss(reduction=reduction, **kwargs)
                    cases.append(Case(name, ours, torchs, 2 * rng.normal(size=(N, *shape)), targets))
    for reduction in ("mean", "sum"):
        name = f"bce-{reduction}-weight-of-batch"
        rng = _rng(name)
        weight = rng.uniform(size=(N, 1))
        ours = ggn_jax.BCEWithLogitsLoss(weight, reduction=reduction)
        torchs = torch.nn.BCEWithLogitsLoss(torch.from_numpy(weight), reduction=reduction)
        outputs, targets = rng.normal(size=(N, 3)), np.round(rng.uniform(size=(N, 3)))
        cases.append(Case(name, ours, torchs, outputs, targets, batched_only=True))
    return cases


def _ce() -> list[Case]:
    cases = []
    for reduction in ("mean", "sum"):
        for shape in ((3,), (1,), (5,), (3, 2), (3, 2, 2)):
            for weighted in (False, True):
                for smoothing in (0.0, 0.3):
                    for kind in ("indices", "ignored", "probabilities"):
                        for last in (False, True):
                            if last and len(shape) == 1:
                                continue
                            cases.append(_ce_case(reduction, shape, weighted, smoothing, kind, last))
    return cases


def _ce_case(reduction: str, shape: tuple[int, ...], weighted: bool, smoothing: float, kind: str, last: bool) -> Case:
    """`shape` is `[C, *D]`; with `last` our outputs are `[*D, C]`."""
    classes, positions = shape[0], shape[1:]
    name = f"ce-{reduction}-{shape}-{'weighted' if weighted else 'plain'}-{smoothing}-{kind}{'-last' if last else ''}"
    rng = _rng(name)
    outputs = 2 * rng.normal(size=(N, *shape))
    if kind == "probabilities":
        targets = rng.dirichlet(np.ones(classes), size=(N, *positions))
        targets = np.moveaxis(targets, -1, 1)
    else:
        targets = rng.integers(classes, size=(N, *positions))
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    if kind == "ignored":
        options["ignore_index"] = 1 if classes > 1 else -7
        targets.flat[0] = options["ignore_index"]
        if positions:  # one example of which everything is ignored
            targets[1] = options["ignore_index"]
    weight = None
    if weighted:
        weight = rng.uniform(0.2, 3, size=classes)
        if classes > 3:
            # A class of weight zero. Smoothing would make torch divide by zero for it.
            weight[3] = 0.3 if smoothing else 0.0
    ours = ggn_jax.CrossEntropyLoss(weight, class_axis=-1 if last else 0, **options)
    torchs = torch.nn.CrossEntropyLoss(None if weight is None else torch.from_numpy(weight), **options)
    if not last:
        return Case(name, ours, torchs, outputs, targets)
    outputs = np.moveaxis(outputs, 1, -1).copy()
    to_torch = lambda outputs: outputs.movedim(-1, 1)  # noqa: E731
    if kind != "probabilities":
        return Case(name, ours, torchs, outputs, targets, to_torch)
    return Case(name, ours, torchs, outputs, np.moveaxis(targets, 1, -1).copy(), to_torch, to_torch)


CASES = _mse() + _bce() + _ce()


def _designs() -> tuple[set[str], set[str]]:
    """The cases that cheap tests run by default, and those that `-m sweep` adds; others run `few` by default.

    Any two options of a loss meet in one of the first, any three in one of both. The mean of the cross-entropy depends
    on weights and on what is ignored at once: with both, every value of the other options is there.
    """
    names = [tuple(case.name.split("-")) for case in CASES]
    core, wide = set(), set()
    for kind in ("mse", "bce", "ce"):
        own = [name for name in names if name[0] == kind]
        chosen = cover(own, 2)
        if kind == "ce":
            chosen |= cover([name for name in own if {"mean", "weighted", "ignored"} <= {*name}], 1)
        core |= chosen
        wide |= cover(own, SWEEP, chosen)
    return {"-".join(name) for name in core}, {"-".join(name) for name in wide - core}


CORE, WIDE = _designs()


def params(keep: Callable[[Case], bool] = lambda case: True, by_default: Collection[str] = CORE) -> list[Any]:
    """The cases as pytest parameters; those that are not named run with `-m sweep` only."""
    return _marked([case for case in CASES if case.name in CORE | WIDE and keep(case)], by_default)


def few() -> set[str]:
    """So many that each value of an option is in one."""
    names = [tuple(name.split("-")) for name in sorted(CORE)]
    found = set().union(*(cover([name for name in names if name[0] == kind], 1) for kind in ("mse", "bce", "ce")))
    found |= cover([name for name in names if {"ce", "mean", "weighted", "ignored"} <= {*name}], 1)
    return {"-".join(name) for name in found}


def _marked(cases: list[Case], by_default: Collection[str]) -> list[Any]:
    return [pytest.param(case, id=case.name, marks=[] if case.name in by_default else SWEPT) for case in cases]


FEW = few()
ALL = params()
PER_DATUM = params(lambda case: not case.batched_only)


def torch_blocks(case: Case) -> np.ndarray:
    """The diagonal blocks `[N, K, K]` of the whole batch's Hessian."""
    size = case.outputs[0].size
    full = case.torch_hessian(case.outputs, case.targets).reshape(N, size, N, size)
    return np.stack([full[n, :, n] for n in range(N)])
