"""Fourier transforms and complex numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from torch_bridge.aten.dtypes import as_floating
from torch_bridge.aten.registry import aten


def _one(fn: Callable[..., Array]) -> Callable[..., Array]:
    def transform(x: Array, n: Any = None, dim: int = -1, norm: Any = None) -> Array:
        return fn(as_floating(x), n, dim, norm)

    return transform


def _several(fn: Callable[..., Array], axes: tuple[int, ...] | None) -> Callable[..., Array]:
    def transform(x: Array, s: Any = None, dim: Any = axes, norm: Any = None) -> Array:
        return fn(as_floating(x), None if s is None else tuple(s), None if dim is None else tuple(dim), norm)

    return transform


for _kind in ("fft", "ifft", "rfft", "irfft"):
    aten(f"fft_{_kind}")(_one(getattr(jnp.fft, _kind)))
    aten(f"fft_{_kind}2")(_several(getattr(jnp.fft, f"{_kind}n"), (-2, -1)))
    aten(f"fft_{_kind}n")(_several(getattr(jnp.fft, f"{_kind}n"), None))

SHIFTS: dict[str, Callable[..., Array]] = {"fft_fftshift": jnp.fft.fftshift, "fft_ifftshift": jnp.fft.ifftshift}
for _name, _shift in SHIFTS.items():
    aten(_name)(lambda x, dim=None, fn=_shift: fn(x, dim if dim is None or isinstance(dim, int) else tuple(dim)))

PARTS: dict[str, Callable[[Array], Array]] = {
    "_conj": jnp.conj,
    "conj": jnp.conj,
    "_conj_physical": jnp.conj,
    "conj_physical": jnp.conj,
    "imag": jnp.imag,
    "angle": jnp.angle,
    "mH": lambda x: jnp.conj(x.mT),
    "adjoint": lambda x: jnp.conj(x.mT),
    "view_as_real": lambda x: jnp.stack([x.real, x.imag], axis=-1),
    "view_as_complex": lambda x: jax.lax.complex(x[..., 0], x[..., 1]),
}
for _name, _part in PARTS.items():
    aten(_name)(_part)


@aten("complex")
def complex_(real: Array, imag: Array) -> Array:
    return jax.lax.complex(*jnp.broadcast_arrays(real, imag))


@aten("polar")
def polar(size: Array, angle: Array) -> Array:
    return complex_(size * jnp.cos(angle), size * jnp.sin(angle))
