"""The optimizer on meshes of many devices, and in several processes: each test starts its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiling import flags

import ggn_jax

COMMON = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import ggn_jax

def model_fn(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return x

sizes = [3, 9, 4, 5]
params = {
    f"w{i}": np.random.default_rng(i).normal(size=(a, b)).astype(np.float32)
    for i, (a, b) in enumerate(zip(sizes, sizes[1:]))
}
x = np.random.default_rng(9).normal(size=(16, 3)).astype(np.float32)
y = np.arange(16) % 5
loss = ggn_jax.CrossEntropyLoss()

def train(mesh, params, batch, compiled=True, **options):
    optimizer = ggn_jax.kfac(
        model_fn, loss, 0.1, damping=0.1, example_inputs=jax.ShapeDtypeStruct((2, 3), jnp.float32), mesh=mesh, **options
    )

    @jax.jit
    def steps(params, state, batch):
        def step(carry, t):
            params, state = carry
            value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=jax.random.key(t))
            updates, state = optimizer.update(grads, state, params, factors=factors)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jnp.arange(3))[0][0]

    state = (jax.jit(optimizer.init) if compiled else optimizer.init)(params)
    params = steps(params, state, batch)
    return {name: np.asarray(leaf.addressable_data(0)).tolist() for name, leaf in params.items()}
"""

DEVICES = """
from ggn_jax.kronecker.linalg import batched
from ggn_jax.optimizer.spread import Spread

result = {"counts": {}, "sent": {}}
for n in (1, 2, 4, 8):
    mesh = Mesh(np.array(jax.devices()[:n]), ("data",))
    batch = jax.device_put((jnp.asarray(x), jnp.asarray(y)), NamedSharding(mesh, P("data")))
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    if n == 8:  # two devices are those of two processes
        result["params"] = train(mesh, placed, batch)
    counts = [0] * n

    def count(device):
        counts[int(device)] += 1

    def fn(matrix):
        try:
            jax.debug.callback(count, jax.lax.axis_index("data"))
        except NameError:
            pass  # outside of the mesh, only the shapes of the results are asked for
        return (jnp.linalg.inv(matrix),)

    spread = Spread(mesh)
    matrices = spread.pad(jnp.eye(6) * jnp.arange(1, 13)[:, None, None])
    everywhere = jax.device_put(matrices, NamedSharding(mesh, P()))
    compiled = jax.jit(spread.shard).lower(everywhere).compile()
    pieces = compiled(everywhere)
    assert np.array_equal(pieces, matrices) and pieces.addressable_shards[0].data.shape[0] == -(-12 // n)
    result["sent"][n] = [word for word in ("all-", "collective-", "reduce-scatter") if word in compiled.as_text()]
    (found,) = jax.jit(lambda x: spread.map_shards(partial(batched, fn), x))([matrices])
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert np.allclose(found[0][:12] * jnp.arange(1, 13)[:, None, None], np.eye(6))
    result["counts"][n] = counts
result["alone"] = train(None, params, (x, y))
"""

WORK = """
import re
from jax.sharding import AxisType

def images(params, x):
    for name in ("k1", "k2"):
        x = jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ params["w"]

def tokens(params, x):
    return jnp.tanh(params["e"][x] @ params["u"]) @ params["w"]

def normal(*shape):
    return jax.device_put(np.random.default_rng(0).normal(size=shape).astype(np.float32))

N = 40  # not a power of two: chunks of images do not fill devices evenly
models = {
    "images": (images, {"k1": normal(3, 3, 1, 16), "k2": normal(3, 3, 16, 32), "w": normal(1568, 3)}),
    "tokens": (tokens, {"e": normal(50, 32), "u": normal(32, 32), "w": normal(32, 3)}),
}
inputs = {"images": normal(N, 28, 28, 1), "tokens": jnp.arange(N * 64).reshape(N, 64) % 50}
key = jax.random.key(1)
collectives = "all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast|all-reduce"
for name, (model, params) in models.items():
    x = inputs[name]
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1)
    y = jax.device_put(np.arange(N) % 3) if name == "images" else x % 3
    args = model, loss
    mask = {"mask": x % 7 > 0} if name == "tokens" else {}
    chunks = {"chunk_size": 16}  # and a rest of 8
    optimizers = [ggn_jax.kfac(model, loss, 0.1, damping=0.1, example_inputs=x, **given) for given in ({}, chunks)]
    state = optimizers[0].init(params)
    passes = [o.value_and_grad_and_factors for o in optimizers]
    functions = {
        "mc-chunked": lambda p, b, m: ggn_jax.KFACLinearOperator(*args, p, b, key=key, **chunks, **m).blocks,
        "ggn-chunked": lambda p, b, m: ggn_jax.GGNLinearOperator(*args, p, b, **chunks).mv(p),
        "pass-chunked": lambda p, b, m: passes[1](p, (*b, *m.values()), state, key=key),
        "mc": lambda p, b, m: ggn_jax.KFACLinearOperator(*args, p, b, key=key, mc_samples=3, **m).blocks,
        "empirical": lambda p, b, m: ggn_jax.KFACLinearOperator(*args, p, b, fisher_type="empirical", **m).blocks,
        "ggn": lambda p, b, m: ggn_jax.GGNLinearOperator(*args, p, b).mv(p),
        "diagonal": lambda p, b, m: ggn_jax.GGNDiagonalLinearOperator(*args, p, b, mc_samples=1, key=key).entries,
        "data": lambda p, b, m: ggn_jax.GGNDiagonalLinearOperator(
            *args, p, b, mc_samples=1, key=key, method="data"
        ).entries,
        "pass": lambda p, b, m: passes[0](p, (*b, *m.values()), state, key=key),
    }
    for what in asked[name]:
        fn = functions[what]
        for n in (1, 8):
            mesh = Mesh(np.array(jax.devices()[:n]), ("data",))
            batch, m = jax.device_put(((x, y), mask), NamedSharding(mesh, P("data")))
            compiled = jax.jit(fn).lower(jax.device_put(params, NamedSharding(mesh, P())), batch, m).compile()
            cost = compiled.cost_analysis()
            found = re.findall(rf" ({collectives})(?:-start)?\\(", compiled.as_text())
            result[f"{name}-{what}-{n}"] = [cost["flops"], sorted(set(found))]
print(json.dumps(result))
"""

# Between both models, each function, and what images and what tokens have of their own. By default: products in
# chunks of a convolution, factors with a mask, and the optimizer's pass in chunks.
ASKED = {"images": ["ggn-chunked"], "tokens": ["empirical", "pass-chunked"]}
SWEPT = {"images": ["mc", "ggn", "diagonal"], "tokens": ["ggn", "diagonal", "data", "pass", "mc-chunked"]}

CONNECT = """
import sys, jax
number, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
"""

PROCESS = """
assert jax.process_count() == 2
mesh = Mesh(np.array(jax.devices()), ("data",))
half = slice(8 * number, 8 * number + 8)
batch = tuple(jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), part[half]) for part in (x, y))
everywhere = NamedSharding(mesh, P())
placed = {name: jax.make_array_from_process_local_data(everywhere, leaf) for name, leaf in params.items()}
# A state that is made outside of `jit` is put on all devices of the mesh.
result = [train(mesh, placed, batch, compiled=False)] if "auto" in sys.argv else []
explicit = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
batch = tuple(jax.make_array_from_process_local_data(NamedSharding(explicit, P("data")), part[half]) for part in (x, y))
everywhere = NamedSharding(explicit, P())
placed = {name: jax.make_array_from_process_local_data(everywhere, leaf) for name, leaf in params.items()}
if "inferred" in sys.argv:
    result.append(train(None, placed, batch, compiled=False))
with jax.set_mesh(explicit):  # a compiled `init` uses no value of the parameters, which would name the mesh
    if "explicit" in sys.argv:
        result.append(train(explicit, placed, batch))
print(json.dumps(result))
"""


def environment(devices: int) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    return env | {
        "PYTHONPATH": str(Path(ggn_jax.__path__[0]).parent),
        "XLA_FLAGS": flags(devices),
        "JAX_PLATFORMS": "cpu",
    }


def start(script: str, devices: int, cwd: Path, *args: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script, *args]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment(devices))


def finish(process: subprocess.Popen[str]) -> Any:
    with process:  # closes its pipes
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.strip().splitlines()[-1])


def assert_close(a: Any, b: Any) -> None:
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory: pytest.TempPathFactory) -> Any:
    asked = f"asked = {ASKED}\n"
    return finish(start(COMMON + DEVICES + asked + WORK, 8, tmp_path_factory.mktemp("devices")))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    asked = f"result, asked = {{}}, {SWEPT}\n"
    return finish(start(COMMON + asked + WORK, 8, tmp_path_factory.mktemp("swept")))


def test_steps_are_those_of_one_device(on_devices: Any) -> None:
    assert_close(on_devices["params"], on_devices["alone"])


def test_each_device_inverts_its_share(on_devices: Any) -> None:
    """Of 12 matrices; what fills up the devices is inverted too."""
    assert on_devices["counts"] == {str(n): [-(-12 // n)] * n for n in (1, 2, 4, 8)}


def test_devices_take_their_shares_of_what_they_have(on_devices: Any) -> None:
    """Nothing is sent."""
    assert on_devices["sent"] == {str(n): [] for n in (1, 2, 4, 8)}


def check_work(found: Any, name: str) -> None:
    """Of a batch that is sharded: no activation leaves its device, and a chunk has examples of each."""
    (alone, none), (shared, collectives) = (found[f"{name}-{n}"] for n in (1, 8))
    assert none == []
    assert collectives == ["all-reduce"]
    assert shared < 1.1 * alone / 8


@pytest.mark.parametrize("name", [f"{model}-{what}" for model in ASKED for what in ASKED[model]])
def test_devices_share_the_work_and_exchange_sums_only(on_devices: Any, name: str) -> None:
    check_work(on_devices, name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [f"{model}-{what}" for model in SWEPT for what in SWEPT[model]])
def test_devices_share_more_of_the_work(swept: Any, name: str) -> None:
    check_work(swept, name)


# How the mesh comes: given, with automatic and with explicit axes; and found at the parameters.
@pytest.mark.parametrize("ways", [("auto", "explicit"), pytest.param(("inferred",), marks=pytest.mark.sweep)])
def test_two_processes(on_devices: Any, ways: tuple[str, ...], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(CONNECT + COMMON + PROCESS, 1, tmp_path, str(number), str(port), *ways) for number in range(2)]
    try:
        first, second = [finish(process) for process in processes]
    finally:
        for process in processes:
            with process:
                process.kill()
    assert len(first) == len(ways)
    assert first == second
    for params in first:
        assert_close(params, on_devices["alone"])
