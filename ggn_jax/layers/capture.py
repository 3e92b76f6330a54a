"""Run a traced model: each layer's inputs, and its output gradients for any vectors at the outputs.

As Flax's `Module.perturb`: zeros are added to each layer's output, and their cotangents are the output gradients. So
JAX's own reverse mode does everything between layers, and nothing needs to be known about it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._sharding import vary_like
from ggn_jax._unbatched import batch_axes, batched_leaves, map_batched
from ggn_jax.layers.jaxprs import (
    BRANCHES,
    REMAT,
    SCAN,
    inner_jaxpr,
    open_jaxpr,
    run_branches,
    run_jaxpr,
    run_remat,
    run_scan,
)
from ggn_jax.layers.run import run_equation, run_for_example
from ggn_jax.layers.taps import Tap, apply_to_batch, tap_cotangents
from ggn_jax.layers.trace import Trace
from ggn_jax.layers.uses import Use


class Captured(NamedTuple):
    """What one forward pass over a batch gives; arrays are in the equations' own layouts, see `Use`.

    `N` counts what the model is mapped over: examples, or one batch whose examples are coupled.
    """

    outputs: Array
    """`[N, *out]`, of all examples, also coupled ones; so are vectors."""
    aux: PyTree[Array]
    """What a coupled model returns beside its outputs; None for others."""
    inputs: tuple[PyTree[Array], ...]
    """For each use, `[N, *loops, *operand]`; of one that is tapped, what its tap makes of them, `[*loops, ...]`."""
    vjp: Callable[[Array], tuple[tuple[PyTree[Array], ...], tuple[Array, ...]]]
    """Vectors `[N, *out]` to each use's output gradients, `[N, *loops, *output]`, or to what its tap makes of them,
    `[*loops, ...]`, and to the gradients of each example in the parameters asked for, `[N, *shape]`."""
    gradient: Callable[[Array], PyTree[Array]]
    """A vector `[N, *out]` to the parameters' gradient, if that was asked for."""
    tapped: frozenset[int]
    """The numbers of the uses with a tap."""


NO_TAPS: Mapping[int, Tap] = {}


def capture(
    trace: Trace,
    params: PyTree,
    inputs: PyTree,
    leaves: Sequence[int] = (),
    gradient: bool = False,
    taps: Mapping[int, Tap] = NO_TAPS,
) -> Captured:
    """Run the model on a batch, mapped over examples, or on all of them together if it was traced so.

    `leaves` are the parameters whose gradient is wanted for each example; `gradient` asks for the batch's gradient in
    all parameters; `taps` are those of the uses, by their numbers, whose arrays are not wanted themselves.
    """
    jaxpr, consts = open_jaxpr(trace.closed)
    given, tree = jax.tree.flatten(params)
    examples, count = trace.examples, batched_leaves(inputs)[0].shape[0]
    size = count // examples
    data = map_batched(lambda x: x.reshape(size, examples, *x.shape[1:]), inputs)
    paths = {use.path: number for number, use in enumerate(trace.uses)}
    # Only calls that hold a layer are opened: custom derivative rules in all others are kept.
    containers = {path[:i] for path in paths for i in range(1, len(path))}
    run = run_for_example if leaves else run_equation

    def one(
        flat: list[Array], perturbations: dict[int, Any], own: list[Array], x: PyTree
    ) -> tuple[list[Array], dict[int, Any]]:
        values = list(flat)
        for leaf, value in zip(leaves, own, strict=True):
            values[leaf] = value
        return _evaluate(jaxpr, consts, [*values, *jax.tree.leaves(x)], (), perturbations)

    # Taps see the whole batch, so their perturbations are not mapped.
    mapped = {n: None if n in taps else 0 for n in range(len(trace.uses))}

    def batch(flat: list[Array], perturbations: dict[int, Any], own: list[Array]) -> tuple[Array, Any]:
        axes = None, mapped, 0, batch_axes(inputs)
        (outputs, *aux), captured = jax.vmap(one, axes, (0, mapped))(flat, perturbations, own, data)
        return outputs.reshape(count, *outputs.shape[2:]), ([x[0] for x in aux], captured)

    def _evaluate(
        jaxpr: Any,
        consts: Sequence[Any],
        values: Sequence[Any],
        path: tuple[int, ...],
        perturbations: dict[int, Any],
    ) -> tuple[list[Any], dict[int, Any]]:
        captured: dict[int, Any] = {}

        def step(eqn: Any, at: tuple[int, ...], values: list[Any]) -> list[Any]:
            if at in paths:
                number = paths[at]
                operand = _scaled(values[trace.uses[number].operand], trace.uses[number].factor)
                (output,) = run(eqn, values)
                if number not in taps:
                    captured[number] = operand
                    return [output + perturbations[number]]
                tap = taps[number]
                captured[number] = apply_to_batch(tap.inputs, tap.args, size, operand)
                return [tap_cotangents(tap.output_grads, tap.args, size, output, perturbations[number])]
            if at not in containers:
                return run(eqn, values)
            own = {n: perturbations[n] for p, n in paths.items() if p[: len(at)] == at}
            if eqn.primitive.name in BRANCHES:
                results, more = _branch(eqn, at, values, own)
                captured.update(more)
                return results
            inner, inner_consts = open_jaxpr(inner_jaxpr(eqn))

            def evaluate(values: Sequence[Any], perturbations: dict[int, Any]) -> tuple[list[Any], dict[int, Any]]:
                return _evaluate(inner, inner_consts, values, at, perturbations)

            name = eqn.primitive.name
            if name in SCAN:
                results, more = run_scan(eqn, evaluate, values, own)
            elif name in REMAT:
                results, more = run_remat(eqn, evaluate, values, own)
            else:
                results, more = evaluate(values, own)
            captured.update(more)
            return results

        return run_jaxpr(jaxpr, consts, values, path, step), captured

    def _branch(
        eqn: Any, at: tuple[int, ...], values: list[Any], perturbations: dict[int, Any]
    ) -> tuple[list[Any], dict[int, Any]]:
        """The branch that is taken; the layers of all others get zeros, and so add nothing to any sum."""

        def run_one(number: int, jaxpr: Any, values: list[Any]) -> tuple[list[Any], dict[int, Any]]:
            *values, perturbations = values
            opened, consts = open_jaxpr(jaxpr)
            return _evaluate(opened, consts, values, (*at, number), perturbations)

        given = [*values[1:], perturbations]
        found = [jax.eval_shape(partial(run_one, i, jaxpr), given)[1] for i, jaxpr in enumerate(eqn.params["branches"])]
        shapes = {n: shape for of_branch in found for n, shape in of_branch.items()}

        def run_all(number: int, jaxpr: Any, values: list[Any]) -> tuple[list[Any], dict[int, Any]]:
            results, captured = run_one(number, jaxpr, values)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return results, {**vary_like(zeros, (values, captured)), **captured}

        return run_branches(eqn, run_all, [values[0], *given])

    zeros = {n: _zero_perturbation(use, size, taps.get(n)) for n, use in enumerate(trace.uses)}
    zeros = vary_like(zeros, (params, inputs))
    # A copy of a parameter for each example has its gradient for each example. Copies are made of these few only.
    copies = [jnp.broadcast_to(given[leaf], (size, *given[leaf].shape)) for leaf in leaves]
    if gradient:
        outputs, vjp, (aux, captured) = jax.vjp(batch, given, zeros, copies, has_aux=True)
    else:
        outputs, vjp, (aux, captured) = jax.vjp(partial(batch, given), zeros, copies, has_aux=True)

    def uses_vjp(vectors: Array) -> tuple[tuple[PyTree[Array], ...], tuple[Array, ...]]:
        gradients, per_example = vjp(vectors)[-2:]
        return tuple(gradients[n] for n in range(len(trace.uses))), tuple(per_example)

    def params_gradient(vector: Array) -> PyTree[Array]:
        if not gradient:
            raise AssertionError("ask capture for the gradient")
        shared, _, per_example = vjp(vector)
        for leaf, rest in zip(leaves, per_example, strict=True):
            shared[leaf] = jnp.sum(rest, axis=0)  # its copies, and not itself, are what was used
        return jax.tree.unflatten(tree, shared)

    found = tuple(captured[n] for n in range(len(trace.uses)))
    return Captured(outputs, jax.tree.unflatten(trace.aux, aux), found, uses_vjp, params_gradient, frozenset(taps))


def _zero_perturbation(use: Use, size: int, tap: Tap | None) -> PyTree[Array]:
    """Zeros whose cotangent is the output gradient of a use for each example, or what its tap makes of it."""
    if tap is None:
        return jnp.zeros((size, *use.output_shape), use.output_dtype)
    step = jax.ShapeDtypeStruct((size, *use.output_shape[len(use.loops) :]), use.output_dtype)
    wanted = jax.eval_shape(tap.output_grads, tap.args, step)
    return jax.tree.map(lambda s: jnp.zeros((*use.loops, *s.shape), s.dtype), wanted)


def _scaled(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
