"""Every transformation of JAX on every public function: equal to the function itself, or refused with a reason.

Functions are run in groups, to compile little. `test_shard_map.py` has `jax.shard_map`, `test_explicit_mesh.py` meshes.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from optimizer_cases import assert_close, integers, linear, normal

import ggn_jax

N, C = 4, 3
CE = ggn_jax.CrossEntropyLoss(label_smoothing=0.1)
Args = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # weights, inputs, targets, and a key's data


def args_of(seed: int = 0, dtype: Any = jnp.float64) -> Args:
    data = jax.random.key_data(jax.random.key(seed))
    targets = integers(seed, C, N)
    return normal(seed, 2, C, dtype=dtype), normal(seed + 10, N, 2, dtype=dtype), targets, data


# Groups of functions, each of `Args`. ---------------------------------------------------------------------------------


def vectors(w: jax.Array, x: jax.Array, y: jax.Array, data: jax.Array) -> dict[str, Any]:
    key, f = jax.random.wrap_key_data(data), x @ w
    found: dict[str, Any] = {}
    for kind in ("type-2", "mc", "empirical", "forward-only"):
        found[f"batch {kind}"] = ggn_jax.make_batch_grad_output_fn(CE, kind, 2)(f, y, key)
        found[f"single {kind}"] = ggn_jax.make_grad_output_fn(CE, kind, 2)(f[0], y[0], key)
    found["mc sampler"] = ggn_jax.make_grad_output_sampler(CE)(f[0], 2, y[0], key)
    found["sqrt"] = ggn_jax.loss_hessian_matrix_sqrt(f[0], y[0], CE)
    hessian = ggn_jax.LossHessian(CE, f, y)
    found["hessian"] = hessian.mv(f), hessian.sqrt_mv(f), hessian.sqrt_rmv(f), hessian.diagonal(), hessian.trace()
    return found


def operators(w: jax.Array, x: jax.Array, y: jax.Array, data: jax.Array) -> dict[str, Any]:
    key, params = jax.random.wrap_key_data(data), {"w": w}
    args = linear, CE, params, (x, y)
    made = {
        "ggn": ggn_jax.GGNLinearOperator(*args),
        "mc": ggn_jax.GGNLinearOperator(*args, mc_samples=2, key=key),
        "ef": ggn_jax.EFLinearOperator(*args, chunk_size=3),
        "hessian": ggn_jax.HessianLinearOperator(*args),
        "diagonal": ggn_jax.GGNDiagonalLinearOperator(*args),
    }
    return {name: operator.damped(0.1).mv(params) for name, operator in made.items()}


def kronecker(w: jax.Array, x: jax.Array, y: jax.Array, data: jax.Array) -> dict[str, Any]:
    key, params = jax.random.wrap_key_data(data), {"w": w}
    found: dict[str, Any] = {}
    for cls, kind in (
        (ggn_jax.KFACLinearOperator, "mc"),
        (ggn_jax.EKFACLinearOperator, "type-2"),
        (ggn_jax.KFOCLinearOperator, "empirical"),
    ):
        kfac = cls(linear, CE, params, (x, y), fisher_type=kind, key=key if kind == "mc" else None)
        found[kind] = kfac.mv(params), kfac.trace(), kfac.diagonal(), kfac.block("w")
        found[f"{kind} inverse"] = kfac.solve(params, 0.1), kfac.logdet(0.1), kfac.inverse_sqrt(0.1).mv(params)
    return found


def optimizers(w: jax.Array, x: jax.Array, y: jax.Array, data: jax.Array) -> dict[str, Any]:
    key, params, batch = jax.random.wrap_key_data(data), {"w": w}, (x, y)
    given: dict[str, Any] = {"example_inputs": jax.ShapeDtypeStruct(x.shape, x.dtype), "damping": 0.1}
    kfac = ggn_jax.kfac(linear, CE, 0.1, **given)
    scale = ggn_jax.scale_by_kfac(linear, CE, **given, fisher_type="type-2", ekfac=True)
    assert "Kronecker" in str(kfac.report(params))
    state = kfac.init(params)
    value, grads, factors = kfac.value_and_grad_and_factors(params, batch, state, key=key)
    found = {
        "pass": (value, grads),
        "mc factors": factors,
        "mc kfac": kfac.update(grads, state, params, factors=factors),
    }
    found["scale"] = scale.update(grads, scale.init(params), params, batch=batch, key=key)
    several = ggn_jax.multi_steps(kfac, 1)
    found["mc multi_steps"] = several.update(grads, several.init(params), params, batch=batch, key=key)
    return found


GROUPS: dict[str, Callable[..., dict[str, Any]]] = {
    fn.__name__: fn for fn in (vectors, operators, kronecker, optimizers)
}
every_group = pytest.mark.parametrize("name", GROUPS)


def groups(*by_default: str) -> Any:
    """The others run with `-m sweep`: what is done to them is nothing that their functions take part in."""
    marks = {name: [] if name in by_default else [pytest.mark.sweep] for name in GROUPS}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in GROUPS])


A, B = args_of(0), args_of(1)


@cache
def compiled(name: str) -> Callable[..., dict[str, Any]]:
    """Lowered and compiled ahead of time: what all else is compared with."""
    return jax.jit(GROUPS[name]).lower(*A).compile()


def stacked(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def same(got: Any, want: Any, rtol: float = 1e-9) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = [(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True) if b.size]
    assert_close(*map(list, zip(*pairs, strict=True)), rtol)


# What runs them as they are; eagerly the tests of each function do. ---------------------------------------------------


@every_group
@pytest.mark.by_default("kronecker")
def test_vmap(name: str) -> None:
    same(jax.jit(jax.vmap(GROUPS[name]))(*stacked(A, B)), stacked(compiled(name)(*A), compiled(name)(*B)))


@groups("kronecker")
@pytest.mark.sweep
def test_pmap(name: str) -> None:
    same(jax.pmap(GROUPS[name])(*stacked(A, B)), stacked(compiled(name)(*A), compiled(name)(*B)))


@every_group
@pytest.mark.by_default("operators", "kronecker")
def test_inside_of_control_flow_and_of_others_rules(name: str) -> None:
    """A loop of a branch of a checkpointed function with a derivative rule of the user's."""
    fn = jax.custom_vjp(GROUPS[name])
    fn.defvjp(lambda *args: (GROUPS[name](*args), args), lambda args, _: (*args[:2], None, None))

    def step(which: jax.Array, args: Args) -> tuple[jax.Array, Any]:
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(fn, *args))
        return ~which, jax.lax.cond(which, jax.checkpoint(fn), lambda *_: nothing, *args)

    _, got = jax.jit(partial(jax.lax.scan, step))(jnp.asarray(True), stacked(A, B))
    want = compiled(name)(*A)
    same(got, stacked(want, jax.tree.map(jnp.zeros_like, want)))


@groups("kronecker", "optimizers")  # `test_transforms.py` exports the functions of the others
@pytest.mark.by_default("optimizers")
def test_export(name: str) -> None:
    same(jax.export.export(jax.jit(GROUPS[name]))(*A).call(*B), compiled(name)(*B))


@groups("optimizers")
def test_donated_arguments(name: str) -> None:
    def run(*args: jax.Array) -> Any:
        return GROUPS[name](*args), args[0] + 1, args[1] + 1  # which can be where the arguments were

    given, want = jax.tree.map(jnp.copy, B), compiled(name)(*B)
    got, *_ = jax.jit(run, donate_argnums=(0, 1))(*given)
    same(got, want)
    assert given[0].is_deleted()
    assert given[1].is_deleted()


@every_group
@pytest.mark.by_default("operators", "optimizers")
def test_checks_for_nan(name: str) -> None:
    with jax.debug_nans(True):
        same(jax.jit(GROUPS[name])(*B), compiled(name)(*B))


@every_group
@pytest.mark.by_default("operators", "optimizers")
def test_without_64_bits(name: str) -> None:
    """The same to single precision, but for what is drawn."""
    narrow = {jnp.dtype(jnp.float64): jnp.float32, jnp.dtype(jnp.int64): jnp.int32}
    args = [x.astype(narrow.get(x.dtype, x.dtype)) for x in B]
    with jax.enable_x64(False):
        got = jax.jit(GROUPS[name])(*args)
    assert all(leaf.dtype.itemsize <= 4 for leaf in jax.tree.leaves(got))
    exact = [key for key in got if "mc" not in key]
    want = compiled(name)(*B)
    same([got[key] for key in exact], [want[key] for key in exact], 1e-4)


# Derivatives. ---------------------------------------------------------------------------------------------------------


def factors(w: jax.Array, x: jax.Array, y: jax.Array, data: jax.Array) -> dict[str, Any]:
    """What has derivatives in reverse mode of the last two groups: not factorisations, which run one by one on CPUs."""
    key, params, batch = jax.random.wrap_key_data(data), {"w": w}, (x, y)
    kfac = ggn_jax.KFACLinearOperator(linear, CE, params, batch, key=key)
    example = jax.ShapeDtypeStruct(x.shape, x.dtype)
    optimizer = ggn_jax.kfac(linear, CE, 0.1, example_inputs=example, damping=0.1)
    seen = optimizer.value_and_grad_and_factors(params, batch, optimizer.init(params), key=key)
    return {"kfac": (kfac.mv(params), kfac.trace(), kfac.diagonal()), "pass": seen}


@pytest.mark.parametrize("name", [*GROUPS, "factors"])
@pytest.mark.by_default("operators", "factors")
def test_derivatives(name: str) -> None:
    """By a difference quotient: in forward mode of all, and in reverse mode, of what has it, through a checkpoint."""
    fn = GROUPS.get(name, factors)
    leaves = jax.tree.leaves(jax.eval_shape(fn, *A))
    weights = [normal(i, *leaf.shape) if leaf.dtype == jnp.float64 else None for i, leaf in enumerate(leaves)]

    def total(fn: Any, w: jax.Array, x: jax.Array) -> jax.Array:
        """One number of all results."""
        results = jax.tree.leaves(fn(w, x, *A[2:]))
        return jnp.stack([jnp.sum(c * x) for c, x in zip(weights, results, strict=True) if c is not None]).sum()

    at, v = A[:2], (normal(7, 2, C), normal(8, N, 2))
    run = compiled(name) if name in GROUPS else jax.jit(fn)
    plus, minus = (float(total(run, *(x + h * y for x, y in zip(at, v, strict=True)))) for h in (1e-6, -1e-6))
    quotient = (plus - minus) / 2e-6
    _, tangent = jax.jit(lambda *args: jax.jvp(partial(total, fn), args, v))(*at)
    np.testing.assert_allclose(tangent, quotient, rtol=1e-5)
    if name in ("vectors", "operators", "factors"):
        gradient = jax.jit(jax.grad(partial(total, jax.checkpoint(fn)), (0, 1)))(*at)
        np.testing.assert_allclose(sum(jnp.vdot(*pair) for pair in zip(gradient, v, strict=True)), quotient, rtol=1e-5)
