"""Modules of Flax and Equinox as model functions: the modules' own outputs, and operators on their parameters."""

import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from flax import linen, nnx
from model_makers import (
    F64,
    TARGETS,
    LinenDropout,
    Transformed,
    TransformedWithState,
    X,
    equinox_net,
    every_maker,
    haiku_net,
    linen_net,
    made_equinox_mlp,
    made_equinox_net,
    made_linen_dropout,
    made_linen_net,
    made_nnx_net,
    nnx_net,
)

import ggn_jax
from ggn_jax import GGNDiagonalLinearOperator, GGNLinearOperator, from_equinox, from_haiku, from_linen, from_nnx


@pytest.fixture(autouse=True)
def usual_promotion() -> Any:
    """Flax's normalisation and dropout do not keep to the strict promotion of our tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_haiku_is_told_by_what_it_returns() -> None:
    plain = Transformed(None, lambda params, rng, x: x @ params["w"])
    model_fn, params = from_haiku(plain, {"w": jnp.ones((3, 2))})
    np.testing.assert_allclose(model_fn(params, X), X @ jnp.ones((3, 2)))
    for transformed, state, words in [
        (TransformedWithState(None, haiku_net), None, "state must be what init returned"),
        (plain, {"norm": jnp.ones(3)}, "state must be left out for Transformed; got dict"),
        (haiku_net, None, "transformed must be what haiku.transform"),
    ]:
        with pytest.raises(TypeError, match=words):
            from_haiku(transformed, params, state)


@every_maker
@pytest.mark.by_default(
    "linen_net",
    "equinox_mlp",
    "haiku_net",
    "nnx_linear",
    "nnx_method",
    "linen_dropout",
    "equinox_batched",
)
def test_outputs_are_the_modules(make: Any) -> None:
    (model_fn, params), want = make()
    np.testing.assert_allclose(model_fn(params, X), want, rtol=1e-12, atol=1e-12)
    assert jnp.std(want) > 0.01
    # It depends on the parameters that it is given.
    other = model_fn(jax.tree.map(lambda p: p + 0.5, params), X)
    assert not np.allclose(other, want)


@every_maker
@pytest.mark.by_default("linen_dense", "equinox_mlp", "haiku_net", "nnx_linear")
def test_operators(make: Any) -> None:
    (model_fn, params), outputs = make()
    args = model_fn, ggn_jax.CrossEntropyLoss(), params, (X, TARGETS)
    leaves, treedef = jax.tree.flatten(params)
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def of_flat(theta: jax.Array) -> jax.Array:
        pieces = jnp.split(theta, sizes)
        return model_fn(treedef.unflatten([p.reshape(leaf.shape) for p, leaf in zip(pieces, leaves, strict=True)]), X)

    theta = jnp.concatenate([leaf.ravel() for leaf in leaves])
    jacobian = np.asarray(jax.jit(jax.jacobian(of_flat))(theta)).reshape(outputs.size, theta.size)
    hessian = jax.jit(jax.hessian(lambda f: ggn_jax.CrossEntropyLoss()(f, TARGETS)))(outputs)
    want = jacobian.T @ np.asarray(hessian).reshape(outputs.size, outputs.size) @ jacobian
    ggn = GGNLinearOperator(*args)
    np.testing.assert_allclose(ggn.as_matrix(), want, rtol=1e-11, atol=1e-12)
    assert np.abs(want).max() > 1e-3
    if make not in (made_nnx_net, made_linen_net, made_equinox_net):
        return
    solution = lx.linear_solve(ggn.damped(0.5), params, lx.CG(rtol=1e-10, atol=1e-10)).value
    assert jax.tree.structure(solution) == jax.tree.structure(params)
    got = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(solution)])
    np.testing.assert_allclose(got, np.linalg.solve(want + 0.5 * np.eye(theta.size), theta), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [made_nnx_net, made_linen_net], ids=lambda make: make.__name__)
@pytest.mark.sweep
def test_chunks_and_diagonal(make: Any) -> None:
    """No example sees another in evaluation: chunks, and batches of one, make no difference."""
    (model_fn, params), _ = make()
    args = model_fn, ggn_jax.CrossEntropyLoss(), params, (X, TARGETS)
    matrix = GGNLinearOperator(*args).as_matrix()
    np.testing.assert_allclose(GGNLinearOperator(*args, chunk_size=4).as_matrix(), matrix, rtol=1e-11, atol=1e-12)
    diagonal = GGNDiagonalLinearOperator(*args, chunk_size=4)
    np.testing.assert_allclose(lx.diagonal(diagonal), np.diagonal(matrix), rtol=1e-11, atol=1e-12)


@every_maker
def test_two_of_the_same_are_traced_once(make: Any) -> None:
    """A training loop may make the model function anew at each step."""
    traces = 0

    @jax.jit
    def apply(model_fn: Any, params: Any, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return model_fn(params, x)

    (first, params), want = make()
    (second, params_again), _ = make()
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert hash(jax.tree.structure(first)) == hash(jax.tree.structure(second))
    assert jax.tree.structure(params) == jax.tree.structure(params_again)
    for model_fn in (first, second):
        np.testing.assert_allclose(apply(model_fn, params, X), want, rtol=1e-12, atol=1e-12)
    assert traces == 1


@pytest.mark.parametrize(
    "make", [made_nnx_net, made_linen_dropout, made_equinox_mlp], ids=lambda make: make.__name__.removeprefix("made_")
)
def test_operators_of_two_of_the_same_have_one_structure(make: Any) -> None:
    operators = []
    for _ in range(2):
        (model_fn, params), _ = make()
        operators.append(GGNLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), params, (X, TARGETS)))
    assert jax.tree.structure(operators[0]) == jax.tree.structure(operators[1])


def test_leaves_of_a_model_are_what_is_not_a_parameter() -> None:
    module, variables = linen_net()
    model_fn, params = from_linen(module, variables, train=False)
    assert len(jax.tree.leaves(model_fn)) == len(jax.tree.leaves(variables["batch_stats"])) == 2
    assert jax.tree.leaves(params)[0] is jax.tree.leaves(variables["params"])[0]
    model_fn, params = from_equinox(equinox_net())
    assert [leaf.dtype for leaf in jax.tree.leaves(model_fn)] == [jnp.int64]
    assert len(jax.tree.leaves(params)) == 2


# Back into the module. -----------------------------------------------------------------------------------------------


def test_nnx_parameters_are_written_back() -> None:
    module = nnx_net()
    model_fn, params = from_nnx(module)
    before = module(X)
    new = jax.tree.map(lambda p: 0.5 * p + 0.1, params)
    nnx.update(module, new)
    np.testing.assert_allclose(module(X), model_fn(new, X), rtol=1e-12, atol=1e-12)
    assert not np.allclose(module(X), before)
    # And what was made before still is at its own values.
    np.testing.assert_allclose(model_fn(params, X), before, rtol=1e-12, atol=1e-12)


def test_nnx_statistics_are_held() -> None:
    """In training mode a call uses the batch's statistics, and keeps none."""
    module, x = nnx_net(dtype=jnp.float32), X.astype(jnp.float32)
    module.norm.use_running_average = False
    held = np.array(module.norm.mean[...])
    model_fn, params = from_nnx(module)
    first = model_fn(params, 2 * x)
    np.testing.assert_array_equal(model_fn(params, 2 * x), first)
    np.testing.assert_array_equal(module.norm.mean[...], held)
    module(2 * x)
    assert not np.allclose(module.norm.mean[...], held)


def test_linen_parameters_are_written_back() -> None:
    module, variables = linen_net()
    model_fn, params = from_linen(module, variables, train=False)
    new = jax.tree.map(lambda p: 0.5 * p + 0.1, params)
    want = module.apply({**variables, "params": new}, X, train=False)
    np.testing.assert_allclose(model_fn(new, X), want, rtol=1e-12, atol=1e-12)


def test_equinox_parameters_are_written_back() -> None:
    module = equinox_net()
    model_fn, params = from_equinox(module)
    new = jax.tree.map(lambda p: 0.5 * p + 0.1, params)
    np.testing.assert_allclose(jax.vmap(eqx.combine(new, module))(X), model_fn(new, X), rtol=1e-12, atol=1e-12)


@pytest.mark.sweep
def test_a_step_on_the_ggn_lowers_the_loss() -> None:
    """The whole way round: module, operator, solve, update, module."""
    module, loss = nnx_net(), ggn_jax.CrossEntropyLoss()
    model_fn, params = from_nnx(module)
    gradient = jax.grad(lambda params: loss(model_fn(params, X), TARGETS))(params)
    ggn = GGNLinearOperator(model_fn, loss, params, (X, TARGETS)).damped(0.1)
    step = lx.linear_solve(ggn, gradient, lx.CG(rtol=1e-8, atol=1e-8)).value
    before = loss(module(X), TARGETS)
    nnx.update(module, jax.tree.map(jnp.subtract, params, step))
    assert loss(module(X), TARGETS) < 0.92 * before


# Options. ------------------------------------------------------------------------------------------------------------


def test_linen_rngs_matter() -> None:
    module = LinenDropout()
    variables = module.init(jax.random.key(0), X, False)
    outputs = []
    for seed in (1, 1, 2):
        model_fn, params = from_linen(module, variables, rngs={"dropout": jax.random.key(seed)})
        outputs.append(np.asarray(model_fn(params, X)))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.allclose(outputs[0], outputs[2])


def test_float32_modules() -> None:
    """The modules' own default dtype."""
    x = X.astype(jnp.float32)
    dense = linen.Dense(2)
    for model_fn, params in (
        from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0))),
        from_linen(dense, dense.init(jax.random.key(0), x)),
        from_equinox(eqx.nn.Linear(3, 2, key=jax.random.key(0), dtype=jnp.float32)),
    ):
        matrix = GGNLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), params, (x, TARGETS)).as_matrix()
        assert matrix.dtype == jnp.float32
        assert jnp.trace(matrix) > 0.1


# Errors. -------------------------------------------------------------------------------------------------------------


def test_a_part_of_the_parameters_is_refused() -> None:
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    chain = linen.Sequential([linen.Dense(4), linen.Dense(2)])
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    made = [from_nnx(module), from_linen(chain, chain.init(jax.random.key(0), X)), from_equinox(mlp)]
    parts = [lambda p: {"layers": {1: p["layers"][1]}}, lambda p: {"layers_1": p["layers_1"]}, lambda p: p.layers[1]]
    for (model_fn, params), part in zip(made, parts, strict=True):
        with pytest.raises(ValueError, match=r"all 4 arrays that came with model_fn; got 2.*close over the others"):
            GGNLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), part(params), (X, TARGETS))


def test_wrong_types() -> None:
    dense, variables = linen.Dense(2, **F64), linen.Dense(2, **F64).init(jax.random.key(0), X)
    with pytest.raises(TypeError, match=r"must be a flax\.nnx\.Module; got Dense"):
        from_nnx(dense)
    with pytest.raises(TypeError, match=r"must be a flax\.linen\.Module; got Linear"):
        from_linen(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), variables)
    with pytest.raises(TypeError, match=r"must be an equinox\.Module; got function"):
        from_equinox(lambda x: x)
    with pytest.raises(ValueError, match=r"must have a collection 'params'; got \['kernel'"):
        from_linen(dense, {"kernel": variables["params"]["kernel"]})
    with pytest.raises(ValueError, match="mutable"):
        from_linen(dense, variables, mutable=["batch_stats"])


def test_import_needs_no_other_library() -> None:
    """Only what is used is imported."""
    code = "import sys, ggn_jax; print(sorted({'flax', 'torch', 'orbax', 'matfree', 'tqdm'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
