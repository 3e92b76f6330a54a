"""Recurrent layers as scans over positions. The inputs' part of the gates is computed outside: one large product."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from torch_bridge.aten.dropout import keep
from torch_bridge.aten.linear import linear
from torch_bridge.aten.registry import aten

State = tuple[Array, ...]
Cell = Callable[[Array, State, Callable[[Array], Array]], State]
"""The new state from the input's part of the gates, the old state, and the hidden state's part of the gates."""


def _lstm(gates: Array, state: State, recur: Callable[[Array], Array]) -> State:
    i, f, g, o = jnp.split(gates + recur(state[0]), 4, axis=-1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(gates: Array, state: State, recur: Callable[[Array], Array]) -> State:
    (h,) = state
    (r, z, n), (hr, hz, hn) = jnp.split(gates, 3, axis=-1), jnp.split(recur(h), 3, axis=-1)
    z = jax.nn.sigmoid(z + hz)
    new = jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn)
    return ((h - new) * z + new,)


def _rnn(activation: Callable[[Array], Array]) -> Cell:
    return lambda gates, state, recur: (activation(gates + recur(state[0])),)


CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _rnn(jnp.tanh),
    "rnn_relu": _rnn(jax.nn.relu),
}


def _direction(cell: Cell, x: Array, state: State, weights: Sequence[Array], reverse: bool) -> tuple[Array, State]:
    """One direction of one layer: the outputs `[S, N, H]` and the last state."""
    w_in, w_rec, *rest = weights
    projection = rest.pop() if len(rest) % 2 else None
    b_in, b_rec = rest or (None, None)
    gates = linear(x, w_in, b_in)

    def step(state: State, gates: Array) -> tuple[State, Array]:
        h, *others = cell(gates, state, lambda h: linear(h, w_rec, b_rec))
        h = h if projection is None else linear(h, projection)
        return (h, *others), h

    last, outputs = lax.scan(step, state, gates, reverse=reverse)
    return outputs, last


def _layers(
    cell: Cell,
    x: Array,
    states: Sequence[Array],
    params: Sequence[Array],
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    key: Array | None,
) -> tuple[Array, ...]:
    if batch_first:
        x = jnp.swapaxes(x, 0, 1)
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    weights: Iterator[Sequence[Array]] = iter([params[i : i + each] for i in range(0, len(params), each)])
    finals: list[State] = []
    for layer in range(num_layers):
        if layer:
            x = keep(x, dropout, train, x.shape, None if key is None else jax.random.fold_in(key, layer))
        outputs = []
        for direction in range(directions):
            state = tuple(s[layer * directions + direction] for s in states)
            y, final = _direction(cell, x, state, next(weights), bool(direction))
            outputs.append(y)
            finals.append(final)
        x = outputs[0] if directions == 1 else jnp.concatenate(outputs, axis=-1)
    last = [jnp.stack(parts) for parts in zip(*finals, strict=True)]
    return (jnp.swapaxes(x, 0, 1) if batch_first else x), *last


def _recurrent(cell: Cell) -> Callable[..., tuple[Array, ...]]:
    def run(
        x: Array, hidden: Any, params: Any, has_biases: Any, *rest: Any, dropout_key: Array | None = None
    ) -> tuple[Array, ...]:
        if isinstance(has_biases, list | tuple):
            raise NotImplementedError("packed sequences are not supported: pad them, and mask the loss")
        states = list(hidden) if isinstance(hidden, list | tuple) else [hidden]
        return _layers(cell, x, states, params, *(*rest, dropout_key))

    return run


def _cell(cell: Cell, x: Array, hidden: Any, w_in: Array, w_rec: Array, b_in: Any = None, b_rec: Any = None) -> Any:
    state = tuple(hidden) if isinstance(hidden, list | tuple) else (hidden,)
    new = cell(linear(x, w_in, b_in), state, lambda h: linear(h, w_rec, b_rec))
    return new if len(new) > 1 else new[0]


for _name, _function in CELLS.items():
    aten(_name)(_recurrent(_function))
    aten(f"{_name}_cell")(lambda *args, cell=_function: _cell(cell, *args))
