"""Programs for CUDA: all public functions are lowered, and inverses are as they compute them there."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_cases import problem, step_of

import ggn_jax
from ggn_jax.kronecker.inverse import inverse_by_halves, inverse_by_solves


@pytest.mark.parametrize("invert", [inverse_by_halves, inverse_by_solves])
@pytest.mark.by_default("inverse_by_halves")
def test_inverses_from_triangular_factors(invert: Callable[[jax.Array], jax.Array]) -> None:
    size = 1500  # cut in halves once
    x = np.random.default_rng(0).normal(size=(size, 2 * size)) / size**0.5
    matrix = x @ x.T
    got = jax.jit(invert)(jnp.linalg.cholesky(jnp.asarray(matrix)))
    np.testing.assert_allclose(got, np.linalg.inv(matrix), rtol=1e-9, atol=1e-11)


@cache
def programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The public functions, each on a small case."""
    model_fn, loss, params, batch = problem()
    key = jax.random.key(2)
    args = params, batch

    def operator(cls: Any, use: Callable[[Any, Any], Any], **options: Any) -> Any:
        return lambda params, batch: use(cls(model_fn, loss, params, batch, **options), params)

    def apply(op: Any, v: Any) -> Any:
        return op.mv(v)

    outputs, targets = jnp.zeros((6, 3)), jnp.zeros(6, jnp.int32)
    ce = ggn_jax.CrossEntropyLoss()
    found: dict[str, Any] = {
        f"vectors {kind}": (
            lambda o, t, kind=kind: ggn_jax.make_batch_grad_output_fn(ce, kind)(o, t, key if kind == "mc" else None),
            (outputs, targets),
        )
        for kind in ("type-2", "mc", "empirical")
    }
    found["loss Hessian"] = lambda o, t: ggn_jax.LossHessian(ce, o, t).mv(o), (outputs, targets)
    for cls in ("GGN", "Hessian", "EF", "GGNDiagonal"):
        found[cls] = operator(getattr(ggn_jax, f"{cls}LinearOperator"), apply), args
    for cls in ("KFAC", "EKFAC"):
        made = getattr(ggn_jax, f"{cls}LinearOperator")
        options = {"fisher_type": "mc", "key": key}
        found[cls] = operator(made, apply, **options), args
        found[f"{cls} inverse"] = operator(made, lambda op, v: op.inverse(1e-2).mv(v), **options), args
        found[f"{cls} logdet"] = operator(made, lambda op, v: op.logdet(1e-2), **options), args
    for options in ({}, {"ekfac": True}, {"damping_method": "exact"}):
        optimizer = ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=batch[0], **options)
        state = jax.eval_shape(optimizer.init, params)
        found[f"step {options}"] = step_of(optimizer), (params, state, batch)
    return found


FIRST = {"vectors type-2", "GGN", "KFAC inverse", "step {}"}


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.sweep)], ids=["first", "others"])
def test_programs_for_cuda(first: bool) -> None:
    """They can be lowered, without a product in full precision, which takes XLA seconds to build for each shape."""
    found = programs()
    for name in FIRST if first else found.keys() - FIRST:
        fn, args = found[name]
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert "HIGHEST" not in text, name
        assert "dot_general" in text or name.startswith(("vectors", "loss Hessian")), name
