"""KFOC: the nearest Kronecker product of the exact block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kronecker_cases import CE, FIRST, INPUTS, KFAC, KFOC, LABELS, PARAMS, TIED, normal, tanh_net, tied
from oracles import dense_ggn as ggn
from oracles import nearest_product

import ggn_jax
from ggn_jax.kronecker.algebra import Kronecker


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.by_default("joint")
def test_kfoc_is_the_nearest_kronecker_product(bias: Any) -> None:
    """The leading singular pair of the exact block, rearranged, with positive semi-definite factors."""
    batch = INPUTS, LABELS
    operator = KFOC(tanh_net, CE, PARAMS, batch, fisher_type="type-2", bias=bias)
    exact = np.asarray(ggn(tanh_net, CE, PARAMS, batch))
    kfac = KFAC(tanh_net, CE, PARAMS, batch, fisher_type="type-2", bias=bias)
    for start, name, out, inputs in ((0, "1/w", 4, 3), (FIRST, "2/w", 2, 4)):
        order = start + out + np.arange(out * inputs).reshape(inputs, out).T  # [out, in]
        if bias == "joint":
            order = np.concatenate([order, start + np.arange(out)[:, None]], 1)
        block = exact[np.ix_(order.reshape(-1), order.reshape(-1))]
        width = order.shape[1]
        np.testing.assert_allclose(operator.block(name), nearest_product(block, out, width), atol=1e-10)
        assert np.linalg.norm(block - operator.block(name)) <= np.linalg.norm(block - kfac.block(name))
        factors = operator.factors()[f"['{name[0]}']['w']" if bias == "separate" else next(iter(names(operator, name)))]
        for factor in (*factors.a, *factors.b):
            assert np.linalg.eigvalsh(factor[0]).min() > -1e-14


def names(operator: Any, name: str) -> list[str]:
    """The key of the block that holds a parameter."""
    path = f"['{name[0]}']['{name[2]}']"
    return [spec.names[0] for spec, _ in operator.blocks.unstacked() if path in spec.names]


def test_kfoc_of_tied_and_shared_weights() -> None:
    batch = INPUTS, LABELS
    operator = KFOC(tied, CE, TIED, batch, fisher_type="type-2")
    exact = ggn(tied, CE, TIED, batch)[6:, 6:].reshape(3, 3, 3, 3).transpose(1, 0, 3, 2)  # [out, in, out, in]
    nearest = nearest_product(exact, 3, 3)
    np.testing.assert_allclose(operator.block("w"), nearest, atol=1e-10)
    inverse = operator.inverse(0.1).block("w")
    np.testing.assert_allclose(inverse, np.linalg.inv(nearest + 0.1 * np.eye(9)), atol=1e-8)
    with pytest.raises(NotImplementedError, match="chunk_size"):
        KFOC(tied, CE, TIED, batch, fisher_type="type-2", chunk_size=2)


def test_nearest_of_random_sums() -> None:
    rng = np.random.default_rng(0)
    nearest = jax.jit(lambda a, b: Kronecker(tuple(a), tuple(b)).nearest())
    for _ in range(10):
        roots = [rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 4, 4))]
        a, b = ([(r @ r.T)[None] for r in root] for root in roots)
        near = nearest(a, b)
        rearranged = sum(np.outer(y, x) for x, y in zip(a, b, strict=True))
        u, s, vt = np.linalg.svd(rearranged)
        np.testing.assert_allclose(
            np.outer(near.b[0], near.a[0]), s[0] * np.outer(u[:, 0], vt[0]), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("options", [{"sharing": "reduce"}, {"tied": "concatenate"}, {"mask": jnp.ones((6, 2), bool)}])
def test_kfoc_refuses_what_it_does_not_use(options: Any) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        ggn_jax.KFOCLinearOperator(
            lambda p, x: x @ p["w"],
            ggn_jax.MSELoss(),
            {"w": normal(3, 2)},
            (normal(6, 2, 3), normal(6, 2, 2)),
            fisher_type="empirical",
            **options,
        )
