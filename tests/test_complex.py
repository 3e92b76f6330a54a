"""Real parameters of complex layers: real layers, of the real and imaginary parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import dense_ggn
from zoo_layers import normal
from zoo_page import usual_promotion

import ggn_jax

MSE = ggn_jax.MSELoss()
KFAC, EKFAC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator
Pair = tuple[jax.Array, jax.Array]
TURN = jax.device_put(np.exp(0.3j * np.arange(2)))


def turned(real: jax.Array, imag: jax.Array) -> Pair:
    return real * TURN.real - imag * TURN.imag, real * TURN.imag + imag * TURN.real


def read(table: jax.Array, x: jax.Array) -> jax.Array:
    return table[jnp.argsort(x, axis=1)[:, 0]]


def modes(x: jax.Array) -> jax.Array:
    return x[:, :2, None] * jnp.exp(1j * jnp.arange(3.0))


# Parameters, complex numbers, and the same in real ones.
LAYERS: dict[str, tuple[Any, Callable[[Any, jax.Array], jax.Array], Callable[[Any, jax.Array], Pair]]] = {
    "weights of two parts": (
        {"im": normal(3, 2), "re": normal(3, 2, seed=1)},
        lambda p, x: x @ lax.complex(p["re"], p["im"]),
        lambda p, x: (x @ p["re"], x @ p["im"]),
    ),
    "parts in one array, as in S5": (
        {"w": normal(2, 3, 2)},
        lambda p, x: x @ (TURN[:, None] * (p["w"][..., 0] + 1j * p["w"][..., 1])).T,
        lambda p, x: turned(x @ p["w"][..., 0].T, x @ p["w"][..., 1].T),
    ),
    "complex data": (
        {"im": normal(3, 2), "re": normal(3, 2, seed=1)},
        lambda p, x: (x * (1 + 0.5j)) @ -lax.complex(p["re"], p["im"]),
        lambda p, x: (0.5 * x @ p["im"] - x @ p["re"], -x @ p["im"] - 0.5 * x @ p["re"]),
    ),
    "real weights of complex data": (
        {"w": normal(3, 2)},
        lambda p, x: (x * (1 + 0.5j)) @ p["w"],
        lambda p, x: (x @ p["w"], 0.5 * x @ p["w"]),
    ),
    "weights and data that are made complex": (
        {"w": normal(3, 2)},
        lambda p, x: jnp.einsum("io,ni->no", p["w"].astype(complex) * 1j, x.astype(complex)),
        lambda p, x: (jnp.zeros((len(x), 2)), x @ p["w"]),
    ),
    "a matrix for each frequency": (
        {"im": normal(2, 3, 2), "re": normal(2, 3, 2, seed=1)},
        lambda p, x: jnp.einsum("nki,kio->nko", modes(x), p["re"] + p["im"] * 1j).sum(1),
        lambda p, x: (
            (
                jnp.einsum("nki,kio->nko", (z := modes(x)).real, p["re"]) - jnp.einsum("nki,kio->nko", z.imag, p["im"])
            ).sum(1),
            (jnp.einsum("nki,kio->nko", z.real, p["im"]) + jnp.einsum("nki,kio->nko", z.imag, p["re"])).sum(1),
        ),
    ),
    "an adapter": (
        {"a": normal(3, 1), "b": normal(1, 2), "c": normal(1, 2, seed=1), "w": normal(3, 2)},
        lambda p, x: x @ (p["w"] + p["a"] @ lax.complex(p["b"], p["c"])),
        lambda p, x: (x @ p["w"] + (h := x @ p["a"]) @ p["b"], h @ p["c"]),
    ),
    "a table": (
        {"im": normal(3, 2), "re": normal(3, 2, seed=1)},
        lambda p, x: read(lax.complex(p["re"], p["im"]), x),
        lambda p, x: (read(p["re"], x), read(p["im"], x)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.by_default("a matrix for each frequency", "weights of two parts")
def test_complex_layers_are_real_ones(name: str) -> None:
    """As if both parts were written out: the factors of KFAC, and the exact diagonal."""
    params, layer, parts = LAYERS[name]

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        z = layer(p, x)
        return jnp.concatenate([z.real, z.imag * jnp.abs(z)], -1)

    def written_out(p: Any, x: jax.Array) -> jax.Array:
        real, imag = parts(p, x)
        return jnp.concatenate([real, imag * jnp.sqrt(real**2 + imag**2)], -1)

    batch = normal(5, 3), normal(5, 4, seed=1)
    with usual_promotion():
        report = ggn_jax.report(model_fn, params, batch[0])
        assert report.passed, str(report)
        assert {row.curvature for row in report.rows} == {"Kronecker"}, str(report)
        found, like = (KFAC(fn, MSE, params, batch, fisher_type="type-2").as_matrix() for fn in (model_fn, written_out))
        np.testing.assert_allclose(found, like, atol=1e-14)
        exact = np.diag(dense_ggn(written_out, MSE, params, batch))
        np.testing.assert_allclose(
            np.concatenate(
                [
                    x.ravel()
                    for x in jax.tree.leaves(ggn_jax.GGNDiagonalLinearOperator(model_fn, MSE, params, batch).entries)
                ]
            ),
            exact,
            atol=1e-14,
        )


@pytest.mark.parametrize("cls", [KFAC, EKFAC])
@pytest.mark.by_default("KFACLinearOperator")
def test_what_is_no_real_layer_has_the_exact_block(cls: Any) -> None:
    """One real parameter in both parts, a complex kernel, and a bias."""

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        z = x @ (p["w"] * lax.complex(p["w"], p["w"] ** 2)) + p["b"]
        z = lax.conv_general_dilated(
            z[..., None], p["k"].astype(complex), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        return jnp.concatenate([z.real, z.imag * jnp.abs(z)], -1).mean(-1)

    params = {"b": normal(2), "k": normal(2, 1, 2), "w": normal(3, 2)}
    batch = normal(5, 3), normal(5, 2, seed=1)
    with usual_promotion():
        report = ggn_jax.report(model_fn, params, batch[0])
        assert report.passed, str(report)
        assert report.uncovered == ("['k']", "['w']")
        exact, found = dense_ggn(model_fn, MSE, params, batch), cls(model_fn, MSE, params, batch, fisher_type="type-2")
    for name, part in {"b": slice(0, 2), "k": slice(2, 6), "w": slice(6, 12)}.items():
        np.testing.assert_allclose(found.block(name), exact[part, part], atol=1e-14)


def test_complex_outputs_are_refused_early() -> None:
    """By `report` and `init`, not by the first step."""

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.complex(x @ params, x @ params)

    params, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    with pytest.raises(TypeError, match=r"got complex128\. Return real and imaginary parts as two outputs"):
        ggn_jax.report(model_fn, params, x)
    optimizer = ggn_jax.kfac(model_fn, ggn_jax.MSELoss(), 0.1, example_inputs=x)
    with pytest.raises(TypeError, match=r"got complex128\. Return real and imaginary parts as two outputs"):
        optimizer.init(params)
