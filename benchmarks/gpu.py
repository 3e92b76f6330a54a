"""What is of interest on a GPU: small calls of the facade, build times, factors, a step, and what TF32 does to results.

Each part runs in a process of its own, on the first CUDA device, in JAX's and PyTorch's default float32 (TF32 products
in both); printed are medians of rounds, milliseconds unless said otherwise. The peers are eager PyTorch, for the
vectors, and curvlinops, for KFAC's factors.

    python benchmarks/gpu.py                       # all parts
    python benchmarks/gpu.py facade factors:mlp    # some
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kfac
import numpy as np
import optax
import torch
from record import write
from vectors import torch_vectors

import ggn_jax
import torch_bridge

KEY = jax.random.key(0)


def cnn() -> tuple:
    """Eight convolutions, of 64 to 512 channels, and a head, on 512 images of 32 x 32 x 3."""
    channels, strides, classes = (3, 64, 64, 128, 128, 256, 256, 512, 512), (1, 1, 2, 1, 2, 1, 2, 1), 100
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
    inputs, targets = jax.random.normal(next(keys), (512, 32, 32, 3)), jax.random.randint(KEY, (512,), 0, classes)
    return model_fn, ggn_jax.CrossEntropyLoss(), params, inputs, targets, module


MODELS: dict[str, Callable[[], tuple]] = {
    "mlp": partial(kfac.mlp, (3072, 4096, 4096, 4096, 1000), 4096),
    "cnn": cnn,
    "transformer": partial(kfac.transformer, 512, 8, 256, 8192, 32),
}


def median_ms(fn: Callable[[], object], wait: Callable[[object], object], rounds: int = 9) -> float:
    """Of calls whose device work is awaited at the end of a round."""
    wait(fn())
    start = time.perf_counter()
    wait(fn())
    repeats = max(1, min(100, int(0.05 / (time.perf_counter() - start))))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            result = fn()
        wait(result)
        times.append(1e3 * (time.perf_counter() - start) / repeats)
    return statistics.median(times)


def torch_wait(_: object) -> None:
    torch.cuda.synchronize()


def built(fn: Callable, *args: Any) -> tuple[Any, float]:
    """The compiled function, and the seconds from nothing to it."""
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled, time.perf_counter() - start


def part_facade() -> dict[str, Any]:
    """One call of the vectors' functions, beside PyTorch's own."""
    loss, found = torch.nn.CrossEntropyLoss(reduction="sum"), {}
    for kind, num, rows, classes in (("mc", 1, 32, 10), ("mc", 1, 256, 1000), ("type-2", 1, 256, 1000)):
        outputs, targets = torch.randn(rows, classes, device="cuda"), torch.randint(classes, (rows,), device="cuda")
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
        found[f"{kind} {rows} x {classes}"] = {side: median_ms(fn, torch_wait) for side, fn in sides.items()}
    return found


def part_memory() -> dict[str, Any]:
    """GiB that the card lacks after the first call."""
    torch.zeros(1, device="cuda")
    before = torch.cuda.mem_get_info()[0]
    outputs, targets = torch.randn(256, 1000, device="cuda"), torch.randint(1000, (256,), device="cuda")
    torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), "mc")(outputs, targets)
    torch.cuda.synchronize()
    return {"GiB of the first call": (before - torch.cuda.mem_get_info()[0]) / 2**30}


def part_inverse(width: str = "1024") -> dict[str, Any]:
    """Seconds to build, and ms, of a layer's damped inverse, beside the gradient's."""
    size = int(width)
    params = kfac.dense(KEY, size, size)
    batch = jax.random.normal(KEY, (256, size)), jax.random.normal(jax.random.key(1), (256, size))
    loss = ggn_jax.MSELoss()

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: loss(kfac.apply(p, batch[0]), batch[1]))(params)

    def inverse(params: Any, batch: Any, method: str) -> Any:
        operator = ggn_jax.KFACLinearOperator(kfac.apply, loss, params, batch, fisher_type="empirical")
        return operator.inverse(1e-2, method).mv(params)

    found = {}
    programs = {"gradient": gradient, **{m: partial(inverse, method=m) for m in ("heuristic", "exact")}}
    for name, fn in programs.items():
        compiled, seconds = built(fn, params, batch)
        call = partial(compiled, params, batch)
        found[name] = {"build s": seconds, "ms": median_ms(call, jax.block_until_ready)}
    return found


def part_factors(name: str) -> dict[str, Any]:
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
    found: dict[str, Any] = {}
    for kind, fn in {**programs, "step": step}.items():
        compiled, seconds = built(fn, params, batch)
        ms = median_ms(partial(compiled, params, batch), jax.block_until_ready)
        found[kind] = {"build s": seconds, "ms": ms, "gradients": ms / found["gradient"]["ms"] if found else 1.0}
    for kind, samples in (("mc-1", 1), ("mc-10", 10)):
        peer = _peer(module, inputs, targets, samples)
        if peer is not None:
            ms = median_ms(peer, torch_wait)
            found[kind] |= {"curvlinops ms": ms, "ours/theirs": found[kind]["ms"] / ms}
    return found


def _peer(module: torch.nn.Module, inputs: jax.Array, targets: jax.Array, samples: int) -> Callable[[], Any]:
    import curvlinops

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    module = module.cuda()
    images = inputs.ndim == 4
    x = torch.from_numpy(np.array(inputs.transpose(0, 3, 1, 2) if images else inputs)).cuda()
    x = x if x.is_floating_point() else x.long()
    data = [(x, torch.from_numpy(np.array(targets)).long().cuda())]
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


def part_precision() -> dict[str, Any]:
    """Relative errors against float64 on the CPU, with JAX's default precision of products and with the highest."""
    sizes = (64, 256, 256, 10)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 5)
        params = [kfac.dense(k, i, o) for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=False)]
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        batch = (
            jax.random.normal(keys[3], (512, 64), jnp.float64),
            jax.random.randint(keys[4], (512,), 0, 10, jnp.int32),
        )
        with jax.default_device(jax.devices("cpu")[0]):
            want = _quantities(*jax.device_put((params, batch), jax.devices("cpu")[0]))
            want = jax.tree.map(np.asarray, want)
    params, batch = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x), jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32),
        (params, batch),
    )

    def errors(got: dict[str, Any]) -> dict[str, float]:
        found = {}
        for name, value in got.items():
            pairs = zip(jax.tree.leaves(value), jax.tree.leaves(want[name]), strict=True)
            sums = [(np.sum((np.asarray(a) - b) ** 2), np.sum(np.square(b))) for a, b in pairs]
            found[name] = float((sum(s[0] for s in sums) / sum(s[1] for s in sums)) ** 0.5)
        return found

    result: dict[str, Any] = {}
    for precision in ("default", "highest"):
        with jax.default_matmul_precision(precision):
            for name, error in errors(_quantities(params, batch)).items():
                result.setdefault(name, {})[precision] = error
    return result


def _quantities(params: Any, batch: Any) -> dict[str, Any]:
    """What the precision of products may matter for."""
    loss = ggn_jax.CrossEntropyLoss()

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        for p in params[:-1]:
            x = jnp.tanh(kfac.apply(p, x))
        return kfac.apply(params[-1], x)

    @jax.jit
    def all_of(params: Any, batch: Any) -> dict[str, Any]:
        gradient = jax.grad(lambda p: loss(model_fn(p, batch[0]), batch[1]))(params)
        args = model_fn, loss, params, batch
        kron = ggn_jax.KFACLinearOperator(*args, fisher_type="type-2")
        ekfac = ggn_jax.EKFACLinearOperator(*args, fisher_type="type-2")
        found = {
            "gradient": gradient,
            "GGN product": ggn_jax.GGNLinearOperator(*args).mv(gradient),
            "KFAC product": kron.mv(gradient),
            "EKFAC product": ekfac.mv(gradient),
        }
        for damping in (1e-1, 1e-3, 1e-5):
            found |= {
                f"KFAC inverse, exact, {damping:g}": kron.inverse(damping, "exact").mv(gradient),
                f"KFAC inverse, heuristic, {damping:g}": kron.inverse(damping, "heuristic").mv(gradient),
                f"EKFAC inverse, {damping:g}": ekfac.inverse(damping).mv(gradient),
                f"KFAC logdet, {damping:g}": kron.logdet(damping),
            }
        return found

    found = all_of(params, batch)
    optimizer = ggn_jax.kfac(
        model_fn, loss, 0.05, damping=1e-2, momentum=0.9, example_inputs=batch[0], fisher_type="type-2"
    )

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state)
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(60):
        params, state, value = step(params, state)
    return {**found, "loss after 60 steps": value, "parameters after 60 steps": params}


INVERSES, FACTORS = [f"inverse:{width}" for width in (512, 1024, 2048)], [f"factors:{model}" for model in MODELS]
PARTS = ["facade", "memory", *INVERSES, *FACTORS, "precision"]


def show(part: str, found: dict[str, Any]) -> None:
    print(f"\n{part}")
    for name, value in found.items():
        cells = value if isinstance(value, dict) else {"": value}
        print(f"  {name:<32}" + "  ".join(f"{head} {cell:.3g}".strip() for head, cell in cells.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them, if none is named")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    if args.inside:
        name, _, argument = args.parts[0].partition(":")
        print(json.dumps(globals()[f"part_{name}"](*([argument] if argument else []))))
        return
    if not any(d.platform == "gpu" for d in jax.devices()):
        parser.error("needs a CUDA device that JAX and PyTorch can use")
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, PyTorch {torch.__version__}")
    results = {}
    for part in args.parts or PARTS:
        done = subprocess.run([sys.executable, __file__, part, "--inside"], capture_output=True, text=True)
        if done.returncode:
            print(f"\n{part} failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        results[part] = json.loads(done.stdout.splitlines()[-1])
        show(part, results[part])
    if args.json:
        write(args.json, results)


if __name__ == "__main__":
    main()
