"""Physics-informed networks: six optimizers, from Adam to Gauss-Newton in function space, with equal CPU seconds.

A network is trained to solve a differential equation: the mean square of the equation's residual inside of the domain,
plus that of the error where values are given. Both are an `Objective` with points of its own, in float64 on one thread.
Prints the relative L2 error of the solutions, and writes a figure and a JSON file.

    python examples/pinn.py --problem poisson2
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
import lineax as lx
import numpy as np
import optax
from matplotlib.figure import Figure

import ggn_jax

Params = list[dict[str, jax.Array]]
COLORS = {
    "Adam": "#7f7f7f",
    "L-BFGS": "#4d9a3f",
    "KFAC": "#1b6ca8",
    "KFAC*": "#d95f02",
    "GN, CG": "#9467bd",
    "GN, function space": "#b2182b",
}


def network(key: jax.Array, widths: list[int]) -> Params:
    """An MLP's weights `[in, out]` and biases."""
    shapes = zip(jax.random.split(key, len(widths) - 1), widths[:-1], widths[1:], strict=True)
    return [{"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)} for k, a, b in shapes]


def derivatives(params: Params, x: jax.Array, space: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The network's value `[1]` at one point, its slopes `[axes, 1]`, and its Laplacian `[1]` over the axes in `space`.

    All in one pass, the forward Laplacian (Li et al. 2023): each layer is used for the value, the slopes and the
    Laplacian, which `ggn_jax` finds. Nested `jax.jvp`s do as well, and take twice the time.
    """
    slopes, laplacian = jnp.eye(len(x)), jnp.zeros_like(x)
    for layer in params[:-1]:
        x, slopes, laplacian = x @ layer["w"] + layer["b"], slopes @ layer["w"], laplacian @ layer["w"]
        x = jnp.tanh(x)
        first = 1 - x**2
        laplacian = first * laplacian - 2 * x * first * (space @ slopes**2)
        slopes = first * slopes
    last = params[-1]
    return x @ last["w"] + last["b"], slopes @ last["w"], laplacian @ last["w"]


def value(params: Params, x: jax.Array) -> jax.Array:
    """The network's value `[1]` at one point."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


@dataclass
class Problem:
    """A differential equation: the residual is `inside[1]` inside, and the value `edge[1]` at the edge."""

    title: str
    equation: Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]
    """The residual and the value, from one pass."""
    inside: tuple[jax.Array, jax.Array]
    edge: tuple[jax.Array, jax.Array]
    solution: Callable[[jax.Array], jax.Array]
    test: jax.Array
    params: Params
    axes: tuple[str, str] = ("x1", "x2")

    def residual(self, params: Params, x: jax.Array) -> jax.Array:
        return self.equation(params, x)[0]

    @property
    def objective(self) -> ggn_jax.Objective:
        loss = ggn_jax.MSELoss()
        equation = ggn_jax.Objective(jax.vmap(self.residual, (None, 0)), loss)
        return equation + ggn_jax.Objective(jax.vmap(value, (None, 0)), loss)

    @property
    def batches(self) -> list[tuple[jax.Array, jax.Array]]:
        return [self.inside, self.edge]

    def error(self) -> Callable[[Params], jax.Array]:
        """The relative L2 error of the solution, on points that are not trained on."""
        wanted = self.solution(self.test)
        of = jax.jit(lambda params: jax.vmap(value, (None, 0))(params, self.test) - wanted)
        return lambda params: jnp.linalg.norm(of(params)) / jnp.linalg.norm(wanted)


def poisson(dimensions: int, widths: list[int], points: tuple[int, int], key: jax.Array) -> Problem:
    """`-Laplacian u = f` on the unit cube, as in Dangel et al. (2024), section 4 (arXiv 2405.15603)."""
    keys = jax.random.split(key, 6)

    def solution(x: jax.Array) -> jax.Array:
        waves = jnp.sin(jnp.pi * x) if dimensions == 2 else jnp.cos(jnp.pi * x)
        return (jnp.prod if dimensions == 2 else jnp.sum)(waves, axis=-1, keepdims=True)

    def equation(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, _, laplacian = derivatives(params, x, jnp.ones(dimensions))
        return -laplacian, u

    inside, edge, test = (jax.random.uniform(k, (n, dimensions)) for k, n in zip(keys, (*points, 4000), strict=False))
    faces = jax.random.randint(keys[3], (len(edge),), 0, dimensions), jax.random.bernoulli(keys[4], shape=(len(edge),))
    edge = edge.at[jnp.arange(len(edge)), faces[0]].set(faces[1].astype(float))
    source = jnp.pi**2 * (2 if dimensions == 2 else 1) * solution(inside)
    title = f"Poisson equation, {dimensions} dimensions"
    params = network(keys[5], [dimensions, *widths, 1])
    return Problem(title, equation, (inside, source), (edge, solution(edge)), solution, test, params)


def burgers(widths: list[int], points: tuple[int, int], key: jax.Array, viscosity: float = 0.05) -> Problem:
    """`u_t + u u_x = viscosity u_xx` on [0, 1] x [-1, 1], from `u(0, x) = -sin(pi x)`; a point is `(t, x)`."""
    keys = jax.random.split(key, 5)
    nodes, weights = (jnp.asarray(array) for array in np.polynomial.hermite.hermgauss(120))

    def solution(x: jax.Array) -> jax.Array:  # Cole and Hopf
        y = x[:, 1:] - jnp.sqrt(4 * viscosity * x[:, :1]) * nodes
        heat = weights * jnp.exp(-jnp.cos(jnp.pi * y) / (2 * jnp.pi * viscosity))
        return -jnp.sum(jnp.sin(jnp.pi * y) * heat, 1, keepdims=True) / jnp.sum(heat, 1, keepdims=True)

    def equation(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, slopes, second = derivatives(params, x, jnp.array([0.0, 1.0]))
        return slopes[0] + u * slopes[1] - viscosity * second, u

    low, high = jnp.array([0.0, -1.0]), jnp.array([1.0, 1.0])
    inside, edge, test = (
        jax.random.uniform(k, (n, 2), minval=low, maxval=high) for k, n in zip(keys, (*points, 4000), strict=False)
    )
    half = len(edge) // 2
    sides = jnp.where(jax.random.bernoulli(keys[3], shape=(len(edge) - half,)), 1.0, -1.0)
    edge = edge.at[:half, 0].set(0.0).at[half:, 1].set(sides)
    params = network(keys[4], [2, *widths, 1])
    batches = (inside, jnp.zeros((len(inside), 1))), (edge, solution(edge))
    return Problem("Burgers' equation", equation, *batches, solution, test, params, ("t", "x"))


def problems(quick: bool) -> dict[str, Callable[[jax.Array], Problem]]:
    small, widths = [8], [64, 64, 48, 48]
    return {
        "poisson2": partial(poisson, 2, small if quick else widths, (60, 20) if quick else (900, 120)),
        "poisson5": partial(poisson, 5, small if quick else widths, (60, 20) if quick else (3000, 500)),
        "burgers": partial(burgers, small if quick else widths, (60, 20) if quick else (900, 120)),
    }


# Methods: `init(params) -> state` and `step(params, state) -> (params, state)`.


def backtrack(objective: Callable[[Params], jax.Array], params: Params, direction: Params, first: Any) -> Any:
    """`params - t direction` for the first `t` of `first, first / 2, ...` that lowers the objective, and `t`."""
    before = objective(params)

    def moved(t: jax.Array) -> Params:
        return jax.tree.map(lambda p, d: p - t * d, params, direction)

    def too_long(t: jax.Array) -> jax.Array:
        return ~(objective(moved(t)) < before) & (t > 1e-8)

    t = jax.lax.while_loop(too_long, lambda t: t / 2, first)
    return moved(t), t


@dataclass
class Method:
    name: str
    setting: str
    init: Callable[[Params], Any]
    step: Callable[[Params, Any], tuple[Params, Any]]


def adam(problem: Problem, rate: float) -> Method:
    optimizer, objective, batches = optax.adam(rate), problem.objective, problem.batches

    def step(params: Params, state: Any) -> tuple[Params, Any]:
        updates, state = optimizer.update(jax.grad(objective)(params, batches), state)
        return optax.apply_updates(params, updates), state

    return Method("Adam", f"learning rate {rate:g}", optimizer.init, step)


def lbfgs(problem: Problem) -> Method:
    optimizer, value_fn = optax.lbfgs(memory_size=30), lambda params: problem.objective(params, problem.batches)
    value_and_grad = optax.value_and_grad_from_state(value_fn)

    def step(params: Params, state: Any) -> tuple[Params, Any]:
        found, grads = value_and_grad(params, state=state)
        updates, state = optimizer.update(grads, state, params, value=found, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    return Method("L-BFGS", "memory 30", optimizer.init, step)


KFAC = {"fisher_type": "type-2", "tied": "concatenate"}  # two Kronecker terms: one of the equation, one of the edge


def kfac(problem: Problem, name: str, setting: str, **options: Any) -> Method:
    examples = [problem.inside[0], problem.edge[0]]
    optimizer = ggn_jax.kfac(problem.objective, example_inputs=examples, **KFAC, **options)

    def step(params: Params, state: Any) -> tuple[Params, Any]:
        batches = problem.batches
        _, grads, factors = optimizer.value_and_grad_and_factors(params, batches, state)
        updates, state = optimizer.update(grads, state, params, batch=batches, factors=factors)
        return optax.apply_updates(params, updates), state

    return Method(name, setting, optimizer.init, step)


def solve_by_cg(problem: Problem, params: Params, grads: Params, damping: jax.Array) -> Params:
    """`(GGN + damping I)^-1 gradient`, to a tenth, by conjugate gradients with KFAC's inverse as preconditioner."""
    made = problem.objective, params, problem.batches
    ggn = ggn_jax.GGNLinearOperator.from_objective(*made)
    kfac = ggn_jax.KFACLinearOperator.from_objective(*made, **KFAC)
    options = {"preconditioner": kfac.inverse(damping)}
    solver = lx.CG(rtol=0.1, atol=0.0, max_steps=60)
    return lx.linear_solve(ggn.damped(damping), grads, solver, options=options, throw=False).value


def solve_in_function_space(problem: Problem, params: Params, grads: Params, damping: jax.Array) -> Params:
    """The same solve, exactly, by a matrix of the size of the points: those inside and those at the edge."""
    gram = ggn_jax.GramLinearOperator.from_objective(problem.objective, params, problem.batches)
    return gram.solve_ggn(grads, damping)


def gauss_newton(problem: Problem, name: str, solve: Callable[..., Params], damping: float) -> Method:
    """Levenberg and Marquardt: less damping after a full step, more after one that the line search cut."""
    objective = lambda params: problem.objective(params, problem.batches)  # noqa: E731

    def step(params: Params, damping: jax.Array) -> tuple[Params, jax.Array]:
        direction = solve(problem, params, jax.grad(objective)(params), damping)
        params, t = backtrack(objective, params, direction, jnp.ones(()))
        return params, jnp.clip(damping * jnp.where(t == 1, 1 / 3, jnp.where(t < 1 / 4, 4.0, 1.0)), 1e-14, 1.0)

    return Method(name, f"first damping {damping:g}", lambda params: jnp.asarray(damping), step)


def methods(problem: Problem) -> dict[str, list[Callable[[], Method]]]:
    """Each method with the settings of its grid."""
    plain = {"learning_rate": 0.05, "damping": 1e-3, "inverse_interval": 5}
    adapted = ggn_jax.LevenbergMarquardt(1e-3, interval=2, minimum=1e-12)
    return {
        "Adam": [partial(adam, problem, rate) for rate in (1e-3, 3e-3, 1e-2)],
        "L-BFGS": [partial(lbfgs, problem)],
        "KFAC": [partial(kfac, problem, "KFAC", "learning rate 0.05, damping 0.001", **plain)],
        "KFAC*": [partial(kfac, problem, "KFAC*", "first damping 0.001", damping=adapted, inverse_interval=2)],
        "GN, CG": [partial(gauss_newton, problem, "GN, CG", solve_by_cg, 1e-4)],
        "GN, function space": [partial(gauss_newton, problem, "GN, function space", solve_in_function_space, 1e-4)],
    }


@dataclass
class Run:
    """A training: `errors[i]` and `losses[i]` after `steps[i]` steps and `seconds[i]` seconds of the CPU."""

    method: str
    setting: str
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Where the loss is least: the error is not known in practice."""
        return int(np.nanargmin(self.losses))


def train(problem: Problem, method: Method, seconds: float, most_steps: int) -> tuple[Run, Params]:
    """Steps, until the time is over; compiling and looking at the error are not on the clock."""
    error, loss = problem.error(), jax.jit(problem.objective)
    params, best, used, count = problem.params, problem.params, 0.0, 0
    state = jax.jit(method.init)(params) if "KFAC" not in method.name else method.init(params)
    step = jax.jit(method.step).lower(params, state).compile()
    run, look = Run(method.name, method.setting), 0.0
    while True:
        if used >= look or count >= most_steps:
            run.steps.append(count)
            run.seconds.append(used)
            run.losses.append(float(loss(params, problem.batches)))
            run.errors.append(float(error(params)))
            best = params if run.best == len(run.losses) - 1 else best
            look = used + seconds / 100
        if used >= seconds or count >= most_steps:
            return run, best
        start = time.process_time()
        params, state = jax.block_until_ready(step(params, state))
        used, count = used + time.process_time() - start, count + 1


def compare(problem: Problem, seconds: float, names: list[str], quick: bool) -> list[tuple[Run, Params]]:
    """Each method, with the setting that has the least loss after a quarter of the time."""
    most, results = 3 if quick else 10**9, []
    for name, grid in methods(problem).items():
        if name not in names:
            continue
        grid = grid[:1] if quick else grid
        tries = [train(problem, make(), seconds / 4, most)[0] for make in grid] if len(grid) > 1 else []
        chosen = grid[int(np.nanargmin([min(run.losses) for run in tries]))] if tries else grid[0]
        results.append(train(problem, chosen(), seconds, most))
        run = results[-1][0]
        print(f"{run.method:<20}{run.setting:<22}{run.steps[-1]:>7}", end="")
        print(f"{run.losses[run.best]:>12.1e}{run.errors[run.best]:>12.1e}", flush=True)
    return results


def plot(problem: Problem, results: list[tuple[Run, Params]], path: Path) -> None:
    """The error against seconds and steps, and where the best solution is wrong."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for run, _ in results:
        best = np.array([run.errors[int(np.nanargmin(run.losses[: i + 1]))] for i in range(len(run.losses))])
        for ax, x in zip(axes, (run.seconds, run.steps), strict=False):
            ax.plot(x, best, color=COLORS[run.method], label=run.method)
    for ax, label in zip(axes, ("CPU seconds (without compilation)", "steps"), strict=False):
        ax.set(xlabel=label, ylabel="relative L2 error", yscale="log", title=problem.title)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].set_xscale("symlog", linthresh=1)
    axes[1].set_xlim(left=0)
    axes[0].legend(frameon=False, fontsize=8)
    run, params = min(results, key=lambda result: result[0].losses[result[0].best])
    low, high = problem.test.min(0).round(), problem.test.max(0).round()
    x, y = (np.linspace(low[i], high[i], 120) for i in range(2))
    grid = jnp.full((len(y), len(x), len(low)), 0.5).at[..., 0].set(x).at[..., 1].set(y[:, None]).reshape(-1, len(low))
    wrong = (jax.vmap(value, (None, 0))(params, grid) - problem.solution(grid)).reshape(len(y), len(x))
    most = float(jnp.abs(wrong).max())
    image = axes[2].pcolormesh(x, y, wrong, cmap="RdBu_r", vmin=-most, vmax=most, rasterized=True)
    axes[2].set(title=f"error of the solution: {run.method}", xlabel=problem.axes[0], ylabel=problem.axes[1])
    figure.colorbar(image, ax=axes[2], format="%.0e")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=list(problems(True)), default="poisson2", help="(default: poisson2)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the CPU, for each method (default: 40)")
    parser.add_argument("--methods", nargs="+", choices=list(COLORS), default=list(COLORS))
    parser.add_argument("--seed", type=int, default=0, help="of the points and the first parameters")
    parser.add_argument("--quick", action="store_true", help="a small network, a few points and steps")
    parser.add_argument("--output", type=Path, default=None, help="where the figure goes, and the JSON beside it")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problem = problems(args.quick)[args.problem](jax.random.key(args.seed))
    output = args.output or Path(__file__).parent / "output" / f"pinn_{args.problem}.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    count = sum(x.size for x in jax.tree.leaves(problem.params))
    print(f"{problem.title}: {len(problem.inside[0])} + {len(problem.edge[0])} points, {count} parameters")
    print(f"{'method':<20}{'setting':<22}{'steps':>7}{'loss':>12}{'L2 error':>12}")
    results = compare(problem, args.seconds, args.methods, args.quick)
    plot(problem, results, output)
    report = {"jax": jax.__version__, "problem": problem.title, "points": [len(x) for x, _ in problem.batches]}
    report |= {"parameters": count, "seconds": args.seconds, "runs": [asdict(run) for run, _ in results]}
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Figure and figures: {output}, {output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
