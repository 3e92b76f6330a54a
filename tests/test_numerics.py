"""Low precision and extreme logits, against 60-digit arithmetic; finite everywhere."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from designs import covering
from hypothesis import given
from hypothesis import strategies as st

import ggn_jax
from ggn_jax import BCEWithLogitsLoss, CrossEntropyLoss, LossHessian, MSELoss, loss_hessian_matrix_sqrt

DTYPES = ["float16", "bfloat16", "float32", "float64"]
ACCURATE = ["float16", pytest.param("bfloat16", marks=pytest.mark.sweep), "float32", "float64"]
mpmath.mp.dps = 60


def exact_softmax_hessian(f: np.ndarray) -> np.ndarray:
    e = [mpmath.exp(mpmath.mpf(float(x))) for x in f]
    total = sum(e)
    p = [x / total for x in e]
    # 1 - p as a sum, which is exact here anyway.
    entry = lambda i, j: p[i] * (total - e[i]) / total if i == j else -p[i] * p[j]  # noqa: E731
    return np.array([[entry(i, j) for j in range(len(f))] for i in range(len(f))])


def assert_relatively_close(got: np.ndarray, want: np.ndarray, dtype: str, ulps: float) -> None:
    """Relative error of each entry that is a normal number of `dtype`, in units of its rounding."""
    info = jnp.finfo(dtype)
    for g, w in zip(np.asarray(got, np.float64).ravel(), want.ravel(), strict=True):
        if abs(w) > 16 * float(info.tiny):
            assert abs(g - w) <= ulps * float(info.eps) * abs(w), (g, mpmath.nstr(w), dtype)
        else:
            assert abs(g) <= 32 * float(info.tiny)


LOGITS = {
    "moderate": [1.0, -0.5, 0.25, 2.0],
    "confident": [20.0, 0.0, 3.0, -5.0],
    "very confident": [60.0, 0.0, 10.0, 25.0],
    "ties at the top": [30.0, 30.0, 0.0, -3.0],
    "large and equal": [1e4, 1e4, 1e4, 9999.0],
    "extreme": [1e4, -1e4, 0.0, 5.0],
    "all zero": [0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("dtype", ACCURATE)
@pytest.mark.parametrize("name", LOGITS)
def test_cross_entropy_keeps_relative_accuracy(name: str, dtype: str) -> None:
    """The textbook `p (1 - p)` has no correct digit from a logit gap of 17 on in float32."""
    f = jnp.asarray(LOGITS[name], dtype)
    want = exact_softmax_hessian(np.asarray(f, np.float64))
    loss = CrossEntropyLoss(reduction="sum")
    sqrt = loss_hessian_matrix_sqrt(f, jnp.asarray(1), loss)
    assert sqrt.dtype == dtype
    assert jnp.isfinite(sqrt).all()
    gram = np.asarray(sqrt, np.float64) @ np.asarray(sqrt, np.float64).T
    # Entries of the product are sums of terms of both signs off the diagonal: relative to the exact square roots.
    root = np.sqrt(np.diag(want).astype(object).astype(np.float64))
    ulps = 40 if dtype in ("float32", "float64") else 8
    error = np.abs(gram - want.astype(np.float64))
    tiny = float(jnp.finfo(dtype).tiny)
    np.testing.assert_array_less(error, ulps * float(jnp.finfo(dtype).eps) * np.outer(root, root) + 64 * tiny + 1e-300)
    diagonal = LossHessian(loss, f, jnp.asarray(1), batch=False).diagonal()
    assert diagonal.dtype == dtype
    assert_relatively_close(diagonal, np.diag(want), dtype, ulps)


@pytest.mark.parametrize("dtype", ACCURATE)
def test_products_keep_relative_accuracy(dtype: str) -> None:
    loss = CrossEntropyLoss(reduction="sum")
    for logits in LOGITS.values():
        f = jnp.asarray(logits, dtype)
        want = exact_softmax_hessian(np.asarray(f, np.float64))
        hessian = LossHessian(loss, f, jnp.asarray(0), batch=False)
        for i in range(4):
            unit = jnp.zeros(4, dtype).at[i].set(1)
            assert_relatively_close(hessian.mv(unit), want[:, i], dtype, 60)


@pytest.mark.parametrize("dtype", ACCURATE)
@pytest.mark.parametrize("logit", [0.0, 1.0, -3.0, 6.25, 10.0, -16.75, 30.0, 80.0, -80.0, 1e4, -1e4])
def test_binary_cross_entropy_keeps_relative_accuracy(logit: float, dtype: str) -> None:
    f = jnp.asarray(logit, dtype)
    e = mpmath.exp(-abs(mpmath.mpf(float(f))))
    want = np.array([e / (1 + e) ** 2])
    loss = BCEWithLogitsLoss(reduction="sum")
    hessian = LossHessian(loss, f, jnp.asarray(1.0, dtype), batch=False)
    assert hessian.trace().dtype == dtype
    assert_relatively_close(hessian.diagonal()[None], want, dtype, 40)
    sqrt = ggn_jax.loss_hessian_matrix_sqrt(f, jnp.asarray(1.0, dtype), loss)
    assert_relatively_close(np.asarray(sqrt, np.float64)[None] ** 2, want, dtype, 40)


@covering(
    2,
    loss=[MSELoss(), CrossEntropyLoss(), BCEWithLogitsLoss()],
    fisher_type=["type-2", "mc", "empirical"],
    dtype=DTYPES,
    ids=lambda x: None if isinstance(x, str) else type(x).__name__,
)
@pytest.mark.by_default(
    "CrossEntropyLoss-mc-bfloat16",
    "MSELoss-type-2-float16",
    "BCEWithLogitsLoss-empirical-float32",
)
def test_extreme_outputs_are_finite(loss: ggn_jax.Loss, fisher_type: str, dtype: str) -> None:
    outputs = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4]], dtype)
    targets = jnp.asarray([0, 1, 2]) if isinstance(loss, CrossEntropyLoss) else jnp.ones((3, 3), dtype)
    vectors = ggn_jax.make_batch_grad_output_fn(loss, fisher_type, 5)(outputs, targets, jax.random.key(0))
    assert vectors.dtype == dtype
    assert jnp.isfinite(vectors).all()
    # Squared errors of 1e8 do not fit float16; the value of the loss then is what torch's is: infinity.
    if not (dtype == "float16" and isinstance(loss, MSELoss)):
        assert jnp.isfinite(loss(outputs, targets))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_low_precision_is_the_rounded_result(fisher_type: str, dtype: str) -> None:
    """Internals are float32: results are those of float32 inputs, rounded once."""
    f = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 2)) * 3, dtype)
    y = jax.device_put(np.random.default_rng(1).integers(5, size=(6, 2)))
    fn = ggn_jax.make_batch_grad_output_fn(CrossEntropyLoss(label_smoothing=0.1), fisher_type, 3)
    low, high = fn(f, y, jax.random.key(0)), fn(f.astype("float32"), y, jax.random.key(0))
    np.testing.assert_array_equal(low, high.astype(dtype))


def test_masked_logits_of_minus_infinity() -> None:
    """Classes masked out by -inf have probability 0, not NaN."""
    f = jnp.asarray([[1.0, -jnp.inf, 2.0]])
    full = jnp.asarray([[1.0, 2.0]])
    loss = CrossEntropyLoss(reduction="sum")
    y, t = jnp.asarray([0]), jnp.asarray([[0.5, 0.0, 0.5]])
    for targets, reduced in ((y, y), (t, t[:, ::2])):
        np.testing.assert_allclose(loss(f, targets), loss(full, reduced), rtol=1e-14)
        for kind in ("type-2", "empirical"):
            got = ggn_jax.make_batch_grad_output_fn(loss, kind)(f, targets)
            want = ggn_jax.make_batch_grad_output_fn(loss, kind)(full, reduced)
            np.testing.assert_allclose(got[::2][..., ::2] if kind == "type-2" else got[..., ::2], want, rtol=1e-14)
            np.testing.assert_array_equal(got[..., 1], 0)
        drawn = ggn_jax.make_batch_grad_output_fn(loss, "mc", 100)(f, targets, jax.random.key(0))
        np.testing.assert_array_equal(drawn[..., 1], 0)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_ignored_positions_may_hold_anything(garbage: float) -> None:
    rng = np.random.default_rng(0)
    clean = jax.device_put(rng.normal(size=(3, 4, 5)))
    y = jax.device_put(rng.integers(4, size=(3, 5))).at[1, 2].set(-100)
    dirty = clean.at[1, :, 2].set(garbage)
    loss = CrossEntropyLoss(label_smoothing=0.2)
    np.testing.assert_array_equal(loss(dirty, y), loss(clean, y))
    np.testing.assert_array_equal(jax.grad(loss)(dirty, y), jax.grad(loss)(clean, y))
    v = jax.device_put(rng.normal(size=clean.shape))
    products = [jax.jvp(jax.grad(lambda f: loss(f, y)), (f,), (v,))[1] for f in (dirty, clean)]
    np.testing.assert_array_equal(*products)
    np.testing.assert_array_equal(*[LossHessian(loss, f, y).mv(v) for f in (dirty, clean)])
    for kind in ("type-2", "mc", "empirical"):
        fn = ggn_jax.make_batch_grad_output_fn(loss, kind, 3)
        np.testing.assert_array_equal(fn(dirty, y, jax.random.key(0)), fn(clean, y, jax.random.key(0)))


def test_everything_ignored_is_zero() -> None:
    f, y = jnp.ones((2, 3, 4)), jnp.full((2, 4), -100)
    for loss in (CrossEntropyLoss(), CrossEntropyLoss(jnp.ones(3), label_smoothing=0.1)):
        assert loss(f, y) == 0
        np.testing.assert_array_equal(jax.grad(loss)(f, y), 0)
        for kind in ("type-2", "mc", "empirical"):
            np.testing.assert_array_equal(ggn_jax.make_batch_grad_output_fn(loss, kind)(f, y, jax.random.key(0)), 0)
        assert LossHessian(loss, f, y).trace() == 0


@functools.cache
def derivatives(loss: ggn_jax.Loss) -> Any:
    """Of a loss at outputs, a function of these: each derivative as it is found, and as it should be."""
    y = jnp.asarray([1]) if isinstance(loss, CrossEntropyLoss) else jnp.asarray([[0.0, 1.0, 0.5]])
    v = jnp.asarray([[0.3, -1.0, 2.0]])

    def plain(f: jax.Array) -> jax.Array:
        if isinstance(loss, CrossEntropyLoss):
            t = 0.8 * jnp.asarray([0.0, 1.0, 0.0]) + 0.2 / 3
            return -jnp.sum(t * jax.nn.log_softmax(f[0]))
        if isinstance(loss, MSELoss):
            return jnp.mean((f - y) ** 2)
        return jnp.mean(2.5 * y * jax.nn.softplus(-f) + (1 - y) * jax.nn.softplus(f))

    value = lambda f: loss(f, y)  # noqa: E731
    second = lambda f: jax.jvp(jax.grad(plain), (f,), (v,))[1]  # noqa: E731
    ours = lambda f: LossHessian(loss, f, y).mv(v)  # noqa: E731
    twice = lambda f: LossHessian(loss, f, y).sqrt_mv(LossHessian(loss, f, y).sqrt_rmv(v))  # noqa: E731

    @jax.jit
    def both(f: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        third = jax.jacobian(second)(f)
        return {
            "value": (value(f), plain(f)),
            "gradient": (jax.grad(value)(f), jax.grad(plain)(f)),
            "Hessian": (jax.hessian(value)(f), jax.hessian(plain)(f)),
            "third of mv": (jax.jacobian(ours)(f), third),
            "third of sqrt_mv": (jax.jacobian(twice)(f), third),
            "fourth": tuple(jax.hessian(lambda f, g=g: jnp.vdot(v, g(f)))(f) for g in (ours, second)),
        }

    return both


@given(
    st.sampled_from([MSELoss(), CrossEntropyLoss(label_smoothing=0.2), BCEWithLogitsLoss(pos_weight=2.5)]),
    st.lists(st.sampled_from([0.0, 0.0, 1.0, -2.0, 3.5]), min_size=3, max_size=3),
)
@pytest.mark.sweep
def test_derivatives_of_all_orders(loss: ggn_jax.Loss, logits: list[float]) -> None:
    """Shortcuts for rounding (shifts, absolute values) must not show in derivatives, at ties and at zero either."""
    for name, (got, want) in derivatives(loss)(jnp.asarray(logits)[None]).items():
        tol = 1e-9 if name == "fourth" else 1e-10 if name.startswith("third") else 1e-11
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol / 1000, err_msg=name)


def exact_cross_entropy(f: np.ndarray, u: np.ndarray) -> mpmath.mpf:
    """`-sum u log softmax(f)`."""
    total = sum(mpmath.exp(mpmath.mpf(float(x)) - mpmath.mpf(float(f.max()))) for x in f)
    top = mpmath.mpf(float(f.max()))
    return sum(
        mpmath.mpf(float(m)) * (mpmath.log(total) + top - mpmath.mpf(float(x))) for x, m in zip(f, u, strict=True)
    )


@pytest.mark.parametrize("dtype", ACCURATE)
@pytest.mark.parametrize("name", LOGITS)
def test_value_keeps_relative_accuracy(name: str, dtype: str) -> None:
    """The loss of a confident, correct prediction is e^-40, say: not the logarithm of 1."""
    f = jnp.asarray(LOGITS[name], dtype)
    exact, eps = np.asarray(f, np.float64), float(jnp.finfo(dtype).eps)
    for y in range(4):
        for e in (0.0, 0.25):
            u = (1 - e) * np.eye(4)[y] + e / 4
            want = exact_cross_entropy(exact, u)
            loss = CrossEntropyLoss(reduction="sum", label_smoothing=e)
            for targets in (jnp.asarray([y]), jnp.asarray(np.eye(4)[y][None], dtype)):
                got = loss(f[None], targets)
                assert got.dtype == dtype
                if want < float(jnp.finfo(dtype).max):
                    slack = 20 * eps * abs(want) + 16 * float(jnp.finfo(dtype).tiny)
                    assert abs(float(got) - want) <= slack, (y, e, got, mpmath.nstr(want))


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_classes_without_mass_cost_nothing(smoothing: float) -> None:
    """A class that is masked out by -inf, with weight 0, and smoothing that gives it 0 times that."""
    f, y = jnp.asarray([[1.0, -jnp.inf, 2.0], [0.5, -jnp.inf, -1.0]]), jnp.asarray([0, 2])
    weight = np.asarray([2.0, 0.0, 0.5])
    loss = CrossEntropyLoss(weight, label_smoothing=smoothing, reduction="sum")
    log_p = np.asarray(jax.nn.log_softmax(f[:, ::2]))
    u = weight * ((1 - smoothing) * np.eye(3)[np.asarray(y)] + smoothing / 3)
    want = -np.sum(u[:, ::2] * log_p)
    np.testing.assert_allclose(loss(f, y), want, rtol=1e-14)
    np.testing.assert_allclose(loss(f, jax.device_put(np.eye(3)[np.asarray(y)])), want, rtol=1e-14)
    assert CrossEntropyLoss(reduction="sum")(f, jnp.asarray([1, 0])) == jnp.inf


MODES = {"forward": jax.jacfwd, "reverse": jax.jacrev}


@pytest.mark.parametrize(("first", "second"), [("forward", "reverse"), ("reverse", "forward")])
@pytest.mark.by_default("reverse-forward")
def test_nothing_ignored_reaches_derivatives(first: str, second: str) -> None:
    """First and second ones, in outputs and in class weights, which all terms share: mixed ones as well."""
    rng = np.random.default_rng(0)
    clean, weight = jax.device_put(rng.normal(size=(3, 4))), jnp.asarray([1.0, 2.0, 0.5, 3.0])
    v, y = jax.device_put(rng.normal(size=(3, 4))), jnp.asarray([2, -100, 0])
    dirty = clean.at[1].set(jnp.asarray([jnp.nan, jnp.inf, 0.0, -jnp.inf]))
    loss = lambda w: CrossEntropyLoss(w, label_smoothing=0.2)  # noqa: E731
    functions = {
        "value": lambda f, w: loss(w)(f, y),
        "product": lambda f, w: LossHessian(loss(w), f, y).mv(v),
        "drawn": lambda f, w: ggn_jax.make_batch_grad_output_fn(loss(w), "mc")(f, y, jax.random.key(0)),
    }

    @jax.jit
    def derivatives(f: jax.Array, w: jax.Array) -> dict[str, jax.Array]:
        found = {}
        for name, fn in functions.items():
            for inner in (0, 1):
                derivative = MODES[first](fn, inner)
                found[f"{name}, {inner}"] = derivative(f, w)
                for outer in (0, 1):
                    found[f"{name}, {inner}, then {outer}"] = MODES[second](derivative, outer)(f, w)
        return found

    got, want = derivatives(dirty, weight), derivatives(clean, weight)
    for name in want:
        assert jnp.isfinite(got[name]).all(), name
        np.testing.assert_allclose(got[name], want[name], 1e-13, 1e-13, err_msg=name)


def test_derivatives_of_binary_vectors_where_logits_are_zero_or_large() -> None:
    """`d sqrt(p (1 - p)) / df = sqrt(p (1 - p)) (1 - 2 p) / 2`, also at 0, where it is made of an absolute value."""
    outputs = jnp.asarray([-20.0, -1.0, 0.0, 0.3, 20.0])
    vectors = ggn_jax.make_batch_grad_output_fn(ggn_jax.BCEWithLogitsLoss(reduction="sum"), "type-2")
    found = jax.jit(jax.jacrev(lambda f: jnp.diagonal(vectors(f[None], jnp.zeros((1, 5)))[:, 0])))(outputs)
    p = 1 / (1 + np.exp(-np.asarray(outputs)))
    np.testing.assert_allclose(found, np.diag(np.sqrt(p * (1 - p)) * (1 - 2 * p) / 2), rtol=1e-7, atol=1e-17)
