"""When the optimizer computes factors and inverses anew."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
from optimizer_cases import (
    CE,
    batch_of,
    gradient,
    mlp,
    mlp_params,
)

import ggn_jax
from ggn_jax.optimizer.inverse_updates import balance_load


def test_intervals() -> None:
    params, batch = mlp_params(), batch_of()
    schedule = lambda count: 0.1 / (1 + count.astype(float))  # noqa: E731  # so that each renewal shows
    scale = ggn_jax.scale_by_kfac(
        mlp, CE, example_inputs=batch[0], damping=schedule, factor_interval=2, inverse_interval=6
    )
    state, changed = scale.init(params), []
    grads = gradient(mlp, CE, params, batch)
    update = jax.jit(scale.update)
    for t in range(14):
        _, new = update(grads, state, params, batch=batch, key=jax.random.key(t))
        same = [
            all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
            for a, b in zip(state.curvature[-2:], new.curvature[-2:], strict=True)
        ]
        changed.append((not same[0], not same[1]))
        state = new
    assert [t for t in range(14) if changed[t][0]] == [0, 2, 4, 6, 8, 10, 12]
    assert [t for t in range(14) if changed[t][1]] == [0, 1, 2, 4, 6, 12]


def test_staggered_inverses_are_all_renewed_in_turn() -> None:
    params, batch = mlp_params(), batch_of(40)  # of so many, labels drawn with other keys differ
    make = partial(ggn_jax.scale_by_kfac, mlp, CE, example_inputs=batch[0], decay=0.0)
    staggered, plain = make(staggered=True, inverse_interval=2), make(inverse_interval=1)
    state, renewed = staggered.init(params), []
    grads = gradient(mlp, CE, params, batch)
    for t in range(4):
        _, new = jax.jit(staggered.update)(grads, state, params, batch=batch, key=jax.random.key(t))
        _, fresh = jax.jit(plain.update)(grads, plain.init(params), params, batch=batch, key=jax.random.key(t))
        renewed.append(
            [
                all(np.allclose(a[side][0], b[side][0], rtol=1e-12) for side in ("a", "b"))
                for a, b in zip(new.curvature.inverses, fresh.curvature.inverses, strict=True)
            ]
        )
        state = new
    assert renewed[0] == [True, True]
    assert [sum(step) for step in renewed[1:]] == [1, 1, 1]
    assert renewed[1] == renewed[3] != renewed[2]


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.integers(0, 10**6), max_size=12), st.integers(1, 6))
def test_turns_hold_everything_once(costs: list[int], turns: int) -> None:
    found = balance_load(costs, turns)
    assert len(found) == turns
    assert sorted(i for turn in found for i in turn) == list(range(len(costs)))
    loads = [sum(costs[i] for i in turn) for turn in found]
    assert max(loads) <= sum(costs) / turns + max(costs, default=0)
