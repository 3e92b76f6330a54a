"""Which parameters an array holds: index maps against NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggn_jax.layers.index_map import IndexMap


@st.composite
def views(draw: st.DrawFn) -> tuple[IndexMap, np.ndarray]:
    """A map and the array of numbers that NumPy makes of the same moves."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    offset = draw(st.integers(0, 5))
    entries = IndexMap.contiguous(shape, offset)
    array = offset + np.arange(entries.size).reshape(shape)
    for move in draw(st.lists(st.sampled_from(["reshape", "transpose", "slice", "flip"]), max_size=5)):
        if move == "reshape":
            new, rest = [], array.size
            while rest > 1:
                new.append(draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0])))
                rest //= new[-1]
            entries, array = entries.reshape(tuple(new)), array.reshape(new)
        elif move == "transpose":
            axes = draw(st.permutations(range(array.ndim)))
            entries, array = entries.transpose(tuple(axes)), array.transpose(axes)
        elif move == "slice":
            starts = tuple(draw(st.integers(0, n - 1)) for n in array.shape)
            stops = tuple(draw(st.integers(a + 1, n)) for a, n in zip(starts, array.shape, strict=True))
            steps = tuple(draw(st.sampled_from([1, 1, 2])) for _ in starts)
            entries, array = entries.slice(starts, stops, steps), array[tuple(map(slice, starts, stops, steps))]
        elif array.ndim:
            axis = draw(st.integers(0, array.ndim - 1))
            entries, array = entries.flip((axis,)), np.flip(array, axis)
    return entries, array


@settings(max_examples=100, deadline=None)
@given(views())
def test_index_maps_follow_numpy(view: tuple[IndexMap, np.ndarray]) -> None:
    entries, array = view
    np.testing.assert_array_equal(entries.indices(), array)
    assert entries.is_injective()


def check_reader(view: tuple[IndexMap, np.ndarray], more: int) -> None:
    entries, array = view
    flat = np.arange(int(array.max()) + 1 + more)
    np.testing.assert_array_equal(jax.jit(entries.gather_fn(flat.size))(flat), array)


# Each is compiled anew.
@settings(max_examples=15, deadline=None)
@given(views(), st.integers(0, 3))
def test_readers_read_what_index_maps_say(view: tuple[IndexMap, np.ndarray], more: int) -> None:
    check_reader(view, more)


@pytest.mark.sweep
@settings(max_examples=100, deadline=None)
@given(views(), st.integers(0, 3))
def test_more_readers(view: tuple[IndexMap, np.ndarray], more: int) -> None:
    check_reader(view, more)
