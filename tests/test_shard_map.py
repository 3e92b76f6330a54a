"""Inside `jax.shard_map` each device has the operator, factors and steps of its own shard of the batch."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from designs import swept
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optimizer_cases import assert_close, integers, mlp, mlp_params, normal
from problems import PoissonLoss

import ggn_jax
from ggn_jax._sharding import vary_like

DEVICES, N = 2, 8
KEY = jax.random.key(3)
CE = ggn_jax.CrossEntropyLoss(class_axis=-1)


def images(params: Any, x: jax.Array) -> jax.Array:
    """A convolution with a bias, max pooling, a scale, and a matrix."""
    x = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(x + params["b"][None, None, None])
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1) * params["s"][None]
    return x @ params["w"]


def tokens(params: Any, x: jax.Array) -> jax.Array:
    """An embedding and a recurrence."""
    x = params["e"][x]

    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(x @ params["a"] + h @ params["b"])
        return h, h @ params["o"]

    _, ys = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(ys, 0, 1)


IMAGES = {"k": normal(0, 2, 2, 1, 2), "b": normal(1, 2), "s": normal(2, 2), "w": normal(3, 2, 3)}
TOKENS = {name: normal(i, 3, 3) for i, name in enumerate("abo")} | {"e": normal(4, 5, 3)}
MODELS: dict[str, tuple[Any, ...]] = {
    "images": (images, CE, IMAGES, (normal(5, N, 3, 3, 1), jax.device_put(np.arange(N) % 3))),
    "tokens": (
        tokens,
        CE,
        TOKENS,
        (integers(0, 5, N, 3), integers(6, 3, N, 3)),
    ),
    "likelihood": (mlp, PoissonLoss(), mlp_params(), (normal(7, N, 3), jnp.arange(2.0 * N).reshape(N, 2))),
}

Fn = Callable[..., Any]  # of the model, the loss, parameters and a batch


def product(cls: Any, **options: Any) -> Fn:
    def run(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
        operator = cls(model_fn, loss, params, batch, **options)
        return operator.mv(params), operator.damped(0.1).as_matrix()

    return run


def blocks(cls: Any, **options: Any) -> Fn:
    def run(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
        operator = cls(model_fn, loss, params, batch, **options)
        made = operator.as_matrix(), operator.diagonal(), operator.trace(), operator.logdet(0.1), operator.mv(params)
        heuristic = operator.solve(params, 0.1, "heuristic")
        return *made, heuristic, operator.solve(params, 0.1), operator.inverse_sqrt(0.1).mv(params)

    return run


def vectors(fisher_type: str) -> Fn:
    def run(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
        outputs, targets = model_fn(params, batch[0]), batch[1]
        key = KEY if fisher_type == "mc" else None
        batched = ggn_jax.make_batch_grad_output_fn(loss, fisher_type)
        single = ggn_jax.make_grad_output_fn(loss, fisher_type)
        # Outputs that are the same on all devices, while targets are not.
        found = batched(outputs, targets, key), single(jnp.ones(outputs.shape[1:]), targets[0], key)
        return (*found, ggn_jax.make_grad_output_sampler(loss)(outputs[0], 2, targets[0], KEY))

    return run


def losses(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    outputs, targets = model_fn(params, batch[0]), batch[1]
    found = [loss(outputs, targets)]
    for at in (outputs, jnp.ones(outputs.shape)):
        hessian = ggn_jax.LossHessian(loss, at, targets)
        found += [hessian.mv(at), hessian.sqrt_mv(at), hessian.sqrt_rmv(at), hessian.diagonal(), hessian.trace()]
    return found


def training(*, shared: bool = True, loop: bool = True, every: int = 0, scale: bool = False, **options: Any) -> Fn:
    """Some steps, with one pass for gradient and factors or without.

    A loop is half as long to compile, but needs a state that varies over devices from the start.
    """

    def run(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
        given = {"example_inputs": jax.ShapeDtypeStruct(batch[0].shape, batch[0].dtype), "damping": 0.1} | options
        made = (
            ggn_jax.scale_by_kfac(model_fn, loss, **given)
            if scale
            else ggn_jax.kfac(model_fn, loss, given.pop("learning_rate", 0.1), **given)
        )
        optimizer: Any = ggn_jax.multi_steps(made, every) if every else made

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            if shared:
                looked = made.value_and_grad_and_factors(params, batch, state, key=key)
                more = {"batch": batch} if made.needs_batch else {}
                updates, state = optimizer.update(looked[1], state, params, factors=looked[2], **more)
            else:
                looked = ()
                updates, state = optimizer.update(params, state, params, batch=batch, key=key)
            return (optax.apply_updates(params, updates), state), (looked, updates)

        def alike(carry: Any, key: jax.Array) -> Any:
            carry, results = step(carry, key)
            return vary_like(carry, batch), results

        keys, start = jax.random.split(KEY, every + 1 if every else 2), (params, optimizer.init(params))
        if loop:
            return jax.lax.scan(alike, vary_like(start, batch), keys)
        first = step(start, keys[0])
        return first, step(first[0], keys[1])

    return run


def function_space(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    jacobian = ggn_jax.JacobianLinearOperator(model_fn, params, batch[0])
    outputs = jacobian.mv(params)
    gram = ggn_jax.GramLinearOperator(model_fn, params, batch[0], loss=loss, targets=batch[1], chunk_size=3)
    return outputs, jacobian.T.mv(outputs), gram.as_matrix(), gram.mv(outputs), gram.solve_ggn(params, 0.1)


def layers(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    found = ggn_jax.find_layers(model_fn, params, batch[0])
    io = ggn_jax.layer_io(found, loss, params, batch, fisher_type="mc", key=KEY)
    matrices, _ = ggn_jax.to_matrices(found, io.grads)

    def moments(io: ggn_jax.LayersIO) -> Any:
        return {name: jnp.sum(io[name].per_example_grads() ** 2, axis=(0, 1)) for name in io}

    summed = ggn_jax.sum_layer_io(moments, found, loss, params, batch, chunk_size=3, fisher_type="mc", key=KEY)
    return io.value, io.grads, matrices, summed


def objectives(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    """Of two functions, with batches of different sizes."""
    objective = ggn_jax.Objective(model_fn, loss) + 0.5 * ggn_jax.Objective(model_fn, loss)
    batches = [batch, jax.tree.map(lambda x: x[:3], batch)]
    made = [cls.from_objective(objective, params, batches) for cls in (GGN, DIAGONAL)]
    made += [cls.from_objective(objective, params, batches, fisher_type="empirical") for cls in (KFAC, EKFAC)]
    return objective(params, batches), [operator.mv(params) for operator in made], made[2].solve(params, 0.1)


def coupled(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    """Examples that depend on each other."""

    def centred(params: Any, x: jax.Array) -> jax.Array:
        outputs = model_fn(params, x)
        return outputs - outputs.mean(0, keepdims=True)

    options: dict[str, Any] = {"examples": "coupled", "fisher_type": "empirical"}
    made = [cls(centred, loss, params, batch, **options) for cls in (KFAC, EKFAC)]
    return [operator.as_matrix() for operator in made]


def several_outputs(model_fn: Any, loss: Any, params: Any, batch: Any) -> Any:
    """A loss of two heads."""
    joint = ggn_jax.JointLoss({"a": loss, "b": ggn_jax.MSELoss()}, weights={"b": 0.5})

    def heads(params: Any, x: jax.Array) -> Any:
        return {"a": model_fn(params, x), "b": jnp.tanh(model_fn(params, x)).reshape(len(x), -1)}

    targets = {"a": batch[1], "b": jnp.zeros_like(heads(params, batch[0])["b"])}
    made = [cls(heads, joint, params, (batch[0], targets)) for cls in (GGN, DIAGONAL)]
    kfac = KFAC(heads, joint, params, (batch[0], targets), fisher_type="empirical")
    return [operator.mv(params) for operator in (*made, kfac)]


KFAC, EKFAC, KFOC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator, ggn_jax.KFOCLinearOperator
GGN, DIAGONAL = ggn_jax.GGNLinearOperator, ggn_jax.GGNDiagonalLinearOperator
ADAPTED = ggn_jax.LevenbergMarquardt(0.1, interval=1)
FUNCTIONS: dict[str, Fn] = {
    "ggn": product(GGN),
    "ggn-chunked": product(GGN, chunk_size=3),
    "ggn-mc": product(GGN, mc_samples=2, key=KEY),
    "ef": product(ggn_jax.EFLinearOperator),
    "hessian": product(ggn_jax.HessianLinearOperator),
    "diagonal": product(DIAGONAL),
    "diagonal-mc-chunked": product(DIAGONAL, mc_samples=2, key=KEY, chunk_size=2),
    "diagonal-by-data": product(DIAGONAL, method="data"),
    "kfac-type-2": blocks(KFAC, fisher_type="type-2", positions="exact"),
    "kfac-mc-chunked": blocks(KFAC, key=KEY, mc_samples=3, chunk_size=3, vector_chunk_size=2),
    "kfac-empirical": blocks(KFAC, fisher_type="empirical"),
    "ekfac": blocks(EKFAC, key=KEY),
    "kfoc": blocks(KFOC, key=KEY),
    "vectors-type-2": vectors("type-2"),
    "vectors-mc": vectors("mc"),
    "vectors-empirical": vectors("empirical"),
    "losses": losses,
    "kfac": training(loop=False),
    "scale-by-kfac": training(shared=False, scale=True),
    "training-ekfac": training(ekfac=True),
    "training-staggered": training(staggered=True, factor_interval=2, damping_method="exact"),
    "training-quadratic": training(learning_rate=ggn_jax.QuadraticModel(), damping=ADAPTED),
    "multi-steps": training(every=2),
}
LIKELIHOOD = ["ggn", "hessian", "kfac-type-2", "vectors-type-2", "vectors-mc", "vectors-empirical", "losses"]
TOKENS_TOO = ["ggn", "diagonal", "kfac-mc-chunked", "ekfac", "vectors-type-2", "kfac"]
NEWER: dict[str, Fn] = {
    "function-space": function_space,
    "layers": layers,
    "objectives": objectives,
    "coupled": coupled,
    "several-outputs": several_outputs,
}
CASES = [("images", name) for name in FUNCTIONS]
CASES += [("tokens", name) for name in TOKENS_TOO] + [("likelihood", name) for name in LIKELIHOOD]
# What runs by default here; the other functions run on explicit meshes by default, and all of both with `-m sweep`.
BY_DEFAULT = "ggn-chunked hessian diagonal-mc-chunked kfac-mc-chunked vectors-mc losses"
BY_DEFAULT += " kfac training-ekfac training-quadratic multi-steps"
DEFAULT = [("images", name) for name in BY_DEFAULT.split()]
DEFAULT += [("tokens", "kfac-mc-chunked"), ("tokens", "vectors-type-2"), ("likelihood", "kfac-type-2")]


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def shard(batch: Any, number: int) -> Any:
    size = N // DEVICES
    return jax.tree.map(lambda x: x[number * size : (number + 1) * size], batch)


@cache
def alone(model: str, name: str) -> Any:
    """What each device's shard gives on one device."""
    model_fn, loss, params, batch = MODELS[model]
    run = jax.jit(partial(FUNCTIONS[name], model_fn, loss))
    each = [jax.tree.leaves(run(params, shard(batch, number))) for number in range(DEVICES)]
    return [np.stack(leaves) for leaves in zip(*each, strict=True)]


@pytest.mark.parametrize(("model", "name"), swept(CASES, DEFAULT))
@pytest.mark.by_default(
    "images-training-quadratic",
    "tokens-kfac-mc-chunked",
    "images-ggn-chunked",
    "images-vectors-mc",
)
def test_each_device_has_the_curvature_of_its_shard(model: str, name: str) -> None:
    """With `check_vma`; what does not keep types of variation hardly differs from one device, and is tested below."""
    model_fn, loss, params, batch = MODELS[model]

    def run(params: Any, batch: Any) -> Any:
        return [leaf[None] for leaf in jax.tree.leaves(FUNCTIONS[name](model_fn, loss, params, batch))]

    specs = P(), P("data")
    sharded = jax.shard_map(run, mesh=mesh(), in_specs=specs, out_specs=P("data"))
    assert_close(jax.jit(sharded)(params, batch), alone(model, name), 1e-9)


@pytest.mark.parametrize("name", NEWER)
@pytest.mark.by_default("layers")
def test_layers_outputs_and_objectives_are_those_of_the_shard(name: str) -> None:
    model_fn, loss, params, batch = MODELS["images"]

    def run(params: Any, batch: Any) -> Any:
        return [leaf[None] for leaf in jax.tree.leaves(NEWER[name](model_fn, loss, params, batch))]

    one = jax.jit(partial(NEWER[name], model_fn, loss))
    each = [jax.tree.leaves(one(params, shard(batch, number))) for number in range(DEVICES)]
    for check_vma in (True, False) if name == "layers" else (True,):
        sharded = jax.shard_map(run, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
        assert_close(jax.jit(sharded)(params, batch), [np.stack(x) for x in zip(*each, strict=True)], 1e-9)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.by_default("True")
def test_the_mean_over_devices_is_the_whole_batch(check_vma: bool) -> None:
    """With equal shards and a mean reduction: values, gradients, products, and empirical factors."""
    model_fn, loss, params, batch = MODELS["images"]
    given = {"example_inputs": jax.ShapeDtypeStruct(batch[0].shape, batch[0].dtype), "fisher_type": "empirical"}
    optimizer = ggn_jax.kfac(model_fn, loss, 0.1, damping=0.1, **given)

    def step(mean: Fn, params: Any, state: Any, batch: Any) -> Any:
        value, grads, factors = mean(optimizer.value_and_grad_and_factors(params, batch, state))
        product = mean(GGN(model_fn, loss, params, batch).mv(params))
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return value, grads, updates, state, product

    state = optimizer.init(params)
    specs = P(), P(), P("data")
    inside = partial(step, lambda tree: jax.lax.pmean(tree, "data"))
    sharded = jax.shard_map(inside, mesh=mesh(), in_specs=specs, out_specs=P(), check_vma=check_vma)
    whole = jax.jit(partial(step, lambda tree: tree))
    assert_close(jax.jit(sharded)(params, state, batch), whole(params, state, batch), 1e-9)


def test_a_key_for_each_device() -> None:
    model_fn, loss, params, batch = MODELS["images"]

    def run(number: Any, params: Any, batch: Any) -> Any:
        return KFAC(model_fn, loss, params, batch, key=jax.random.fold_in(KEY, number)).mv(params)

    def inside(params: Any, batch: Any) -> Any:
        return jax.tree.map(lambda x: x[None], run(jax.lax.axis_index("data"), params, batch))

    sharded = jax.shard_map(inside, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"))
    each = [run(number, params, shard(batch, number)) for number in range(DEVICES)]
    assert_close(jax.jit(sharded)(params, batch), jax.tree.map(lambda *x: jnp.stack(x), *each), 1e-9)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.by_default("False")
def test_parameters_of_each_device(check_vma: bool) -> None:
    """An ensemble: a model for each device, and one batch for all."""
    model_fn, loss, params, batch = MODELS["images"]
    models = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)

    def run(params: Any, batch: Any) -> Any:
        params = jax.tree.map(lambda x: x[0], params)
        matrices = (
            GGN(model_fn, loss, params, batch).as_matrix(),
            KFAC(model_fn, loss, params, batch, key=KEY).mv(params),
        )
        return jax.tree.map(lambda x: x[None], matrices)

    sharded = jax.shard_map(run, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data"), check_vma=check_vma)
    each = [run(jax.tree.map(lambda x, n=n: x[n : n + 1], models), batch) for n in range(DEVICES)]
    assert_close(jax.jit(sharded)(models, batch), jax.tree.map(lambda *x: jnp.concatenate(x), *each), 1e-9)


@pytest.mark.sweep
def test_solves_inside_of_shard_map() -> None:
    """lineax's solvers start from zeros that do not vary, which needs `check_vma=False`."""
    model_fn, loss, params, batch = MODELS["images"]

    def run(params: Any, batch: Any) -> Any:
        ggn = GGN(model_fn, loss, params, batch)
        options = {"preconditioner": DIAGONAL(model_fn, loss, params, batch).damped(0.1).inverse()}
        found = lx.linear_solve(ggn.damped(0.1), params, lx.CG(1e-10, 1e-10), options=options).value
        return jax.tree.map(lambda x: x[None], found)

    sharded = jax.shard_map(run, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    each = [run(params, shard(batch, number)) for number in range(DEVICES)]
    assert_close(jax.jit(sharded)(params, batch), jax.tree.map(lambda *x: jnp.concatenate(x), *each), 1e-7)
