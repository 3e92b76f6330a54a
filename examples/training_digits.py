"""Train classifiers of handwritten digits with KFAC, SOAP, Muon, AdamW and SGD.

    pip install "ggn-jax[examples]"
    python examples/training_digits.py

An MLP in Flax NNX; a ResNet with batch normalisation, whose examples depend on each other, and a CNN in Flax linen.
Each optimizer has a small grid of learning rates (KFAC with the quadratic model: of first dampings) and the same
batches; the best setting after a third of the steps is trained to the end.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from sklearn.datasets import load_digits
from training_common import Task, main, supervised

import ggn_jax

LOSS = ggn_jax.CrossEntropyLoss()
BATCH = 256


def mlp() -> tuple[Any, Any]:
    """Three dense layers: the model, and the first parameters from a key."""

    def make(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(key)
        layers = [nnx.Linear(a, b, rngs=rngs) for a, b in ((64, 128), (128, 64), (64, 10))]
        return nnx.Sequential(layers[0], nnx.relu, layers[1], nnx.relu, layers[2])

    return ggn_jax.from_nnx(make(jax.random.key(0)))[0], lambda key: ggn_jax.from_nnx(make(key))[1]


class ResNet(linen.Module):
    """Three residual blocks of two convolutions, with the batch's own statistics in training."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(linen.BatchNorm, use_running_average=False)
        x = linen.relu(norm()(linen.Conv(8, (3, 3), use_bias=False)(x)))
        for width, strides in ((8, 1), (16, 2), (32, 2)):
            y = linen.relu(norm()(linen.Conv(width, (3, 3), strides=strides, use_bias=False)(x)))
            y = norm()(linen.Conv(width, (3, 3), use_bias=False)(y))
            short = x if strides == 1 else linen.Conv(width, (1, 1), strides=strides, use_bias=False)(x)
            x = linen.relu(short + y)
        return linen.Dense(10)(jnp.mean(x, axis=(1, 2)))


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


def tasks() -> Sequence[Callable[[], Task]]:
    """Three models on the same data."""
    images, classes = load_digits(return_X_y=True)
    flat, classes = jnp.asarray(images / 16, jnp.float32), jnp.asarray(classes)
    square = flat.reshape(-1, 8, 8, 1)
    resnet, convolutional = ResNet(), cnn()

    def batch_of(inputs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jax.random.randint(key, (BATCH,), 0, len(inputs))
        return inputs[index], classes[index]

    def first(module: linen.Module, key: jax.Array) -> Any:
        return module.init(key, square[:1])["params"]

    def made(name: str, model_fn: Any, init: Any, inputs: jax.Array, **options: Any) -> Callable[[], Task]:
        numbers = {"grid": [0.1, 0.3, 1.0], "damping": 0.03, "factor_interval": 10, "inverse_interval": 50}
        quadratic = {"grid": [0.1, 1.0], "adapted": {"interval": 5}, "inverse_interval": 5}
        options |= {"numbers": numbers, "quadratic": quadratic}
        return partial(supervised, name, model_fn, LOSS, init, partial(batch_of, inputs), (inputs, classes), **options)

    return [
        made("digits, MLP", *mlp(), flat),
        made(
            "digits, ResNet",
            lambda params, x: resnet.apply({"params": params}, x, mutable=["batch_stats"])[0],
            partial(first, resnet),
            square,
            options={"examples": "coupled"},
            alone=lambda params, x: jax.vmap(
                lambda x: resnet.apply({"params": params}, x[None], mutable=["batch_stats"])[0][0]
            )(x),
        ),
        made(
            "digits, CNN",
            lambda params, x: convolutional.apply({"params": params}, x),
            partial(first, convolutional),
            square,
        ),
    ]


if __name__ == "__main__":
    main(__doc__, "training_digits", tasks(), steps=600)
