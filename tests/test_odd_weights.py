"""Parameters that meet data in ways that few models have, in one model: what is said of each, and that it is exact."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from zoo_layers import normal

import ggn_jax


@jax.custom_vjp
def counted(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A product, and the number of its entries that are positive, which has no derivative."""
    y = x @ w
    return y, jnp.sum(y > 0)


counted.defvjp(
    lambda w, x: (counted(w, x), (w, x)),
    lambda kept, g: (kept[1].T @ g[0], g[0] @ kept[0].T),
)


def convolve(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    """Of `[N, 4, 2]`."""
    return lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


def model_fn(p: Any, inputs: Any) -> jax.Array:
    x, ids = inputs["x"], inputs["ids"]
    turned = lax.complex(p["real"], p["imaginary"])[ids]
    signal = x.reshape(-1, 4, 2)
    # The kernel is data: the convolution of a parameter with it has the examples as its features.
    echo = convolve(p["image"][None, :, None], x[:, :3].T[:, None, :])
    rows = jax.vmap(lambda i: lax.dynamic_slice(p["table"], (i, i), (1, 2)))(ids)
    parts = [
        (p["one"] + p["two"])[ids],
        (p["number"] * p["numbered"])[ids],
        (p["scales"][:, None] * p["scaled"])[ids],
        turned.real * x[:, :2] - turned.imag,
        counted(p["counted"], x)[0],
        rows[:, 0],
        jnp.moveaxis(echo[0], -1, 0),
        convolve(signal, p["kernel"] + p["other"]).reshape(-1, 8),
        convolve(signal, p["gains"][:, None, None] * p["gained"]).reshape(-1, 8),
        convolve(signal, p["grouped"] * p["inside"][None, :, None], groups=2).reshape(-1, 8),
    ]
    return jnp.tanh(jnp.concatenate(parts, axis=1))


PARAMS = {
    **{name: normal(5, 2, seed=i) for i, name in enumerate(("one", "two", "numbered", "scaled", "real", "imaginary"))},
    "number": normal(seed=6),
    "scales": normal(5, seed=7),
    "counted": normal(8, 2, seed=8),
    "table": normal(6, 6, seed=9),
    "image": normal(4, seed=10),
    **{name: normal(3, 2, 2, seed=i) for i, name in enumerate(("kernel", "other", "gained"), 11)},
    "gains": normal(3, seed=14),
    "grouped": normal(3, 1, 2, seed=15),
    "inside": normal(1, seed=16),
}
INPUTS = {"x": normal(4, 8), "ids": jax.device_put(np.array([0, 3, 1, 4]))}


LAYERS = {
    "embedding": ("one", "two", "numbered", "real", "imaginary"),
    "convolution": ("kernel", "other", "grouped"),
    "scale": ("number", "inside"),
}
BY_ROW_OR_PLACE = "goes through mul"
REASONS = {
    "counted": "custom_vjp_call, whose derivative rule has no product",
    "image": "it is the input of a convolution whose kernel is data",
    "table": "this indexing reads other things than whole rows",
    **dict.fromkeys(("gains", "gained", "scales", "scaled"), BY_ROW_OR_PLACE),
}


def test_odd_uses_of_parameters() -> None:
    """Each is a layer or has its exact block, and gradients from both are those of automatic differentiation."""
    report = ggn_jax.report(model_fn, PARAMS, INPUTS)
    assert report.passed, str(report)
    kinds = {row.parameter: row.kind for row in report.rows}
    wanted = {f"['{name}']": kind for kind, names in LAYERS.items() for name in names}
    assert kinds == wanted | dict.fromkeys((f"['{name}']" for name in REASONS), "uncovered")
    for row in report.rows:
        if row.kind == "uncovered":
            assert row.curvature == "block"
            assert REASONS[row.parameter[2:-2]] in row.why
