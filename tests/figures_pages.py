"""Tables of measured figures, made from JSON: `python tests/figures_pages.py` writes them into the pages.

A page has each of them between `<!-- figures: NAME -->` and `<!-- end of figures -->`. The JSON is what the benchmarks
and the examples write: `docs/performance/NAME.json` and `docs/training/*.json`.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [DOCS / name for name in ("performance.md", "training.md", "pinns.md")]
BLOCK = re.compile(r"(<!-- figures: (.*?) -->\n).*?(\n<!-- end of figures -->)", re.DOTALL)
VECTORS = {"mc-1": "MC, 1 sample", "mc-10": "MC, 10 samples", "type-2": "type-2"}
MODELS = {
    "MLP": "MLP 784-512-256-10, batch 512",
    "CNN": "CNN 28 x 28, batch 128",
    "transformer": "transformer, 16 x 64 tokens",
}


def ms(x: float) -> str:
    """Milliseconds, with two or three digits."""
    return f"{x / 1e3:.2g} s" if x >= 1e4 else f"{x:.0f} ms" if x >= 10 else f"{x:#.2g} ms"


def times(x: float) -> str:
    """A ratio: two decimals below 2, where the second counts."""
    return (f"{x:.2f}".removesuffix("0") if x < 2 else f"{x:.2g}" if x >= 10 else f"{x:.1f}") + "x"


def gradients(x: float) -> str:
    return f"{x:.0f} gradients" if x >= 10 else f"{x:.1f} gradients"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def load(name: str) -> tuple[Any, str]:
    """What a benchmark wrote; and on what, as a caption."""
    report = json.loads((DOCS / "performance" / f"{name}.json").read_text(encoding="utf-8"))
    measured = report["measured"]
    versions = ", ".join(f"{package} {version}" for package, version in measured["versions"].items())
    return report["figures"], f"\n\n*Measured {measured['date']}, on {measured['machine']}, with {versions}.*"


def vectors() -> str:
    rows, caption = load("vectors")
    found: dict[str, list[str]] = {}
    for row in rows:
        product = "product `H v`: " if row["vectors"] == "H v" else ""
        found.setdefault(row["size"], []).append(f"{product}{ms(row['ours_ms'])} ({times(row['ratio'])})")
    heads = ["batch, classes, positions", *VECTORS.values()]
    return table(heads, ([size.strip("()"), *cells] for size, cells in found.items())) + caption


def ggn() -> str:
    rows, caption = load("ggn")
    cells = ([row["model"], times(row["time_ratio"]), times(row["memory_ratio"])] for row in rows)
    return table(["model", "time", "memory"], cells) + caption


def heads_of(rows: list[dict[str, Any]]) -> list[str]:
    return ["", *(MODELS[re.split(r"\W", row["model"])[0]] for row in rows)]


def kfac() -> str:
    rows, caption = load("kfac")
    names = VECTORS | {name: name for name in ("exact inverse", "heuristic inverse")}
    names |= {"inverse mv": "product with an inverse"}

    def cell(row: dict[str, Any], side: str) -> str:
        more = f", {gradients(row['in_gradients'][side])}" if side in VECTORS else ""
        return f"{ms(row['ms'][side])} ({times(1 / row['ratio'][side])}){more}"

    return table(heads_of(rows), ([name, *(cell(row, side) for row in rows)] for side, name in names.items())) + caption


def loaders() -> str:
    figures, caption = load("operators")
    names = {"GGN product": "product with the GGN", "EF product": "with the empirical Fisher"}
    names |= {"Hessian product": "with the Hessian", "J v": "`J v`", "J^T u": "`J^T u`"}
    names |= {"KFAC factors": "KFAC's factors, MC", "EKFAC factors": "EKFAC, MC"}

    def cells(row: dict[str, Any]) -> list[str]:
        both = (f"{ms(row[f'{x}_ms'])}, {row[f'{x}_mib']:.0f} MiB" for x in ("ours", "peer"))
        return [names[row["what"]], *both, times(row["ratio"])]

    return table(["", "ours", "curvlinops", ""], map(cells, figures["loaders"])) + caption


def function_space() -> str:
    figures, caption = load("operators")
    cells = (
        [f"{row['outputs']:,}", f"{row['parameters']:,}", ms(row["ours_ms"]), ms(row["peer_ms"]), times(row["ratio"])]
        for row in figures["function space"]
    )
    return table(["outputs", "parameters", "`solve_ggn`", "conjugate gradients", ""], cells) + caption


def layers() -> str:
    figures, caption = load("operators")
    cells = (
        [row["model"], *(f"{x:.1f}" for x in row["in_gradients"].values()), times(row["factors over kfac"])]
        for row in figures["layers"]
    )
    heads = ["in gradients", "`layer_io`", "factors made of it", "what `kfac` takes", "the former over the latter"]
    return table(heads, cells) + caption


def bridge() -> str:
    figures, caption = load("bridge")
    found: dict[str, list[str]] = {}
    for row in figures["calls"]:
        cell = ", ".join(f"{ms(row['us'][x] / 1e3)} ({times(row['ratio'][x])})" for x in ("batched", "vmapped"))
        found.setdefault(f"{row['N']}, {row['C']}", []).append(cell)
    return table(["batch, classes", *VECTORS.values()], ([size, *cells] for size, cells in found.items())) + caption


def torch_modules() -> str:
    rows, caption = load("torch_modules")
    names = {"factors": "KFAC's factors, MC, 1 sample", "product": "product with the exact GGN"}
    cells = [
        [name, *(f"{ms(1e3 * row['seconds'][side])} ({times(row['ratio'][side])})" for row in rows)]
        for side, name in names.items()
    ]
    cells.append(["export", *(f"{row['build']['export']:.1f} s" for row in rows)])
    builds = (", ".join(f"{row['build'][side]:.1f} s" for side in names) for row in rows)
    return table(heads_of(rows), [*cells, ["trace and compile: factors, product", *builds]]) + caption


# The race of optimizers. ----------------------------------------------------------------------------------------------

Run = dict[str, Any]
Runs = dict[str, list[Run]]


def races() -> dict[str, Runs]:
    """For each task, each optimizer's runs, one for each seed: of all files that a training example wrote."""
    found: dict[str, Runs] = {}
    for path in sorted((DOCS / "training").glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        for run in report["runs"]:
            if {"task", "seed", "losses", "cpu_ms"} <= set(run):
                run["steps"] = report["steps between losses"] * (len(run["losses"]) - 1)
                found.setdefault(run["task"], {}).setdefault(run["optimizer"], []).append(run)
    return found


def described(task: str, runs: Runs) -> str:
    seeds = len(runs["AdamW"])
    return f"{task}, {runs['AdamW'][0]['steps']:,} steps, {seeds} seed{'s' if seeds > 1 else ''}"


def to_target(run: Run, adam: Run) -> float:
    """Steps to AdamW's training loss at the end, as a multiple of AdamW's."""
    target, last = min(adam["losses"][-3:]), len(adam["losses"]) - 1
    return next((i / last for i, loss in enumerate(run["losses"]) if loss <= target), math.inf)


def seconds_to_target(run: Run, adam: Run) -> float:
    return to_target(run, adam) * run["cpu_ms"] / adam["cpu_ms"]


def beside_adam(figure: Callable[[Run, Run], float], runs: Runs, name: str) -> str:
    """The median over the seeds, each beside AdamW's run with the same seed; and the range where there is one."""
    adam = {run["seed"]: run for run in runs["AdamW"]}
    values = [figure(run, adam[run["seed"]]) for run in runs.get(name, [])]
    if not values or math.isinf(statistics.median(values)):
        return "not" if values else ""
    low, middle, high = (f"{f(values):.2f}" for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high.replace('inf', 'not')})"


def final_loss(runs: list[Run]) -> str:
    if not runs:
        return ""
    loss = statistics.median(run["losses"][-1] for run in runs)
    return f"{loss:.1e}".replace("e-0", "e-") if loss < 1e-3 else f"{loss:.2g}"


def race(figure: Callable[[Run, Run], float], clock: bool = False) -> str:
    """A row for each task, with `figure` of each run; with `clock`, and what a step of AdamW takes."""
    found = races()
    names = list(dict.fromkeys(name for runs in found.values() for name in runs if name != "AdamW"))
    rows = []
    for task, runs in found.items():
        adam = [ms(runs["AdamW"][0]["cpu_ms"])] if clock else []
        rows.append([described(task, runs), *adam, *(beside_adam(figure, runs, name) for name in names)])
    return table(["task", *(["a step of AdamW"] if clock else []), *names], rows)


def race_losses() -> str:
    found = races()
    names = list(dict.fromkeys(name for runs in found.values() for name in runs))
    rows = (
        [described(task, runs), *(final_loss(runs.get(name, [])) for name in names)] for task, runs in found.items()
    )
    return table(["task", *names], rows)


METHODS = {  # of `examples/pinn.py`: how the page calls them, and their settings around what was chosen
    "Adam": ("Adam", "{}, the best of three"),
    "L-BFGS": ("L-BFGS", "{}"),
    "KFAC": ("KFAC", "learning rate 0.05, momentum 0.9, {}"),
    "KFAC*": ("KFAC*", "{}, adapted"),
    "GN, CG": ("Gauss-Newton by conjugate gradients", "preconditioned by KFAC, {}, adapted"),
    "GN, function space": ("Gauss-Newton in function space", "{}, adapted"),
}


def short(x: float) -> str:
    return f"{x:.1e}".replace("e-0", "e-").replace("e+0", "e")


def pinn(problem: str) -> str:
    """For each method, the last step, and the loss and the error where the loss was least."""
    rows = []
    for run in json.loads((DOCS / "training" / f"pinn_{problem}.json").read_text(encoding="utf-8"))["runs"]:
        method, setting = METHODS[run["method"]]
        chosen = run["setting"].removeprefix("first ").removeprefix("learning rate 0.05, ")
        chosen = chosen.replace("damping ", "damping from ") if "adapted" in setting else chosen
        loss, error = min(zip(run["losses"], run["errors"], strict=True))
        rows.append([method, setting.format(chosen), f"{run['steps'][-1]:,}", short(loss), short(error)])
    return table(["method", "setting", "steps", "loss", "L2 error"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "vectors": vectors,
    "ggn": ggn,
    "kfac": kfac,
    "loaders": loaders,
    "function space": function_space,
    "layers": layers,
    "bridge": bridge,
    "torch_modules": torch_modules,
    "race, steps": lambda: race(to_target),
    "race, seconds": lambda: race(seconds_to_target, clock=True),
    "race, final losses": race_losses,
    "Poisson": lambda: pinn("poisson2"),
    "Burgers": lambda: pinn("burgers"),
    "Poisson, 5 dimensions": lambda: pinn("poisson5"),
}


def written(page: str) -> str:
    """The page with its tables made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
