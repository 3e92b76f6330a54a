"""User-defined preconditioners, written for one layer, as optax transformations."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import Examples, check_coupled
from ggn_jax._sharding import NOT_SHARDED, on_mesh
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.options import Bias, Options
from ggn_jax.kronecker.vectors import Positions
from ggn_jax.layerwise.found import LayerInfo, Layers, find_layers
from ggn_jax.layerwise.io import LayerIO
from ggn_jax.layerwise.matrices import from_matrices, to_matrices
from ggn_jax.layerwise.run import layer_io
from ggn_jax.loss import Loss
from ggn_jax.operators.base import structure_of
from ggn_jax.operators.problem import unpack_batch
from ggn_jax.optimizer.checks import as_arrays, check_grads, check_static
from ggn_jax.optimizer.masked import check_full, model_of_part


class ScaleByLayersState(NamedTuple):
    """The state of `scale_by_layers`: a pytree.

    >>> import jax.numpy as jnp, ggn_jax
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
    >>> scale = ggn_jax.scale_by_layers(
    ...     lambda p, x: x @ p["w"], ggn_jax.MSELoss(), example_inputs=x,
    ...     init=lambda layer: jnp.zeros(()), update=lambda state, io: state + 1, precondition=lambda state, grad: grad)
    >>> scale.init(params).layers
    {'w': Array(0., dtype=float32)}
    """

    layers: dict[str, Any]
    """By layer, what `init` and `update` returned."""
    rest: Any
    """The state of the transformation of all else."""


def scale_by_layers(
    model_fn: Callable[[PyTree, PyTree], Array],
    loss: Loss,
    *,
    example_inputs: PyTree,
    init: Callable[[LayerInfo], PyTree[Array]],
    update: Callable[[Any, LayerIO], PyTree[Array]],
    precondition: Callable[[Any, Float[Array, "G out in"]], Float[Array, "G out in"]],
    rest: optax.GradientTransformation | None = None,
    fisher_type: FisherType | str = Options.fisher_type,
    mc_samples: int = Options.mc_samples,
    positions: Positions = Options.positions,
    bias: Bias = Options.bias,
    full_params: PyTree | None = None,
    has_aux: bool = False,
    examples: Examples = "independent",
) -> optax.GradientTransformationExtraArgs:
    r"""A preconditioner that is written for one layer, as an optax transformation of all parameters.

    For each layer that `find_layers` finds, with the gradient as a matrix `[G, out, in]` (`to_matrices`):

    ```
    state = update(state, io)                      # io: the layer's inputs and output gradients, of the batch
    gradient = precondition(state, gradient)
    ```

    and all else is for `rest`. What `scale_by_kfac` takes, its `update` takes: `update(grads, state, params,
    batch=(inputs, targets), key=key)`, perhaps with a mask as third member of the batch, and `full_params`.

    Args:
        model_fn: `model_fn(params, inputs) -> outputs [N, *out]`.
        loss: a `Loss`.
        example_inputs: a batch of inputs, or `jax.ShapeDtypeStruct`s of one, to find the layers with.
        init: from a `LayerInfo` (with `shape`, `groups`, `out`, `in_`) to the first state, a pytree of arrays.
        update: from the state and a `LayerIO` to the new state, with shapes and dtypes as they were.
        precondition: from the new state and the gradient `[G, out, in]` to what takes its place.
        rest: a transformation of the other parameters; `optax.scale_by_adam()` by default.
        fisher_type, mc_samples, positions: which vectors are back-propagated, as for `layer_io`. `"forward-only"` gives
            inputs alone, and costs a forward pass.
        bias: `"joint"` or `"separate"`, as for `find_layers`.
        full_params: as for `scale_by_kfac`, under `optax.masked` and the like.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which the outputs are needed.
        examples: `"coupled"` for a model whose examples depend on each other, as for `find_layers`.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    A preconditioner from the inputs alone, `G (A + 0.1 I)^-1`:

    >>> import jax, jax.numpy as jnp, optax, ggn_jax
    >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
    >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
    >>> def init(layer):
    ...     return jnp.zeros((layer.groups, layer.in_, layer.in_))
    >>> def update(a, io):
    ...     return 0.9 * a + 0.1 * jnp.einsum("gnsi,gnsj->gij", io.inputs, io.inputs) / io.inputs[0, ..., 0].size
    >>> def precondition(a, grad):
    ...     damped = a + 0.1 * jnp.eye(a.shape[-1])
    ...     return jnp.swapaxes(jnp.linalg.solve(damped, jnp.swapaxes(grad, 1, 2)), 1, 2)
    >>> scale = ggn_jax.scale_by_layers(
    ...     model_fn, loss, example_inputs=batch[0], init=init, update=update, precondition=precondition,
    ...     fisher_type="forward-only")
    >>> optimizer = optax.chain(scale, optax.scale_by_learning_rate(0.1))
    >>> state = optimizer.init(params)
    >>> grads = jax.grad(lambda params: loss(model_fn(params, batch[0]), batch[1]))(params)
    >>> updates, state = optimizer.update(grads, state, params, batch=batch)
    """
    check_static("model_fn", model_fn)
    check_static("loss", loss)
    check_coupled(examples)
    vectors: dict[str, Any] = {"fisher_type": fisher_type, "mc_samples": mc_samples, "positions": positions}
    Options(**vectors)  # checked before the first step
    inputs = as_arrays("example_inputs", example_inputs)
    full = structure_of(as_arrays("full_params", full_params))
    others = optax.with_extra_args_support(  # type: ignore[attr-defined]
        optax.scale_by_adam() if rest is None else rest
    )

    def find(params: PyTree[Array], inputs: PyTree, full_params: PyTree | None) -> Layers:
        part = model_of_part(model_fn, params, full_params)
        return find_layers(part, params, inputs, bias=bias, has_aux=has_aux, examples=examples)

    def start(params: PyTree[Array]) -> ScaleByLayersState:
        layers = find(params, inputs, full)
        return ScaleByLayersState(
            {layer.name: init(layer) for layer in layers}, others.init(to_matrices(layers, params)[1])
        )

    def step(
        updates: PyTree[Array],
        state: ScaleByLayersState,
        params: PyTree[Array] | None = None,
        *,
        batch: Any = None,
        key: Any = None,
        full_params: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree[Array], ScaleByLayersState]:
        if params is None or batch is None:
            raise TypeError(
                "update needs params, and batch=(inputs, targets), the batch of the gradient (and key=... for what is"
                " drawn)."
            )
        check_grads(updates, params)
        if full_params is not None:
            full_params = check_full(full_params, full)
        pair, mask = unpack_batch("batch", batch)
        layers = find(structure_of(params), structure_of(pair[0]), full_params if full_params is not None else full)
        if set(layers.names) != set(state.layers):
            raise ValueError(
                f"batch has inputs {structure_of(pair[0])}, for which the model's layers are {', '.join(layers.names)},"
                f" and the state has {', '.join(state.layers)}."
            )
        # `start` has checked whether examples depend on each other, if values were known.
        layers = replace(layers, checked=True)
        io = layer_io(layers, loss, params, pair, **vectors, key=key, mask=mask, grads=False)
        new = {layer.name: update(state.layers[layer.name], io[layer.name]) for layer in layers}
        matrices, other = to_matrices(layers, updates)
        scaled = {name: precondition(new[name], grad).astype(grad.dtype) for name, grad in matrices.items()}
        other, rest_state = others.update(
            other, state.rest, to_matrices(layers, params)[1], batch=batch, key=key, **extra_args
        )
        return from_matrices(layers, scaled, other), ScaleByLayersState(new, rest_state)

    def like(updates: Any, *_: Any, **__: Any) -> Any:
        return updates, NOT_SHARDED

    return optax.GradientTransformationExtraArgs(start, on_mesh(step, like))
