"""What a model returns besides its outputs; batch normalisation in training mode, of linen, NNX and Equinox."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree
from optimizer_cases import CE, KEY, assert_close, gradient, mlp, mlp_params, normal
from oracles import dense_ggn

import ggn_jax
from ggn_jax import Unbatched

N, DTYPE = 5, jnp.float64
X, Y = normal(0, N, 3), jax.device_put(np.arange(N) % 2)


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Flax computes statistics of float64 by way of `promote_types(dtype, float32)`."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


Model = tuple[Callable[[Any, Any], Any], Any, Any]


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(2, dtype=DTYPE, param_dtype=DTYPE)(x)
        x = linen.BatchNorm(use_running_average=False, momentum=0.9, dtype=DTYPE, param_dtype=DTYPE)(x)
        return linen.Dense(2, dtype=DTYPE, param_dtype=DTYPE)(jnp.tanh(x))


def of_linen() -> Model:
    net = Linen()
    variables = net.init(KEY, X)

    def model_fn(params: Any, inputs: Any) -> Any:
        x, stats = inputs
        outputs, new = net.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return outputs, new["batch_stats"]

    return model_fn, variables["params"], variables["batch_stats"]


class NNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 2, dtype=DTYPE, param_dtype=DTYPE, rngs=rngs)
        self.norm = nnx.BatchNorm(2, momentum=0.9, dtype=DTYPE, param_dtype=DTYPE, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(2, 2, dtype=DTYPE, param_dtype=DTYPE, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def of_nnx() -> Model:
    graph, params, rest = nnx.split(NNX(nnx.Rngs(0)), nnx.Param, ...)
    rest["norm"] = jax.tree.map(lambda x: x.astype(DTYPE), rest["norm"])  # which NNX makes in float32

    def model_fn(params: Any, inputs: Any) -> Any:
        x, rest = inputs
        net = nnx.merge(graph, params, rest, copy=True)
        outputs = net(x)
        return outputs, nnx.state(net, nnx.Not(nnx.Param))

    return model_fn, params, rest


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self) -> None:
        keys = jax.random.split(KEY)
        self.first = eqx.nn.Linear(3, 2, key=keys[0], dtype=DTYPE)
        self.norm = eqx.nn.BatchNorm(2, "batch", mode="batch", dtype=DTYPE)
        self.last = eqx.nn.Linear(2, 2, key=keys[1], dtype=DTYPE)

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x, state = self.norm(self.first(x), state)
        return self.last(jnp.tanh(x)), state


def of_equinox() -> Model:
    net, state = eqx.nn.make_with_state(Equinox)()
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def model_fn(params: Any, inputs: Any) -> Any:
        net = eqx.combine(params, static)
        return jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(*inputs)

    return model_fn, params, state


MODELS = pytest.mark.parametrize("make", [of_linen, of_nnx, of_equinox])


@MODELS
@pytest.mark.by_default("of_equinox")
def test_curvature(make: Callable[[], Model]) -> None:
    """EKFAC's trace, in any eigenbases, and the blocks of scales and shifts are the dense GGN's."""
    model_fn, params, stats = make()
    dense = dense_ggn(lambda p, x: model_fn(p, (x, stats))[0], CE, params, (X, Y))
    options: dict[str, Any] = {"fisher_type": "type-2", "positions": "exact", "examples": "coupled", "has_aux": True}
    batch = (X, Unbatched(stats)), Y
    ekfac = ggn_jax.EKFACLinearOperator(model_fn, CE, params, batch, **options)
    assert_close(ekfac.trace(), np.trace(dense))
    flat = np.concatenate([np.full(p.size, i) for i, p in enumerate(jax.tree.leaves(params))])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    norms = [path for path in paths if "norm" in path.lower()]
    assert len(norms) == 2
    for path in norms:
        own = flat == paths.index(path)
        assert_close(ekfac.block(path), dense[np.ix_(own, own)])
    assert ggn_jax.report(model_fn, params, batch[0], examples="coupled", has_aux=True).passed


@MODELS
@pytest.mark.by_default("of_linen")
def test_training(make: Callable[[], Model]) -> None:
    """With default options; statistics of the same pass go into the next step, and metrics come out of it."""
    model_fn, params, stats = make()

    def with_metrics(params: Any, inputs: Any) -> Any:
        outputs, stats = model_fn(params, inputs[:2])
        return outputs, (stats, jnp.mean(jnp.argmax(outputs, axis=1) == inputs[2]))

    def inputs(stats: Any) -> Any:
        return X, Unbatched(stats), Y

    optimizer = ggn_jax.kfac(
        with_metrics, CE, 0.3, example_inputs=inputs(stats), damping=0.1, examples="coupled", has_aux=True
    )

    @jax.jit
    def step(params: Any, state: Any, stats: Any, key: jax.Array) -> Any:
        batch = inputs(stats), Y
        (value, aux), grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key)
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, aux, (value, grads)

    def objective(params: Any, stats: Any) -> Any:
        outputs, aux = with_metrics(params, (X, stats, Y))
        return CE(outputs, Y), aux

    state, values = optimizer.init(params), []
    for t in range(20):
        wanted = jax.value_and_grad(objective, has_aux=True)(params, stats) if t == 1 else None
        params, state, (stats, accuracy), found = step(params, state, stats, jax.random.key(t))
        values.append(float(found[0]))
        if wanted is not None:
            (value, aux), grads = wanted
            assert_close(jax.tree.map(as_numbers, (stats, accuracy)), jax.tree.map(as_numbers, aux))
            assert_close(found[0], value)
            assert_close(ravel_pytree(found[1])[0], ravel_pytree(grads)[0])
    assert values[-1] < 0.8 * values[0]


def as_numbers(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_aux_of_independent_examples() -> None:
    """It is that of the whole batch, and changes nothing else."""
    params = mlp_params()

    def model_fn(params: Any, x: jax.Array) -> Any:
        outputs = mlp(params, x)
        return outputs, {"mean": jnp.mean(outputs), "hidden": x @ params["u"]}

    def plain(params: Any, x: jax.Array) -> jax.Array:
        return mlp(params, x)

    optimizer, without = (
        ggn_jax.kfac(fn, CE, 0.1, example_inputs=X, fisher_type="type-2", has_aux=fn is model_fn)
        for fn in (model_fn, plain)
    )
    state = optimizer.init(params)
    (value, aux), grads, factors = optimizer.value_and_grad_and_factors(params, (X, Y), state)
    assert_close(aux, model_fn(params, X)[1])
    assert_close(value, CE(mlp(params, X), Y))
    assert_close(grads, gradient(mlp, CE, params, (X, Y)))
    assert_close(factors, without.factors(params, (X, Y), state))
    args = CE, params, (X, Y)
    diagonal = ggn_jax.GGNDiagonalLinearOperator(model_fn, *args, has_aux=True, method="data")
    assert_close(np.diag(diagonal.as_matrix()), np.diag(dense_ggn(plain, CE, params, (X, Y))))


def test_refused() -> None:
    params = mlp_params()
    with pytest.raises(TypeError, match=r"must return a pair \(outputs, aux\); got an array of shape"):
        ggn_jax.GGNLinearOperator(mlp, CE, params, (X, Y), has_aux=True)
    with pytest.raises(TypeError, match="has_aux=True if it returns"):
        ggn_jax.GGNLinearOperator(lambda p, x: (mlp(p, x), x), CE, params, (X, Y))  # type: ignore[arg-type]
    optimizer = ggn_jax.kfac(lambda p, x: (mlp(p, x), x), CE, 0.1, example_inputs=X, has_aux=True, chunk_size=2)
    with pytest.raises(NotImplementedError, match="where chunk_size cuts it into parts"):
        optimizer.value_and_grad_and_factors(params, (X, Y), optimizer.init(params), key=KEY)
    with pytest.raises(TypeError, match="has_aux must be True or False; got None"):
        ggn_jax.kfac(mlp, CE, 0.1, example_inputs=X, has_aux=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [(0, 1, 0, 1, 0, 1), (0.0, 0.0, 1.0, 1.0, 2.0, 2.0)])
def test_groups_of_examples_couple(groups: tuple[float, ...]) -> None:
    """Equal numbers are what examples depend on each other by: others in their place would hide it."""

    def packed(params: Any, inputs: Any) -> jax.Array:
        x, group = inputs
        same = (group[:, None] == group).astype(x.dtype)
        return same @ x / same.sum(1, keepdims=True) @ params["w"]

    params, inputs = {"w": normal(1, 3, 2)}, (normal(0, 6, 3), jnp.asarray(groups))
    batch = inputs, jax.device_put(np.arange(6) % 2)
    with pytest.raises(ValueError, match=r"couples examples.*leave chunk_size out"):
        ggn_jax.GGNLinearOperator(packed, CE, params, batch, chunk_size=3)
    with pytest.raises(ValueError, match=r"batch 0: .*couples examples"):
        ggn_jax.GGNLinearOperator.from_batches(packed, CE, params, [batch]).mv(params)


def test_the_check_is_made_each_time() -> None:
    """What decides whether examples are coupled may be a value that changes."""

    def model_fn(params: Any, inputs: Any) -> jax.Array:
        x, training = inputs
        y = x @ params["w"]
        return jnp.where(training, y - y.mean(0), y)

    params, x = {"w": normal(1, 3, 2)}, normal(0, 6, 3)

    def make(training: bool) -> ggn_jax.KFACLinearOperator:
        batch = (x, Unbatched(jnp.asarray(training))), jax.device_put(np.arange(6) % 2)
        return ggn_jax.KFACLinearOperator(model_fn, CE, params, batch, fisher_type="type-2")

    for _ in range(3):
        make(False)
    with pytest.raises(ValueError, match="couples examples"):
        make(True)
