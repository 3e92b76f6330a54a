"""Curvature of PyTorch modules: a convolutional network of digits, and a small causal transformer of Python code.

    pip install "ggn-jax[examples,torch-examples]"
    python examples/torch_curvature.py

The modules are PyTorch's own, as they are. For each, on real data,

- training: `torch_bridge.KFAC`, a `torch.optim.Optimizer`, beside AdamW from the same start and on the same batches;
- the spectrum: the largest eigenvalues of the generalized Gauss-Newton matrix (GGN), by `GGNLinearOperator(...)` and
  SciPy's Lanczos method, and those of its approximation by KFAC. A few directions have most of the curvature: about as
  many as there are classes;

and for the digits, error bars by a Laplace approximation with KFAC (`torch_bridge.from_module`, then `ggn_jax`): the
test digits are rotated, and the further they are from the training data, the less confident a classifier should be.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.ndimage import rotate
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import ggn_jax
import torch_bridge

Batch = tuple[Tensor, Tensor]
LOSS = nn.CrossEntropyLoss()
PRIOR_PRECISION = 3.0
LENGTH, WIDTH = 32, 32
COLORS = {"AdamW": "#4d9a3f", "KFAC": "#1b6ca8", "GGN": "#d95f02"}


def convolutional_net() -> nn.Module:
    """8 x 8 pixels to 10 classes."""
    first = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(256, 10))


class Transformer(nn.Module):
    """Characters to the logits of the next ones, `[N, classes, length]` as PyTorch's loss wants them."""

    def __init__(self, characters: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.block(self.embedding(tokens) + self.positions, src_mask=self.mask)
        return self.head(x).transpose(1, 2)


def digits() -> tuple[Batch, Batch]:
    """Training and test images."""
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    x = torch.tensor(images[order].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    y = torch.tensor(classes[order])
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def code() -> tuple[Tensor, int]:
    """A module of the standard library as numbers, and how many different characters it has."""
    spec = importlib.util.find_spec("argparse")
    assert spec is not None
    assert spec.origin is not None
    characters, numbers = np.unique(list(Path(spec.origin).read_text(encoding="utf-8")), return_inverse=True)
    return torch.tensor(numbers), len(characters)


def train(make: Callable[[], nn.Module], name: str, batches: Sequence[Batch]) -> tuple[nn.Module, list[float]]:
    """The trained module, and the loss of each batch before its step."""
    torch.manual_seed(0)
    module, losses = make().eval(), []  # there is no dropout
    optimizer: Any = torch.optim.AdamW(module.parameters(), lr=3e-3)
    if name == "KFAC":
        optimizer = torch_bridge.KFAC(module, LOSS, lr=0.1, damping=1e-2)
    for batch in tqdm(batches, desc=name, leave=False):
        if name == "KFAC":
            losses.append(float(optimizer.step(batch)))
            continue
        optimizer.zero_grad()
        loss = LOSS(module(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return module, losses


def spectra(module: nn.Module, batch: Batch, num: int) -> dict[str, np.ndarray]:
    """The largest eigenvalues of the GGN, and of KFAC."""
    converted = torch_bridge.ConvertedModule(module, batch[0])
    args = converted, LOSS, list(module.parameters()), [batch]
    operators = {"GGN": torch_bridge.GGNLinearOperator(*args), "KFAC": torch_bridge.KFACLinearOperator(*args)}
    return {
        name: eigsh(operator.to_scipy(np.float32), k=num, tol=1e-2, return_eigenvectors=False)[::-1]
        for name, operator in operators.items()
    }


def confidence(module: nn.Module, data: Batch, test: Tensor, angles: Sequence[int], num: int) -> dict[str, list[float]]:
    """The mean probability of the predicted class, with and without error bars, for rotated test images."""
    model_fn, params = torch_bridge.from_module(module, data[0][:2])
    loss = ggn_jax.CrossEntropyLoss(reduction="sum")  # the posterior is that of all data
    batch = torch_bridge.to_jax(data[0]), jnp.asarray(data[1].numpy())
    kfac = ggn_jax.KFACLinearOperator(model_fn, loss, params, batch, fisher_type="type-2")
    root = kfac.inverse_sqrt(PRIOR_PRECISION)

    def sample(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(params))
        return root.mv({n: jax.random.normal(k, p.shape) for k, (n, p) in zip(keys, params.items(), strict=True)})

    samples = jax.vmap(sample)(jax.random.split(jax.random.key(0), num))

    @jax.jit
    def predict(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs, jvp = jax.linearize(lambda p: model_fn(p, x), params)
        return jax.nn.softmax(outputs), jnp.mean(jax.nn.softmax(outputs + jax.vmap(jvp)(samples)), axis=0)

    found: dict[str, list[float]] = {"network": [], "Laplace approximation": []}
    for angle in angles:
        turned = rotate(test.numpy(), angle, axes=(2, 3), reshape=False, order=1)
        for name, probs in zip(found, predict(jnp.asarray(turned)), strict=True):
            found[name].append(float(jnp.mean(jnp.max(probs, axis=1))))
    return found


def plot(results: dict[str, Any], angles: Sequence[int], path: Path) -> None:
    figure = Figure(figsize=(15, 3.75 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 3, squeeze=False)
    for (name, result), axes in zip(results.items(), rows, strict=True):
        for optimizer, losses in result["losses"].items():
            axes[0].plot(losses, color=COLORS[optimizer], label=optimizer)
        axes[0].set(title=f"{name}: training", xlabel="step", ylabel="loss of the batch", yscale="log")
        for kind, values in result["spectra"].items():
            axes[1].plot(
                np.arange(1, len(values) + 1), values, color=COLORS[kind], marker="o", markersize=3, label=kind
            )
        axes[1].set(title=f"{name}: spectrum", xlabel="number of the eigenvalue", yscale="log")
    for kind, values in results["digits"]["confidence"].items():
        rows[0][2].plot(angles, values, marker="o", markersize=4, label=kind)
    rows[0][2].set(title="digits: mean confidence", xlabel="rotation of the test digits, degrees", ylim=(0, 1.03))
    for row in rows[1:]:
        row[2].axis("off")
    for ax in (*rows[0], *(ax for row in rows[1:] for ax in row[:2])):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    default = Path(__file__).parent / "output" / "torch_curvature.png"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    parser.add_argument("--eigenvalues", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="few steps and eigenvalues, of the digits alone")
    parser.add_argument("--output", type=Path, default=default, help="where the figure goes")
    args = parser.parse_args(argv)
    angles = range(0, 181, 60 if args.quick else 20)
    if args.quick:
        args.steps, args.eigenvalues = min(args.steps, 20), min(args.eigenvalues, 5)

    train_set, test_set = digits()
    text, characters = code()
    rng = np.random.default_rng(0)
    picks = [torch.tensor(rng.integers(0, 1400, 128)) for _ in range(args.steps)]
    windows = [
        text[torch.tensor(rng.integers(0, len(text) - LENGTH - 1, 16))[:, None] + torch.arange(LENGTH + 1)]
        for _ in range(args.steps)
    ]
    tasks: dict[str, tuple[Callable[[], nn.Module], list[Batch], Batch]] = {
        "digits": (convolutional_net, [(train_set[0][i], train_set[1][i]) for i in picks], train_set),
        "code": (
            lambda: Transformer(characters),
            [(w[:, :-1], w[:, 1:]) for w in windows],
            (windows[0][:, :-1], windows[0][:, 1:]),
        ),
    }
    if args.quick:
        del tasks["code"]
    results: dict[str, Any] = {}
    for name, (make, batches, data) in tasks.items():
        runs = {optimizer: train(make, optimizer, batches) for optimizer in ("AdamW", "KFAC")}
        module = runs["KFAC"][0]
        result = {"losses": {optimizer: losses for optimizer, (_, losses) in runs.items()}}
        result["spectra"] = spectra(module, data, args.eigenvalues)
        if name == "digits":
            result["confidence"] = confidence(module, data, test_set[0], angles, 20)
            with torch.no_grad():
                accuracy = (module(test_set[0]).argmax(1) == test_set[1]).float().mean()
            print(f"digits: test accuracy with KFAC {accuracy:.3f} after {args.steps} steps")
        results[name] = result
        last = {optimizer: np.mean(losses[-5:]) for optimizer, losses in result["losses"].items()}
        print(
            f"{name}: {sum(p.numel() for p in module.parameters())} parameters; mean loss of the last five batches:",
            end=" ",
        )
        print(", ".join(f"{optimizer} {loss:.3g}" for optimizer, loss in last.items()))
        for kind, values in result["spectra"].items():
            print(f"{name}: largest eigenvalues of {kind}: {', '.join(f'{value:.3g}' for value in values[:5])}")
    for kind, values in results["digits"]["confidence"].items():
        print(f"digits: confidence of the {kind}: {values[0]:.2f} upright, {min(values):.2f} at least when rotated")
    plot(results, angles, args.output)
    print(f"Figure: {args.output}")


if __name__ == "__main__":
    main()
