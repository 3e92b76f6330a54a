"""Curvature operators of PyTorch modules: torch tensors go in and come out. Here those that are products."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

import ggn_jax
from torch_bridge.errors import ExplainedOperator
from torch_bridge.problem import ModuleProblem, Params
from torch_bridge.tensors import jax_on, outside_graphs, to_jax, to_torch

SEED = 2147483647
# How many columns are multiplied at once, where there are more than so many left: each is a program of its own, so that
# there are few, filled up with zeros.
WIDTHS = ((32, 16), (8, 4), (1, 0))

Damping = float | Tensor | Sequence[float | Tensor] | Mapping[str, float | Tensor]


def as_key(seed: Any) -> jax.Array:
    """The key of a seed."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer; got {seed!r}.")
    return jax.random.key(int(seed))


def as_damping(damping: Damping, names: Sequence[str]) -> Any:
    """A number, or numbers by names, as `ggn_jax` takes them."""
    if isinstance(damping, Tensor) and damping.numel() == 1:
        return damping.item()
    if isinstance(damping, Mapping):
        return {name: as_damping(number, ()) for name, number in damping.items()}
    if isinstance(damping, list | tuple):
        if len(damping) != len(names):
            raise ValueError(f"damping must be a number, or one for each of {len(names)} params; got {len(damping)}.")
        return {name: as_damping(number, ()) for name, number in zip(names, damping, strict=True)}
    if isinstance(damping, Tensor):
        raise ValueError(f"damping must be a number, or a list of them; got a tensor of shape {tuple(damping.shape)}.")
    return damping


def sampling(mc_samples: int, seed: int) -> dict[str, Any]:
    return {"mc_samples": mc_samples, "key": as_key(seed) if mc_samples else None}


class TorchLinearOperator(ExplainedOperator):
    """A symmetric linear operator on lists of tensors like the parameters: the base class of all operators here."""

    def __init__(self, problem: ModuleProblem, operator: Any, *, checks_params: bool = False):
        self._problem, self._operator, self._checks_params = problem, operator, checks_params
        self._shapes = [parameter.shape for parameter in problem.params]
        self._sizes = [parameter.numel() for parameter in problem.params]
        self.shape = (sum(self._sizes), sum(self._sizes))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self._problem.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._problem.device

    @outside_graphs
    def __matmul__(self, other: Any) -> Any:
        """Compute the product with tensors like the parameters, or with a flat vector or matrix.

        Columns are processed up to 32 at a time, with one pass of the model.

        Args:
            other: tensors like the parameters, a flat vector `[P]`, or a matrix `[P, K]`; tensors may have a last axis
                of columns.

        Returns:
            Tensors like `other`.

        Raises:
            ValueError: for other shapes.
            TypeError: for anything but real tensors.
            RuntimeError: where a product takes derivatives of the module, whose parameters have changed since the
                operator was made.
        """
        if self._checks_params:
            self._problem.check_unchanged()
        many = None if self._checks_params and self._problem.progress else partial(_products, self._operator)
        return self._apply(self._operator.mv, other, many)

    def damped(self, damping: Damping) -> "TorchLinearOperator":
        """Add damping: `self + damping * I`, with all methods of this operator, except `state_dict`.

        Args:
            damping: a number of at least 0, or one for each parameter: a list like `params`, or a dict by the module's
                names.

        Returns:
            The damped operator.

        Raises:
            ValueError: for numbers below 0, and for a number of them that differs from that of the parameters.
        """
        return self._with_damping(self._operator.damped, damping)

    @outside_graphs
    def _with_damping(self, make: Callable[..., Any], damping: Damping, *args: Any) -> Any:
        """An operator like this one, from a function of `ggn_jax` that takes a damping."""
        with jax_on(self.device):
            return self._like(make(as_damping(damping, self._problem.names), *args))

    def _like(self, operator: Any) -> "TorchLinearOperator":
        return TorchLinearOperator(self._problem, operator, checks_params=self._checks_params)

    def _apply(self, one: Any, other: Any, many: Any = None) -> Any:
        """Apply a function of a vector in JAX (and perhaps one of several vectors) to tensors."""
        if isinstance(other, Tensor):
            if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
                raise ValueError(
                    f"the tensor must have shape ({self.shape[1]},) or ({self.shape[1]}, K); got {tuple(other.shape)}."
                )
            parts = other.split(self._sizes)
            tensors = [part.reshape(*shape, *other.shape[1:]) for part, shape in zip(parts, self._shapes, strict=True)]
            results = self._product(one, many, tensors, columns=other.ndim == 2)
            pairs = zip(self._sizes, results, strict=True)
            return torch.cat([result.reshape(size, *other.shape[1:]) for size, result in pairs])
        tensors = list(other)
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise TypeError(
                "an operator is multiplied with torch tensors: a list of them like params, a flat vector, or a matrix;"
                f" got {type(other).__name__}. For NumPy and SciPy there is to_scipy()."
            )
        extra = {t.ndim - len(shape) for t, shape in zip(tensors, self._shapes, strict=False)}
        fits = len(tensors) == len(self._shapes) and extra <= {0, 1} and len(extra) == 1
        if not fits or any(t.shape[: len(s)] != s for t, s in zip(tensors, self._shapes, strict=True)):
            raise ValueError(
                f"the tensors must have shapes {[tuple(s) for s in self._shapes]}, with one axis more for columns; got"
                f" {[tuple(t.shape) for t in tensors]}."
            )
        return self._product(one, many, tensors, columns=extra == {1})

    def _product(self, one: Any, many: Any, tensors: list[Tensor], *, columns: bool) -> list[Tensor]:
        if any(tensor.is_complex() for tensor in tensors):
            raise TypeError("the operator is real; got a complex tensor: multiply its real and imaginary parts.")
        tensors = [tensor.to(self.device, self.dtype) for tensor in tensors]
        if not columns:
            return self._apply_columns(one, tensors)
        number, start, results = tensors[0].shape[-1], 0, []
        if not number:
            return tensors
        tensors = [tensor.movedim(-1, 0) for tensor in tensors]
        while start < number:
            left = number - start
            width = 1 if many is None else next(width for width, least in WIDTHS if left > least)
            parts = [tensor[start : start + width] for tensor in tensors]
            if width > 1:
                filled = [
                    torch.cat([p, p.new_zeros(width - len(p), *p.shape[1:])]) if left < width else p for p in parts
                ]
                results.append([result[:left] for result in self._apply_columns(many, filled)])
            else:
                results.append([result[None] for result in self._apply_columns(one, [part[0] for part in parts])])
            start += width
        return [torch.cat(parts).movedim(0, -1) for parts in zip(*results, strict=True)]

    def _apply_columns(self, product: Callable[[Any], Any], tensors: list[Tensor]) -> list[Tensor]:
        with jax_on(self.device):
            names = self._problem.names
            results = product({name: to_jax(tensor) for name, tensor in zip(names, tensors, strict=True)})
            return [to_torch(results[name]) for name in names]

    @outside_graphs
    def to_scipy(self, dtype: Any = None) -> Any:
        """Make a SciPy operator with the same products: for its solvers, with `damped` operators.

        Args:
            dtype: the dtype of its vectors; None (default) for that of the parameters.

        Returns:
            A `scipy.sparse.linalg.LinearOperator`.
        """
        from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]

        def product(x: Any) -> Any:
            result = self @ torch.as_tensor(np.asarray(x), device=self.device)
            return result.cpu().numpy().astype(x.dtype)

        return LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=np.dtype(dtype)
        )


@jax.jit
def _products(operator: Any, vectors: Any) -> Any:
    """Products with vectors stacked on a first axis: the model runs once for all of them."""
    return jax.vmap(operator.mv)(vectors)


class GGNLinearOperator(TorchLinearOperator):
    """The generalized Gauss-Newton matrix of a module's loss: `ggn_jax.GGNLinearOperator` for PyTorch.

    Names and order of the arguments are those of curvlinops. Products are taken at the parameters' values when the
    operator was made, and refused once these have changed.

    It has no `solve`: use SciPy's conjugate gradients with `damped(d).to_scipy()`, and the `inverse(d).to_scipy()` of a
    `KFACLinearOperator` as preconditioner; or, where there are fewer outputs than parameters, the exact
    `ggn_jax.GramLinearOperator(...).solve_ggn` of `from_module`'s function.

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
        mc_samples: the number of Monte-Carlo samples; 0 (default) for the exact matrix.
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
        >>> ggn = GGNLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data)
        >>> (ggn @ torch.ones(9)).shape
        torch.Size([9])
    """

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
        with jax_on(problem.device):
            operator = problem.operator(ggn_jax.GGNLinearOperator, sampling(mc_samples, seed))
        super().__init__(problem, operator, checks_params=True)


class DerivativeLinearOperator(TorchLinearOperator):
    """Products of derivatives of the module, without options: what the empirical Fisher and the Hessian share."""

    _kind: Any

    @outside_graphs
    def __init__(self, model_func: Any, loss_func: Any, params: Params, data: Iterable[Any], *, progress: bool = False):
        problem = ModuleProblem(model_func, loss_func, params, data, progress=progress)
        with jax_on(problem.device):
            operator = problem.operator(self._kind, {})
        super().__init__(problem, operator, checks_params=True)


class EFLinearOperator(DerivativeLinearOperator):
    """The empirical Fisher matrix of a module's loss: `ggn_jax.EFLinearOperator` for PyTorch.

    Products are taken at the parameters' values when the operator was made, and refused once these have changed.

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
        >>> ef = EFLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data)
        >>> ef.shape
        (9, 9)
    """

    _kind = ggn_jax.EFLinearOperator


class HessianLinearOperator(DerivativeLinearOperator):
    """The Hessian of a module's loss: `ggn_jax.HessianLinearOperator` for PyTorch.

    Products are taken at the parameters' values when the operator was made, and refused once these have changed.

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
        >>> hessian = HessianLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data)
        >>> hessian.shape
        (9, 9)
    """

    _kind = ggn_jax.HessianLinearOperator
