"""Checks of what the Kronecker family is asked for."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ggn_jax._checks import as_array, check_key, is_concrete
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.layout import Options
from ggn_jax.kronecker.vectors import draws_signs
from ggn_jax.layers.check import coupling, gradient_coupling, tolerance
from ggn_jax.layers.report import EXAMPLES, coupling_message
from ggn_jax.operators.problem import Problem


def check_draws(problem: Problem, options: Options, key: Any, start: int) -> Array | None:
    """A key per datum, where something is drawn: it depends on the datum's number alone, from `start` on."""
    output = jax.ShapeDtypeStruct(problem.outputs.shape[1:], problem.outputs.dtype)
    signs = draws_signs(problem.loss, output, options.fisher_type, options.positions)
    if options.fisher_type is not FisherType.MC and not signs:
        if key is not None:
            raise ValueError(f"key is not used by fisher_type {options.fisher_type.value!r} here: leave it out.")
        return None
    wanted_by = "fisher_type 'mc'"
    if signs:
        wanted_by = "fisher_type 'type-2' with several loss positions (or pass positions='exact')"
    numbers = jnp.arange(start, start + problem.targets.shape[0])
    return _fold_in(check_key(key, wanted_by=wanted_by, batch=True), numbers)


_fold_in = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def check_mask(mask: Any, problem: Problem) -> Array | None:
    if mask is None:
        return None
    mask = as_array("mask", mask)
    size = problem.targets.shape[0]
    if mask.ndim < 2 or mask.shape[0] != size or mask.dtype != bool:
        raise ValueError(
            f"mask must be boolean, of shape [N, *positions] with N = {size}; got {mask.dtype} of shape {mask.shape}."
        )
    return mask


@eqx.filter_jit
def _coupling(model_fn: Any, params: PyTree[Array], inputs: PyTree[Array]) -> tuple[Array, Array]:
    """How far examples depend on each other, and whether an output is NaN."""
    gap = jnp.maximum(coupling(model_fn, params, inputs), gradient_coupling(model_fn, params, inputs))
    return gap, jnp.any(jnp.isnan(model_fn(params, inputs)))


def check_independent(model_fn: Any, params: PyTree[Array], inputs: PyTree[Array], dtype: Any) -> None:
    """Refuse a model whose examples depend on each other, where values can be looked at."""
    leaves = jax.tree.leaves((params, inputs, model_fn))
    if not all(is_concrete(leaf) for leaf in leaves if isinstance(leaf, jax.Array)):
        return
    with jax.ensure_compile_time_eval():  # constants are known inside of `jit`, too
        few = jax.tree.map(lambda x: x[:EXAMPLES], inputs)
        gap, has_nan = map(float, _coupling(model_fn, params, few))
    # The root: accelerators may multiply a batch in lower precision, and batch statistics change outputs by far more.
    allowed = tolerance(dtype, *(leaf.dtype for leaf in jax.tree.leaves(params))) ** 0.5
    if has_nan:
        raise ValueError("the outputs of model_fn are NaN for the first examples: look at params and inputs.")
    if not gap <= allowed:
        raise ValueError(coupling_message(gap))
