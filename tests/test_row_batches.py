"""Jacobians and Gram matrices of an iterable of batches are those of all data as one batch."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse.linalg
from problems import CE, SEQUENCE_X, N, assert_close, flat, normal

import ggn_jax
from ggn_jax import GramLinearOperator, JacobianLinearOperator


class Loader:
    """Batches as NumPy arrays, uneven; it counts how often they are gone over."""

    def __init__(self, *sizes: int, targets: Any = CE.targets):
        self.ends, self.sizes, self.passes, self.targets = np.cumsum(sizes), sizes, 0, targets

    def __iter__(self) -> Any:
        self.passes += 1
        for size, end in zip(self.sizes, self.ends, strict=True):
            own = slice(end - size, end)
            yield np.asarray(CE.inputs)[own], None if self.targets is None else np.asarray(self.targets)[own]


def test_jacobian_of_batches() -> None:
    """One pass for each product, and for all rows; of uneven batches, in chunks."""
    loader = Loader(1, 2, 2, targets=None)
    jacobian = JacobianLinearOperator.from_batches(CE.model_fn, CE.params, loader, progress=True, chunk_size=2)
    assert loader.passes == 1
    u = normal("u", N, 3)
    assert_close(jacobian.mv(CE.vector).ravel(), CE.jacobian() @ flat(CE.vector))
    assert loader.passes == 2
    assert_close(flat(jacobian.T.mv(u)), CE.jacobian().T @ flat(u))
    assert loader.passes == 3
    assert_close(jacobian.as_matrix(), CE.jacobian())
    assert loader.passes == 4
    assert_close(jacobian.T.as_matrix(), CE.jacobian().T)
    assert jacobian.T.T is jacobian
    assert lx.linearise(jacobian) is jacobian
    assert "outputs=float64[5, 3]" in repr(jacobian)


def root() -> np.ndarray:
    """Of the loss of all data, by its columns."""
    vectors = np.asarray(ggn_jax.make_batch_grad_output_fn(CE.loss, "type-2")(CE.outputs(), CE.targets))  # [V, N, C]
    s = np.zeros((N, 3, N, 3))
    for n in range(N):
        s[n, :, n] = vectors[:, n].T
    return s.reshape(3 * N, 3 * N)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.by_default("True-True")
def test_gram_of_batches(with_loss: bool, centred: bool) -> None:
    """Of a mean with class weights and what is ignored; uneven batches. A product takes two passes."""
    loader, j = Loader(2, 1, 2), CE.jacobian()
    x = (np.kron(np.eye(N) - 1 / N, np.eye(3)) @ j if centred else j).T
    x = x @ root() if with_loss else x
    loss = CE.loss if with_loss else None
    gram = GramLinearOperator.from_batches(CE.model_fn, CE.params, loader, loss=loss, centred=centred)
    u = normal("u", N, 3)
    assert loader.passes == 1
    assert_close(gram.mv(u).ravel(), x.T @ x @ flat(u))
    assert loader.passes == 3
    assert_close(gram.as_matrix(), x.T @ x)
    assert loader.passes == 6
    want = np.linalg.solve(x @ x.T + 0.1 * np.eye(len(x)), flat(CE.vector))
    assert_close(flat(gram.solve_ggn(CE.vector, 0.1)), want, 1e-10)
    assert loader.passes == 11
    damping = {"b1": 0.1, "w1": 0.2, "w2": 0.3}
    d = np.concatenate([np.full(CE.params[name].size, value) for name, value in damping.items()])
    want = np.linalg.solve(x @ x.T + np.diag(d), flat(CE.vector))
    assert_close(flat(gram.solve_ggn(CE.vector, damping)), want, 1e-10)
    assert lx.is_positive_semidefinite(gram.damped(0.1))
    assert ("loss=CrossEntropyLoss" in repr(gram)) == with_loss


@pytest.mark.sweep
def test_solving_on_the_host() -> None:
    """With SciPy's conjugate gradients, in function space; lineax's are refused."""
    gram = GramLinearOperator.from_batches(CE.model_fn, CE.params, Loader(3, 2), loss=CE.loss)
    u = np.asarray(normal("u", N, 3)).ravel()
    found, failed = scipy.sparse.linalg.cg(gram.damped(0.1).to_scipy(), u, rtol=1e-13)
    assert not failed
    assert_close(found, np.linalg.solve(gram.as_matrix() + 0.1 * np.eye(len(u)), u), 1e-9)
    jacobian = JacobianLinearOperator.from_batches(CE.model_fn, CE.params, Loader(3, 2))
    dense = np.asarray(jacobian.as_matrix())
    for mapping, matrix in ((jacobian, dense), (jacobian.T, dense.T)):
        for side in (mapping.to_scipy(), mapping.to_scipy().T):
            assert_close(side @ np.eye(side.shape[1]), matrix, 1e-12)
            matrix = matrix.T
    for call in (
        lambda: lx.linear_solve(gram.damped(0.1), gram.mv(normal("u", N, 3)), lx.CG(rtol=1e-6, atol=1e-6)),
        lambda: jax.jit(jacobian.mv)(CE.vector),
        lambda: jax.jit(jacobian.T.mv)(normal("u", N, 3)),
        lambda: jax.jit(lambda v: gram.solve_ggn(v, 0.1))(CE.vector),
    ):
        with pytest.raises(NotImplementedError, match="made on the host, not inside of jit"):
            call()


class Again:
    """Other batches in each pass."""

    def __init__(self, *passes: Any):
        self.passes = list(passes)

    def __iter__(self) -> Any:
        return iter(self.passes.pop(0))


def test_what_is_refused() -> None:
    """By name of the batch and with the way out; before anything is made."""
    x, y = CE.inputs, jnp.asarray(CE.targets)
    jacobian = lambda batches: JacobianLinearOperator.from_batches(CE.model_fn, CE.params, batches)  # noqa: E731
    gram = lambda batches, loss=CE.loss: GramLinearOperator.from_batches(  # noqa: E731
        CE.model_fn, CE.params, batches, loss=loss
    )
    for make in (jacobian, gram):
        with pytest.raises(TypeError, match="an iterator that is empty after one pass: pass a list, or a loader"):
            make(iter([(x, y)]))
        with pytest.raises(TypeError, match="batches must be an iterable"):
            make(3)
        with pytest.raises(ValueError, match="at least one batch"):
            make([])
        with pytest.raises(TypeError, match=r"batch 1 must be \(inputs, targets\).*; got an array"):
            make([(x, y), x])
        with pytest.raises(ValueError, match=r"(?s)batch 1: .*sizes differ: inputs \(5, 2\), for batch 0 \(5, 3\)"):
            make([(x, y), (x[:, :2], y)])
        with pytest.raises(ValueError, match=r"batch 1: inputs must be like .*float64.* got float32"):
            make([(x, y), (x.astype("float32"), y)])
        with pytest.raises(ValueError, match=r"batch 0: a mask"):
            make([(x, y, np.ones((5, 2), bool))])
        for other, message in (
            ([(x[:2], y[:2]), (x[2:], y[2:])], "different data.*: 2 examples where the first pass had 3"),
            ([(x[:3], y[:3])], "1 batches where the first pass had 2"),
            ([(x[:3], y[:3]), (x[3:], y[3:]), (x[:1], y[:1])], "1 examples where the first pass had none"),
            ([(x[:3], y[:3]), (x[3:][::-1], y[3:][::-1])], "in another order.*switch off shuffling.*batch 1 differs"),
        ):
            operator = make(Again([(x[:3], y[:3]), (x[3:], y[3:])], other))
            with pytest.raises(ValueError, match=message):
                operator.mv(CE.vector if make is jacobian else normal("u", N, 3))
    with pytest.raises(ValueError, match=r"batch 1: .*targets must be class indices"):
        gram([(x, y), (x, y + 5)])
    with pytest.raises(ValueError, match=r"batch 0: targets must be given, not None"):
        gram([(x, None)])
    weighted = ggn_jax.BCEWithLogitsLoss(weight=jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"batch 0: the loss must be the same for each batch"):
        gram([(x, jnp.zeros((5, 3)))], weighted)
    mixed = lambda p, x: CE.model_fn(p, x - x.mean(0, keepdims=True))  # noqa: E731
    for cls in (JacobianLinearOperator, GramLinearOperator):
        with pytest.raises(ValueError, match=r"batch 0: .*couples examples.*pass all data as one batch"):
            cls.from_batches(mixed, CE.params, [(x, y)])
    summed = lambda p, x: jnp.cumsum(x @ p, axis=1)  # noqa: E731
    longer = [(SEQUENCE_X, None), (SEQUENCE_X[:, :2], None)]
    with pytest.raises(ValueError, match=r"batch 1: outputs must be like batch 0's, .*\(5, 3, 3\).*\(5, 2, 3\)"):
        JacobianLinearOperator.from_batches(summed, normal("p", 2, 3), longer)
    operator = jacobian([(x, y)])
    with pytest.raises(ValueError, match="like the output"):
        operator.T.mv(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="vector must be a pytree like the parameters"):
        operator.mv(x)


def test_keys_and_phases_that_are_drawn_anew_are_told() -> None:
    """What differs between two passes in random keys, or in the sign of imaginary parts, alone."""
    x, pass_number = normal("x", 4, 3), iter(range(9))

    class Anew:
        def __init__(self, make: Any):
            self.make = make

        def __iter__(self) -> Any:
            return iter([(self.make(next(pass_number)), None)])

    def noisy(p: Any, inputs: Any) -> jax.Array:
        return (inputs[0] * jax.vmap(lambda key: jax.random.normal(key, (3,)))(inputs[1])) @ p

    def turned(p: Any, z: jax.Array) -> jax.Array:
        return (z.real + 2 * z.imag) @ p

    params = normal("p", 3, 2)
    for model_fn, make in (
        (noisy, lambda number: (x, jax.random.split(jax.random.key(number), 4))),
        (turned, lambda number: jax.lax.complex(x * np.cos(number), x * np.sin(number))),
    ):
        operator = JacobianLinearOperator.from_batches(model_fn, params, Anew(make))
        with pytest.raises(ValueError, match="two passes over the batches gave different data"):
            operator.mv(params)


@pytest.mark.parametrize("damping", [jnp.inf, {"a": 1.0, "b": jnp.inf}])
def test_infinite_dampings_are_refused(damping: Any) -> None:
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    batch = normal("x", 4, 3), normal("y", 4, 2)
    ggn = ggn_jax.GGNLinearOperator(lambda p, x: x @ p["a"] + p["b"][None], ggn_jax.MSELoss(), params, batch)
    with pytest.raises(ValueError, match=r"damping.* must be finite; got inf"):
        ggn.damped(damping)
