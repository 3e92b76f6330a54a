"""Models with derivatives in reverse mode only (`jax.custom_vjp`), as fused attention; oracles have JAX's own rules."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import torch
from problems import N, assert_close, ce_sequence_classes_last, flat

import ggn_jax

CASE = ce_sequence_classes_last()
W, V = CASE.params


def attention(q: jax.Array) -> jax.Array:
    """Of one sequence `[T, D]` to itself."""
    return jax.nn.softmax(q @ q.T, axis=-1) @ q


def forward(rule: Any, q: jax.Array) -> Any:
    return rule(q), q


def exact_backward(q: jax.Array, g: jax.Array) -> jax.Array:
    # Where nothing comes in, nothing is divided: the rule's own derivative at 0 is not that elsewhere.
    scale = jnp.max(jnp.abs(g))
    g = jnp.where(scale == 0, 0, g)
    return jax.vjp(attention, q)[1](g)[0]


@jax.custom_vjp
def differentiable(q: jax.Array) -> jax.Array:
    return attention(q)


differentiable.defvjp(lambda q: (attention(q), q), lambda q, g: (exact_backward(q, g),))


@jax.custom_vjp
def calling_itself(q: jax.Array) -> jax.Array:
    """As JAX's documentation writes rules, the first derivative holds the function again; here its rule has a rule."""
    return attention(q)


@jax.custom_vjp
def backward(q: jax.Array, g: jax.Array) -> jax.Array:
    return exact_backward(q, g)


backward.defvjp(lambda q, g: (backward(q, g), (q, g)), lambda saved, u: jax.vjp(exact_backward, *saved)[1](u))
calling_itself.defvjp(partial(forward, calling_itself), lambda q, g: (backward(q, g),))


def on_host(fn: Any, like: jax.Array, *args: jax.Array) -> jax.Array:
    """A kernel of which JAX knows nothing."""
    return jax.pure_callback(fn, jax.ShapeDtypeStruct(like.shape, like.dtype), *args, vmap_method="sequential")


def numpy_attention(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = np.asarray(q)
    p = np.exp(q @ q.T)
    p /= p.sum(-1, keepdims=True)
    return p, p @ q


def numpy_backward(q: np.ndarray, g: np.ndarray) -> np.ndarray:
    q, g = np.asarray(q), np.asarray(g)
    p, _ = numpy_attention(q)
    dp = g @ q.T
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    return p.T @ g + ds @ q + ds.T @ q


@jax.custom_vjp
def kernel(q: jax.Array) -> jax.Array:
    return on_host(lambda q: numpy_attention(q)[1], q, q)


kernel.defvjp(partial(forward, kernel), lambda q, g: (on_host(numpy_backward, q, q, g),))


def model(attend: Any, params: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(attend)(jnp.einsum("ntd,dh->nth", x, params[0])) @ params[1]


def problem(attend: Any, loss: Any = CASE.loss) -> tuple[Any, ...]:
    return partial(model, attend), loss, [W, V], (CASE.inputs, CASE.targets)


PLAIN = dataclasses.replace(CASE, model_fn=partial(model, attention))
VECTOR = PLAIN.vector
TWICE = pytest.mark.parametrize("attend", [differentiable, calling_itself])


@TWICE
@pytest.mark.by_default("calling_itself")
def test_products_are_exact(attend: Any) -> None:
    args, v = problem(attend), flat(VECTOR)
    ggn = ggn_jax.GGNLinearOperator(*args)
    for operator in (ggn, ggn_jax.GGNLinearOperator(*args, chunk_size=2), lx.linearise(ggn)):
        assert_close(flat(operator.mv(VECTOR)), PLAIN.ggn() @ v)
    for per in ("term", "example"):
        assert_close(flat(ggn_jax.EFLinearOperator(*args, per=per).mv(VECTOR)), PLAIN.ef(per) @ v)
    assert_close(flat(ggn_jax.HessianLinearOperator(*args).mv(VECTOR)), PLAIN.hessian() @ v)


def test_monte_carlo_products_are_those_of_forward_mode() -> None:
    options: dict[str, Any] = {"mc_samples": 2, "key": jax.random.key(0)}
    got, want = (ggn_jax.GGNLinearOperator(*problem(fn), **options).mv(VECTOR) for fn in (differentiable, attention))
    assert_close(flat(got), flat(want))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("per", ["term", "example"])
@pytest.mark.by_default("term-None", "example-1")
def test_empirical_fisher_of_a_kernel(per: Any, chunk_size: int | None) -> None:
    """Its gradients are all that is known; targets of a term or a whole example may be ignored."""
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1, ignore_index=-1)
    targets = np.array([[0, 1, -1], [2, 3, 1], [-1, -1, -1], [0, 0, 3], [2, -1, 1]])
    assert targets.shape == (N, 3)
    torch_loss = partial(torch.nn.CrossEntropyLoss, ignore_index=-1)
    case = dataclasses.replace(
        PLAIN, loss=loss, targets=targets, torch_loss=torch_loss, targets_to_torch=lambda targets: targets
    )
    model_fn, _, params, (inputs, _) = problem(kernel)
    ef = ggn_jax.EFLinearOperator(model_fn, loss, params, (inputs, targets), per=per, chunk_size=chunk_size)
    assert_close(flat(ef.mv(VECTOR)), case.ef(per) @ flat(VECTOR))


def test_what_a_kernel_cannot_do_is_refused() -> None:
    args = problem(kernel)
    for cls in (ggn_jax.GGNLinearOperator, ggn_jax.HessianLinearOperator):
        with pytest.raises(NotImplementedError, match=r"cannot be differentiated itself \(.*KFACLinearOperator"):
            cls(*args).mv(VECTOR)
    optimizer = ggn_jax.kfac(*args[:2], example_inputs=args[3][0])
    state, update = optimizer.init(args[2]), partial(optimizer.update, batch=args[3], key=jax.random.key(0))
    with pytest.raises(NotImplementedError, match="kfac with numbers or schedules as learning rate"):
        jax.eval_shape(update, VECTOR, state, args[2])


def test_what_a_kernel_can_do() -> None:
    """What the error names."""
    (args, plain), key = (problem(fn) for fn in (kernel, attention)), jax.random.key(0)
    for make in (ggn_jax.GGNDiagonalLinearOperator, partial(ggn_jax.KFACLinearOperator, key=key)):
        assert_close(flat(make(*args).mv(VECTOR)), flat(make(*plain).mv(VECTOR)))


@TWICE
@pytest.mark.by_default("differentiable")
def test_quadratic_model(attend: Any) -> None:
    """The learning rate is the minimum along the direction, with the exact GGN."""
    model_fn, loss, params, batch = problem(attend)
    options: dict[str, Any] = {"example_inputs": batch[0], "damping": 0.2, "fisher_type": "empirical"}
    grads = jax.grad(lambda params: loss(model(attention, params, batch[0]), batch[1]))(params)
    steps = []
    for rate in (ggn_jax.QuadraticModel(momentum=False), 1.0):
        optimizer = ggn_jax.kfac(model_fn, loss, rate, momentum=None, kl_clip=None, **options)
        update = jax.jit(optimizer.update)
        steps.append(flat(update(grads, optimizer.init(params), params, batch=batch)[0]))
    step, d = steps
    matrix = PLAIN.ggn() + float(np.float32(0.2)) * np.eye(len(d))
    assert_close(step, -(d @ flat(grads)) / (d @ matrix @ d) * d, 1e-6)
