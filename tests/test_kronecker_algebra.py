"""What an operator of blocks computes: traces, determinants, inverses, roots, and under transformations."""

import os
import subprocess
import sys
from typing import Any

import jax
import lineax as lx
import numpy as np
import pytest
from compiling import flags
from designs import covering
from jax.flatten_util import ravel_pytree
from kronecker_cases import CE, EKFAC, INPUTS, KFAC, LABELS, PARAMS, normal, tanh_net

from ggn_jax.kronecker import inverse


@jax.jit
def algebra(operator: Any, vector: Any) -> dict[str, jax.Array]:
    """All that an operator computes, by one program."""
    return {
        "matrix": operator.as_matrix(),
        "trace": operator.trace(),
        "norm": operator.frobenius_norm(),
        "diagonal": ravel_pytree(operator.diagonal())[0],
        "logdet": operator.logdet(0.3),
        "det": operator.det(0.3),
        "inverse": operator.inverse(0.3).as_matrix(),
        "solution": ravel_pytree(operator.solve(vector, 0.3))[0],
        "root": operator.sqrt(0.3).as_matrix(),
        "inverse root": operator.inverse_sqrt(0.3).as_matrix(),
        "by lineax": ravel_pytree(lx.linear_solve(operator.damped(0.3), vector, lx.CG(1e-10, 1e-10)).value)[0],
    }


@covering(1, cls=[KFAC, EKFAC], bias=["joint", "separate"])
@pytest.mark.by_default("KFACLinearOperator-joint")
def test_algebra(cls: Any, bias: Any) -> None:
    operator = cls(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2", bias=bias)
    vector = jax.tree.map(lambda x: normal(*x.shape, seed=3), PARAMS)
    found = {name: np.asarray(value) for name, value in algebra(operator, vector).items()}
    matrix, root, inverse_root = found["matrix"], found["root"], found["inverse root"]
    size = len(matrix)
    damped = matrix + 0.3 * np.eye(size)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)
    np.testing.assert_allclose(found["trace"], np.trace(matrix), rtol=1e-13)
    np.testing.assert_allclose(found["norm"], np.linalg.norm(matrix), rtol=1e-13)
    np.testing.assert_allclose(found["diagonal"], np.diag(matrix), atol=1e-15)
    np.testing.assert_allclose(found["logdet"], np.linalg.slogdet(damped)[1], rtol=1e-12)
    np.testing.assert_allclose(found["det"], np.linalg.det(damped), rtol=1e-11)
    np.testing.assert_allclose(found["inverse"], np.linalg.inv(damped), atol=1e-12)
    np.testing.assert_allclose(damped @ found["solution"], ravel_pytree(vector)[0], atol=1e-12)
    np.testing.assert_allclose(root @ root, damped, atol=1e-13)
    np.testing.assert_allclose(inverse_root @ inverse_root @ damped, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(found["by lineax"], found["solution"], atol=1e-8)
    assert lx.is_positive_semidefinite(operator.inverse(0.3))


def test_heuristic_damping_is_its_formula() -> None:
    operator = KFAC(tanh_net, CE, PARAMS, (INPUTS, LABELS), fisher_type="type-2")
    inverse = operator.inverse(0.3, "heuristic")
    for name, block in operator.factors().items():
        a, b = np.asarray(block.a[0][0]), np.asarray(block.b[0][0])
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(b) / len(b)))
        damped_a, damped_b = a + pi * 0.3**0.5 * np.eye(len(a)), b + 0.3**0.5 / pi * np.eye(len(b))
        expected = np.kron(np.linalg.inv(damped_b), np.linalg.inv(damped_a))
        np.testing.assert_allclose(inverse.block(name), expected, rtol=1e-10, atol=1e-12)


def test_inverse_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverse, "MIN_SPLIT_SIZE", 2)
    roots = [np.asarray(normal(size, size)) for size in (1, 2, 3, 4, 11)]
    matrices = [root @ root.T + np.eye(len(root)) for root in roots]
    found = jax.jit(lambda matrices: [inverse.inverse_by_cholesky(matrix) for matrix in matrices])(matrices)
    for got, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(got, np.linalg.inv(matrix), atol=1e-13)


@pytest.mark.sweep
def test_transformations() -> None:
    """A pytree: built inside of `jit` from sharded data, mapped over keys, averaged."""
    cls = EKFAC  # its factors are KFAC's
    args = tanh_net, CE, PARAMS
    key = jax.random.key(3)
    eager = cls(*args, (INPUTS[:6], LABELS[:6]), key=key)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put((INPUTS[:6], LABELS[:6]), sharding)
    sharded = jax.jit(lambda batch, key: cls(*args, batch, key=key))(batch, key)
    np.testing.assert_allclose(sharded.as_matrix(), eager.as_matrix(), atol=1e-14)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, eager, sharded)
    np.testing.assert_allclose(mean.mv(PARAMS)["1"]["w"], eager.mv(PARAMS)["1"]["w"], atol=1e-13)
    keys = jax.random.split(key, 3).at[1].set(key)
    traces = jax.jit(jax.vmap(lambda k: cls(*args, (INPUTS[:6], LABELS[:6]), key=k).trace()))(keys)
    np.testing.assert_allclose(traces[1], np.trace(eager.as_matrix()))


@pytest.mark.sweep
def test_factorisations_of_many_sizes_end() -> None:
    # Two batched LAPACK calls at a time wait for each other for ever in jaxlib 0.10 on two cores.
    code = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp, ggn_jax
sizes = [60, 60, 120, 120, 250, 250, 30, 30, 10]
keys = jax.random.split(jax.random.key(0), len(sizes))
params = [jax.random.normal(k, s) / s[0] for k, s in zip(keys, zip(sizes[:-1], sizes[1:]))]
def model_fn(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x
batch = jnp.ones((16, 60)), jnp.zeros((16, 10))
kfac = ggn_jax.KFACLinearOperator(model_fn, ggn_jax.MSELoss(), params, batch, fisher_type="type-2")
for method in ("heuristic", "exact"):
    inverse = jax.jit(lambda kfac: kfac.inverse(1e-3, method))
    for _ in range(5):
        jax.block_until_ready([inverse(kfac) for _ in range(4)])
"""
    environment = os.environ | {"XLA_FLAGS": flags(1)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=180)
