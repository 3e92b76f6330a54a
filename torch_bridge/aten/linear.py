"""Matrix products and convolutions. Weights reach them as they are stored, or only moved, so that layers are found."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from torch_bridge.aten.dtypes import align, as_dtype, promote
from torch_bridge.aten.registry import aten


@aten("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    # The weight's own last axis is contracted: there is no transposed copy.
    y = lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())))
    return y if bias is None else y + align(bias, y)[0]


@aten("matmul", "mm", "bmm", "mv", "dot", "linalg_matmul")
def matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y)


@aten("vdot", "inner")
def inner(x: Array, y: Array) -> Array:
    return jnp.inner(x, y)


@aten("outer", "ger")
def outer(x: Array, y: Array) -> Array:
    return jnp.outer(x, y)


def _added(x: Array, product: Array, beta: Any, alpha: Any) -> Array:
    x, product = align(x, product if alpha == 1 else product * as_dtype(alpha, product.dtype))
    # torch does not read x if beta is 0, so NaN in it must not count.
    return (
        jnp.broadcast_to(product, jnp.broadcast_shapes(x.shape, product.shape))
        if beta == 0
        else ((x if beta == 1 else x * as_dtype(beta, x.dtype)) + product)
    )


@aten("addmm", "addmv", "baddbmm")
def addmm(x: Array, a: Array, b: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    return _added(x, jnp.matmul(a, b), beta, alpha)


@aten("addbmm")
def addbmm(x: Array, a: Array, b: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    return _added(x, jnp.sum(jnp.matmul(a, b), axis=0), beta, alpha)


@aten("addr")
def addr(x: Array, a: Array, b: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    return _added(x, jnp.outer(a, b), beta, alpha)


@aten("einsum")
def einsum(equation: str, operands: Sequence[Array], *, path: Any = None) -> Array:
    return jnp.einsum(equation.replace(" ", ""), *operands)


@aten("tensordot")
def tensordot(x: Array, y: Array, a: Sequence[int], b: Sequence[int]) -> Array:
    return jnp.tensordot(x, y, (tuple(a), tuple(b)))


@aten("bilinear")
def bilinear(x: Array, y: Array, weight: Array, bias: Array | None = None) -> Array:
    z = jnp.einsum("...i,oij,...j->...o", x, weight, y)
    return z if bias is None else z + align(bias, z)[0]


@aten("linalg_cross")
def linalg_cross(x: Array, y: Array, *, dim: int = -1) -> Array:
    x, y = jnp.broadcast_arrays(*promote(x, y))
    return jnp.cross(x, y, axis=dim)


@aten("cross")
def cross(x: Array, y: Array, dim: int | None = None) -> Array:
    """Without `dim`, along the first axis of length 3."""
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    return linalg_cross(x, y, dim=shape.index(3) if dim is None else dim)


def per_axis(value: Any, rank: int) -> list[int]:
    """A number for each spatial axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """The number of zeros before and after each spatial axis."""
    rank = len(kernel)
    if padding == "valid":
        return [(0, 0)] * rank
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in per_axis(padding, rank)]


def convolve(
    x: Array,
    weight: Array,
    bias: Array | None,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    input_dilation: Sequence[int] | None = None,
) -> Array:
    """A convolution of `[N, in, *spatial]`, or without `N`, with `[out, in / groups, *kernel]`."""
    rank = weight.ndim - 2
    batched = x.ndim == rank + 2
    spatial = "HWD"[:rank]
    y = lax.conv_general_dilated(
        x if batched else x[None],
        weight,
        strides,
        padding,
        lhs_dilation=input_dilation,
        rhs_dilation=dilation,
        dimension_numbers=(f"NC{spatial}", f"OI{spatial}", f"NC{spatial}"),
        feature_group_count=groups,
    )
    if bias is not None:
        y = y + bias.reshape(1, -1, *[1] * rank)
    return y if batched else y[0]


@aten("conv1d", "conv2d", "conv3d")
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Array:
    rank = weight.ndim - 2
    dilation = per_axis(dilation, rank)
    pads = _padding(padding, weight.shape[2:], dilation)
    return convolve(x, weight, bias, per_axis(stride, rank), pads, dilation, groups)


@aten("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Array:
    """The transpose of a convolution: a convolution with the mirrored kernel, of inputs with zeros in between."""
    # Written out, and not by `jax.linear_transpose`: as a convolution with a kernel that is only moved, it is a layer.
    rank = weight.ndim - 2
    stride, padding, extra, dilation = (per_axis(v, rank) for v in (stride, padding, output_padding, dilation))
    inputs, outputs, *kernel = weight.shape
    mirrored = lax.rev(weight, range(2, weight.ndim)).reshape(groups, inputs // groups, outputs, *kernel)
    mirrored = jnp.swapaxes(mirrored, 1, 2).reshape(groups * outputs, inputs // groups, *kernel)
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    pads = [(low, low + more) for low, more in zip(reach, extra, strict=True)]
    return convolve(x, mirrored, bias, [1] * rank, pads, dilation, groups, stride)


@aten("convolution")
def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Array:
    if transposed:
        return conv_transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(x, weight, bias, stride, padding, dilation, groups)


MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@aten("pad")
def pad(x: Array, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Array:
    """`pad` has two numbers for each axis, from the last one on; negative ones cut."""
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    if mode == "constant":
        return lax.pad(x, as_dtype(0 if value is None else value, x.dtype), [(*pair, 0) for pair in pairs])
    return jnp.pad(x, pairs, mode=MODES[mode])


@aten("constant_pad_nd")
def constant_pad(x: Array, padding: Sequence[int], value: Any = 0) -> Array:
    return pad(x, padding, "constant", value)


for _rank in (1, 2, 3):
    aten(f"reflection_pad{_rank}d")(functools.partial(pad, mode="reflect"))
    aten(f"replication_pad{_rank}d")(functools.partial(pad, mode="replicate"))


def _patches(kernel: Any, dilation: Any, padding: Any, stride: Any) -> Callable[[Array], Array]:
    """From images `[N, channels, height, width]` to their patches `[N, channels * kernel, positions]`."""

    def patches(x: Array) -> Array:
        found = lax.conv_general_dilated_patches(
            x,
            per_axis(kernel, 2),
            per_axis(stride, 2),
            [(p, p) for p in per_axis(padding, 2)],
            rhs_dilation=per_axis(dilation, 2),
        )
        return found.reshape(*found.shape[:2], math.prod(found.shape[2:]))

    return patches


@aten("col2im")
def col2im(x: Array, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Array:
    """The sum of patches at their positions (`torch.nn.Fold`): the transpose of `im2col`."""
    batched = x if x.ndim == 3 else x[None]
    channels = batched.shape[1] // math.prod(per_axis(kernel, 2))
    like = jax.ShapeDtypeStruct((batched.shape[0], channels, *per_axis(size, 2)), x.dtype)
    transposed = jax.linear_transpose(_patches(kernel, dilation, padding, stride), like)
    (images,) = transposed(batched)
    return images if x.ndim == 3 else images[0]


@aten("im2col")
def im2col(x: Array, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Array:
    """The patches of images, `[N, channels * kernel, positions]` (`torch.nn.Unfold`)."""
    return (
        _patches(kernel, dilation, padding, stride)(x)
        if x.ndim == 4
        else im2col(x[None], kernel, dilation, padding, stride)[0]
    )
