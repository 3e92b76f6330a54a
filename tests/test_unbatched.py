"""Inputs without batch axis: what is made of them is what a model that is a closure over their values gives."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optimizer_cases import CE, KEY, assert_close, gradient, normal
from oracles import dense_ggn

import ggn_jax
from ggn_jax import Unbatched

N = 6
X, Y = normal(0, N, 3), jax.device_put(np.arange(N) % 2)
STATE = {
    "mean": normal(1, 3),
    "time": jnp.asarray(0.7),
}
PARAMS = {"t": normal(3, 2, 4), "u": normal(4, 3, 4), "v": normal(5, 4, 2), "s": normal(6, 4)}


def model_fn(p: Any, inputs: Any) -> jax.Array:
    """A layer with a constant input (of the time), and a shift by one."""
    x, state = inputs["x"], inputs["state"]
    time = jnp.stack([jnp.sin(state["time"]), jnp.cos(state["time"])]) @ p["t"]
    h = jnp.tanh((x - state["mean"][None]) @ p["u"] + time[None]) * p["s"][None]
    return h @ p["v"]


def with_aux(p: Any, inputs: Any) -> Any:
    return model_fn(p, inputs), inputs["x"]


def closed(p: Any, x: jax.Array) -> jax.Array:
    return model_fn(p, {"x": x, "state": STATE})


BATCH, CLOSED = ({"x": X, "state": Unbatched(STATE)}, Y), (X, Y)


@cache
def dense() -> np.ndarray:
    return dense_ggn(closed, CE, PARAMS, CLOSED)


BATCHES = [({"x": X[i : i + 4], "state": Unbatched(STATE)}, Y[i : i + 4]) for i in (0, 4)]
ARGS = model_fn, CE, PARAMS


def test_products() -> None:
    """Also of a model that returns more than its outputs."""
    vector = jax.tree.map(lambda x: normal(9, *x.shape), PARAMS)
    flat, unravel = ravel_pytree(vector)
    want = unravel(dense() @ flat)
    args = with_aux, CE, PARAMS
    assert_close(ggn_jax.GGNLinearOperator(*args, BATCH, chunk_size=4, has_aux=True).mv(vector), want)
    assert_close(ggn_jax.GGNLinearOperator.from_batches(*args, BATCHES, has_aux=True).mv(vector), want)
    for cls in (ggn_jax.EFLinearOperator, ggn_jax.HessianLinearOperator):
        want = cls(closed, CE, PARAMS, CLOSED).mv(vector)
        assert_close(cls(*args, BATCH, chunk_size=3, has_aux=True).mv(vector), want)


@pytest.mark.parametrize("method", ["layers", "data"])
@pytest.mark.by_default("data")
def test_diagonal(method: Any) -> None:
    diagonal = ggn_jax.GGNDiagonalLinearOperator(*ARGS, BATCH, chunk_size=4, method=method)
    assert_close(np.diag(diagonal.as_matrix()), np.diag(dense()))


KFAC, EKFAC, KFOC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator, ggn_jax.KFOCLinearOperator


@pytest.mark.parametrize("cls", [KFAC, EKFAC, KFOC])
@pytest.mark.by_default("KFACLinearOperator")
def test_blocks(cls: Any) -> None:
    want = cls(closed, CE, PARAMS, CLOSED, fisher_type="type-2")
    options: dict[str, Any] = {"fisher_type": "type-2"} | ({} if cls is KFOC else {"chunk_size": 4})
    assert_close(cls(*ARGS, BATCH, **options).mv(PARAMS), want.mv(PARAMS), rtol=1e-6 if cls is KFOC else 1e-9)
    if cls is KFAC:
        assert_close(cls.from_batches(*ARGS, BATCHES, fisher_type="type-2").factors(), want.factors())
    assert_close(want.block("s"), dense()[:4, :4])


def test_traced_constants_beside_them() -> None:
    """A model that closes over traced values, in chunks of two sizes, keeps them as the operator's leaves."""

    @jax.jit
    def product(scale: jax.Array, batch: Any) -> Any:
        def scaled(p: Any, inputs: Any) -> jax.Array:
            return scale * model_fn(p, inputs)

        return ggn_jax.GGNLinearOperator(scaled, CE, PARAMS, batch, chunk_size=4).mv(PARAMS)

    want = ggn_jax.GGNLinearOperator(lambda p, x: 2 * closed(p, x), CE, PARAMS, CLOSED).mv(PARAMS)
    assert_close(product(jnp.asarray(2.0), BATCH), want)


@pytest.mark.sweep
def test_function_space_and_layers() -> None:
    """Also of a model that returns more than its outputs."""
    jacobian = ggn_jax.JacobianLinearOperator(with_aux, PARAMS, BATCH[0], chunk_size=4, has_aux=True)
    want = jax.jit(jax.jacobian(closed))(PARAMS, X)
    rows = jnp.concatenate([leaf.reshape(2 * N, -1) for leaf in jax.tree.leaves(want)], axis=1)
    assert_close(jacobian.as_matrix(), rows)
    gram = ggn_jax.GramLinearOperator(with_aux, PARAMS, BATCH[0], chunk_size=4, has_aux=True)
    assert_close(gram.as_matrix(), rows @ rows.T)
    layers = ggn_jax.find_layers(with_aux, PARAMS, BATCH[0], has_aux=True)
    io = ggn_jax.layer_io(layers, CE, PARAMS, BATCH, fisher_type="forward-only")
    assert_close(io.grads, gradient(closed, CE, PARAMS, CLOSED))
    assert_close(io["u"].inputs[0, :, 0], X - STATE["mean"][None])


@pytest.mark.sweep
def test_sharded_batch() -> None:
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), P("data"))
    x, y = jax.device_put((X, Y), sharding)
    sharded = ggn_jax.GGNDiagonalLinearOperator(*ARGS, ({"x": x, "state": Unbatched(STATE)}, y))
    assert_close(np.diag(sharded.as_matrix()), np.diag(dense()))


def test_report() -> None:
    found = ggn_jax.report(model_fn, PARAMS, BATCH[0])
    assert found.passed
    kinds = {row.parameter: row.kind for row in found.rows}
    assert kinds == {"['s']": "scale", "['t']": "linear", "['u']": "linear", "['v']": "linear"}


@pytest.mark.sweep
def test_optimizer_follows_their_values() -> None:
    """A step with other values than `example_inputs` had; factors, gradient and value are a closure's."""
    other = {**STATE, "time": jnp.asarray(-0.2), "mean": STATE["mean"] + 1}

    def now(p: Any, x: jax.Array) -> jax.Array:
        return model_fn(p, {"x": x, "state": other})

    optimizer = ggn_jax.kfac(model_fn, CE, 0.1, example_inputs=BATCH[0], fisher_type="type-2", chunk_size=4)
    state = optimizer.init(PARAMS)
    batch = ({"x": X, "state": Unbatched(other)}, Y)
    value, grads, factors = jax.jit(optimizer.value_and_grad_and_factors)(PARAMS, batch, state)
    assert_close(value, CE(now(PARAMS, X), Y))
    assert_close(grads, gradient(now, CE, PARAMS, (X, Y)))
    want = ggn_jax.kfac(now, CE, 0.1, example_inputs=X, fisher_type="type-2")
    assert_close(factors, want.factors(PARAMS, (X, Y), state))


def test_refused() -> None:
    everything = jax.tree.map(Unbatched, BATCH[0], is_leaf=lambda x: isinstance(x, jax.Array | Unbatched))
    with pytest.raises(ValueError, match="all inputs are Unbatched"):
        ggn_jax.GGNLinearOperator(model_fn, CE, PARAMS, (everything, Y))
    with pytest.raises(ValueError, match="All inputs are Unbatched"):
        ggn_jax.report(model_fn, PARAMS, everything)
    with pytest.raises(TypeError, match="targets must have an entry for each example; got Unbatched"):
        ggn_jax.GGNLinearOperator(model_fn, CE, PARAMS, (BATCH[0], Unbatched(Y)))
    with pytest.raises(ValueError, match="Wrap inputs without batch axis"):
        ggn_jax.GGNLinearOperator(model_fn, CE, PARAMS, ({**BATCH[0], "state": STATE}, Y))
    with pytest.raises(TypeError, match=r"inputs\['more'\].value must be a JAX or NumPy array.*; got str"):
        ggn_jax.GGNLinearOperator(model_fn, CE, PARAMS, ({**BATCH[0], "more": Unbatched("edges")}, Y))

    def dropout(p: Any, inputs: Any) -> jax.Array:
        return inputs[0] @ p["w"] * jax.random.uniform(inputs[1], (len(inputs[0]), 2), jnp.float64)

    with pytest.raises(ValueError, match="the same dropout"):
        ggn_jax.KFACLinearOperator(dropout, CE, {"w": normal(8, 3, 2)}, ((X, Unbatched(KEY)), Y), key=KEY)
