"""Curvature operators of PyTorch modules, against curvlinops and torch's own derivatives."""

from collections.abc import Callable
from typing import Any

import curvlinops
import jax
import numpy as np
import pytest
import torch
from torch import nn

import torch_bridge


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))


def setting(build: Callable[[], nn.Module], loss: nn.Module) -> tuple[Any, ...]:
    """The arguments of an operator: with two batches of different sizes."""
    torch.manual_seed(0)
    module = build().double()
    x = torch.randn(5, 1, 3, 3, dtype=torch.float64) if build is cnn else torch.randn(5, 4, dtype=torch.float64)
    y = (
        torch.randint(0, 2, (5,))
        if isinstance(loss, nn.CrossEntropyLoss)
        else torch.rand(5, 2, dtype=torch.float64).round()
    )
    return module, loss, list(module.parameters()), [(x[:3], y[:3]), (x[3:], y[3:])]


def dense(operator: Any) -> torch.Tensor:
    return (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).detach()


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(reduction="sum")])
@pytest.mark.parametrize("name", ["GGNLinearOperator", "HessianLinearOperator"])
@pytest.mark.by_default("HessianLinearOperator-loss2", "GGNLinearOperator-loss0")
def test_products(name: str, loss: nn.Module) -> None:
    args = setting(mlp, loss)
    ours, theirs = getattr(torch_bridge, name)(*args), getattr(curvlinops, name)(*args)
    torch.testing.assert_close(dense(ours), dense(theirs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("build", "joint"), [(mlp, True), (cnn, False)])
@pytest.mark.by_default("mlp-True")
def test_kfac(build: Callable[[], nn.Module], joint: bool) -> None:
    """Values, inverses and numbers."""
    args = setting(build, nn.CrossEntropyLoss())
    options = {"fisher_type": "type-2", "separate_weight_and_bias": not joint}
    ours, theirs = torch_bridge.KFACLinearOperator(*args, **options), curvlinops.KFACLinearOperator(*args, **options)
    matrix = dense(theirs)
    torch.testing.assert_close(dense(ours), matrix, rtol=1e-8, atol=1e-10)
    damped = matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(dense(ours.inverse(damping=0.1)), damped.inverse(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours.solve(matrix[0], 0.1), damped.inverse() @ matrix[0], rtol=1e-8, atol=1e-8)
    numbers = [0.1 if joint else 0.1 * (1 + i) for i, _ in enumerate(args[2])]  # a bias in one block with its weight
    shift = torch.cat([number * torch.ones_like(p).reshape(-1) for number, p in zip(numbers, args[2], strict=True)])
    damped = matrix + shift.diag()
    mixed = ours.damped([torch.tensor(number, dtype=torch.float64) for number in numbers])
    torch.testing.assert_close(mixed @ matrix, damped @ matrix, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(mixed.logdet(), damped.logdet(), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match=rf"one for each of {len(args[2])} params; got 1"):
        ours.inverse([0.1])
    torch.testing.assert_close(ours.trace(), matrix.trace(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours.frobenius_norm(), matrix.norm(), rtol=1e-8, atol=1e-10)


def test_ekfac() -> None:
    args = setting(mlp, nn.MSELoss())
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    ours, theirs = torch_bridge.EKFACLinearOperator(*args, **options), curvlinops.EKFACLinearOperator(*args, **options)
    torch.testing.assert_close(dense(ours), dense(theirs), rtol=1e-8, atol=1e-10)


def test_diagonals_and_the_empirical_fisher() -> None:
    args = setting(mlp, nn.CrossEntropyLoss())
    diagonal = torch_bridge.GGNDiagonalLinearOperator(*args)
    wanted = dense(curvlinops.GGNLinearOperator(*args)).diag()
    torch.testing.assert_close(dense(diagonal), wanted.diag(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(diagonal.trace(), wanted.sum(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dense(diagonal.inverse(0.1)), (1 / (wanted + 0.1)).diag(), rtol=1e-8, atol=1e-10)
    ef, peer = torch_bridge.EFLinearOperator(*args), curvlinops.EFLinearOperator(*args)
    torch.testing.assert_close(dense(ef), dense(peer), rtol=1e-8, atol=1e-10)


@pytest.mark.sweep
def test_damped_operators() -> None:
    """Also inside of torch.compile, which leaves them out of its graphs."""
    module, loss, params, data = setting(mlp, nn.MSELoss())
    ggn = torch_bridge.GGNLinearOperator(module, loss, params, data)
    diagonal = torch_bridge.GGNDiagonalLinearOperator(module, loss, params, data)
    matrix, d = dense(ggn), 0.1 * (1 + torch.arange(len(params), dtype=torch.float64))
    shift = torch.cat([number * torch.ones_like(p).reshape(-1) for number, p in zip(d, params, strict=True)])
    by_name = {name: number.item() for (name, _), number in zip(module.named_parameters(), d, strict=True)}

    @torch.compile(backend="eager")
    def compiled(vector: torch.Tensor) -> Any:
        vector = 2 * vector
        return ggn.damped(by_name) @ vector + 1, diagonal.solve(vector, list(d)), diagonal.damped(list(d)).solve(vector)

    vector = torch.randn(len(matrix), dtype=torch.float64)
    product, *solutions = compiled(vector)
    torch.testing.assert_close(product, 2 * (matrix @ vector + shift * vector) + 1, rtol=1e-8, atol=1e-10)
    for solution in solutions:
        torch.testing.assert_close(solution, 2 * vector / (matrix.diag() + shift), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"damping must be a number, or a list of them; got a tensor of shape \(4,\)"):
        ggn.damped(d)


def test_a_part_of_the_parameters() -> None:
    """Lists, columns, SciPy, and changed parameters."""
    module, loss, params, data = setting(mlp, nn.MSELoss())
    whole = dense(torch_bridge.GGNLinearOperator(module, loss, params, data))
    part = torch_bridge.GGNLinearOperator(module, loss, {"any": params[2], "name": params[0]}, data)
    order = torch.cat([torch.arange(15, 21), torch.arange(12)])
    wanted = whole[order][:, order]
    torch.testing.assert_close(dense(part), wanted, rtol=1e-8, atol=1e-10)
    vector = torch.randn(18, 2, dtype=torch.float64)
    lists = [vector[:6].reshape(2, 3, 2), vector[6:].reshape(3, 4, 2)]
    torch.testing.assert_close((part @ lists)[1], (wanted @ vector)[6:].reshape(3, 4, 2), rtol=1e-8, atol=1e-10)
    scipy = part.to_scipy() @ vector[:, 0].numpy()
    torch.testing.assert_close(torch.from_numpy(scipy), wanted @ vector[:, 0], rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"shape \(18,\) or \(18, K\)"):
        part @ torch.ones(7)
    params[0].data.mul_(2)
    with pytest.raises(RuntimeError, match=r"0.weight have changed"):
        part @ vector


def test_arguments() -> None:
    module, loss, params, data = setting(mlp, nn.MSELoss())
    with pytest.raises(ValueError, match=r"numbers \[1\] are not"):
        torch_bridge.GGNLinearOperator(module, loss, [params[0], nn.Parameter(torch.ones(2))], data)
    with pytest.raises(ValueError, match="at least one batch"):
        torch_bridge.GGNLinearOperator(module, loss, params, [])
    with pytest.raises(TypeError, match=r"data\[0\] must be a pair.*got a Tensor"):
        torch_bridge.GGNLinearOperator(module, loss, params, [torch.ones(2)])


@pytest.mark.parametrize("part", [torch.nn.BatchNorm1d(3), torch.nn.Dropout()])
def test_modules_in_training_mode_are_refused(part: torch.nn.Module) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), part).train()
    data = [(torch.ones(4, 2), torch.ones(4, 3))]
    args = module, torch.nn.MSELoss(), list(module.parameters()), data
    with pytest.raises(NotImplementedError, match=r"training mode: call its eval\(\)"):
        torch_bridge.KFACLinearOperator(*args)
    assert module.training
    module.eval()
    torch_bridge.EFLinearOperator(*args)
    with pytest.raises(TypeError, match=r"torch tensors.*got ndarray"):
        torch_bridge.EFLinearOperator(*args) @ np.ones(9)
    with pytest.raises(TypeError, match=r"data\[0\] must be a pair"):
        torch_bridge.EFLinearOperator(*args[:3], data[0])


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ({"sharing": "reduce"}, "kfac_approx"),
        ({"bias": "joint"}, "separate_weight_and_bias"),
        ({"chunk_size": 2}, "batches of data"),
        ({"key": None}, "seed"),
    ],
)
def test_names_of_ggn_jax_are_refused_with_the_ones_here(option: dict[str, Any], place: str) -> None:
    # The arguments' defaults would take their place.
    module = nn.Linear(2, 3)
    data = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))]
    for kind in (torch_bridge.KFACLinearOperator, torch_bridge.EKFACLinearOperator):
        with pytest.raises(TypeError, match=rf"{next(iter(option))} \(.*{place}"):
            kind(module, nn.CrossEntropyLoss(), list(module.parameters()), data, **option)


def test_one_conversion_for_several_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators at several values of the parameters and for batches of several sizes, of all parameters and of some."""
    module, loss, params, data = setting(mlp, nn.CrossEntropyLoss())
    converted = torch_bridge.ConvertedModule(module, data[0][0])
    monkeypatch.setattr(torch.export, "export", None)
    for chosen in (params, params[2:]):
        for batch in data:
            ours = torch_bridge.GGNLinearOperator(converted, loss, chosen, [batch])
            theirs = curvlinops.GGNLinearOperator(module, loss, chosen, [batch])
            torch.testing.assert_close(dense(ours), dense(theirs), rtol=1e-8, atol=1e-10)
            with torch.no_grad():
                params[0].mul_(1.5)
                params[2].add_(0.1)
    with pytest.raises(ValueError, match="inputs must be like example_inputs"):
        torch_bridge.KFACLinearOperator(converted, loss, params, [(torch.ones(3, 5, dtype=torch.float64), data[0][1])])


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "GGN", "EF", "GGNDiagonal"])
@pytest.mark.by_default("EKFAC")
def test_operators_of_a_part_share_their_compilations(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """At other values of all parameters, those that are constants among them."""
    module, loss, params, data = setting(mlp, nn.CrossEntropyLoss())
    converted, kind = torch_bridge.ConvertedModule(module, data[0][0]), getattr(torch_bridge, f"{name}LinearOperator")
    options = {"fisher_type": "type-2"} if name in ("KFAC", "EKFAC") else {}

    def found(model: Any) -> torch.Tensor:
        return dense(kind(model, loss, params[2:], [data[0]], **options))

    found(converted)
    with torch.no_grad():
        params[0].mul_(1.5)
        params[3].add_(0.1)
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        again = found(converted)
    assert not [record for record in caplog.records if record.getMessage().startswith("Compiling ")]
    torch.testing.assert_close(again, found(module), rtol=1e-10, atol=1e-12)
    if name in ("GGN", "EF"):
        peer = getattr(curvlinops, f"{name}LinearOperator")(module, loss, params[2:], [data[0]])
        torch.testing.assert_close(again, dense(peer), rtol=1e-8, atol=1e-10)


def test_a_conversion_does_not_depend_on_settings_of_jax() -> None:
    """In float64, where JAX's own types are of 32 bits."""
    module, loss, params, data = setting(mlp, nn.MSELoss())
    with jax.enable_x64(False):
        converted = torch_bridge.ConvertedModule(module, data[0][0])
        found = dense(torch_bridge.GGNLinearOperator(converted, loss, params, data))
    wanted = dense(curvlinops.GGNLinearOperator(module, loss, params, data))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda module: module[1].running_mean.add_(1), "1.running_mean"),
        (lambda module: module.train(), "the whole, 0, 1"),
        (lambda module: module.register_module("1", nn.Identity()), "1.num_batches_tracked"),
        (lambda module: module[0].register_parameter("bias", nn.Parameter(torch.ones(3))), "0.bias"),
        (lambda module: module[0].register_parameter("bias", None), "0.bias"),
        (lambda module: setattr(module[1], "eps", 0.1), "1.eps"),
        (lambda module: setattr(module[0], "forward", torch.tanh), "0.forward"),
        (lambda module: module[0].register_forward_hook(lambda part, args, output: 2 * output), "0.forward_hooks"),
        (lambda module: module.register_forward_pre_hook(lambda part, args: None), "forward_pre_hooks"),
        (lambda module: module[0].register_full_backward_hook(lambda part, *grads: None), "0.backward_hooks"),
        (lambda module: module[0].weight.register_hook(lambda grad: 2 * grad), "hooks of 0.weight"),
    ],
    ids=["buffer", "mode", "part", "parameter", "less", "number", "function", "hook", "pre-hook", "backward", "tensor"],
)
def test_a_conversion_of_a_module_that_changed_is_refused(change: Callable[[Any], Any], what: str) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    converted = torch_bridge.ConvertedModule(module, torch.ones(2, 4))
    assert list(converted.params()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    change(module)
    with pytest.raises(RuntimeError, match=rf"{what}.*changed or were replaced.*convert it again"):
        converted.params()


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.config.update(gain=2.0),
        lambda module: module.shift.fill_(1.0),
        lambda module: setattr(module, "shift", torch.ones(())),
        lambda module: setattr(type(module), "power", 3),
    ],
    ids=["dict", "tensor", "another tensor", "class"],
)
def test_constants_that_changed_after_a_conversion(change: Callable[[Any], Any]) -> None:
    class Scaled(nn.Module):
        power = 2

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.config, self.shift = nn.Linear(4, 3), {"gain": 1.0}, torch.zeros(())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.config["gain"] * self.linear(x) + self.shift) ** self.power

    module = Scaled()
    converted = torch_bridge.ConvertedModule(module, torch.ones(2, 4))
    module(torch.ones(3, 4)).sum().backward()
    assert len(converted.params()) == 2
    change(module)
    with pytest.raises(RuntimeError, match=r"(config|shift|power).*changed or were replaced"):
        converted.params()


@pytest.mark.parametrize("places", [[[0, 5]], [[-1, 0]], [[2**33, 1]]])
def test_places_that_a_table_does_not_have(places: list[list[int]]) -> None:
    """Torch refuses them; here they give NaN, none of them another row."""
    module = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    model_fn, params = torch_bridge.from_module(module, torch.tensor([[0, 1], [2, 3]]))
    assert np.isnan(model_fn(params, jax.numpy.asarray(places))).all()


@pytest.mark.parametrize("name", ["GGN", "KFAC", "EKFAC", "GGNDiagonal"])
@pytest.mark.by_default("EKFAC")
def test_progress(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Batch by batch, with a bar, to the same matrix; also for what is drawn."""
    args = setting(mlp, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]).double()))
    kind, fits = getattr(torch_bridge, f"{name}LinearOperator"), {"rtol": 1e-9, "atol": 1e-12}
    found = dense(kind(*args, progress=True))
    bar = {"KFAC": "factors", "EKFAC": "corrections", "GGNDiagonal": "diagonal"}.get(name, "products")
    assert f"{bar}: 100%" in capfd.readouterr().err
    torch.testing.assert_close(found, dense(kind(*args)), **fits)
    if name == "GGN":
        whole = [tuple(map(torch.cat, zip(*args[3], strict=True)))]  # whose means are of single batches
        theirs = curvlinops.GGNLinearOperator(*args[:3], whole)
        torch.testing.assert_close(found, dense(theirs), **fits)
    if name in ("GGN", "GGNDiagonal"):
        drawn = [dense(kind(*args, mc_samples=2, progress=progress)) for progress in (True, False)]
        torch.testing.assert_close(*drawn, **fits)


def test_what_has_no_progress() -> None:
    module, _, params, data = setting(mlp, nn.BCEWithLogitsLoss())
    weighted = nn.BCEWithLogitsLoss(weight=torch.rand(5, 1).double())
    data = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    with pytest.raises(ValueError, match=r"something for each example.*leave progress out"):
        torch_bridge.EFLinearOperator(module, weighted, params, data, progress=True)
    torch_bridge.EFLinearOperator(module, weighted, params, data)
    with pytest.raises(NotImplementedError, match=r"mask is of all data.*leave progress out"):
        torch_bridge.KFACLinearOperator(module, nn.MSELoss(), params, data, mask=torch.ones(5, 1), progress=True)


@pytest.mark.sweep
def test_a_mask() -> None:
    """Of real inputs, as a tensor; others are left out of the input factors."""
    torch.manual_seed(0)
    module, x, y = nn.Linear(4, 2).double(), torch.randn(3, 5, 4).double(), torch.randn(3, 5, 2).double()
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    kfac = torch_bridge.KFACLinearOperator(module, nn.MSELoss(), list(module.parameters()), [(x, y)], mask=mask)
    torch.testing.assert_close(kfac.factors()["weight"][1], x[mask].T @ x[mask] / 10, rtol=1e-10, atol=1e-12)


def test_what_may_change_after_a_conversion() -> None:
    """What calls of the module and of `compile` leave behind."""

    class Keeping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = super().forward(x)
            return self.last

    module = nn.Sequential(Keeping(4, 3), nn.Tanh())
    converted = torch_bridge.ConvertedModule(module, torch.ones(2, 4))
    module(torch.ones(5, 4)).sum().backward()
    module.compile()
    assert len(converted.params()) == 2


def test_a_failure_in_evaluation_mode_too_is_not_put_down_to_training() -> None:
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="autocast is on") as found:
        torch_bridge.ConvertedModule(nn.Linear(4, 3).train(), torch.ones(2, 4))
    assert "eval()" not in str(found.value)
