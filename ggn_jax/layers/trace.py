"""Find the layers of a model: trace it on one example, and walk over its jaxpr."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, PyTree

from ggn_jax._checks import check_outputs
from ggn_jax._model import Model
from ggn_jax._sharding import explicit_mesh, sharding_errors_explained
from ggn_jax._unbatched import are_batched, batched_leaves, map_batched
from ggn_jax.layers.analysis import analyse
from ggn_jax.layers.distribute import distribute
from ggn_jax.layers.labels import Data
from ggn_jax.layers.uses import ElementwiseUse, UncoveredUse, Use


@dataclass(frozen=True, eq=False)
class Trace:
    """A model's jaxpr for one example, or for a batch whose examples are coupled, and what was found in it."""

    closed: Any  # a jaxpr of parameters, then inputs; its results are outputs, then what a coupled model also returns
    structure: Any  # of the parameters
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    names: tuple[str, ...]
    uses: tuple[Use, ...]
    elementwise: tuple[ElementwiseUse, ...]
    uncovered: tuple[UncoveredUse, ...]
    outputs: jax.ShapeDtypeStruct  # of one example, without batch axis
    head: Data  # of the model's output: if it is a layer's output, moved or not, which layer's, and which entries
    batched: tuple[bool, ...]  # whether each leaf of the inputs has a batch axis
    examples: int  # that the model was traced on together: 1 where they are independent
    aux: Any  # the structure of what a coupled model returns as well

    def __reduce__(self) -> Any:
        """Refuse to be pickled or copied, which jaxprs cannot be."""
        raise TypeError(
            "what was found by tracing a model cannot be pickled or copied: save arrays, as the leaves of partial sums,"
            " and find the layers again."
        )


def trace_model(
    model_fn: Callable[[PyTree, PyTree], Array], params: PyTree, inputs: PyTree, *, coupled: bool = False
) -> Trace:
    """Trace `model_fn` on one example of `inputs` (a batch of one, its axis kept) and find the uses of `params`.

    Coupled examples are traced together: the batch is one example, whose positions are those of all of them.
    Arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
    """

    # `eval_shape` of the arrays, and not of their shapes and dtypes: inside `jax.shard_map`, types also say over which
    # axes of the mesh values vary.
    def cut(params: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        return params, inputs if coupled else map_batched(lambda x: x[:1], inputs)

    def run(params: PyTree, inputs: PyTree) -> tuple[Any, PyTree]:
        if coupled and isinstance(model_fn, Model):
            return model_fn.with_aux(params, inputs)
        return model_fn(params, inputs), None

    if explicit_mesh((params, inputs)) is not None:
        params, inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, inputs))
    with sharding_errors_explained():
        like, one = jax.eval_shape(cut, params, inputs)
        closed, (outputs, aux) = jax.make_jaxpr(run, return_shape=True)(like, one)
    examples = batched_leaves(one)[0].shape[0] if coupled else 1
    if not isinstance(outputs, jax.ShapeDtypeStruct):
        raise TypeError(f"model_fn must return one array [N, *out]; got {jax.tree.structure(outputs)}.")
    if outputs.shape[:1] != (examples,):
        raise ValueError(
            f"model_fn must return an array [N, *out]; for a batch of {examples if coupled else 'one'} it returned"
            f" shape {outputs.shape}."
        )
    check_outputs("the outputs of model_fn", outputs)
    leaves = jax.tree_util.tree_leaves_with_path(like)
    shapes = [leaf.shape for _, leaf in leaves]
    batched = tuple(are_batched(one))
    analysis, head = analyse(closed, shapes, batched)
    if analysis.has_computed_weight or analysis.has_unmappable:
        # Products with computed weights may be products with parameters, in another order. The distributed jaxpr is
        # taken only if it leaves fewer parameters without a Kronecker form, or if JAX cannot map the first one.
        fn = distribute(closed, len(leaves), [not is_batched for is_batched in batched])
        with sharding_errors_explained():
            other = jax.make_jaxpr(fn)(*jax.tree.leaves((like, one)))
        found = analyse(other, shapes, batched)
        if analysis.has_unmappable or found[0].uncovered_leaves() < analysis.uncovered_leaves():
            closed, (analysis, head) = other, found
        # Last, what a weight makes of computed parameters (a normalised query, projected) as data for what comes next.
        # Not before: a product of two parameters is a weight first.
        if analysis.uncovered_leaves():
            found = analyse(closed, shapes, batched, commit_early=True)
            analysis, head = found if found[0].uncovered_leaves() < analysis.uncovered_leaves() else (analysis, head)
    return Trace(
        closed,
        jax.tree.structure(like),
        tuple(shapes),
        tuple(leaf.dtype for _, leaf in leaves),
        tuple(jax.tree_util.keystr(path) for path, _ in leaves),
        tuple(analysis.uses),
        tuple(analysis.elementwise),
        tuple(analysis.uncovered),
        jax.ShapeDtypeStruct(outputs.shape[1:], outputs.dtype),
        head,
        batched,
        examples,
        jax.tree.structure(aux),
    )
