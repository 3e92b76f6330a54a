"""`J`, `J J^T` and `S^T J J^T S` against dense matrices, and solves in function space against those in parameters."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import CE, PROBLEMS, N, Problem, assert_close, flat, integers, normal

import ggn_jax
from ggn_jax import GramLinearOperator, JacobianLinearOperator

SEQUENCE, IMAGES = PROBLEMS[2], PROBLEMS[6]


def root(problem: Problem) -> np.ndarray:
    """The loss's square root, by its columns."""
    fn = ggn_jax.make_batch_grad_output_fn(problem.loss, "type-2")
    vectors = np.asarray(fn(problem.outputs(), problem.targets))  # [V, N, *out]
    count = len(vectors)
    s = np.zeros((N, count, N, count))
    for n in range(N):
        s[n, :, n] = vectors[:, n].reshape(count, -1).T
    return s.reshape(N * count, N * count)


def centring(size: int) -> np.ndarray:
    return np.kron(np.eye(N) - 1 / N, np.eye(size // N))


@pytest.mark.parametrize(("problem", "chunk_size"), [(CE, 2), (SEQUENCE, None)], ids=["ce", "sequence"])
@pytest.mark.by_default("ce")
def test_jacobian(problem: Problem, chunk_size: int | None) -> None:
    jacobian = JacobianLinearOperator(problem.model_fn, problem.params, problem.inputs, chunk_size=chunk_size)
    u = normal("u", *problem.outputs().shape)
    assert_close(jacobian.mv(problem.vector), (problem.jacobian() @ flat(problem.vector)).reshape(u.shape))
    assert_close(flat(jacobian.T.mv(u)), problem.jacobian().T @ flat(u))
    if chunk_size is None:
        assert_close(jacobian.as_matrix(), problem.jacobian())
        assert_close(jacobian.T.as_matrix(), problem.jacobian().T)
        kept = lx.linearise(jacobian)
        assert_close(kept.mv(problem.vector), jacobian.mv(problem.vector))
        assert_close(flat(lx.linearise(jacobian.T).mv(u)), flat(jacobian.T.mv(u)))


def test_jacobian_solves_least_squares() -> None:
    """With fewer outputs than parameters, by columns; and lineax's own solver."""
    jacobian = JacobianLinearOperator(CE.model_fn, CE.params, CE.inputs)
    assert "outputs=float64[5, 3]" in repr(jacobian)
    assert not lx.is_symmetric(jacobian)
    small = JacobianLinearOperator(lambda p, x: x @ p, normal("p", 3, 1), normal("lx", 7, 3))
    assert small.as_matrix().shape == (7, 3)
    assert_close(small.as_matrix(), small.problem.inputs)
    assert_close(lx.materialise(small).as_matrix(), small.as_matrix())
    want = np.linalg.lstsq(np.asarray(small.as_matrix()), np.asarray(normal("r", 7, 1)).ravel(), rcond=None)[0]
    with jax.numpy_dtype_promotion("standard"):
        got = lx.linear_solve(small, normal("r", 7, 1), lx.LSMR(rtol=1e-12, atol=1e-12)).value
    assert_close(got.ravel(), want, 1e-8)


@pytest.mark.parametrize(
    ("problem", "with_loss", "centred"),
    [(CE, True, True), (SEQUENCE, True, False), (IMAGES, False, True)],
    ids=["ce", "sequence", "images"],
)
@pytest.mark.by_default("sequence")
def test_gram(problem: Problem, with_loss: bool, centred: bool) -> None:
    j = problem.jacobian()
    x = (centring(len(j)) @ j if centred else j).T
    options: dict[str, Any] = {"centred": centred}
    if with_loss:
        x, options = x @ root(problem), {**options, "loss": problem.loss, "targets": problem.targets}
    gram = GramLinearOperator(problem.model_fn, problem.params, problem.inputs, **options)
    assert lx.is_positive_semidefinite(gram.damped(0.1))
    assert_close(gram.as_matrix(), x.T @ x)
    u = normal("u", *problem.outputs().shape)
    assert_close(gram.mv(u).ravel(), x.T @ x @ flat(u))
    want = np.linalg.solve(x @ x.T + 0.1 * np.eye(len(x)), flat(problem.vector))
    assert_close(flat(gram.solve_ggn(problem.vector, 0.1)), want, 1e-10)


def test_solve_equals_the_ggns() -> None:
    """The operator's own inverse in parameter space."""
    gram = GramLinearOperator(CE.model_fn, CE.params, CE.inputs, loss=CE.loss, targets=CE.targets)
    want = np.linalg.solve(CE.ggn() + 0.3 * np.eye(len(CE.ggn())), flat(CE.vector))
    assert_close(flat(gram.solve_ggn(CE.vector, jnp.asarray(0.3))), want, 1e-10)
    eigenvalues = np.linalg.eigvalsh(gram.as_matrix())[::-1]
    assert_close(eigenvalues, np.linalg.eigvalsh(CE.ggn())[::-1][: len(eigenvalues)], 1e-10)


@pytest.mark.sweep
def test_chunks_change_nothing() -> None:
    args = CE.model_fn, CE.params, CE.inputs
    options: dict[str, Any] = {"loss": CE.loss, "targets": CE.targets, "centred": True}
    whole, parts = GramLinearOperator(*args, **options), GramLinearOperator(*args, **options, chunk_size=2)
    u = normal("u", N, 3)
    assert_close(parts.as_matrix(), whole.as_matrix())
    assert_close(parts.mv(u), whole.mv(u))
    assert_close(lx.linearise(whole).mv(u), whole.mv(u))
    assert_close(flat(parts.solve_ggn(CE.vector, 0.1)), flat(whole.solve_ggn(CE.vector, 0.1)), 1e-10)


# Layers of all kinds, whose inner products are put together from inputs and output gradients. -----------------------


def scanned(p: Any, tokens: jax.Array) -> jax.Array:
    """An embedding with a bias, a tied output layer, stacked layers, a scale, a weight with two uses."""

    def step(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return h + jnp.tanh(jnp.einsum("ntd,de->nte", h, layer["w"]) + layer["b"][None, None]), None

    h = jax.lax.scan(step, p["table"][tokens] + p["shift"][None, None], p["stack"])[0] * p["scale"][None, None]
    h = jnp.tanh(jnp.einsum("ntd,de->nte", jnp.tanh(jnp.einsum("ntd,de->nte", h, p["twice"])), p["twice"]))
    return jnp.einsum("ntd,vd->nv", jnp.cumsum(h, axis=1), p["table"])


def plain_embedding(p: Any, tokens: jax.Array) -> jax.Array:
    """Few outputs and large weights: inner products of inputs and of row numbers, at several positions."""
    hidden = jnp.tanh(jnp.einsum("ntd,de->nte", p["table"][tokens] + p["bias"][None, None], p["large"]))
    return jnp.einsum("ntd,dc->nc", jnp.tanh(hidden), p["head"])


def grouped(p: Any, x: jax.Array) -> jax.Array:
    dims, groups = ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}
    x = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims, **groups)
    return jnp.tanh(x + p["bias"][None, None, None]).reshape(len(x), -1) @ p["head"]


TOKENS = jax.device_put(integers("tokens", 6, N, 3))
STACK = {"w": normal("w", 2, 3, 3), "b": normal("b", 2, 3)}
SCANNED = {"table": normal("t", 6, 3), "stack": STACK, "scale": normal("s", 3), "shift": normal("sh", 3)}
MODELS = {
    "scanned": (scanned, {**SCANNED, "twice": normal("tw", 3, 3)}, TOKENS),
    "embedding": (
        plain_embedding,
        {
            "table": normal("t", 40, 30),
            "bias": normal("b", 30),
            "large": normal("l", 30, 30),
            "head": normal("h", 30, 2),
        },
        TOKENS,
    ),
    "grouped": (
        grouped,
        {"kernel": normal("k", 2, 2, 1, 4), "bias": normal("kb", 4), "head": normal("h", 24, 2)},
        normal("image", N, 2, 3, 2),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.by_default("scanned", "grouped")
def test_gram_of_layers(name: str) -> None:
    model_fn, params, inputs = MODELS[name]
    theta, unravel = ravel_pytree(params)
    j = jax.jit(jax.jacrev(lambda theta: model_fn(unravel(theta), inputs).reshape(-1)))(theta)
    gram = GramLinearOperator(model_fn, params, inputs)
    assert_close(gram.as_matrix(), j @ j.T, 1e-12)


def test_reverse_mode_is_enough() -> None:
    """As for the GGN: a rule of `jax.custom_vjp` that can be differentiated itself."""

    @jax.custom_vjp
    def squared(x: jax.Array) -> jax.Array:
        return x**2

    squared.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    model_fn = lambda p, x: squared(x @ p)  # noqa: E731
    w, x = normal("w", 3, 2), normal("x", N, 3)
    j = np.asarray(jax.jacrev(lambda p: (x @ p) ** 2)(w)).reshape(-1, 6)
    jacobian, gram = JacobianLinearOperator(model_fn, w, x), GramLinearOperator(model_fn, w, x)
    assert_close(jacobian.mv(w).ravel(), j @ flat(w))
    assert_close(jacobian.as_matrix(), j)
    assert_close(gram.as_matrix(), j @ j.T)
    assert_close(gram.mv(x @ w).ravel(), j @ j.T @ flat(x @ w))


def test_errors() -> None:
    make = partial(GramLinearOperator, CE.model_fn, CE.params, CE.inputs)
    with pytest.raises(ValueError, match=r"targets are for a loss: pass loss=\.\.\."):
        make(targets=CE.targets)
    with pytest.raises(TypeError, match="centred must be True or False; got 'mean'"):
        make(centred="mean")  # type: ignore[arg-type]
    gram = make()
    with pytest.raises(ValueError, match=r"vector must have shape \(5, 3\) and dtype float64, like the output"):
        gram.mv(jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="vector must be a pytree like the parameters"):
        gram.solve_ggn(jnp.ones(3), 0.1)
    with pytest.raises(ValueError, match=r"damping must be above 0; got 0\.0"):
        gram.solve_ggn(CE.vector, 0.0)
    coupled = lambda p, x: CE.model_fn(p, x - x.mean(0, keepdims=True))  # noqa: E731
    with pytest.raises(ValueError, match="couples examples"):
        GramLinearOperator(coupled, CE.params, CE.inputs).as_matrix()
    with pytest.raises(ValueError, match="like the output"):
        JacobianLinearOperator(CE.model_fn, CE.params, CE.inputs).T.mv(jnp.ones(3))


def test_submatrices_by_path() -> None:
    """Of the parameters that are named, in their own order."""
    ggn = ggn_jax.GGNLinearOperator(*CE.args)
    entries = {"b1": range(4), "w1": range(4, 16), "w2": range(16, 28)}
    for paths, names in [(("w*",), ["w1", "w2"]), (("w2", "b1"), ["b1", "w2"])]:
        where = [i for name in names for i in entries[name]]
        assert_close(ggn.submatrix(*paths), CE.ggn()[np.ix_(where, where)])
    with pytest.raises(KeyError, match="no parameter 'v'; there are b1, w1, w2"):
        ggn.submatrix("w1", "v")
    params = {"wb": jnp.ones((3, 2)), "w": jnp.ones((2, 2)), "b": jnp.ones(2), "a*": jnp.ones(2), "ab": jnp.ones(2)}

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return (x @ p["wb"]) @ p["w"] + (p["b"] + 2 * p["a*"] + 3 * p["ab"])[None]

    ggn = ggn_jax.GGNLinearOperator(model_fn, ggn_jax.MSELoss(), params, (jnp.eye(4, 3), jnp.zeros((4, 2))))
    for name, size in [("['wb']", 6), ("wb", 6), ("['w']", 4), ("a*", 2), ("w*", 10)]:
        assert ggn.submatrix(name).shape == (size, size)
    for name in ("['ww']", "[wb]"):  # no pattern of one letter
        with pytest.raises(KeyError, match="no parameter"):
            ggn.submatrix(name)
    with pytest.raises(KeyError, match="pass the paths of some parameters"):
        ggn.submatrix()
    with pytest.raises(TypeError, match=r"a path must be a string.* got list: pass several as arguments"):
        ggn.submatrix(["w1"])  # type: ignore[arg-type]


def test_inputs_without_batch_axis() -> None:
    """In chunks, too; and the layers in the open take them."""
    model_fn = lambda p, inputs: jnp.tanh((inputs[0] - inputs[1][None]) @ p)  # noqa: E731
    w, x, mean, y = normal("w", 3, 2), normal("x", N, 3), normal("mean", 3), normal("y", N, 2)
    inputs, plain = (x, ggn_jax.Unbatched(mean)), lambda p, x: model_fn(p, (x, mean))
    gram = GramLinearOperator(model_fn, w, inputs, chunk_size=2)
    assert_close(gram.as_matrix(), GramLinearOperator(plain, w, x).as_matrix())
    assert_close(gram.mv(y).ravel(), gram.as_matrix() @ y.ravel())
    layers, loss = ggn_jax.find_layers(model_fn, w, inputs), ggn_jax.MSELoss()
    fn = lambda io: (io.grads, jnp.sum(io[layers.names[0]].output_grads))  # noqa: E731
    options: dict[str, Any] = {"fisher_type": "empirical"}
    run = jax.jit(lambda w: ggn_jax.sum_layer_io(fn, layers, loss, w, (inputs, y), chunk_size=2, **options))
    assert_close(run(w)[0], jax.jit(jax.grad(lambda w: loss(plain(w, x), y)))(w))


def test_one_output_and_layers_with_two_positions() -> None:
    """A network plus its slope, of which each layer is used for both; wide enough that no rows of `J` are made."""
    w, b, v, x = normal("w", 16, 16), normal("b", 16), normal("v", 16, 1), normal("x", N, 16)

    def one(p: Any, x: jax.Array) -> jax.Array:
        return sum(jax.jvp(lambda x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]) @ p["v"], (x,), (jnp.ones(16),)))

    model_fn, params = jax.vmap(one, (None, 0)), {"w": w / 4, "u": w.T / 4, "b": b, "v": v}
    flat_params, unravel = ravel_pytree(params)
    j = jax.jit(jax.jacrev(lambda p: model_fn(unravel(p), x)[:, 0]))(flat_params)
    assert_close(GramLinearOperator(model_fn, params, x).as_matrix(), np.asarray(j @ j.T))
