"""Blocks without curvature, and what Kronecker-factored operators refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kronecker_cases import CE, EKFAC, INPUTS, KFAC, LABELS, PARAMS, normal, scale_and_shift, tanh_net

import ggn_jax


def test_nothing_left_to_divide_by() -> None:
    """An all-masked batch has zero blocks; singular blocks are named."""
    loss = ggn_jax.CrossEntropyLoss(ignore_index=1)
    operator = KFAC(tanh_net, loss, PARAMS, (INPUTS, jnp.ones(7, int)), fisher_type="type-2")
    assert float(operator.trace()) == 0
    np.testing.assert_allclose(operator.inverse(0.5).mv(PARAMS)["1"]["w"], 2 * PARAMS["1"]["w"], rtol=1e-12)
    assert float(jnp.max(jnp.abs(operator.inverse(0.5, "heuristic").mv(PARAMS)["1"]["w"]))) < 10
    with pytest.raises(FloatingPointError, match=r"\['1'\]\['w'\]"):
        operator.inverse()


def test_unused_parameters_have_no_curvature() -> None:
    params = {"w": normal(3, 2), "unused": normal(2)}
    operator = KFAC(lambda p, x: x @ p["w"], CE, params, (INPUTS, LABELS), fisher_type="type-2")
    assert not np.any(operator.mv(params)["unused"])
    np.testing.assert_allclose(operator.inverse(0.5).mv(params)["unused"], 2 * params["unused"])


def test_empty_parameters() -> None:
    params = {"empty": jnp.zeros((0, 2)), "shift": jnp.zeros((0, 2)), "w": normal(3, 2)}

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + x[:, :0] @ p["empty"] + jnp.sum(p["shift"], 0)[None]

    assert ggn_jax.report(model_fn, params, INPUTS).passed
    operator = KFAC(model_fn, CE, params, (INPUTS, LABELS), fisher_type="type-2")
    assert operator.inverse(0.1).mv(params)["empty"].shape == (0, 2)
    nothing = KFAC(lambda p, x: x, ggn_jax.MSELoss(), {"n": params["empty"]}, (INPUTS, INPUTS), fisher_type="type-2")
    assert float(nothing.trace()) == 0
    with pytest.raises(KeyError, match="none with entries"):
        nothing.block("n")
    assert operator.block("w").shape == (6, 6)


@pytest.mark.sweep
def test_partly_used_parameters() -> None:
    params = {"w": normal(3, 4)}
    operator = KFAC(lambda p, x: x @ p["w"][:, :2], CE, params, (INPUTS, LABELS), fisher_type="type-2")
    matrix = np.asarray(operator.as_matrix())
    np.testing.assert_allclose(operator.inverse(0.5).as_matrix(), np.linalg.inv(matrix + 0.5 * np.eye(12)), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"fisher_type": "type2"}, ValueError, "fisher"),
        ({}, ValueError, "key"),
        ({"fisher_type": "mc", "mc_samples": 0}, ValueError, "mc_samples must be an integer of at least 1"),
        ({"fisher_type": "type-2", "sharing": "both"}, ValueError, "sharing must be 'expand' or 'reduce'; got"),
        ({"fisher_type": "type-2", "large": np.ones(2)}, ValueError, "large must be 'block' or 'diagonal'; got array"),
        ({"fisher_type": "type-2", "bias": None}, ValueError, "bias must be 'joint' or 'separate'; got"),
        ({"fisher_type": "type-2", "on_uncovered": "skip"}, ValueError, "on_uncovered must be"),
        ({"fisher_type": "type-2", "mask": np.ones(7, bool)}, ValueError, "mask must be boolean"),
        ({"fisher_type": "type-2", "mask": np.ones((7, 3), bool)}, ValueError, "no layer"),
        ({"fisher_type": "type-2", "max_dense_size": 0}, ValueError, "max_dense_size"),
        ({"fisher_type": "type-2", "max_small_size": 0}, ValueError, "max_small_size"),
        ({"fisher_type": "type-2", "vector_chunk_size": 1.5}, TypeError, "vector_chunk_size"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), **options)


def test_more_errors() -> None:
    operator = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2")
    with pytest.raises(ValueError, match="method must be"):
        operator.inverse(0.1, "fast")
    with pytest.raises(ValueError, match="must not be negative"):
        operator.inverse(-0.1)
    with pytest.raises(ValueError, match="must have shape"):
        operator.mv(jax.tree.map(lambda x: x[None], PARAMS))
    with pytest.raises(NotImplementedError, match="forward-only"):
        EKFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="forward-only")
    params = {"s": normal(2), "t": normal(2), "w": normal(3, 2)}
    with pytest.raises(NotImplementedError, match="forward-only"):
        KFAC(scale_and_shift, CE, params, (INPUTS, LABELS), fisher_type="forward-only")


@pytest.mark.parametrize("make", [ggn_jax.KFACLinearOperator, ggn_jax.GGNDiagonalLinearOperator])
def test_coupled_examples_are_refused_also_where_outputs_hide_it(make: Any) -> None:
    """A branch with batch statistics that starts at 0 changes no output, but the gradients."""

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        hidden = x @ params["u"]
        hidden = (hidden - jnp.mean(hidden, 0, keepdims=True)) / jnp.sqrt(jnp.var(hidden, 0, keepdims=True) + 1e-5)
        return x @ params["w"] + hidden @ params["zero"]

    params = {"u": normal(3, 4), "w": normal(3, 2), "zero": jnp.zeros((4, 2))}
    with pytest.raises(ValueError, match="couples examples"):
        make(model_fn, ggn_jax.MSELoss(), params, (normal(6, 3), normal(6, 2)), **KEYS.get(make, {}))


KEYS: dict[Any, Any] = {ggn_jax.KFACLinearOperator: {"key": jax.random.key(0)}}


def test_nan_outputs_are_told_as_such() -> None:
    x = normal(6, 3).at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="are NaN for the first examples"):
        ggn_jax.KFACLinearOperator(
            lambda p, x: x @ p["w"], ggn_jax.MSELoss(), {"w": normal(3, 2)}, (x, normal(6, 2)), key=jax.random.key(0)
        )


@pytest.mark.parametrize("cls", [ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator])
def test_outputs_without_entries_have_no_curvature(cls: Any) -> None:
    params, batch = {"w": normal(5, 3)}, (normal(8, 5), jnp.zeros((8, 0)))
    operator = cls(lambda p, x: (x @ p["w"])[:, :0], ggn_jax.MSELoss(), params, batch, fisher_type="type-2")
    assert float(operator.trace()) == 0
