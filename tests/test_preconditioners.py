"""The examples of preconditioners against their papers' formulas in NumPy, and `scale_by_layers` with optax."""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from problems import assert_close, normal

import ggn_jax

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "preconditioners"
N, DAMPING = 4, 0.1
LOSS = ggn_jax.MSELoss()
PARAMS = {"w1": normal("w1", 3, 4), "b1": normal("b1", 4), "w2": normal("w2", 4, 2), "s": normal("s", 2)}
BATCHES = [(normal(f"x{i}", N, 3), normal(f"y{i}", N, 2)) for i in range(2)]
TYPE_2: dict[str, Any] = {"fisher_type": "type-2", "positions": "exact"}


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    """optax's Adam, and the examples, are written for JAX as users have it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"preconditioners_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_fn(p: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(jnp.einsum("nd,dh->nh", x, p["w1"]) + p["b1"][None])
    return jnp.einsum("nh,hc->nc", hidden, p["w2"]) * p["s"][None]


@jax.jit
def gradient(params: Any, batch: Any) -> Any:
    return jax.grad(lambda p: LOSS(model_fn(p, batch[0]), batch[1]))(params)


def by_hand(batch: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each layer's inputs `[N, in]` and output gradients `[V, N, out]` of type-2 vectors `sqrt(2 / (N C)) e_c`."""
    p, x = jax.tree.map(np.asarray, (PARAMS, batch[0]))
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    vectors = np.sqrt(2 / (N * 2)) * np.broadcast_to(np.eye(2)[:, None], (2, N, 2)) * p["s"]
    grads = {"w2": vectors, "w1": (vectors @ p["w2"].T) * (1 - hidden**2)}
    return {"w1": np.concatenate([x, np.ones((N, 1))], 1), "w2": hidden}, grads


def matrices_of(tree: Any) -> dict[str, np.ndarray]:
    p = jax.tree.map(np.asarray, tree)
    return {"w1": np.concatenate([p["w1"], p["b1"][None]]).T, "w2": p["w2"].T}


def steps(scale: optax.GradientTransformationExtraArgs) -> tuple[dict[str, np.ndarray], Any, Any]:
    """The last gradient as matrices, the update, and the state, after a step on each batch."""
    state = scale.init(PARAMS)
    update = jax.jit(lambda grads, state, batch: scale.update(grads, state, PARAMS, batch=batch))
    for batch in BATCHES:
        grads = gradient(PARAMS, batch)
        updates, state = update(grads, state, batch)
    adam, moments = optax.scale_by_adam(), optax.scale_by_adam().init(PARAMS["s"])
    for batch in BATCHES:
        rest, moments = adam.update(gradient(PARAMS, batch)["s"], moments)
    assert_close(updates["s"], rest, 1e-13)
    return matrices_of(grads), matrices_of(updates), state


def test_foof() -> None:
    grads, updates, _ = steps(load("foof").scale_by_foof(model_fn, LOSS, example_inputs=BATCHES[0][0], damping=DAMPING))
    for name, grad in grads.items():
        first, second = (by_hand(batch)[0][name] for batch in BATCHES)
        a = (0.95 * first.T @ first + second.T @ second) / N / 1.95
        assert_close(updates[name], grad @ np.linalg.inv(a + DAMPING * np.eye(len(a))), 1e-11)


def test_ingd() -> None:
    options = {"damping": DAMPING, "rate": 0.2, "momentum": 0.5, **TYPE_2}
    grads, updates, _ = steps(load("ingd").scale_by_ingd(model_fn, LOSS, example_inputs=BATCHES[0][0], **options))
    for name, grad in grads.items():
        out, inputs = grad.shape
        k, c, mk, mc = np.eye(inputs), np.eye(out), 0.0, 0.0
        for batch in BATCHES:
            a, g = (found[name] for found in by_hand(batch))
            hk = k.T @ (a.T @ a / N) @ k
            hc = c.T @ np.einsum("vno,vnp->op", g, g) @ c
            extra_k, extra_c = DAMPING * np.trace(c.T @ c), DAMPING * np.trace(k.T @ k)
            mk = 0.5 * mk + (np.trace(hc) * hk + extra_k * k.T @ k - out * np.eye(inputs)) / (2 * out)
            mc = 0.5 * mc + (np.trace(hk) * hc + extra_c * c.T @ c - inputs * np.eye(out)) / (2 * inputs)
            k, c = k @ (np.eye(inputs) - 0.2 * mk), c @ (np.eye(out) - 0.2 * mc)
        assert_close(updates[name], c @ c.T @ grad @ k @ k.T, 1e-11)


def test_tnt() -> None:
    options = {"damping": DAMPING, **TYPE_2}
    grads, updates, _ = steps(load("tnt").scale_by_tnt(model_fn, LOSS, example_inputs=BATCHES[0][0], **options))
    for name, grad in grads.items():
        left, right = np.zeros((len(grad),) * 2), np.zeros((grad.shape[1],) * 2)
        for batch in BATCHES:
            a, g = (found[name] for found in by_hand(batch))
            left, right = 0.95 * left, 0.95 * right
            for each in (np.outer(g[v, n], a[n]) for v in range(2) for n in range(N)):
                left, right = left + 0.05 * each @ each.T, right + 0.05 * each.T @ each
        mean = np.sqrt(np.trace(left) / grad.size)
        left, right = left / (grad.shape[1] * mean), right / (len(grad) * mean)
        assert_close([np.trace(m) / len(m) for m in (left, right)], [mean, mean])
        left, right = (m + np.sqrt(DAMPING) * np.eye(len(m)) for m in (left, right))
        assert_close(updates[name], np.linalg.inv(left) @ grad @ np.linalg.inv(right), 1e-11)


def test_seng() -> None:
    natural_gradient, batch = load("seng").natural_gradient, BATCHES[0]
    layers = ggn_jax.find_layers(model_fn, PARAMS, batch[0])

    @jax.jit
    def run() -> Any:
        return natural_gradient(layers, ggn_jax.layer_io(layers, LOSS, PARAMS, batch, **TYPE_2), DAMPING)

    got, grads = run(), gradient(PARAMS, batch)
    assert_close(got["s"], grads["s"], 1e-13)
    for name, grad in matrices_of(grads).items():
        a, g = (found[name] for found in by_hand(batch))
        u = np.stack([np.outer(g[v, n], a[n]).ravel() for v in range(2) for n in range(N)], axis=1)
        wanted = np.linalg.solve(u @ u.T + DAMPING * np.eye(len(u)), grad.ravel())
        assert_close(matrices_of(got)[name].ravel(), wanted, 1e-11)


@pytest.mark.sweep
def test_seng_with_positions() -> None:
    """Where a layer has several, its block is that of the examples' gradients, as `J^T H J` says."""
    params, x, y = {"w": normal("w", 3, 2)}, normal("x", N, 5, 3), normal("y", N, 2)
    fn = lambda p, x: jnp.tanh(jnp.einsum("ntd,de->nte", x, p["w"])).sum(1)  # noqa: E731
    layers = ggn_jax.find_layers(fn, params, x)
    io = jax.jit(lambda: ggn_jax.layer_io(layers, LOSS, params, (x, y), **TYPE_2))()
    jacobian = np.asarray(jax.jit(jax.jacobian(fn))(params, x)["w"]).reshape(2 * N, 6)
    block = 2 / (2 * N) * jacobian.T @ jacobian
    wanted = np.linalg.solve(block + DAMPING * np.eye(6), np.asarray(io.grads["w"]).ravel())
    assert_close(load("seng").natural_gradient(layers, io, DAMPING)["w"].ravel(), wanted, 1e-11)


def test_muon() -> None:
    """A polynomial in the singular values, after Nesterov's momentum."""
    layers = ggn_jax.find_layers(model_fn, PARAMS, BATCHES[0][0], bias="separate")
    scale = load("matrices").scale_by_muon(layers, beta=0.9)
    state, update = scale.init(PARAMS), jax.jit(scale.update)
    first, second = (gradient(PARAMS, batch) for batch in BATCHES)
    _, state = update(first, state)
    got, _ = update(second, state)
    momentum = jax.tree.map(lambda a, b: np.asarray(b + 0.9 * (b + 0.9 * a)), first, second)
    for name in ("w1", "w2"):
        u, values, v = np.linalg.svd(momentum[name].T, full_matrices=False)
        values = values / (np.linalg.norm(values) + 1e-7)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        out, inputs = momentum[name].T.shape
        assert_close(got[name].T, np.sqrt(max(1, out / inputs)) * (u * values) @ v, 1e-10)


def test_shampoo() -> None:
    layers = ggn_jax.find_layers(model_fn, PARAMS, BATCHES[0][0])
    scale = load("matrices").scale_by_shampoo(layers, epsilon=0.1)
    state, update = scale.init(PARAMS), jax.jit(scale.update)
    grads = [gradient(PARAMS, batch) for batch in BATCHES]
    for each in grads:
        got, state = update(each, state)
    both = [matrices_of(each) for each in grads]
    for name, last in both[1].items():
        left = 0.1 * np.eye(len(last)) + sum(m[name] @ m[name].T for m in both)
        right = 0.1 * np.eye(last.shape[1]) + sum(m[name].T @ m[name] for m in both)
        roots = [np.real(scipy.linalg.fractional_matrix_power(m, -0.25)) for m in (left, right)]
        assert_close(matrices_of(got)[name], roots[0] @ last @ roots[1], 1e-10)


def test_operators_of_factors() -> None:
    """Blocks `B (x) A` on `[out, in]`, equal ones as one stack, and a diagonal for the rest, a part of an array."""
    params = {"t": normal("t", 2, 3, 3), "u": normal("u", 3, 3), "w": normal("w", 3, 3)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        for weight in (p["u"], p["w"], p["t"][0]):
            x = jnp.tanh(jnp.einsum("ni,io->no", x, weight))
        return x

    layers = ggn_jax.find_layers(fn, params, normal("x", N, 3))
    roots = {name: (normal("a" + name, 3, 3), normal("b" + name, 3, 3)) for name in layers.names}
    factors = {name: ((a @ a.T)[None], (b @ b.T)[None]) for name, (a, b) in roots.items()}
    blocks = {name: np.kron(b[0], a[0]) for name, (a, b) in factors.items()}
    factors["t"] = factors["t"][0], jnp.array([[1.0, 2.0, 3.0]])
    blocks["t"] = np.kron(np.diag([1.0, 2.0, 3.0]), factors["t"][0][0])
    operator = ggn_jax.from_factors(layers, factors, {**params, "t": jnp.full((2, 3, 3), 5.0)})
    assert [len(stack.specs) for stack in operator.blocks.stacks] == [2, 1, 1]
    solved = operator.solve(params, DAMPING)
    for name, block in blocks.items():
        given, got = (
            np.asarray(tree["t"][0] if name == "t" else tree[name]).T.reshape(-1) for tree in (params, solved)
        )
        assert_close(got, np.linalg.solve(block + DAMPING * np.eye(9), given), 1e-10)
    assert_close(solved["t"][1], np.asarray(params["t"][1]) / (5 + DAMPING))
    without = ggn_jax.from_factors(layers, factors).trace()
    assert_close([without, operator.trace() - 9 * 5], [sum(map(np.trace, blocks.values()))] * 2)


def test_errors_of_factors() -> None:
    layers = ggn_jax.find_layers(model_fn, PARAMS, BATCHES[0][0])
    factors = {"w1": (jnp.ones((1, 4)), jnp.ones((1, 4))), "w2": (jnp.ones((1, 4)), jnp.ones((1, 2)))}
    make = partial(ggn_jax.from_factors, layers)
    with pytest.raises(TypeError, match="layers must be what"):
        ggn_jax.from_factors(PARAMS, factors)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="factors must be a dict"):
        make([factors])
    with pytest.raises(KeyError, match="factors must be of the layers w1, w2; got w1"):
        make({"w1": factors["w1"]})
    with pytest.raises(TypeError, match=r"factors\['w1'\] must be a pair"):
        make(factors | {"w1": jnp.ones((1, 4))})
    with pytest.raises(ValueError, match=r"B of factors\['w2'\] must have shape \(1, 2, 2\).*got \(2, 2\)"):
        make(factors | {"w2": (factors["w2"][0], jnp.eye(2))})
    for rest, got in ({**PARAMS, "s": optax.MaskedNode()}, "nothing"), ({**PARAMS, "s": jnp.ones(3)}, r"\(3,\)"):
        with pytest.raises(ValueError, match=rf"rest\['s'\] must have the parameter's shape \(2,\).*got {got}"):
            make(factors, rest)


def test_soap() -> None:
    """Square matrices, so that no eigenvalue of the first averages is 0 twice, and their eigenvectors are unique."""
    params = {"w": normal("w", 3, 3), "v": normal("v", 3, 3), "s": normal("s", 3)}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] * p["s"][None]  # noqa: E731
    scale = load("matrices").scale_by_soap(ggn_jax.find_layers(fn, params, BATCHES[0][0]), interval=2)
    state, update = scale.init(params), jax.jit(scale.update)
    grads = [{name: normal(f"{name}{i}", *p.shape) for name, p in params.items()} for i in range(6)]
    got = []
    for each in grads:
        updates, state = update(each, state)
        got.append(updates)
    for name in ("w", "v"):
        m = v = np.zeros((3, 3))
        left, right = (0.05 * g @ g.T for g in (np.asarray(grads[0][name]).T, np.asarray(grads[0][name])))
        ql, qr = (np.linalg.eigh(x)[1] for x in (left, right))
        assert_close(got[0][name], np.zeros((3, 3)))
        for t in range(1, 6):
            g = np.asarray(grads[t][name]).T
            m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * (ql.T @ g @ qr) ** 2
            adam = ql.T @ m @ qr / (1 - 0.95**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
            assert_close(got[t][name].T, ql @ adam @ qr.T, 1e-9)
            left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
            if t % 2 == 0:
                rows, columns = (np.argsort(-np.diag(q.T @ x @ q)) for q, x in ((ql, left), (qr, right)))
                v = v[rows][:, columns]
                ql, qr = np.linalg.qr(left @ ql[:, rows])[0], np.linalg.qr(right @ qr[:, columns])[0]


# The transformation itself. -------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Any] = {
    "init": lambda layer: jnp.zeros(layer.shape),
    "update": lambda state, io: state + jnp.einsum("vgnso,gnsi->goi", io.output_grads, io.inputs),
    "precondition": lambda state, grad: state,
}


def test_it_takes_what_kfac_takes() -> None:
    """A batch with a mask, a key, `optax.chain`, extra arguments; what is drawn is what `layer_io` draws."""
    params, inputs = {"w": normal("w", 3, 2)}, normal("x", N, 5, 3)
    fn = lambda p, x: jnp.einsum("ntd,de->nte", x, p["w"])  # noqa: E731
    mask, key = jnp.arange(5)[None] < jnp.array([5, 3, 2, 1])[:, None], jax.random.key(1)
    seen = FUNCTIONS | {"update": lambda state, io: state + jnp.sum(io.mask.astype(float))}
    scale = ggn_jax.scale_by_layers(fn, LOSS, example_inputs=inputs, **seen)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), scale, optax.scale(2.0))
    step = jax.jit(
        lambda state: optimizer.update(
            params, state, params, batch=(inputs, normal("y", N, 5, 2), mask), key=key, value=1.0
        )
    )
    updates, _ = step(optimizer.init(params))
    assert_close(updates["w"], 2 * np.full((3, 2), 11.0))
    drawn = ggn_jax.scale_by_layers(model_fn, LOSS, example_inputs=BATCHES[0][0], mc_samples=2, **FUNCTIONS)
    grads = gradient(PARAMS, BATCHES[0])
    update = jax.jit(lambda state: drawn.update(grads, state, PARAMS, batch=BATCHES[0], key=key))
    layers = ggn_jax.find_layers(model_fn, PARAMS, BATCHES[0][0])
    io = jax.jit(lambda: ggn_jax.layer_io(layers, LOSS, PARAMS, BATCHES[0], mc_samples=2, key=key))()
    _, state = update(drawn.init(PARAMS))
    assert_close(state.layers["w2"], FUNCTIONS["update"](jnp.zeros((1, 2, 4)), io["w2"]))


def test_a_part_of_the_parameters() -> None:
    """Under `optax.masked`, with the other parameters' present values."""
    mask = {"w1": True, "b1": True, "w2": False, "s": False}
    options = {"fisher_type": "empirical", **FUNCTIONS}
    scale = ggn_jax.scale_by_layers(model_fn, LOSS, example_inputs=BATCHES[0][0], full_params=PARAMS, **options)
    optimizer = optax.masked(scale, mask)
    grads = gradient(PARAMS, BATCHES[0])
    update = jax.jit(lambda state: optimizer.update(grads, state, PARAMS, batch=BATCHES[0], full_params=PARAMS))
    updates, _ = update(optimizer.init(PARAMS))
    assert_close(updates["w1"] / np.sqrt(2 * N), grads["w1"], 1e-12)  # sqrt(r) of a mean over so many terms
    np.testing.assert_array_equal(updates["w2"], grads["w2"])


def test_errors() -> None:
    make = partial(ggn_jax.scale_by_layers, model_fn, LOSS, example_inputs=BATCHES[0][0], **FUNCTIONS)
    scale = make(fisher_type="empirical")
    grads, state = gradient(PARAMS, BATCHES[0]), scale.init(PARAMS)
    with pytest.raises(ValueError, match="exact"):
        make(fisher_type="exact")
    with pytest.raises(TypeError, match=r"update needs params, and batch=\(inputs, targets\)"):
        scale.update(grads, state, PARAMS)
    with pytest.raises(ValueError, match="grads must be a pytree like params"):
        scale.update({}, state, PARAMS, batch=BATCHES[0])
    with pytest.raises(ValueError, match="the model's layers are w1, w2, and the state has w1"):
        scale.update(grads, state._replace(layers={"w1": state.layers["w1"]}), PARAMS, batch=BATCHES[0])
