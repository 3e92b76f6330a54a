"""What real models cost to build with `ggn_jax.kfac`: time to trace and to compile, memory, and size of the state.

The models are those of `architectures.py`: perceptrons of many layers, residual networks, vision transformers, GPT-2,
a decoder like Llama's, and a diffusion U-Net. They are built from shapes; no parameter or input has a value. Printed,
also as multiples of the first, are the figures of

    gradient    jax.value_and_grad of the loss
    sgd step    that, and a step of optax.sgd
    factors     the Kronecker factors, optimizer.factors
    one pass    both at once, optimizer.value_and_grad_and_factors
    kfac step   that, and an update, which renews inverses where it is their turn

The seconds are those to trace a function, to lower it to StableHLO, and to compile that, without JAX's persistent
cache; CPU seconds are those of all threads, for all three together, and vary less on a busy machine. Equations are
those of the jaxpr and of all jaxprs inside of it, instructions those of XLA's optimised module. FLOPs are XLA's count,
in which the body of a loop counts once, and temporaries what XLA plans beside arguments and results. State is that of
`optimizer.init`, as a multiple of the parameters; given values, `init` also checks that examples are independent, and
takes the seconds in brackets, measured for small models only.

Each model is built in a process of its own, so that one that fails leaves the others. `--run` takes a real step of
ResNet-50 and of GPT-2 (or of other models), with random values and a batch of `--batch`.

    python benchmarks/models.py --model mlp-40 gpt2-small --options max_dense_size=2048 inverse_interval=1
"""

import argparse
import ast
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from architecture_layers import Problem
from architectures import MODELS, TINY
from child import environment
from record import write

import ggn_jax

OPTIONS: dict[str, Any] = {"on_uncovered": "diagonal"}
RUN = ("resnet50", "gpt2-small")
PROGRAMS = ("gradient", "sgd step", "factors", "one pass", "kfac step")
HEADS = {
    "trace_s": "trace s",
    "lower_s": "lower s",
    "compile_s": "compile s",
    "cpu_s": "CPU s",
    "equations": "equations",
    "instructions": "instructions",
    "gflop": "GFLOP",
    "temporary_mib": "temporary MiB",
}
SMALL = 1_000_000  # parameters, up to which `init` is timed with values
Row = dict[str, Any]


def count_equations(jaxpr: Any) -> int:
    """Of a jaxpr and of all in its equations' parameters, each as often as it is called."""

    @cache
    def count(jaxpr: Any) -> int:
        return sum(1 + sum(map(count, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)

    return count(jaxpr.jaxpr)


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(leaf, "eqns"):
            yield getattr(leaf, "jaxpr", leaf)


def count_instructions(compiled: Any) -> int:
    return sum(" = " in line for line in compiled.as_text().splitlines())


def differences(times: list[float]) -> list[float]:
    return [end - start for start, end in itertools.pairwise(times)]


def build(fn: Callable[..., Any], *args: Any) -> Row:
    """All figures of a function of shapes."""
    jax.clear_caches()
    times, cpu = [time.perf_counter()], time.process_time()

    def timed(value: Any) -> Any:
        times.append(time.perf_counter())
        return value

    traced = timed(jax.jit(fn).trace(*args))
    lowered = timed(traced.lower())
    compiled = timed(lowered.compile())
    cpu = time.process_time() - cpu
    return {
        **dict(zip(("trace_s", "lower_s", "compile_s"), differences(times), strict=True)),
        "cpu_s": cpu,
        "equations": count_equations(traced.jaxpr),
        "instructions": count_instructions(compiled),
        "gflop": compiled.cost_analysis().get("flops", 0.0) / 1e9,
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def entries(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def mebibytes(tree: Any) -> float:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 2**20


def random_batch(problem: Problem) -> Any:
    """Inputs and targets: white noise, and integers."""
    leaves, structure = jax.tree.flatten((problem.inputs, problem.targets))

    def values(shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jax.random.randint(key, shape.shape, 0, problem.classes, shape.dtype)
        return jax.random.normal(key, shape.shape, shape.dtype)

    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(structure, map(values, leaves, keys))


def make_optimizer(problem: Problem, options: dict[str, Any], inputs: Any) -> Any:
    given = {**OPTIONS, **options}
    return ggn_jax.kfac(problem.model_fn, problem.loss, 0.01, example_inputs=inputs, **given)


def first_order(problem: Problem) -> dict[str, Callable[..., Any]]:
    """Functions of parameters and a batch."""

    def gradient(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda params: problem.loss(problem.model_fn(params, batch[0]), batch[1]))(params)

    def sgd_step(params: Any, batch: Any) -> Any:
        value, grads = gradient(params, batch)
        sgd = optax.sgd(0.01)
        return optax.apply_updates(params, sgd.update(grads, sgd.init(params))[0]), value

    return {"gradient": gradient, "sgd step": sgd_step}


def second_order(optimizer: Any) -> dict[str, Callable[..., Any]]:
    """Functions of parameters, a batch, the optimizer's state and a key."""

    def factors(params: Any, batch: Any, state: Any, key: Any) -> Any:
        return optimizer.factors(params, batch, state, key=key)

    def one_pass(params: Any, batch: Any, state: Any, key: Any) -> Any:
        return optimizer.value_and_grad_and_factors(params, batch, state, key=key)

    def kfac_step(params: Any, batch: Any, state: Any, key: Any) -> Any:
        value, grads, factors = one_pass(params, batch, state, key)
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, value

    return {"factors": factors, "one pass": one_pass, "kfac step": kfac_step}


def init_seconds(problem: Problem, options: dict[str, Any]) -> float:
    """Of a new optimizer's `init`, with values."""
    params = jax.jit(problem.init)(jax.random.key(0))
    inputs = jax.block_until_ready(random_batch(problem))[0]
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(make_optimizer(problem, options, inputs).init(params))
    return time.perf_counter() - start


def attempt(what: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> Row:
    """The figures of a program, or why there are none."""
    try:
        return {"row": what, **build(fn, *args)}
    except Exception as error:  # whatever it is, it is a result
        return {"row": what, "error": first_line(error)}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def measure(problem: Problem, options: dict[str, Any]) -> Iterator[Row]:
    """The rows of a model."""
    params, key = jax.eval_shape(problem.init, jax.random.key(0)), jax.eval_shape(jax.random.key, 0)
    batch = problem.inputs, problem.targets
    build(jnp.sin, jnp.zeros(2))  # what JAX does once
    for what, fn in first_order(problem).items():
        yield attempt(what, fn, (params, batch))
    optimizer = make_optimizer(problem, options, problem.inputs)
    jax.clear_caches()
    start = time.perf_counter()
    state = jax.eval_shape(optimizer.init, params)
    seconds = time.perf_counter() - start
    small = entries(params) <= SMALL
    init = {"init_shapes_s": seconds, "init_s": init_seconds(problem, options) if small else None}
    yield {"row": "model", **sizes(params, state), **init, **exceptions(optimizer.report(params))}
    for what, fn in second_order(optimizer).items():
        yield attempt(what, fn, (params, batch, state, key))
    yield {"row": "process", "peak_mib": peak_mebibytes()}


def sizes(params: Any, state: Any) -> Row:
    return {
        "parameters": entries(params),
        "leaves": len(jax.tree.leaves(params)),
        "state_entries": entries(state) / entries(params),
        "state_bytes": mebibytes(state) / mebibytes(params),
        "state_mib": mebibytes(state),
    }


def exceptions(report: Any) -> Row:
    """Parameters that no layer covers, and those whose curvature is less than usual, by the reason."""
    found: Row = {"uncovered": {}, "reduced": {}}
    for row in report.rows:
        if row.why:
            kind = "uncovered" if row.kind == "uncovered" else "reduced"
            found[kind].setdefault(row.why, []).append(row.parameter)
    return found


def peak_mebibytes() -> float:
    """What this process has used at most, beside the arrays that do not exist; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run(problem: Problem, options: dict[str, Any]) -> Iterator[Row]:
    """A step with values, and the loss before and after."""
    params = jax.jit(problem.init)(jax.random.key(0))
    batch = random_batch(problem)
    optimizer = make_optimizer(problem, options, problem.inputs)
    times = [time.perf_counter()]
    state = jax.block_until_ready(jax.jit(optimizer.init)(params))
    times.append(time.perf_counter())
    args = params, batch, state, jax.random.key(2)
    step = jax.jit(second_order(optimizer)["kfac step"], donate_argnums=(0, 2)).lower(*args).compile()
    times.append(time.perf_counter())
    params, state, before = jax.block_until_ready(step(*args))
    times.append(time.perf_counter())
    after = jax.jit(problem.loss)(jax.jit(problem.model_fn)(params, batch[0]), batch[1])
    yield {
        "row": "run",
        **dict(zip(("init_s", "build_s", "step_s"), differences(times), strict=True)),
        "loss_before": float(before),
        "loss_after": float(after),
        "rejected": int(state.rejected),
        "peak_mib": peak_mebibytes(),
    }


def show(name: str, rows: list[Row]) -> None:
    """A table."""
    found = {row["row"]: row for row in rows}
    print(f"\n{name}", end="")
    model = found.get("model", {})
    if "parameters" in model:
        init = "" if model["init_s"] is None else f" ({model['init_s']:.2f} s with values)"
        print(
            f": {model['parameters'] / 1e6:.3f} M parameters in {model['leaves']} arrays; state"
            f" {model['state_entries']:.2f}x their entries, {model['state_bytes']:.2f}x their bytes,"
            f" {model['state_mib']:.0f} MiB; init from shapes {model['init_shapes_s']:.2f} s{init}",
            end="",
        )
    if "peak_mib" in found.get("process", {}):
        print(f"; the builds took up to {found['process']['peak_mib']:.0f} MiB", end="")
    print()
    for key in ("uncovered", "reduced"):
        for why, names in model.get(key, {}).items():
            print(f"  {key}: {why}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    if any(program in found for program in PROGRAMS):
        print("  " + " " * 10 + "".join(f"{head:>19}" for head in HEADS.values()))
    for row in rows:
        if "error" in row:
            print(f"  {row['row']:<10}  {row['error']}")
        elif row["row"] in PROGRAMS:
            print(f"  {row['row']:<10}" + "".join(cell(row, found.get("gradient", {}), key) for key in HEADS))
        elif row["row"] == "run":
            print(
                f"  one step: loss {row['loss_before']:.4f} before, {row['loss_after']:.4f} after,"
                f" {row['rejected']} rejected; init {row['init_s']:.1f} s, build {row['build_s']:.1f} s, step"
                f" {row['step_s']:.1f} s; up to {row['peak_mib']:.0f} MiB"
            )


def cell(row: Row, unit: Row, key: str) -> str:
    value = f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key])
    ratio = f"{row[key] / unit[key]:.1f}x" if unit.get(key) else ""
    return f"{value:>12}{ratio:>7}"


def parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"wanted NAME=VALUE; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def in_child(name: str, args: argparse.Namespace) -> list[Row]:
    """The rows of one model, from a process of its own."""
    command = [sys.executable, __file__, "--child", "--model", name]
    command += [f"--{flag}" for flag in ("run", "tiny") if getattr(args, flag)]
    command += ["--options", *(f"{key}={value!r}" for key, value in args.options)]
    command += [] if args.batch is None else [f"--batch={args.batch}"]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        end = f"after {args.limit} s, the limit"
        try:
            code = subprocess.run(command, env=environment(args.threads), stdout=output, timeout=args.limit).returncode
            end = f"with exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            pass
        output.seek(0)
        rows = [json.loads(line) for line in output]
    return [*rows, {"row": "process", "error": f"it ended {end}"}] if end else rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help=f"by default all, or with --run {RUN}")
    parser.add_argument("--run", action="store_true", help="take one step with values, instead")
    parser.add_argument("--batch", type=int, help="examples; by default the model's own, with --run 2")
    parser.add_argument(
        "--options", nargs="*", type=parse_option, default=[], metavar="NAME=VALUE", help="of ggn_jax.kfac"
    )
    parser.add_argument("--tiny", action="store_true", help="the same architectures in small sizes, to try this out")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for each model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="1, or as many as there are cores")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        batch = args.batch or (2 if args.run or args.tiny else None)
        make = (TINY if args.tiny else MODELS)[args.model[0]]
        problem = make() if batch is None else make(batch=batch)
        try:
            for row in (run if args.run else measure)(problem, dict(args.options)):
                print(json.dumps(row), flush=True)
        except Exception as error:  # it is the result
            print(json.dumps({"row": "model", "error": first_line(error)}))
        return
    print(f"JAX {jax.__version__}, {args.threads} threads on {os.cpu_count()} cores; options", end=" ")
    print({**OPTIONS, **dict(args.options)})
    found = {}
    for name in args.model or (RUN if args.run else MODELS):
        found[name] = in_child(name, args)
        show(name, found[name])
    if args.json:
        write(args.json, found)


if __name__ == "__main__":
    main()
