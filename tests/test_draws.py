"""Labels are drawn with their probabilities, the small ones too, from one random word each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggn_jax
from ggn_jax import BCEWithLogitsLoss, CrossEntropyLoss, make_batch_grad_output_fn, make_grad_output_fn
from ggn_jax._draws import draw_class, uniform_below


def drawn_classes(logits: np.ndarray, num: int, dtype: str = "float32") -> np.ndarray:
    """The labels behind the drawn vectors: the only negative entry of `p - onehot`."""
    sample = ggn_jax.make_grad_output_sampler(CrossEntropyLoss(reduction="sum"))
    labels = jax.jit(lambda f, key: jnp.argmin(sample(f, num, jnp.asarray(0), key), axis=1))
    return np.asarray(labels(jnp.asarray(logits, dtype), jax.random.key(0)))


def assert_chi_squared(counts: np.ndarray, p: np.ndarray) -> None:
    """Pearson's statistic is its mean up to 6 standard deviations: `K - 1` and `sqrt(2 (K - 1))`."""
    expected = counts.sum() * p
    assert expected.min() >= 5, "too few draws for the statistic"
    statistic, df = ((counts - expected) ** 2 / expected).sum(), len(p) - 1
    assert abs(statistic - df) < 6 * np.sqrt(2 * df) + 18


@pytest.mark.parametrize("classes", [2, 3, 7, 64, 65, 1000])
def test_probabilities(classes: int) -> None:
    logits = np.random.default_rng(classes).uniform(-1, 1, size=classes)
    p = np.exp(logits) / np.exp(logits).sum()
    assert_chi_squared(np.bincount(drawn_classes(logits, 20_000), minlength=classes), p)


def test_fifty_thousand_classes_behind_one_that_dominates() -> None:
    """The tail has 1 % of the mass, 2e-7 a class: two steps of a float32 uniform."""
    classes, words = 50_000, 2_000_000
    p = np.full(classes, 0.01 / (classes - 1))
    p[123] = 0.99
    key = jax.random.key(7)

    def block(key: jax.Array) -> jax.Array:
        word = jax.random.bits(key, (words // 20,), jnp.uint32)
        return jax.vmap(draw_class, in_axes=(0, None))(word, jnp.asarray(p, jnp.float32))

    labels = np.asarray(jax.lax.map(jax.jit(block), jax.random.split(key, 20))).ravel()
    assert_chi_squared(np.array([(labels == 123).sum(), (labels != 123).sum()]), np.array([0.99, 0.01]))
    tail = labels[labels != 123]
    # 100 groups of neighbours, and residues: steps of the CDF would favour some.
    others = np.where(tail > 123, tail - 1, tail)
    assert_chi_squared(np.bincount(others * 100 // (classes - 1), minlength=100), np.full(100, 0.01))
    residues = np.bincount(others % 16, minlength=16)
    assert_chi_squared(residues, np.bincount(np.arange(classes - 1) % 16) / (classes - 1))


def test_probability_zero_is_never_drawn() -> None:
    """The search's edges: the first and the last word, with classes of mass zero all around."""
    p = jnp.asarray([0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0], jnp.float32)
    words = jnp.asarray([0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], jnp.uint32)
    labels = jax.vmap(draw_class, in_axes=(0, None))(words, p)
    assert sorted(set(labels.tolist())) == [2, 4]


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**32 - 1))
def test_uniform_below(word: int, total: int) -> None:
    got = int(uniform_below(jnp.asarray(word, jnp.uint32), jnp.asarray(total, jnp.uint32)))
    assert 0 <= word * total // 2**32 - got <= 2
    assert 0 <= got < total


def test_bernoulli_tails() -> None:
    """p(1) = sigmoid(-12) = 6e-6; a float32 uniform's steps would be 2 % of it."""
    logit = -12.0
    sample = ggn_jax.make_grad_output_sampler(BCEWithLogitsLoss(reduction="sum"))
    outputs = jnp.full((2000,), logit, jnp.float32)
    g = jax.jit(lambda key: sample(outputs, 1000, jnp.zeros(2000, jnp.float32), key))(jax.random.key(0))
    ones, p = int((g < 0).sum()), 1 / (1 + np.exp(-logit))
    assert abs(ones - 2_000_000 * p) < 6 * np.sqrt(2_000_000 * p)


def test_one_random_word_per_label() -> None:
    """Not one per class: the compiled function holds no random array of the classes' size."""
    fn = make_batch_grad_output_fn(CrossEntropyLoss(), "mc", 10)
    f, y = jnp.zeros((16, 1000), jnp.float32), jnp.zeros(16, jnp.int32)
    text = jax.jit(fn).lower(f, y, jax.random.key(0)).as_text()
    assert "10x16x1000xui32" not in text
    assert "16x10x1000xui32" not in text


@pytest.mark.parametrize(
    "loss", [ggn_jax.MSELoss(), CrossEntropyLoss(), BCEWithLogitsLoss()], ids=lambda x: type(x).__name__
)
def test_keys(loss: ggn_jax.Loss) -> None:
    """Typed and raw keys; equal keys, equal draws; one shared key under vmap, the same draws for every datum."""
    outputs = jnp.zeros((4, 3))
    targets = jnp.zeros(4, int) if isinstance(loss, CrossEntropyLoss) else jnp.zeros((4, 3))
    for make, args in (
        (make_batch_grad_output_fn, (outputs, targets)),
        (make_grad_output_fn, (outputs[0], targets[0])),
    ):
        fn = make(loss, "mc", 40)
        typed = fn(*args, jax.random.key(5))
        np.testing.assert_array_equal(typed, fn(*args, jax.random.PRNGKey(5)))
        np.testing.assert_array_equal(typed, fn(*args, key=np.asarray(jax.random.PRNGKey(5))))
        names = ("outputs", "targets") if make is make_batch_grad_output_fn else ("output", "target")
        np.testing.assert_array_equal(typed, fn(**dict(zip(names, args, strict=True)), key=jax.random.key(5)))
        assert (typed != fn(*args, jax.random.key(6))).any()
    batched = make_batch_grad_output_fn(loss, "mc", 40)(outputs, targets, jax.random.key(5))
    assert all((batched[:, 0] != batched[:, n]).any() for n in range(1, 4))
    fn = make_grad_output_fn(loss, "mc", 40)
    shared = jax.vmap(fn, in_axes=(0, 0, None))(outputs, targets, jax.random.key(5))
    np.testing.assert_array_equal(shared[0], shared[1])
