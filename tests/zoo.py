"""Small models of the kinds that people write, each in a few lines: the registry of `docs/architectures.md`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import lax

import ggn_jax

Fn = Callable[[Any, Any], jax.Array]


class Model(NamedTuple):
    """`fn(params, inputs [N, ...]) -> [N, out]`, with a batch of inputs."""

    fn: Fn
    params: Any
    inputs: Any


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def params(**shapes: Any) -> Any:
    """Numbers for shapes, which may be nested."""
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(structure, [normal(*shape, seed=i) for i, shape in enumerate(leaves)])


def tokens(*shape: int, high: int = 5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(high, size=shape))


def dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def layer(inputs: int, out: int) -> Any:
    return {"w": (inputs, out), "b": (out,)}


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return dense(p["last"], jnp.tanh(dense(p["first"], x)))


def mlp_shapes(inputs: int, hidden: int, out: int) -> Any:
    return {"first": layer(inputs, hidden), "last": layer(hidden, out)}


def norm(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2), axis=-1) @ v


def conv(x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    how = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    return lax.conv_general_dilated(x, w, **how)


# Perceptrons and fields. ---------------------------------------------------------------------------------------------


def mup(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) @ (p["readout"] / 4)


def siren(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sin(3.0 * dense(p["second"], jnp.sin(3.0 * dense(p["first"], x)))) @ p["out"]


def fourier_features(p: Any, x: jax.Array) -> jax.Array:
    angles = x @ normal(3, 4, seed=9)
    return mlp(p, jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))


def learned_frequencies(p: Any, x: jax.Array) -> jax.Array:
    angles = x @ p["frequencies"]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1) @ p["out"]


def kan(p: Any, x: jax.Array) -> jax.Array:
    basis = jnp.exp(-((x[..., None] - jnp.linspace(-1, 1, 4)) ** 2))
    return jnp.einsum("nik,iko->no", basis, p["spline"]) + jax.nn.silu(x) @ p["base"]


def masked(p: Any, x: jax.Array) -> jax.Array:
    order = jnp.arange(4)
    hidden = jnp.tanh(x @ (p["w"] * (order[:, None] <= order)) + p["b"])
    return hidden @ (p["out"] * (order[:, None] < order))


def low_rank_adapter(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["w"] + 0.5 * p["a"] @ p["b"])) @ p["out"]


def weight_norm(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))) @ p["out"]


def spectral_norm(p: Any, x: jax.Array) -> jax.Array:
    u = normal(4, seed=7)
    v = lax.stop_gradient(p["w"] @ u / jnp.linalg.norm(p["w"] @ u))
    return jnp.tanh(x @ (p["w"] / (v @ p["w"] @ u))) @ p["out"]


def quantised(p: Any, x: jax.Array) -> jax.Array:
    rounded = p["w"] + lax.stop_gradient(jnp.round(p["w"] * 8) / 8 - p["w"])
    return jnp.tanh(x @ rounded) @ p["out"]


def variational(p: Any, x: jax.Array) -> jax.Array:
    noise = normal(3, 4, seed=8)
    return jnp.tanh(x @ (p["mean"] + jax.nn.softplus(p["rho"]) * noise)) @ p["out"]


def ensemble(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(mlp, in_axes=(0, None), out_axes=1)(p, x).reshape(len(x), -1)


def hypernetwork(p: Any, inputs: Any) -> jax.Array:
    weights = mlp(p, inputs["task"]).reshape(-1, 3, 2)
    return jnp.einsum("ni,nio->no", inputs["x"], weights)


def film(p: Any, inputs: Any) -> jax.Array:
    scale, shift = jnp.split(dense(p["condition"], inputs["task"]), 2, -1)
    return jnp.tanh(dense(p["first"], inputs["x"]) * scale + shift) @ p["out"]


def deep_operator(p: Any, inputs: Any) -> jax.Array:
    return jnp.einsum("nk,nqk->nq", mlp(p["branch"], inputs["u"]), mlp(p["trunk"], inputs["y"])) + p["bias"]


# Images. -------------------------------------------------------------------------------------------------------------


def cnn(p: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(x, p["w1"]) + p["b1"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return dense(p["head"], jnp.tanh(conv(x, p["w2"], rhs_dilation=(2, 2))).reshape(len(x), -1))


def separable(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(conv(x, p["depthwise"], feature_group_count=2) @ p["pointwise"] + p["b"])
    return conv(x, p["grouped"], feature_group_count=2).mean((1, 2))


def upsampling(p: Any, x: jax.Array) -> jax.Array:
    return lax.conv_transpose(jnp.tanh(conv(x, p["down"])), p["up"], (2, 2), "SAME").mean((1, 2))


def residual(p: Any, x: jax.Array) -> jax.Array:
    x = conv(x, p["stem"])
    y = jax.nn.relu(norm(x) * p["scale"] + p["shift"])
    return (x + conv(y, p["w"])).mean((1, 2)) @ p["head"]


def standardised(p: Any, x: jax.Array) -> jax.Array:
    w = p["w"] - p["w"].mean((0, 1, 2))
    return jax.nn.relu(conv(x, w * lax.rsqrt(w.var((0, 1, 2)) + 1e-3))).mean((1, 2)) @ p["head"]


def squeeze_excite(p: Any, x: jax.Array) -> jax.Array:
    x = conv(x, p["w"])
    return (x * jax.nn.sigmoid(mlp(p["gate"], x.mean((1, 2))))[:, None, None]).mean((1, 2))


def vit(p: Any, x: jax.Array) -> jax.Array:
    patches = x.reshape(len(x), 2, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 4, 8) @ p["patch"]
    token = jnp.broadcast_to(p["class"], (len(x), 1, 4))
    x = jnp.concatenate([token, patches], 1) + p["position"]
    q, k, v = jnp.split(norm(x) @ p["qkv"], 3, -1)
    return (x + attend(q, k, v) @ p["out"])[:, 0] @ p["head"]


def mae(p: Any, x: jax.Array) -> jax.Array:
    seen = jnp.arange(4)[:, None] % 2 == 0
    hidden = jnp.where(seen, jnp.tanh(dense(p["encoder"], x)), p["mask token"])
    return dense(p["decoder"], attend(hidden, hidden, hidden)).mean(1)


# Sequences. ----------------------------------------------------------------------------------------------------------


def rope(x: jax.Array) -> jax.Array:
    angle = jnp.arange(x.shape[-2], dtype=x.dtype)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1)


def decoder(p: Any, x: jax.Array) -> jax.Array:
    """Grouped queries (two heads, one of keys and values), rotated; SwiGLU; the head is the embedding."""
    h = p["embed"][x]
    y = norm(h) * p["scale"]
    q = rope((y @ p["q"]).reshape(*x.shape, 2, 2).swapaxes(1, 2))
    k, v = jnp.split(y @ p["kv"], 2, -1)
    heads = attend(q, rope(k)[:, None], v[:, None]).swapaxes(1, 2).reshape(*x.shape, 4)
    h = h + heads @ p["o"]
    h = h + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return (h @ p["embed"].T)[:, -1]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    block = jax.checkpoint(lambda x, p: (x + mlp(p, norm(x)), None))
    return lax.scan(block, x, p["blocks"])[0] @ p["head"]


def rnn(p: Any, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, x: jax.Array) -> Any:
        return jnp.tanh(x @ p["in"] + h @ p["again"] + p["b"]), None

    return lax.scan(step, jnp.broadcast_to(p["first state"], (len(x), 3)), x.swapaxes(0, 1))[0] @ p["head"]


def gru(p: Any, x: jax.Array) -> jax.Array:
    def step(h: jax.Array, x: jax.Array) -> Any:
        r, z = jnp.split(jax.nn.sigmoid(x @ p["gates"] + h @ p["state gates"] + p["b"]), 2, -1)
        n = jnp.tanh(x @ p["new"] + r * (h @ p["state new"]))
        return (1 - z) * n + z * h, None

    return lax.scan(step, jnp.zeros((len(x), 3)), x.swapaxes(0, 1))[0] @ p["head"]


def lstm(p: Any, x: jax.Array) -> jax.Array:
    def step(carry: Any, x: jax.Array) -> Any:
        h, c = carry
        i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ p["w"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zeros = jnp.zeros((len(x), 3))
    return lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[0][0] @ p["head"]


def minimal_rnn(p: Any, x: jax.Array) -> jax.Array:
    """minGRU: gates see inputs alone, so that an associative scan is the recurrence."""
    z, new = jax.nn.sigmoid(x @ p["gate"]), x @ p["new"]
    combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])  # noqa: E731
    return lax.associative_scan(combine, (1 - z, z * new), axis=1)[1][:, -1] @ p["head"]


def state_space(p: Any, x: jax.Array) -> jax.Array:
    """S5 and LRU: a complex diagonal, with matrices of real and imaginary parts."""
    decay = jnp.exp(-jnp.exp(p["log decay"]) + 1j * p["frequency"])
    driven = x @ lax.complex(p["b real"], p["b imag"])
    combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])  # noqa: E731
    _, states = lax.associative_scan(combine, (jnp.broadcast_to(decay, driven.shape), driven), axis=1)
    y = (states @ lax.complex(p["c real"], p["c imag"])).real + x * p["d"]
    return jax.nn.gelu(y).mean(1) @ p["head"]


def selective(p: Any, x: jax.Array) -> jax.Array:
    """Mamba: step sizes and matrices are functions of the input."""
    step = jax.nn.softplus(dense(p["step"], x))[..., None]
    decay, driven = jnp.exp(-step * jnp.exp(p["a"])), step * (x @ p["b"])[:, :, None] * x[..., None]
    combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])  # noqa: E731
    states = lax.associative_scan(combine, (decay, driven), axis=1)[1]
    return (jnp.einsum("ntis,nts->nti", states, x @ p["c"]) + x * p["d"]).mean(1)


def linear_attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = (jax.nn.elu(x @ p["q"]) + 1, jax.nn.elu(x @ p["k"]) + 1, x @ p["v"])
    return jnp.einsum("nti,nsi,nsj->ntj", q, k, v).mean(1) @ p["out"]


def mixture(p: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.softmax(x @ p["router"])
    hidden = jnp.tanh(jnp.einsum("ni,eio->neo", x, p["in"]) + p["b"])
    return jnp.einsum("ne,neo,eoj->nj", gates, hidden, p["out"])


def adapted_experts(p: Any, x: jax.Array) -> jax.Array:
    """Low-rank adapters of all experts at once, merged."""
    weights = p["w"] + jnp.einsum("eir,ero->eio", p["a"], p["b"])
    return jnp.tanh(jnp.einsum("ni,eio->neo", x, weights)).mean(1)


def switch_mixture(p: Any, x: jax.Array) -> jax.Array:
    """Each example goes to the expert that the router likes best."""

    def one(x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ p["router"])
        best = jnp.argmax(gates)
        return gates[best] * lax.switch(best, [lambda x: mlp(p["a"], x), lambda x: mlp(p["b"], x)], x)

    return jax.vmap(one)(x)


def routed(p: Any, x: jax.Array) -> jax.Array:
    """All tokens, sorted by expert, in ragged products."""
    x = x.reshape(-1, x.shape[-1])
    gates = jax.nn.softmax(x @ p["router"])
    best = jnp.argmax(gates, -1)
    order, sizes = jnp.argsort(best), jnp.bincount(best, length=2)
    out = lax.ragged_dot(jnp.tanh(lax.ragged_dot(x[order], p["in"], sizes)), p["out"], sizes)
    return (gates.max(-1)[:, None] * out[jnp.argsort(order)]).reshape(-1, 4, 2).mean(1)


def embedding_bag(p: Any, x: jax.Array) -> jax.Array:
    return p["table"][x].sum(1) @ p["out"]


# Sets and graphs. ----------------------------------------------------------------------------------------------------


def deep_sets(p: Any, x: jax.Array) -> jax.Array:
    return mlp(p["outer"], mlp(p["inner"], x).sum(1))


def set_transformer(p: Any, x: jax.Array) -> jax.Array:
    pooled = attend(p["seed"] @ p["q"], x @ p["k"], x @ p["v"])
    return pooled.reshape(len(x), -1) @ p["out"]


def perceiver(p: Any, x: jax.Array) -> jax.Array:
    latents = jnp.broadcast_to(p["latents"], (len(x), *p["latents"].shape))
    latents = latents + attend(norm(latents) @ p["q"], x @ p["k"], x @ p["v"])
    return latents.mean(1) @ p["out"]


def message_passing(p: Any, graph: Any) -> jax.Array:
    def one(nodes: jax.Array, edges: jax.Array) -> jax.Array:
        sender, receiver = edges
        messages = jnp.tanh(dense(p["message"], jnp.concatenate([nodes[sender], nodes[receiver]], -1)))
        return (nodes @ p["self"] + jax.ops.segment_sum(messages, receiver, len(nodes))).mean(0) @ p["out"]

    return jax.vmap(one)(graph["nodes"], graph["edges"])


def graph_attention(p: Any, graph: Any) -> jax.Array:
    h = graph["nodes"] @ p["w"]
    scores = jax.nn.leaky_relu((h @ p["to"])[:, :, None] + (h @ p["from"])[:, None, :])
    return (jax.nn.softmax(jnp.where(graph["adjacent"], scores, -1e9), -1) @ h).mean(1)


# Dynamics, derivatives and densities. --------------------------------------------------------------------------------


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


def factorisation(p: Any, x: jax.Array) -> jax.Array:
    users, items = p["users"][x[:, 0]], p["items"][x[:, 1]]
    return (users * items).sum(-1, keepdims=True) + p["user bias"][x[:, 0], None]


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


# Control flow and derivatives of one's own. --------------------------------------------------------------------------


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


# Libraries. ----------------------------------------------------------------------------------------------------------


class Block(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = {"param_dtype": jnp.float64, "dtype": jnp.float64}
        x = x + linen.MultiHeadDotProductAttention(2, **wide)(linen.LayerNorm(**wide)(x))
        return linen.Dense(2, **wide)(x).mean(1)


def flax_block() -> Model:
    inputs = normal(3, 4, 4)
    return Model(*ggn_jax.from_linen(Block(), jax.jit(Block().init)(jax.random.key(0), inputs)), inputs)


class Cell(eqx.Module):
    """A GRU over a sequence."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(3), x)[0])


def equinox_gru() -> Model:
    keys = jax.random.split(jax.random.key(0), 2)
    wide = {"dtype": jnp.float64}
    module = Cell(eqx.nn.GRUCell(4, 3, key=keys[0], **wide), eqx.nn.Linear(3, 2, key=keys[1], **wide))
    return Model(*ggn_jax.from_equinox(module), SEQUENCES)


IMAGES, SEQUENCES = normal(3, 4, 4, 2), normal(3, 4, 4)
EDGES = jnp.stack([tokens(3, 6, high=4), tokens(3, 6, high=4)[:, ::-1]], axis=1)
TASK = {"task": normal(3, 3), "x": normal(3, 3, seed=1)}
F = {"first": layer(3, 4), "out": (4, 2)}


def of(fn: Fn, inputs: Any, **shapes: Any) -> Callable[[], Model]:
    return lambda: Model(fn, params(**shapes), inputs)


X = normal(3, 3)
Registry = dict[str, dict[str, Callable[[], Model]]]

ZOO: Registry = {
    "Perceptrons and fields": {
        "multilayer perceptron": of(mlp, X, **mlp_shapes(3, 4, 2)),
        "muP multipliers": of(mup, X, w=(3, 4), readout=(4, 2)),
        "SIREN": of(siren, X, first=layer(3, 4), second=layer(4, 4), out=(4, 2)),
        "random Fourier features": of(fourier_features, X, **mlp_shapes(8, 4, 2)),
        "learned frequencies": of(learned_frequencies, X, frequencies=(3, 4), out=(8, 2)),
        "Kolmogorov-Arnold network": of(kan, X, spline=(3, 4, 2), base=(3, 2)),
        "masked weights (MADE)": of(masked, normal(3, 4), w=(4, 4), b=(4,), out=(4, 4)),
        "low-rank adapter (LoRA), merged": of(low_rank_adapter, X, w=(3, 4), a=(3, 1), b=(1, 4), out=(4, 2)),
        "weight normalisation": of(weight_norm, X, w=(3, 4), g=(4,), out=(4, 2)),
        "spectral normalisation": of(spectral_norm, X, w=(3, 4), out=(4, 2)),
        "straight-through quantisation": of(quantised, X, w=(3, 4), out=(4, 2)),
        "variational weights": of(variational, X, mean=(3, 4), rho=(3, 4), out=(4, 2)),
        "ensemble by vmap": of(ensemble, X, first={"w": (2, 3, 4), "b": (2, 4)}, last={"w": (2, 4, 2), "b": (2, 2)}),
        "hypernetwork": of(hypernetwork, TASK, **mlp_shapes(3, 4, 6)),
        "FiLM conditioning": of(film, TASK, condition=layer(3, 8), **F),
        "deep operator network": of(
            deep_operator,
            {"u": normal(3, 5), "y": normal(3, 2, 2)},
            branch=mlp_shapes(5, 4, 3),
            trunk=mlp_shapes(2, 4, 3),
            bias=(),
        ),
    },
    "Images": {
        "convolutional network": of(cnn, IMAGES, w1=(3, 3, 2, 3), b1=(3,), w2=(3, 3, 3, 2), head=layer(8, 2)),
        "depthwise and grouped convolutions": of(
            separable, IMAGES, depthwise=(3, 3, 1, 2), pointwise=(2, 4), b=(4,), grouped=(1, 1, 2, 4)
        ),
        "transposed convolution": of(upsampling, IMAGES, down=(3, 3, 2, 3), up=(2, 2, 3, 2)),
        "residual block with normalisation": of(
            residual, IMAGES, stem=(1, 1, 2, 3), scale=(3,), shift=(3,), w=(3, 3, 3, 3), head=(3, 2)
        ),
        "weight standardisation": of(standardised, IMAGES, w=(3, 3, 2, 3), head=(3, 2)),
        "squeeze and excitation": of(squeeze_excite, IMAGES, w=(3, 3, 2, 3), gate=mlp_shapes(3, 2, 3)),
        "vision transformer, class token": of(
            vit, IMAGES, patch=(8, 4), position=(5, 4), qkv=(4, 12), out=(4, 4), head=(4, 2), **{"class": (4,)}
        ),
        "masked autoencoder": of(mae, SEQUENCES, encoder=layer(4, 3), decoder=layer(3, 2), **{"mask token": (3,)}),
    },
    "Sequences": {
        "decoder: grouped queries, RoPE, SwiGLU, tied head": of(
            decoder,
            tokens(3, 4),
            embed=(5, 4),
            scale=(4,),
            q=(4, 4),
            kv=(4, 4),
            o=(4, 4),
            gate=(4, 3),
            up=(4, 3),
            down=(3, 4),
        ),
        "scanned blocks, rematerialised": of(
            scanned,
            X,
            blocks={"first": {"w": (3, 3, 4), "b": (3, 4)}, "last": {"w": (3, 4, 3), "b": (3, 3)}},
            head=(3, 2),
        ),
        "recurrent network, learned first state": of(
            rnn, SEQUENCES, again=(3, 3), b=(3,), head=(3, 2), **{"in": (4, 3), "first state": (3,)}
        ),
        "GRU": of(
            gru,
            SEQUENCES,
            gates=(4, 6),
            b=(6,),
            new=(4, 3),
            head=(3, 2),
            **{"state gates": (3, 6), "state new": (3, 3)},
        ),
        "LSTM": of(lstm, SEQUENCES, w=(7, 12), b=(12,), head=(3, 2)),
        "minimal GRU": of(minimal_rnn, SEQUENCES, gate=(4, 3), new=(4, 3), head=(3, 2)),
        "complex state space (S5, LRU)": of(
            state_space,
            SEQUENCES,
            d=(4,),
            frequency=(3,),
            head=(4, 2),
            **{"log decay": (3,), "b real": (4, 3), "b imag": (4, 3), "c real": (3, 4), "c imag": (3, 4)},
        ),
        "selective state space (Mamba)": of(
            selective, SEQUENCES, step=layer(4, 4), a=(4, 2), b=(4, 2), c=(4, 2), d=(4,)
        ),
        "linear attention": of(linear_attention, SEQUENCES, q=(4, 3), k=(4, 3), v=(4, 3), out=(3, 2)),
        "mixture of experts, dense": of(mixture, X, router=(3, 2), b=(2, 4), out=(2, 4, 2), **{"in": (2, 3, 4)}),
        "mixture of experts, adapters merged": of(adapted_experts, X, a=(2, 3, 1), b=(2, 1, 4), w=(2, 3, 4)),
        "mixture of experts, by switch": of(
            switch_mixture, X, router=(3, 2), a=mlp_shapes(3, 4, 2), b=mlp_shapes(3, 4, 2)
        ),
        "mixture of experts, ragged_dot": of(routed, SEQUENCES, router=(4, 2), out=(2, 3, 2), **{"in": (2, 4, 3)}),
        "embedding bag": of(embedding_bag, tokens(3, 4), table=(5, 3), out=(3, 2)),
    },
    "Sets and graphs": {
        "deep sets": of(deep_sets, SEQUENCES, inner=mlp_shapes(4, 3, 3), outer=mlp_shapes(3, 3, 2)),
        "set transformer, learned seeds": of(
            set_transformer, SEQUENCES, seed=(2, 3), q=(3, 3), k=(4, 3), v=(4, 3), out=(6, 2)
        ),
        "Perceiver, latent array": of(perceiver, SEQUENCES, latents=(2, 3), q=(3, 3), k=(4, 3), v=(4, 3), out=(3, 2)),
        "message passing by segment_sum": of(
            message_passing,
            {"nodes": SEQUENCES, "edges": EDGES},
            message=layer(8, 3),
            self=(4, 3),
            out=(3, 2),
        ),
        "graph attention": of(
            graph_attention,
            {"nodes": SEQUENCES, "adjacent": normal(3, 4, 4, seed=3) > 0},
            to=(3,),
            w=(4, 3),
            **{"from": (3,)},
        ),
        "matrix factorisation": of(factorisation, tokens(3, 2), users=(5, 3), items=(5, 3), **{"user bias": (5,)}),
    },
    "Dynamics, derivatives and densities": {
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
    },
    "Control flow and derivatives of one's own": {
        "lax.cond on data": of(gated, X, a=mlp_shapes(3, 4, 2), b=(3, 2)),
        "lax.cond on a loop's counter": of(
            hybrid,
            X,
            blocks={"first": {"w": (3, 3, 4), "b": (3, 4)}, "last": {"w": (3, 4, 3), "b": (3, 3)}},
            out=(3, 2),
        ),
        "custom_vjp around a layer": of(own_backward, X, w=(4, 3), first=(3, 4), out=(3, 2)),
        "custom_jvp activation": of(own_activation, X, **F),
    },
    "Modules": {"Flax transformer block": flax_block, "Equinox GRU cell": equinox_gru},
}
