"""What the training examples share: a race of optimizers on the same batches, its table, JSON and figure.

Seconds are those of a CPU: steps run on one thread, and a step's time is the median of blocks of steps, which the
optimizers run by turns.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from optax.contrib import MuonDimensionNumbers, muon
from preconditioners.matrices import scale_by_soap
from tqdm import tqdm

import ggn_jax

LOOK = 10  # steps between looks at the loss
ROUNDS = 5  # of blocks of steps on the clock
COLORS = {
    "SGD": "#7f7f7f",
    "AdamW": "#4d9a3f",
    "Muon": "#9467bd",
    "SOAP": "#e3a008",
    "KFAC": "#1b6ca8",
    "KFAC, quadratic model": "#d95f02",
    "KFAC, nothing set": "#b2182b",
}
QUICK = ("AdamW", "Muon", "SOAP", "KFAC")


@dataclass
class Task:
    """What is trained: `batch_of(key)` draws a batch, `value(params)` is the training loss that is reported."""

    name: str
    init: Callable[[jax.Array], Any]
    """The first parameters, from a key."""
    loss: Callable[[Any, Any], jax.Array]
    """Of the parameters, on a batch."""
    batch_of: Callable[[jax.Array], Any]
    value: Callable[[Any], jax.Array]
    kfac: Callable[..., Any]
    """`ggn_jax.kfac` with the model and what it needs to know of it."""
    layers: ggn_jax.Layers
    """With `bias="separate"`: the matrices that Muon and SOAP are for."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Settings of KFAC with numbers; `grid` lists the learning rates."""
    quadratic: dict[str, Any] = field(default_factory=dict)
    """Settings of KFAC with the quadratic model; `grid` lists the first dampings, `adapted` how they are adapted."""
    warmup: int = 0
    """Over how many steps the learning rates, of all optimizers that have one, rise from 0."""
    block: int = 50
    """Steps of a block on the clock: a multiple of those between new inverses."""


def supervised(
    name: str,
    model_fn: Callable[[Any, Any], jax.Array],
    loss: ggn_jax.Loss,
    init: Callable[[jax.Array], Any],
    batch_of: Callable[[jax.Array], tuple[Any, Any]],
    data: tuple[Any, Any],
    *,
    alone: Callable[[Any, Any], jax.Array] | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Task:
    """A task with a model and a loss; the training loss is that of `data`.

    `alone` is a model with the same layers that treats examples independently, if `model_fn` does not; `options` are
    for `ggn_jax.kfac`.
    """
    value, init = (lambda params, batch: loss(model_fn(params, batch[0]), batch[1])), jax.jit(init)
    params, (inputs, _) = (jax.eval_shape(make, jax.random.key(0)) for make in (init, batch_of))
    return Task(
        name,
        init,
        value,
        batch_of,
        jax.jit(lambda params: value(params, data)),
        partial(ggn_jax.kfac, model_fn, loss, example_inputs=inputs, **(options or {})),
        ggn_jax.find_layers(alone or model_fn, params, inputs, bias="separate"),
        **settings,
    )


@dataclass
class Run:
    """A finished training; `losses[i]` is the training loss after `LOOK * i` steps."""

    task: str
    optimizer: str
    setting: str
    seed: int
    losses: list[float]
    compile_seconds: float
    tries: dict[str, float]
    """The loss after a third of the steps of each setting that was tried, with the first seed."""
    cpu_ms: float = float("nan")
    """CPU milliseconds of a step."""


def kernels(layers: ggn_jax.Layers, params: Any) -> Any:
    """For Muon: the axes of a weight `[..., in, out]`; None, for AdamW, of embeddings, the last layer and all else."""
    names = {layer.paths[0] for layer in list(layers)[:-1] if layer.kind != "embedding"}
    axes = lambda p: MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)  # noqa: E731
    return jax.tree.map_with_path(lambda path, p: axes(p) if jax.tree_util.keystr(path) in names else None, params)


def candidates(task: Task) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each optimizer, the settings of its grid."""
    numbers = {name: value for name, value in task.numbers.items() if name != "grid"}
    quadratic = {name: value for name, value in task.quadratic.items() if name not in ("grid", "adapted")}
    dampings = [ggn_jax.LevenbergMarquardt(x, **task.quadratic["adapted"]) for x in task.quadratic["grid"]]

    def rates(make: Callable[[Any], Any], *grid: float) -> dict[str, Callable[[], Any]]:
        warm = partial(optax.linear_schedule, 0.0, transition_steps=task.warmup)
        return {f"lr {x:g}": partial(make, warm(x) if task.warmup else x) for x in grid}

    def soap(rate: Any) -> Any:
        return optax.chain(scale_by_soap(task.layers), optax.scale_by_learning_rate(rate))

    def kfac(nesterov: bool) -> dict[str, Callable[[], Any]]:
        found = rates(lambda rate: task.kfac(learning_rate=rate, nesterov=nesterov, **numbers), *task.numbers["grid"])
        return {f"{name}, Nesterov": make for name, make in found.items()} if nesterov else found

    matrices = partial(kernels, task.layers)
    return {
        "SGD": rates(partial(optax.sgd, momentum=0.9), 0.03, 0.1, 0.3, 1.0),
        "AdamW": rates(partial(optax.adamw, weight_decay=0.0), 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
        # Updates as large as AdamW's (Liu et al. 2025), so that what is no matrix has the same learning rate.
        "Muon": rates(
            partial(muon, consistent_rms=0.2, muon_weight_dimension_numbers=matrices), 1e-3, 3e-3, 1e-2, 3e-2
        ),
        "SOAP": rates(soap, 1e-3, 3e-3, 1e-2, 3e-2),
        "KFAC": kfac(False) | kfac(True),
        "KFAC, quadratic model": {
            f"first damping {x.initial:g}": partial(task.kfac, damping=x, **quadratic) for x in dampings
        },
        "KFAC, nothing set": {"": task.kfac},
    }


class Trainer:
    """A compiled step of an optimizer."""

    def __init__(self, task: Task, optimizer: Any):
        second_order = hasattr(optimizer, "value_and_grad_and_factors")

        # Donated, as every training does it: else each step copies parameters and state.
        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
            key_batch, key_draws = jax.random.split(key)
            batch = task.batch_of(key_batch)
            if second_order:
                _, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=key_draws)
                updates, state = optimizer.update(grads, state, params, batch=batch, factors=factors)
            else:
                updates, state = optimizer.update(jax.grad(task.loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        self.task, self.init, params = task, jax.jit(optimizer.init), task.init(jax.random.key(0))
        start = time.process_time()
        self.step = step.lower(params, jax.eval_shape(self.init, params), jax.random.key(0)).compile()
        self.compile_seconds = time.process_time() - start

    def train(self, steps: int, seed: int) -> list[float]:
        """The training loss at each look."""
        params = self.task.init(jax.random.key(seed))
        state, losses = self.init(params), [float(self.task.value(params))]
        keys = list(jax.random.split(jax.random.key(seed), steps))  # the same batches for all
        for first in range(0, steps - LOOK + 1, LOOK):
            for key in keys[first : first + LOOK]:
                params, state = self.step(params, state, key)
            losses.append(float(self.task.value(params)))
        return [float(f"{loss:.5g}") for loss in losses]


def clock(trainers: dict[str, Trainer], block: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds of a step: the median of blocks of steps, of all optimizers by turns."""
    at = {}
    for name, trainer in trainers.items():
        params = trainer.task.init(jax.random.key(0))
        at[name] = params, trainer.init(params)
    found: dict[str, list[float]] = {name: [] for name in trainers}
    keys = list(jax.random.split(jax.random.key(0), block))
    for _ in range(rounds + 1):
        for name, trainer in trainers.items():
            start = time.process_time()
            for key in keys:
                at[name] = trainer.step(*at[name], key)
            jax.block_until_ready(at[name])
            found[name].append(1e3 * (time.process_time() - start) / block)
    return {name: float(np.median(times[1:])) for name, times in found.items()}


def race(task: Task, steps: int, seeds: Sequence[int], quick: bool) -> list[Run]:
    """Each optimizer with the setting that is best after a third of the steps with the first seed."""
    runs, trainers = [], {}
    for name, grid in candidates(task).items():
        if quick and name not in QUICK:
            continue
        made, tries = {}, {}
        for setting, make in tqdm(list(grid.items())[:1] if quick else grid.items(), desc=f"{task.name}: {name}"):
            made[setting] = Trainer(task, make())
            if len(grid) > 1 and not quick:
                tries[setting] = made[setting].train(steps // 3, seeds[0])[-1]
        best = min(made, key=lambda x: np.nan_to_num(tries.get(x, 0.0), nan=np.inf))
        trainers[name] = made[best]
        for seed in tqdm(seeds, desc=f"{task.name}: {name}, {best}", unit="seed"):
            losses = trainers[name].train(steps, seed)
            runs.append(Run(task.name, name, best, seed, losses, trainers[name].compile_seconds, tries))
    times = clock(trainers, 1, 1) if quick else clock(trainers, task.block, ROUNDS)
    for run in runs:
        run.cpu_ms = times[run.optimizer]
    return runs


@dataclass
class Result:
    """A run beside AdamW's with the same seed; its target is AdamW's final training loss."""

    loss: float
    steps: float
    """Over AdamW's, to the target; infinite if it was not reached."""
    seconds: float
    """The same of CPU seconds."""
    same_time: float
    """The loss after as many CPU seconds as AdamW took, or at the end."""


def against(run: Run, adam: Run) -> Result:
    target, pace, last = min(adam.losses[-3:]), run.cpu_ms / adam.cpu_ms, len(adam.losses) - 1
    steps = next((i / last for i, loss in enumerate(run.losses) if loss <= target), float("inf"))
    same_time = [loss for i, loss in enumerate(run.losses) if i * pace <= last][-1]
    return Result(run.losses[-1], steps, steps * pace, same_time)


def summary(values: Sequence[float], digits: str) -> str:
    """The median, and the range where there are several."""
    low, middle, high = (format(f(values), digits) for f in (np.min, np.median, np.max))
    return middle if low == high else f"{middle} ({low} to {high})"


def print_table(runs: Sequence[Run]) -> None:
    """A row per task and optimizer: medians over the seeds, and ranges; multiples of AdamW's steps and seconds."""
    for task in dict.fromkeys(run.task for run in runs):
        some = {name: [run for run in runs if (run.task, run.optimizer) == (task, name)] for name in COLORS}
        print(f"\n{task}: {LOOK * len(some['AdamW'][0].losses[1:])} steps, {len(some['AdamW'])} seed(s)")
        print("| optimizer | setting | final loss | steps | seconds | loss at AdamW's seconds | ms/step | compile s |")
        print("|---|---|---|---|---|---|---|---|")
        for name, mine in some.items():
            if mine:
                found = [against(run, adam) for run, adam in zip(mine, some["AdamW"], strict=True)]
                cells = [summary([x.loss for x in found], ".2g"), summary([x.steps for x in found], ".2f")]
                cells += [summary([x.seconds for x in found], ".2f"), summary([x.same_time for x in found], ".2g")]
                cells += [f"{mine[0].cpu_ms:.3g}", f"{mine[0].compile_seconds:.1f}"]
                print(f"| {name} | {mine[0].setting} | {' | '.join(cells)} |")


def plot(runs: Sequence[Run], path: Path) -> None:
    """The training loss against steps and CPU seconds, a row per task: the median over seeds, and the range."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    figure = Figure(figsize=(11, 4 * len(tasks)), layout="constrained")
    for row, task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        for name, color in COLORS.items():
            mine = [run for run in runs if (run.task, run.optimizer) == (task, name)]
            if not mine:
                continue
            losses = np.array([run.losses[1:] for run in mine])
            steps = LOOK * np.arange(1, losses.shape[1] + 1)
            for ax, x in zip(row, (steps, 1e-3 * mine[0].cpu_ms * steps), strict=True):
                ax.plot(x, np.median(losses, 0), color=color, label=f"{name} ({mine[0].setting})".replace(" ()", ""))
                ax.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.15, linewidth=0)
        for ax, label in zip(row, ("steps", "CPU seconds (without compilation)"), strict=True):
            ax.set(xlabel=label, ylabel="training loss", yscale="log", title=task)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        row[1].set_xscale("log")
        row[1].xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        row[1].xaxis.set_major_formatter("{x:g}")
        row[1].xaxis.set_minor_formatter(NullFormatter())
        row[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(doc: str | None, name: str, tasks: Sequence[Callable[[], Task]], steps: int) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of parameters, batches, draws (default: 0)")
    parser.add_argument("--steps", type=int, default=steps, help=f"of each training (default: {steps})")
    parser.add_argument("--quick", action="store_true", help="a few steps of the last task, one setting per optimizer")
    default = Path(__file__).parent / "output" / f"{name}.png"
    parser.add_argument("--output", type=Path, default=default, help="where the figure goes, and the JSON beside it")
    args = parser.parse_args()
    count, makers = (LOOK, tasks[-1:]) if args.quick else (args.steps, tasks)
    made = [make() for make in makers]
    runs = [run for task in made for run in race(task, count, args.seeds, args.quick)]
    print_table(runs)
    plot(runs, args.output)
    settings = {x.name: {"KFAC": x.numbers, "quadratic model": x.quadratic, "warmup": x.warmup} for x in made}
    report = {"jax": jax.__version__, "steps between losses": LOOK, "settings": settings}
    report |= {"runs": [asdict(run) for run in runs]}
    args.output.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"\nFigure and figures: {args.output}, {args.output.with_suffix('.json')}")
