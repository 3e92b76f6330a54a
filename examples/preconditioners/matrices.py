"""Muon (Jordan et al. 2024), Shampoo (Gupta et al. 2018, arXiv:1802.09568) and SOAP (Vyas et al. 2024,
arXiv:2409.11321): what needs a gradient's matrix only.

Which matrix a layer's gradient is, of a fused, scanned, convolutional or tied weight, `to_matrices` knows; all that has
no layer (biases with `find_layers(..., bias="separate")`, scales) is for Adam.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import ggn_jax


def orthogonal(x: jax.Array, steps: int = 5) -> jax.Array:
    """Muon's: singular values `[..., out, in]` to about 1, by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else jnp.swapaxes(x, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(steps):
        square = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else jnp.swapaxes(x, -1, -2)


def scale_by_muon(layers: ggn_jax.Layers, beta: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal, times `sqrt(max(1, out / in))`."""

    def scale(m: jax.Array) -> jax.Array:
        return orthogonal(m) * max(1, m.shape[-2] / m.shape[-1]) ** 0.5

    return optax.chain(optax.trace(beta, nesterov=True), on_matrices(layers, lambda _: (), lambda m, _: (scale(m), ())))


def scale_by_shampoo(layers: ggn_jax.Layers, epsilon: float = 1e-6) -> optax.GradientTransformation:
    """`L^-1/4 G R^-1/4` with `L = epsilon I + sum G G^T` and `R = epsilon I + sum G^T G` over all steps."""

    def start(m: jax.Array) -> Any:
        return [jnp.tile(epsilon * jnp.eye(size, dtype=m.dtype), (len(m), 1, 1)) for size in m.shape[1:]]

    def step(m: jax.Array, state: Any) -> Any:
        left, right = (
            old + x @ jnp.swapaxes(x, 1, 2) for old, x in zip(state, (m, jnp.swapaxes(m, 1, 2)), strict=True)
        )
        return _root(left) @ m @ _root(right), [left, right]

    return on_matrices(layers, start, step)


def _root(x: jax.Array) -> jax.Array:
    values, q = jnp.linalg.eigh(x)
    return (q * values[:, None] ** -0.25) @ jnp.swapaxes(q, 1, 2)


def scale_by_soap(
    layers: ggn_jax.Layers, b1: float = 0.95, b2: float = 0.95, epsilon: float = 1e-8, interval: int = 10
) -> optax.GradientTransformation:
    """Adam in the eigenbases of running averages of `G G^T` and `G^T G`, which a QR renews every `interval` steps.

    As in the authors' code, the first gradient starts the averages only, and its update is 0.
    """

    def start(m: jax.Array) -> Any:
        sides = [jnp.zeros((len(m), size, size), m.dtype) for size in m.shape[1:]]
        return jnp.zeros((), int), jnp.zeros_like(m), jnp.zeros_like(m), sides, sides

    def step(m: jax.Array, state: Any) -> Any:
        count, first, second, averages, (left, right) = state
        first = jnp.where(count > 0, b1 * first + (1 - b1) * m, 0)
        second = b2 * second + (1 - b2) * (_transpose(left) @ m @ right) ** 2
        steps = jnp.maximum(count, 1)
        scale = jnp.sqrt(second / (1 - b2**steps)) + epsilon
        update = left @ (_transpose(left) @ first @ right / (1 - b1**steps) / scale) @ _transpose(right)
        averages = [
            b2 * old + (1 - b2) * x @ _transpose(x) for old, x in zip(averages, (m, _transpose(m)), strict=True)
        ]
        which = jnp.where(count == 0, 0, jnp.where(count % interval == 0, 1, 2))
        second, bases = jax.lax.switch(which, [_decompose, _renew, _keep], second, averages, [left, right])
        return update, (count + 1, first, second, averages, bases)

    return on_matrices(layers, start, step, optax.scale_by_adam(b1, b2))


def _keep(second: jax.Array, averages: list[jax.Array], bases: list[jax.Array]) -> Any:
    return second, bases


def _decompose(second: jax.Array, averages: list[jax.Array], bases: list[jax.Array]) -> Any:
    return second, [jnp.linalg.eigh(average)[1] for average in averages]


def _renew(second: jax.Array, averages: list[jax.Array], bases: list[jax.Array]) -> Any:
    """A step of orthogonal iteration, the largest eigenvalues first; `second` follows the order."""
    new = []
    for axis, (average, q) in enumerate(zip(averages, bases, strict=True), 1):
        product = average @ q
        order = jnp.argsort(-jnp.sum(q * product, axis=1), axis=1)
        second = jnp.take_along_axis(second, jnp.expand_dims(order, 3 - axis), axis)
        new.append(jnp.linalg.qr(jnp.take_along_axis(product, order[:, None], 2))[0])
    return second, new


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def on_matrices(
    layers: ggn_jax.Layers, start: Any, step: Any, rest: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """`step(matrix, state)` of each layer's gradient returns its update and the new state; `rest` is for all else."""
    rest = optax.scale_by_adam() if rest is None else rest

    def init(params: Any) -> Any:
        matrices, other = ggn_jax.to_matrices(layers, params)
        return {name: start(m) for name, m in matrices.items()}, rest.init(other)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        matrices, other = ggn_jax.to_matrices(layers, updates)
        found = {name: step(m, state[0][name]) for name, m in matrices.items()}
        other, rest_state = rest.update(other, state[1])
        new = ggn_jax.from_matrices(layers, {name: pair[0] for name, pair in found.items()}, other)
        return new, ({name: pair[1] for name, pair in found.items()}, rest_state)

    return optax.GradientTransformation(init, update)
