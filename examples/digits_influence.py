"""Find the training digits that made a classifier err, by influence functions with KFAC and EKFAC.

    pip install "ggn-jax[examples]"
    python examples/digits_influence.py

How would the loss of a test digit change if a training digit `i` were left out? To first order in its weight (Koh &
Liang 2017, arXiv 1703.04730), with curvature instead of the Hessian (Grosse et al. 2023, arXiv 2308.03296), by

    g_test^T (C + prior_precision I)^-1 g_i          C: the GGN of all training digits, KFAC or EKFAC

and the *self-influence* `g_i^T (C + prior_precision I)^-1 g_i` is large for digits that only their own label explains:
a part of the training labels is wrong on purpose, and most of these come first. It shows what the operators have:

- `reduction="sum"`: the curvature is that of the sum over the data, to which the prior's precision is added.
- `inverse_sqrt(prior_precision)`: one product for each gradient, and all influences are inner products of the results.
- `EKFACLinearOperator`: the eigenbases of KFAC with the true second moments in them.

The oracle is training again without the digit. It is exact for a linear model, whose minimum is unique: the table has
the correlation of the predicted with the true change of the test loss, for the most influential training digits.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ggn_jax

Params = Any
Batch = tuple[jax.Array, jax.Array]

LOSS = ggn_jax.CrossEntropyLoss(reduction="sum")
PRIOR_PRECISION = 0.3  # the weight decay in training, and the damping
WRONG = 0.05  # of the training labels
NEWTON_STEPS = 8


class MLP(nnx.Module):
    """64 pixels, 32 hidden units, 10 classes."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.first(x)))


@jax.tree_util.Partial  # a pytree, as the network's function is
def linear_model(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def load_data(seed: int) -> tuple[Batch, Batch, np.ndarray]:
    """Training digits, test digits, and which of the training labels are wrong."""
    images, classes = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images / 16, classes, test_size=500, random_state=seed, stratify=classes)
    rng = np.random.default_rng(seed)
    wrong = np.zeros(len(y), bool)
    wrong[rng.choice(len(y), int(WRONG * len(y)), replace=False)] = True
    y = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    train_set, test_set = ((jnp.asarray(a), jnp.asarray(b)) for a, b in ((x, y), (x_test, y_test)))
    return train_set, test_set, wrong


@partial(jax.jit, static_argnames="steps")
def train(model_fn: Callable, params: Params, batch: Batch, *, steps: int) -> Params:
    """Adam with a decaying learning rate, on the whole training set."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def objective(params: Params) -> jax.Array:
        prior = PRIOR_PRECISION / 2 * optax.tree.norm(params, squared=True)
        return (LOSS(model_fn(params, batch[0]), batch[1]) + prior) / batch[1].size

    def step(state: Any, _: None) -> tuple[Any, None]:
        params, moments = state
        update, moments = optimizer.update(jax.grad(objective)(params), moments)
        return (optax.apply_updates(params, update), moments), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


@jax.jit
def gradients(model_fn: Callable, params: Params, batch: Batch) -> Params:
    """The gradient of each example's loss, along a new first axis."""

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return LOSS(model_fn(params, x[None]), y[None])

    return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, *batch)


def flat(trees: Params) -> jax.Array:
    """Pytrees along a first axis as the rows of a matrix."""
    return jax.vmap(lambda tree: ravel_pytree(tree)[0])(trees)


@jax.jit
def whitened(curvature: Any, gradients: Params) -> jax.Array:
    """`(C + prior_precision I)^(-1/2) g` for each gradient, flattened: influences are their inner products."""
    root = curvature.inverse_sqrt(PRIOR_PRECISION)
    rows = jax.vmap(root.mv)(gradients)
    return flat(rows)


def curvatures(model_fn: Callable, params: Params, batch: Batch) -> dict[str, Any]:
    """What is put in the place of the Hessian, from rough to fine."""
    args, exact = (model_fn, LOSS, params, batch), {"fisher_type": "type-2"}
    return {
        "diagonal": ggn_jax.GGNDiagonalLinearOperator(*args),
        "KFAC": ggn_jax.KFACLinearOperator(*args, **exact),
        "EKFAC": ggn_jax.EKFACLinearOperator(*args, **exact),
    }


@jax.jit
def fit_linear(params: Params, batch: Batch, weights: jax.Array) -> Params:
    """Newton's method for the linear model, with a weight for each example: its minimum, to rounding."""
    flat, unravel = ravel_pytree(params)

    def objective(flat: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(linear_model(unravel(flat), batch[0]), batch[1])
        return jnp.sum(weights * losses) + PRIOR_PRECISION / 2 * jnp.sum(flat**2)

    def step(flat: jax.Array, _: None) -> tuple[jax.Array, None]:
        return flat - jnp.linalg.solve(jax.hessian(objective)(flat), jax.grad(objective)(flat)), None

    return unravel(jax.lax.scan(step, flat, length=NEWTON_STEPS)[0])


def check_by_retraining(train_set: Batch, test_set: Batch, num: int) -> dict[str, float]:
    """The correlation of predicted and true changes of the test loss, for training digits that are left out."""
    everything = jnp.ones(len(train_set[1]))
    params = fit_linear({"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}, train_set, everything)
    grads, test_grads = gradients(linear_model, params, train_set), gradients(linear_model, params, test_set)
    mean_grad = jax.tree.map(lambda g: jnp.mean(g, axis=0, keepdims=True), test_grads)

    ggn = ggn_jax.GGNLinearOperator(linear_model, LOSS, params, train_set)
    dense = ggn.as_matrix() + PRIOR_PRECISION * jnp.eye(650)  # the Hessian: the model is linear
    predicted = {"exact": flat(grads) @ jnp.linalg.solve(dense, flat(mean_grad)[0])}
    for name, curvature in curvatures(linear_model, params, train_set).items():
        predicted[name] = whitened(curvature, grads) @ whitened(curvature, mean_grad)[0]

    left_out = jnp.argsort(-jnp.abs(predicted["exact"]))[:num]
    test_loss = jax.jit(lambda params: LOSS(linear_model(params, test_set[0]), test_set[1]) / len(test_set[1]))
    before = test_loss(params)
    true = np.array([test_loss(fit_linear(params, train_set, everything.at[i].set(0.0))) - before for i in left_out])
    return {name: float(np.corrcoef(true, np.asarray(values)[left_out])[0, 1]) for name, values in predicted.items()}


def plot(train_set: Batch, test_set: Batch, wrong: np.ndarray, tested: Any, influences: np.ndarray, path: Path) -> None:
    """Test digits with the training digits that helped and harmed them most."""
    count = 4
    figure = Figure(figsize=(12, 1.7 * len(tested) + 0.8), layout="constrained")
    grid = figure.subplots(len(tested), 2 * count + 1, squeeze=False)
    for row, (test, values) in enumerate(zip(tested, influences, strict=True)):
        order = np.argsort(values)
        shown = [("test", test, test_set, "#000000")]
        shown += [("harmful", i, train_set, "#d95f02") for i in order[:count]]
        shown += [("helpful", i, train_set, "#1b6ca8") for i in order[::-1][:count]]
        for axes, (kind, i, (images, labels), color) in zip(grid[row], shown, strict=True):
            axes.imshow(np.asarray(images[i]).reshape(8, 8), cmap="gray_r")
            note = " (wrong)" if kind != "test" and wrong[i] else ""
            axes.set_title(f"{kind}: {labels[i]}{note}", fontsize=9, color=color)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color(color)
                spine.set_linewidth(1.5)
    figure.suptitle("Misclassified test digits, and the training digits that influenced their loss most (EKFAC)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    default = Path(__file__).parent / "output" / "digits_influence.png"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the wrong labels and the initial parameters")
    parser.add_argument("--steps", type=int, default=2000, help="steps of Adam")
    parser.add_argument("--retrain", type=int, default=60, help="how often the linear model is trained again")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--output", type=Path, default=default, help="where the figure goes")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.retrain = min(args.steps, 300), min(args.retrain, 10)

    train_set, test_set, wrong = load_data(args.seed)
    model_fn, params = ggn_jax.from_nnx(MLP(nnx.Rngs(args.seed)))
    params = train(model_fn, params, train_set, steps=args.steps)
    outputs = model_fn(params, test_set[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, test_set[1])
    errors = np.asarray(outputs.argmax(axis=1) != test_set[1])
    tested = np.argsort(np.where(errors, -losses, np.inf))[: min(4, errors.sum())]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size} parameters, {len(wrong)} training digits of which {wrong.sum()} have a wrong label,")
    print(f"{args.steps} steps of Adam; test accuracy {1 - errors.mean():.3f}.\n")

    grads = gradients(model_fn, params, train_set)
    test_grads = gradients(model_fn, params, (test_set[0][tested], test_set[1][tested]))
    rows = {"gradient norm": flat(grads)}
    for name, curvature in curvatures(model_fn, params, train_set).items():
        rows[name] = whitened(curvature, grads)
    influences = np.asarray(whitened(curvature, test_grads) @ rows["EKFAC"].T)  # the last one
    first = {name: np.argsort(-np.asarray(jnp.sum(x**2, axis=1)))[: wrong.sum()] for name, x in rows.items()}
    found = {name: float(np.mean(wrong[most])) for name, most in first.items()}
    correlations = check_by_retraining(train_set, test_set, args.retrain)

    print(
        f"{'ranked by':<16}{'wrong labels among the first ' + str(wrong.sum()):>34}{'correlation with retraining':>30}"
    )
    for name in ("gradient norm", "diagonal", "KFAC", "EKFAC", "exact"):
        share = f"{found[name]:.0%}" if name in found else ""
        correlation = f"{correlations[name]:.3f}" if name in correlations else ""
        print(f"{name:<16}{share:>34}{correlation:>30}")
    print("\nWrong labels: by self-influence, of the network. Retraining: of a linear model, without one of the")
    print(f"{args.retrain} most influential digits at a time; 'exact' has its Hessian.")
    plot(train_set, test_set, wrong, tested, influences, args.output)
    print(f"Figure: {args.output}")


if __name__ == "__main__":
    main()
