"""Labels are drawn with their probabilities, the small ones too, from one random word each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggn_jax
from ggn_jax import BCEWithLogitsLoss, CrossEntropyLoss, make_batch_grad_output_fn, make_grad_output_fn
from ggn_jax._draws import LARGE, draw_class, to_fixed_point, uniform_below
from ggn_jax.kronecker.vectors import make_vector_fn
from ggn_jax.terms import split_terms


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


@pytest.mark.parametrize("classes", [2, 7, 65, 1000])
@pytest.mark.by_default("65", "2")
def test_probabilities(classes: int) -> None:
    logits = np.random.default_rng(classes).uniform(-1, 1, size=classes)
    p = np.exp(logits) / np.exp(logits).sum()
    assert_chi_squared(np.bincount(drawn_classes(logits, 20_000), minlength=classes), p)


@pytest.mark.sweep
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
@pytest.mark.by_default("CrossEntropyLoss")
def test_keys(loss: ggn_jax.Loss) -> None:
    """Typed and raw keys; equal keys, equal draws; one shared key under vmap, the same draws for every example."""
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


def descend(masses: list[int], rest: int) -> int:
    """The class that a plain descent finds: an entry of a level is the sum of two, half a level apart, of the last."""
    levels = [masses]
    while len(levels[-1]) > 1:
        half = (len(levels[-1]) + 1) // 2
        right = [*levels[-1][half:], 0][:half]
        levels.append([a + b for a, b in zip(levels[-1][:half], right, strict=True)])
    index = 0
    for level in reversed(levels[:-1]):
        if rest >= level[index]:
            rest, index = rest - level[index], index + (len(level) + 1) // 2
    return index


@pytest.mark.parametrize("classes", [1, 5, LARGE, LARGE + 1, 300, 511, 513, 4099])
@pytest.mark.by_default("256", "257", "1")
def test_levels_that_are_skipped_change_no_label(classes: int) -> None:
    rng = np.random.default_rng(classes)
    p = np.where(rng.uniform(size=classes) < 0.7, rng.exponential(size=classes), 0) + 1e-9
    p = jnp.asarray(p / p.sum(), jnp.float32)
    units = np.asarray(to_fixed_point(p)).tolist()
    words = np.asarray([0, 1, 2**32 - 1, *rng.integers(2**32, size=200)], np.uint32)
    rests = np.asarray(uniform_below(jnp.asarray(words), jnp.asarray(sum(units), jnp.uint32))).tolist()
    labels = jax.jit(jax.vmap(draw_class, in_axes=(0, None)))(jnp.asarray(words), p)
    assert labels.tolist() == [descend(units, rest) for rest in rests]


@pytest.mark.parametrize("classes", [7, 1000])
@pytest.mark.by_default("7")
def test_labels_of_several_positions(classes: int) -> None:
    """Positions that follow the classes, probabilities that are a factor away: as each by itself."""
    p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (classes, 3, 2), "float32"), axis=0)
    words = jax.random.bits(jax.random.key(1), (3, 2), jnp.uint32)
    labels = draw_class(words, 4 * p, jnp.full((1, 3, 2), 0.25, "float32"))
    words, p, one = np.asarray(words), np.asarray(p), jax.jit(draw_class)
    for i in range(3):
        for j in range(2):
            assert labels[i, j] == one(words[i, j], p[:, i, j])


@pytest.mark.parametrize("loss", [ggn_jax.MSELoss(), CrossEntropyLoss()], ids=lambda x: type(x).__name__)
@pytest.mark.by_default("MSELoss")
def test_one_sample_at_a_time(loss: ggn_jax.Loss) -> None:
    """What is back-propagated for some of the samples are these of all vectors."""
    outputs = jax.random.normal(jax.random.key(0), (4, 3, 2))
    targets = jnp.zeros((4, 2), int) if isinstance(loss, CrossEntropyLoss) else jnp.zeros((4, 3, 2))
    terms = split_terms(loss, outputs, targets, batch=True)
    keys = jax.random.split(jax.random.key(5), 4)
    make = make_vector_fn(terms, ggn_jax.FisherType.MC, 5, "exact", keys)
    vectors = make_batch_grad_output_fn(loss, "mc", 5)(outputs, targets, jax.random.key(5))
    np.testing.assert_allclose(make(jnp.asarray([3, 0])), vectors[jnp.asarray([3, 0])], rtol=1e-14)
