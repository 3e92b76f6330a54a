"""Evaluate equations: a few by other means, for speed or for sharded batches, with the same results and derivatives."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from ggn_jax._hints import ragged_errors_explained
from ggn_jax.layers.convolution import CONVOLUTION, convolution, convolution_by_patches, is_convolution
from ggn_jax.layers.dot import dot, has_unit_axes
from ggn_jax.layers.jaxprs import (
    BRANCHES,
    CUSTOM_JVP,
    CUSTOM_VJP,
    INLINED,
    REMAT,
    SCAN,
    bind,
    holds,
    inner_jaxpr,
    open_jaxpr,
    run_branches,
    run_jaxpr,
    run_remat,
    run_scan,
)
from ggn_jax.layers.pooling import is_max_pool, max_pool


def run_equation(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of an equation for these inputs."""
    if is_convolution(eqn):
        return [convolution(eqn, *values)]
    if is_max_pool(eqn):
        return [max_pool(eqn, *values)]
    if has_unit_axes(eqn):
        return [dot(eqn, *values)]
    return bind(eqn, values)


def vmap_examples(fn: Callable[..., PyTree[Array]], in_axes: Any = 0) -> Callable[..., PyTree[Array]]:
    """`jax.vmap(fn)` that is also right for gradients in a convolution's kernel for each example of a sharded batch."""

    def run(*args: PyTree[Array]) -> PyTree[Array]:
        with ragged_errors_explained():
            return jax.vmap(partial(_without_custom_rules, fn), in_axes)(*args)

    return run


def _without_custom_rules(fn: Callable[..., PyTree[Array]], *args: PyTree[Array]) -> PyTree[Array]:
    """`fn(*args)` by `run_for_example`; not to be differentiated, since custom derivative rules are gone."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    step = partial(run_for_example, run=bind, keep_rules=False)
    return jax.tree.unflatten(jax.tree.structure(shapes), _run(closed, step, jax.tree.leaves(args)))


def run_for_example(
    eqn: Any, values: Sequence[Any], run: Callable[..., list[Any]] = run_equation, keep_rules: bool = True
) -> list[Any]:
    """The results of `run(eqn, values)`, to be mapped over examples, which may have kernels of their own.

    Calls that hold convolutions are opened; with `keep_rules`, their custom derivative rules are kept.
    """
    inside = partial(run_for_example, run=run, keep_rules=keep_rules)
    name = eqn.primitive.name
    if name in CONVOLUTION:
        return [_convolution_for_example(eqn, run)(*values)]
    if not holds(eqn, CONVOLUTION):
        return run(eqn, values)
    if name in SCAN:
        return run_scan(eqn, lambda values, _: (_run(inner_jaxpr(eqn), inside, values), ()), list(values), ())[0]
    if name in REMAT:
        return list(run_remat(eqn, partial(_run, inner_jaxpr(eqn), inside), values))
    if name in BRANCHES:
        return list(run_branches(eqn, lambda _, jaxpr, values: _run(jaxpr, inside, values), list(values)))
    if name in CUSTOM_JVP | CUSTOM_VJP and keep_rules:
        return _with_custom_rules(eqn, values)
    if name in INLINED | CUSTOM_VJP:
        return _run(inner_jaxpr(eqn), inside, values)
    return run(eqn, values)


def _run(jaxpr: Any, step: Callable[..., list[Any]], values: Sequence[Any]) -> list[Any]:
    opened, consts = open_jaxpr(jaxpr)
    return run_jaxpr(opened, consts, values, (), lambda eqn, path, values: step(eqn, values))


def _convolution_for_example(eqn: Any, run: Callable[..., list[Any]]) -> Callable[[Array, Array], Array]:
    def plain(x: Array, kernel: Array) -> Array:
        return run(eqn, [x, kernel])[0]

    # How to map a convolution is decided only when it is mapped, since only then is it known what has the mapped axis.
    one = custom_vmap(plain)
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]

    @one.def_vmap
    def each(size: int, batched: list[bool], x: Array, kernel: Array) -> tuple[Array, bool]:
        # JAX refuses to map over kernels alone where there are groups and a mesh.
        apart = batched[1] and (batched[0] or groups > 1)
        fn = partial(convolution_by_patches, eqn) if apart else plain
        return jax.vmap(fn, [0 if is_batched else None for is_batched in batched])(x, kernel), True

    return one


def _with_custom_rules(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """An equation with custom derivative rules, such that convolutions in its derivative are mapped as well."""

    @jax.custom_vjp
    def call(*values: Array) -> list[Array]:
        return bind(eqn, values)

    def forward(*values: Array) -> tuple[list[Array], Any]:
        return jax.vjp(lambda *values: bind(eqn, values), *values)

    def backward(vjp: Any, vectors: list[Array]) -> Any:
        return _without_custom_rules(vjp, vectors)

    call.defvjp(forward, backward)
    return list(call(*values))
