"""Gradients of each example in the kernel of a convolution, of a batch that is sharded: those of dense Jacobians.

XLA takes them wrongly, of `jax.vmap(jax.grad(...))` as well; here they are computed in another form.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from designs import covering
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizer_cases import normal

import ggn_jax
from ggn_jax.layers.run import vmap_examples

Model = Callable[[Any, jax.Array], jax.Array]


def convolve(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def head(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x).reshape(x.shape[0], -1) @ params["w"]


def standardised(kernel: jax.Array) -> jax.Array:
    """A kernel computed from parameters: no layer."""
    return kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)


@jax.custom_jvp
def custom_jvp(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(x, standardised(kernel))


@custom_jvp.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda x, kernel: convolve(x, standardised(kernel)), primals, tangents)


@jax.custom_vjp
def straight_through(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Signs of the kernel's entries, with the derivative of the kernel itself."""
    return convolve(x, jnp.sign(kernel))


straight_through.defvjp(
    lambda x, kernel: (convolve(x, jnp.sign(kernel)), (x, kernel)),
    lambda saved, g: jax.vjp(convolve, saved[0], jnp.sign(saved[1]))[1](g),
)


def grouped(params: Any, x: jax.Array) -> jax.Array:
    return head(params, convolve(jnp.concatenate([x, x * x], -1), standardised(params["k"]), feature_group_count=2))


def looped(params: Any, x: jax.Array) -> jax.Array:
    step = jax.checkpoint(lambda x, kernel: (jnp.tanh(convolve(x, standardised(kernel))), None))
    return head(params, jax.lax.scan(step, jnp.concatenate([x, x * x], -1), params["ks"])[0])


def branching(params: Any, x: jax.Array) -> jax.Array:
    one = lambda x, kernel: convolve(x, standardised(kernel))  # noqa: E731
    two = lambda x, kernel: 2 * one(x, kernel)  # noqa: E731
    x = jax.lax.cond(params["w"][0, 0] > -9, one, two, x, params["k"])
    return head(params, jax.lax.platform_dependent(x, params["ks"][0], cpu=one, default=two))


MODELS: dict[str, Model] = {
    "plain": lambda params, x: head(params, convolve(x, params["k"])),
    "jit": lambda params, x: head(params, jax.jit(lambda x, k: convolve(x, standardised(k)))(x, params["k"])),
    "custom-jvp": lambda params, x: head(params, custom_jvp(x, params["k"])),
    "custom-vjp": lambda params, x: head(params, straight_through(x, params["k"])),
    "grouped": grouped,
    "looped": looped,
    "branching": branching,
}
LOSS = ggn_jax.CrossEntropyLoss()
BATCH = normal(0, 4, 3, 2, 1), jax.device_put(np.arange(4) % 3)


def parameters(name: str) -> Any:
    more = {"k": normal(1, 3, 3, 1, 2)} if name != "looped" else {}
    more |= {"ks": normal(2, 2, 3, 3, 2, 2)} if name in ("looped", "branching") else {}
    return {"w": normal(3, 12, 3), **more}


@cache
def wanted(name: str) -> Any:
    """The GGN from dense Jacobians."""
    params = parameters(name)
    flat, unravel = ravel_pytree(params)
    jacobian = np.asarray(jax.jit(jax.jacrev(lambda flat: MODELS[name](unravel(flat), BATCH[0])))(flat))
    p = scipy.special.softmax(np.asarray(jax.jit(MODELS[name])(params, BATCH[0])), axis=1)
    hessian = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    return np.einsum("nop,noq,nqr->pr", jacobian, hessian, jacobian) / len(p)


def place(kind: str, name: str) -> Any:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType[kind],))
    params = jax.device_put(parameters(name), NamedSharding(mesh, P()))
    return params, jax.device_put(BATCH, NamedSharding(mesh, P("data")))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.by_default("plain-Auto", "looped-Explicit", "grouped-Auto")
def test_the_diagonal_by_data(name: str, kind: str) -> None:
    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        return ggn_jax.GGNDiagonalLinearOperator(MODELS[name], LOSS, params, batch, method="data").entries

    found = ravel_pytree(jax.device_get(run(*place(kind, name))))[0]
    np.testing.assert_allclose(found, np.diagonal(wanted(name)), rtol=1e-12, atol=1e-14)


@covering(1, name=[name for name in MODELS if name != "plain"], kind=["Auto", "Explicit"])
@pytest.mark.by_default("looped-Auto", "grouped-Explicit", "custom-vjp-Auto")
def test_blocks_of_kernels_that_are_no_layers(name: str, kind: str) -> None:
    options: Any = {"fisher_type": "type-2", "on_uncovered": "full"}

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        return ggn_jax.KFACLinearOperator(MODELS[name], LOSS, params, batch, **options).block(path)

    path = "ks" if name in ("looped", "branching") else "k"
    size = parameters(name)[path].size
    start = parameters(name)["k"].size if name == "branching" else 0
    own = slice(start, start + size)
    np.testing.assert_allclose(run(*place(kind, name)), wanted(name)[own, own], rtol=1e-12, atol=1e-14)


@covering(
    2,
    size=[1, 2, 5],
    steps=[(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 2, 2)],
    groups=[1, 2],
    by_vectors=[False, True],
)
@pytest.mark.by_default(
    "1-steps7-2-False",
    "2-steps14-2-True",
    "5-steps24-1-False",
)
def test_kernel_gradients_of_examples(size: int, steps: Any, groups: int, by_vectors: bool) -> None:
    """With strides and dilations, one by one; with several vectors for each example too."""

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        stride, input_dilation, dilation = steps
        numbers, padding = ("NCH", "OIH", "NCH"), [(size * dilation, 1)]
        options: Any = {"feature_group_count": groups, "dimension_numbers": numbers}
        return jax.lax.conv_general_dilated(x, kernel, (stride,), padding, (input_dilation,), (dilation,), **options)

    kernel, x = normal(0, 4, 4 // groups, size), normal(1, 3, 2, 4, 6)
    vectors = normal(2, 3, 2, *conv(x[0], kernel).shape)

    @jax.jit
    def gradient(x: jax.Array, vector: jax.Array) -> Any:
        return jax.vjp(conv, x, kernel)[1](vector)

    def of_example(x: jax.Array, vectors: jax.Array) -> Any:
        return vmap_examples(lambda vector: gradient(x, vector))(vectors)

    if by_vectors:
        found = jax.jit(vmap_examples(of_example))(x, vectors)
        want = [[gradient(x, v) for v in vs] for x, vs in zip(x, vectors, strict=True)]
    else:
        found = jax.jit(vmap_examples(gradient))(x, vectors[:, 0])
        want = [gradient(x, v) for x, v in zip(x, vectors[:, 0], strict=True)]
    for number, part in enumerate(found):
        right = [[g[number] for g in vs] if by_vectors else vs[number] for vs in want]
        np.testing.assert_allclose(part, np.asarray(right), rtol=1e-12, atol=1e-12)
