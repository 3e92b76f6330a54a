"""The example of a neural wave function: energies, symmetry, natural gradients, and several devices."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ggn_jax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import wave_function as example

NET = example.FermiNet(example.SYSTEMS["lithium"], (5, 3), 2, 2)
FLAT = jax.flatten_util.ravel_pytree
with jax.numpy_rank_promotion("allow"):
    R = example.start_walkers(NET.system, 12, jax.random.key(0))


@pytest.fixture(autouse=True)
def as_users_have_it() -> Iterator[None]:
    """Examples are read by people: they broadcast and promote as JAX does by default."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def params() -> Any:
    """Not as they start, where all envelopes are alike."""
    flat, back = FLAT(NET.init(jax.random.key(1)))
    return back(flat + 0.1 * jax.random.normal(jax.random.key(2), flat.shape))


@pytest.mark.sweep
def test_local_energy() -> None:
    """The forward Laplacian gives what the Hessian in the coordinates does."""

    def by_hessian(r: jax.Array) -> jax.Array:
        log = lambda x: NET.log_psi(params(), x.reshape(r.shape))  # noqa: E731
        slopes, hessian = jax.grad(log)(r.ravel()), jax.hessian(log)(r.ravel())
        return -(jnp.trace(hessian) + slopes @ slopes) / 2 + NET.system.potential(r)

    found = jax.jit(jax.vmap(NET.local_energy, (None, 0)))(params(), R)
    np.testing.assert_allclose(found, jax.jit(jax.vmap(by_hessian))(R), rtol=1e-10)


def test_electrons_of_one_spin_are_alike_and_apart() -> None:
    log_psi = jax.jit(NET.log_psi)
    np.testing.assert_allclose(log_psi(params(), R[0][jnp.array([1, 0, 2])]), log_psi(params(), R[0]), rtol=1e-12)
    assert abs(log_psi(params(), R[0][jnp.array([2, 1, 0])]) - log_psi(params(), R[0])) > 1e-3
    near = R[0].at[1].set(R[0, 0] + 1e-9)
    assert log_psi(params(), near) < log_psi(params(), R[0]) - 10


def test_samples_of_a_known_density() -> None:
    """Metropolis moves leave |psi|^2 of the hydrogen atom as it is: the mean distance is 3/2."""

    class Hydrogen:
        @staticmethod
        def batched(params: Any, r: jax.Array) -> jax.Array:
            return -jnp.linalg.norm(r, axis=(1, 2))[:, None]

    start = jax.random.normal(jax.random.key(3), (4000, 1, 3))
    walked, accepted = jax.jit(partial(example.walk, Hydrogen(), moves=100))(None, start, 1.0, jax.random.key(4))
    assert 0.2 < accepted < 0.9
    # The distance has a variance of 3/4; six standard errors of independent walkers.
    np.testing.assert_allclose(jnp.linalg.norm(walked, axis=(1, 2)).mean(), 1.5, atol=6 * (0.75 / 4000) ** 0.5)


@pytest.mark.sweep
def test_the_step_in_function_space_is_the_natural_gradient() -> None:
    """With the covariance of the gradients of log |psi|, dense."""
    method = example.reconfiguration(NET, R, 0.1)
    start = params()
    flat, back = FLAT(start)
    rows = jax.jit(jax.jacobian(lambda flat: NET.batched(back(flat), R)[:, 0]))(flat)
    gradient = jax.random.normal(jax.random.key(5), flat.shape)
    found, count = jax.jit(method.step)(start, method.init(start), back(gradient), R)
    centred = rows - rows.mean(0)
    direction = np.linalg.solve(2 * centred.T @ centred / len(R) + 1e-3 * np.eye(len(flat)), gradient)
    rate = min(0.1, (1e-3 / (direction @ gradient)) ** 0.5)
    np.testing.assert_allclose(FLAT(found)[0] - flat, -rate * direction, rtol=1e-6, atol=1e-9)
    assert count == 1


def test_kfac_finds_every_layer_and_bounds_the_step() -> None:
    report = ggn_jax.report(NET.batched, params(), R)
    assert {row.curvature for row in report.rows} == {"Kronecker", "block"}
    assert {row.parameter.split("]")[0] for row in report.rows if row.curvature == "block"} == {"['envelopes'"}


@pytest.mark.sweep
def test_devices_share_the_samples() -> None:
    """With means over devices, each has the step of all samples."""
    start, mesh = params(), jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    method = example.kfac(NET, R, 0.1)
    state = method.init(start)
    wanted = jax.jit(partial(example.improve, NET, method))(start, state, R)
    mean = partial(jax.lax.pmean, axis_name="data")
    inside = partial(example.improve, NET, example.kfac(NET, R, 0.1, mean), mean=mean)
    specs = P(), P(), P("data")
    assert jnp.linalg.norm(FLAT(wanted[0])[0] - FLAT(start)[0]) > 1e-3

    @jax.jit
    def both(*args: Any) -> Any:
        options: Any = {"mesh": mesh, "in_specs": specs, "out_specs": P()}
        return [jax.shard_map(inside, check_vma=check, **options)(*args) for check in (True, False)]

    for found in both(start, state, R):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
