"""Modules in training mode: statistics of the batch, new buffers, and dropout with a key."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_cases import draw
from torch import nn

import torch_bridge


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3, momentum=0.3)
    ).double()


def test_batch_normalisation() -> None:
    """Value, gradients and statistics of two calls, the second one with the buffers of the first; and the module."""
    module, x = normalised(), draw(5, 1, 3, 3)
    state = copy.deepcopy(module.state_dict())
    model_fn, params = torch_bridge.from_module(module, x, train=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())

    @jax.jit
    def run(params: Any, buffers: Any, x: Any) -> Any:
        def objective(params: Any) -> Any:
            outputs, new = model_fn({**params, **buffers}, x)
            return jnp.sum(outputs**3), (outputs, new)

        return jax.grad(objective, has_aux=True)(params)

    buffers = {name: jax.device_put(buffer.numpy()) for name, buffer in module.named_buffers()}
    for size in (5, 4):
        grads, (outputs, buffers) = run(params, buffers, jax.device_put(x[:size].numpy()))
        wanted = module.train()(x[:size])
        theirs = torch.autograd.grad((wanted**3).sum(), list(module.parameters()))
        np.testing.assert_allclose(outputs, wanted.detach(), rtol=1e-10)
        for name, grad in zip(params, theirs, strict=True):
            np.testing.assert_allclose(grads[name], grad, rtol=1e-10, atol=1e-10, err_msg=name)
        assert buffers.keys() == dict(module.named_buffers()).keys()
        for name, buffer in module.named_buffers():
            np.testing.assert_allclose(buffers[name], buffer, rtol=1e-10, err_msg=name)
    with pytest.raises(ValueError, match="more than one value per channel"):
        jax.eval_shape(model_fn, params, jax.device_put(x[:1].numpy()))


def test_buffers_of_ones_own() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2).double()
            self.register_buffer("count", torch.tensor(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 3
            return self.linear(x) * self.count

    module, x = Counts(), draw(3, 4)
    model_fn, params = torch_bridge.from_module(module, x, train=True)
    outputs, buffers = model_fn(params, jax.device_put(x.numpy()))
    np.testing.assert_allclose(outputs, module(x).detach(), rtol=1e-10)
    assert buffers == {"count": 5}


class Noisy(nn.Module):
    """Dropouts of ones: of entries, twice, of whole channels, of attention's weights, and between recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Dropout(0.25), nn.Dropout(0.25), nn.Dropout2d(0.5)])
        self.scale = nn.Parameter(torch.ones(()))
        self.recurrent = nn.RNN(5, 5, num_layers=2, nonlinearity="relu", dropout=0.4, batch_first=True, bias=False)
        with torch.no_grad():  # both layers are the identity
            for name, weight in self.recurrent.named_parameters():
                weight.copy_(torch.eye(5) * ("ih" in name))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x * self.scale
        dropped = [part(x) for part in self.parts]
        weights = nn.functional.scaled_dot_product_attention(0 * x, 0 * x, torch.eye(5), dropout_p=0.1)
        return [*dropped, 5 * weights, self.recurrent(x[:, 0])[0]]


def test_dropout() -> None:
    model_fn, params = torch_bridge.from_module(Noisy(), torch.ones(2, 3, 5, 5), train=True)
    run = jax.jit(model_fn)
    ones = jnp.ones((200, 3, 5, 5), jnp.float32)
    outputs, buffers = run(params, ones, key=jax.random.key(0))
    assert not buffers
    first, second, channels, *others = outputs
    for part, p in zip([first, second, channels[:, :, 0, 0], *others], (0.25, 0.25, 0.5, 0.1, 0.4), strict=True):
        kept = np.asarray(part) != 0
        np.testing.assert_allclose(np.asarray(part)[kept], 1 / (1 - p), rtol=1e-6)
        # Hoeffding: outside of this with a probability below 1e-6.
        assert abs(np.mean(kept) - (1 - p)) < np.sqrt(np.log(2e6) / 2 / kept.size)
    assert np.array_equal(channels, np.broadcast_to(channels[:, :, :1, :1], channels.shape))
    assert not np.array_equal(first, second)
    again, other = (run(params, ones, key=jax.random.key(seed))[0][0] for seed in (0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(NotImplementedError, match=r"'parts.0': it is random.*key=\.\.\."):
        model_fn(params, ones)


def test_dropout_beside_batch_normalisation() -> None:
    """In the graph of modules that change buffers, dropout is another operator."""
    module, x = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).double(), draw(6, 4)
    model_fn, params = torch_bridge.from_module(module, x, train=True)
    outputs, _ = model_fn(params, jax.device_put(x.numpy()), key=jax.random.key(0))
    wanted = 2 * module.train()[0](x).detach().numpy()
    np.testing.assert_allclose(outputs, np.where(np.asarray(outputs) == 0, 0, wanted), rtol=1e-10)
    assert 0 < np.mean(np.asarray(outputs) == 0) < 1


@pytest.mark.parametrize("make", [lambda: nn.AlphaDropout(0.5), lambda: nn.RReLU()], ids=["alpha", "rrelu"])
def test_what_else_is_random_is_refused(make: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"alpha_dropout|rrelu"):
        torch_bridge.from_module(make(), torch.ones(3, 4), train=True)
