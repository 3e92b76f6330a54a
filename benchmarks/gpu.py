"""What is of interest on a GPU: tests, memory, small calls, precision, build times, factors and a step.

Each part runs in a process of its own, on the first CUDA device, in JAX's and PyTorch's default float32 (TF32 products
in both), for as long as it may; printed are medians of rounds, milliseconds unless said otherwise. The peers are eager
PyTorch, for the vectors, and curvlinops, where it is installed, for KFAC's factors. After each part all figures so far
are written to a folder, and a part that is stopped keeps those that it has.

    python benchmarks/gpu.py                           # all parts, in less than eight minutes
    python benchmarks/gpu.py facade factors:mlp        # some
    python benchmarks/gpu.py --quick --seconds 2000    # without a GPU: whether all of this works
    python benchmarks/gpu.py precision                 # without a GPU: with TensorFloat-32 emulated
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import contextlib
import importlib.util
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu_precision
import jax
import jax.numpy as jnp
import kfac
import numpy as np
import optax
import torch
from vectors import torch_vectors

import ggn_jax
import torch_bridge

QUICK, ON_GPU = "--quick" in sys.argv, torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROOT = Path(__file__).resolve().parents[1]
Rows = Iterator[tuple[str, dict[str, Any]]]

# (part, row, figure): what is wanted at most.
WANTED: dict[tuple[str, str, str], float] = {
    ("memory", "the first call", "GiB"): 1,
    ("facade", "mc 32 x 10", "batch"): 0.3,
    ("facade", "mc 32 x 10", "vmapped"): 0.4,
    ("facade", "mc 256 x 1000", "batch"): 0.3,
    ("facade", "mc 256 x 1000", "vmapped"): 0.4,
    ("facade", "type-2 256 x 1000", "vmapped/batch"): 2,
    **{(f"inverse:{width}", "heuristic", "gradient's builds"): 3 for width in (512, 1024, 2048)},
    **{(f"factors:{name}", "step", "gradient's builds"): 3 for name in ("mlp", "cnn", "transformer")},
    **{(f"factors:{name}", "mc-1", "ours/theirs"): 0.6 for name in ("mlp", "cnn", "transformer")},
    ("factors:mlp", "mc-1", "gradients"): 1.5,
    ("factors:mlp", "mc-10", "gradients"): 5,
    ("factors:cnn", "mc-1", "gradients"): 2.0,
    ("factors:transformer", "mc-1", "gradients"): 1.7,
}

KEY = jax.random.key(0)


def cnn(
    channels: tuple[int, ...] = (3, 64, 64, 128, 128, 256, 256, 512, 512), side: int = 32, images: int = 512
) -> tuple:
    """Eight convolutions, of 64 to 512 channels, and a head, on 512 images of 32 x 32 x 3."""
    strides, classes = (1, 1, 2, 1, 2, 1, 2, 1)[: len(channels) - 1], 100
    keys = iter(jax.random.split(KEY, 11))
    params = [
        {"kernel": jax.random.normal(next(keys), (3, 3, i, o)) * (2 / (9 * i)) ** 0.5, "bias": jnp.zeros(o)}
        for i, o in itertools.pairwise(channels)
    ]
    params.append(kfac.dense(next(keys), channels[-1], classes))

    def model_fn(params: list, x: jax.Array) -> jax.Array:
        for p, stride in zip(params[:-1], strides, strict=True):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, p["kernel"], (stride,) * 2, "SAME", dimension_numbers=numbers)
            x = jax.nn.relu(x + p["bias"])
        return kfac.apply(params[-1], x.mean((1, 2)))

    nn = torch.nn
    layers: list[torch.nn.Module] = []
    for i, o, stride in zip(channels[:-1], channels[1:], strides, strict=True):
        layers += [nn.Conv2d(i, o, 3, stride, 1), nn.ReLU()]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))
    inputs, targets = (
        jax.random.normal(next(keys), (images, side, side, 3)),
        jax.random.randint(KEY, (images,), 0, classes),
    )
    return model_fn, ggn_jax.CrossEntropyLoss(), params, inputs, targets, module


MODELS: dict[str, Callable[[], tuple]] = {
    "mlp": partial(kfac.mlp, (3072, 4096, 4096, 4096, 1000), 4096),
    "cnn": cnn,
    "transformer": partial(kfac.transformer, 512, 8, 256, 8192, 32),
}
if QUICK:
    MODELS |= {
        "mlp": partial(kfac.mlp, (6, 5, 4), 8),
        "cnn": partial(cnn, (3, 2, 4), 6, 4),
        "transformer": partial(kfac.transformer, 8, 2, 6, 10, 2),
    }


def median_ms(fn: Callable[[], object], wait: Callable[[object], object], rounds: int = 3 if QUICK else 9) -> float:
    """Of calls whose device work is awaited at the end of a round."""
    wait(fn())
    start = time.perf_counter()
    wait(fn())
    repeats = max(1, min(100, int((0.001 if QUICK else 0.05) / (time.perf_counter() - start))))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            result = fn()
        wait(result)
        times.append(1e3 * (time.perf_counter() - start) / repeats)
    return statistics.median(times)


def torch_wait(_: object) -> None:
    if ON_GPU:
        torch.cuda.synchronize()  # JAX's streams as well: it waits for the device


def built(fn: Callable, *args: Any) -> tuple[Any, float]:
    """The compiled function, and the seconds from nothing to it."""
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled, time.perf_counter() - start


def part_facade() -> Rows:
    """One call of the vectors' functions, beside PyTorch's own."""
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    for kind, num, rows, classes in (("mc", 1, 32, 10), ("mc", 1, 256, 1000), ("type-2", 1, 256, 1000)):
        size = (4, 3) if QUICK else (rows, classes)
        outputs, targets = torch.randn(size, device=DEVICE), torch.randint(size[1], size[:1], device=DEVICE)
        one = torch_bridge.make_grad_output_fn(loss, kind, num)
        batched = torch_bridge.make_batch_grad_output_fn(loss, kind, num)
        vmapped = torch.func.vmap(one, in_dims=(0, 0, None), out_dims=1, randomness="different")
        peer = torch.func.vmap(torch_vectors, in_dims=(0, None), out_dims=1, randomness="different")
        samples = num if kind == "mc" else 0
        sides = {
            "batch": lambda f=batched, o=outputs, t=targets: f(o, t),
            "vmapped": lambda f=vmapped, o=outputs, t=targets: f(o, t, None),
            "PyTorch": lambda f=peer, o=outputs, n=samples: f(o, n),
        }
        found = {side: median_ms(fn, torch_wait) for side, fn in sides.items()}
        yield f"{kind} {rows} x {classes}", {**found, "vmapped/batch": found["vmapped"] / found["batch"]}


def part_memory() -> Rows:
    """GiB that the card lacks after the first call."""
    if not ON_GPU:
        yield "the first call", {"error": "needs a GPU"}
        return
    torch.zeros(1, device="cuda")
    before = torch.cuda.mem_get_info()[0]
    outputs, targets = torch.randn(256, 1000, device="cuda"), torch.randint(1000, (256,), device="cuda")
    torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), "mc")(outputs, targets)
    torch.cuda.synchronize()
    yield "the first call", {"GiB": (before - torch.cuda.mem_get_info()[0]) / 2**30}


def part_inverse(width: str) -> Rows:
    """Seconds to build, and ms, of a layer's damped inverse, beside the gradient's."""
    size = 8 if QUICK else int(width)
    params = kfac.dense(KEY, size, size)
    batch = jax.random.normal(KEY, (256, size)), jax.random.normal(jax.random.key(1), (256, size))
    loss = ggn_jax.MSELoss()

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: loss(kfac.apply(p, batch[0]), batch[1]))(params)

    def inverse(params: Any, batch: Any, method: str) -> Any:
        operator = ggn_jax.KFACLinearOperator(kfac.apply, loss, params, batch, fisher_type="empirical")
        return operator.inverse(1e-2, method).mv(params)

    yield from timed_programs(
        {"gradient": gradient, **{m: partial(inverse, method=m) for m in ("heuristic", "exact")}}, params, batch
    )


def timed_programs(programs: dict[str, Callable[..., Any]], *args: Any) -> Rows:
    """Seconds to build, and ms, and both as multiples of the first program's."""
    first = {}
    for name, fn in programs.items():
        compiled, seconds = built(fn, *args)
        ms = median_ms(partial(compiled, *args), jax.block_until_ready)
        first = first or {"build s": seconds, "ms": ms}
        multiples = {"gradients": ms / first["ms"], "gradient's builds": seconds / first["build s"]}
        yield name, {"build s": seconds, "ms": ms, **multiples}


def part_factors(name: str) -> Rows:
    """KFAC's factors and a step of the optimizer, in gradients and beside curvlinops."""
    model_fn, loss, params, inputs, targets, module = MODELS[name]()
    batch = inputs, targets

    def gradient(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: loss(model_fn(p, batch[0]), batch[1]))(params)

    def factors(params: Any, batch: Any, samples: int) -> Any:
        options = {"fisher_type": "mc", "mc_samples": samples, "key": KEY}
        return ggn_jax.KFACLinearOperator(model_fn, loss, params, batch, **options)

    optimizer = ggn_jax.kfac(model_fn, loss, 0.01, damping=0.1, example_inputs=inputs)
    state = optimizer.init(params)

    def step(params: Any, batch: Any) -> Any:
        _, grads, found = optimizer.value_and_grad_and_factors(params, batch, state, key=KEY)
        updates, new = optimizer.update(grads, state, params, factors=found)
        return optax.apply_updates(params, updates), new

    programs = {"gradient": gradient, "mc-1": partial(factors, samples=1), "mc-10": partial(factors, samples=10)}
    for kind, figures in timed_programs({**programs, "step": step}, params, batch):
        samples = {"mc-1": 1, "mc-10": 10}.get(kind)
        if samples and importlib.util.find_spec("curvlinops"):
            ms = median_ms(_peer(module, inputs, targets, samples), torch_wait)
            figures |= {"curvlinops ms": ms, "ours/theirs": figures["ms"] / ms}
        yield kind, figures


def _peer(module: torch.nn.Module, inputs: jax.Array, targets: jax.Array, samples: int) -> Callable[[], Any]:
    import curvlinops

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    module = module.to(DEVICE)
    images = inputs.ndim == 4
    x = torch.from_numpy(np.array(inputs.transpose(0, 3, 1, 2) if images else inputs)).to(DEVICE)
    x = x if x.is_floating_point() else x.long()
    data = [(x, torch.from_numpy(np.array(targets)).long().to(DEVICE))]
    covered = (torch.nn.Linear, torch.nn.Conv2d)
    weights = [p for m in module.modules() if isinstance(m, covered) for p in m.parameters()]
    operator = curvlinops.KFACLinearOperator(
        module,
        torch.nn.CrossEntropyLoss(),
        weights,
        data,
        fisher_type="mc",
        mc_samples=samples,
        separate_weight_and_bias=False,
        check_deterministic=False,
        num_data=len(x),
        num_per_example_loss_terms=targets[0].size,
    )
    return operator.compute_kronecker_factors


def part_precision() -> Rows:
    """Relative errors against float64, by quantity."""
    yield from gpu_precision.rows(QUICK)


TESTS = ("test_cuda_memory", "test_gpu", "test_cuda_programs")


def part_tests() -> Rows:
    """The tests of what GPUs need, file by file; each test's outcome is in the log."""
    for name in TESTS:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-n", "0", "-v", "--junitxml", str(report), f"tests/{name}.py"]
            done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, stderr=subprocess.STDOUT, check=False)
            if not report.exists():
                yield name, {"error": f"pytest ended with {done.returncode}: see the log"}
                continue
            suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        yield name, {what: float(suite.get(what, "nan")) for what in ("tests", "failures", "errors", "skipped", "time")}


INVERSES, FACTORS = [f"inverse:{width}" for width in (512, 1024, 2048)], [f"factors:{model}" for model in MODELS]
# In the order in which they are run: what is cut off is at the end. Seconds that each may take.
PARTS = {
    "tests": 170,
    "memory": 20,
    "facade": 40,
    "precision": 110,
    **dict.fromkeys(INVERSES, 30),
    **dict.fromkeys(FACTORS, 80),
}


def run_part(part: str, seconds: float, log: Path, *options: str) -> dict[str, Any]:
    """A part in a process of its own, with all of its children; rows that were printed in time are kept."""
    command = [sys.executable, __file__, part, "--inside", *options]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed, log.open("a", encoding="utf-8") as errors:
        errors.write(f"\n--- {part}\n")
        errors.flush()
        done = subprocess.Popen(command, stdout=printed, stderr=errors, start_new_session=True)
        try:
            code = done.wait(max(seconds, 1))
            status = "done" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # there are none left
                os.killpg(done.pid, signal.SIGKILL)
            done.wait()
        printed.seek(0)
        lines = [line for line in printed if line.startswith("{") and line.endswith("}\n")]
    rows = {row: figures for line in lines for row, figures in json.loads(line).items()}
    return {"status": status, "seconds": time.perf_counter() - start, "rows": rows}


def show(part: str, found: dict[str, Any]) -> str:
    lines = [f"\n{part}: {found['status']}, {found['seconds']:.0f} s"]
    for row, figures in found["rows"].items():
        cells = []
        for name, value in figures.items():
            limit = WANTED.get((part, row, name))
            wanted = "" if QUICK or limit is None or isinstance(value, str) else f" (wanted: at most {limit})"
            cells.append(f"{name} {value if isinstance(value, str) else format(value, '.3g')}{wanted}")
        many = len(cells) > 5
        lines += [f"  {row}", *(f"      {cell}" for cell in cells)] if many else [f"  {row:<34}  {'; '.join(cells)}"]
    return "\n".join(lines)


def write(out: Path, results: dict[str, Any], text: str) -> None:
    """All so far, the old file in place until the new one is whole."""
    for name, content in (("results.json", json.dumps(results, indent=1)), ("results.txt", text)):
        (out / f".{name}").write_text(content, encoding="utf-8")
        (out / f".{name}").replace(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them, if none is named")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="a folder for figures and logs ($OUT)")
    parser.add_argument("--seconds", type=float, default=450, help="stop by then (default: 450)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, also without a GPU: whether all parts work")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    if args.inside:
        name, _, argument = args.parts[0].partition(":")
        for row, figures in globals()[f"part_{name}"](*([argument] if argument else [])):
            print(json.dumps({row: figures}), flush=True)
        return
    if not (QUICK or ON_GPU or args.parts == ["precision"]):
        parser.error("needs a CUDA device that PyTorch can use; without one there are precision, and --quick")
    start, out = time.monotonic(), args.out or Path(tempfile.mkdtemp(prefix="ggn-jax-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    text = f"{torch.cuda.get_device_name() if ON_GPU else 'CPU'}, JAX {jax.__version__}, PyTorch {torch.__version__}"
    print(f"{text}; figures and logs: {out}", flush=True)
    results: dict[str, Any] = {"machine": text}
    for part in args.parts or PARTS:
        left = args.seconds - (time.monotonic() - start)
        if left < 5:
            results[part] = {"status": "not started: no time was left", "seconds": 0.0, "rows": {}}
        else:
            options = ["--quick"] if QUICK else []
            results[part] = run_part(part, min(left, PARTS[part] * (1 if ON_GPU else 5)), out / "log.txt", *options)
        shown = show(part, results[part])
        print(shown, flush=True)
        text += "\n" + shown
        write(out, results, text)


if __name__ == "__main__":
    main()
