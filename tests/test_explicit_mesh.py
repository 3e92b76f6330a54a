"""On meshes with explicit axes, the default of `jax.make_mesh`, results are those of one device."""

from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from designs import covering, swept
from jax.sharding import AxisType, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P
from optimizer_cases import assert_close, mlp, mlp_params, normal
from test_shard_map import BY_DEFAULT, DIAGONAL, EKFAC, FUNCTIONS, GGN, KEY, KFAC, MODELS, Fn

import ggn_jax

NAMES = [name for name in FUNCTIONS if not name.startswith("vectors")]  # vectors have other tests
CASES = [("images", name) for name in NAMES] + [("tokens", "kfac-mc-chunked")]
ELSEWHERE = {*BY_DEFAULT.split(), "kfac-type-2"} - {"kfac", "losses"}  # by default these run inside of `shard_map`
DEFAULT = [case for case in CASES if case[1] not in ELSEWHERE]


def is_set(case: tuple[str, str]) -> bool:
    """Whether the mesh is the context's: every second time."""
    return (DEFAULT.index(case) if case in DEFAULT else CASES.index(case)) % 2 == 1


@cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))


def place(tree: Any, *axes: str | None) -> Any:
    return jax.device_put(tree, NamedSharding(mesh(), P(*axes)))


@cache
def alone(model: str, name: str) -> Any:
    model_fn, loss, params, batch = MODELS[model]
    return jax.jit(partial(FUNCTIONS[name], model_fn, loss))(params, batch)


@pytest.mark.parametrize(
    ("model", "name", "is_set"),
    swept(
        [(*case, is_set(case)) for case in CASES],
        [(*case, is_set(case)) for case in DEFAULT],
    ),
)
@pytest.mark.by_default(
    "images-kfac-True",
    "images-ggn-False",
    "images-diagonal-True",
)
def test_results_are_those_of_one_device(model: str, name: str, is_set: bool) -> None:
    model_fn, loss, params, batch = MODELS[model]
    params, batch = place(params), place(batch, "data")
    with jax.set_mesh(mesh()) if is_set else nullcontext():
        got = jax.jit(partial(FUNCTIONS[name], model_fn, loss))(params, batch)
    assert_close(got, alone(model, name), 1e-7)


@pytest.mark.parametrize("name", ["ggn-chunked", "diagonal", "ekfac", "losses", "kfac", "multi-steps"])
@pytest.mark.by_default("ggn-chunked")
def test_outside_of_jit_too(name: str) -> None:
    """With parameters that are on no mesh, as they come."""
    model_fn, loss, params, batch = MODELS["images"]
    assert_close(FUNCTIONS[name](model_fn, loss, params, place(batch, "data")), alone("images", name), 1e-7)


def over_features(params: Any) -> Any:
    """Matrices sharded over their outputs."""
    return jax.tree.map(lambda x: place(x, *[None] * (x.ndim - 1), "data"), params)


def same_sharding(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: jax.typeof(x).sharding == jax.typeof(y).sharding, a, b)))


@pytest.mark.parametrize("cls", [GGN, ggn_jax.EFLinearOperator, ggn_jax.HessianLinearOperator, DIAGONAL, KFAC, EKFAC])
@pytest.mark.by_default("HessianLinearOperator")
def test_products_are_sharded_as_the_parameters_are(cls: Any) -> None:
    loss, batch = ggn_jax.CrossEntropyLoss(), (normal(0, 8, 3), jax.device_put(np.arange(8) % 2))
    options = {"key": KEY} if cls in (KFAC, EKFAC) else {}

    def run(params: Any, batch: Any) -> Any:
        return cls(mlp, loss, params, batch, **options).mv(params)

    sharded = over_features(mlp_params())
    got = jax.jit(run)(sharded, place(batch, "data"))
    assert same_sharding(got, sharded)
    assert_close(got, run(mlp_params(), batch), 1e-9)


def train(params: Any, batch: Any, **options: Any) -> tuple[Any, Any]:
    shapes = jax.ShapeDtypeStruct(batch[0].shape, batch[0].dtype)
    optimizer = ggn_jax.kfac(mlp, ggn_jax.CrossEntropyLoss(), 0.1, damping=0.1, example_inputs=shapes, **options)

    def step(carry: Any, key: Any) -> Any:
        params, state = carry
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return (optax.apply_updates(params, updates), state), value

    # A loop's carry keeps its type, sharding included.
    (params, state), values = jax.jit(partial(jax.lax.scan, step))((params, optimizer.init(params)), keys())
    return (params, values), state


def keys() -> jax.Array:
    return jax.random.split(KEY, 4)


@covering(1, is_set=[False, True], sharded=[False, True])
@pytest.mark.by_default("True-True")
def test_training_in_a_loop(is_set: bool, sharded: bool) -> None:
    params, batch = mlp_params(), (normal(0, 8, 3), jax.device_put(np.arange(8) % 2))
    start = over_features(params) if sharded else place(params)
    with jax.set_mesh(mesh()) if is_set else nullcontext():
        (found, values), state = train(start, place(batch, "data"))
        assert same_sharding(found, start)
        assert same_sharding(state.velocity, start)
    assert_close((found, values), train(params, batch)[0], 1e-9)


@covering(1, options=[{}, {"ekfac": True}, {"inverse_interval": 2, "staggered": True}], is_set=[False, True], ids=str)
@pytest.mark.by_default("{'inverse_interval': 2, 'staggered': True}-False")
def test_inverses_are_shared_out_over_an_explicit_mesh(options: Any, is_set: bool) -> None:
    params, batch = mlp_params(), (normal(0, 8, 3), jax.device_put(np.arange(8) % 2))
    with jax.set_mesh(mesh()) if is_set else nullcontext():
        found, _ = train(place(params), place(batch, "data"), mesh=mesh(), **options)
    assert_close(found, train(params, batch, **options)[0], 1e-9)


@pytest.mark.sweep
def test_lineax_solves() -> None:
    model_fn, loss, params, batch = MODELS["images"]

    def solve(params: Any, batch: Any) -> Any:
        ggn = GGN(model_fn, loss, params, batch)
        options = {"preconditioner": DIAGONAL(model_fn, loss, params, batch).damped(0.1).inverse()}
        return lx.linear_solve(ggn.damped(0.1), params, lx.CG(1e-10, 1e-10), options=options).value

    assert_close(solve(place(params), place(batch, "data")), solve(params, batch), 1e-7)


@pytest.mark.parametrize("name", ["ggn", "kfac", "ekfac", "preconditioned"])
@pytest.mark.by_default("preconditioned")
def test_lineax_solves_with_sharded_parameters(name: str) -> None:
    """Inside of `auto_axes`: lineax adds up over axes that are sharded, and compares shardings."""
    loss, batch = ggn_jax.CrossEntropyLoss(), (normal(0, 8, 3), jax.device_put(np.arange(8) % 2))

    def solve(params: Any, batch: Any) -> Any:
        kind = {"kfac": KFAC, "ekfac": EKFAC}.get(name, GGN)
        operator = kind(mlp, loss, params, batch, **({} if kind is GGN else {"key": KEY}))
        inverse = KFAC(mlp, loss, params, batch, key=KEY).inverse(0.1)
        options = {"preconditioner": inverse} if name == "preconditioned" else {}
        return lx.linear_solve(operator.damped(0.1), params, lx.CG(1e-11, 1e-11), options=options).value

    params = over_features(mlp_params())
    shardings = jax.tree.map(lambda x: x.sharding, params)
    found = jax.jit(auto_axes(solve, out_sharding=shardings))(params, place(batch, "data"))
    assert same_sharding(found, params)
    assert_close(found, jax.jit(solve)(mlp_params(), batch), 1e-8)


def test_models_that_couple_examples_are_refused() -> None:
    def normalised(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, x - jnp.mean(x, axis=0, keepdims=True))

    params, batch = mlp_params(), (normal(0, 8, 3), jax.device_put(np.arange(8) % 2))
    with pytest.raises(ValueError, match="couples examples"):
        KFAC(normalised, ggn_jax.CrossEntropyLoss(), place(params), place(batch, "data"), key=KEY)


def naming(params: Any, x: jax.Array) -> jax.Array:
    """A model that names a sharding of its activations."""
    return mlp(params, reshard(x, P("data", None)))


@pytest.mark.parametrize("cls", [GGN, KFAC, DIAGONAL])
def test_models_that_name_shardings_are_refused_with_the_way_out(cls: Any) -> None:
    params, batch = place(mlp_params()), place((normal(0, 8, 3), jax.device_put(np.arange(8) % 2)), "data")
    options = {"key": KEY} if cls is KFAC else {}
    with jax.set_mesh(mesh()), pytest.raises(ValueError, match="PartitionSpec") as caught:
        cls(naming, ggn_jax.CrossEntropyLoss(), params, batch, **options)
    assert "must not name shardings of explicit axes" in "".join(caught.value.__notes__)


def test_kfac_for_models_that_name_shardings_is_refused_with_the_way_out() -> None:
    inputs = jax.ShapeDtypeStruct((8, 3), jnp.float64)
    optimizer = ggn_jax.kfac(naming, ggn_jax.CrossEntropyLoss(), 0.1, damping=0.1, example_inputs=inputs)
    with jax.set_mesh(mesh()), pytest.raises(ValueError, match="Sharding") as caught:
        optimizer.init(place(mlp_params()))
    assert "must not name shardings of explicit axes" in "".join(caught.value.__notes__)


@pytest.mark.sweep
def test_models_that_constrain_shardings_of_auto_axes() -> None:
    """Also where that of a batch does not fit one example."""
    auto = NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), P("data"))

    def constrained(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(mlp(params, x), auto)

    loss, params, batch = ggn_jax.CrossEntropyLoss(), mlp_params(), (normal(0, 8, 3), jax.device_put(np.arange(8) % 2))

    def run(model_fn: Any, params: Any, batch: Any) -> Any:
        optimizer = ggn_jax.kfac(model_fn, loss, 0.1, damping=0.1, example_inputs=batch[0])
        step = optimizer.update(params, optimizer.init(params), params, batch=batch, key=KEY)
        return (
            KFAC(model_fn, loss, params, batch, key=KEY).mv(params),
            GGN(model_fn, loss, params, batch).mv(params),
            step,
        )

    found = jax.jit(partial(run, constrained))(params, jax.device_put(batch, auto))
    assert_close(found, jax.jit(partial(run, mlp))(params, batch), 1e-9)


def test_report_of_a_sharded_batch() -> None:
    model_fn, _, params, batch = MODELS["images"]
    found = ggn_jax.report(model_fn, place(params), place(batch[0], "data"))
    assert found.passed
    wanted = ggn_jax.report(model_fn, params, batch[0])
    assert [(row.parameter, row.kind) for row in found.rows] == [(row.parameter, row.kind) for row in wanted.rows]


@pytest.mark.sweep
def test_several_batches() -> None:
    model_fn, loss, params, batch = MODELS["images"]
    batches = [batch, jax.tree.map(lambda x: x[::-1], batch)]
    make: Fn = partial(EKFAC.from_batches, model_fn, loss)
    found = make(place(params), [place(batch, "data") for batch in batches], key=KEY)
    assert_close(found.as_matrix(), make(params, batches, key=KEY).as_matrix(), 1e-9)


@pytest.mark.sweep
def test_a_mask_is_sharded_as_the_batch_is() -> None:
    model_fn, loss, params, batch = MODELS["tokens"]
    mask = jax.device_put(np.arange(24).reshape(8, 3) % 5 > 0)
    found = KFAC(model_fn, loss, place(params), place(batch, "data"), key=KEY, mask=place(mask, "data"))
    assert_close(found.as_matrix(), KFAC(model_fn, loss, params, batch, key=KEY, mask=mask).as_matrix(), 1e-9)
