"""Run a traced model: each layer's inputs, and its output gradients for any vectors at the outputs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._sharding import vary_like
from ggn_jax.layers.jaxprs import REMAT, SCAN, inner_jaxpr, open_jaxpr, run_jaxpr, run_remat, run_scan
from ggn_jax.layers.run import run_equation, run_of_example
from ggn_jax.layers.trace import Trace


class Captured(NamedTuple):
    """What one forward pass over a batch gives; arrays are in the equations' own layouts, see `Use`."""

    outputs: Array  # [N, *out]
    inputs: tuple[Array, ...]  # for each use, [N, *loops, *operand]
    pull_back: Callable[[Array], tuple[tuple[Array, ...], tuple[Array, ...]]]
    """Vectors `[N, *out]` to each use's output gradients, `[N, *loops, *output]`, and to the gradients of each datum in
    the parameters asked for, `[N, *shape]`."""
    gradient: Callable[[Array], PyTree[Array]]
    """A vector `[N, *out]` to the parameters' gradient, if that was asked for."""


def capture(
    trace: Trace, params: PyTree, inputs: PyTree, leaves: Sequence[int] = (), gradient: bool = False
) -> Captured:
    """Run the model on a batch, mapped over examples.

    `leaves` are parameters wanted with a gradient per datum; `gradient` asks for the batch's in all parameters.
    """
    jaxpr, consts = open_jaxpr(trace.closed)
    given, tree = jax.tree.flatten(params)
    size = jax.tree.leaves(inputs)[0].shape[0]
    paths = {use.path: number for number, use in enumerate(trace.uses)}
    containers = {path[:i] for path in paths for i in range(1, len(path))}
    run = run_of_example if leaves else run_equation

    def one(
        flat: list[Array], perturbations: dict[int, Array], own: list[Array], x: PyTree
    ) -> tuple[Array, dict[int, Array]]:
        values = list(flat)
        for leaf, value in zip(leaves, own, strict=True):
            values[leaf] = value
        values += [leaf[None] for leaf in jax.tree.leaves(x)]
        (outputs,), captured = _evaluate(jaxpr, consts, values, (), perturbations)
        return outputs[0], captured

    def batch(flat: list[Array], perturbations: dict[int, Array], own: list[Array]) -> tuple[Array, dict[int, Array]]:
        return jax.vmap(one, in_axes=(None, 0, 0, 0))(flat, perturbations, own, inputs)

    def _evaluate(
        jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], path: tuple[int, ...], perturbations: dict[int, Array]
    ) -> tuple[list[Any], dict[int, Array]]:
        captured: dict[int, Array] = {}

        def step(eqn: Any, at: tuple[int, ...], values: list[Any]) -> list[Any]:
            if at in paths:
                number = paths[at]
                captured[number] = _scaled(values[trace.uses[number].operand], trace.uses[number].factor)
                (output,) = run(eqn, values)
                return [output + perturbations[number]]
            if at not in containers:
                return run(eqn, values)
            own = {n: perturbations[n] for p, n in paths.items() if p[: len(at)] == at}
            inner, inner_consts = open_jaxpr(inner_jaxpr(eqn))

            def evaluate(values: Sequence[Any], perturbations: dict[int, Array]) -> tuple[list[Any], dict[int, Array]]:
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

    zeros = {n: jnp.zeros((size, *use.output_shape), use.output_dtype) for n, use in enumerate(trace.uses)}
    zeros = vary_like(zeros, (params, inputs))
    copies = [jnp.broadcast_to(given[leaf], (size, *given[leaf].shape)) for leaf in leaves]
    if gradient:
        outputs, vjp, captured = jax.vjp(batch, given, zeros, copies, has_aux=True)
    else:
        outputs, vjp, captured = jax.vjp(partial(batch, given), zeros, copies, has_aux=True)

    def pull_back(vectors: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        gradients, per_datum = vjp(vectors)[-2:]
        return tuple(gradients[n] for n in range(len(trace.uses))), tuple(per_datum)

    def total(vector: Array) -> PyTree[Array]:
        if not gradient:
            raise ValueError("ask capture for the gradient")
        shared, _, per_datum = vjp(vector)
        for leaf, rest in zip(leaves, per_datum, strict=True):
            shared[leaf] = jnp.sum(rest, axis=0)  # its copies, and not itself, are what was used
        return jax.tree.unflatten(tree, shared)

    return Captured(outputs, tuple(captured[n] for n in range(len(trace.uses))), pull_back, total)


def _scaled(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
