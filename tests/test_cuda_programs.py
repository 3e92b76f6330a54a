"""Programs for CUDA: all public functions are lowered; inverses and precision are as they are there."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_cases import problem, step_of
from cuda_emulation import as_on_cuda

import ggn_jax
from ggn_jax._precision import full_precision
from ggn_jax.kronecker import inverse
from ggn_jax.kronecker.algebra import Kronecker
from ggn_jax.kronecker.inverse import inverse_by_halves, inverse_by_solves
from ggn_jax.kronecker.pairs import invert_pairs


@pytest.mark.parametrize("invert", [inverse_by_halves, inverse_by_solves])
def test_inverses_from_triangular_factors(
    invert: Callable[[jax.Array], jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inverse, "MIN_SPLIT_SIZE", 40)
    size = 75  # cut in halves once, and one of these again
    x = np.random.default_rng(0).normal(size=(size, 2 * size)) / size**0.5
    matrix = x @ x.T
    got = jax.jit(lambda root: invert(root))(jnp.linalg.cholesky(jnp.asarray(matrix)))
    np.testing.assert_allclose(got, np.linalg.inv(matrix), rtol=1e-9, atol=1e-11)


def test_products_in_full_precision() -> None:
    """The sum of three products that round has an error of float32's size; what is not finite stays so."""
    x, y = np.random.default_rng(0).normal(size=(2, 50, 50)).astype(np.float32)
    want = x.astype(float) @ y
    x[0, 0], x[1, 1] = np.inf, np.nan

    @jax.jit
    @as_on_cuda
    def products(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return full_precision(jnp.matmul, x, y), jnp.matmul(x, y)

    full, default = map(np.asarray, products(x, y))
    assert not np.any(np.isfinite(full[:2]))
    errors = [np.linalg.norm((got - want)[2:]) / np.linalg.norm(want[2:]) for got in (full, default)]
    assert errors[0] < 5e-7 < 1e-4 < errors[1]


def test_factorisations_do_not_round() -> None:
    """The inverse of a sum of two products, the terms of which differ in size, is factorised in full precision."""
    rng = np.random.default_rng(0)

    def factor(size: int, least: float) -> np.ndarray:
        q, _ = np.linalg.qr(rng.normal(size=(size, size)))
        return ((q * np.logspace(least, 0, size)) @ q.T)[None]

    pair = Kronecker((factor(30, -4), factor(30, -4)), (factor(20, -3), 1e-3 * factor(20, -3)))
    vector = rng.normal(size=(1, 20, 30))

    def both(pair: Kronecker, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        (inverted,) = invert_pairs([pair], [jnp.full(1, 1e-6, vector.dtype)])
        return inverted.logdets(), inverted.mv(vector)

    want = jax.jit(both)(*jax.tree.map(jnp.asarray, (pair, vector)))
    got = jax.jit(as_on_cuda(both))(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (pair, vector)))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    error = np.linalg.norm(np.asarray(got[1]) - np.asarray(want[1])) / np.linalg.norm(want[1])
    assert error < 1e-3  # of the four products with its bases, which round


class Softmax(ggn_jax.LikelihoodLoss):
    """Of a user: its Hessian is by automatic differentiation, and its square root a matrix."""

    curvature = "hessian"
    term_axes = (-1,)

    def nll(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(f)[y]

    def sample(self, key: jax.Array, f: jax.Array) -> jax.Array:
        return jax.random.categorical(key, f)


@cache
def programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The public functions that compute something under `jit`, each on a small case in float32."""
    model_fn, loss, params, batch = problem()
    key, args = jax.random.key(2), (params, batch)
    drawn = {"fisher_type": "mc", "key": key}

    def operator(kind: str, use: Callable[[Any, Any], Any] = lambda op, v: op.mv(v), **options: Any) -> Any:
        made = getattr(ggn_jax, f"{kind}LinearOperator")
        return lambda params, batch: use(made(model_fn, loss, params, batch, **options), params)

    def tied(params: Any, x: Any) -> jax.Array:
        """One weight, used twice."""
        w = params["loop"][0]
        return (jnp.tanh(x[0].reshape(-1, 2, 8) @ w) @ w)[..., :3]

    def likelihood(outputs: jax.Array, targets: jax.Array) -> Any:
        return ggn_jax.make_batch_grad_output_fn(Softmax(), "type-2")(outputs, targets), ggn_jax.LossHessian(
            Softmax(), outputs, targets
        ).sqrt_mv(outputs)

    def jacobians(params: Any, batch: Any) -> Any:
        jacobian = ggn_jax.JacobianLinearOperator(model_fn, params, batch[0])
        gram = ggn_jax.GramLinearOperator(model_fn, params, batch[0], loss=loss, targets=batch[1])
        return jacobian.T.mv(jacobian.mv(params)), gram.solve_ggn(params, 1e-2)

    def layers(params: Any, batch: Any) -> Any:
        found = ggn_jax.find_layers(model_fn, params, batch[0])
        io = ggn_jax.layer_io(found, loss, params, batch, **drawn)
        matrices, rest = ggn_jax.to_matrices(found, params)
        sums = ggn_jax.sum_layer_io(
            lambda io: {name: jnp.einsum("gnsi,gnsj->gij", io[name].inputs, io[name].inputs) for name in io},
            *(found, loss, params, batch),
            chunk_size=3,
            **drawn,
        )
        return io.grads, ggn_jax.from_matrices(found, matrices, rest), sums

    functions = {
        "inverse": lambda op, v: op.inverse(1e-2).mv(v),
        "exact inverse": lambda op, v: op.inverse(1e-2, "exact").mv(v),
        "roots": lambda op, v: (op.sqrt(1e-2).mv(v), op.inverse_sqrt(1e-2).mv(v)),
        "numbers": lambda op, v: (op.logdet(1e-2), op.trace(), op.diagonal(), op.frobenius_norm()),
    }
    outputs, targets = jnp.zeros((6, 3), jnp.float32), jnp.zeros(6, jnp.int32)
    ce = ggn_jax.CrossEntropyLoss()
    found: dict[str, Any] = {
        f"vectors {kind}": (
            lambda o, t, kind=kind: ggn_jax.make_batch_grad_output_fn(ce, kind)(o, t, key if kind == "mc" else None),
            (outputs, targets),
        )
        for kind in ("type-2", "mc", "empirical")
    }
    found["loss Hessian"] = lambda o, t: ggn_jax.LossHessian(ce, o, t).mv(o), (outputs, targets)
    found["likelihood"] = likelihood, (outputs, targets)
    for kind in ("GGN", "Hessian", "EF", "GGNDiagonal"):
        found[kind] = operator(kind), args
    for kind in ("KFAC", "EKFAC"):
        found |= {f"{kind} {name}": (operator(kind, use, **drawn), args) for name, use in functions.items()}
    found["KFOC"] = operator("KFOC", functions["inverse"], **drawn), args
    found["pair"] = (
        lambda params, batch: ggn_jax.KFACLinearOperator(
            tied, loss, {"loop": params["loop"]}, (batch[0], batch[1][:, :2]), **drawn
        ).logdet(1e-2),
        args,
    )
    found |= {"Jacobians": (jacobians, args), "layers": (layers, args)}
    steps: dict[str, Any] = {"default": {}, "EKFAC": {"ekfac": True}, "exact": {"damping_method": "exact"}}
    for name, options in steps.items():
        rate = {} if name == "default" else {"learning_rate": 0.1}
        optimizer = ggn_jax.kfac(model_fn, loss, **rate, example_inputs=batch[0], **options)
        found[f"step {name}"] = step_of(optimizer), (params, jax.eval_shape(optimizer.init, params), batch)
    return found


FIRST = {"vectors type-2", "likelihood", "GGN", "KFAC inverse", "pair", "step default"}


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.sweep)], ids=["first", "others"])
def test_programs_for_cuda(first: bool) -> None:
    """They can be lowered, without a product in full precision, which takes XLA seconds to build for each shape."""
    found = programs()
    for name in FIRST if first else found.keys() - FIRST:
        fn, args = found[name]
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert "HIGHEST" not in text, name
        assert "dot_general" in text or name in ("vectors type-2", "vectors mc", "vectors empirical", "loss Hessian"), (
            name
        )
