"""Diagnoses of states against NumPy, and each finding where it must and must not appear."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from optimizer_cases import CE, KEY, batch_of, gradient, mlp, mlp_params, objective
from oracles import dense_ggn

import ggn_jax
from ggn_jax.optimizer.advice import Numbers, findings
from ggn_jax.optimizer.step import StepRule

STEPS = 7  # not a multiple of the interval of inverses, which are of the step before the last
MAKE: Any = partial(
    ggn_jax.kfac, mlp, CE, example_inputs=batch_of()[0], decay=0.0, factor_interval=1, fisher_type="type-2"
)
OPTIMIZER = MAKE()


@cache
def trained() -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """A state, its parameters, and those that each step started from, with the damping then."""

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        grads = jax.grad(lambda params: CE(mlp(params, batch[0]), batch[1]))(params)
        updates, new = OPTIMIZER.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), new), (params, state.curvature.damping)

    batches = jax.tree.map(lambda *x: jnp.stack(x), *(batch_of(seed=seed) for seed in range(STEPS)))
    start = mlp_params(), OPTIMIZER.init(mlp_params())
    (params, state), (each, dampings) = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))(start, batches)
    return params, state, [(jax.tree.map(lambda x, t=t: x[t], each), dampings[t]) for t in range(STEPS)]


def kfac_at(step: int) -> Any:
    """The curvature of one step, which is all that an average with a decay of 0 holds."""
    _, _, each = trained()
    return ggn_jax.KFACLinearOperator(mlp, CE, each[step][0], batch_of(seed=step), fisher_type="type-2")


def test_the_step_is_compared_with_the_quadratic_model() -> None:
    params, state, _ = trained()
    batch = batch_of(seed=20)
    found = OPTIMIZER.diagnose(state, params, batch)
    updates, _ = jax.jit(OPTIMIZER.update)(gradient(mlp, CE, params, batch), state, params, batch=batch)
    step, g = (np.asarray(ravel_pytree(x)[0]) for x in (updates, gradient(mlp, CE, params, batch)))
    damping = float(state.curvature.damping)
    bend, slope = step @ (dense_ggn(mlp, CE, params, batch) + damping * np.eye(len(step))) @ step, g @ step
    before = float(objective(mlp, CE, params, batch))
    change = float(objective(mlp, CE, optax.apply_updates(params, updates), batch)) - before
    np.testing.assert_allclose(found.loss, before, rtol=1e-12)
    np.testing.assert_allclose(found.predicted, slope + bend / 2, rtol=1e-7)
    np.testing.assert_allclose(found.reduction_ratio, change / (slope + bend / 2), rtol=1e-7)
    np.testing.assert_allclose(found.best_scale, -slope / bend, rtol=1e-7)
    assert (found.steps, found.damping) == (STEPS, damping)
    assert (found.clipped, found.rejected, found.skipped) == (0, 0, 0)


def test_inverses_and_eigenvalues() -> None:
    params, state, each = trained()
    batch, damping = batch_of(seed=20), float(state.curvature.damping)
    found = OPTIMIZER.diagnose(state, params, batch)
    grads = gradient(mlp, CE, params, batch)
    averages = kfac_at(STEPS - 1)
    new = averages.inverse(damping, "heuristic").mv(grads)
    old = kfac_at(STEPS - 2).inverse(float(each[STEPS - 2][1]), "heuristic").mv(grads)

    def relative(names: str) -> float:
        a, b = (np.concatenate([np.ravel(tree[name]) for name in names]) for tree in (old, new))
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    np.testing.assert_allclose(found.stale, relative("ucvd"), rtol=1e-6)
    g, d = (np.asarray(ravel_pytree(x)[0]) for x in (grads, old))
    np.testing.assert_allclose(found.cosine, g @ d / np.linalg.norm(g) / np.linalg.norm(d), rtol=1e-6)
    for block, (names, out) in zip(found.blocks, (("uc", 4), ("vd", 2)), strict=True):
        assert block.parameters == tuple(f"['{name}']" for name in names)
        np.testing.assert_allclose(block.stale, relative("".join(names)), rtol=1e-6)
        # The factors, but for their scales, are partial traces of the dense block.
        dense = np.asarray(averages.block(f"['{names[0]}']"))
        size = len(dense)
        parts = dense.reshape(out, size // out, out, size // out)
        a, b = np.trace(parts, axis1=0, axis2=2), np.trace(parts, axis1=1, axis2=3) / np.trace(dense)
        ratio = np.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b)))
        damped = [np.linalg.eigvalsh(x) + np.sqrt(damping) * r for x, r in ((a, ratio), (b, 1 / ratio))]
        low, high = (np.prod([end(x) for x in damped]) for end in (np.min, np.max))
        got = block.size, block.mean_eigenvalue, block.least_eigenvalue, block.greatest_eigenvalue
        np.testing.assert_allclose(got, (size, np.trace(dense) / size, low, high), rtol=1e-6)
        np.testing.assert_allclose(block.condition_number, high / low, rtol=1e-6)


def test_printed_and_drawn() -> None:
    params, state, _ = trained()
    found = OPTIMIZER.diagnose(state, params, batch_of(seed=20), key=KEY)
    text = str(found)
    assert text.startswith(f"After {STEPS} steps: loss")
    assert all(f"{name}:" in text for name in (one.name for one in found.findings))
    ax = Figure().gca()
    assert found.plot(ax) is ax
    assert [label.get_text() for label in ax.get_xticklabels()] == ["['u'], ['c']", "['v'], ['d']"]


def test_refused() -> None:
    params, state, _ = trained()
    with pytest.raises(ValueError, match="diagnose needs a state that has seen a batch"):
        OPTIMIZER.diagnose(OPTIMIZER.init(params), params, batch_of())
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda state: OPTIMIZER.diagnose(state, params, batch_of()).damping)(state)


HEALTHY = Numbers(
    steps=100,
    loss=0.5,
    cosine=0.4,
    damping=1e-3,
    reduction_ratio=0.9,
    best_scale=1.0,
    clipped=0.1,
    rejected=0.0,
    skipped=0.0,
    stale=0.1,
    sizes=(6, 4),
    mean_eigenvalues=(1e-3, 1e-5),
    condition_number=1e3,
    resolution=1e-7,
)
RULE = StepRule(
    learning_rate=ggn_jax.QuadraticModel(),
    damping=ggn_jax.SlopeDamping(),
    momentum="auto",
    kl_clip=None,
    weight_decay=0.0,
    weight_decay_mask=None,
    nesterov=False,
)


@pytest.mark.parametrize(
    ("change", "names", "words"),
    [
        ({}, [], ""),
        ({"damping": 1e-1}, ["damping-large"], "start from a smaller damping"),
        ({"damping": 1e-5, "mean_eigenvalues": (1e-7, 1.0)}, ["damping-large"], "Lower the minimum of SlopeDamping"),
        ({"damping": 1e-1, "steps": 20}, [], ""),  # it is falling already
        ({"damping": 1.005e-5, "steps": 20, "mean_eigenvalues": (1e-7, 1.0)}, ["damping-large"], "Lower the minimum"),
        ({"damping": 1e-1, "reduction_ratio": 0.7}, [], ""),  # the model would not hold with less
        ({"damping": 1e-1, "sizes": (4, 6), "mean_eigenvalues": (1e-3, 1e-1)}, [], ""),  # for few of the parameters
        ({"reduction_ratio": 0.2}, ["damping-small"], "Raise damping"),
        ({"reduction_ratio": -np.inf, "best_scale": -0.1}, ["step-uphill"], "momentum"),
        ({"reduction_ratio": 0.2, "best_scale": 0.3}, ["step-long"], "Lower the learning rate"),
        ({"best_scale": 5.0}, ["step-short"], "Raise the learning rate"),
        ({"best_scale": 5.0, "clipped": 0.6}, ["step-short", "clipped"], "Raise kl_clip"),
        ({"clipped": 0.6}, ["clipped"], "60%"),
        ({"clipped": 1.0, "steps": 3}, [], ""),
        ({"rejected": 0.02}, ["rejected"], "2.0%"),
        ({"skipped": 0.02}, ["skipped"], "2.0%"),
        ({"condition_number": 1e6}, ["ill-conditioned"], "1.0e+06"),
        ({"condition_number": 1e6, "resolution": 1e-16}, [], ""),
        ({"stale": 0.4}, ["stale-inverses"], "40%"),
        ({"loss": np.nan, "cosine": np.nan, "reduction_ratio": -np.inf, "stale": np.nan}, ["not-finite"], "is nan"),
        ({"cosine": np.nan, "best_scale": np.nan}, ["not-finite"], "The gradient is not finite"),
    ],
)
def test_findings(change: dict[str, Any], names: list[str], words: str) -> None:
    found = findings(HEALTHY._replace(**change), RULE)
    assert [one.name for one in found] == names
    assert words in "".join(f"{one.text} {one.advice}" for one in found)


def test_findings_without_steps() -> None:
    """Those of `scale_by_kfac`, which has a damping and inverses only."""
    numbers = HEALTHY._replace(damping=1e-1, reduction_ratio=None, best_scale=None)
    assert [(one.name, one.advice) for one in findings(numbers, None)] == [("damping-large", "Lower damping.")]
