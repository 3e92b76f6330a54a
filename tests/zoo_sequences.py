"""Networks for sequences, sets and graphs, each in a few lines."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from zoo_layers import SEQUENCES, Models, X, attend, dense, layer, mlp, mlp_shapes, norm, normal, of, tokens

# Sequences. -----------------------------------------------------------------------------------------------------------


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


SEQUENCE_MODELS: Models = {
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
    "selective state space (Mamba)": of(selective, SEQUENCES, step=layer(4, 4), a=(4, 2), b=(4, 2), c=(4, 2), d=(4,)),
    "linear attention": of(linear_attention, SEQUENCES, q=(4, 3), k=(4, 3), v=(4, 3), out=(3, 2)),
    "mixture of experts, dense": of(mixture, X, router=(3, 2), b=(2, 4), out=(2, 4, 2), **{"in": (2, 3, 4)}),
    "mixture of experts, adapters merged": of(adapted_experts, X, a=(2, 3, 1), b=(2, 1, 4), w=(2, 3, 4)),
    "mixture of experts, by switch": of(switch_mixture, X, router=(3, 2), a=mlp_shapes(3, 4, 2), b=mlp_shapes(3, 4, 2)),
    "mixture of experts, ragged_dot": of(routed, SEQUENCES, router=(4, 2), out=(2, 3, 2), **{"in": (2, 4, 3)}),
    "embedding bag": of(embedding_bag, tokens(3, 4), table=(5, 3), out=(3, 2)),
}


# Sets and graphs. -----------------------------------------------------------------------------------------------------


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


def factorisation(p: Any, x: jax.Array) -> jax.Array:
    users, items = p["users"][x[:, 0]], p["items"][x[:, 1]]
    return (users * items).sum(-1, keepdims=True) + p["user bias"][x[:, 0], None]


EDGES = jnp.stack([tokens(3, 6, high=4), tokens(3, 6, high=4)[:, ::-1]], axis=1)
SETS_AND_GRAPHS: Models = {
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
}
