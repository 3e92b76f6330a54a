"""Losses of several outputs: the oracle is automatic differentiation of the weighted sum of losses, in float64."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import ggn_jax

N, RNG = 5, np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jax.device_put(RNG.normal(size=shape))


def model_fn(p: Any, x: jax.Array) -> dict[str, jax.Array]:
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    tokens = jnp.tanh(h[:, None, :] * p["s"][None]) @ p["tokens"]
    return {"value": h @ p["value"], "tokens": tokens, "flag": (h @ p["flag"])[:, 0]}


PARAMS = {
    "w": normal(3, 4),
    "b": normal(4),
    "s": normal(2, 4),
    "value": normal(4, 2),
    "tokens": normal(4, 3),
    "flag": normal(4, 1),
}
LOSSES = {
    "value": ggn_jax.MSELoss(),
    "tokens": ggn_jax.CrossEntropyLoss(class_axis=-1, weight=jnp.asarray([1.0, 2, 3]), ignore_index=-1),
    "flag": ggn_jax.BCEWithLogitsLoss(reduction="sum"),
}
WEIGHTS = {"value": 0.5, "tokens": 2.0}
X = normal(N, 3)
TARGETS = {
    "value": normal(N, 2),
    "tokens": jax.device_put(RNG.integers(-1, 3, size=(N, 2))),
    "flag": jax.device_put(RNG.integers(0, 2, size=N).astype(float)),
}
LOSS = ggn_jax.JointLoss(LOSSES, WEIGHTS)
ARGS = model_fn, LOSS, PARAMS, (X, TARGETS)
FLAT, UNRAVEL = ravel_pytree(PARAMS)
OUTPUTS = jax.jit(model_fn)(PARAMS, X)


def value(outputs: Any, targets: Any = TARGETS, weights: Any = WEIGHTS) -> jax.Array:
    parts = [weights.get(k, 1.0) * LOSSES[k](outputs[k], targets[k]) for k in LOSSES]
    return sum(parts[1:], start=parts[0])


def output_hessian(outputs: Any, targets: Any) -> np.ndarray:
    flat, unravel = ravel_pytree(outputs)
    return np.asarray(jax.jit(jax.hessian(lambda f: value(unravel(f), targets)))(flat))


@cache
def ggn_matrix() -> np.ndarray:
    jacobian = np.asarray(jax.jit(jax.jacrev(lambda f: ravel_pytree(model_fn(UNRAVEL(f), X))[0]))(FLAT))
    return jacobian.T @ output_hessian(OUTPUTS, TARGETS) @ jacobian


def outer(vectors: Any) -> np.ndarray:
    """`sum_v v v^T`, of all outputs in the order of their names."""
    leaves = [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(vectors)]
    rows = np.concatenate(leaves, axis=1)
    return rows.T @ rows


def one(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x[n], tree)


def test_value_and_errors() -> None:
    np.testing.assert_allclose(LOSS(OUTPUTS, TARGETS), value(OUTPUTS), rtol=1e-14)
    with pytest.raises(
        TypeError, match=r"targets must be a dict .* \['flag', 'tokens', 'value'\]; got a dict of \['a'\]"
    ):
        LOSS(OUTPUTS, {"a": X})
    with pytest.raises(ValueError, match="of output 'tokens': targets must be"):
        ggn_jax.GGNLinearOperator(model_fn, LOSS, PARAMS, (X, {**TARGETS, "tokens": TARGETS["tokens"] + 9}))
    with pytest.raises(ValueError, match="of output 'value'"):
        ggn_jax.GGNLinearOperator(model_fn, LOSS, PARAMS, (X, {**TARGETS, "value": TARGETS["flag"]}))
    with pytest.raises(TypeError, match="the outputs of model_fn must be a dict"):
        ggn_jax.GGNLinearOperator(lambda p, x: x @ p["w"], LOSS, PARAMS, (X, TARGETS))
    with pytest.raises(TypeError, match="one array for MSELoss; got a dict"):
        ggn_jax.GGNLinearOperator(lambda p, x: x @ p["w"], LOSSES["value"], PARAMS, (X, TARGETS))
    with pytest.raises(ValueError, match="names among"):
        ggn_jax.JointLoss(LOSSES, {"policy": 1.0})
    with pytest.raises(ValueError, match="not negative"):
        ggn_jax.JointLoss(LOSSES, {"flag": -1.0})
    with pytest.raises(TypeError, match=r"losses\['a'\] must be a loss"):
        ggn_jax.JointLoss({"a": abs})  # type: ignore[dict-item]
    with pytest.raises(NotImplementedError, match="reduction='sum'"):
        ggn_jax.KFACLinearOperator.from_batches(*ARGS[:3], [(X, TARGETS)], fisher_type="empirical")


def test_vectors_of_one_example_and_of_a_batch() -> None:
    output, target, num = one(OUTPUTS, 1), one(TARGETS, 1), 20_000

    @jax.jit
    def run(output: Any, target: Any, outputs: Any, targets: Any, key: jax.Array) -> Any:
        return {
            "vectors": ggn_jax.make_grad_output_fn(LOSS, "type-2")(output, target),
            "draws": ggn_jax.make_grad_output_fn(LOSS, "mc", mc_samples=num)(output, target, key),
            "sampler": ggn_jax.make_grad_output_sampler(LOSS)(output, num, target, key),
            "batch": ggn_jax.make_batch_grad_output_fn(LOSS, "type-2")(outputs, targets),
            "gradients": ggn_jax.make_batch_grad_output_fn(LOSS, "empirical")(outputs, targets),
            "own": ggn_jax.make_batch_grad_output_fn(LOSSES["tokens"], "empirical")(
                outputs["tokens"], targets["tokens"]
            ),
            "hessian": jax.jacfwd(jax.grad(value))(outputs, targets)["value"]["value"],
        }

    found = jax.device_get(run(output, target, OUTPUTS, TARGETS, jax.random.key(0)))
    hessian = output_hessian(*jax.tree.map(lambda x: x[None], (output, target)))
    vectors = found["vectors"]
    assert {k: v.shape for k, v in vectors.items()} == {"value": (9, 2), "tokens": (9, 2, 3), "flag": (9,)}
    np.testing.assert_allclose(outer(vectors), hessian, atol=1e-14)
    draws = outer(found["draws"])
    np.testing.assert_allclose(draws, hessian, atol=0.05 * np.abs(hessian).max())
    np.testing.assert_allclose(outer(found["sampler"]) / num, draws, rtol=1e-10, atol=1e-14)
    for n in range(N):
        rows = found["batch"]["value"][:, n]
        np.testing.assert_allclose(rows.T @ rows, found["hessian"][n, :, n], atol=1e-14)
    np.testing.assert_allclose(found["gradients"]["tokens"], 2 * found["own"], rtol=1e-14)
    # Outside of `jit` too.
    assert ggn_jax.make_grad_output_fn(LOSS, "forward-only")(output, target)["value"].shape == (0, 2)
    eager = ggn_jax.make_batch_grad_output_fn(LOSS, "empirical")(OUTPUTS, TARGETS)
    np.testing.assert_allclose(eager["tokens"], found["gradients"]["tokens"], rtol=1e-13)
    with pytest.raises(NotImplementedError, match="no common axis"):
        ggn_jax.loss_hessian_matrix_sqrt(output, target, LOSS)


def test_loss_hessian() -> None:
    hessian = ggn_jax.LossHessian(LOSS, OUTPUTS, TARGETS)
    matrix = output_hessian(OUTPUTS, TARGETS)
    v = jax.tree.map(lambda x: normal(*x.shape), OUTPUTS)
    flat = np.asarray(ravel_pytree(v)[0])
    np.testing.assert_allclose(ravel_pytree(hessian.mv(v))[0], matrix @ flat, atol=1e-13)
    np.testing.assert_allclose(ravel_pytree(hessian.sqrt_mv(hessian.sqrt_rmv(v)))[0], matrix @ flat, atol=1e-13)
    np.testing.assert_allclose(ravel_pytree(hessian.diagonal())[0], np.diag(matrix), atol=1e-14)
    np.testing.assert_allclose(hessian.trace(), np.trace(matrix), rtol=1e-13)
    with pytest.raises(ValueError, match=r"v\['flag'\] must have the outputs' shape"):
        hessian.mv({**v, "flag": v["value"]})


def test_products() -> None:
    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        args, chunk = (model_fn, LOSS, params, batch), {"chunk_size": 2}  # of 5
        diagonals = [ggn_jax.GGNDiagonalLinearOperator(*args, **chunk, method=m).entries for m in ("layers", "data")]
        whole = ggn_jax.GGNLinearOperator(*args, **chunk), ggn_jax.HessianLinearOperator(*args, **chunk)
        return [operator.as_matrix() for operator in whole], diagonals

    (ggn, hessian), diagonals = run(*ARGS[2:])
    np.testing.assert_allclose(ggn, ggn_matrix(), atol=1e-12)
    want = jax.jit(jax.hessian(lambda f: value(model_fn(UNRAVEL(f), X))))(FLAT)
    np.testing.assert_allclose(hessian, want, atol=1e-12)
    for diagonal in diagonals:
        np.testing.assert_allclose(ravel_pytree(diagonal)[0], np.diag(ggn_matrix()), atol=1e-12)


@pytest.mark.sweep
def test_draws_are_unbiased() -> None:
    ggn = ggn_jax.GGNLinearOperator(*ARGS, mc_samples=20_000, key=jax.random.key(1))
    v = UNRAVEL(jnp.ones_like(FLAT))
    want = ggn_matrix().sum(1)
    np.testing.assert_allclose(ravel_pytree(ggn.mv(v))[0], want, atol=0.05 * np.abs(want).max())


SUMS = {"value": ggn_jax.MSELoss(reduction="sum"), "flag": ggn_jax.BCEWithLogitsLoss(reduction="sum")}
TWO = ggn_jax.JointLoss(SUMS, {"value": 0.5})


def two(p: Any, x: jax.Array) -> dict[str, jax.Array]:
    outputs = model_fn(p, x)
    return {name: outputs[name] for name in SUMS}


TWO_TARGETS = {name: TARGETS[name] for name in SUMS}


def test_empirical_fisher() -> None:
    """The gradient of an example is that of all its outputs; `per="term"` takes them apart."""

    def losses(f: jax.Array) -> jax.Array:
        outputs = two(UNRAVEL(f), X)
        each = 0.5 * (outputs["value"] - TARGETS["value"]) ** 2
        flags = optax.sigmoid_binary_cross_entropy(outputs["flag"], TARGETS["flag"])
        return jnp.concatenate([each, flags[:, None]], axis=1)

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        return [ggn_jax.EFLinearOperator(two, TWO, params, batch, per=per).as_matrix() for per in ("example", "term")]

    terms = np.asarray(jax.jit(jax.jacrev(losses))(FLAT))
    rows = terms.sum(1)
    per_datum, per_term = run(PARAMS, (X, TWO_TARGETS))
    np.testing.assert_allclose(per_datum, rows.T @ rows, atol=1e-12)
    rows = terms.reshape(-1, len(FLAT))
    np.testing.assert_allclose(per_term, rows.T @ rows, atol=1e-12)
    halves = [(X[:2], one(TWO_TARGETS, slice(2))), (X[2:], one(TWO_TARGETS, slice(2, None)))]
    whole = ggn_jax.EFLinearOperator.from_batches(two, TWO, PARAMS, halves, per="term")
    np.testing.assert_allclose(whole.as_matrix(), rows.T @ rows, atol=1e-12)


OPTIONS: Any = {"fisher_type": "type-2", "positions": "exact"}


def test_kronecker_of_one_example_is_exact() -> None:
    """With one position; heads' own layers are exact blocks of the GGN."""
    batch = X[:1], one(TWO_TARGETS, slice(1))
    kfac = ggn_jax.KFACLinearOperator(two, TWO, PARAMS, batch, **OPTIONS)
    ggn = np.asarray(ggn_jax.GGNLinearOperator(two, TWO, PARAMS, batch).as_matrix())
    sizes = np.cumsum([0] + [PARAMS[name].size for name in sorted(PARAMS)])
    matrix = np.asarray(kfac.as_matrix())
    for i in range(len(sizes) - 1):
        at = slice(sizes[i], sizes[i + 1])
        np.testing.assert_allclose(matrix[at, at], ggn[at, at], atol=1e-12)


@pytest.mark.parametrize("cls", [ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator])
@pytest.mark.by_default("KFACLinearOperator")
def test_kronecker_is_the_sum_over_heads(cls: Any) -> None:
    """Each head's vectors are its own, so output factors add up, and so do EKFAC's corrections where bases are one."""
    joint = cls(*ARGS, **OPTIONS)

    def head(name: str) -> Any:
        loss = ggn_jax.JointLoss(LOSSES, {k: WEIGHTS.get(k, 1.0) * (k == name) for k in LOSSES})
        return cls(model_fn, loss, PARAMS, (X, TARGETS), **OPTIONS)

    if cls is ggn_jax.KFACLinearOperator:
        want = sum(np.asarray(head(name).as_matrix()) for name in LOSSES)
        np.testing.assert_allclose(joint.as_matrix(), want, atol=1e-12)
        alone = ggn_jax.KFACLinearOperator(
            lambda p, x: model_fn(p, x)["value"], LOSSES["value"], PARAMS, (X, TARGETS["value"]), **OPTIONS
        )
        np.testing.assert_allclose(joint.block("value"), 0.5 * alone.block("value"), atol=1e-13)
    else:
        np.testing.assert_allclose(joint.trace(), np.trace(ggn_matrix()))


@pytest.mark.sweep
def test_signs_and_draws_need_keys_and_are_unbiased() -> None:
    with pytest.raises(ValueError, match="key"):
        ggn_jax.KFACLinearOperator(*ARGS, fisher_type="type-2")
    exact = ggn_jax.KFACLinearOperator(*ARGS, **OPTIONS)
    keys = jax.random.split(jax.random.key(0), 200)
    for options in ({"fisher_type": "type-2"}, {"fisher_type": "mc", "mc_samples": 10}):
        fn = jax.jit(partial(_trace, options=tuple(options.items())))
        traces = jax.lax.map(fn, keys)
        np.testing.assert_allclose(traces.mean(0), exact.diagonal()["w"], rtol=0.1)


def _trace(key: jax.Array, options: Any) -> jax.Array:
    return ggn_jax.KFACLinearOperator(*ARGS, key=key, **dict(options)).diagonal()["w"]


def test_optimizer_and_report() -> None:
    report = ggn_jax.report(model_fn, PARAMS, X)
    assert report.passed
    optimizer = ggn_jax.kfac(model_fn, LOSS, 0.3, example_inputs=X, damping=1e-2, momentum=None, kl_clip=None)
    assert "['tokens']" in str(optimizer.report(PARAMS))

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        found, grads, factors = optimizer.value_and_grad_and_factors(params, (X, TARGETS), state, key=key)
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, found, grads

    params, state, values = PARAMS, optimizer.init(PARAMS), []
    for key in jax.random.split(jax.random.key(0), 5):
        last = params
        params, state, found, grads = step(params, state, key)
        values.append(float(found))
    want = jax.jit(jax.grad(lambda p: value(model_fn(p, X))))(last)
    np.testing.assert_allclose(ravel_pytree(grads)[0], ravel_pytree(want)[0], atol=1e-12)
    assert values[-1] < 0.7 * values[0]


def test_an_output_that_is_left_out_may_be_anything() -> None:
    def broken(p: Any, x: jax.Array) -> Any:
        return {**two(p, x), "flag": jnp.full(len(x), jnp.nan)}

    loss = ggn_jax.JointLoss(SUMS, {"flag": 0})
    batch = X, TWO_TARGETS
    got = ggn_jax.GGNLinearOperator(broken, loss, PARAMS, batch).as_matrix()
    want = ggn_jax.GGNLinearOperator(lambda p, x: two(p, x)["value"], SUMS["value"], PARAMS, (X, TARGETS["value"]))
    np.testing.assert_allclose(got, want.as_matrix(), atol=1e-13)


def test_targets_that_are_not_needed() -> None:
    loss = ggn_jax.JointLoss({"value": LOSSES["value"], "flag": LOSSES["flag"]})
    with_targets, without = (ggn_jax.GGNLinearOperator(two, loss, PARAMS, (X, t)) for t in (TWO_TARGETS, None))
    np.testing.assert_array_equal(with_targets.as_matrix(), without.as_matrix())
