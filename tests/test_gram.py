"""Sums of outer products: narrow and wide rows, with and without a last entry, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import normal

import ggn_jax
from ggn_jax.kronecker.outer_products import ALIGNED, sum_outer_products, sum_outer_products_with


@pytest.mark.parametrize("width", [3, ALIGNED - 1, ALIGNED, ALIGNED + 5])
@pytest.mark.parametrize("shared", [False, True])
def test_products(width: int, shared: bool) -> None:
    x = np.asarray(normal("x", 2, 7, width))
    last = np.asarray(normal("last", 1 if shared else 2, 7))
    whole = np.concatenate([x, np.broadcast_to(last[..., None], (2, 7, 1))], axis=-1)
    want = np.einsum("gmi,gmj->gij", whole, whole)
    np.testing.assert_allclose(jax.jit(sum_outer_products)(x), want[:, :-1, :-1], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(jax.jit(sum_outer_products_with)(x, last), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("masked", [False, True])
def test_input_factors_of_wide_layers_with_a_bias(sharing: str, masked: bool) -> None:
    """Of rows that are left out, too: in their own entry as in all others."""
    x = normal("inputs", 4, 3, ALIGNED + 1)
    params = {"kernel": normal("kernel", ALIGNED + 1, 2), "bias": normal("bias", 2)}
    mask = jnp.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]], bool) if masked else None

    def model_fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"][None, None]

    batch = x, jnp.zeros((4, 3, 2))
    options = {"fisher_type": "type-2", "positions": "exact", "sharing": sharing, "mask": mask, "bias": "joint"}
    kfac = ggn_jax.KFACLinearOperator(model_fn, ggn_jax.MSELoss(), params, batch, **options)
    rows = np.concatenate([np.asarray(x), np.ones((4, 3, 1))], axis=-1)
    keep = np.ones((4, 3)) if mask is None else np.asarray(mask, float)
    if sharing == "expand":
        rows = rows[keep > 0]
    else:
        rows = (rows * keep[..., None]).sum(1)[keep.any(1)] / keep.sum(1)[keep.any(1)][:, None]
    want = rows.T @ rows / len(rows)
    (block,) = kfac.blocks.blocks
    np.testing.assert_allclose(block.a[0][0], want, rtol=1e-12, atol=1e-12)
