"""Curvature operators of PyTorch modules: torch tensors go in and come out. Here those that are products."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

import ggn_jax
from torch_bridge.setting import Params, Setting
from torch_bridge.tensors import jax_on, to_jax, to_torch

SEED = 2147483647


def as_key(seed: Any) -> jax.Array:
    """The key of a seed."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer; got {seed!r}.")
    return jax.random.key(int(seed))


def sampling(mc_samples: int, seed: int) -> dict[str, Any]:
    return {"mc_samples": mc_samples, "key": as_key(seed) if mc_samples else None}


class TorchLinearOperator:
    """A symmetric linear operator on lists of tensors like the parameters; what all operators here share."""

    def __init__(self, setting: Setting, operator: Any, *, follows: bool = False):
        self._setting, self._operator, self._follows = setting, operator, follows
        self._shapes = [parameter.shape for parameter in setting.params]
        self._sizes = [parameter.numel() for parameter in setting.params]
        self.shape = (sum(self._sizes), sum(self._sizes))

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        return self._setting.dtype

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return self._setting.device

    def __matmul__(self, other: Any) -> Any:
        """The product with tensors like the parameters, with or without a last axis of columns, or `[P]`, `[P, K]`.

        **Raises:** ValueError for other shapes; RuntimeError where a product is one of derivatives of the module, whose
        parameters have changed since the operator was made.
        """
        if self._follows:
            self._setting.check_unchanged()
        if isinstance(other, Tensor):
            if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
                raise ValueError(
                    f"the tensor must have shape ({self.shape[1]},) or ({self.shape[1]}, K); got {tuple(other.shape)}."
                )
            parts = other.split(self._sizes)
            tensors = [part.reshape(*shape, *other.shape[1:]) for part, shape in zip(parts, self._shapes, strict=True)]
            results = self._product(tensors, columns=other.ndim == 2)
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
        return self._product(tensors, columns=extra == {1})

    def _product(self, tensors: list[Tensor], *, columns: bool) -> list[Tensor]:
        if not columns:
            return self._times(tensors)
        number = tensors[0].shape[-1]
        if not number:
            return [tensor.to(self.device, self.dtype) for tensor in tensors]
        results = [self._times([tensor[..., k] for tensor in tensors]) for k in range(number)]
        return [torch.stack(parts, dim=-1) for parts in zip(*results, strict=True)]

    def _times(self, tensors: list[Tensor]) -> list[Tensor]:
        with jax_on(self.device):
            names = self._setting.names
            if any(tensor.is_complex() for tensor in tensors):
                raise TypeError("the operator is real; got a complex tensor: multiply its real and imaginary parts.")
            vector = {n: to_jax(t.to(self.device, self.dtype)) for n, t in zip(names, tensors, strict=True)}
            product = self._operator.mv(vector)
            return [to_torch(product[name]) for name in names]

    def to_scipy(self, dtype: Any = None) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` with the same products."""
        from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]

        def product(x: Any) -> Any:
            result = self @ torch.as_tensor(np.asarray(x), device=self.device)
            return result.cpu().numpy().astype(x.dtype)

        return LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=np.dtype(dtype)
        )


class GGNLinearOperator(TorchLinearOperator):
    r"""The generalized Gauss-Newton matrix of a module's loss: `ggn_jax.GGNLinearOperator` for PyTorch.

    **Arguments**, named and ordered as curvlinops':

    - `model_func`: a `torch.nn.Module`, converted by `from_module` in the mode that it is in: one in training mode with
      dropout or batch normalisation is refused. Converting takes seconds, each time: for operators at many values of
      the parameters, pass a `ConvertedModule`.
    - `loss_func`: a loss module as `make_grad_output_fn` takes it.
    - `params`: a list or dict of parameters of the module: the curvature is in these, whether or not they require
      gradients, and all others are constants. For those that are trained: `[p for p in module.parameters() if
      p.requires_grad]`.
    - `data`: an iterable of batches, read once and put together: the operator is that of one batch of all, also where
      class weights or ignored targets make a mean one over something else than examples. A batch is a pair (inputs,
      targets), with inputs as for `from_module`, or a mapping of tensors whose targets are its `labels`; of a module
      that returns a mapping, the loss is of its `logits`.
    - `mc_samples`, `seed`: the number of Monte-Carlo samples, 0 for the exact matrix.
    - `progress`: go over the batches one by one, with a bar for each pass (needs tqdm): the same matrix, but for
      rounding. They may differ in sizes for which the module is converted; a function is compiled for each.

    Products are those at the parameters' values when it was made, and refused once these have changed.

    >>> import torch
    >>> module = torch.nn.Linear(2, 3)
    >>> data = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))]
    >>> ggn = GGNLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data)
    >>> (ggn @ torch.ones(9)).shape
    torch.Size([9])
    """

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
        setting = Setting(model_func, loss_func, params, data, progress=progress)
        with jax_on(setting.device):
            operator = setting.operator(ggn_jax.GGNLinearOperator, sampling(mc_samples, seed))
        super().__init__(setting, operator, follows=True)


class DerivativeLinearOperator(TorchLinearOperator):
    """Products of derivatives of the module, without options: what the empirical Fisher and the Hessian share."""

    _kind: Any

    def __init__(self, model_func: Any, loss_func: Any, params: Params, data: Iterable[Any], *, progress: bool = False):
        setting = Setting(model_func, loss_func, params, data, progress=progress)
        with jax_on(setting.device):
            operator = setting.operator(self._kind, {})
        super().__init__(setting, operator, follows=True)


class EFLinearOperator(DerivativeLinearOperator):
    """The empirical Fisher matrix of a module's loss: `ggn_jax.EFLinearOperator` for PyTorch.

    **Arguments:** as for `GGNLinearOperator`, without those of sampling.

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

    **Arguments:** as for `GGNLinearOperator`, without those of sampling.

    >>> import torch
    >>> module = torch.nn.Linear(2, 3)
    >>> data = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))]
    >>> hessian = HessianLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data)
    >>> hessian.shape
    (9, 9)
    """

    _kind = ggn_jax.HessianLinearOperator
