"""Batches that are mappings, as Hugging Face's loaders give them, against curvlinops and closed forms."""

from collections import UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import curvlinops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_cases import draw
from oracles import dense_ggn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ggn_jax
import torch_bridge

LOSS = nn.CrossEntropyLoss()


class Encoding(UserDict):  # type: ignore[type-arg]
    """As Hugging Face's `BatchEncoding`: entries are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Classifier(nn.Module):
    """As Hugging Face's: keyword arguments, one of them the labels; a mapping as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 2)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        mask = attention_mask[..., None].double()
        states = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        logits = self.head(torch.tanh(states))
        return Encoding({"logits": logits} if labels is None else {"loss": LOSS(logits, labels), "logits": logits})


class OfOneMapping(nn.Module):
    """As curvlinops and laplace-torch call a module: with the mapping itself."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, data: Any) -> torch.Tensor:
        return self.module(data.input_ids, data.attention_mask).logits


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return Classifier().double()


def encoding(n: int, seed: int) -> Encoding:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (n, 4), generator=generator)
    lengths = torch.randint(1, 5, (n, 1), generator=generator)
    labels = torch.randint(0, 2, (n,), generator=generator)
    return Encoding(input_ids=ids, attention_mask=(torch.arange(4) < lengths).long(), labels=labels)


BATCHES = [encoding(3, 1), encoding(2, 2)]


def inputs_of(batch: Encoding) -> Encoding:
    return Encoding({name: value for name, value in batch.items() if name != "labels"})


def dense(operator: Any) -> torch.Tensor:
    return (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).detach()


@pytest.mark.parametrize(
    "form",
    [
        lambda batch: batch,
        lambda batch: dict(batch),
        lambda batch: MappingProxyType(dict(batch)),
        lambda batch: (inputs_of(batch), batch.labels),
        lambda batch: (batch, batch.labels),  # as laplace-torch has it; the module computes its own loss beside
    ],
    ids=["encoding", "dict", "mapping", "pair", "pair with labels"],
)
@pytest.mark.by_default("encoding", "dict")
def test_forms_of_batches(form: Callable[[Encoding], Any]) -> None:
    module = classifier()
    ours = torch_bridge.GGNLinearOperator(module, LOSS, list(module.parameters()), [form(batch) for batch in BATCHES])
    torch.testing.assert_close(dense(ours), ggn_of_curvlinops(module), rtol=1e-8, atol=1e-10)
    assert sorted(BATCHES[0]) == ["attention_mask", "input_ids", "labels"]


def ggn_of_curvlinops(module: nn.Module) -> torch.Tensor:
    wrapped = OfOneMapping(module)
    data, size = [(batch, batch.labels) for batch in BATCHES], lambda batch: len(batch["input_ids"])
    return dense(curvlinops.GGNLinearOperator(wrapped, LOSS, list(wrapped.parameters()), data, batch_size_fn=size))


def test_modules_of_one_mapping() -> None:
    """It keeps its class; what the keys are called decides."""
    module = OfOneMapping(classifier())
    args = LOSS, list(module.parameters()), [(batch, batch.labels) for batch in BATCHES]
    ours = torch_bridge.GGNLinearOperator(module, *args)
    torch.testing.assert_close(dense(ours), ggn_of_curvlinops(module.module), rtol=1e-8, atol=1e-10)
    model_fn, params = torch_bridge.from_module(module, inputs_of(BATCHES[0]))
    for kind in (dict, Encoding):
        inputs = kind({name: jax.device_put(x.numpy()) for name, x in inputs_of(BATCHES[1]).items()})
        wanted = module(BATCHES[1]).detach()
        np.testing.assert_allclose(model_fn(params, inputs), wanted, rtol=1e-10)


@pytest.mark.sweep
def test_optimizer() -> None:
    """Where the Kronecker product is the Hessian, one undamped step of length 1 solves the problem."""

    class Regression(nn.Linear):
        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> Any:
            return {"logits": super().forward(x - shift)}

    torch.manual_seed(0)
    module = Regression(4, 3).double()
    x, shift, y = draw(20, 4), draw(20, 1), draw(20, 3)
    options = {"momentum": None, "kl_clip": None, "fisher_type": "type-2", "damping_method": "exact"}
    optimizer = torch_bridge.KFAC(module, nn.MSELoss(), lr=1.0, damping=0.0, **options)
    optimizer.step(Encoding(x=x, shift=shift, labels=y))
    solution = torch.linalg.lstsq(torch.cat([x - shift, torch.ones(20, 1)], 1), y).solution
    torch.testing.assert_close(module.weight.detach(), solution[:4].T, rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match=r"batch is a dict with \['x', 'shift'\].*'labels'"):
        optimizer.step({"x": x, "shift": shift})
    with pytest.raises(ValueError, match="structure of example_inputs"):
        optimizer.step({"x": x, "labels": y})


def test_what_is_refused() -> None:
    module, batch = classifier(), dict(BATCHES[0])
    args = module, LOSS, list(module.parameters())

    def made(*data: Any) -> Any:
        return torch_bridge.EFLinearOperator(*args, data)

    with pytest.raises(TypeError, match=r"iterable of batches, as a DataLoader or a list \[batch\] is; got a Encoding"):
        torch_bridge.EFLinearOperator(*args, BATCHES[0])
    with pytest.raises(TypeError, match=r"data\[1\] is a Encoding with \['input_ids', 'attention_mask'\]"):
        made(BATCHES[0], inputs_of(BATCHES[1]))
    with pytest.raises(TypeError, match=r"forward\(input_ids.*does not take keyword arguments.*'idx'.*leave out"):
        made(batch | {"idx": torch.arange(3)})
    with pytest.raises(TypeError, match=r"data\[0\]\['text'\]\[0\] must be a tensor; got str"):
        made(batch | {"text": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="must be alike but for their sizes"):
        made(batch, {"input_ids": batch["input_ids"], "labels": batch["labels"]})
    with pytest.raises(ValueError, match="must be alike but for their sizes"):
        made(batch, batch | {name: batch[name][:, :2] for name in ("input_ids", "attention_mask")})


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda y: {"more": y, "states": y}, r"a dict with \['more', 'states'\].*wrap it in a module"),
        (lambda y: (y, y), "returns a tuple"),
        (lambda y: None, "returns a NoneType"),
    ],
    ids=["dict", "tuple", "none"],
)
def test_outputs_that_no_loss_is_of(outputs: Callable[[torch.Tensor], Any], message: str) -> None:
    class Several(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return outputs(super().forward(x))

    module, batch = Several(4, 2).double(), (draw(3, 4), draw(3, 2))
    with pytest.raises(TypeError, match=message):
        torch_bridge.GGNLinearOperator(module, nn.MSELoss(), list(module.parameters()), [batch])
    with pytest.raises(TypeError, match=message):
        torch_bridge.KFAC(module, nn.MSELoss(), lr=0.1).step(batch)


def test_loaders_of_torch_for_operators_of_jax() -> None:
    """A `DataLoader` as it is, with tensors that share memory; mappings by a function, as often as they are wanted."""
    inputs, targets = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    args = (lambda w, x: jnp.tanh(x @ w)), ggn_jax.CrossEntropyLoss(), jax.device_put(draw(3, 2).numpy())
    exact = dense_ggn(*args, (inputs.numpy(), targets.numpy()))
    rows = ggn_jax.map_batches(lambda row: (row["x"], row["label"]), [{"x": x, "label": y} for x, y in loader])
    assert len(rows) == 2
    assert repr(rows) == "MappedBatches(<lambda>, list)"
    for batches in (loader, rows):
        np.testing.assert_allclose(
            ggn_jax.GGNLinearOperator.from_batches(*args, batches).as_matrix(), exact, atol=1e-14
        )
    with pytest.raises(TypeError, match=r"batch 0: inputs must be .* got Tensor"):
        ggn_jax.GGNLinearOperator.from_batches(*args, [(inputs.clone().requires_grad_(), targets)])
    with pytest.raises(TypeError, match="which can be gone over again; got list_iterator"):
        ggn_jax.map_batches(list, iter([]))
    with pytest.raises(TypeError, match="fn must be a function of one batch; got list"):
        ggn_jax.map_batches([], list)  # type: ignore[arg-type]
