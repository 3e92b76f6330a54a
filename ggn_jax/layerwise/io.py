"""What is captured at each layer: its inputs, and its output gradients for some vectors at the outputs."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ggn_jax.layers import Use
from ggn_jax.layerwise.found import LayerInfo


class UseIO(eqx.Module):
    """One use of a layer's weight; arrays are laid out when accessed.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((3, 2))}, (jnp.ones((5, 3)), jnp.ones((5, 2)))
        >>> layers = ggn_jax.find_layers(lambda p, x: x @ p["w"], params, batch[0])
        >>> io = ggn_jax.layer_io(layers, ggn_jax.MSELoss(), params, batch, fisher_type="empirical")
        >>> (use,) = io["w"].uses
        >>> use.inputs.shape, use.swapped
        ((1, 5, 1, 3), False)
    """

    captured: Array
    captured_grads: Array
    mask: Bool[Array, "N S"] | None
    """Which positions are those of real inputs; None without a mask of this use's positions."""
    use: Use = eqx.field(static=True)
    swapped: bool = eqx.field(static=True)
    """Whether its inputs are the layer's outputs, as in an embedding's table that is the output layer, too."""
    joint: bool = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @property
    def is_embedding(self) -> bool:
        """Whether the use reads rows of a table."""
        return self.use.kind == "embedding"

    @property
    def rows(self) -> Int[Array, "G N S"]:
        """The numbers of the rows of an embedding's table that are read, `[G, N, S]`; one past the last for none.

        Raises:
            ValueError: for a layer that is not an embedding.
        """
        if not self.is_embedding:
            raise ValueError(f"rows are of embeddings; this is a {self.use.kind} layer, which has inputs.")
        return self.use.arrange_inputs(self.captured)

    @property
    def inputs(self) -> Float[Array, "G N S in"]:
        """The inputs `[G, N, S, in]`, with 1 as the last one for a joint bias.

        Patches of a convolution, one-hot rows of an embedding.
        """
        if self.is_embedding:
            return jax.nn.one_hot(self.rows, self.use.weight.shape[2], dtype=self.dtype)
        x = self.use.arrange_inputs(self.captured).astype(self.dtype)
        return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1) if self.joint else x

    @property
    def output_grads(self) -> Float[Array, "V G N S out"]:
        """The vectors at the model's outputs, back-propagated to this use's outputs, `[V, G, N, S, out]`."""
        return jax.vmap(self.use.arrange_output_grads)(self.captured_grads).astype(self.dtype)

    def per_example_grads(self) -> Float[Array, "V N G out in"]:
        """Compute what this use adds to the gradients in the layer's matrix.

        Returns:
            An array `[V, N, G, out, in]`.
        """
        g = self.output_grads
        if self.is_embedding:
            count, rows = self.use.weight.shape[2], self.rows

            def scatter(g: Float[Array, "S out"], rows: Int[Array, " S"]) -> Float[Array, "rows out"]:
                return jnp.zeros((count, g.shape[-1]), g.dtype).at[rows].add(g, mode="drop")

            # Adding rows up, instead of multiplying with one-hot inputs, which would have the size of the table.
            over_examples = jax.vmap(jax.vmap(scatter), out_axes=1)  # of [G, N, ...]
            gradient = jnp.swapaxes(jax.vmap(over_examples, (0, None))(g, rows), -1, -2)
        else:
            gradient = jnp.einsum("vgnso,gnsi->vngoi", g, self.inputs)
        return jnp.swapaxes(gradient, -1, -2) if self.swapped else gradient


class LayerIO(eqx.Module):
    """A layer's inputs and output gradients: `io[name]` of what `layer_io` returns. A pytree of arrays.

    A weight that is used several times has the positions of all its uses, one use after the other.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((3, 2))}, (jnp.ones((5, 3)), jnp.ones((5, 2)))
        >>> layers = ggn_jax.find_layers(lambda p, x: x @ p["w"], params, batch[0])
        >>> io = ggn_jax.layer_io(layers, ggn_jax.MSELoss(), params, batch, fisher_type="empirical")
        >>> io["w"].inputs.shape, io["w"].output_grads.shape, io["w"].per_example_grads().shape
        ((1, 5, 1, 3), (1, 1, 5, 1, 2), (1, 5, 1, 2, 3))
    """

    uses: tuple[UseIO, ...]
    """One for each use of the layer's weight."""
    layer: LayerInfo = eqx.field(static=True)
    """The layer, as `find_layers` describes it."""

    @property
    def inputs(self) -> Float[Array, "G N S in"]:
        """The layer's inputs `[G, N, S, in]`, in at least float32; the last one is 1 where `layer.has_bias`.

        Patches of a convolution, one-hot rows of an embedding (whose numbers are `rows`): they are computed when
        accessed. A mask does not change them.
        """
        self._check_alike("inputs")
        return _joined([use.inputs for use in self.uses], 2)

    @property
    def rows(self) -> Int[Array, "G N S"]:
        """The numbers of the rows of an embedding's table that are read, `[G, N, S]`; one past the last for none.

        Raises:
            ValueError: for a layer that is not an embedding.
        """
        self._check_alike("rows")
        return _joined([use.rows for use in self.uses], 2)

    @property
    def output_grads(self) -> Float[Array, "V G N S out"]:
        """The vectors at the model's outputs, back-propagated to this layer's outputs, `[V, G, N, S, out]`.

        They are in at least float32.
        """
        self._check_alike("output_grads")
        return _joined([use.output_grads for use in self.uses], 3)

    @property
    def mask(self) -> Bool[Array, "N S"] | None:
        """Which positions are those of real inputs, `[N, S]`; None without a mask of this layer's positions."""
        if all(use.mask is None for use in self.uses):
            return None
        size = self.uses[0].captured.shape[0]
        masks = [jnp.ones((size, use.use.num_positions), bool) if use.mask is None else use.mask for use in self.uses]
        return _joined(masks, 1)

    def per_example_grads(self) -> Float[Array, "V N G out in"]:
        """Compute `sum_s g a^T` for each vector and example: the gradients in the layer's matrix, see `to_matrices`.

        Returns:
            An array `[V, N, G, out, in]`.
        """
        each = [use.per_example_grads() for use in self.uses]
        return sum(each[1:], start=each[0])

    def _check_alike(self, name: str) -> None:
        if any(use.swapped for use in self.uses):
            raise ValueError(
                f"layer {self.layer.name!r} has a use with inputs where another has outputs, so they have no common"
                f" {name}: look at those of each of its uses, or at per_example_grads()."
            )
        if len({use.is_embedding for use in self.uses}) > 1 and name == "rows":
            raise ValueError(f"layer {self.layer.name!r} is not an embedding everywhere: look at its uses.")


class LayersIO(eqx.Module):
    """What `layer_io` captures in one pass over a batch. A pytree of arrays.

    It is a mapping from the layers' names to their `LayerIO`.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((3, 2))}, (jnp.ones((5, 3)), jnp.ones((5, 2)))
        >>> layers = ggn_jax.find_layers(lambda p, x: x @ p["w"], params, batch[0])
        >>> io = ggn_jax.layer_io(layers, ggn_jax.MSELoss(), params, batch, fisher_type="empirical")
        >>> list(io), float(io.value), io.grads["w"].shape
        (['w'], 4.0, (3, 2))
    """

    value: Float[Array, ""] | None
    """The loss; None where there are no targets."""
    grads: PyTree[Array] | None
    """Its gradient, like the parameters; None with `grads=False`."""
    reduction: Float[Array, ""]
    """The factor `r` of the sum of the loss's terms: 1 for "sum", 1 / (number of terms) for "mean"; 0 where every
    target is ignored."""
    layers: dict[str, LayerIO]
    """Each layer's `LayerIO`, by its name."""

    def __getitem__(self, name: str) -> LayerIO:
        if name not in self.layers:
            raise KeyError(f"no layer {name!r}; there are {', '.join(self.layers) or 'none'}.")
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def keys(self) -> Any:
        """Return the layers' names."""
        return self.layers.keys()

    def items(self) -> Any:
        """Return the pairs of a layer's name and its `LayerIO`."""
        return self.layers.items()


def _joined(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
