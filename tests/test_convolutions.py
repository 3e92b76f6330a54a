"""Convolutions and max pooling run in ways of their own, and input factors need no patches: the same numbers."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from designs import covering
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ggn_jax
from ggn_jax.kronecker import convolution as factors
from ggn_jax.kronecker.inputs import Inputs
from ggn_jax.kronecker.layout import EqualParts
from ggn_jax.kronecker.options import Options
from ggn_jax.layers import capture, trace_model
from ggn_jax.layers.dot import has_unit_axes
from ggn_jax.layers.run import run_equation


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape))


@pytest.mark.parametrize(
    ("dimensions", "subscripts"),
    [
        ((([1], [2]), ([], [])), "aibj,kli->abjkl"),
        ((([1], [2]), ([3], [0])), "aibj,jli->jabl"),
        ((([], []), ([3], [0])), "aibj,jlk->jaiblk"),
    ],
)
def test_products_without_axes_of_length_one(dimensions: Any, subscripts: str) -> None:
    x, y = normal(1, 3, 1, 4), normal(4, 1, 3, seed=1)
    eqn = jax.make_jaxpr(lambda x, y: jax.lax.dot_general(x, y, dimensions))(x, y).jaxpr.eqns[0]
    assert has_unit_axes(eqn)
    (found,) = run_equation(eqn, [x, y])
    np.testing.assert_allclose(found, np.einsum(subscripts, x, y), rtol=1e-14)


CONVOLUTIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "1d": ((3, 9, 2), (3, 2, 4), {"numbers": ("NHC", "HIO", "NHC"), "strides": (1,)}),
    "strided": ((3, 9, 2), (4, 2, 4), {"numbers": ("NHC", "HIO", "NHC"), "strides": (3,), "padding": [(2, 3)]}),
    "strided-dilated": ((3, 12, 2), (4, 2, 3), {"numbers": ("NHC", "HIO", "NHC"), "strides": (2,), "rd": (3,)}),
    "dilated-by-the-stride": ((3, 12, 2), (3, 2, 3), {"numbers": ("NHC", "HIO", "NHC"), "strides": (2,), "rd": (2,)}),
    "wider-than-the-input": ((3, 4, 2), (5, 2, 3), {"numbers": ("NHC", "HIO", "NHC"), "strides": (1,)}),
    "2d": ((2, 6, 5, 2), (3, 2, 2, 3), {}),
    "longest-last": ((2, 5, 6, 2), (1, 4, 2, 3), {"strides": (2, 1)}),
    "channels-first": ((2, 2, 6, 5), (3, 2, 3, 3), {"numbers": ("NCHW", "OIHW", "NCHW"), "strides": (2, 1)}),
    "groups": ((2, 6, 5, 4), (3, 3, 2, 6), {"groups": 2, "rd": (2, 1)}),
    "depthwise": ((2, 6, 5, 3), (2, 3, 1, 6), {"groups": 3, "padding": "VALID"}),
    "groups-first": ((2, 4, 6, 5), (6, 2, 3, 2), {"numbers": ("NCHW", "OIHW", "NCHW"), "groups": 2}),
    "transposed": ((2, 4, 5, 2), (3, 2, 2, 3), {"ld": (2, 3), "padding": [(2, 1), (1, 1)]}),
    "cropped": ((2, 6, 6, 2), (3, 2, 2, 3), {"padding": [(-1, 2), (1, -1)]}),
    "1x1": ((2, 4, 5, 2), (1, 1, 2, 3), {}),
    "3d": ((2, 4, 3, 5, 2), (2, 3, 2, 2, 3), {"numbers": ("NHWDC", "HWDIO", "NHWDC"), "strides": (1, 2, 1)}),
}


def conv(name: str) -> tuple[Any, jax.Array, jax.Array]:
    shape, kernel, given = CONVOLUTIONS[name]
    numbers = given.get("numbers", ("NHWC", "HWIO", "NHWC"))

    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            given.get("strides", (1,) * (len(shape) - 2)),
            given.get("padding", "SAME"),
            lhs_dilation=given.get("ld"),
            rhs_dilation=given.get("rd"),
            dimension_numbers=numbers,
            feature_group_count=given.get("groups", 1),
        )

    return run, normal(*shape), normal(*kernel)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_derivatives(name: str) -> None:
    run, x, kernel = conv(name)
    eqn = jax.make_jaxpr(run)(x, kernel).eqns[-1]

    @jax.jit
    def both(x: jax.Array, kernel: jax.Array) -> Any:
        y, pull_back = jax.vjp(run, x, kernel)
        ours, pull_ours_back = jax.vjp(lambda *values: run_equation(eqn, values)[0], x, kernel)
        return (ours, *pull_ours_back(y)), (y, *pull_back(y))

    for got, want in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_forward_derivatives_of_gradients() -> None:
    run, x, kernel = conv("2d")
    eqn = jax.make_jaxpr(run)(x, kernel).eqns[-1]
    hessian = [
        jax.jit(lambda k, fn=fn: jax.jvp(jax.grad(lambda k: jnp.sum(fn(x, k) ** 3)), (k,), (k,))[1])(kernel)
        for fn in (run, lambda *values: run_equation(eqn, values)[0])
    ]
    np.testing.assert_allclose(hessian[1], hessian[0], rtol=1e-11, atol=1e-11)


@covering(1, name=CONVOLUTIONS, entries=[1, 60, None])
@pytest.mark.by_default("transposed-None", "strided-dilated-None", "groups-None", "channels-first-60")
def test_input_factors_are_those_of_patches(name: str, entries: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in chunks of the batch, which need not divide it."""
    if entries is not None:
        monkeypatch.setitem(factors.CHUNK_ENTRIES, "cpu", entries)
    run, x, kernel = conv(name)
    params = {"kernel": kernel}
    model_fn = lambda params, x: run(x, params["kernel"])  # noqa: E731
    trace = trace_model(model_fn, params, x)
    (use,) = trace.uses

    @jax.jit
    def both(params: Any, x: jax.Array) -> Any:
        inputs = Inputs(use, capture(trace, params, x).inputs[0], None, Options(), jnp.float64)
        found = [inputs.factors(joint, (EqualParts(0, inputs.width(joint), 1),))[0] for joint in (True, False)]
        return inputs.raw_rows(True), *found

    patches, got, without_bias = map(np.asarray, both(params, x))
    patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
    np.testing.assert_allclose(got, np.einsum("gmi,gmj->gij", patches, patches), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(without_bias, got[:, :-1, :-1], rtol=1e-14)


POOLS: list[tuple[Any, Any, Any, Any]] = [
    ((2, 6, 7, 3), (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    ((2, 6, 7, 3), (1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
    ((2, 6, 7, 3), (1, 2, 2, 1), (1, 3, 2, 1), "VALID"),
    ((2, 7, 7, 3), (1, 2, 2, 1), (1, 3, 3, 1), "SAME"),
    ((2, 9, 7, 3), (1, 2, 3, 1), (1, 2, 3, 1), [(0, 0), (1, 2), (2, 1), (0, 0)]),
    ((5, 9), (1, 3), (1, 1), "SAME"),
    ((2, 8, 8, 4), (1, 2, 2, 2), (1, 2, 2, 2), "VALID"),
    ((1, 8, 8, 1), (1, 8, 8, 1), (1, 8, 8, 1), "VALID"),  # larger than what is treated apart
]


@covering(1, case=POOLS, dtype=[jnp.float64, jnp.bfloat16])
def test_max_pools_and_their_derivatives(case: Any, dtype: Any) -> None:
    """With many ties, which go to the first entry of a window."""
    shape, window, strides, padding = case
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), dtype)

    def pool(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)

    closed = jax.make_jaxpr(pool)(x)
    (eqn,), (out,) = closed.eqns, closed.out_avals
    g = jnp.asarray(np.random.default_rng(1).integers(-4, 5, out.shape), dtype)  # sums of these are exact
    dx = jnp.asarray(np.random.default_rng(2).integers(-4, 5, shape), dtype)

    @jax.jit
    def ours(x: jax.Array, g: jax.Array, dx: jax.Array) -> Any:
        y, pull_back = jax.vjp(lambda x: run_equation(eqn, [x])[0], x)
        return y, pull_back(g)[0], jax.jvp(lambda x: run_equation(eqn, [x])[0], (x,), (dx,))[1]

    @jax.jit
    def oracle(x: jax.Array, g: jax.Array, dx: jax.Array) -> Any:
        y, pull_back = jax.vjp(pool, x)
        # At ties, JAX's own derivative in forward mode differs from its transpose.
        taken = jax.vmap(pull_back)(jnp.eye(y.size, dtype=dtype).reshape(y.size, *y.shape))[0]
        return y, pull_back(g)[0], jnp.sum(taken * dx[None], range(1, taken.ndim)).reshape(y.shape)

    # JAX's own on the CPU always, so that on a GPU it is ours that is tested, and not both.
    on_cpu = jax.device_put((x, g, dx), jax.devices("cpu")[0])
    for got, want in zip(jax.device_get(ours(x, g, dx)), jax.device_get(oracle(*on_cpu)), strict=True):
        np.testing.assert_array_equal(got.astype(float), want.astype(float))


def network() -> tuple[Any, Any, tuple[jax.Array, jax.Array]]:
    params = {"conv": normal(3, 3, 2, 4), "bias": normal(4), "head": normal(16, 3)}

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jnp.tanh(x + params["bias"][None, None, None])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.reshape(x.shape[0], -1) @ params["head"]

    return model_fn, params, (normal(6, 4, 4, 2), jax.device_put(np.arange(6) % 3))


def kfac(params: Any, batch: Any) -> Any:
    model_fn, loss = network()[0], ggn_jax.CrossEntropyLoss()
    return ggn_jax.KFACLinearOperator(model_fn, loss, params, batch, fisher_type="type-2").mv(params)


def test_forward_derivatives_of_operators() -> None:
    model_fn, params, batch = network()

    def diagonal(params: Any) -> Any:
        operator = ggn_jax.GGNDiagonalLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), params, batch)
        return operator.mv(jax.tree.map(jnp.ones_like, params))

    def dense(params: Any) -> Any:
        """Of J^T H J for one example after the other, with JAX's own derivatives."""
        inputs, _ = batch
        p = jax.nn.softmax(model_fn(params, inputs))
        root = jnp.sqrt(p)[:, :, None] * (jnp.eye(3)[None] - p[:, None, :])  # its outer products' sum is the Hessian
        jacobians = jax.jacrev(model_fn)(params, inputs)
        return jax.tree.map(lambda j: jnp.mean(jnp.einsum("nvc,nc...->nv...", root, j) ** 2, 0).sum(0), jacobians)

    got, want = (jax.jit(lambda p, fn=fn: jax.jvp(fn, (p,), (p,)))(params) for fn in (diagonal, dense))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_kfac_of_a_convolutional_net_lowers_for_gpu_and_tpu() -> None:
    _, params, batch = network()
    exported = jax.export.export(jax.jit(kfac), platforms=("cpu", "cuda", "tpu"))(params, batch)
    for got, want in zip(
        jax.tree.leaves(exported.call(params, batch)), jax.tree.leaves(kfac(params, batch)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.sweep
def test_kfac_of_a_convolutional_net_on_a_sharded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(factors.CHUNK_ENTRIES, "cpu", 100)
    _, params, batch = network()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    pairs = zip(jax.tree.leaves(jax.jit(kfac)(params, sharded)), jax.tree.leaves(kfac(params, batch)), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-11)
