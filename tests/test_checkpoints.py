"""Saved and restored states and operators: bit for bit, by every library that users save with."""

import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_cases import CE, KEY, batch_of, gradient, integers, mlp, mlp_params, normal

import ggn_jax

TOKENS = integers(0, 7, 4, 3)


def model(params: Any, tokens: jax.Array) -> jax.Array:
    """Blocks of every kind: two terms, diagonal factors, dense and diagonal ones, and what is not used."""
    h = params["table"][tokens] * params["scale"][None, None]
    h = h @ params["w"]
    return h @ params["table"].T + params["bias"][None, None]


def model_params() -> Any:
    return {
        "table": normal(0, 7, 3),
        "scale": normal(1, 3),
        "w": normal(2, 3, 3),
        "bias": normal(3, 7),
        "unused": normal(4, 2),
    }


def of_every_kind(name: str) -> tuple[Any, Any, Any, Any]:
    """An optimizer, parameters, their gradient, and what else `update` takes."""
    if name == "masked":
        params, batch = mlp_params(), batch_of()
        inner = ggn_jax.kfac(mlp, CE, 0.1, example_inputs=batch[0], full_params=params)
        labels = {"u": "kfac", "c": "kfac", "v": "sgd", "d": "sgd"}
        optimizer = optax.multi_transform({"kfac": inner, "sgd": optax.sgd(1e-2)}, labels)
        return optimizer, params, gradient(mlp, CE, params, batch), {"batch": batch, "full_params": params}
    loss, batch = ggn_jax.CrossEntropyLoss(class_axis=-1), (TOKENS, (TOKENS + 1) % 7)
    make = partial(ggn_jax.kfac, model, loss, 0.1, example_inputs=TOKENS, damping=0.1, max_small_size=5)
    if name == "chain":
        adapted = ggn_jax.LevenbergMarquardt(0.1, interval=2)
        kfac = make(ekfac=True, damping=adapted, factor_dtype="bfloat16", inverse_interval=2)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), kfac)
    elif name == "multi_steps":
        optimizer = ggn_jax.multi_steps(make(), 2)
    else:
        optimizer = make(damping_method="exact", max_dense_size=2, block_size=2)
    params = model_params()
    return optimizer, params, gradient(model, loss, params, batch), {"batch": batch}


@cache
def trained(name: str) -> tuple[Any, Any, Any, Any]:
    """The structure of a state, the state after some steps, a compiled step, and the state after that."""
    optimizer, params, grads, extra = of_every_kind(name)
    step = jax.jit(lambda state, key: optimizer.update(grads, state, params, key=key, **extra)[1])
    state = step(step(jax.jit(optimizer.init)(params), jax.random.key(1)), jax.random.key(2))
    return jax.eval_shape(optimizer.init, params), state, step, step(state, jax.random.key(3))


# Each saves a pytree in a folder and restores it from there, given its structure.


def by_flax(tree: Any, like: Any, folder: Path) -> Any:
    (folder / "state.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    return flax.serialization.from_bytes(like, (folder / "state.msgpack").read_bytes())


def by_pickle(tree: Any, like: Any, folder: Path) -> Any:
    (folder / "state.pickle").write_bytes(pickle.dumps(tree))
    return pickle.loads((folder / "state.pickle").read_bytes())


def by_equinox(tree: Any, like: Any, folder: Path) -> Any:
    eqx.tree_serialise_leaves(folder / "state.eqx", tree)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", like)


def by_npz(tree: Any, like: Any, folder: Path) -> Any:
    """Leaves by their paths; NumPy saves the bits of bfloat16, but not its name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    np.savez(folder / "state.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    with np.load(folder / "state.npz") as saved:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(saved[jax.tree_util.keystr(path)].view(leaf.dtype)), like
        )


def by_orbax(tree: Any, like: Any, folder: Path) -> Any:
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax comes with Flax")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


WAYS = [by_flax, by_pickle, by_equinox, by_npz, by_orbax]


def assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["chain", "multi_steps", "exact", "masked"])
@pytest.mark.by_default(
    "exact-by_flax",
    "multi_steps-by_orbax",
    "masked-by_npz",
    "exact-by_equinox",
)
def test_states_continue_bit_for_bit(name: str, way: Callable[..., Any], tmp_path: Path) -> None:
    like, state, step, after = trained(name)
    restored = way(state, like, tmp_path)
    assert_same_bits(restored, state)
    assert_same_bits(step(restored, jax.random.key(3)), after)


def test_a_state_is_made_of_tuples_dicts_and_arrays() -> None:
    """What libraries for checkpoints know, without any registration."""

    def check(node: Any) -> None:
        if isinstance(node, dict | tuple | list):
            for child in node.values() if isinstance(node, dict) else node:
                check(child)
        else:
            assert node is None or isinstance(node, jax.Array), type(node)

    for name in ("chain", "multi_steps", "exact", "masked"):
        check(trained(name)[1])
    optimizer, params, _, extra = of_every_kind("exact")
    check(optimizer.value_and_grad_and_factors(params, extra["batch"], trained("exact")[1], key=KEY)[2])


def leaves_by_flax(tree: Any, like: Any, folder: Path) -> Any:
    """Operators are modules, which flax and orbax do not know: they are given their leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), by_flax(jax.tree.leaves(tree), jax.tree.leaves(like), folder))


@pytest.mark.parametrize("way", [by_pickle, by_equinox, by_npz, leaves_by_flax], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "inverse", "diagonal"])
def test_operators_are_restored_bit_for_bit(kind: str, way: Callable[..., Any], tmp_path: Path) -> None:
    make, args = operator_of(kind)
    operator, like = made(kind), jax.eval_shape(make, *args)
    restored = way(operator, like, tmp_path)
    assert_same_bits(restored, operator)
    assert_same_bits(restored.mv(args[0]), operator.mv(args[0]))


def operator_of(kind: str) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    params, batch = mlp_params(), batch_of()
    cls = {"ekfac": ggn_jax.EKFACLinearOperator, "diagonal": ggn_jax.GGNDiagonalLinearOperator}.get(
        kind, ggn_jax.KFACLinearOperator
    )
    options = {} if kind == "diagonal" else {"key": KEY}

    def make(params: Any, batch: Any) -> Any:
        operator = cls(mlp, CE, params, batch, **options)
        return operator.inverse(0.1) if kind == "inverse" else operator

    return make, (params, batch)


@cache
def made(kind: str) -> Any:
    make, args = operator_of(kind)
    return make(*args)
