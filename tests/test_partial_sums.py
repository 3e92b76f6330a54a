"""Sums over a part of the data are saved, added, and finished as the operator of all data."""

import pickle
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_batches import CE, EKFAC, INPUTS, KFAC, KFOC, LABELS, LOSSES, PARAMS, as_batches, tanh_net

import ggn_jax
from ggn_jax import GGNDiagonalLinearOperator

ARGS = tanh_net, CE, PARAMS
DRAWN: dict[str, Any] = {"fisher_type": "mc", "key": jax.random.key(1), "mc_samples": 2}
FIRST, SECOND = as_batches(3, 1, 3)[:1], as_batches(3, 1, 3)[1:]


def sine_net(params: Any, x: jax.Array) -> jax.Array:
    """Layers like those of `tanh_net`."""
    return jnp.sin(tanh_net(params, x))


def through_a_file(sums: ggn_jax.PartialSums, like: ggn_jax.PartialSums, path: Path) -> ggn_jax.PartialSums:
    np.savez(path, *jax.tree.leaves(sums))
    with np.load(path) as saved:
        leaves = [saved[f"arr_{i}"] for i in range(len(saved.files))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def test_kfac_in_parts_is_that_of_all_data(tmp_path: Path) -> None:
    """With the same draws; the first part is saved, and added to the second by another program."""
    first = KFAC.partial_sums(*ARGS, FIRST, **DRAWN)
    second = KFAC.partial_sums(*ARGS, SECOND, start=int(first.examples), **DRAWN)
    restored = through_a_file(first, second, tmp_path / "sums.npz")
    operator = KFAC.finish(restored + second)
    whole = KFAC(*ARGS, (INPUTS, LABELS), **DRAWN)
    assert jax.tree.structure(operator) == jax.tree.structure(whole)
    np.testing.assert_allclose(operator.as_matrix(), whole.as_matrix(), atol=1e-14)
    assert int(sum([first, second]).examples) == 7
    np.testing.assert_allclose(sum([operator, whole]).trace(), 2 * whole.trace(), rtol=1e-12)
    assert "KFACLinearOperator" in repr(first)
    np.testing.assert_array_equal((second + restored).draws[:, 1:], [[0, 7]])
    with pytest.raises(ValueError, match=r"draws of one key for the examples 0 to 2: pass start="):
        second + restored + first
    other = KFAC.partial_sums(*ARGS, FIRST, **{**DRAWN, "key": jax.random.key(2)})
    assert (first + other).draws.shape == (2, 3)
    broken = eqx.tree_at(lambda sums: sums.totals, first, jax.tree.map(lambda x: x * np.nan, first.totals))
    assert np.isnan(KFAC.finish(broken).trace())  # and not 0, as without examples


def test_ekfac_in_parts_is_that_of_all_data(tmp_path: Path) -> None:
    """Both passes in parts; the second ones take the first one's eigenbases, of factors with equal eigenvalues."""
    factors = EKFAC.partial_sums(*ARGS, FIRST, **DRAWN) + EKFAC.partial_sums(*ARGS, SECOND, start=3, **DRAWN)
    first = EKFAC.partial_sums(*ARGS, FIRST, factors=factors, **DRAWN)
    second = EKFAC.partial_sums(*ARGS, SECOND, factors=first, start=3, **DRAWN)
    whole = EKFAC(*ARGS, (INPUTS, LABELS), **DRAWN)
    first = through_a_file(first, second, tmp_path / "sums.npz")
    np.testing.assert_allclose(EKFAC.finish(first + second).as_matrix(), whole.as_matrix(), atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.by_default("mean")
def test_a_diagonal_in_parts_is_that_of_all_data(reduction: str) -> None:
    args, options = (
        (tanh_net, ggn_jax.CrossEntropyLoss(reduction=reduction), PARAMS),
        {"mc_samples": 2, "key": DRAWN["key"]},
    )
    first = GGNDiagonalLinearOperator.partial_sums(*args, FIRST, **options)
    second = GGNDiagonalLinearOperator.partial_sums(*args, SECOND, start=3, **options)
    whole = GGNDiagonalLinearOperator(*args, (INPUTS, LABELS), **options)
    found = GGNDiagonalLinearOperator.finish(first + second)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-14), found.entries, whole.entries)


def test_errors_of_partial_sums() -> None:
    exact = {"fisher_type": "type-2"}
    sums = KFAC.partial_sums(*ARGS, FIRST, **exact)
    factors = EKFAC.partial_sums(*ARGS, FIRST, **exact)
    diagonal = GGNDiagonalLinearOperator.partial_sums(*ARGS, FIRST)
    other = "one operator, model, loss and set of options"
    with pytest.raises(ValueError, match=other):
        sums + KFAC.partial_sums(*ARGS, FIRST, bias="separate", **exact)
    with pytest.raises(ValueError, match=other):
        sums + KFAC.partial_sums(tanh_net, LOSSES["weights"], PARAMS, FIRST, **exact)
    with pytest.raises(ValueError, match=other):
        diagonal + GGNDiagonalLinearOperator.partial_sums(*ARGS, FIRST, mc_samples=2, key=jax.random.key(0))
    short = jax.tree.map(lambda x: x[:1], diagonal.totals[0])
    with pytest.raises(ValueError, match=r"leaf 1 has \(3, 4\) and \(1, 4\): restore what was saved"):
        diagonal + eqx.tree_at(lambda sums: sums.totals[0]["1"]["w"], diagonal, short["1"]["w"])
    with pytest.raises(ValueError, match=r"of KFACLinearOperator and of EKFACLinearOperator"):
        sums + factors
    with pytest.raises(TypeError, match="cannot be pickled or copied: save arrays, as the leaves of partial sums"):
        pickle.dumps(sums)
    with pytest.raises(TypeError, match="added to others; got int"):
        sums + 0
    moved = tanh_net, CE, {**PARAMS, "2": {**PARAMS["2"], "b": PARAMS["2"]["b"].at[1].add(1e-9)}}
    with pytest.raises(ValueError, match="partial sums must be of the same parameters' values"):
        sums + KFAC.partial_sums(*moved, SECOND, **exact)
    for make, mine in ((KFAC, sums), (GGNDiagonalLinearOperator, diagonal)):
        with pytest.raises(
            ValueError, match="partial sums must be of one model; got those of a model_fn with other nonl"
        ):
            mine + make.partial_sums(sine_net, *ARGS[1:], SECOND, **(exact if make is KFAC else {}))
    with pytest.raises(ValueError, match="factors must be of the same parameters' values"):
        EKFAC.partial_sums(*moved, FIRST, factors=factors, **exact)
    with pytest.raises(TypeError, match=r"what KFACLinearOperator\.partial_sums returned; got those of GGNDiag"):
        KFAC.finish(diagonal)
    with pytest.raises(TypeError, match="got list"):
        GGNDiagonalLinearOperator.finish([diagonal])
    with pytest.raises(ValueError, match="EKFAC takes a second pass"):
        EKFAC.finish(factors)
    with pytest.raises(TypeError, match="factors are for EKFAC's second pass"):
        KFAC.partial_sums(*ARGS, FIRST, factors=sums, **exact)
    with pytest.raises(TypeError, match=r"factors must be what EKFAC.*got those of KFAC"):
        EKFAC.partial_sums(*ARGS, FIRST, factors=sums, **exact)
    with pytest.raises(ValueError, match="factors must be those of the same model"):
        EKFAC.partial_sums(*ARGS, FIRST, factors=factors, bias="separate", **exact)
    with pytest.raises(ValueError, match="got sums over 3 examples and over 4"):
        EKFAC.finish(EKFAC.partial_sums(*ARGS, SECOND, factors=factors, **exact))
    with pytest.raises(ValueError, match="start must be an integer of at least 0"):
        KFAC.partial_sums(*ARGS, FIRST, start=-1, **exact)
    with pytest.raises(NotImplementedError, match="KFOC"):
        KFOC.partial_sums(*ARGS, FIRST, **exact)
    with pytest.raises(ValueError, match="at least one batch"):
        KFAC.partial_sums(*ARGS, [], **exact)
    with pytest.raises(TypeError, match="partial_sums got an unexpected keyword argument 'mask'"):
        KFAC.partial_sums(*ARGS, FIRST, mask=None)
