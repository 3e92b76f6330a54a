"""One pass over a batch that gives what each layer takes in and what comes back to it; sums of functions of that."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import compute_dtype
from ggn_jax._eager import compiled
from ggn_jax._hints import example_inputs_named
from ggn_jax._sharding import compiler_sharded, explicit_mesh, varying_axes
from ggn_jax._supported import check_exact
from ggn_jax._unbatched import are_batched
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.checks import check_draws, check_mask
from ggn_jax.kronecker.factors import check_mask_fits
from ggn_jax.kronecker.masks import arrange_masks
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.vectors import Positions, count_vectors, make_vector_fn
from ggn_jax.layers import Captured, Trace, capture
from ggn_jax.layers.check import COUPLED_WAY_OUT, check_independent
from ggn_jax.layerwise.found import LayerInfo, Layers
from ggn_jax.layerwise.io import LayerIO, LayersIO, UseIO
from ggn_jax.loss import Loss
from ggn_jax.operators.base import structure_of
from ggn_jax.operators.problem import Problem, make_problem


def layer_io(
    layers: Layers,
    loss: Loss,
    params: PyTree[Array],
    batch: tuple[PyTree, Any],
    *,
    fisher_type: FisherType | str = Options.fisher_type,
    mc_samples: int = Options.mc_samples,
    key: Any = None,
    positions: Positions = Options.positions,
    mask: Any = None,
    grads: bool = True,
) -> LayersIO:
    """Run a model once, and capture each layer's inputs and output gradients, the loss and its gradient.

    The gradient output vectors of the batch (`make_batch_grad_output_fn`), reduction included, are back-propagated. So,
    with `a` the inputs and `g` the output gradients of a layer, for `io = layer_io(...)`:

    - type-2 and MC: the GGN of the batch's loss, in the layer's matrix, is `sum_{v,n} vec(G) vec(G)^T` (for MC in
      expectation), `G = sum_s g a^T` being `per_example_grads()`; KFAC's factors are `B = sum_{v,n,s} g g^T` and
      `A = sum_{n,s} a a^T / (N S)`. Do not multiply by the batch's size.
    - empirical: `g` is `sqrt(r)` times the gradient of the sum of all terms, so `sqrt(io.reduction) sum_n G` is the
      gradient of the loss, and `io.reduction` is 1 for `reduction="sum"`.
    - forward-only: no vectors, V = 0.

    Call it under `jit`, with `layers` closed over: what is not used is not computed then. All vectors are
    back-propagated at once, and V output gradients are held where they are used; `sum_layer_io` bounds the memory.

    Args:
        layers: the model's layers, what `find_layers` returned. `batch` and `params` have the shapes that it was called
            with, except for the number of examples.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Targets may be None with `grads=False`, where vectors do not depend on them.
        fisher_type: `"type-2"`, `"mc"` (default), `"empirical"` or `"forward-only"`: which vectors are back-propagated.
        mc_samples: the number V of vectors for `"mc"`; 1 by default.
        key: a PRNG key for sampling: `"mc"`, and the signs of `"type-2"` with several loss positions. Ignored where
            nothing is sampled.
        positions: how `"type-2"` treats outputs with several loss positions, such as tokens: `"signs"` (default)
            back-propagates all of them together with independent random signs, `"exact"` one by one.
        mask: `[N, *positions]`, true for real inputs; None (default) for no padding. `io[name].mask` is the mask in the
            layout of the layer, where that has these positions. It changes nothing else.
        grads: whether to compute the loss's gradient as well; True by default.

    Returns:
        A `LayersIO`, a pytree of `value`, `grads`, `reduction`, and for each layer's name `inputs` `[G, N, S, in]`,
        `output_grads` `[V, G, N, S, out]` and `per_example_grads()` `[V, N, G, out, in]`. With coupled examples, N is
        1, and S counts the positions of all.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params = {"w": jnp.ones((3, 2)) / 3, "v": jnp.ones((2, 4)) / 2}
        >>> model_fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
        >>> batch, loss = (jnp.ones((5, 3)), jnp.arange(5) % 4), ggn_jax.CrossEntropyLoss()
        >>> layers = ggn_jax.find_layers(model_fn, params, batch[0])
        >>> @jax.jit
        ... def factors(params, key):
        ...     io = ggn_jax.layer_io(layers, loss, params, batch, fisher_type="mc", key=key)
        ...     a, g = io["w"].inputs, io["w"].output_grads
        ...     return jnp.einsum("gnsi,gnsj->gij", a, a) / 5, jnp.einsum("vgnso,vgnsp->gop", g, g)
        >>> [factor.shape for factor in factors(params, jax.random.key(0))]
        [(1, 3, 3), (1, 2, 2)]
    """
    if explicit_mesh((params, batch)) is not None:
        raise NotImplementedError(
            "layer_io would gather what layers take in from a mesh with explicit axes: use sum_layer_io, which returns"
            " sums, or a mesh with axes of AxisType.Auto."
        )
    given = _prepare(layers, loss, params, batch, None, fisher_type, mc_samples, key, positions, mask, grads)
    return _whole_io(*given)


@compiled
def _whole_io(problem: Problem, extra: dict[str, Any], request: "_PassRequest") -> LayersIO:
    io: LayersIO = problem.sum_over_chunks(partial(_chunk_io, request, problem), extra)
    return io


def sum_layer_io(
    fn: Callable[[LayersIO], PyTree[Array]],
    layers: Layers,
    loss: Loss,
    params: PyTree[Array],
    batch: tuple[PyTree, Any],
    *,
    chunk_size: int | None = None,
    fisher_type: FisherType | str = Options.fisher_type,
    mc_samples: int = Options.mc_samples,
    key: Any = None,
    positions: Positions = Options.positions,
    mask: Any = None,
    grads: bool = True,
) -> PyTree[Array]:
    """Sum `fn(io)` over chunks of the batch, with `io` what `layer_io` returns for a chunk.

    Vectors, value and gradient have the whole batch's reduction, so that sums over examples are those of the whole
    batch, whatever the chunks: `value`, `grads`, `g g^T`; apart from that, chunks are independent. What is sampled for
    an example does not depend on them either. Sums are in at least float32, and returned in the dtypes of `fn`.

    Args:
        fn: a function of a chunk's `LayersIO` that returns a pytree of arrays; their shapes must not depend on how many
            examples there are.
        layers: the model's layers, what `find_layers` returned. `batch` and `params` have the shapes that it was called
            with, except for the number of examples.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Targets may be None with `grads=False`, where vectors do not depend on them.
        chunk_size: how many examples to process at once; None (default) for all.
        fisher_type: `"type-2"`, `"mc"` (default), `"empirical"` or `"forward-only"`: which vectors are back-propagated.
        mc_samples: the number V of vectors for `"mc"`; 1 by default.
        key: a PRNG key for sampling: `"mc"`, and the signs of `"type-2"` with several loss positions. Ignored where
            nothing is sampled.
        positions: how `"type-2"` treats outputs with several loss positions, such as tokens: `"signs"` (default)
            back-propagates all of them together with independent random signs, `"exact"` one by one.
        mask: `[N, *positions]`, true for real inputs; None (default) for no padding. `io[name].mask` is the mask in the
            layout of the layer, where that has these positions. It changes nothing else.
        grads: whether to compute the loss's gradient as well; True by default.

    Returns:
        The sums, a pytree like what `fn` returns.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((3, 2))}, (jnp.ones((5, 3)), jnp.ones((5, 2)))
        >>> layers = ggn_jax.find_layers(lambda p, x: x @ p["w"], params, batch[0])
        >>> def moments(io):
        ...     return {name: jnp.einsum("gnsi,gnsj->gij", io[name].inputs, io[name].inputs) for name in io}
        >>> options = dict(chunk_size=2, fisher_type="forward-only", grads=False)
        >>> print(ggn_jax.sum_layer_io(moments, layers, ggn_jax.MSELoss(), params, batch, **options)["w"][0])
        [[5. 5. 5.]
         [5. 5. 5.]
         [5. 5. 5.]]
    """
    problem, extra, request = _prepare(
        layers, loss, params, batch, chunk_size, fisher_type, mc_samples, key, positions, mask, grads
    )

    is_explicit = explicit_mesh((problem, extra)) is not None

    def run(problem: Problem, extra: Any) -> PyTree[Array]:
        # Where the compiler shards, types of arrays inside the jaxpr differ from those where layers were found.
        own = request._replace(layers=layers._retraced(problem.params, problem.inputs)) if is_explicit else request
        return problem.sum_over_chunks(lambda *args: fn(_chunk_io(own, problem, *args)), extra)

    return (eqx.filter_jit(compiler_sharded(run)) if is_explicit else run)(problem, extra)


class _PassRequest(NamedTuple):
    """The static options of a pass."""

    layers: Layers
    options: Options
    grads: bool
    with_value: bool


def _prepare(
    layers: Layers,
    loss: Loss,
    params: PyTree[Array],
    batch: Any,
    chunk_size: int | None,
    fisher_type: FisherType | str,
    mc_samples: int,
    key: Any,
    positions: Positions,
    mask: Any,
    grads: bool,
) -> tuple[Problem, dict[str, Any], _PassRequest]:
    """The checked batch, what else has an entry for each example, and the options of the pass."""
    if not isinstance(layers, Layers):
        raise TypeError(f"layers must be what find_layers returned; got {type(layers).__name__}.")
    options = Options(fisher_type=fisher_type, mc_samples=mc_samples, positions=positions)  # type: ignore[arg-type]
    if options.fisher_type is FisherType.TYPE2:
        check_exact(loss)
    has_no_targets = isinstance(batch, tuple | list) and len(batch) == 2 and batch[1] is None
    args = layers.model_fn, loss, params, batch, chunk_size, None if grads else options.fisher_type
    with example_inputs_named(batch, layers.example, "layers were found"):
        problem = make_problem(*args, has_aux=layers.has_aux, examples="coupled" if layers.coupled else "independent")
    check_fits(layers, problem)
    # Inside `jax.shard_map`, types say over which axes values vary: those of functions inside the jaxpr as well.
    varies = varying_axes((problem.params, problem.inputs))
    if varies or (layers.coupled and problem.outputs.shape[0] != layers._trace.examples):
        layers = layers._retraced(problem.params, problem.inputs)
    extra = {"keys": check_draws(problem, options, key, 0), "mask": check_mask(mask, problem)}
    check_mask_fits(layers._trace, extra["mask"])
    return problem, extra, _PassRequest(layers, options, grads, not has_no_targets)


def check_fits(layers: Layers, problem: Problem) -> None:
    """Refuse parameters or inputs of other shapes than the layers were found for, and a model that couples examples."""
    trace = layers._trace
    leaves = jax.tree.leaves(problem.params)
    if jax.tree.structure(problem.params) != trace.structure:
        raise ValueError(
            f"params must be like those that the layers were found for: wanted {trace.structure}, got"
            f" {jax.tree.structure(problem.params)}."
        )
    for name, shape, dtype, leaf in zip(trace.names, trace.shapes, trace.dtypes, leaves, strict=True):
        if (leaf.shape, leaf.dtype) != (shape, dtype):
            raise ValueError(
                f"params{name} must be {dtype} of shape {shape}, as when the layers were found; got {leaf.dtype} of"
                f" shape {leaf.shape}: call find_layers for these parameters."
            )

    def kinds(tree: PyTree) -> Any:
        pairs = zip(jax.tree.leaves(tree), are_batched(tree), strict=True)
        return jax.tree.structure(tree), [(leaf.shape[is_batched:], leaf.dtype) for leaf, is_batched in pairs]

    if kinds(problem.inputs) != kinds(layers.example):
        raise ValueError(
            f"batch must have inputs like those that the layers were found for, {layers.example}, but for the number of"
            f" examples; got {structure_of(problem.inputs)}: call find_layers for these inputs."
        )
    if not layers.checked:
        check_independent(problem.model_fn, problem.params, problem.inputs, problem.outputs.dtype, COUPLED_WAY_OUT)


def _chunk_io(
    request: _PassRequest, problem: Problem, terms_at: Any, inputs: PyTree, operand: Any, extra: dict[str, Any]
) -> LayersIO:
    """The results of `layer_io` for a chunk."""
    layers, options, grads, with_value = request
    captured = capture(layers._trace, problem.params, inputs, gradient=grads)
    terms = terms_at(captured.outputs, operand)
    kind = options.fisher_type, options.mc_samples, options.positions
    num_coupled = layers._trace.examples
    num = count_vectors(problem.loss, layers._trace.outputs, *kind, num_coupled)
    vectors = jnp.zeros((0, *captured.outputs.shape), captured.outputs.dtype)
    if num:
        vectors = make_vector_fn(terms, *kind, extra["keys"], num_coupled)(jnp.arange(num)).astype(
            captured.outputs.dtype
        )
    value = gradient = None
    if with_value:
        value, vector = jax.value_and_grad(lambda outputs: terms_at(outputs, operand).loss_value())(captured.outputs)
        if grads:
            gradient = captured.gradient(vector)
            gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, problem.params)
    return LayersIO(
        value,
        gradient,
        jnp.where(jnp.isinf(terms.reduction_factor), 0, terms.reduction_factor),
        back_propagated(layers._trace, layers, captured, vectors, extra["mask"])[0],
    )


def back_propagated(
    trace: Trace, layers: Iterable[LayerInfo], captured: Captured, vectors: Float[Array, "V N *out"], mask: Array | None
) -> tuple[dict[str, LayerIO], Sequence[Array]]:
    """Each layer's inputs and output gradients for these vectors, and gradients `[V, N, *shape]` of some parameters."""
    if len(vectors):
        found, own = jax.vmap(captured.vjp)(vectors)
    else:
        size = captured.outputs.shape[0] // trace.examples
        found = tuple(jnp.zeros((0, size, *use.output_shape), use.output_dtype) for use in trace.uses)
        own = ()
    masks, wide = arrange_masks(trace, mask), compute_dtype(trace.outputs.dtype)
    result = {}
    for info in layers:
        plan = info._plan
        uses = tuple(
            UseIO(captured.inputs[n], found[n], masks[n], trace.uses[n], swapped, info.has_bias, wide)
            for n, swapped in zip(plan.uses, plan.swapped, strict=True)
        )
        result[info.name] = LayerIO(uses, info)
    return result, own
