"""Checks of arguments of the Kronecker operators."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ggn_jax._checks import as_array, check_key, is_concrete
from ggn_jax._draws import example_keys
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.vectors import uses_random_signs
from ggn_jax.operators.problem import Problem


def check_draw_key(problem: Problem, options: Options, key: Any) -> Array | None:
    """The key if anything is drawn, else None."""
    output = jax.ShapeDtypeStruct(problem.outputs.shape[1:], problem.outputs.dtype)
    signs = uses_random_signs(problem.loss, output, options.fisher_type, options.positions, problem.num_coupled)
    if options.fisher_type is not FisherType.MC and not signs:
        return None  # a key is accepted anyway: a loop over Fisher types may pass it to all of them
    wanted_by = "fisher_type 'mc'"
    if signs:
        several = "coupled examples" if problem.coupled else "several loss positions"
        wanted_by = f"fisher_type 'type-2' with {several} (or pass positions='exact')"
    return check_key(key, wanted_by=wanted_by, batch=True)


def check_draws(problem: Problem, options: Options, key: Any, start: int) -> Array | None:
    """A key per example if anything is drawn: it depends only on the key and the example's number, from `start` on."""
    key = check_draw_key(problem, options, key)
    return None if key is None else example_keys(key, start, problem.outputs.shape[0])


def check_mask(mask: Any, problem: Problem) -> Array | None:
    """`mask` as an array `[N, *positions]`; None if it is known to leave nothing out."""
    if mask is None:
        return None
    mask = as_array("mask", mask)
    size = problem.outputs.shape[0]
    if mask.ndim < 2 or mask.shape[0] != size or mask.dtype != bool:
        way_out = (
            " To leave out whole examples, make them the positions of one: inputs[None], targets[None], mask[None]."
            if mask.shape == (size,)
            else ""
        )
        raise ValueError(
            f"mask must be boolean, of shape [N, *positions] with N = {size}; got {mask.dtype} of shape"
            f" {mask.shape}.{way_out}"
        )
    single = mask.size == size  # with one position per example, a layer that has it looks like one that has none
    return None if single and is_concrete(mask) and np.asarray(mask).all() else mask
