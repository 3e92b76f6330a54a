"""Give a classifier of handwritten digits error bars, by a Laplace approximation with KFAC.

    pip install "ggn-jax[examples]"
    python examples/digits_laplace.py

The posterior of the weights is approximated by a Gaussian around the trained ones, with the precision
`KFAC + prior_precision * I`. It shows what `ggn_jax.KFACLinearOperator` has for that:

- `reduction="sum"`: KFAC of the negative log-likelihood of all training data, not of their mean.
- `logdet(prior_precision)`: in the marginal likelihood, which can choose the prior's precision.
- `inverse_sqrt(prior_precision)`: times white noise, a sample of the posterior.
- It is a pytree: a jitted function takes it as an argument, and maps it over precisions and samples.

Predictions are those of the linearised model: its outputs at the trained weights, plus the derivative of the outputs
in the direction of each sample (`jax.linearize`); the class probabilities are averaged over the samples. This changes
the confidence and hardly ever the class. The test digits are rotated from 0 to 180 degrees: the further they are from
the training data, the less confident a classifier should be.

The prior's precision is chosen on validation data. `--choose marginal-likelihood` needs none, but takes a much lower
one here, with which predictions are underconfident on digits that are upright.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ggn_jax

Params = Any
Batch = tuple[jax.Array, jax.Array]

# The likelihood of the data is a product: the loss that belongs to it is a sum.
LOSS = ggn_jax.CrossEntropyLoss(reduction="sum")
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1  # the prior's precision in training; the one for predictions is chosen afterwards
PRIOR_PRECISIONS = tuple(10 ** (exponent / 2) for exponent in range(-5, 7))
BINS = 15  # of the calibration error
COLORS = {"MAP": "#d95f02", "Laplace": "#1b6ca8"}


class MLP(nnx.Module):
    """64 pixels, two hidden layers of 32 units, 10 classes."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.second = nnx.Linear(32, 32, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


@dataclass
class Quality:
    """How good and how sure predictions are: means over a test set."""

    accuracy: float
    confidence: float
    entropy: float
    nll: float
    ece: float


def load_data(seed: int) -> tuple[Batch, Batch, Batch]:
    """Training, validation and test images, with pixels from 0 to 1, and their classes."""
    images, classes = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images / 16, classes, test_size=360, random_state=seed, stratify=classes)
    x_train, x_valid, y_train, y_valid = train_test_split(x, y, test_size=360, random_state=seed, stratify=y)
    pairs = (x_train, y_train), (x_valid, y_valid), (x_test, y_test)
    train_set, valid_set, test_set = ((jnp.asarray(inputs), jnp.asarray(targets)) for inputs, targets in pairs)
    return train_set, valid_set, test_set


def rotated(inputs: jax.Array, angle: float) -> jax.Array:
    """The images, turned by an angle in degrees."""
    images = np.asarray(inputs).reshape(-1, 8, 8)
    turned = rotate(images, angle, axes=(1, 2), reshape=False, order=1)
    return jnp.asarray(turned.reshape(-1, 64))


@partial(jax.jit, static_argnames="steps")
def train(model_fn: Callable, params: Params, batch: Batch, *, steps: int) -> Params:
    """Adam with a decaying learning rate, on the whole training set."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def objective(params: Params) -> jax.Array:
        """The negative log-posterior per example, up to a constant."""
        total = LOSS(model_fn(params, batch[0]), batch[1]) + WEIGHT_DECAY / 2 * optax.tree.norm(params, squared=True)
        return total / batch[1].size

    def step(state: Any, _: None) -> tuple[Any, None]:
        params, moments = state
        update, moments = optimizer.update(jax.grad(objective)(params), moments)
        return (optax.apply_updates(params, update), moments), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


@jax.jit
def log_marginal_likelihood(
    model_fn: Callable, kfac: ggn_jax.KFACLinearOperator, params: Params, batch: Batch, prior_precision: jax.Array
) -> jax.Array:
    """Laplace's approximation of the logarithm of the probability of the training data, given the prior.

    It is `log p(data | params) + log p(params) + (P log(2 pi) - log det(KFAC + prior_precision I)) / 2`; the `2 pi` of
    the prior and of the integral cancel.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    fit = -LOSS(model_fn(params, batch[0]), batch[1])
    prior = (size * jnp.log(prior_precision) - prior_precision * optax.tree.norm(params, squared=True)) / 2
    return fit + prior - kfac.logdet(prior_precision) / 2


@partial(jax.jit, static_argnames="num")
def posterior_samples(
    kfac: ggn_jax.KFACLinearOperator, params: Params, prior_precision: jax.Array, key: jax.Array, *, num: int
) -> Params:
    """`num` draws of the weights, less their mean, along a new first axis."""
    root = kfac.inverse_sqrt(prior_precision)

    def sample(key: jax.Array) -> Params:
        return root.mv(optax.tree.random_like(key, params, jax.random.normal))

    return jax.vmap(sample)(jax.random.split(key, num))


@jax.jit
def predict(model_fn: Callable, params: Params, inputs: jax.Array) -> jax.Array:
    """Log-probabilities at the trained weights."""
    return jax.nn.log_softmax(model_fn(params, inputs))


@jax.jit
def predict_laplace(model_fn: Callable, params: Params, samples: Params, inputs: jax.Array) -> jax.Array:
    """Log-probabilities of the linearised model, averaged over samples of the weights."""
    outputs, jvp = jax.linearize(lambda params: model_fn(params, inputs), params)
    logs = jax.nn.log_softmax(outputs + jax.vmap(jvp)(samples))  # [samples, data, classes]
    return jax.nn.logsumexp(logs, axis=0) - jnp.log(len(logs))


def mean_nll(log_probs: jax.Array, classes: jax.Array) -> float:
    """The mean negative log-likelihood of the classes."""
    return -float(jnp.mean(jnp.take_along_axis(log_probs, classes[:, None], axis=-1)))


def measure(log_probs: jax.Array, classes: jax.Array) -> Quality:
    """Accuracy, confidence, entropy, negative log-likelihood and expected calibration error."""
    probs = np.exp(np.asarray(log_probs))
    confidence, correct = probs.max(axis=-1), probs.argmax(axis=-1) == np.asarray(classes)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    # The gap between confidence and accuracy in each bin, weighted by how many predictions are in it.
    ece = np.abs(np.bincount(bins, weights=confidence - correct, minlength=BINS)).sum() / len(bins)
    entropy = -(probs * np.asarray(log_probs)).sum(axis=-1).mean()
    return Quality(correct.mean(), confidence.mean(), entropy, mean_nll(log_probs, classes), ece)


def print_table(angles: Sequence[float], results: dict[str, list[Quality]]) -> None:
    """One row per angle; two columns, MAP and Laplace, per quantity."""
    quantities = ("accuracy", "confidence", "entropy", "nll", "ece")
    print("\n" + " " * 6 + "".join(f"{quantity:>18}" for quantity in quantities))
    print(f"{'angle':>6}" + "".join(f"{name:>9}" for _ in quantities for name in results))
    for i, angle in enumerate(angles):
        values = [getattr(qualities[i], quantity) for quantity in quantities for qualities in results.values()]
        print(f"{angle:>6.0f}" + "".join(f"{value:>9.3f}" for value in values))


def plot(
    angles: Sequence[float],
    results: dict[str, list[Quality]],
    evidences: Sequence[float],
    validation: Sequence[float],
    best: int,
    path: Path,
) -> None:
    """Confidence, negative log-likelihood and calibration against the angle, and how the prior was chosen."""
    figure = Figure(figsize=(19, 5), layout="constrained")
    confidence, nll, ece, prior = figure.subplots(1, 4)
    for name, qualities in results.items():
        style: dict[str, Any] = {"color": COLORS[name], "label": name, "linewidth": 1.8, "marker": "o", "markersize": 4}
        confidence.plot(angles, [quality.confidence for quality in qualities], **style)
        nll.plot(angles, [quality.nll for quality in qualities], **style)
        ece.plot(angles, [quality.ece for quality in qualities], **style)
    accuracies = [quality.accuracy for quality in results["MAP"]]
    confidence.plot(angles, accuracies, color="#7f7f7f", linestyle="--", label="accuracy (MAP)")
    confidence.set(title="Confidence", ylabel="mean probability of the predicted class", ylim=(0, 1.03))
    nll.set(title="Negative log-likelihood", ylabel="nats per digit")
    ece.set(title="Expected calibration error", ylabel="|confidence - accuracy|")
    for axes in (confidence, nll, ece):
        axes.set(xlabel="rotation of the test digits, degrees", xticks=range(0, 181, 45))
    prior.plot(PRIOR_PRECISIONS, evidences, color="#1b6ca8", marker="o", markersize=4)
    prior.axvline(PRIOR_PRECISIONS[best], color="#7f7f7f", linestyle=":")
    prior.set(title="Choice of the prior", xlabel="prior precision (dotted: chosen)", xscale="log")
    prior.set_ylim(max(evidences) - 5000, max(evidences) + 300)
    prior.set_ylabel("log marginal likelihood of the training set", color="#1b6ca8")
    right = prior.twinx()
    right.plot(PRIOR_PRECISIONS, validation, color="#4d9a3f", marker="s", markersize=4)
    right.set_ylabel("negative log-likelihood, validation set", color="#4d9a3f")
    for axes in (confidence, nll, ece, prior):
        axes.grid(alpha=0.25)
        axes.spines["top"].set_visible(False)
    for axes in (confidence, nll, ece):
        axes.spines["right"].set_visible(False)
        axes.legend(frameon=False)
    right.spines["top"].set_visible(False)
    figure.suptitle("Rotated handwritten digits, MLP 64-32-32-10, linearised Laplace with KFAC", fontweight="bold")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    default = Path(__file__).parent / "output" / "digits_laplace.png"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial parameters and all random draws")
    parser.add_argument("--steps", type=int, default=2000, help="steps of Adam")
    parser.add_argument("--samples", type=int, default=50, help="of the posterior")
    choices = ("validation", "marginal-likelihood")
    parser.add_argument("--choose", choices=choices, default=choices[0], help="the prior's precision by this")
    parser.add_argument("--quick", action="store_true", help="few steps, samples and angles")
    parser.add_argument("--output", type=Path, default=default, help="where the figure goes")
    args = parser.parse_args(argv)
    angles: Sequence[float] = range(0, 181, 15)
    if args.quick:
        angles = range(0, 181, 45)
        args.steps, args.samples = min(args.steps, 300), min(args.samples, 20)

    train_set, valid_set, test_set = load_data(args.seed)
    model_fn, params = ggn_jax.from_nnx(MLP(nnx.Rngs(args.seed)))
    params = train(model_fn, params, train_set, steps=args.steps)
    kfac = ggn_jax.KFACLinearOperator(model_fn, LOSS, params, train_set, fisher_type="type-2")

    # The factors stay; each precision only changes their eigenvalues. One key: the precisions share their noise.
    key = jax.random.key(args.seed)
    evidences, validation = [], []
    for precision in PRIOR_PRECISIONS:
        evidences.append(float(log_marginal_likelihood(model_fn, kfac, params, train_set, precision)))
        samples = posterior_samples(kfac, params, precision, key, num=args.samples)
        validation.append(mean_nll(predict_laplace(model_fn, params, samples, valid_set[0]), valid_set[1]))
    best = int(np.argmin(validation) if args.choose == "validation" else np.argmax(evidences))

    samples = posterior_samples(kfac, params, PRIOR_PRECISIONS[best], key, num=args.samples)
    results: dict[str, list[Quality]] = {"MAP": [], "Laplace": []}
    for angle in angles:
        inputs = rotated(test_set[0], angle)
        results["MAP"].append(measure(predict(model_fn, params, inputs), test_set[1]))
        results["Laplace"].append(measure(predict_laplace(model_fn, params, samples, inputs), test_set[1]))

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size} parameters, {train_set[1].size} training digits, {args.steps} steps of Adam.\n")
    print(f"{'prior precision':>16}{'log marginal likelihood':>26}{'validation NLL':>17}")
    for i, (precision, evidence, nll) in enumerate(zip(PRIOR_PRECISIONS, evidences, validation, strict=True)):
        print(f"{precision:>16.3g}{evidence:>26.1f}{nll:>17.4f}{'   <- chosen' if i == best else ''}")
    plain = mean_nll(predict(model_fn, params, valid_set[0]), valid_set[1])
    print(f"{'none (MAP)':>16}{'':>26}{plain:>17.4f}")
    print_table(angles, results)
    print(f"\nConfidence: mean probability of the predicted class. Entropy, nll: in nats. ece: in {BINS} bins.")
    print(f"Laplace: {args.samples} samples, prior precision {PRIOR_PRECISIONS[best]:.3g}.")
    plot(angles, results, evidences, validation, best, args.output)
    print(f"Figure: {args.output}")


if __name__ == "__main__":
    main()
