"""Train classifiers of handwritten digits with KFAC, AdamW and SGD: an MLP in Flax NNX and a CNN in Flax linen.

    pip install "ggn-jax[examples]"
    python examples/training_digits.py

Each optimizer has a small grid of learning rates (KFAC with the quadratic model: of first dampings) and the same
batches; the best setting after a third of the steps is trained to the end.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen, nnx
from sklearn.datasets import load_digits
from training_common import Task, main

import ggn_jax

LOSS = ggn_jax.CrossEntropyLoss()
BATCH = 256


def cnn() -> linen.Module:
    """Two convolutions and two dense layers."""
    return linen.Sequential(
        [
            linen.Conv(16, (3, 3)),
            linen.relu,
            linen.Conv(32, (3, 3), strides=2),
            linen.relu,
            lambda x: x.reshape(x.shape[0], -1),
            linen.Dense(64),
            linen.relu,
            linen.Dense(10),
        ]
    )


def tasks(seed: int) -> Sequence[Task]:
    """Both models on the same data."""
    images, classes = load_digits(return_X_y=True)
    flat, classes = jnp.asarray(images / 16, jnp.float32), jnp.asarray(classes)
    square = flat.reshape(-1, 8, 8, 1)

    def batch_of(inputs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jax.random.randint(key, (BATCH,), 0, len(inputs))
        return inputs[index], classes[index]

    rngs = nnx.Rngs(seed)
    layers = [nnx.Linear(a, b, rngs=rngs) for a, b in ((64, 128), (128, 64), (64, 10))]
    mlp = nnx.Sequential(layers[0], nnx.relu, layers[1], nnx.relu, layers[2])
    made = {"digits, MLP": (*ggn_jax.from_nnx(mlp), flat)}
    module = cnn()
    variables = module.init(jax.random.key(seed), square[:1])
    made["digits, CNN"] = (*ggn_jax.from_linen(module, variables), square)
    return [
        Task(
            name,
            model_fn,
            params,
            LOSS,
            partial(batch_of, inputs),
            jax.jit(lambda params, model_fn=model_fn, inputs=inputs: LOSS(model_fn(params, inputs), classes)),
            kfac={"grid": [0.1, 0.3, 1.0], "damping": 0.03, "factor_interval": 10, "inverse_interval": 50},
            quadratic={"grid": [0.1, 1.0], "adapt_damping": 5, "inverse_interval": 5},
        )
        for name, (model_fn, params, inputs) in made.items()
    ]


if __name__ == "__main__":
    main(__doc__, "training_digits", tasks, steps=600)
