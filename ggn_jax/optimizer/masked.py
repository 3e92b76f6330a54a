"""Training a part of the parameters, as `optax.masked` and `optax.multi_transform` do, of a model that needs all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ggn_jax.kronecker.stacks import params_structure
from ggn_jax.optimizer.checks import as_arrays


def is_masked(params: PyTree) -> bool:
    """Whether a part is left out."""
    return any(map(_is_node, jax.tree.leaves(params, is_leaf=_is_node)))


def floating_part(params: PyTree[Array]) -> PyTree[Array]:
    """The parameters that could be trained."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else optax.MaskedNode(), params)


def model_of_part(
    model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, full_params: PyTree | None
) -> Callable[[PyTree, PyTree], Array]:
    """`model_fn` as a function of the parameters that are not masked; the others' values, or shapes, are given."""
    if not is_masked(params):
        return model_fn
    if full_params is None:
        raise ValueError(
            "params hold optax.MaskedNode, as under optax.masked and optax.multi_transform, but model_fn needs all"
            " parameters: pass full_params=params to kfac (their values or shapes) and, as an extra argument with the"
            " present values, to each update; or close model_fn over those that are not trained."
        )
    try:
        jax.tree.map(lambda *_: None, params, full_params, is_leaf=_is_node)
    except ValueError as error:
        raise ValueError(
            "full_params must be a pytree like params, with values where those are masked: wanted"
            f" {jax.tree.structure(params)}, got {jax.tree.structure(full_params)}."
        ) from error

    def merge(part: PyTree, full: PyTree) -> PyTree:
        return jax.tree.map(_filled, full) if _is_node(part) else part

    return lambda params, inputs: model_fn(jax.tree.map(merge, params, full_params, is_leaf=_is_node), inputs)


def check_full(given: PyTree, wanted: PyTree | None) -> PyTree[Array]:
    """All parameters with their present values, of the shapes that the optimizer was made for."""
    given = as_arrays("full_params", given)
    for path, leaf in jax.tree_util.tree_leaves_with_path(given):
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"full_params{jax.tree_util.keystr(path)} must have its present values; got {leaf}.")
    if wanted is not None and params_structure(given) != params_structure(wanted):
        raise ValueError(
            f"full_params must be a pytree like those that kfac was given: wanted {wanted}, got"
            f" {jax.eval_shape(lambda: given)}."
        )
    return given


def _is_node(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _filled(leaf: Any) -> Array:
    """Zeros in place of a shape, where only the model's structure matters."""
    return leaf if isinstance(leaf, jax.Array) else jnp.zeros(leaf.shape, leaf.dtype)
