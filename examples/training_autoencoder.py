"""Train a deep autoencoder of handwritten digits with KFAC, SOAP, Muon, AdamW and SGD: KFAC's classical benchmark.

    pip install "ggn-jax[examples]"
    python examples/training_autoencoder.py

Eight dense layers with tanh, 64-128-64-32-8-32-64-128-64, and the cross-entropy of the pixels' intensities (Hinton &
Salakhutdinov 2006; Martens & Grosse 2015). The loss is relative to the least possible: the entropy of the intensities.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import linen
from jax.scipy.special import entr
from sklearn.datasets import load_digits
from training_common import Task, main, supervised

import ggn_jax

LOSS = ggn_jax.BCEWithLogitsLoss()
WIDTHS = (128, 64, 32, 8, 32, 64, 128)
BATCH = 256


class Autoencoder(linen.Module):
    """Logits of the pixels."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in WIDTHS:
            x = linen.Dense(width)(x)
            x = x if width == min(WIDTHS) else jnp.tanh(x)  # the code is linear
        return linen.Dense(64)(x)


def task() -> Task:
    images = jnp.asarray(load_digits().data / 16, jnp.float32)
    module, least = Autoencoder(), jnp.mean(entr(images) + entr(1 - images))

    def batch_of(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images[jax.random.randint(key, (BATCH,), 0, len(images))]
        return x, x

    made = supervised(
        "digits, autoencoder",
        lambda params, x: module.apply({"params": params}, x),
        LOSS,
        lambda key: module.init(key, images[:1])["params"],
        batch_of,
        (images, images),
        numbers={"grid": [0.03, 0.1, 0.3], "damping": 1e-3, "factor_interval": 10, "inverse_interval": 20},
        quadratic={"grid": [0.1, 1.0], "adapted": {"interval": 5}, "inverse_interval": 5},
    )
    return replace(made, value=lambda params: made.value(params) - least)


if __name__ == "__main__":
    main(__doc__, "training_autoencoder", [task], steps=1500)
