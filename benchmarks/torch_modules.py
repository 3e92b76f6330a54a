"""`torch_bridge`'s operators of PyTorch modules beside curvlinops, in float32 on the CPU.

The modules of `kfac.py` (an MLP, a CNN and a small transformer), with cross-entropy. Each is timed in a process of its
own: Monte-Carlo factors with one sample, and a product with the exact GGN, on both sides in turn, from tensors to
tensors; printed are medians of the rounds, and the median ratio of a round. Both sides use the same number of threads,
and PyTorch's sleep while they wait, as spinning ones would take the cores from JAX. curvlinops' factors are those of
linear layers and 2d convolutions: in the transformer it leaves out embeddings and normalisation, which are in ours.

The build is what comes before, once for a module: `export` converts it (`ConvertedModule`), and what the first factors
and the first product take longer than others is tracing and compiling. `pays after` is the number of operators after
which the whole was faster than curvlinops.

    python benchmarks/torch_modules.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import curvlinops
import jax
import numpy as np
import torch
from child import environment
from kfac import MODELS, timed
from record import write
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_bridge

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def setting(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The module, and a batch in PyTorch's layout."""
    *_, inputs, targets, module = MODELS[name]()
    x = torch.from_numpy(np.array(inputs.transpose(0, 3, 1, 2) if inputs.ndim == 4 else inputs))
    return module, (x if x.is_floating_point() else x.long(), torch.from_numpy(np.array(targets)).long())


def first(fn: Callable[[], Any], clock: Callable[[], float]) -> tuple[Any, float]:
    start = clock()
    return fn(), clock() - start


def measure(name: str, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """All figures of one model."""
    module, batch = setting(name)
    loss, params = torch.nn.CrossEntropyLoss(), list(module.parameters())
    covered = (torch.nn.Linear, torch.nn.Conv2d)
    weights = [p for m in module.modules() if isinstance(m, covered) for p in m.parameters()]
    vector = [torch.randn_like(p) for p in params]
    converted, export = first(lambda: torch_bridge.ConvertedModule(module, batch[0]), clock)

    def factors() -> Any:
        return torch_bridge.KFACLinearOperator(
            converted, loss, params, [batch], mc_samples=1, separate_weight_and_bias=False
        )

    _, first_factors = first(factors, clock)
    ggn = torch_bridge.GGNLinearOperator(converted, loss, params, [batch])
    _, first_product = first(lambda: ggn @ vector, clock)

    def peer(kind: Any, of: list[torch.nn.Parameter], **options: Any) -> Any:
        return kind(module, loss, of, [batch], check_deterministic=False, num_data=len(batch[0]), **options)

    def peer_factors() -> None:
        options = {"fisher_type": "mc", "mc_samples": 1, "separate_weight_and_bias": False}
        terms = batch[1][0].numel()
        peer(
            curvlinops.KFACLinearOperator, weights, num_per_example_loss_terms=terms, **options
        ).compute_kronecker_factors()

    peer_ggn = peer(curvlinops.GGNLinearOperator, params)

    def peer_product() -> Any:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward mode
            return peer_ggn @ vector

    sides: dict[str, Callable[[], Any]] = {
        "factors": factors,
        "curvlinops factors": peer_factors,
        "product": lambda: ggn @ vector,
        "curvlinops product": peer_product,
    }
    for fn in sides.values():
        fn()
    repeats = {side: max(1, min(50, int(0.1 / timed(fn, 1, clock)))) for side, fn in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, fn in sides.items():
            times[side].append(timed(fn, repeats[side], clock))
    seconds = {side: statistics.median(values) for side, values in times.items()}
    ratio = {
        side: statistics.median(b / a for a, b in zip(times[side], times[f"curvlinops {side}"], strict=True))
        for side in ("factors", "product")
    }
    build = {"export": export, "factors": first_factors - seconds["factors"]}
    build["product"] = first_product - seconds["product"]
    return {"model": name, "seconds": seconds, "ratio": ratio, "build": build}


def show(figures: dict[str, Any]) -> None:
    print(f"\n{figures['model']}: export {figures['build']['export']:.2f} s")
    print(f"{'':<10}{'ms':>10}{'curvlinops ms':>16}{'theirs/ours':>14}{'trace + compile s':>20}{'pays after':>12}")
    for side, ratio in figures["ratio"].items():
        ours, theirs = figures["seconds"][side], figures["seconds"][f"curvlinops {side}"]
        build = figures["build"]["export"] + figures["build"][side]
        after = str(math.ceil(build / (theirs - ours))) if theirs > ours else "never"
        cells = f"{1e3 * ours:>10.1f}{1e3 * theirs:>16.1f}{ratio:>13.2f}x{figures['build'][side]:>20.2f}"
        print(f"{side:<10}{cells}{after:>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: of all threads, on busy machines")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--model", choices=list(MODELS), help="only this one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")  # curvlinops' own, about its next version
        torch.manual_seed(0)
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.model, args.rounds, CLOCKS[args.clock])))
        return
    print(f"{args.threads} threads, {args.clock} time, float32, JAX {jax.__version__}, torch {torch.__version__}")
    rows = []
    for name in [args.model] if args.model else MODELS:
        command = [sys.executable, __file__, "--child", "--model", name]
        command += [f"--{k}={getattr(args, k)}" for k in ("rounds", "threads", "clock")]
        output = subprocess.run(
            command, env=environment(args.threads), check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        show(rows[-1])
    if args.json:
        write(args.json, rows)


if __name__ == "__main__":
    main()
