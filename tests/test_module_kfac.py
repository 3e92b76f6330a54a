"""KFAC as an optimizer of PyTorch modules."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_cases import draw
from sklearn.datasets import load_digits
from torch import nn

import torch_bridge

LOSS = nn.CrossEntropyLoss()


def digits(number: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images[:number] / 16, dtype=torch.float32), torch.tensor(classes[:number])


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def parameters(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def test_least_squares() -> None:
    """Where the Kronecker product is the Hessian, one undamped step of length 1 solves the problem."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3).double()
    x, y = draw(20, 4), draw(20, 3)
    options = {"momentum": None, "kl_clip": None, "fisher_type": "type-2", "damping_method": "exact"}
    optimizer = torch_bridge.KFAC(module, nn.MSELoss(), lr=1.0, damping=0.0, **options)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    wanted_loss = nn.MSELoss()(module(x), y).item()
    assert optimizer.step((x, y)).item() == pytest.approx(wanted_loss, rel=1e-12)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1)], 1), y).solution
    torch.testing.assert_close(module.weight.detach(), solution[:4].T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.bias.detach(), solution[4], rtol=1e-10, atol=1e-12)
    assert before == [parameter.data_ptr() for parameter in module.parameters()]
    assert all(parameter.grad is None for parameter in module.parameters())


def train(module: nn.Module, optimizer: Any, steps: int, scheduler: Any = None) -> None:
    batch = digits()
    for _ in range(steps):
        optimizer.step(batch)
        if scheduler is not None:
            scheduler.step()


def test_digits() -> None:
    """Lower than AdamW's loss after as many steps; a schedule is followed; and a run that is resumed goes on."""
    x, y = digits()
    module = classifier()
    optimizer = torch_bridge.KFAC(module, LOSS, lr=0.1, damping=1e-2)
    schedule: Callable[[Any], Any] = lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5)  # noqa: E731
    scheduler = schedule(optimizer)
    train(module, optimizer, 5, scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.05
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (module, optimizer, scheduler)], file)
    train(module, optimizer, 10, scheduler)

    file.seek(0)
    resumed = classifier()
    again = torch_bridge.KFAC(resumed, LOSS, lr=1.0, damping=1.0)
    parts = resumed, again, schedule(again)
    for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    between = again.state_dict()["kfac"]
    assert between["count"] == 5
    train(resumed, again, 10, parts[2])
    assert torch.equal(parameters(resumed), parameters(module))

    adam_module = classifier()
    adam = torch.optim.AdamW(adam_module.parameters(), 1e-2)
    for _ in range(15):
        adam.zero_grad()
        LOSS(adam_module(x), y).backward()
        adam.step()
    assert LOSS(module(x), y) < 0.8 * LOSS(adam_module(x), y)


def test_the_rate_is_read_at_each_step() -> None:
    module, batch = classifier(), digits(8)
    optimizer = torch_bridge.KFAC(module, LOSS, lr=0.0, momentum=None)
    before = parameters(module)
    optimizer.step(batch)
    assert torch.equal(parameters(module), before)
    optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.5)
    optimizer.step(batch)
    assert not torch.equal(parameters(module), before)


def test_what_is_refused() -> None:
    module, batch = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval().double(), (draw(6, 4), draw(6, 3))
    with pytest.raises(TypeError, match=r"\['beta'\] are no options"):
        torch_bridge.KFAC(module, nn.MSELoss(), lr=0.1, beta=1)
    with pytest.raises(TypeError, match="lr must be a number"):
        torch_bridge.KFAC(module, nn.MSELoss(), lr="fast")
    with pytest.raises(ValueError, match="parameters that require gradients"):
        torch_bridge.KFAC(nn.Tanh(), nn.MSELoss(), lr=0.1)
    optimizer = torch_bridge.KFAC(module, nn.MSELoss(), lr=0.1)
    with pytest.raises(NotImplementedError, match="one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(TypeError, match=r"batch must be a pair \(inputs, targets\)"):
        optimizer.step(lambda: 0)
    with pytest.raises(ValueError, match="no entry 'kfac'"):
        optimizer.load_state_dict(torch.optim.SGD(module.parameters(), 0.1).state_dict())
    optimizer.step(batch)
    module[1].running_mean.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"1.running_mean of the module changed"):
        optimizer.step(batch)
    module[1].running_mean.zero_()
    module.train()
    with pytest.raises(RuntimeError, match=r"the whole.*of the module changed"):
        optimizer.step(batch)
    module.eval()
    module[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"0.bias of the module changed"):
        optimizer.step(batch)
    module[0].bias.requires_grad_(True)
    module[0].weight = nn.Parameter(torch.zeros(3, 4).double())
    with pytest.raises(RuntimeError, match=r"0.weight of the module changed"):
        optimizer.step(batch)
