"""Solve with the damped Gauss-Newton matrix of a classifier of handwritten digits: how far does KFAC help CG?

    pip install "ggn-jax[examples]"
    python examples/kfac_preconditioner.py

A natural-gradient or Gauss-Newton step is the solution of `(GGN + damping I) step = gradient`. Conjugate gradients
need only products with the GGN, but many of them where the damping is small. KFAC and EKFAC have inverses in closed
form; as preconditioners they leave CG only what they miss of the GGN, and the solution stays exact.

That pays early, where residuals are 3 to 10 times smaller after the same number of iterations. To high accuracy, and
after more training (`--steps`), plain CG catches up or overtakes: the settings here are where it pays. lineax stops by
the size of its steps as well, so iteration counts in the table belong to the residuals beside them.

- lineax: `CG` on `GGNLinearOperator(...).damped(damping)`, linearised once per solve.
- The preconditioners: none, the GGN's diagonal, `KFACLinearOperator(...).inverse(damping)`, and EKFAC's.

Each preconditioner is made from the factors once per damping; times are medians of repeated calls after compilation,
those of the solves and those of the preconditioners (factors and inverse) apart.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import ggn_jax

Params = Any
Batch = tuple[jax.Array, jax.Array]

LOSS = ggn_jax.CrossEntropyLoss()
LEARNING_RATE = 1e-2
DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4)
TOLERANCE = 1e-2
MAX_STEPS = 2000
REPEATS = 3
# lineax takes directions of little curvature for a breakdown. How little depends on the preconditioner's scale, which
# cancels everywhere else in CG.
SCALE = 1e6
COLORS = {"none": "#7f7f7f", "diagonal": "#4d9a3f", "KFAC": "#1b6ca8", "EKFAC": "#d95f02"}


class MLP(nnx.Module):
    """64 pixels, two hidden layers of 64 units, 10 classes."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


@dataclass
class Solve:
    """A finished solve; `residuals[i]` is the relative residual after `recorded[i]` iterations."""

    name: str
    damping: float
    iterations: int
    ms: float
    ms_setup: float
    residual: float
    recorded: list[int]
    residuals: list[float]


def load_data() -> Batch:
    """All images, with pixels from 0 to 1, and their classes."""
    images, classes = load_digits(return_X_y=True)
    return jnp.asarray(images / 16), jnp.asarray(classes)


@jax.jit
def objective(model_fn: Callable, params: Params, batch: Batch) -> jax.Array:
    """The loss of a batch; `model_fn` is a pytree, so it goes through `jit` like any other argument."""
    inputs, classes = batch
    return LOSS(model_fn(params, inputs), classes)


@partial(jax.jit, static_argnames="steps")
def train(model_fn: Callable, params: Params, batch: Batch, *, steps: int) -> Params:
    """Adam on the whole batch."""
    optimizer = optax.adam(LEARNING_RATE)

    def step(state: Any, _: None) -> tuple[Any, None]:
        params, moments = state
        gradient = jax.grad(lambda params: objective(model_fn, params, batch))(params)
        update, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, update), moments), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


def scaled(operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
    """A multiple of a positive semi-definite operator; lineax does not know by itself that it is one, too."""
    return lx.TaggedLinearOperator(SCALE * operator, lx.positive_semidefinite_tag)


@partial(jax.jit, static_argnames="name")
def preconditioner(
    model_fn: Callable, params: Params, batch: Batch, damping: jax.Array, *, name: str
) -> lx.AbstractLinearOperator:
    """An approximation of `SCALE * (GGN + damping I)^-1`."""
    if name == "none":
        return scaled(lx.IdentityLinearOperator(jax.eval_shape(lambda: params)))
    if name == "diagonal":
        return ggn_jax.GGNDiagonalLinearOperator(model_fn, LOSS, params, batch).damped(damping).inverse(scale=SCALE)
    kind = {"KFAC": ggn_jax.KFACLinearOperator, "EKFAC": ggn_jax.EKFACLinearOperator}[name]
    return scaled(kind(model_fn, LOSS, params, batch, fisher_type="type-2").inverse(damping))


def rms(tree: Any) -> jax.Array:
    """The root mean square of all entries."""
    return optax.tree.norm(tree) / jnp.sqrt(optax.tree.size(tree))


@jax.jit
def solve(
    model_fn: Callable,
    params: Params,
    batch: Batch,
    damping: jax.Array,
    preconditioner: lx.AbstractLinearOperator,
    tolerance: float,
    max_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """The iterations of CG and the relative residual it ends with, for the gradient as right-hand side."""
    gradient = jax.grad(lambda params: objective(model_fn, params, batch))(params)
    # The gradient's scale cancels; with entries of about 1, one tolerance serves as the absolute and relative one.
    gradient = optax.tree.scale(1 / rms(gradient), gradient)
    ggn = lx.linearise(ggn_jax.GGNLinearOperator(model_fn, LOSS, params, batch).damped(damping))
    solver = lx.CG(rtol=tolerance, atol=tolerance, norm=rms, max_steps=max_steps)
    options = {"preconditioner": preconditioner}
    solution = lx.linear_solve(ggn, gradient, solver, options=options, throw=False)
    return solution.stats["num_steps"], rms(optax.tree.sub(ggn.mv(solution.value), gradient))


def timed(fn: Callable, *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """What `fn` returns, and the median of its times in milliseconds, without compilation."""
    result = jax.block_until_ready(fn(*args, **kwargs))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = jax.block_until_ready(fn(*args, **kwargs))
        times.append(time.perf_counter() - start)
    return result, 1e3 * float(np.median(times))


def run(model_fn: Callable, params: Params, batch: Batch, damping: float, name: str, points: int) -> Solve:
    """Solve to the tolerance, timed; then, for the curve, again with ever more iterations."""
    operator, ms_setup = timed(preconditioner, model_fn, params, batch, damping, name=name)
    (iterations, residual), ms = timed(solve, model_fn, params, batch, damping, operator, TOLERANCE, MAX_STEPS)
    recorded = sorted({round(k) for k in np.geomspace(1, int(iterations), points)})
    # A tolerance of almost 0: the number of iterations is what ends these.
    residuals = [float(solve(model_fn, params, batch, damping, operator, 1e-20, k)[1]) for k in recorded]
    return Solve(name, damping, int(iterations), ms, ms_setup, float(residual), [0, *recorded], [1.0, *residuals])


def print_table(solves: Sequence[Solve]) -> None:
    """One row per damping and preconditioner."""
    print(f"\n{'damping':>8}  {'preconditioner':<15}{'CG iterations':>14}{'CG ms':>9}{'setup ms':>10}", end="")
    print(f"{'total ms':>10}{'rel. residual':>15}")
    for solve in solves:
        print(
            f"{solve.damping:>8.0e}  {solve.name:<15}{solve.iterations:>14}{solve.ms:>9.1f}{solve.ms_setup:>10.1f}"
            f"{solve.ms + solve.ms_setup:>10.1f}{solve.residual:>15.1e}"
        )


def plot(solves: Sequence[Solve], path: Path) -> None:
    """Iterations and times against the damping, and the residual against iterations for the smallest damping."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    iterations, times, residuals = figure.subplots(1, 3)
    smallest = min(solve.damping for solve in solves)
    for name, color in COLORS.items():
        some = [solve for solve in solves if solve.name == name]
        style: dict[str, Any] = {"color": color, "label": name, "linewidth": 1.8, "marker": "o", "markersize": 4}
        dampings = [solve.damping for solve in some]
        iterations.plot(dampings, [solve.iterations for solve in some], **style)
        times.plot(dampings, [solve.ms for solve in some], **style)
        times.plot(dampings, [solve.ms + solve.ms_setup for solve in some], color=color, linestyle=":", linewidth=1.5)
        last = next(solve for solve in some if solve.damping == smallest)
        residuals.plot(last.recorded, last.residuals, **style)
    iterations.set(title=f"CG iterations to a tolerance of {TOLERANCE:g}", ylabel="iterations")
    times.set(title="Time (dotted: with making the preconditioner)", ylabel="milliseconds")
    residuals.set(title=f"Convergence with damping {smallest:g}", xlabel="iterations", ylabel="relative residual")
    residuals.set_xscale("symlog", linthresh=1)
    residuals.set_yscale("log")
    for axes in (iterations, times):
        axes.set(xlabel="damping", xscale="log", yscale="log")
        axes.invert_xaxis()
    for axes in (iterations, times, residuals):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="preconditioner")
    figure.suptitle("(GGN + damping I) x = gradient, handwritten digits, MLP 64-64-64-10", fontweight="bold")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    default = Path(__file__).parent / "output" / "kfac_preconditioner.png"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters")
    parser.add_argument("--steps", type=int, default=5, help="steps of Adam before the solves")
    parser.add_argument("--quick", action="store_true", help="two dampings, and fewer points of the curve")
    parser.add_argument("--output", type=Path, default=default, help="where the figure goes")
    args = parser.parse_args(argv)
    dampings, points = (DAMPINGS[1:3], 6) if args.quick else (DAMPINGS, 20)

    batch = load_data()
    model_fn, params = ggn_jax.from_nnx(MLP(nnx.Rngs(args.seed)))
    params = train(model_fn, params, batch, steps=args.steps)
    cases = [(damping, name) for damping in dampings for name in COLORS]
    solves = [
        run(model_fn, params, batch, damping, name, points)
        for damping, name in tqdm(cases, desc="solves", unit="solve")
    ]

    print(f"\nTraining loss after {args.steps} steps of Adam: {objective(model_fn, params, batch):.3f}", end="")
    print(f"; {sum(leaf.size for leaf in jax.tree.leaves(params))} parameters, {batch[1].size} digits.")
    print_table(solves)
    print("\nSetup: factors and inverse. A preconditioner that is kept for several solves pays for it once.")
    print("CG also waits for short steps: compare the residuals, which differ, and the figure's curves.")
    plot(solves, args.output)
    print(f"Figure: {args.output}")


if __name__ == "__main__":
    main()
