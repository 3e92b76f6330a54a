"""Operators that are computed once, as dicts of tensors and plain values, which `torch.save` writes, and back."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import ggn_jax
from torch_bridge.operators import TorchLinearOperator
from torch_bridge.problem import ModuleProblem, Params
from torch_bridge.tensors import jax_on, outside_graphs, to_jax, to_torch

KEYS = {"kind", "version", "torch", "parameters", "graph", "loss", "options", "layout", "leaves", "product"}
PLAIN = (str, int, float, bool, type(None))


class ComputedLinearOperator(TorchLinearOperator):
    """An operator that is computed when it is made, at the parameters' values then, and can be saved."""

    _kind: ClassVar[Any]

    def __init__(self, problem: ModuleProblem, given: dict[str, Any]):
        """Compute it; `given` are the constructor's options."""
        self._given = given
        with jax_on(problem.device):
            super().__init__(problem, problem.operator(self._kind, self._options(given)))

    @staticmethod
    def _options(given: dict[str, Any]) -> dict[str, Any]:
        """The options as `ggn_jax` calls them."""
        raise NotImplementedError

    @outside_graphs
    def state_dict(self) -> dict[str, Any]:
        """Return the operator as tensors, strings and numbers: for `torch.save`, and `from_state_dict`.

        Returns:
            A dict that `torch.load` reads with its defaults.

        Example:
            >>> import io, torch, torch_bridge
            >>> module, loss = torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss()
            >>> args = module, loss, list(module.parameters()), [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))]
            >>> diagonal, file = torch_bridge.GGNDiagonalLinearOperator(*args), io.BytesIO()
            >>> torch.save(diagonal.state_dict(), file)
            >>> _ = file.seek(0)
            >>> state = torch.load(file, weights_only=True)
            >>> again = torch_bridge.GGNDiagonalLinearOperator.from_state_dict(state, *args)
            >>> torch.equal(again @ torch.ones(9), diagonal @ torch.ones(9))
            True
        """
        with jax_on(self.device):
            leaves, structure = jax.tree.flatten(self._operator)
            return {
                "kind": type(self).__name__,
                "version": ggn_jax.__version__,
                "torch": str(torch.__version__),
                "parameters": _parameters(self._problem),
                "graph": self._problem.graph,
                "loss": self._problem.loss_text,
                "options": _plain_options(self._given),
                "layout": str(structure),
                "leaves": [to_torch(leaf) for leaf in leaves],
                "product": _probe(self._operator),
            }

    @classmethod
    @outside_graphs
    def from_state_dict(
        cls, state: Mapping[str, Any], model_func: Any, loss_func: Any, params: Params, data: Iterable[Any]
    ) -> Self:
        """Restore an operator from its `state_dict`, with the same products to the last bit; nothing is computed.

        Args:
            state: what `state_dict` returned, on any device.
            model_func: the module, with the same forward as when the state was saved, or a `ConvertedModule` of it.
            loss_func: the same loss module.
            params: a list or dict of the same parameters, of any values.
            data: an iterable of batches, of which only the first one's shapes are used; they must be the same, except
                for the batch's size.

        Returns:
            The operator.

        Raises:
            TypeError: for anything that is not a state.
            ValueError: for the state of another kind of operator, of other parameters, of a module with another
                forward, or of another loss.
        """
        _check_kind(state, cls)
        problem = ModuleProblem(model_func, loss_func, params, itertools.islice(data, 1))
        _check_parameters(state["parameters"], _parameters(problem))
        _check_function(state, problem)
        made = cls.__new__(cls)
        made._given = state["options"]

        def make(values: Any, batch: Any) -> Any:
            return cls._kind(problem.model_fn, problem.loss, values, batch, **cls._options(made._given))

        with jax_on(problem.device):
            try:
                like = jax.eval_shape(make, problem.values, problem.data)
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"state has options that do not fit, {state['options']}: {error}. Compute the operator again."
                ) from error
            TorchLinearOperator.__init__(made, problem, _restored(state, like, problem.device))
        return made


def _plain_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that say which blocks there are, all of which are plain; a mask is data."""
    items = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    return {name: value for name, value in items.items() if type(value) in PLAIN}


def _parameters(problem: ModuleProblem) -> dict[str, Any]:
    """The dtype and shape of each parameter, in plain types, which `torch.load(weights_only=True)` accepts."""
    pairs = zip(problem.names, problem.params, strict=True)
    return {name: [str(parameter.dtype), *parameter.shape] for name, parameter in pairs}


def _probe(operator: Any) -> list[Tensor]:
    """The product with a fixed vector of distinct entries.

    Two layouts may have the same text and shapes but permute the entries; their products then differ.
    """
    start, vector = 0, {}
    for name, like in operator.in_structure().items():
        numbers = jnp.cos(jnp.arange(start, start + like.size, dtype=jnp.float64)).reshape(like.shape)
        start, vector[name] = start + like.size, numbers.astype(like.dtype)
    return [to_torch(part) for part in jax.tree.leaves(operator.mv(vector))]


def _check_kind(state: Any, cls: type) -> None:
    if not isinstance(state, Mapping) or state.keys() != KEYS:
        got = f"a mapping with {list(state)}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise TypeError(f"state must be what state_dict() of an operator returned; got {got}.")
    if state["kind"] != cls.__name__:
        raise ValueError(
            f"state is that of a {state['kind']}, not a {cls.__name__}: call {state['kind']}.from_state_dict."
        )


def _check_parameters(saved: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [
        f"{name}: {saved.get(name, 'none')} in the state, {here.get(name, 'none')} here"
        for name in [*here, *(name for name in saved if name not in here)]
        if saved.get(name) != here.get(name)
    ]
    if differ:
        raise ValueError(f"state must be of the same parameters as params, but {'; '.join(differ)}.")


def _check_function(state: Mapping[str, Any], problem: ModuleProblem) -> None:
    if state["loss"] != problem.loss_text:
        raise ValueError(
            f"state is that of another loss, {state['loss']}, not {problem.loss_text}: pass the loss that it was made"
            " with, or compute the operator again."
        )
    if state["graph"] != problem.graph:
        raise ValueError(
            "state is that of another forward: the operators that torch.export finds in model_func, and their options,"
            " are not those that the state was made with (evaluation or training mode, shapes of inputs; or torch"
            f" itself: {state['torch']} then, {torch.__version__} now). Compute the operator again."
        )


def _restored(state: Mapping[str, Any], like: Any, device: torch.device) -> Any:
    """The operator of `ggn_jax`, rebuilt from the state's tensors."""
    shapes, structure = jax.tree.flatten(like)
    leaves = [to_jax(leaf.to(device)) for leaf in state["leaves"]]
    fits = (str(structure), len(leaves)) == (state["layout"], len(shapes)) and all(
        (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype) for leaf, shape in zip(leaves, shapes, strict=True)
    )
    if fits:
        restored = jax.tree.unflatten(structure, leaves)
        pairs = zip(_probe(restored), state["product"], strict=True)
        if all(_close(product, saved.to(device)) for product, saved in pairs):
            return restored
    raise ValueError(
        "state is of a module that uses its parameters otherwise, or of another version of ggn_jax: it was saved by"
        f" {state['version']}, this is {ggn_jax.__version__}. Compute the operator again."
    )


def _close(product: Tensor, saved: Tensor) -> bool:
    """Whether two products agree up to rounding, which differs between machines."""
    tolerance = torch.finfo(saved.dtype).eps ** 0.5
    return torch.allclose(product, saved, rtol=0, atol=tolerance * float(saved.abs().max()), equal_nan=True)
