"""Train a deep autoencoder of handwritten digits with KFAC, AdamW and SGD: the classical benchmark of KFAC.

    pip install "ggn-jax[examples]"
    python examples/training_autoencoder.py

Eight dense layers with tanh, 64-128-64-32-8-32-64-128-64, and the cross-entropy of the pixels' intensities (Hinton &
Salakhutdinov 2006; Martens & Grosse 2015). The loss is relative to the least possible: the entropy of the intensities.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen
from jax.scipy.special import entr
from sklearn.datasets import load_digits
from training_common import Task, main

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


def tasks(seed: int) -> Sequence[Task]:
    """One task."""
    images = jnp.asarray(load_digits().data / 16, jnp.float32)
    module = Autoencoder()
    model_fn, params = ggn_jax.from_linen(module, module.init(jax.random.key(seed), images[:1]))
    least = jnp.mean(entr(images) + entr(1 - images))

    def batch_of(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images[jax.random.randint(key, (BATCH,), 0, len(images))]
        return x, x

    return [
        Task(
            "digits, autoencoder",
            model_fn,
            params,
            LOSS,
            batch_of,
            jax.jit(lambda params: LOSS(model_fn(params, images), images) - least),
            kfac={"grid": [0.03, 0.1, 0.3], "damping": 1e-3, "factor_interval": 10, "inverse_interval": 20},
            quadratic={"grid": [0.1, 1.0], "adapt_damping": 5, "inverse_interval": 5},
        )
    ]


if __name__ == "__main__":
    main(__doc__, "training_autoencoder", tasks, steps=1500)
