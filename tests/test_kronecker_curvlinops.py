"""KFAC and EKFAC against curvlinops."""

from collections.abc import Callable
from typing import Any

import curvlinops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from designs import covering
from jax.flatten_util import ravel_pytree
from kronecker_cases import EKFAC, KFAC, normal

import ggn_jax

# The networks that curvlinops knows, and the same in JAX with torch's own parameters.
# Functions of the module: what is compiled for one case serves the others.


def mlp(p: list[jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p[0].T + p[1][None]) @ p[2].T + p[3][None]


def cnn(p: list[jax.Array], x: jax.Array) -> jax.Array:
    x = jax.lax.conv_general_dilated(x, p[0], (1, 2), ((1, 1), (1, 1))) + p[1][None, :, None, None]
    return jnp.tanh(x).reshape(x.shape[0], -1) @ p[2].T + p[3][None]


def torch_mlp() -> tuple[torch.nn.Module, Callable[[Any, jax.Array], jax.Array], torch.Tensor]:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    return net.double(), mlp, torch.randn(6, 3, dtype=torch.float64)


def torch_cnn() -> tuple[torch.nn.Module, Callable[[Any, jax.Array], jax.Array], torch.Tensor]:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=1),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(3 * 5 * 3, 3),
    )
    return net.double(), cnn, torch.randn(6, 2, 5, 5, dtype=torch.float64)


LOSSES = {"CrossEntropyLoss": 0, "MSELoss": 1, "BCEWithLogitsLoss": 2}


@pytest.mark.filterwarnings("ignore")
@covering(
    2,
    make=[torch_mlp, torch_cnn],
    loss=LOSSES,
    reduction=["mean", "sum"],
    fisher_type=["type-2", "empirical", "forward-only"],
    sharing=["expand", "reduce"],
    separate=[True, False],
)
@pytest.mark.by_default(
    "torch_cnn-CrossEntropyLoss-mean-type-2-reduce-False",
    "torch_mlp-BCEWithLogitsLoss-mean-empirical-expand-True",
    "torch_mlp-MSELoss-sum-forward-only-expand-True",
)
def test_curvlinops(make: Any, loss: str, reduction: str, fisher_type: str, sharing: Any, separate: bool) -> None:
    torch.manual_seed(0)
    net, model_fn, inputs = make()
    targets = [torch.arange(6) % 3, torch.randn(6, 3).double(), torch.rand(6, 3).double().round()][LOSSES[loss]]
    params = list(net.parameters())
    options = {"check_deterministic": False, "kfac_approx": sharing, "separate_weight_and_bias": separate}
    theirs = {
        cls: cls(
            net,
            getattr(torch.nn, loss)(reduction=reduction),
            params,
            [(inputs, targets)],
            fisher_type=fisher_type,
            **options,
        )
        for cls in ([curvlinops.KFACLinearOperator] if fisher_type == "forward-only" else THEIRS)
    }
    ours = [jax.device_put(p.detach().numpy()) for p in params]
    batch = jax.device_put(inputs.numpy()), jax.device_put(targets.numpy())
    for their_cls, operator in theirs.items():
        cls = KFAC if their_cls is curvlinops.KFACLinearOperator else EKFAC
        mine = cls(
            model_fn,
            getattr(ggn_jax, loss)(reduction=reduction),
            ours,
            batch,
            fisher_type=fisher_type,
            sharing=sharing,
            bias="separate" if separate else "joint",
        )
        if cls is EKFAC and sharing == "reduce":
            # Averaged inputs of 6 data leave eigenvectors undetermined, but not the sum over them.
            np.testing.assert_allclose(mine.trace(), operator.trace.item(), rtol=1e-10)
            continue
        vector = normal(sum(p.size for p in ours))
        expected = (operator @ torch.from_numpy(np.array(vector))).detach().numpy()
        product = ravel_pytree(mine.mv(ravel_pytree(ours)[1](vector)))[0]
        np.testing.assert_allclose(product, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


THEIRS = [curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator]
