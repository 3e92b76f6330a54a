"""The optimizer on several devices: the same steps, with inverses and state divided among them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizer_cases import (
    CE,
    KEY,
    assert_close,
    batch_of,
    gradient,
    mlp,
    mlp_params,
    normal,
)

import ggn_jax
from ggn_jax.kronecker.linalg import batched
from ggn_jax.optimizer.spread import Spread


def mesh_of(size: int) -> Mesh:
    if len(jax.devices()) < size:
        pytest.skip(f"needs {size} devices, here are {len(jax.devices())}")
    return Mesh(np.array(jax.devices()[:size]), ("data",))


@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"staggered": True, "inverse_interval": 2}])
@pytest.mark.sweep
def test_sharded_batch_and_shared_inverses_give_the_same_steps(options: Any) -> None:
    mesh = mesh_of(2)
    batch = batch_of()
    sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(mlp_params(), NamedSharding(mesh, P()))

    def run(optimizer: Any, params: Any, batch: Any) -> Any:
        @jax.jit
        def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
            _, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
            updates, state = optimizer.update(grads, state, params, factors=factors)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        places = jax.tree.map(lambda x: x.sharding.device_set, state.curvature)
        for t in range(3):
            params, state = step(params, state, batch, jax.random.key(t))
        if optimizer._core.settings.mesh is not None:  # what `init` made is where the steps leave it
            assert jax.tree.map(lambda x: x.sharding.device_set, state.curvature) == places
        return params

    make = partial(ggn_jax.kfac, mlp, CE, 0.1, damping=0.1, example_inputs=batch[0], **options)
    wanted = run(make(), mlp_params(), batch)
    assert_close(run(make(mesh=mesh), params, sharded), wanted, 1e-8)
    if not options:
        assert_close(run(make(), params, sharded), wanted, 1e-8)


def test_each_device_factorises_its_share() -> None:
    spread = Spread(mesh_of(2))
    matrices = [normal(i, 1 + i % 2, n, n) for i, n in enumerate((5, 3, 5, 8))]
    matrices = [m @ jnp.swapaxes(m, 1, 2) for m in matrices]
    padded = spread.pad(matrices)
    assert [m.shape[0] for m in padded] == [2, 2, 2, 2]
    calls: list[int] = []

    def fn(x: jax.Array) -> tuple[jax.Array, ...]:
        jax.debug.callback(lambda _: calls.append(x.shape[-1]), x[0, 0])
        return tuple(jnp.linalg.eigh(x))

    shared = jax.jit(lambda matrices: spread.map_shards(partial(batched, fn), matrices))(padded)
    jax.effects_barrier()
    assert sorted(calls) == [3, 3, 5, 5, 5, 5, 8, 8]  # one of each stack on each device
    for pair, wanted in zip(shared, batched(lambda x: tuple(jnp.linalg.eigh(x)), matrices), strict=True):
        assert_close([part[: len(whole)] for part, whole in zip(pair, wanted, strict=True)], list(wanted), 1e-10)
        assert all(len(part.sharding.device_set) == 2 for part in pair)


def test_each_device_holds_its_share_of_the_state() -> None:
    """Eight layers of one shape on two devices: four factors of each kind on each."""
    mesh = mesh_of(2)
    params = jax.device_put({"layers": [{"w": normal(i, 4, 4)} for i in range(8)]}, NamedSharding(mesh, P()))

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"])
        return x

    batch = jax.device_put((normal(9, 6, 4), jax.device_put(np.arange(6) % 4)), NamedSharding(mesh, P("data")))
    optimizer = ggn_jax.kfac(model_fn, CE, 0.1, example_inputs=batch[0], mesh=mesh, damping=0.1)
    state = optimizer.init(params)
    grads = gradient(model_fn, CE, params, batch)
    _, state = jax.jit(optimizer.update)(grads, state, params, batch=batch, key=KEY)
    for leaf in jax.tree.leaves((state.curvature.blocks, state.curvature.inverses)):
        assert leaf.shape in [(8, 4, 4), (8, 5, 2)]  # averages are packed
        assert [shard.data.shape for shard in leaf.addressable_shards] == [(4, *leaf.shape[1:])] * 2
