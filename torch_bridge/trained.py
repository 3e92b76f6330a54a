"""A module as `ggn_jax.kfac` trains it: a function that returns the buffers it changes, and draws with keys."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

import ggn_jax
from torch_bridge.batches import as_outputs
from torch_bridge.converted import Snapshot
from torch_bridge.generators import draw_seed, key_from_seed
from torch_bridge.modules import convert
from torch_bridge.tensors import to_jax, to_torch


class TrainedModule:
    """A module in the mode that it is in, as a function of its trained parameters.

    The function's inputs are a triple: those of the module, the buffers that a call changes, and keys for dropout.
    Independent examples have a key each, coupled ones share one. If a call changes buffers, the new ones are returned
    beside the outputs, for the whole batch. All else in the module is constant.
    """

    def __init__(self, module: nn.Module, example: Any, trained: Mapping[str, Tensor], examples: str | None):
        converted = convert(module, example, updates=True)
        self._run = converted.run
        self._fixed = {name: value for name, value in converted.params.items() if name not in trained}
        self._buffers = {name: module.get_buffer(name) for name in converted.updated}
        self._snapshot = Snapshot(module, {**trained, **self._buffers})
        self._device = next(iter(trained.values())).device
        self.random, self.has_aux = converted.random, bool(converted.updated)
        # Batch statistics couple examples; whether other buffers do is unknown.
        self.examples = examples or ("coupled" if self.has_aux else "independent")
        self._one_by_one = self.random and self.examples == "independent"
        if self._one_by_one and self.has_aux:
            raise NotImplementedError(
                f"module draws random numbers, and changes {', '.join(self._buffers)} when it is called: leave"
                " examples='independent' out, of which each would change them by itself."
            )

    def changed(self) -> list[str]:
        """The names of constants that changed or were replaced since."""
        return self._snapshot.changed()

    def buffers(self) -> dict[str, jax.Array]:
        """The buffers that a call changes, as they are now."""
        return {name: to_jax(buffer) for name, buffer in self._buffers.items()}

    def draw_seed(self) -> jax.Array | None:
        """A seed from torch's generator, if anything is drawn."""
        return to_jax(draw_seed(self._device, None)) if self.random else None

    def arguments(self, inputs: Any, buffers: dict[str, jax.Array], seed: jax.Array | None) -> Any:
        """Inputs of the function."""
        keys: Any = None
        if seed is not None:
            key = key_from_seed(seed[0])
            size = len(jax.tree.leaves(inputs)[0])
            keys = jax.random.split(key, size) if self._one_by_one else ggn_jax.Unbatched(key)
        return inputs, ggn_jax.Unbatched(buffers) if buffers else {}, keys

    def __call__(self, params: dict[str, jax.Array], inputs: Any) -> Any:
        """The outputs that the loss is of, with the new buffers if there are any."""
        inputs, buffers, keys = inputs
        values = {**self._fixed, **params, **buffers}

        def one(inputs: Any, key: Any) -> jax.Array:
            outputs: jax.Array = as_outputs(self._run(values, jax.tree.map(lambda x: x[None], inputs), key=key)[0])
            return outputs[0]

        if self._one_by_one:
            if len(keys) > 1:
                return jax.vmap(one)(inputs, keys)
            keys = keys[0]  # one example is not mapped, so that its layers are found
        outputs, new = self._run(values, inputs, key=keys)
        return (as_outputs(outputs), new) if self.has_aux else as_outputs(outputs)

    def zero_outputs(self, params: dict[str, jax.Array], inputs: Any) -> jax.Array:
        """An array with the shape and dtype of the outputs."""

        def outputs(params: Any, inputs: Any) -> Any:
            return as_outputs(self._run({**self._fixed, **params}, inputs, key=jax.random.key(0))[0])

        like = jax.eval_shape(outputs, params, inputs)
        return jnp.zeros(like.shape, like.dtype)

    def write(self, buffers: Mapping[str, jax.Array]) -> None:
        """Put new buffers into the module."""
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                buffer.copy_(to_torch(buffers[name]))
