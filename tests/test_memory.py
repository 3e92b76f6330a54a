"""What is kept next to large outputs, in units of their own size: the compiler states it, so nothing is run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import ggn_jax
from ggn_jax import CrossEntropyLoss

N, POSITIONS, CLASSES, WIDTH = 2, 64, 5003, 8
SMALL = 0.05  # what belongs to a position, and code


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


LOGITS = shape(N, POSITIONS, CLASSES)
INDICES = shape(N, POSITIONS, dtype="int32")
INPUTS, HEAD = shape(N, POSITIONS, WIDTH), shape(WIDTH, CLASSES)
KEY = shape(2, dtype="uint32")


def kept(fn: Callable[..., Any], *args: jax.ShapeDtypeStruct) -> float:
    """The memory for temporary arrays, in units of the logits' bytes."""
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    return analysis.temp_size_in_bytes / (N * POSITIONS * CLASSES * 4)


def plain(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def head(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def gradient(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda w, x, y: jax.grad(lambda w: loss(head(w, x), y))(w)


def weighted() -> CrossEntropyLoss:
    return CrossEntropyLoss(jnp.ones(CLASSES, "float32"), label_smoothing=0.1, ignore_index=7, class_axis=-1)


@pytest.mark.parametrize("make", [lambda: CrossEntropyLoss(class_axis=-1), weighted], ids=["plain", "all options"])
def test_value(make: Callable[[], CrossEntropyLoss]) -> None:
    assert kept(make(), LOGITS, INDICES) < SMALL


def test_value_at_probabilities() -> None:
    loss = CrossEntropyLoss(jnp.ones(CLASSES, "float32"), label_smoothing=0.1, class_axis=-1)
    assert kept(loss, LOGITS, LOGITS) < 1 + SMALL


def test_gradient() -> None:
    got = kept(gradient(CrossEntropyLoss(class_axis=-1)), HEAD, INPUTS, INDICES)
    assert got < kept(gradient(plain), HEAD, INPUTS, INDICES) + SMALL


def test_ggn_product() -> None:
    """The logits, their tangent and its product with the loss Hessian."""

    def product(w: jax.Array, v: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return ggn_jax.GGNLinearOperator(head, CrossEntropyLoss(class_axis=-1), w, (x, y)).mv(v)

    assert kept(product, HEAD, HEAD, INPUTS, INDICES) < 3 + SMALL


def test_vectors() -> None:
    """Next to the outputs and the vectors themselves: nothing for gradients, the probabilities for labels."""
    loss = CrossEntropyLoss(class_axis=-1)
    empirical = ggn_jax.make_batch_grad_output_fn(loss, "empirical")
    drawn = ggn_jax.make_batch_grad_output_fn(loss, "mc", 1)
    assert kept(empirical, LOGITS, INDICES) < SMALL
    assert kept(drawn, LOGITS, INDICES, KEY) < 1.25 + SMALL


def factors(mc_samples: int) -> float:
    def blocks(w: jax.Array, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        loss = CrossEntropyLoss(class_axis=-1)
        options: dict[str, Any] = {"fisher_type": "mc", "mc_samples": mc_samples, "key": key, "max_dense_size": 64}
        return ggn_jax.KFACLinearOperator(head, loss, w, (x, y), **options).blocks

    return kept(blocks, HEAD, INPUTS, INDICES, KEY)


def test_factors_of_one_sample() -> None:
    """The logits and the vector."""
    assert factors(1) < 2.25 + SMALL


def test_factors_hold_one_sample_at_a_time() -> None:
    assert factors(8) < factors(1) + 0.5


def test_value_gradient_and_factors() -> None:
    """A training step's look at a batch keeps no more: the loss and the draws share their sums over classes."""
    inputs = jnp.zeros(INPUTS.shape, INPUTS.dtype)
    loss = CrossEntropyLoss(class_axis=-1)
    optimizer = ggn_jax.kfac(head, loss, 0.1, example_inputs=inputs, fisher_type="mc", max_dense_size=64)
    state = jax.eval_shape(optimizer.init, HEAD)

    def look(w: jax.Array, x: jax.Array, y: jax.Array, key: jax.Array, state: Any) -> Any:
        return optimizer.value_and_grad_and_factors(w, (x, y), state, key=key)

    assert kept(look, HEAD, INPUTS, INDICES, KEY, state) < 2.3 + SMALL
