"""Batched gradient output vectors: this package against eager PyTorch.

The peer is what one writes in PyTorch: a per-datum function under `torch.func.vmap`. Each size is timed in one process,
the two sides in turn; printed are medians and their ratio.

    python benchmarks/vectors.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from record import write

import ggn_jax

SIZES = [(128, 10, 1), (512, 1000, 1), (16, 65, 64), (8, 1000, 32)]


def torch_vectors(output: torch.Tensor, mc_samples: int) -> torch.Tensor:
    """The vectors of one datum `[C]` or `[C, D]` for plain mean-reduced cross-entropy; `mc_samples=0` for type-2."""
    classes, positions = output.shape[0], output[0].numel()
    p = output.reshape(classes, positions).softmax(0)
    if mc_samples:
        labels = torch.multinomial(p.T, mc_samples, replacement=True)  # [D, M]
        onehot = torch.nn.functional.one_hot(labels, classes).to(p.dtype)  # [D, M, C]
        vectors = (p.T[:, None] - onehot).movedim(0, -1)  # [M, C, D]
        return (vectors / (mc_samples * positions) ** 0.5).reshape(mc_samples, *output.shape)
    sqrt_p = p.sqrt().T  # [D, C]
    blocks = torch.diag_embed(sqrt_p) - p.T[:, :, None] * sqrt_p[:, None, :]  # [D, C, C], rows first
    if positions == 1:
        return blocks[0].T.reshape(classes, *output.shape)
    columns = torch.einsum("dij,de->jdie", blocks, torch.eye(positions)) / positions**0.5
    return columns.reshape(classes * positions, *output.shape)


def torch_products(output: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`H v` of one datum, in closed form."""
    p = output.softmax(0)
    pv = p * v
    return (pv - p * pv.sum(0, keepdim=True)) / (output[0].numel())


def timed(fn: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    return (time.perf_counter() - start) / repeats


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Medians of alternating rounds, each long enough to be timed."""
    for fn in (ours, theirs):
        fn()
    repeats = [max(1, min(200, int(0.05 / timed(fn, 1)))) for fn in (ours, theirs)]
    pairs = [(timed(ours, repeats[0]), timed(theirs, repeats[1])) for _ in range(rounds)]
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "peer_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} torch threads, JAX on {jax.devices()[0].device_kind}, float32")
    print(f"{'batch, classes, positions':<28}{'vectors':<14}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}")
    rows = []
    for batch, classes, positions in SIZES:
        shape = (batch, classes) if positions == 1 else (batch, classes, positions)
        rng = np.random.default_rng(0)
        f = rng.normal(size=shape).astype(np.float32)
        y = rng.integers(classes, size=(batch, *shape[2:]))
        jf, jy, tf = jnp.asarray(f), jnp.asarray(y), torch.from_numpy(f)
        loss = ggn_jax.CrossEntropyLoss()
        reduced = batch**0.5  # the batch's mean, which vmap over data does not see
        for name in ("mc-1", "mc-10", "type-2"):
            if name != "type-2":
                samples = int(name[3:])
                fn = jax.jit(ggn_jax.make_batch_grad_output_fn(loss, "mc", samples))
                key = jax.random.key(0)
                ours = lambda fn=fn, key=key: fn(jf, jy, key).block_until_ready()  # noqa: E731
            elif batch * classes**2 * positions**2 < 2**31:
                samples = 0
                fn = jax.jit(ggn_jax.make_batch_grad_output_fn(loss, "type-2"))
                ours = lambda fn=fn: fn(jf, jy).block_until_ready()  # noqa: E731
            else:
                name = "H v"
                product = jax.jit(lambda f, y, v: ggn_jax.LossHessian(loss, f, y).mv(v))
                ours = lambda: product(jf, jy, jf).block_until_ready()  # noqa: E731
            if name == "H v":
                theirs = lambda: torch.func.vmap(torch_products)(tf, tf) / batch  # noqa: E731
            else:
                per_datum = torch.func.vmap(torch_vectors, in_dims=(0, None), out_dims=1, randomness="different")
                theirs = lambda per_datum=per_datum, samples=samples: per_datum(tf, samples) / reduced  # noqa: E731
            figures = compare(ours, theirs, args.rounds)
            size = f"({batch}, {classes}, {positions})"
            rows.append({"size": size, "vectors": name, **figures})
            print(f"{size:<28}{name:<14}{figures['ours_ms']:>10.3f}{figures['peer_ms']:>10.3f}{figures['ratio']:>8.2f}")
    for kind in ("mc", "type-2"):
        ratio = statistics.median(row["ratio"] for row in rows if row["vectors"].startswith(kind))
        print(f"median ratio, {kind}: {ratio:.2f}")
    if args.json:
        write(args.json, rows)


if __name__ == "__main__":
    main()
