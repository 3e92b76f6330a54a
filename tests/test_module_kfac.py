"""KFAC as an optimizer of PyTorch modules."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from module_cases import draw
from sklearn.datasets import load_digits
from torch import nn

import ggn_jax
import torch_bridge
from torch_bridge.generators import draw_seed, key_from_seed

LOSS = nn.CrossEntropyLoss()


def digits(number: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images[:number] / 16, dtype=torch.float32), torch.tensor(classes[:number])


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def normalised() -> nn.Module:
    """In training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(36, 10)),
    )


def parameters(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def test_least_squares() -> None:
    """Where the Kronecker product is the Hessian, one undamped step of length 1 solves the problem.

    Rate and weight decay are read at each step.
    """
    torch.manual_seed(0)
    module = nn.Linear(4, 3).double()
    x, y = draw(20, 4), draw(20, 3)
    options = {"momentum": None, "kl_clip": None, "fisher_type": "type-2", "damping_method": "exact"}
    optimizer = torch_bridge.KFAC(module, nn.MSELoss(), lr=0.0, damping=0.0, **options)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    wanted_loss = nn.MSELoss()(module(x), y).item()
    start = parameters(module)
    optimizer.step((x, y))
    assert torch.equal(parameters(module), start)
    optimizer.param_groups[0]["lr"] = 1.0
    assert optimizer.step((x, y)).item() == pytest.approx(wanted_loss, rel=1e-12)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1)], 1), y).solution
    torch.testing.assert_close(module.weight.detach(), solution[:4].T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.bias.detach(), solution[4], rtol=1e-10, atol=1e-12)
    assert before == [parameter.data_ptr() for parameter in module.parameters()]
    assert all(parameter.grad is None for parameter in module.parameters())
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.5)
    optimizer.step((x, y))
    torch.testing.assert_close(module.weight.detach(), 0.75 * solution[:4].T, rtol=1e-10, atol=1e-12)


def train(module: nn.Module, optimizer: Any, steps: int, scheduler: Any = None) -> None:
    batch = digits()
    for _ in range(steps):
        optimizer.step(batch)
        if scheduler is not None:
            scheduler.step()


@pytest.mark.sweep
def test_digits() -> None:
    """Lower than AdamW's loss after as many steps; a schedule is followed; and a run that is resumed goes on.

    With batch normalisation and dropout in training mode.
    """
    x, y = digits()
    module = normalised()
    optimizer = torch_bridge.KFAC(module, LOSS, lr=0.1, damping=1e-2)
    schedule: Callable[[Any], Any] = lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.5)  # noqa: E731
    scheduler = schedule(optimizer)
    train(module, optimizer, 5, scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.05
    file = io.BytesIO()
    torch.save([torch.get_rng_state(), *(part.state_dict() for part in (module, optimizer, scheduler))], file)
    train(module, optimizer, 10, scheduler)
    assert module[2].num_batches_tracked == 15

    file.seek(0)
    resumed = normalised()
    again = torch_bridge.KFAC(resumed, LOSS, lr=1.0, damping=1.0)
    parts = resumed, again, schedule(again)
    random, *states = torch.load(file, weights_only=True)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    between = again.state_dict()["kfac"]
    assert between["count"] == 5
    torch.set_rng_state(random)
    train(resumed, again, 10, parts[2])
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name

    adam_module = normalised()
    adam = torch.optim.AdamW(adam_module.parameters(), 1e-2)
    for _ in range(15):
        adam.zero_grad()
        LOSS(adam_module(x), y).backward()
        adam.step()
    assert LOSS(module.eval()(x), y) < 0.8 * LOSS(adam_module.eval()(x), y)


def test_nothing_set() -> None:
    """As `ggn_jax.kfac` does it; what it says of a step and of a batch is the same, and torch draws nothing for it."""
    torch.manual_seed(0)
    module, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)).double(), (draw(8, 4), torch.arange(8) % 3)
    optimizer = torch_bridge.KFAC(module, LOSS, fisher_type="type-2")
    for caller in (optimizer.statistics, lambda: optimizer.diagnose((x, y))):
        with pytest.raises(RuntimeError, match="take a step first"):
            caller()
    params = {name: torch_bridge.to_jax(p.detach().clone()) for name, p in module[0].named_parameters()}
    batch = torch_bridge.to_jax(x), torch_bridge.to_jax(y)
    model_fn: Callable[..., Any] = lambda p, x: x @ p["weight"].T + p["bias"][None]  # noqa: E731
    kfac = ggn_jax.kfac(model_fn, ggn_jax.CrossEntropyLoss(), example_inputs=batch[0], fisher_type="type-2")

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        _, grads, factors = kfac.value_and_grad_and_factors(params, batch, state)
        updates, state = kfac.update(grads, state, params, batch=batch, factors=factors)
        return optax.apply_updates(params, updates), state

    state = kfac.init(params)
    for _ in range(2):
        params, state = step(params, state)
        optimizer.step((x, y))
    for name, parameter in module[0].named_parameters():
        np.testing.assert_allclose(parameter.detach(), params[name], rtol=1e-6, atol=1e-9, err_msg=name)
    logged = {name: x.item() for name, x in optimizer.statistics().items()}
    assert logged == pytest.approx({name: float(x) for name, x in kfac.statistics(state).items()}, rel=1e-5)
    before = torch.get_rng_state()
    got, wanted = optimizer.diagnose((x, y)), kfac.diagnose(state, params, batch)
    assert (got.loss, got.predicted) == pytest.approx((wanted.loss, wanted.predicted), rel=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.by_default("False")
def test_one_step_in_training_mode(batch_norm: bool) -> None:
    """It is that of `ggn_jax.kfac`, with a key for the batch or each example; and statistics are torch's."""
    torch.manual_seed(0)
    first = [nn.Linear(4, 4), *([nn.BatchNorm1d(4)] if batch_norm else []), nn.Tanh()]
    module = nn.Sequential(*first, nn.Dropout(0.5), nn.Linear(4, 4)).double()  # layers of one shape: one stack
    x, y = draw(6, 4), torch.arange(6) % 3
    module_fn, params = torch_bridge.from_module(module, x, train=True)
    names = dict(module.named_buffers())
    buffers = {name: torch_bridge.to_jax(buffer) for name, buffer in names.items()}
    torch.manual_seed(1)
    key = key_from_seed(torch_bridge.to_jax(draw_seed(torch.device("cpu"), None))[0])
    keys = ggn_jax.Unbatched(key) if batch_norm else jax.random.split(key, 6)

    def model_fn(params: Any, inputs: Any) -> Any:
        x, keys = inputs
        if batch_norm:
            return module_fn({**params, **buffers}, x, key=keys)
        return jax.vmap(lambda x, key: module_fn(params, x[None], key=key)[0][0])(x, keys)

    inputs, options = (torch_bridge.to_jax(x), keys), {"damping": 0.1, "kl_clip": None}
    coupled = {"examples": "coupled", "has_aux": True} if batch_norm else {}
    kfac = ggn_jax.kfac(model_fn, ggn_jax.CrossEntropyLoss(), 0.5, example_inputs=inputs, **options, **coupled)

    batch = inputs, torch_bridge.to_jax(y)

    @jax.jit
    def step(params: Any) -> Any:
        state = kfac.init(params)
        draws = jax.random.fold_in(jax.random.key(0), 0)  # of seed=0, in the first step
        value, grads, factors = kfac.value_and_grad_and_factors(params, batch, state, key=draws)
        updates, _ = kfac.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), value[0] if batch_norm else value

    wanted, value = step(params)
    torch.manual_seed(1)
    optimizer = torch_bridge.KFAC(module, LOSS, lr=0.5, **options)
    theirs = copy.deepcopy(module)
    assert optimizer.step((x, y)).item() == pytest.approx(float(value), rel=1e-12)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.detach(), wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)
    theirs(x)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(names[name], buffer, rtol=1e-12, atol=0)
    if batch_norm:  # which makes a step of other examples together
        optimizer.step((x[:4], y[:4]))
        module.load_state_dict(theirs.state_dict())  # buffers are read at each step
        optimizer.step((x, y))
        assert module[1].num_batches_tracked == 2
        alone = torch_bridge.KFAC(module, LOSS, lr=0.5, examples="independent")
        with pytest.raises(NotImplementedError, match=r"random numbers, and changes 1.running_mean.*independent' out"):
            alone.step((x, y))


def test_what_is_refused() -> None:
    module, batch = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval().double(), (draw(6, 4), draw(6, 3))
    names = {"fisher": "fisher_type'", "learning_rate": "'lr'", "betas": "'momentum'", "xyz": "It takes .*lr, .*seed"}
    for name, words in names.items():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'.*{words}"):
            torch_bridge.KFAC(module, nn.MSELoss(), **{name: 1})
    habits = [((module.parameters(),), "generator alone"), ((module,), "Sequential alone"), ((), "NoneType")]
    for args, got in habits:
        with pytest.raises(TypeError, match=rf"got {got}. Call it as KFAC\(module, torch.nn.CrossEntropyLoss\(\), lr="):
            torch_bridge.KFAC(*args, lr=0.1)
    for name, value in {"lr": "fast", "damping": ggn_jax.QuadraticModel(), "weight_decay": None}.items():
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            torch_bridge.KFAC(module, nn.MSELoss(), **{name: value})
    bad = [{"lr": -0.1}, {"lr": float("nan")}, {"lr": 0.1, "damping": -1.0}, {"weight_decay": float("inf")}]
    for numbers in bad:
        with pytest.raises(ValueError, match="must be finite and at least 0; got"):
            torch_bridge.KFAC(module, nn.MSELoss(), **numbers)
    for options in ({"momentum": 0.9}, {"lr": 0.1, "damping": ggn_jax.SlopeDamping()}, {"inverse_interval": 0}):
        with pytest.raises(ValueError, match=r"QuadraticModel|inverse_interval"):
            torch_bridge.KFAC(module, nn.MSELoss(), **options)
    with pytest.raises(TypeError, match="seed must be an integer"):
        torch_bridge.KFAC(module, nn.MSELoss(), seed="a")
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, .* got list"):
        torch_bridge.KFAC(list(module.parameters()), nn.MSELoss())
    with pytest.raises(ValueError, match="parameters that require gradients"):
        torch_bridge.KFAC(nn.Tanh(), nn.MSELoss(), lr=0.1)
    optimizer = torch_bridge.KFAC(module, nn.MSELoss(), lr=0.1)
    with pytest.raises(NotImplementedError, match="one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    for args, got in (((), "none"), ((lambda: 0,), "a function")):
        with pytest.raises(TypeError, match=rf"\(inputs, targets\); got {got}: call step\(\(inputs, targets\)\)"):
            optimizer.step(*args)
    for save in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"KFAC is not pickled or copied.*save state_dict\(\)"):
            save(optimizer)
    with pytest.raises(ValueError, match="no entry 'kfac'"):
        optimizer.load_state_dict(torch.optim.SGD(module.parameters(), 0.1).state_dict())
    optimizer.step(batch)
    few = [
        ((batch[0][:0], batch[1][:0]), "at least one example"),
        ((batch[0], batch[1][:2]), "common leading batch axis"),
    ]
    for bad_batch, words in few:
        for call in (optimizer.step, optimizer.diagnose):
            with pytest.raises(ValueError, match=words):
                call(bad_batch)
    for number, error in ((-0.1, ValueError), ("0.1", TypeError), (None, TypeError)):
        optimizer.param_groups[0]["lr"] = number
        with pytest.raises(error, match=r"param_groups\[0\]\['lr'\] must be"):
            optimizer.step(batch)
    optimizer.param_groups[0]["lr"] = 0.1
    saved = optimizer.state_dict()
    adapted = torch_bridge.KFAC(module, nn.MSELoss())
    with pytest.raises(ValueError, match=r"with the same rules; it has numbers, and this one has .*QuadraticModel"):
        adapted.load_state_dict(saved)
    adapted.load_state_dict(adapted.state_dict())
    with pytest.raises(KeyError, match=r"no 'lr': lr=QuadraticModel\(.*pass KFAC a number as lr"):
        torch.optim.lr_scheduler.ExponentialLR(adapted, 0.9)
    adapted.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\] = 0.1 has no effect, since lr=QuadraticModel"):
        adapted.step(batch)
    other = torch_bridge.KFAC(module, nn.MSELoss(), lr=0.1, momentum=None)
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match="of another module or of other options"):
        other.step(batch)
    kept = other.state_dict()["kfac"]["state"]  # what was loaded
    assert all(map(torch.equal, kept, saved["kfac"]["state"]))
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
