"""A step of `ggn_jax.kfac` and its parts, as multiples of a gradient step.

The MLP, the CNN and the transformer of `kfac.py`, in float32 on the CPU; medians of alternating rounds in one process.
The unit is a gradient step: `jax.value_and_grad` and an SGD update in one compiled function. FLOPs are XLA's own count
of the compiled programs; `trace + compile` is the time from nothing to a compiled program, beside that of
`jax.value_and_grad`; the state's size is in entries, as a multiple of the parameters.

kfac-jax is not measured: the first step of its release 0.0.8 raises with JAX 0.10 ("too many values to unpack", where
it rebinds primitives).

    python benchmarks/optimizer.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from kfac import build_seconds, cnn, mlp, timed, transformer
from record import write

import ggn_jax

MODELS: dict[str, Callable[[], tuple]] = {"mlp": mlp, "cnn": cnn, "transformer": transformer}
INTERVAL = 10
KEY = jax.random.key(0)


def flops(compiled: Any) -> float:
    """XLA's count; loops count once."""
    analysis = compiled.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def measure(name: str, rounds: int) -> dict[str, Any]:
    """All figures of a model."""
    model_fn, loss, params, inputs, targets = MODELS[name]()[:5]
    batch = inputs, targets  # always an argument: XLA would compute with constants beforehand

    def objective(params: Any, batch: Any) -> jax.Array:
        return loss(model_fn(params, batch[0]), batch[1])

    def kfac(**options: Any) -> Any:
        return ggn_jax.kfac(model_fn, loss, 0.01, damping=0.1, example_inputs=inputs, **options)

    plain, rarely, always = kfac(inverse_interval=INTERVAL), kfac(inverse_interval=10**6), kfac(inverse_interval=1)
    seldom = kfac(inverse_interval=INTERVAL, factor_interval=5)
    exact = kfac(inverse_interval=1, damping_method="exact")

    def first_order(optimizer: Any) -> tuple[Callable, tuple]:
        def step(params: Any, state: Any, batch: Any) -> Any:
            value, grads = jax.value_and_grad(objective)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return step, (params, optimizer.init(params), batch)

    def started(optimizer: Any) -> Any:
        """Its state after the first steps, which renew inverses more often."""
        step, now, state = jax.jit(partial(step_of, optimizer)), params, optimizer.init(params)
        for _ in range(INTERVAL + 1):
            now, state = step(now, state, batch)
        return state

    def whole(optimizer: Any) -> tuple[Callable, tuple]:
        return partial(step_of, optimizer), (params, started(optimizer), batch)

    def one_pass(params: Any, state: Any, batch: Any) -> Any:
        return plain.value_and_grad_and_factors(params, batch, state, key=KEY)

    def two_passes(params: Any, state: Any, batch: Any) -> Any:
        return jax.value_and_grad(objective)(params, batch), plain.factors(params, batch, state, key=KEY)

    def updated(optimizer: Any) -> tuple[Callable, tuple]:
        _, grads, factors = jax.jit(one_pass)(params, plain.init(params), batch)

        def update(grads: Any, state: Any, params: Any, factors: Any) -> Any:
            return optimizer.update(grads, state, params, factors=factors)

        return update, (grads, started(optimizer), params, factors)

    state = plain.init(params)
    functions = {
        "gradient step": first_order(optax.sgd(0.01)),
        "AdamW step": first_order(optax.adamw(0.01)),
        "gradient and factors, one pass": (one_pass, (params, state, batch)),
        "gradient and factors, two passes": (two_passes, (params, state, batch)),
        "preconditioning": updated(rarely),
        "update with new inverses": updated(always),
        "update with new eigenbases": updated(exact),
        "KFAC step": whole(plain),
        "KFAC step, factors every 5": whole(seldom),
    }
    compiled = {what: jax.jit(fn).lower(*args).compile() for what, (fn, args) in functions.items()}

    def run(what: str, args: tuple) -> None:
        """Once; of whole steps as many, one after the other, as there are between inverses."""
        for _ in range(INTERVAL if what.startswith("KFAC") else 1):
            results = compiled[what](*args)
            if what.startswith("KFAC"):
                args = *results, batch
        jax.block_until_ready(results)

    times: dict[str, list[float]] = {what: [] for what in functions}
    for _ in range(rounds):
        for what, (_, args) in functions.items():
            run(what, args)  # memory that others have used costs a first call
            times[what].append(timed(partial(run, what, args), 1 if what.startswith("KFAC") else 3))
    ms = {what: 1e3 * statistics.median(values) for what, values in times.items()}
    ms |= {what: value / INTERVAL for what, value in ms.items() if what.startswith("KFAC")}
    builds = {
        "gradient": build_seconds(jax.value_and_grad(objective), (params, batch), 3),
        "KFAC step": build_seconds(partial(step_of, plain), (params, state, batch), 3),
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "ms": ms,
        "flops": {what: flops(compiled[what]) for what in list(functions)[:4]},
        "build_seconds": builds,
        "state": sum(leaf.size for leaf in jax.tree.leaves(state)) / size,
    }


def step_of(optimizer: Any, params: Any, state: Any, batch: Any) -> Any:
    """One step."""
    _, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=KEY)
    updates, state = optimizer.update(grads, state, params, factors=factors)
    return optax.apply_updates(params, updates), state


def show(name: str, figures: dict[str, Any]) -> None:
    """A table."""
    unit = figures["ms"]["gradient step"]
    print(f"\n{name}: state {figures['state']:.1f} entries per parameter", end="; trace + compile: ")
    built = figures["build_seconds"]
    print(f"{built['KFAC step']:.2f} s, {built['KFAC step'] / built['gradient']:.1f}x the gradient's")
    for what, ms in figures["ms"].items():
        extra = ""
        if what in figures["flops"]:
            extra = f"{figures['flops'][what] / figures['flops']['gradient step']:.2f} gradient steps' FLOPs"
        print(f"  {what:<36}{ms:>9.2f} ms{ms / unit:>8.2f}x  {extra}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of measurement, in alternation")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--json", type=Path, help="where all figures go")
    args = parser.parse_args()
    start, found = time.perf_counter(), {}
    for name in args.models:
        found[name] = measure(name, args.rounds)
        show(name, found[name])
    print(f"\n{time.perf_counter() - start:.0f} s; JAX {jax.__version__}")
    if args.json:
        write(args.json, found)


if __name__ == "__main__":
    main()
