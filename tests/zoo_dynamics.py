"""Dynamics, derivatives, densities and control flow, each in a few lines."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from zoo_layers import SEQUENCES, F, Models, X, dense, layer, mlp, mlp_shapes, normal, of

# Dynamics, derivatives and densities. ---------------------------------------------------------------------------------


def neural_ode(p: Any, x: jax.Array) -> jax.Array:
    step = lambda x, _: (x + 0.25 * mlp(p["field"], x), None)  # noqa: E731
    return lax.scan(step, x, length=4)[0] @ p["out"]


def equilibrium(p: Any, x: jax.Array) -> jax.Array:
    """A fixed point by a fixed number of iterations."""
    return lax.fori_loop(0, 5, lambda _, z: jnp.tanh(z @ p["again"] + x @ p["in"]), jnp.zeros((len(x), 3))) @ p["out"]


def implicit(p: Any, x: jax.Array) -> jax.Array:
    """A fixed point by a loop until it stands still, with the derivative of the implicit function theorem."""
    step = lambda w, z, u: jnp.tanh(z @ w / 2 + u)  # noqa: E731

    @jax.custom_vjp
    def solve(w: jax.Array, u: jax.Array) -> jax.Array:
        moves = lambda pair: jnp.abs(pair[0] - pair[1]).max() > 1e-12  # noqa: E731
        return lax.while_loop(moves, lambda pair: (step(w, pair[0], u), pair[0]), (u, u + 1))[0]

    def backward(kept: Any, g: jax.Array) -> Any:
        w, u, z = kept
        _, pull = jax.vjp(step, w, z, u)
        moves = lambda pair: jnp.abs(pair[0] - pair[1]).max() > 1e-12  # noqa: E731
        total = lax.while_loop(moves, lambda pair: (g + pull(pair[0])[1], pair[0]), (g, g + 1))[0]
        return pull(total)[0], pull(total)[2]

    solve.defvjp(lambda w, u: (z := solve(w, u), (w, u, z)), backward)
    return solve(p["again"], x @ p["in"]) @ p["out"]


def physics_informed(p: Any, x: jax.Array) -> jax.Array:
    def laplacian(x: jax.Array) -> jax.Array:
        return jnp.trace(jax.hessian(lambda x: mlp(p, x)[0])(x))[None]

    return jax.vmap(laplacian)(x)


def forward_laplacian(p: Any, x: jax.Array) -> jax.Array:
    def second(x: jax.Array, direction: jax.Array) -> jax.Array:
        slope = lambda x: jax.jvp(lambda x: mlp(p, x), (x,), (direction,))[1]  # noqa: E731
        return jax.jvp(slope, (x,), (direction,))[1]

    return jax.vmap(lambda x: second(x, jnp.ones(2)))(x)


def forces(p: Any, x: jax.Array) -> jax.Array:
    return -jax.vmap(jax.grad(lambda x: mlp(p, x)[0]))(x)


def hamiltonian(p: Any, x: jax.Array) -> jax.Array:
    field = jax.vmap(jax.grad(lambda x: mlp(p, x)[0]))
    for _ in range(2):
        q, m = jnp.split(field(x), 2, -1)
        x = x + 0.1 * jnp.concatenate([m, -q], -1)
    return x


def coupling_flow(p: Any, x: jax.Array) -> jax.Array:
    """RealNVP; the log-determinant is an output."""
    a, b = jnp.split(x, 2, -1)
    scale, shift = jnp.split(mlp(p, a), 2, -1)
    return jnp.concatenate([a, b * jnp.exp(jnp.tanh(scale)) + shift, jnp.tanh(scale).sum(-1, keepdims=True)], -1)


def vae(p: Any, x: jax.Array) -> jax.Array:
    mean, log_scale = jnp.split(mlp(p["encoder"], x), 2, -1)
    code = mean + jnp.exp(log_scale) * jnp.linspace(-1, 1, mean.shape[-1])
    return jnp.concatenate([mlp(p["decoder"], code), mean, log_scale], -1)


def codebook(p: Any, x: jax.Array) -> jax.Array:
    """VQ-VAE: the nearest code, straight through, with the code as an output of its own."""
    h = dense(p["encoder"], x)
    nearest = p["codes"][jnp.argmin(((h[:, None] - lax.stop_gradient(p["codes"])) ** 2).sum(-1), -1)]
    return jnp.concatenate([dense(p["decoder"], h + lax.stop_gradient(nearest - h)), nearest], -1)


def contrastive(p: Any, pair: Any) -> jax.Array:
    """Two towers and a temperature."""
    a, b = mlp(p["image"], pair["image"]), mlp(p["text"], pair["text"])
    a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return jnp.exp(p["temperature"]) * (a * b).sum(-1, keepdims=True)


def fourier_operator(p: Any, x: jax.Array) -> jax.Array:
    """FNO: a complex matrix for each of the lowest frequencies."""
    x = dense(p["lift"], x)
    modes = jnp.fft.rfft(x, axis=1)
    kept = jnp.einsum("nki,kio->nko", modes[:, :2], lax.complex(p["real"], p["imag"]))
    x = jax.nn.gelu(jnp.fft.irfft(kept, n=x.shape[1], axis=1) + x @ p["local"])
    return x.mean(1) @ p["out"]


def complex_network(p: Any, x: jax.Array) -> jax.Array:
    z = (x + 1j * x[:, ::-1]) @ lax.complex(p["real"], p["imag"])
    return jnp.abs(z) @ p["out"]


DYNAMICS: Models = {
    "neural ODE, fixed steps": of(neural_ode, X, field=mlp_shapes(3, 4, 3), out=(3, 2)),
    "equilibrium by iterations": of(equilibrium, X, again=(3, 3), out=(3, 2), **{"in": (3, 3)}),
    "equilibrium, implicit derivative": of(implicit, X, again=(3, 3), out=(3, 2), **{"in": (3, 3)}),
    "Laplacian by jax.hessian": of(physics_informed, normal(3, 2), **mlp_shapes(2, 4, 1)),
    "second derivative by jvp of jvp": of(forward_laplacian, normal(3, 2), **mlp_shapes(2, 4, 1)),
    "energy and forces, score": of(forces, X, **mlp_shapes(3, 4, 1)),
    "Hamiltonian network": of(hamiltonian, normal(3, 2), **mlp_shapes(2, 4, 1)),
    "coupling flow": of(coupling_flow, normal(3, 4), **mlp_shapes(2, 4, 4)),
    "variational autoencoder": of(vae, X, encoder=mlp_shapes(3, 4, 4), decoder=mlp_shapes(2, 4, 3)),
    "vector-quantised autoencoder": of(codebook, X, encoder=layer(3, 2), codes=(4, 2), decoder=layer(2, 3)),
    "contrastive towers, temperature": of(
        contrastive,
        {"image": X, "text": normal(3, 2)},
        image=mlp_shapes(3, 4, 2),
        text=mlp_shapes(2, 4, 2),
        temperature=(),
    ),
    "Fourier neural operator": of(
        fourier_operator, SEQUENCES, lift=layer(4, 3), real=(2, 3, 3), imag=(2, 3, 3), local=(3, 3), out=(3, 2)
    ),
    "complex network": of(complex_network, X, real=(3, 4), imag=(3, 4), out=(4, 2)),
}


# Control flow and derivatives of one's own. ---------------------------------------------------------------------------


def gated(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda x: lax.cond(x[0] > 0, lambda x: mlp(p["a"], x), lambda x: jnp.tanh(x @ p["b"]), x))(x)


def hybrid(p: Any, x: jax.Array) -> jax.Array:
    """A loop over blocks whose kind is that of their number."""

    def block(x: jax.Array, item: Any) -> Any:
        number, p = item
        return lax.cond(number % 2 == 0, lambda x: x + mlp(p, x), lambda x: x * jax.nn.sigmoid(mlp(p, x)), x), None

    return lax.scan(block, x, (jnp.arange(3), p["blocks"]))[0] @ p["out"]


@jax.custom_vjp
def clipped(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


clipped.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, jnp.clip(g @ kept[0].T, -1e-2, 1e-2)))


def own_backward(p: Any, x: jax.Array) -> jax.Array:
    return clipped(p["w"], jnp.tanh(x @ p["first"])) @ p["out"]


@jax.custom_jvp
def smooth(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


smooth.defjvp(lambda x, t: (smooth(*x), t[0] * jax.nn.sigmoid(x[0])))


def own_activation(p: Any, x: jax.Array) -> jax.Array:
    return smooth(dense(p["first"], x)) @ p["out"]


CONTROL_FLOW: Models = {
    "lax.cond on data": of(gated, X, a=mlp_shapes(3, 4, 2), b=(3, 2)),
    "lax.cond on a loop's counter": of(
        hybrid,
        X,
        blocks={"first": {"w": (3, 3, 4), "b": (3, 4)}, "last": {"w": (3, 4, 3), "b": (3, 3)}},
        out=(3, 2),
    ),
    "custom_vjp around a layer": of(own_backward, X, w=(4, 3), first=(3, 4), out=(3, 2)),
    "custom_jvp activation": of(own_activation, X, **F),
}
