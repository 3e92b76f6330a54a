"""Operators over loaders beside curvlinops', solves in function space, and what layers in the open cost.

    python benchmarks/operators.py

Over loaders: the MLP 784-512-256-10 with cross-entropy, 8 uneven batches of up to 512 examples as NumPy arrays, and the
same data and network in PyTorch for curvlinops, whose checks of determinism are left out. A product is a pass over all
batches, and so is making KFAC's factors. Memory is what the process's resident memory rises by while that runs once
more, sampled; large blocks are returned to the system when they are freed (`MALLOC_MMAP_THRESHOLD_`).

In function space: a damped GGN solve by a Gram matrix of all batches' outputs, beside conjugate gradients over the
batches to the same residual, 1e-3.

Layers in the open: `layer_io` with one sample, with factors made of it, beside a gradient, and beside what `kfac` takes
(`value_and_grad_and_factors`), for the MLP and a CNN.

Each part runs in a process of its own; printed are medians of alternating rounds, and the median of their ratios. XLA's
eigendecompositions have one thread: several spin where cores are shared.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree
from record import write
from vectors import compare

import ggn_jax

SIZES = (512,) * 7 + (300,)
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20
DAMPING = 1e-2


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def rise(fn: Callable[[], object]) -> float:
    """By how many MiB resident memory rises while `fn` runs: the largest of three times."""
    found = []
    for _ in range(3):
        gc.collect()
        before, seen, done = resident(), [resident()], threading.Event()

        def sample(seen: list[float] = seen, done: threading.Event = done) -> None:
            while not done.wait(0.001):
                seen.append(resident())

        thread = threading.Thread(target=sample)
        thread.start()
        result = fn()
        seen.append(resident())
        done.set()
        thread.join()
        found.append(max(seen) - before)
        del result
    return max(found)


Rows = list[dict[str, Any]]


def loaders(rounds: int) -> Rows:
    import curvlinops
    import torch
    from kfac import mlp

    model_fn, loss, params, _, _, module = mlp()
    random = np.random.default_rng(0)
    data = [(random.normal(size=(n, 784)).astype(np.float32), random.integers(10, size=n)) for n in SIZES]
    theirs = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in data]
    weights, torch_loss = list(module.parameters()), torch.nn.CrossEntropyLoss()
    args, options = (model_fn, loss, params, data), {"check_deterministic": False}
    total = sum(SIZES)
    v, u = jax.tree.map(jnp.ones_like, params), jnp.ones((total, 10))
    tv, tu = torch.ones(sum(w.numel() for w in weights)), torch.ones(total * 10)

    def products(ours: Any, peer: Any, x: Any, tx: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return lambda: jax.block_until_ready(ours.mv(x)), lambda: peer @ tx

    both: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name in ("GGN", "EF", "Hessian"):
        ours = getattr(ggn_jax, f"{name}LinearOperator").from_batches(*args)
        peer = getattr(curvlinops, f"{name}LinearOperator")(module, torch_loss, weights, theirs, **options)
        both[f"{name} product"] = products(ours, peer, v, tv)
    jacobian = ggn_jax.JacobianLinearOperator.from_batches(model_fn, params, data)
    peer = curvlinops.JacobianLinearOperator(module, weights, theirs, **options)
    both["J v"] = products(jacobian, peer, v, tv)
    both["J^T u"] = products(jacobian.T, peer.adjoint(), u, tu)
    for name in ("KFAC", "EKFAC"):
        ours = getattr(ggn_jax, f"{name}LinearOperator")
        peer = getattr(curvlinops, f"{name}LinearOperator")
        settings = {"fisher_type": "mc", "mc_samples": 1}

        def make(ours: Any = ours, settings: Any = settings) -> Any:
            made = ours.from_batches(*args, key=jax.random.key(0), bias="separate", **settings)
            return jax.block_until_ready(jax.tree.leaves(made))

        def make_peer(peer: Any = peer, settings: Any = settings) -> Any:
            made = peer(module, torch_loss, weights, theirs, **options, **settings)
            return made @ tv  # what makes the factors

        both[f"{name} factors"] = make, make_peer
    print(f"{'over 8 batches':<18}{'ours ms':>9}{'MiB':>7}{'peer ms':>9}{'MiB':>7}{'ratio':>7}")
    rows = []
    for name, (ours, peer) in both.items():
        figures = compare(ours, peer, rounds)
        own, other = rise(ours), rise(peer)
        rows.append({"what": name, **figures, "ours_mib": own, "peer_mib": other})
        print(
            f"{name:<18}{figures['ours_ms']:>9.0f}{own:>7.0f}{figures['peer_ms']:>9.0f}{other:>7.0f}"
            f"{figures['ratio']:>7.2f}",
            flush=True,
        )
    return rows


def function_space(rounds: int) -> Rows:
    from ggn import mlp

    print(f"{'solve over batches':<28}{'N C':>6}{'P':>9}{'gram ms':>9}{'CG ms':>9}{'ratio':>7}")
    rows = []
    for sizes, batches in (((784, 256, 256, 10), (16, 16, 16, 10)), ((256, 256, 256, 1), (64, 64, 64, 40))):
        model_fn, params, inputs, targets, loss = mlp(sizes, sum(batches))
        if sizes[-1] == 1:
            loss, targets = ggn_jax.BCEWithLogitsLoss(), (targets[:, None] % 2).astype(float)
        ends = np.cumsum(batches)
        data = [(inputs[end - n : end], targets[end - n : end]) for n, end in zip(batches, ends, strict=True)]
        gradient = jax.grad(lambda p, x=inputs, y=targets, f=model_fn, loss=loss: loss(f(p, x), y))(params)
        gram = ggn_jax.GramLinearOperator.from_batches(model_fn, params, data, loss=loss)
        ggn = ggn_jax.GGNLinearOperator.from_batches(model_fn, loss, params, data).damped(DAMPING).to_scipy()
        right = np.asarray(ravel_pytree(gradient)[0])

        def by_gram(gram: Any = gram, gradient: Any = gradient) -> Any:
            return jax.block_until_ready(gram.solve_ggn(gradient, DAMPING))

        def by_cg(ggn: Any = ggn, right: Any = right) -> Any:
            return scipy.sparse.linalg.cg(ggn, right, rtol=1e-3)

        figures, name = compare(by_gram, by_cg, rounds), "-".join(map(str, sizes))
        outputs = len(inputs) * sizes[-1]
        rows.append({"model": name, "outputs": outputs, "parameters": right.size, **figures})
        print(
            f"{name:<28}{outputs:>6}{right.size:>9}{figures['ours_ms']:>9.1f}{figures['peer_ms']:>9.1f}"
            f"{figures['ratio']:>7.2f}",
            flush=True,
        )
    return rows


def layers(rounds: int) -> Rows:
    from kfac import cnn, mlp

    print(f"{'in gradients':<14}{'gradient ms':>12}{'layer_io':>10}{'factors':>9}{'kfac':>7}{'factors / kfac':>16}")
    rows = []
    for name, make in (("MLP", mlp), ("CNN", cnn)):
        model_fn, loss, params, inputs, targets, _ = make()
        found, batch, key = ggn_jax.find_layers(model_fn, params, inputs), (inputs, targets), jax.random.key(0)
        optimizer = ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=inputs, fisher_type="mc")
        state = optimizer.init(params)

        def gradient(params: Any, batch: Any, key: Any, f: Any = model_fn, loss: Any = loss) -> Any:
            return jax.value_and_grad(lambda p: loss(f(p, batch[0]), batch[1]))(params)

        def captured(params: Any, batch: Any, key: Any, found: Any = found, loss: Any = loss) -> Any:
            io = ggn_jax.layer_io(found, loss, params, batch, fisher_type="mc", key=key)
            return io.value, io.grads, [(layer.inputs, layer.output_grads) for _, layer in io.items()]

        def factors(params: Any, batch: Any, key: Any, captured: Any = captured) -> Any:
            value, grads, pairs = captured(params, batch, key)
            a = [jnp.einsum("gnsi,gnsj->gij", a, a) for a, _ in pairs]
            return value, grads, a, [jnp.einsum("vgnso,vgnsp->gop", g, g) for _, g in pairs]

        def one_pass(params: Any, batch: Any, key: Any, optimizer: Any = optimizer, state: Any = state) -> Any:
            return optimizer.value_and_grad_and_factors(params, batch, state, key=key)

        compiled = [jax.jit(fn) for fn in (gradient, captured, factors, one_pass)]
        run = [lambda fn=fn, args=(params, batch, key): jax.block_until_ready(fn(*args)) for fn in compiled]
        beside = [compare(run[0], fn, rounds) for fn in run[1:]]
        ratios = "".join(f"{figures['ratio']:>{width}.2f}" for figures, width in zip(beside, (10, 9, 7), strict=True))
        own = compare(run[3], run[2], rounds)["ratio"]
        in_gradients = dict(zip(("layer_io", "factors", "kfac"), (x["ratio"] for x in beside), strict=True))
        rows.append({"model": name, "in_gradients": in_gradients, "factors over kfac": own})
        print(f"{name:<14}{beside[0]['ours_ms']:>12.1f}{ratios}{own:>16.2f}", flush=True)
    return rows


PARTS = {"loaders": loaders, "function space": function_space, "layers": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.part:
        rows = PARTS[args.part](args.rounds)
        if args.json:
            write(args.json, rows)
        return
    print(f"JAX on {jax.devices()[0].device_kind}, float32")
    own = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536", "OPENBLAS_NUM_THREADS": "1"}
    env = own | dict(os.environ)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        for name in PARTS:
            command = [sys.executable, __file__, f"--rounds={args.rounds}", f"--part={name}", f"--json={path}"]
            subprocess.run(command, env=env, check=True)
            found[name] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    if args.json:
        write(args.json, found)


if __name__ == "__main__":
    main()
