"""Train a small classifier of handwritten digits by damped Gauss-Newton steps, and compare with Adam.

    pip install "ggn-jax[examples]"
    python examples/digits_gauss_newton.py

It shows how the operators of `ggn_jax` work together with other libraries:

- Flax NNX: `from_nnx` makes a module a function of its parameters.
- lineax: conjugate gradients solve `(GGN + damping I) step = -gradient` without any matrix in memory, preconditioned
  by the GGN's diagonal from one Monte-Carlo sample.
- optax: a backtracking line search chooses the step's length; Adam is the baseline.
- matfree: Lanczos' method and Hutchinson's estimator read eigenvalues and trace from the same operator.

Both methods start from the same parameters. Adam runs once per learning rate of a small grid, and the one with the
lowest final training loss is shown. Times are those of the steps, each called from Python as in most training loops
(which weighs more on Adam's short steps): no compilation, no recording of losses.
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
from jax.flatten_util import ravel_pytree
from matfree import decomp, eig, stochtrace
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import ggn_jax

Params = Any
Batch = tuple[jax.Array, jax.Array]

LOSS = ggn_jax.CrossEntropyLoss()
LINE_SEARCH = optax.scale_by_backtracking_linesearch(15, decrease_factor=0.5, increase_factor=float("inf"))
LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
MINIBATCH = 128
FIRST_DAMPING = 0.1
CG_STEPS = 30
COLORS = {"At initialisation": "#7f7f7f", "Adam": "#d95f02", "Gauss-Newton-CG": "#1b6ca8"}


class MLP(nnx.Module):
    """64 pixels, two hidden layers of 64 units, 10 classes."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


@dataclass
class Run:
    """A finished training run; `losses[i]` is the training loss after `recorded[i]` steps and `seconds[i]`."""

    name: str
    params: Params
    recorded: list[int]
    seconds: list[float]
    losses: list[float]
    ms_per_step: float


def load_data(seed: int) -> tuple[Batch, Batch]:
    """Training and test images, with pixels from 0 to 1, and their classes."""
    images, classes = load_digits(return_X_y=True)
    split = train_test_split(images / 16, classes, test_size=360, random_state=seed, stratify=classes)
    x_train, x_test, y_train, y_test = (jnp.asarray(part) for part in split)
    return (x_train, y_train), (x_test, y_test)


@jax.jit
def objective(model_fn: Callable, params: Params, batch: Batch) -> jax.Array:
    """The loss of a batch; `model_fn` is a pytree, so it goes through `jit` like any other argument."""
    inputs, classes = batch
    return LOSS(model_fn(params, inputs), classes)


def gauss_newton(model_fn: Callable, params: Params) -> tuple[Callable, Any]:
    """The first state and `step(state, batch, key) -> state` of the Levenberg-Marquardt method with CG."""

    def step(state: Any, batch: Batch, key: jax.Array) -> Any:
        params, damping, search = state
        loss, gradient = jax.value_and_grad(lambda params: objective(model_fn, params, batch))(params)
        # One linearisation of the model serves all products.
        ggn = lx.linearise(ggn_jax.GGNLinearOperator(model_fn, LOSS, params, batch))
        diagonal = ggn_jax.GGNDiagonalLinearOperator(model_fn, LOSS, params, batch, mc_samples=1, key=key)
        # The factor cancels in CG, but keeps lineax from taking directions of little curvature for a breakdown.
        preconditioner = diagonal.damped(damping).inverse(scale=1e3)
        direction = lx.linear_solve(
            ggn.damped(damping),
            optax.tree.scale(-1, gradient),
            lx.CG(rtol=1e-3, atol=1e-8, max_steps=CG_STEPS),
            options={"preconditioner": preconditioner},
            throw=False,  # A truncated solution is a descent direction, too.
        ).value
        slope, curvature = optax.tree.vdot(gradient, direction), optax.tree.vdot(direction, ggn.mv(direction))
        value_fn = partial(objective, model_fn, batch=batch)
        update, search = LINE_SEARCH.update(direction, search, params, value=loss, grad=gradient, value_fn=value_fn)
        # Trust the quadratic model as far as it foresaw what the step gained.
        gain = (search.value - loss) / (slope + curvature / 2)
        damping = damping * jnp.where(gain > 0.75, 0.5, jnp.where(gain < 0.25, 2.0, 1.0))
        return optax.apply_updates(params, update), damping, search

    # optax starts with a weakly typed number, with which `step` would be compiled twice.
    search = jax.tree.map(lambda x: x.astype(x.dtype), LINE_SEARCH.init(params))
    return jax.jit(step), (params, jnp.float32(FIRST_DAMPING), search)


def adam(model_fn: Callable, params: Params, learning_rate: float) -> tuple[Callable, Any]:
    """The first state and `step(state, batch, key) -> state` of Adam on random minibatches."""
    optimizer = optax.adam(learning_rate)

    def step(state: Any, batch: Batch, key: jax.Array) -> Any:
        params, moments = state
        chosen = jax.random.choice(key, batch[1].size, (MINIBATCH,), replace=False)
        minibatch = jax.tree.map(lambda x: x[chosen], batch)
        gradient = jax.grad(lambda params: objective(model_fn, params, minibatch))(params)
        update, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, update), moments

    return jax.jit(step), (params, optimizer.init(params))


def train(
    name: str, step: Callable, state: Any, model_fn: Callable, batch: Batch, key: Any, steps: int, every: int
) -> Run:
    """Run `steps` steps, timed one by one, recording the loss after each `every` of them."""
    keys = list(jax.random.split(key, steps))
    jax.block_until_ready(step(state, batch, keys[0]))  # compiles
    run = Run(name, state[0], [0], [0.0], [float(objective(model_fn, state[0], batch))], 0.0)
    times: list[float] = []
    for i in tqdm(range(1, steps + 1), desc=f"{name:<20}", unit="step"):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state, batch, keys[i - 1]))
        times.append(time.perf_counter() - start)
        if i % every == 0 or i == steps:
            run.recorded.append(i)
            run.seconds.append(sum(times))
            run.losses.append(float(objective(model_fn, state[0], batch)))
    run.params, run.ms_per_step = state[0], 1e3 * float(np.median(times))
    return run


@partial(jax.jit, static_argnames=("depth", "samples"))
def spectrum(
    model_fn: Callable, params: Params, batch: Batch, key: jax.Array, *, depth: int, samples: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The GGN's leading eigenvalues, in descending order, and its trace with the estimate's standard error."""
    ggn = ggn_jax.GGNLinearOperator(model_fn, LOSS, params, batch)
    flat, unravel = ravel_pytree(params)
    lanczos_key, trace_key = jax.random.split(key)

    def product(vector: jax.Array) -> jax.Array:
        return ravel_pytree(ggn.mv(unravel(vector)))[0]

    start = jax.random.normal(lanczos_key, flat.shape)
    eigenvalues, _ = eig.eigh_partial(decomp.tridiag_sym(depth, custom_vjp=False))(product, start)
    sampler = stochtrace.sampler_signs(flat, num=samples)
    hutchinson = stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace(), sampler)
    return jnp.flip(eigenvalues)[: depth // 2], hutchinson(product, trace_key)


def print_table(
    runs: Sequence[Run], spectra: Sequence[Any], model_fn: Callable, train_set: Batch, test_set: Batch
) -> None:
    """One row per run: its cost, its losses, and the curvature at its last parameters."""
    print(f"\n{'method':<18}{'steps':>6}{'seconds':>9}{'ms (med.)':>11}{'train loss':>12}{'test loss':>11}", end="")
    print(f"{'test acc.':>11}   {'top 3 GGN eigenvalues':<30} GGN trace")
    for run, (eigenvalues, (trace, error)) in zip(runs, spectra, strict=True):
        accuracy = jnp.mean(jnp.argmax(model_fn(run.params, test_set[0]), axis=-1) == test_set[1])
        losses = objective(model_fn, run.params, train_set), objective(model_fn, run.params, test_set)
        top = " ".join(f"{value:<9.3g}" for value in eigenvalues[:3])
        print(
            f"{run.name:<18}{run.recorded[-1]:>6}{run.seconds[-1]:>9.2f}{run.ms_per_step:>11.2f}"
            f"{losses[0]:>12.2e}{losses[1]:>11.3f}{accuracy:>11.1%}   {top:<30} {trace:.3g} ± {error:.1g}"
        )


def plot(runs: Sequence[Run], spectra: Sequence[Any], path: Path) -> None:
    """The training loss against seconds and steps, and the leading eigenvalues."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    by_time, by_step, eigenvalues = figure.subplots(1, 3)
    for run, (values, _) in zip(runs, spectra, strict=True):
        style: dict[str, Any] = {"color": COLORS[run.name], "label": run.name, "linewidth": 1.8}
        ranks = np.arange(1, len(values) + 1)
        eigenvalues.plot(ranks, values, marker="o", markersize=3.5, **style)
        if len(run.losses) > 1:
            marker = "o" if len(run.losses) < 50 else None
            by_time.plot(run.seconds, run.losses, marker=marker, markersize=4, **style)
            by_step.plot(run.recorded[1:], run.losses[1:], marker=marker, markersize=4, **style)
    by_time.set(title="Training loss against time", xlabel="seconds of training, without compilation")
    by_step.set(title="Training loss against steps", xlabel="steps", xscale="log")
    eigenvalues.set(title="Leading GGN eigenvalues (Lanczos)", xlabel="rank", ylabel="eigenvalue", yscale="log")
    for axes in (by_time, by_step):
        axes.set(ylabel="cross-entropy", yscale="log")
    for axes in (by_time, by_step, eigenvalues):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle("Handwritten digits, MLP 64-64-64-10", fontweight="bold")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    default = Path(__file__).parent / "output" / "digits_gauss_newton.png"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial parameters and all random draws")
    parser.add_argument("--steps", type=int, default=24, help="Gauss-Newton steps")
    parser.add_argument("--adam-steps", type=int, default=3000, help="steps of Adam, for each learning rate")
    parser.add_argument("--quick", action="store_true", help="few steps, one learning rate, rough spectra")
    parser.add_argument("--output", type=Path, default=default, help="where the figure goes")
    args = parser.parse_args(argv)
    rates = LEARNING_RATES
    if args.quick:
        rates = (3e-2,)
        args.steps, args.adam_steps = min(args.steps, 6), min(args.adam_steps, 200)

    train_set, test_set = load_data(args.seed)
    model_fn, params = ggn_jax.from_nnx(MLP(nnx.Rngs(args.seed)))
    key = jax.random.key(args.seed)
    first_loss = float(objective(model_fn, params, train_set))
    runs = [Run("At initialisation", params, [0], [0.0], [first_loss], 0.0)]
    candidates = [
        train("Adam", *adam(model_fn, params, rate), model_fn, train_set, key, args.adam_steps, every=10)
        for rate in rates
    ]
    runs.append(min(candidates, key=lambda run: run.losses[-1]))
    runs.append(
        train("Gauss-Newton-CG", *gauss_newton(model_fn, params), model_fn, train_set, key, args.steps, every=1)
    )
    depth, samples = (20, 10) if args.quick else (100, 100)
    spectra = [spectrum(model_fn, run.params, train_set, key, depth=depth, samples=samples) for run in runs]

    print_table(runs, spectra, model_fn, train_set, test_set)
    final = ", ".join(f"{rate:g}: {run.losses[-1]:.1e}" for rate, run in zip(rates, candidates, strict=True))
    print(f"\nAdam takes minibatches of {MINIBATCH}; its final training loss for each learning rate: {final}.")
    print(f"Gauss-Newton takes the whole training set; each step has up to {CG_STEPS} CG steps.")
    shorter = min(run.seconds[-1] for run in runs[1:])
    reached = [run.losses[np.searchsorted(run.seconds, shorter, "right") - 1] for run in runs[1:]]
    print(f"Training loss after {shorter:.2f} s: Adam {reached[0]:.1e}, Gauss-Newton-CG {reached[1]:.1e}.")
    print("A lower training loss need not mean a lower test loss.")
    plot(runs, spectra, args.output)
    print(f"Figure: {args.output}")


if __name__ == "__main__":
    main()
