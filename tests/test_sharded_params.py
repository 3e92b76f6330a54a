"""Parameters sharded over meshes, each in one axis (FSDP) or over a mesh axis of their own (tensor parallelism).

Results are those of one device, and everything stays sharded.
"""

from typing import Any

import pytest
from test_distributed import finish, start

COMMON = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import ggn_jax

jax.config.update("jax_enable_x64", True)
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
)
kind = AxisType[sys.argv[1]]
sizes = [8, 8, 8, 3]

def model_fn(params, x):
    x = params["e"][x]
    for i in range(len(sizes) - 1):
        x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"][None, None])
    return x

def normal(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape) / np.sqrt(shape[0])

params = {f"w{i}": normal(i, *shape) for i, shape in enumerate(zip(sizes, sizes[1:]))}
params |= {f"b{i}": normal(i, size) for i, size in enumerate(sizes[1:])} | {"e": normal(9, 16, 8)}
tokens = np.arange(32).reshape(16, 2) * 7 % 16
batch = tokens, tokens % 3
loss = ggn_jax.CrossEntropyLoss(class_axis=-1)

def fsdp(mesh, params):
    "Each over the whole mesh, in the first axis that divides."
    def spec(x):
        axis = next((i for i, n in enumerate(x.shape) if n % mesh.size == 0), None)
        return P() if axis is None else P(*[None] * axis, "data")

    return {name: spec(x) for name, x in params.items()}

def tensor(mesh, params):
    "Layers over their outputs and over their inputs, by turns; the embedding over its vocabulary."
    specs = {name: P() for name in params} | {"e": P("model")}
    specs |= {f"w{i}": P("model", None) if i % 2 else P(None, "model") for i in range(2)}
    return specs | {f"b{i}": P("model") for i in (0,)}

def make_mesh(*shape):
    names = ("data", "model")[: len(shape)]
    size = int(np.prod(shape))
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[:size])

def place(mesh, specs):
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs(mesh, params).items()}
    return jax.device_put(params, shardings), jax.device_put(batch, NamedSharding(mesh, P("data")))

def alike(tree, like):
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, y.ndim), tree, like)
    return all(jax.tree.leaves(same))

def error(tree, like):
    def one(x, y):
        x, y = np.asarray(x), np.asarray(y)
        return float(np.abs(x - y).max() / np.abs(y).max())
    return max(jax.tree.leaves(jax.tree.map(one, tree, like)))
"""

TRAIN = """
KINDS = {"kfac": {}, "ekfac": {"ekfac": True}}

def train(params, batch, pinned=False, **options):
    optimizer = ggn_jax.kfac(model_fn, loss, 0.1, damping=0.1, example_inputs=tokens, inverse_interval=2, **options)

    def step(params, state, batch, key):
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, updates

    state = optimizer.init(params)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state, params)) if pinned else None
    step = jax.jit(step, out_shardings=shardings)
    for t, key in enumerate(keys):
        if t == 1:
            jax.block_until_ready(params)
            compiled.clear()
        params, state, updates = step(params, state, batch, key)
    return params, state, updates, len(compiled)

keys = list(jax.random.split(jax.random.key(0), 3))
alone = {name: train(params, batch, **options) for name, options in KINDS.items()}
result = {}
auto = kind is AxisType.Auto
cases = [("fsdp", "ekfac", False, (4,)) if auto else ("fsdp", "kfac", True, (4,))]
cases += [("tensor", "kfac" if auto else "ekfac", True, (2, 4))]
for specs, name, shared, shape in cases:
    mesh = make_mesh(*shape)
    placed, data = place(mesh, globals()[specs])
    # Where the compiler shards, it may choose others than the parameters' for what nothing is said of.
    pinned = auto and (specs == "tensor" or not shared)
    found, state, updates, again = train(placed, data, pinned, **KINDS[name], mesh=mesh if shared else None)
    kept = jax.tree.leaves((state.curvature.blocks, state.curvature.inverses))
    shares = {x.shape[0] // x.addressable_shards[0].data.shape[0] for x in kept}
    result[f"{specs}-{name}-{shape}"] = {
        "error": error((found, state.velocity), (alone[name][0], alone[name][1].velocity)),
        "alike": [alike(tree, placed) for tree in (found, updates, state.velocity)],
        "shares": [sorted(shares), [mesh.size if shared else 1]],
        "again": again,
    }

def products(params, batch, vector):
    kfac = ggn_jax.KFACLinearOperator(model_fn, loss, params, batch, key=keys[0])
    return kfac.mv(vector), ggn_jax.GGNLinearOperator(model_fn, loss, params, batch).mv(vector)

one = jax.device_put(params)
right = jax.jit(products)(one, batch, one)
for specs, shape in ((fsdp, (8,)), (tensor, (2, 4))):
    placed, data = place(make_mesh(*shape), specs)
    pinned = jax.tree.map(lambda x: x.sharding, (placed, placed)) if auto else None
    found = jax.jit(products, out_shardings=pinned)(placed, data, placed)
    result[f"products-{specs.__name__}"] = {
        "error": error(found, right),
        "alike": [alike(tree, placed) for tree in found],
        "shares": [[], []],
        "again": 0,
    }
print(json.dumps(result))
"""


@pytest.fixture(scope="module", params=["Explicit", pytest.param("Auto", marks=pytest.mark.sweep)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return finish(start(COMMON + TRAIN, 8, tmp_path_factory.mktemp("sharded"), request.param))


def test_results_are_those_of_one_device(results: Any) -> None:
    assert {name: case["error"] for name, case in results.items() if case["error"] > 1e-13} == {}


def test_updates_velocity_and_products_are_sharded_as_the_parameters_are(results: Any) -> None:
    assert {name: case["alike"] for name, case in results.items() if not all(case["alike"])} == {}


def test_blocks_and_inverses_are_shared_out(results: Any) -> None:
    """With `mesh`, in as many shares as there are devices."""
    for found, wanted in (case["shares"] for case in results.values()):
        assert found == wanted


def test_the_second_step_compiles_nothing(results: Any) -> None:
    assert {name: case["again"] for name, case in results.items() if case["again"]} == {}
