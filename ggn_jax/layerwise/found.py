"""The layers of a model as static values: which there are, their sizes, and the parameters that they own."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import jax
from jaxtyping import Array, PyTree

from ggn_jax._checks import Examples, check_choice, check_coupled, have_values
from ggn_jax._hints import model_errors_explained
from ggn_jax._model import Model
from ggn_jax._sharding import compiler_sharded
from ggn_jax.kronecker.options import CHOICES, Bias
from ggn_jax.kronecker.stacks import BlockSpec, Stack
from ggn_jax.layers import Layer, Plan, Trace, make_plan, trace_model
from ggn_jax.layers.check import COUPLED_WAY_OUT, check_independent
from ggn_jax.layers.report import check_model
from ggn_jax.layers.table import dimensions, table
from ggn_jax.operators.base import simple_path, structure_of


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a model: static, and hashable; `find_layers` returns them.

    Its weight is a matrix `[groups, out, in_]`; a bias that is joint is its last column, for an input that is 1.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> (layer,) = ggn_jax.find_layers(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((5, 3)))
        >>> layer.name, layer.out, layer.in_, layer.has_bias
        ('w', 2, 4, True)
    """

    name: str
    """The path of the weight, as `"dense/kernel"`; with `#1`, `#2`, ... where one array has several layers' weights."""
    kind: str
    """"linear", "convolution" or "embedding"; joined by "+" where one weight is used in several ways."""
    groups: int
    """The number of matrices: the groups of a convolution, the steps of a scan over stacked layers, or experts."""
    out: int
    """The number of outputs."""
    in_: int
    """The number of inputs, which includes the constant 1 of a joint bias."""
    positions: tuple[int, ...]
    """For each use, the number of sharing positions (tokens, pixels) of one example, or of a batch of coupled ones."""
    uses: int
    """The number of places in the model that use the weight."""
    paths: tuple[str, ...]
    """The parameters of which it owns entries, the weight's first, as `jax.tree_util.keystr` writes them."""
    has_bias: bool
    """Whether the last column is a bias."""
    _plan: Layer = field(repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the layer's matrix, `(groups, out, in_)`."""
        return self.groups, self.out, self.in_


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of a model: a sequence of `LayerInfo`, also by name; `print` it. Made by `find_layers`.

    It is static and hashable: close over it, pass it through `jax.jit`, or keep it as a static field.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params = {"w": jnp.ones((3, 2)), "s": jnp.ones(2)}
        >>> layers = ggn_jax.find_layers(lambda p, x: (x @ p["w"]) * p["s"], params, jnp.ones((5, 3)))
        >>> print(layers)
        layer  kind    groups x out x in  positions  uses  bias  parameters
        -----  ------  -----------------  ---------  ----  ----  ----------
        w      linear  1 x 2 x 3          1          1           ['w']
        rest: ['s'] (scale)
        >>> layers["w"].in_, [layer.name for layer in layers]
        (3, ['w'])
    """

    model_fn: Callable[[PyTree, PyTree], Array]
    """The model that they were found in."""
    _trace: Trace
    _plan: Plan
    bias: Bias
    """`"joint"` or `"separate"`, as it was passed to `find_layers`."""
    example: PyTree[jax.ShapeDtypeStruct]
    """Inputs for which they were found; the number of examples does not matter."""
    checked: bool
    """Whether it was checked that the model's examples do not depend on each other."""
    has_aux: bool = False
    """Whether the model returns `(outputs, aux)`."""
    coupled: bool = False
    """Whether examples depend on each other: then the batch is one example, with the positions of all."""

    @cached_property
    def all(self) -> tuple[LayerInfo, ...]:
        """All layers."""
        return tuple(_infos(self))

    def __iter__(self) -> Iterator[LayerInfo]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, key: str | int) -> LayerInfo:
        if isinstance(key, int):
            return self.all[key]
        for layer in self.all:
            if layer.name == key:
                return layer
        raise KeyError(f"no layer {key!r}; there are {', '.join(layer.name for layer in self.all) or 'none'}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.all)

    def __str__(self) -> str:
        head = "layer", "kind", "groups x out x in", "positions", "uses", "bias", "parameters"
        rows = [
            (
                layer.name,
                layer.kind,
                dimensions(layer.shape),
                ", ".join(map(str, layer.positions)),
                str(layer.uses),
                "joint" if layer.has_bias else "",
                " ".join(layer.paths),
            )
            for layer in self.all
        ]
        names = self._trace.names
        rest = [f"{names[parameter.leaf]} ({parameter.kind})" for parameter in self._plan.unassigned]
        rest += [
            f"{names[leaf]} (bias)"
            for layer, info in zip(self._plan.layers, self.all, strict=True)
            if layer.bias is not None and not info.has_bias
            for leaf in layer.bias.entries.owning_leaves(self._sizes)
        ]
        return "\n".join(table(head, rows) + ([f"rest: {', '.join(rest)}"] if rest else []))

    def __repr__(self) -> str:
        return f"Layers({', '.join(self.names)})"

    def _retraced(self, params: PyTree, inputs: PyTree) -> "Layers":
        """The same layers in the model's jaxpr for parameters and inputs of these types."""
        trace = trace_model(Model(self.model_fn, self.has_aux), params, inputs, coupled=self.coupled)
        return replace(self, _trace=trace, _plan=make_plan(trace))

    @cached_property
    def _sizes(self) -> list[int]:
        """The number of entries of each parameter."""
        return [math.prod(shape) for shape in self._trace.shapes]

    @cached_property
    def _stacks(self) -> tuple[Stack, ...]:
        """The positions of each layer's matrix among the parameters."""
        stacks = []
        for info in self.all:
            layer = info._plan
            views = (layer.weight, layer.bias) if info.has_bias and layer.bias is not None else (layer.weight,)
            stacks.append(Stack((BlockSpec(info.paths, info.kind, views),)))
        return tuple(stacks)


def find_layers(
    model_fn: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    example_inputs: PyTree,
    *,
    bias: Literal["joint", "separate"] = "joint",
    has_aux: bool = False,
    examples: Examples = "independent",
) -> Layers:
    """Find the linear layers of a model by tracing it: those that `layer_io` captures and `to_matrices` lays out.

    A layer is a place where a parameter, possibly reshaped, sliced or stacked, first meets an input or an activation in
    a matrix product, a convolution or an embedding (see `report`). Nothing needs to be tagged or registered.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`.
        params: a pytree of floating arrays, or of `jax.ShapeDtypeStruct`s.
        example_inputs: a batch of inputs, or `jax.ShapeDtypeStruct`s of one.
        bias: `"joint"` (default) makes a bias the last column of its layer's matrix, and 1 its layer's last input;
            `"separate"` leaves biases to the rest. A bias that is added to rows of a table is always separate.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
        examples: `"independent"` (default), or `"coupled"` for a model whose examples depend on each other (batch
            normalisation in training mode, attention within a batch): then a batch is one example, N = 1, with the
            positions of all.

    Returns:
        The layers, a static value.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming them, and for a model whose examples depend on each
            other, where parameters and inputs have values (not under `jit`).

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params = {"w": jnp.ones((3, 2)) / 3, "b": jnp.zeros(2), "v": jnp.ones((2, 4)) / 2}
        >>> model_fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
        >>> batch, loss = (jnp.ones((5, 3)), jnp.arange(5) % 4), ggn_jax.CrossEntropyLoss()
        >>> layers = ggn_jax.find_layers(model_fn, params, batch[0])
        >>> io = ggn_jax.layer_io(layers, loss, params, batch, fisher_type="type-2")
        >>> io["w"].inputs.shape, io["w"].output_grads.shape  # [G, N, S, in], [V, G, N, S, out]
        ((1, 5, 1, 4), (4, 1, 5, 1, 2))
    """
    check_choice("bias", bias, CHOICES["bias"])
    check_model(model_fn, params, example_inputs)
    model, coupled = Model(model_fn, has_aux), check_coupled(examples)
    with model_errors_explained(params, example_inputs, one_example=not coupled):
        trace = trace_model(model, params, example_inputs, coupled=coupled)
    is_known = have_values((params, example_inputs))
    if is_known and not coupled:
        outputs = jax.eval_shape(compiler_sharded(model), params, example_inputs)
        check_independent(model, params, example_inputs, outputs.dtype, COUPLED_WAY_OUT)
    like = structure_of(example_inputs)
    return Layers(model_fn, trace, make_plan(trace), bias, like, is_known or coupled, has_aux, coupled)


def _infos(layers: Layers) -> Iterator[LayerInfo]:
    trace, sizes = layers._trace, layers._sizes
    first = [simple_path(trace.names[layer.leaves[0]]) for layer in layers._plan.layers]
    for number, layer in enumerate(layers._plan.layers):
        uses = [trace.uses[n] for n in layer.uses]
        kinds = tuple(dict.fromkeys(use.kind for use in uses))
        has_bias = layer.bias is not None and layers.bias == "joint" and "embedding" not in kinds
        owned = layer.weight.entries.owning_leaves(sizes)
        if has_bias and layer.bias is not None:
            owned = tuple(dict.fromkeys((*owned, *layer.bias.entries.owning_leaves(sizes))))
        groups, out, inputs = layer.weight.shape
        name = first[number]
        # A parameter may hold the weights of several layers, as fused queries and keys.
        if first.count(name) > 1:
            name += f"#{first[: number + 1].count(name)}"
        yield LayerInfo(
            name,
            "+".join(kinds),
            groups,
            out,
            inputs + has_bias,
            tuple(use.num_positions for use in uses),
            len(uses),
            tuple(trace.names[leaf] for leaf in owned),
            has_bias,
            layer,
        )
