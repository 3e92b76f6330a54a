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
from ggn_jax.operators.examples import unpack_batch
from ggn_jax.optimizer.checks import as_arrays, check_grads, check_static
from ggn_jax.optimizer.masked import check_full, model_of_part


class ScaleByLayersState(NamedTuple):
    """The state of `scale_by_layers`: a pytree.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, x = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2))
        >>> scale = ggn_jax.scale_by_layers(
        ...     lambda p, x: x @ p["w"], ggn_jax.MSELoss(), example_inputs=x, init=lambda layer: jnp.zeros(()),
        ...     update=lambda state, io: state + 1, precondition=lambda state, grad: grad)
        >>> scale.init(params).layers
        {'w': Array(0., dtype=float32)}
    """

    layers: dict[str, Any]
    """What `init` and `update` returned, for each layer's name."""
    rest: Any
    """The state of `rest`, for the other parameters."""


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
    """Precondition gradients by a rule written for one layer, as an optax transformation of all parameters.

    For each layer that `find_layers` finds, with the gradient as a matrix `[G, out, in]` (`to_matrices`):

    ```
    state = update(state, io)                      # io: the layer's inputs and output gradients, of the batch
    gradient = precondition(state, gradient)
    ```

    and `rest` transforms the other parameters.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        example_inputs: a batch of inputs, or `jax.ShapeDtypeStruct`s of one, to find the layers with.
        init: a function from a `LayerInfo` (with `shape`, `groups`, `out`, `in_`) to the first state, a pytree of
            arrays.
        update: a function from the state and a `LayerIO` to the new state, whose shapes and dtypes must not change.
        precondition: a function from the new state and the gradient `[G, out, in]` to the preconditioned gradient.
        rest: a transformation of the other parameters; None (default) for `optax.scale_by_adam()`.
        fisher_type: `"type-2"`, `"mc"` (default), `"empirical"` or `"forward-only"`: which vectors are back-propagated.
            `"forward-only"` gives inputs alone, and costs a forward pass.
        mc_samples: the number V of vectors for `"mc"`; 1 by default.
        positions: how `"type-2"` treats outputs with several loss positions, such as tokens: `"signs"` (default)
            back-propagates all of them together with independent random signs, `"exact"` one by one.
        bias: `"joint"` (default) makes a bias the last column of its layer's matrix; `"separate"` leaves it to `rest`.
        full_params: all parameters of the model, arrays or `jax.ShapeDtypeStruct`s, where it is used under
            `optax.masked` and the like, for some of them; None by default.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
        examples: `"independent"` (default), or `"coupled"` for a model whose examples depend on each other: a batch is
            then one example with the positions of all.

    Returns:
        A transformation with `update(grads, state, params, batch=(inputs, targets), key=key)`, as that of
        `scale_by_kfac`; the batch may have a mask as third member, and `full_params` may be passed.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them.

    Example:
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
