"""`torch_bridge` against eager PyTorch, per call, in one thread each, for cross-entropy in float32 on the CPU.

The peer is what one writes in PyTorch: a per-datum function under `torch.func.vmap` (see `vectors.py`). Each size is
timed in one process, all sides in turn; printed are medians. `vmapped` is `torch.func.vmap` over
`make_grad_output_fn`, `batched` is `make_batch_grad_output_fn`; the ratio is the peer's time over ours, `overhead` the
vmapped time less the batched one. Then the time to the first result for a shape never seen, in a process that has done
the same for another shape, without and with JAX's persistent compilation cache.

    python benchmarks/bridge.py
"""

import os

THREADS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {THREADS}"

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import write
from vectors import timed, torch_vectors

import torch_bridge

KINDS = {"mc-1": ("mc", 1), "mc-10": ("mc", 10), "type-2": ("type-2", 1)}


def vmapped(fisher_type: str, num: int) -> Callable[..., torch.Tensor]:
    fn = torch_bridge.make_grad_output_fn(torch.nn.CrossEntropyLoss(), fisher_type, num)
    return torch.func.vmap(fn, in_dims=(0, 0, None), out_dims=1, randomness="different")


def batched(fisher_type: str, num: int) -> Callable[..., torch.Tensor]:
    # The peer does not know the batch: to compute the same, sum-reduce.
    return torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(reduction="sum"), fisher_type, num)


def first_results() -> None:
    """Print the seconds to the first result of each kind, for a shape that is new to this process."""
    for size in (31, 32):  # the first is only there to have everything imported and started
        outputs, targets = torch.randn(size, 10), torch.randint(10, (size,))
        seconds = {}
        for name, (fisher_type, num) in KINDS.items():
            for make in (vmapped, batched):
                start = time.perf_counter()
                make(fisher_type, num)(outputs, targets, None)
                seconds[f"{name} {make.__name__}"] = time.perf_counter() - start
    print(json.dumps(seconds))


def in_new_process(cache: str | None) -> dict[str, float]:
    environment = dict(os.environ)
    if cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    command = [sys.executable, __file__, "--first-results"]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--first-results", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.first_results:
        first_results()
        return

    rows = []
    print(f"{'N, C':<12}{'vectors':<9}{'torch us':>10}{'vmapped us':>12}{'batched us':>12}", end="")
    print(f"{'overhead us':>13}{'vmapped':>9}{'batched':>9}")
    for classes in (10, 1000):
        for size in (32, 256):
            outputs, targets = torch.randn(size, classes), torch.randint(classes, (size,))
            for name, (fisher_type, num) in KINDS.items():
                samples = 0 if fisher_type == "type-2" else num
                peer = torch.func.vmap(torch_vectors, in_dims=(0, None), out_dims=1, randomness="different")
                mapped, batch = vmapped(fisher_type, num), batched(fisher_type, num)
                sides = {
                    "torch": lambda peer=peer, samples=samples: peer(outputs, samples),
                    "vmapped": lambda mapped=mapped: mapped(outputs, targets, None),
                    "batched": lambda batch=batch: batch(outputs, targets),
                }
                for side in sides.values():
                    side()
                repeats = {key: max(1, min(200, int(0.05 / timed(side, 2)))) for key, side in sides.items()}
                rounds = [{key: timed(side, repeats[key]) for key, side in sides.items()} for _ in range(args.rounds)]
                us = {key: 1e6 * statistics.median(r[key] for r in rounds) for key in sides}
                ratios = {key: statistics.median(r["torch"] / r[key] for r in rounds) for key in ("vmapped", "batched")}
                overhead = 1e6 * statistics.median(r["vmapped"] - r["batched"] for r in rounds)
                rows.append({"N": size, "C": classes, "vectors": name, "us": us, "ratio": ratios, "overhead": overhead})
                print(f"{f'{size}, {classes}':<12}{name:<9}{us['torch']:>10.0f}{us['vmapped']:>12.0f}", end="")
                print(f"{us['batched']:>12.0f}{overhead:>13.0f}{ratios['vmapped']:>8.2f}x{ratios['batched']:>8.2f}x")

    print("\nms to the first result of a new shape (N = 32, C = 10): without, and with a filled, compilation cache")
    without = in_new_process(None)
    with tempfile.TemporaryDirectory() as cache:
        in_new_process(cache)
        with_cache = in_new_process(cache)
    for key in without:
        print(f"{key:<20}{1e3 * without[key]:>8.0f}{1e3 * with_cache[key]:>8.0f}")
    if args.json:
        figures = {"calls": rows, "first": {"without": without, "with": with_cache}}
        write(args.json, figures)


if __name__ == "__main__":
    main()
