"""What the training examples share: runs of several optimizers on the same batches, their table, JSON and figure."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import ggn_jax

BLOCK = 10  # steps between looks at the loss
COLORS = {"SGD": "#7f7f7f", "AdamW": "#4d9a3f", "KFAC": "#1b6ca8", "KFAC, quadratic model": "#d95f02"}


@dataclass
class Task:
    """What is trained: `batch_of(key)` draws a batch, `value(params)` is the training loss that is reported."""

    name: str
    model_fn: Callable[[Any, Any], jax.Array]
    params: Any
    loss: ggn_jax.Loss
    batch_of: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    value: Callable[[Any], jax.Array]
    kfac: dict[str, Any] = field(default_factory=dict)
    """Settings of KFAC with numbers; `grid` lists the learning rates."""
    quadratic: dict[str, Any] = field(default_factory=dict)
    """Settings of KFAC with the quadratic model; `grid` lists the first dampings."""
    warmup: int = 0
    """Over how many steps the learning rates, of all optimizers that have one, rise from 0."""


@dataclass
class Run:
    """A finished training; `losses[i]` is the training loss after `steps[i]` steps and `seconds[i]` seconds."""

    task: str
    optimizer: str
    setting: str
    steps: list[int]
    seconds: list[float]
    losses: list[float]
    compile_seconds: float


def candidates(task: Task) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each optimizer, the settings of its grid."""
    example = task.batch_of(jax.random.key(0))[0]
    kfac = partial(ggn_jax.kfac, task.model_fn, task.loss, example_inputs=example)
    numbers = {name: value for name, value in task.kfac.items() if name != "grid"}
    quadratic = {name: value for name, value in task.quadratic.items() if name != "grid"}

    def rate(x: float) -> Any:
        return optax.linear_schedule(0.0, x, task.warmup) if task.warmup else x

    return {
        "SGD": {f"lr {x:g}": partial(optax.sgd, rate(x), momentum=0.9) for x in (0.03, 0.1, 0.3, 1.0)},
        "AdamW": {f"lr {x:g}": partial(optax.adamw, rate(x), weight_decay=0.0) for x in (1e-3, 3e-3, 1e-2, 3e-2)},
        "KFAC": {f"lr {x:g}": partial(kfac, rate(x), **numbers) for x in task.kfac["grid"]},
        "KFAC, quadratic model": {
            f"first damping {x:g}": partial(kfac, "quadratic", momentum="quadratic", damping=x, **quadratic)
            for x in task.quadratic["grid"]
        },
    }


def run(task: Task, name: str, setting: str, optimizer: Any, steps: int, seed: int) -> Run:
    """Train; only the steps are on the clock."""
    second_order = isinstance(optimizer, optax.GradientTransformationExtraArgs) and hasattr(optimizer, "core")

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        key_batch, key_draws = jax.random.split(key)
        batch = task.batch_of(key_batch)
        if second_order:
            _, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key_draws)
            updates, state = optimizer.update(grads, state, params, batch=batch, factors=factors)
        else:
            grads = jax.grad(lambda params: task.loss(task.model_fn(params, batch[0]), batch[1]))(params)
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = task.params, jax.jit(optimizer.init)(task.params)
    keys = list(jax.random.split(jax.random.key(seed), steps))  # the same batches for all
    start = time.perf_counter()
    compiled = step.lower(params, state, keys[0]).compile()
    result = Run(task.name, name, setting, [0], [0.0], [float(task.value(params))], time.perf_counter() - start)
    for first in range(0, steps - BLOCK + 1, BLOCK):
        start = time.perf_counter()
        for key in keys[first : first + BLOCK]:
            params, state = compiled(params, state, key)
        jax.block_until_ready((params, state))
        result.seconds.append(result.seconds[-1] + time.perf_counter() - start)
        result.steps.append(first + BLOCK)
        result.losses.append(float(task.value(params)))
    return result


def compare(task: Task, steps: int, seed: int, quick: bool) -> list[Run]:
    """Each optimizer with the setting that is best after a third of the steps."""
    results = []
    for name, grid in candidates(task).items():
        settings = dict(list(grid.items())[1:2]) if quick else grid
        tries = {}
        for setting, make in tqdm(settings.items(), desc=f"{task.name}: {name}", unit="setting"):
            if len(settings) > 1:
                loss = run(task, name, setting, make(), steps // 3, seed).losses[-1]
                tries[setting] = loss if np.isfinite(loss) else np.inf
        best = min(tries, key=tries.__getitem__) if tries else next(iter(settings))
        results.append(run(task, name, best, settings[best](), steps, seed))
    return results


def reached(run: Run, loss: float) -> tuple[int, float] | None:
    """The first step, and its time, with a training loss of at most `loss`."""
    return next(((s, t) for s, t, x in zip(run.steps, run.seconds, run.losses, strict=True) if x <= loss), None)


def print_table(runs: Sequence[Run]) -> None:
    """One row per optimizer; a target is AdamW's final training loss."""
    for task in dict.fromkeys(run.task for run in runs):
        some = [run for run in runs if run.task == task]
        adam = next(run for run in some if run.optimizer == "AdamW")
        target, steps, seconds = min(adam.losses[-3:]), adam.steps[-1], adam.seconds[-1]
        print(f"\n{task}: {steps} steps; to AdamW's final training loss {target:.3g}")
        print(f"{'optimizer':<23}{'setting':<20}{'final loss':>11}{'steps':>7}{'x':>6}{'seconds':>9}{'x':>6}", end="")
        print(f"{'ms/step':>9}{'compile s':>11}")
        for run in some:
            found = reached(run, target)
            cells = f"{'-':>7}{'-':>6}{'-':>9}{'-':>6}"
            if found:
                cells = f"{found[0]:>7}{found[0] / steps:>6.2f}{found[1]:>9.2f}{found[1] / seconds:>6.2f}"
            print(f"{run.optimizer:<23}{run.setting:<20}{run.losses[-1]:>11.3g}{cells}", end="")
            print(f"{1e3 * run.seconds[-1] / run.steps[-1]:>9.2f}{run.compile_seconds:>11.1f}")


def plot(runs: Sequence[Run], path: Path) -> None:
    """The training loss against steps and against seconds, a row per task."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    figure = Figure(figsize=(10, 3.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for run in (run for run in runs if run.task == task):
            style: dict[str, Any] = {"color": COLORS[run.optimizer], "label": f"{run.optimizer} ({run.setting})"}
            row[0].plot(run.steps, run.losses, **style)
            row[1].plot(run.seconds, run.losses, **style)
        for ax, label in zip(row, ("steps", "seconds (without compilation)"), strict=True):
            ax.set(xlabel=label, ylabel="training loss", yscale="log", title=task)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        row[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(doc: str | None, name: str, tasks: Callable[[int], Sequence[Task]], steps: int) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters, the batches and the draws")
    parser.add_argument("--steps", type=int, default=steps, help=f"of each training (default: {steps})")
    parser.add_argument("--quick", action="store_true", help="a few steps of the last task, one setting per optimizer")
    default = Path(__file__).parent / "output" / f"{name}.png"
    parser.add_argument("--output", type=Path, default=default, help="where the figure goes, and the JSON beside it")
    args = parser.parse_args()
    count = BLOCK if args.quick else args.steps
    made = tasks(args.seed)[-1:] if args.quick else tasks(args.seed)
    runs = [result for task in made for result in compare(task, count, args.seed, args.quick)]
    print_table(runs)
    plot(runs, args.output)
    settings = {
        task.name: {"KFAC": task.kfac, "KFAC, quadratic model": task.quadratic, "warmup": task.warmup} for task in made
    }
    report = {"jax": jax.__version__, "settings": settings, "runs": [asdict(result) for result in runs]}
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nFigure and figures: {args.output}, {args.output.with_suffix('.json')}")
