"""KFAC's factors, inverse and product, as multiples of one gradient, beside curvlinops.

Three models with cross-entropy, in float32 on the CPU: an MLP, a CNN and a small transformer. Each model is timed in a
process of its own: all kinds of factors, and one gradient, in JAX and in PyTorch, in turn; printed are medians of the
rounds and the median ratio of a round to curvlinops' same factors. Both sides use the same number of threads, and
PyTorch's threads sleep while they wait (`OMP_WAIT_POLICY`), as spinning ones would take the cores from JAX.
curvlinops covers linear layers and 2d convolutions: in the transformer it leaves out the embeddings and the
normalisation, of which this package computes the blocks as well.

Memory is XLA's account of the compiled programs, temporaries and outputs. `trace + compile` is the time from nothing to
a compiled program, beside that of the gradient.

    python benchmarks/kfac.py
"""

import itertools
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from child import environment
from record import write

import ggn_jax

KINDS: dict[str, dict[str, Any]] = {
    "mc-1": {"fisher_type": "mc", "mc_samples": 1},
    "mc-10": {"fisher_type": "mc", "mc_samples": 10},
    "type-2": {"fisher_type": "type-2"},
    "empirical": {"fisher_type": "empirical"},
}
CLASSES = 10


def dense(key: jax.Array, inputs: int, out: int) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(key, (inputs, out)) / inputs**0.5, "bias": jnp.zeros(out)}


def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def mlp(sizes: tuple[int, ...] = (784, 512, 256, CLASSES), batch: int = 512) -> tuple:
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    params = [dense(k, i, o) for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def model_fn(params: list, x: jax.Array) -> jax.Array:
        for p in params[:-1]:
            x = jax.nn.relu(apply(p, x))
        return apply(params[-1], x)

    inputs = jax.random.normal(jax.random.key(1), (batch, sizes[0]))
    targets = jax.random.randint(jax.random.key(2), (batch,), 0, sizes[-1])
    layers: list[torch.nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    return model_fn, ggn_jax.CrossEntropyLoss(), params, inputs, targets, torch.nn.Sequential(*layers[:-1])


def cnn() -> tuple:
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "conv1": {"kernel": jax.random.normal(keys[0], (3, 3, 1, 32)) / 3, "bias": jnp.zeros(32)},
        "conv2": {"kernel": jax.random.normal(keys[1], (3, 3, 32, 64)) / 17, "bias": jnp.zeros(64)},
        "dense": dense(keys[2], 7 * 7 * 64, 128),
        "head": dense(keys[3], 128, CLASSES),
    }

    def block(p: dict, x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.reduce_window(
            jax.nn.relu(x + p["bias"]), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )

    def model_fn(params: dict, x: jax.Array) -> jax.Array:
        x = block(params["conv2"], block(params["conv1"], x))
        return apply(params["head"], jax.nn.relu(apply(params["dense"], x.reshape(x.shape[0], -1))))

    inputs = jax.random.normal(keys[4], (128, 28, 28, 1))
    targets = jax.random.randint(keys[5], (128,), 0, CLASSES)
    nn = torch.nn
    module = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(7 * 7 * 64, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )
    return model_fn, ggn_jax.CrossEntropyLoss(), params, inputs, targets, module


class TorchBlock(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TorchTransformer(torch.nn.Module):
    def __init__(self, width: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(length, width)
        self.blocks = torch.nn.Sequential(TorchBlock(width, heads), TorchBlock(width, heads))
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x) + self.places.weight
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)  # classes first, as the loss wants them


def transformer(width: int = 128, heads: int = 4, length: int = 64, vocabulary: int = 65, batch: int = 16) -> tuple:
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def norm_params() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def block_params() -> dict[str, Any]:
        return {
            "norm1": norm_params(),
            "qkv": dense(next(keys), width, 3 * width),
            "out": dense(next(keys), width, width),
            "norm2": norm_params(),
            "up": dense(next(keys), width, 4 * width),
            "down": dense(next(keys), 4 * width, width),
        }

    params = {
        "tokens": jax.random.normal(next(keys), (vocabulary, width)),
        "places": jax.random.normal(next(keys), (length, width)),
        "block1": block_params(),
        "block2": block_params(),
        "norm": norm_params(),
        "head": dense(next(keys), width, vocabulary),
    }

    def norm(p: dict, x: jax.Array) -> jax.Array:
        mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]

    def block(p: dict, x: jax.Array) -> jax.Array:
        n, t, _ = x.shape
        q, k, v = jnp.moveaxis(apply(p["qkv"], norm(p["norm1"], x)).reshape(n, t, 3, heads, -1), 2, 0)
        x = x + apply(p["out"], jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(n, t, width))
        return x + apply(p["down"], jax.nn.gelu(apply(p["up"], norm(p["norm2"], x))))

    def model_fn(params: dict, x: jax.Array) -> jax.Array:
        x = params["tokens"][x] + params["places"]
        x = block(params["block2"], block(params["block1"], x))
        return apply(params["head"], norm(params["norm"], x))

    inputs = jax.random.randint(next(keys), (batch, length), 0, vocabulary)
    targets = jax.random.randint(next(keys), (batch, length), 0, vocabulary)
    module = TorchTransformer(width, heads, length, vocabulary)
    return model_fn, ggn_jax.CrossEntropyLoss(class_axis=-1), params, inputs, targets, module


MODELS = {
    "MLP 784-512-256-10, batch 512": mlp,
    "CNN 28x28x1, conv 32, 64, dense 128, batch 128": cnn,
    "transformer, 2 layers, width 128, length 64, batch 16": transformer,
}


def timed(fn: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    for _ in range(repeats):
        fn()
    return (clock() - start) / repeats


def build_seconds(fn: Callable, args: tuple, rounds: int) -> float:
    """From nothing to a compiled program."""
    seconds = []
    for _ in range(rounds):
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(fn).lower(*args).compile()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def mebibytes(compiled: Any) -> float:
    memory = compiled.memory_analysis()
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def measure(name: str, rounds: int, builds: int) -> dict[str, Any]:
    """All figures of one model."""
    import curvlinops

    model_fn, loss, params, inputs, targets, module = MODELS[name]()
    key, batch = jax.random.key(3), (inputs, targets)

    def gradient(params, batch, key):
        return jax.grad(lambda params: loss(model_fn(params, batch[0]), batch[1]))(params)

    def factors(params, batch, key, options):
        return ggn_jax.KFACLinearOperator(model_fn, loss, params, batch, key=key, **options)

    programs: dict[str, Callable] = {"gradient": gradient}
    for kind, options in KINDS.items():
        drawn = options["fisher_type"] == "mc" or (options["fisher_type"] == "type-2" and targets.ndim > 1)
        programs[kind] = lambda p, b, k, options=options, drawn=drawn: factors(p, b, k if drawn else None, options)
    args = (params, batch, key)
    compiled = {kind: jax.jit(fn).lower(*args).compile() for kind, fn in programs.items()}
    memory = {kind: mebibytes(c) for kind, c in compiled.items()}
    sides = {kind: lambda c=c: jax.block_until_ready(c(*args)) for kind, c in compiled.items()}
    kfac = sides["mc-1"]()
    inverses = {
        method: jax.jit(lambda kfac, method=method: kfac.inverse(1e-3, method)) for method in ("exact", "heuristic")
    }
    inverse, product = inverses["exact"](kfac), jax.jit(lambda op, v: op.mv(v))
    for method, fn in inverses.items():
        sides[f"{method} inverse"] = lambda fn=fn: jax.block_until_ready(fn(kfac))
    sides["mv"] = lambda: jax.block_until_ready(product(kfac, params))
    sides["inverse mv"] = lambda: jax.block_until_ready(product(inverse, params))

    images = inputs.ndim == 4
    x = torch.from_numpy(np.array(inputs.transpose(0, 3, 1, 2) if images else inputs))
    x = x if x.is_floating_point() else x.long()
    data = [(x, torch.from_numpy(np.array(targets)).long())]
    covered = (torch.nn.Linear, torch.nn.Conv2d)
    weights = [p for m in module.modules() if isinstance(m, covered) for p in m.parameters()]
    torch_loss = torch.nn.CrossEntropyLoss()

    def torch_gradient() -> None:
        torch.autograd.grad(torch_loss(module(data[0][0]), data[0][1]), list(module.parameters()))

    def torch_operator(options: dict[str, Any]) -> Any:
        return curvlinops.KFACLinearOperator(
            module,
            torch_loss,
            weights,
            data,
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=len(x),
            num_per_example_loss_terms=targets[0].size,
            **options,
        )

    sides["curvlinops gradient"] = torch_gradient
    for kind, options in KINDS.items():
        sides[f"curvlinops {kind}"] = lambda options=options: torch_operator(options).compute_kronecker_factors()
    peer = torch_operator(KINDS["mc-1"])
    peer.compute_kronecker_factors()
    vector = [torch.randn_like(p) for p in weights]
    for method in ("exact", "heuristic"):
        heuristic = method == "heuristic"
        options = {"damping": 1e-3, "use_heuristic_damping": heuristic, "use_exact_damping": not heuristic}

        def torch_inverse(options=options):
            inverse = curvlinops.KFACInverseLinearOperator(peer, **options)
            return inverse, inverse @ vector  # it is factorised when it is first used

        sides[f"curvlinops {method} inverse"] = torch_inverse
    torch_inverted, _ = sides["curvlinops exact inverse"]()
    sides["curvlinops mv"] = lambda: peer @ vector
    sides["curvlinops inverse mv"] = lambda: torch_inverted @ vector

    repeats = {}
    for side, fn in sides.items():
        fn()
        repeats[side] = max(1, min(50, int(0.05 / timed(fn, 1))))
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, fn in sides.items():
            times[side].append(1e3 * timed(fn, repeats[side]))
    ms = {side: statistics.median(values) for side, values in times.items()}
    ratio = {
        side: statistics.median(a / b for a, b in zip(times[side], times[f"curvlinops {side}"], strict=True))
        for side in sides
        if not side.startswith("curvlinops")
    }
    in_gradients = {
        side: statistics.median(a / b for a, b in zip(times[side], times["gradient"], strict=True)) for side in ratio
    }
    build = {kind: build_seconds(fn, args, builds) for kind, fn in programs.items()}
    return {
        "model": name,
        "ms": ms,
        "in_gradients": in_gradients,
        "ratio": ratio,
        "mib": memory,
        "build_s": build,
    }


def show(figures: dict[str, Any]) -> None:
    print(f"\n{figures['model']}")
    heads = ("", "ms", "gradients", "curvlinops ms", "ours/theirs", "MiB", "gradients", "build s", "gradients")
    print(f"{heads[0]:<20}" + "".join(f"{head:>{max(11, len(head) + 2)}}" for head in heads[1:]))
    for side, ratio in figures["ratio"].items():
        cells = [
            f"{figures['ms'][side]:.2f}",
            f"{figures['in_gradients'][side]:.2f}",
            f"{figures['ms'][f'curvlinops {side}']:.2f}",
            f"{ratio:.2f}x",
        ]
        if side in figures["mib"]:
            mib, build = figures["mib"], figures["build_s"]
            cells += [f"{mib[side]:.1f}", f"{mib[side] / mib['gradient']:.2f}"]
            cells += [f"{build[side]:.2f}", f"{build[side] / build['gradient']:.2f}"]
        print(f"{side:<20}" + "".join(f"{c:>{max(11, len(h) + 2)}}" for c, h in zip(cells, heads[1:], strict=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--builds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--model", choices=list(MODELS), help="only this one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")  # curvlinops' own, about its next version
        torch.manual_seed(0)
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.model, args.rounds, args.builds)))
        return
    print(f"{args.threads} threads, float32, JAX {jax.__version__}, torch {torch.__version__}")
    rows = []
    for name in [args.model] if args.model else MODELS:
        command = [sys.executable, __file__, "--child", "--model", name]
        command += [f"--{k}={getattr(args, k)}" for k in ("rounds", "builds", "threads")]
        output = subprocess.run(
            command, env=environment(args.threads), check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        show(rows[-1])
    if args.json:
        write(args.json, rows)


if __name__ == "__main__":
    main()
