"""See what each curvature approximation keeps: the matrices of a small network of digits, as images.

    pip install "ggn-jax[examples]"
    python examples/which_fisher.py

The table has, for each matrix `C`, its distance from the GGN `G` in Frobenius norm, `|C - G| / |G|`, and how near the
damped step `(C + damping I)^-1 gradient` is to the GGN's: the cosine of the two. The figure shows the matrices on a
logarithmic scale, with the parameters in the order of `ravel_pytree`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import ggn_jax

DAMPING = 1e-3
LOSS = ggn_jax.CrossEntropyLoss()


def model_fn(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["1"]["w"] + params["1"]["b"])
    return hidden @ params["2"]["w"] + params["2"]["b"]


def load_data(examples: int) -> tuple[jax.Array, jax.Array]:
    """Digits of 4 x 4 pixels: means of the 8 x 8."""
    images, classes = load_digits(return_X_y=True)
    small = images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)[:examples]
    return jnp.asarray((small - small.mean()) / small.std(), jnp.float32), jnp.asarray(classes[:examples])


def train(params: Any, batch: Any, steps: int) -> Any:
    """A few steps: at the very beginning all approximations are alike, at the end the GGN vanishes."""
    optimizer = optax.adam(1e-2)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda params: LOSS(model_fn(params, batch[0]), batch[1]))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((params, optimizer.init(params)))
    return params


def matrices(params: Any, batch: Any, key: jax.Array) -> dict[str, np.ndarray]:
    """Each approximation as a dense matrix."""
    args, exact = (model_fn, LOSS, params, batch), {"fisher_type": "type-2"}
    made: dict[str, Callable[[], Any]] = {
        "GGN": lambda: ggn_jax.GGNLinearOperator(*args),
        "Hessian": lambda: ggn_jax.HessianLinearOperator(*args),
        "Fisher, 1 draw": lambda: ggn_jax.GGNLinearOperator(*args, mc_samples=1, key=key),
        "empirical Fisher": lambda: ggn_jax.EFLinearOperator(*args),
        "KFAC": lambda: ggn_jax.KFACLinearOperator(*args, **exact),
        "KFAC, 1 draw": lambda: ggn_jax.KFACLinearOperator(*args, key=key),
        "EKFAC": lambda: ggn_jax.EKFACLinearOperator(*args, **exact),
        "KFOC": lambda: ggn_jax.KFOCLinearOperator(*args, **exact),
        "diagonal": lambda: ggn_jax.GGNDiagonalLinearOperator(*args),
    }
    return {
        name: np.asarray(jax.jit(lambda make=make: make().as_matrix())(), np.float64) for name, make in made.items()
    }


def plot(found: dict[str, np.ndarray], path: Path) -> None:
    top = np.log10(np.abs(found["GGN"]).max())
    figure = Figure(figsize=(9, 9.4), layout="constrained")
    axes = figure.subplots(3, 3)
    for ax, (name, matrix) in zip(axes.flat, found.items(), strict=True):
        with np.errstate(divide="ignore"):
            image = ax.imshow(np.log10(np.abs(matrix)), vmin=top - 4, vmax=top, cmap="magma", interpolation="nearest")
        ax.set(title=name, xticks=[], yticks=[])
        ax.set_facecolor("black")
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, label="log10 of the entries' absolute value")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the draws (default: 0)")
    parser.add_argument("--examples", type=int, default=500, help="digits (default: 500)")
    parser.add_argument("--steps", type=int, default=50, help="of Adam before the look (default: 50)")
    parser.add_argument("--quick", action="store_true", help="with 50 digits")
    output = Path(__file__).parent / "output" / "which_fisher.png"
    parser.add_argument("--output", type=Path, default=output, help="where the figure goes")
    args = parser.parse_args(argv)

    keys = jax.random.split(jax.random.key(args.seed), 3)
    layer = lambda key, n, m: {"w": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)}  # noqa: E731
    params = {"1": layer(keys[0], 16, 8), "2": layer(keys[1], 8, 10)}
    batch = load_data(50 if args.quick else args.examples)
    params = train(params, batch, args.steps)
    found = matrices(params, batch, keys[2])
    value, grads = jax.value_and_grad(lambda params: LOSS(model_fn(params, batch[0]), batch[1]))(params)
    gradient = np.asarray(ravel_pytree(grads)[0], np.float64)
    steps = {name: np.linalg.solve(C + DAMPING * np.eye(len(C)), gradient) for name, C in found.items()}

    print(f"{len(gradient)} parameters, {len(batch[1])} digits, loss {value:.3f}; damping {DAMPING:g}\n")
    print(f"{'matrix':<18}{'distance from the GGN':>22}{'cosine of the steps':>21}")
    exact, step = found["GGN"], steps["GGN"]
    for name, matrix in found.items():
        distance = np.linalg.norm(matrix - exact) / np.linalg.norm(exact)
        cosine = steps[name] @ step / np.linalg.norm(steps[name]) / np.linalg.norm(step)
        print(f"{name:<18}{distance:>22.2f}{cosine:>21.2f}")
    cosine = gradient @ step / np.linalg.norm(gradient) / np.linalg.norm(step)
    print(f"{'identity':<18}{'':>22}{cosine:>21.2f}")
    plot(found, args.output)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
