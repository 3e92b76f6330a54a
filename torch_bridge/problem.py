"""A PyTorch module, its loss and its data, in JAX: the problem that operators of modules are made for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

import ggn_jax
from torch_bridge._check_module import check_initialised
from torch_bridge._export import as_constant
from torch_bridge._graph_text import array_hash
from torch_bridge.batches import as_inputs, as_pair, check_tensors
from torch_bridge.converted import ConvertedModule
from torch_bridge.losses import build_loss, find_loss
from torch_bridge.tensors import jax_on, to_jax

Params = Sequence[Tensor] | dict[str, Tensor]


class ModuleProblem:
    """A module, its loss and all data, in JAX; and the parameters that the curvature is in.

    `data` is one batch of all; or, with `progress`, the batches as they came.
    """

    def __init__(self, model_func: Any, loss_func: Any, params: Params, data: Iterable[Any], *, progress: bool = False):
        if not isinstance(model_func, torch.nn.Module | ConvertedModule):
            raise TypeError(
                f"model_func must be a torch.nn.Module or a ConvertedModule; got {type(model_func).__name__}."
            )
        module: torch.nn.Module = model_func.module if isinstance(model_func, ConvertedModule) else model_func
        self.params = list(params.values()) if isinstance(params, dict) else list(params)
        if not self.params:
            raise ValueError("params must hold at least one parameter of the module.")
        found = {id(parameter): name for name, parameter in module.named_parameters()}
        seen = [id(parameter) for parameter in self.params]
        wrong = [i for i, key in enumerate(seen) if key not in found or key in seen[:i]]
        if wrong:
            raise ValueError(
                f"params must be different parameters of model_func, in a list or dict; numbers {wrong} are not."
            )
        check_initialised(module)
        self.names = [found[key] for key in seen]
        kinds = {(p.dtype, p.device) for p in self.params}
        if len(kinds) > 1:
            raise ValueError(f"params must have one dtype and one device; got {sorted(map(str, kinds))}.")
        ((self.dtype, self.device),) = kinds
        self.before = [parameter.detach().clone() for parameter in self.params]
        batches = _pairs(data)
        entry = find_loss(loss_func)
        text, tensors = entry.serialise(loss_func)
        with jax_on(self.device):
            converted = model_func
            if not isinstance(converted, ConvertedModule):
                converted = ConvertedModule(module, batches[0][0])
            values = converted.params()
            self.values = {name: values.pop(name) for name in self.names}
            # Other parameters are not constants of the function, but inputs, so that one function (and what is compiled
            # for it) serves all operators.
            self.model_fn = converted.part_fn if values else converted.output_fn
            self.graph, self.loss_text = converted.graph, _loss_text(text, tensors.values())
            self.loss = build_loss(text, [to_jax(tensor) for tensor in tensors.values()])
            arrays = [jax.tree.map(self.to_jax, (as_inputs(x), y)) for x, y in batches]
            joined = arrays if progress else [_joined(arrays)]
            if values:
                joined = [((x, ggn_jax.Unbatched(values)), y) for x, y in joined]
            self.data = joined if progress else joined[0]
            self.size = max(len(batch[1]) for batch in batches)
        self.progress = progress

    def operator(self, kind: Any, options: dict[str, Any]) -> Any:
        """An operator of `ggn_jax`."""
        args = self.model_fn, self.loss, self.values, self.data
        if self.progress:
            try:
                return kind.from_batches(*args, **options, progress=True)
            except ValueError as error:
                raise ValueError(f"{error} With tensors of PyTorch, leave progress out for all data as one.") from error
        whole = options.get("examples") == "coupled"
        return kind(*args, **options, chunk_size=None if whole else self.size)

    def to_jax(self, tensor: Tensor) -> jax.Array:
        return to_jax(tensor.to(self.device))

    def check_unchanged(self) -> None:
        """Refuse to work once the module's parameters have changed."""
        changed = [n for n, p, b in zip(self.names, self.params, self.before, strict=True) if not torch.equal(p, b)]
        if changed:
            raise RuntimeError(
                f"the parameters {', '.join(changed)} have changed since the operator was made: make a new one."
            )


def _loss_text(text: str, tensors: Iterable[Tensor]) -> str:
    """The loss as text, with hashes of its tensors."""
    return " ".join([text, *(array_hash(as_constant(tensor)) for tensor in tensors)])


def _pairs(data: Iterable[Any]) -> list[tuple[Any, Tensor]]:
    if isinstance(data, Mapping | Tensor):
        raise TypeError(
            f"data must be an iterable of batches, as a DataLoader or a list [batch] is; got a {type(data).__name__}."
        )
    pairs = []
    for number, batch in enumerate(data):
        pairs.append(as_pair(f"data[{number}]", batch))
        check_tensors(f"data[{number}]", batch)
    if not pairs:
        raise ValueError("data must yield at least one batch.")
    return [pair for pair in pairs if len(pair[1])] or pairs  # without empty batches, such as a loader's last one


def _joined(batches: list[Any]) -> Any:
    """The batches as one."""
    if len(batches) == 1:
        return batches[0]
    first = jax.tree.structure(batches[0])
    leaves = jax.tree_util.tree_leaves_with_path(batches[0])
    for number, batch in enumerate(batches):
        if jax.tree.structure(batch) != first:  # type: ignore[operator]  # untyped in jaxlib
            raise _mismatch_error(number, f"is {jax.tree.structure(batch)}, and batch 0 {first}")
        for (path, like), leaf in zip(leaves, jax.tree.leaves(batch), strict=True):
            if leaf.dtype != like.dtype or leaf.ndim != like.ndim or leaf.shape[1:] != like.shape[1:]:
                place = ("inputs", "targets")[path[0].idx] + jax.tree_util.keystr(path[1:])
                raise _mismatch_error(
                    number, f"has {leaf.dtype}{list(leaf.shape)} as {place}, batch 0 {like.dtype}{list(like.shape)}"
                )
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)


def _mismatch_error(number: int, how: str) -> ValueError:
    return ValueError(
        "the batches of data must be alike but for their sizes, since they are concatenated: pad them, or make an"
        f" operator for each. Batch {number} {how}."
    )
