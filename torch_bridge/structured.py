"""Curvature operators of PyTorch modules that are kept as blocks or entries: KFAC, EKFAC and the GGN's diagonal."""

from collections.abc import Iterable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import ggn_jax
from torch_bridge.operators import SEED, Damping, TorchLinearOperator, as_damping, as_key, sampling
from torch_bridge.problem import ModuleProblem, Params
from torch_bridge.states import ComputedLinearOperator
from torch_bridge.tensors import jax_on, outside_graphs, to_jax, to_torch

# What `ggn_jax.KFACLinearOperator` or curvlinops call otherwise, and where it is given here.
ELSEWHERE = {
    "sharing": "kfac_approx",
    "bias": "separate_weight_and_bias",
    "chunk_size": "the batches of data",
    "key": "seed",
    "progressbar": "progress",
    "num_data": "the batches of data",
    "batch_size_fn": "the batches of data",
}


class BlockTorchLinearOperator(TorchLinearOperator):
    """A block-diagonal operator: what KFAC, EKFAC and their inverses share."""

    @outside_graphs
    def _number(self, name: str) -> Tensor:
        with jax_on(self.device):
            return to_torch(getattr(self._operator, name)())

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor."""
        return self._number("trace")

    def det(self) -> Tensor:
        """Return the determinant, a scalar tensor; `logdet` does not overflow."""
        return self._number("det")

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant, a scalar tensor."""
        return self._number("logdet")

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        return self._number("frobenius_norm")

    def inverse(self, damping: Damping = 0.0, *, heuristic: bool = False) -> "BlockTorchLinearOperator":
        """Compute the inverse of `self + damping * I`, again an operator with blocks.

        Args:
            damping: a number of at least 0, or one for each parameter: a list like `params`, or a dict by the module's
                names. 0 by default.
            heuristic: whether to split the damping between a block's two factors, which is cheaper but not the exact
                inverse; False by default.

        Returns:
            The inverse.

        Raises:
            ValueError: for numbers below 0, and for a number of them that differs from that of the parameters.
        """
        made: BlockTorchLinearOperator = self._with_damping(self._operator.inverse, damping, _method(heuristic))
        return made

    @outside_graphs
    def solve(self, other: Any, damping: Damping = 0.0, *, heuristic: bool = False) -> Any:
        """Compute `inverse(damping) @ other`, refined by conjugate gradients where the inverse of a block is not exact.

        Args:
            other: tensors like the parameters, a flat vector `[P]`, or a matrix `[P, K]`; tensors may have a last axis
                of columns.
            damping: a number of at least 0, or one for each parameter: a list like `params`, or a dict by the module's
                names. 0 by default.
            heuristic: whether to split the damping between a block's two factors, without refinement; False by default.

        Returns:
            Tensors like `other`.

        Raises:
            ValueError: for tensors of other shapes, and for a damping that does not fit.
        """
        if heuristic or self._operator.is_exact("inverse"):
            return self.inverse(damping, heuristic=heuristic) @ other
        number = as_damping(damping, self._problem.names)
        return self._apply(lambda vector: self._operator.solve(vector, number), other)

    def _like(self, operator: Any) -> "BlockTorchLinearOperator":
        return BlockTorchLinearOperator(self._problem, operator)


def _method(heuristic: bool) -> str:
    return "heuristic" if heuristic else "exact"


class KFACLinearOperator(ComputedLinearOperator, BlockTorchLinearOperator):
    """KFAC of a module's loss: `ggn_jax.KFACLinearOperator` for PyTorch.

    Names of the arguments are those of curvlinops. It is computed when it is made, at the parameters' values then.

    Args:
        model_func: a `torch.nn.Module`, converted by `from_module` in the mode that it is in; one in training mode with
            dropout or batch normalisation is refused. Converting takes seconds, each time: for operators at many values
            of the parameters, pass a `ConvertedModule`.
        loss_func: a `torch.nn.MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss` module, or one of a class added with
            `register_loss`.
        params: a list or dict of parameters of the module: the curvature is in these, whether or not they require
            gradients, and all others are constants. For those that are trained:
            `[p for p in module.parameters() if p.requires_grad]`.
        data: an iterable of batches, read once and concatenated: the operator is that of one batch of all, also where
            class weights or ignored targets make a mean an average over something other than examples. A batch is a
            pair `(inputs, targets)`, with inputs as `from_module` takes them, or a mapping of tensors whose targets are
            its `labels`; for a module that returns a mapping, the loss is that of its `logits`.
        seed: an integer that seeds the sampling; 2147483647 by default.
        fisher_type: `"mc"` (default), `"type-2"`, `"empirical"` or `"forward-only"`, or curvlinops' `FisherType`: which
            vectors are back-propagated.
        mc_samples: how many targets `"mc"` samples for each example; 1 by default.
        kfac_approx: `"expand"` (default) treats sharing positions as separate examples, `"reduce"` averages inputs and
            adds gradients first.
        separate_weight_and_bias: whether a bias has a block of its own (default), or is one more input of its layer.
        progress: whether to go over the batches one by one, with a bar for each pass (needs tqdm): the same matrix
            except for rounding. They may differ in sizes for which the module is converted; a function is compiled for
            each. False by default.
        **options: further options of `ggn_jax.KroneckerOptions`: `positions` (`"exact"` if not given), `tied`,
            `vector_chunk_size`, `on_uncovered`, `small`, `max_small_size`, `large`, `max_dense_size` and `block_size`;
            and `mask` and `examples` of `ggn_jax.KFACLinearOperator`.

    Raises:
        TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them, and for modules that
            `from_module` refuses.
        TypeError: for `sharing`, `bias`, `key`, `chunk_size` and other names that the arguments above stand for.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(2, 3)
        >>> data = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))]
        >>> kfac = KFACLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data)
        >>> step = kfac.inverse(damping=0.1) @ list(module.parameters())
    """

    _kind: ClassVar[Any] = ggn_jax.KFACLinearOperator

    @outside_graphs
    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Params,
        data: Iterable[Any],
        *,
        seed: int = SEED,
        fisher_type: ggn_jax.FisherType | str = "mc",
        mc_samples: int = 1,
        kfac_approx: str = "expand",
        separate_weight_and_bias: bool = True,
        progress: bool = False,
        **options: Any,
    ):
        if given := sorted(options.keys() & ELSEWHERE):
            ways = ", ".join(f"{name} ({ELSEWHERE[name]})" for name in given)
            raise TypeError(f"these options have another place here, in brackets: {ways}.")
        if not isinstance(kfac_approx, str) or kfac_approx not in ("expand", "reduce"):
            raise ValueError(f"kfac_approx must be 'expand' or 'reduce'; got {kfac_approx!r}.")
        if progress and options.get("mask") is not None:
            raise NotImplementedError("mask is of all data as one batch: leave progress out, or mask.")
        options |= {"seed": seed, "fisher_type": ggn_jax.FisherType(fisher_type).value, "mc_samples": mc_samples}
        options |= {"kfac_approx": kfac_approx, "separate_weight_and_bias": separate_weight_and_bias}
        super().__init__(ModuleProblem(model_func, loss_func, params, data, progress=progress), options)

    @staticmethod
    def _options(given: dict[str, Any]) -> dict[str, Any]:
        options = {"positions": "exact"} | given
        seed = options.pop("seed")
        if isinstance(options.get("mask"), Tensor):
            options["mask"] = to_jax(options["mask"])
        drawn = options["fisher_type"] == "mc" or options["positions"] == "signs"
        options["sharing"] = options.pop("kfac_approx")
        options["bias"] = "separate" if options.pop("separate_weight_and_bias") else "joint"
        return options | {"key": as_key(seed) if drawn else None}

    @outside_graphs
    def factors(self) -> dict[str, tuple[Tensor, ...]]:
        """Return what each parameter's block is made of, by torch's names.

        `B (x) A` is on the parameter as a matrix `[out, in]`, rows first, which has all its axes but the first in its
        columns.

        Returns:
            A dict with a tuple of tensors for each parameter, `(B, A)`, or the dense block alone.

        Raises:
            NotImplementedError: naming the parameter, where its block is not such a product: a bias that is one more
                input, an embedding, groups of channels, several uses, a transposed convolution.
        """
        with jax_on(self.device):
            found = self._operator.factors()
            named = dict(zip(self._problem.names, self._problem.params, strict=True))
            return {name: _factors(name, p.shape, found, self._operator) for name, p in named.items()}


def _factors(name: str, shape: torch.Size, found: dict[str, Any], operator: Any) -> tuple[Tensor, ...]:
    block = found.get(f"['{name}']")
    if block is None:
        raise NotImplementedError(f"{name} has no block of its own: pass separate_weight_and_bias=True.")
    if len(shape) < 2:
        return (to_torch(operator.block(f"['{name}']")),)
    a: Any = getattr(block, "a", ())
    b: Any = getattr(block, "b", ())
    size = shape[0], shape[1:].numel()
    if len(a) == 1 and a[0].shape == (1, size[1], size[1]) and b[0].shape == (1, size[0], size[0]):
        vector = {n: jnp.zeros(x.shape, x.dtype) for n, x in operator.in_structure().items()}
        probe = jnp.cos(jnp.arange(1.0, size[0] * size[1] + 1)).reshape(size).astype(a[0].dtype)
        vector[name] = probe.reshape(vector[name].shape).astype(vector[name].dtype)
        wanted, product = operator.mv(vector)[name].reshape(size), b[0][0] @ probe @ a[0][0]
        if np.allclose(wanted, product, rtol=1e-3, atol=1e-4 * float(jnp.abs(product).max())):
            return to_torch(b[0][0]), to_torch(a[0][0])
    raise NotImplementedError(
        f"{name} of shape {tuple(shape)} has a block that is not one Kronecker product of its rows and columns"
        " (groups, an embedding, several uses, or another layout): ggn_jax.KFACLinearOperator of from_module's function"
        " has it."
    )


class EKFACLinearOperator(KFACLinearOperator):
    """EKFAC of a module's loss: `ggn_jax.EKFACLinearOperator` for PyTorch.

    Names of the arguments are those of curvlinops. It is computed when it is made, at the parameters' values then.

    Args:
        model_func: a `torch.nn.Module`, converted by `from_module` in the mode that it is in; one in training mode with
            dropout or batch normalisation is refused. Converting takes seconds, each time: for operators at many values
            of the parameters, pass a `ConvertedModule`.
        loss_func: a `torch.nn.MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss` module, or one of a class added with
            `register_loss`.
        params: a list or dict of parameters of the module: the curvature is in these, whether or not they require
            gradients, and all others are constants. For those that are trained:
            `[p for p in module.parameters() if p.requires_grad]`.
        data: an iterable of batches, read once and concatenated: the operator is that of one batch of all, also where
            class weights or ignored targets make a mean an average over something other than examples. A batch is a
            pair `(inputs, targets)`, with inputs as `from_module` takes them, or a mapping of tensors whose targets are
            its `labels`; for a module that returns a mapping, the loss is that of its `logits`.
        seed: an integer that seeds the sampling; 2147483647 by default.
        fisher_type: `"mc"` (default), `"type-2"` or `"empirical"`, or curvlinops' `FisherType`: which vectors are
            back-propagated.
        mc_samples: how many targets `"mc"` samples for each example; 1 by default.
        kfac_approx: `"expand"` (default) treats sharing positions as separate examples, `"reduce"` averages inputs and
            adds gradients first.
        separate_weight_and_bias: whether a bias has a block of its own (default), or is one more input of its layer.
        progress: whether to go over the batches one by one, with a bar for each pass (needs tqdm): the same matrix
            except for rounding. They may differ in sizes for which the module is converted; a function is compiled for
            each. False by default. EKFAC takes two passes.
        **options: further options of `ggn_jax.KroneckerOptions`: `positions` (`"exact"` if not given), `tied`,
            `vector_chunk_size`, `on_uncovered`, `small`, `max_small_size`, `large`, `max_dense_size` and `block_size`;
            and `mask` and `examples` of `ggn_jax.KFACLinearOperator`.

    Raises:
        TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them, and for modules that
            `from_module` refuses.
        TypeError: for `sharing`, `bias`, `key`, `chunk_size` and other names that the arguments above stand for.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(2, 3)
        >>> data = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))]
        >>> ekfac = EKFACLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data)
        >>> step = ekfac.inverse(damping=0.1) @ list(module.parameters())
    """

    _kind = ggn_jax.EKFACLinearOperator


class DiagonalTorchLinearOperator(TorchLinearOperator):
    """A diagonal operator: what the GGN's diagonal, damped ones and their inverses share."""

    @outside_graphs
    def diagonal(self) -> list[Tensor]:
        """Return the diagonal, as tensors like the parameters."""
        with jax_on(self.device):
            return [to_torch(self._operator.entries[name]) for name in self._problem.names]

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor."""
        return torch.stack([entries.sum() for entries in self.diagonal()]).sum()

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant, a scalar tensor."""
        return torch.stack([entries.log().sum() for entries in self.diagonal()]).sum()

    def det(self) -> Tensor:
        """Return the determinant, a scalar tensor; `logdet` does not overflow."""
        return self.logdet().exp()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        return torch.stack([(entries**2).sum() for entries in self.diagonal()]).sum().sqrt()

    def inverse(self, damping: Damping = 0.0) -> "DiagonalTorchLinearOperator":
        """Compute the inverse of `self + damping * I`, again a diagonal operator.

        Args:
            damping: a number of at least 0, or one for each parameter: a list like `params`, or a dict by the module's
                names. 0 by default.

        Returns:
            The inverse.

        Raises:
            ValueError: for numbers below 0, and for a number of them that differs from that of the parameters.
        """
        made: DiagonalTorchLinearOperator = self._with_damping(self._operator.inverse, damping)
        return made

    def solve(self, other: Any, damping: Damping = 0.0) -> Any:
        """Compute `inverse(damping) @ other`.

        Args:
            other: tensors like the parameters, a flat vector `[P]`, or a matrix `[P, K]`; tensors may have a last axis
                of columns.
            damping: a number of at least 0, or one for each parameter: a list like `params`, or a dict by the module's
                names. 0 by default.

        Returns:
            Tensors like `other`.
        """
        return self.inverse(damping) @ other

    def _like(self, operator: Any) -> "DiagonalTorchLinearOperator":
        return DiagonalTorchLinearOperator(self._problem, operator)


class GGNDiagonalLinearOperator(ComputedLinearOperator, DiagonalTorchLinearOperator):
    """The diagonal of the GGN of a module's loss: `ggn_jax.GGNDiagonalLinearOperator` for PyTorch.

    It is computed when it is made, at the parameters' values then.

    Args:
        model_func: a `torch.nn.Module`, converted by `from_module` in the mode that it is in; one in training mode with
            dropout or batch normalisation is refused. Converting takes seconds, each time: for operators at many values
            of the parameters, pass a `ConvertedModule`.
        loss_func: a `torch.nn.MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss` module, or one of a class added with
            `register_loss`.
        params: a list or dict of parameters of the module: the curvature is in these, whether or not they require
            gradients, and all others are constants. For those that are trained:
            `[p for p in module.parameters() if p.requires_grad]`.
        data: an iterable of batches, read once and concatenated: the operator is that of one batch of all, also where
            class weights or ignored targets make a mean an average over something other than examples. A batch is a
            pair `(inputs, targets)`, with inputs as `from_module` takes them, or a mapping of tensors whose targets are
            its `labels`; for a module that returns a mapping, the loss is that of its `logits`.
        mc_samples: the number of Monte-Carlo samples; 0 (default) for the exact diagonal.
        seed: an integer that seeds the sampling; 2147483647 by default.
        progress: whether to go over the batches one by one, with a bar for each pass (needs tqdm): the same matrix
            except for rounding. They may differ in sizes for which the module is converted; a function is compiled for
            each. False by default.

    Raises:
        TypeError, ValueError, NotImplementedError: for arguments that do not fit, naming them, and for modules that
            `from_module` refuses.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(2, 3)
        >>> data = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))]
        >>> diagonal = GGNDiagonalLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data)
        >>> step = diagonal.inverse(damping=0.1) @ list(module.parameters())
    """

    _kind = ggn_jax.GGNDiagonalLinearOperator

    @outside_graphs
    def __init__(
        self,
        model_func: Any,
        loss_func: Any,
        params: Params,
        data: Iterable[Any],
        *,
        mc_samples: int = 0,
        seed: int = SEED,
        progress: bool = False,
    ):
        problem = ModuleProblem(model_func, loss_func, params, data, progress=progress)
        super().__init__(problem, {"mc_samples": mc_samples, "seed": seed})

    @staticmethod
    def _options(given: dict[str, Any]) -> dict[str, Any]:
        return sampling(**given)
