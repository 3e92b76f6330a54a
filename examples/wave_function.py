"""Variational Monte Carlo: the ground state of an atom or molecule, by a neural wave function and natural gradients.

A small FermiNet (Pfau et al. 2020) is trained to the least energy. The energy's gradient is the example's own; what
`ggn_jax` gives is the curvature of log |psi|, the covariance of its gradients over samples of |psi|^2: by KFAC, as
FermiNet has it, or exactly in function space (stochastic reconfiguration; minSR, Chen & Heyl 2024). Compared with Adam,
with equal CPU seconds on one thread. Prints energies in Hartree, and writes a figure and a JSON file.

    python examples/wave_function.py --system helium
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# One thread, so that methods are compared by the seconds of a CPU, whatever else the machine does.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ferminet import SYSTEMS, FermiNet, Params, System
from matplotlib.figure import Figure

import ggn_jax

COLORS = {"Adam": "#7f7f7f", "KFAC": "#1b6ca8", "SR, function space": "#b2182b"}


# Samples of |psi|^2.


def start_walkers(system: System, number: int, key: jax.Array) -> jax.Array:
    """Electrons near the nuclei, as many as each has charge."""
    homes = np.repeat(np.asarray(system.places), system.charges, axis=0)
    order = np.argsort(np.arange(len(homes)) % 2, kind="stable")  # neighbours have different spins
    return jnp.asarray(homes[order]) + jax.random.normal(key, (number, len(homes), 3))


def walk(net: FermiNet, params: Params, r: jax.Array, width: jax.Array, key: jax.Array, moves: int = 10) -> Any:
    """Metropolis moves of all electrons at a time; the new places, and which share was accepted."""

    def move(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> Any:
        r, log = carry
        keys = jax.random.split(key)
        new = r + width * jax.random.normal(keys[0], r.shape, r.dtype)
        new_log = net.batched(params, new)[:, 0]
        accept = jnp.log(jax.random.uniform(keys[1], log.shape, r.dtype)) < 2 * (new_log - log)
        return (jnp.where(accept[:, None, None], new, r), jnp.where(accept, new_log, log)), accept.mean()

    (r, _), accepted = jax.lax.scan(move, (r, net.batched(params, r)[:, 0]), jax.random.split(key, moves))
    return r, accepted.mean()


# Methods: `init(params) -> state`, and `step` from the energies' gradient to the new parameters.


@dataclass
class Method:
    name: str
    setting: str
    init: Callable[[Params], Any]
    step: Callable[[Params, Any, Params, jax.Array], tuple[Params, Any]]
    """`(params, state, gradient, samples) -> (params, state)`."""


def adam(net: FermiNet, walkers: jax.Array, rate: float) -> Method:
    optimizer = optax.adam(decayed(rate))

    def step(params: Params, state: Any, grads: Params, r: jax.Array) -> tuple[Params, Any]:
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    return Method("Adam", f"learning rate {rate:g}", optimizer.init, step)


def decayed(rate: float) -> Callable[[jax.Array], jax.Array]:
    return lambda count: rate / (1 + count / 1000)


def kfac(net: FermiNet, walkers: jax.Array, rate: float, mean: Any = lambda x: x) -> Method:
    """With FermiNet's settings: no momentum, and a bound on the length of steps, which `kl_clip` is.

    The mean of squares has the curvature `2 E[O O^T]`, with `O` the gradients of log |psi|: one vector for each sample
    gives it exactly, and no targets are looked at. `mean` is over devices, where there are several.
    """
    options: dict[str, Any] = {"fisher_type": "type-2", "momentum": None, "inverse_interval": 5}
    optimizer = ggn_jax.kfac(
        net.batched, ggn_jax.MSELoss(), decayed(rate), example_inputs=walkers, damping=1e-3, kl_clip=1e-3, **options
    )

    def step(params: Params, state: Any, grads: Params, r: jax.Array) -> tuple[Params, Any]:
        factors = mean(optimizer.factors(params, (r, None), state))
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state

    return Method("KFAC", f"learning rate {rate:g}", optimizer.init, step)


def reconfiguration(net: FermiNet, walkers: jax.Array, rate: float) -> Method:
    """With the covariance of the gradients of log |psi| as it is, by a matrix of the size of the samples."""

    def step(params: Params, count: jax.Array, grads: Params, r: jax.Array) -> tuple[Params, jax.Array]:
        loss = ggn_jax.MSELoss()
        gram = ggn_jax.GramLinearOperator(net.batched, params, r, loss=loss, centred=True)
        direction = gram.solve_ggn(grads, 1e-3)
        size = sum(jnp.vdot(d, g) for d, g in zip(*map(jax.tree.leaves, (direction, grads)), strict=True))
        rate_ = jnp.minimum(decayed(rate)(count), jnp.sqrt(1e-3 / size))
        return jax.tree.map(lambda p, d: p - rate_ * d, params, direction), count + 1

    return Method("SR, function space", f"learning rate {rate:g}", lambda params: jnp.zeros((), int), step)


METHODS: dict[str, list[Callable[..., Method]]] = {
    "Adam": [partial(adam, rate=rate) for rate in (1e-3, 3e-3, 1e-2)],
    "KFAC": [partial(kfac, rate=rate) for rate in (0.03, 0.1)],
    "SR, function space": [partial(reconfiguration, rate=rate) for rate in (0.03, 0.1)],
}


def improve(
    net: FermiNet, method: Method, params: Params, state: Any, r: jax.Array, mean: Any = lambda x: x
) -> tuple[Params, Any, tuple[jax.Array, jax.Array]]:
    """A step, by samples of |psi|^2; the last result is their energy, and the variance of local energies.

    The variance is 0 for an exact wave function, and shows progress with less noise than the energy.

    `mean` is `jax.lax.pmean` inside of `jax.shard_map`, where each device has samples of its own.
    """
    energies = jax.vmap(net.local_energy, (None, 0))(params, r)
    energy = mean(energies.mean())
    variance = mean(jnp.square(energies - energy).mean())
    # Near nodes and nuclei a sample's energy may be anything; FermiNet cuts them at five mean deviations.
    spread = 5 * mean(jnp.abs(energies - energy).mean())
    clipped = jnp.clip(energies, energy - spread, energy + spread)
    clipped = clipped - mean(clipped.mean())

    def surrogate(params: Params) -> jax.Array:
        """Its gradient is the energy's, `2 E[(E_local - E) O]`.

        The mean in here is for `shard_map`'s checks, with which derivatives in parameters that all devices share are
        sums over devices; without them, they are each device's own, of which the mean is taken below.
        """
        value: jax.Array = mean(2 * jnp.mean(clipped * net.batched(params, r)[:, 0]))
        return value

    params, state = method.step(params, state, mean(jax.grad(surrogate)(params)), r)
    return params, state, (energy, variance)


def make_step(net: FermiNet, method: Method) -> Callable[..., Any]:
    """`step(params, state, r, width, key) -> (params, state, r, width, seen)`: samples, and a step by them."""

    def step(params: Params, state: Any, r: jax.Array, width: jax.Array, key: jax.Array) -> Any:
        r, accepted = walk(net, params, r, width, key)
        width = width * jnp.where(accepted > 0.5, 1.05, 0.95).astype(width.dtype)
        params, state, seen = improve(net, method, params, state, r)
        return params, state, r, width, seen

    return step


@dataclass
class Run:
    """A training: energy and variance of each step's samples after `seconds[i]` seconds of the CPU."""

    method: str
    setting: str
    seconds: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    variances: list[float] = field(default_factory=list)
    final: float = float("nan")
    error: float = float("nan")
    """The energy of the last parameters, and its standard error."""


def train(net: FermiNet, make: Callable[..., Method], walkers: jax.Array, seconds: float, most: int) -> Run:
    """Steps, until the time is over; compiling and first samples are not on the clock."""
    params, keys = net.init(jax.random.key(1)), jax.random.key(2)
    method, width = make(net, walkers), jnp.asarray(0.3, walkers.dtype)
    state, used = method.init(params), 0.0
    r, _ = jax.jit(partial(walk, net, moves=200))(params, walkers, width, jax.random.key(3))
    step = jax.jit(make_step(net, method)).lower(params, state, r, width, keys).compile()
    run = Run(method.name, method.setting)
    while used < seconds and len(run.energies) < most:
        start = time.process_time()
        params, state, r, width, seen = step(params, state, r, width, jax.random.fold_in(keys, len(run.energies)))
        run.energies.append(float(seen[0]))
        run.variances.append(float(seen[1]))
        used += time.process_time() - start
        run.seconds.append(used)
    run.final, run.error = evaluate(net, params, r, width, 3 if most < 10 else 200)
    return run


def evaluate(net: FermiNet, params: Params, r: jax.Array, width: jax.Array, rounds: int) -> tuple[float, float]:
    """The mean energy of new samples; those of a walker depend on one another, so its standard error is of walkers."""

    @jax.jit
    def look(r: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        r, _ = walk(net, params, r, width, key)
        return r, jax.vmap(net.local_energy, (None, 0))(params, r)

    found = []
    for key in jax.random.split(jax.random.key(4), rounds):
        r, energies = look(r, key)
        found.append(np.asarray(energies, np.float64))
    walkers = np.mean(found, axis=0)
    return float(walkers.mean()), float(walkers.std() / len(walkers) ** 0.5)


def plot(system: System, runs: list[Run], path: Path) -> None:
    """The energy above the exact one, and the spread of local energies, as means over a tenth of the steps so far."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for run in runs:
        number = np.arange(1, len(run.energies) + 1)
        window = np.maximum(number // 10, 1)
        for ax, values in zip(axes, (1000 * (np.asarray(run.energies) - system.energy), run.variances), strict=True):
            sums = np.concatenate([[0], np.cumsum(values)])
            means = (sums[number] - sums[number - window]) / window
            ax.plot(run.seconds, means if ax is axes[0] else np.sqrt(means), color=COLORS[run.method], label=run.method)
    for ax in axes:
        ax.set(xlabel="CPU seconds (without compilation)", title=system.title)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel("energy above the exact one (mHa)")
    axes[0].set_yscale("symlog", linthresh=1)
    axes[0].set_ylim(bottom=-3)
    axes[1].set_ylabel("standard deviation of local energies (Ha)")
    axes[1].set_yscale("log")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=list(SYSTEMS), default="helium", help="(default: helium)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the CPU, for each method (default: 60)")
    parser.add_argument("--walkers", type=int, default=512, help="samples (default: 512)")
    parser.add_argument("--methods", nargs="+", choices=list(COLORS), default=list(COLORS))
    parser.add_argument("--quick", action="store_true", help="a small network and a few steps")
    parser.add_argument("--output", type=Path, default=None, help="where the figure goes, and the JSON beside it")
    args = parser.parse_args()
    system, number, most = SYSTEMS[args.system], 16 if args.quick else args.walkers, 3 if args.quick else 10**9
    net = FermiNet(system, (4, 2), 2, 2) if args.quick else FermiNet(system)
    output = args.output or Path(__file__).parent / "output" / f"wave_function_{args.system}.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    walkers = start_walkers(system, number, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(net.init(jax.random.key(1))))
    print(f"{system.title}: {number} samples, {count} parameters, exact energy {system.energy:.4f} Ha")
    print(f"{'method':<20}{'setting':<22}{'steps':>7}{'energy / Ha':>20}{'error / mHa':>13}")
    runs = []
    for name in args.methods:
        grid = METHODS[name][:1] if args.quick else METHODS[name]
        tries = [train(net, make, walkers, args.seconds / 4, most) for make in grid] if len(grid) > 1 else []
        best = int(np.nanargmin([run.final for run in tries])) if tries else 0
        run = train(net, grid[best], walkers, args.seconds, most)
        runs.append(run)
        print(f"{run.method:<20}{run.setting:<22}{len(run.energies):>7}{run.final:>13.5f} +- {run.error:.5f}", end="")
        print(f"{1000 * (run.final - system.energy):>11.2f}", flush=True)
    plot(system, runs, output)
    report = {"jax": jax.__version__, "system": system.title, "samples": number, "parameters": count}
    report |= {"exact": system.energy, "seconds": args.seconds, "runs": [asdict(run) for run in runs]}
    output.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"Figure and figures: {output}, {output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
