"""The functions that PyTorch users call; the same names, arguments and results as in curvlinops."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from ggn_jax import FisherType
from torch_bridge._compute import Request
from torch_bridge._cuda import refuse_capture
from torch_bridge._op import grad_output_vectors
from torch_bridge.generators import draw_seed
from torch_bridge.losses import LossEntry, check_loss, find_loss


def make_grad_output_fn(
    loss_func: torch.nn.Module, fisher_type: FisherType | str, mc_samples: int = 1
) -> Callable[..., Tensor]:
    r"""A function of **one datum** that returns its gradient output vectors.

    `fn(output [*out], target, generator=None) -> vectors [V, *out]`. With `L` the loss of a **batch of one**,
    `loss_func(output[None], target[None])`, including its reduction, weights and all other options:

    ============== ======================================================= ================
    `fisher_type`  vectors                                                 V
    ============== ======================================================= ================
    `type-2`       columns of `S`, `S S^T` the Hessian of `L`              `output.numel()`
    `mc`           would-be gradients / sqrt(mc_samples); the sum of their `mc_samples`
                   outer products is the Hessian in expectation
    `empirical`    `sqrt(r)` times the gradient of the sum-reduced `L`     1
    `forward-only` none; the target is not looked at                       0
    ============== ======================================================= ================

    where `r` is the reduction: 1 for `"sum"`, 1 / (sum of the terms' counts) for `"mean"`; see
    `ggn_jax.make_grad_output_fn`, which computes them.

    It works under `torch.func.vmap` and the other transformations of `torch.func`, under `make_fx` and `torch.compile`,
    and is differentiable once in `output`, by reverse mode; other derivatives raise NotImplementedError. *Inside* of a
    compiled region there is `backward` only: `torch.func.grad` raises, and forward mode, which cannot be seen there,
    gives zeros, so detach outputs first.

    Under `vmap` with random vectors, `randomness="different"` gives each datum draws of its own. For a whole batch,
    `make_batch_grad_output_fn` is faster, and knows the batch's reduction.

    **Arguments:**

    - `loss_func`: a `torch.nn.MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss` module, or one of a class added with
      `register_loss`. Its options are read at each call.
    - `fisher_type`: a `FisherType` or its value; curvlinops' `FisherType` is accepted as well.
    - `mc_samples`: the number of Monte-Carlo vectors, at least 1; of no effect with other vectors.

    **Returns:** the function. Its vectors have the output's dtype and device, are contiguous, and may be written to.
    They are computed in the dtype to which torch promotes output, target and the tensors of the loss, at least float32,
    and rounded once.
    `generator` belongs to `mc`; `None` stands for torch's global generator (and is what `torch.compile` can trace).

    **Raises:** NotImplementedError for a loss that is not supported; ValueError for an unknown fisher type,
    `mc_samples` below 1 with `"mc"`, options such as `reduction="none"`, shapes that do not fit, and targets that are
    not of the loss's domain (on the CPU; on a GPU they give NaN); TypeError for a dtype that does not fit.

    >>> import torch
    >>> outputs, targets = torch.zeros(5, 3), torch.tensor([0, 1, 2, 1, 0])  # 5 data, 3 classes
    >>> fn = make_grad_output_fn(torch.nn.CrossEntropyLoss(), "mc", mc_samples=2)
    >>> torch.func.vmap(fn, in_dims=(0, 0, None), out_dims=1, randomness="different")(outputs, targets, None).shape
    torch.Size([2, 5, 3])
    """
    fisher_type, entry, mc_samples = _check_request(loss_func, fisher_type, mc_samples)

    def fn(output: Tensor, target: Tensor, generator: Generator | None = None) -> Tensor:
        return _vectors(loss_func, entry, output, target, generator, fisher_type.value, mc_samples, batch=False)

    return fn


def make_batch_grad_output_fn(
    loss_func: torch.nn.Module, fisher_type: FisherType | str, mc_samples: int = 1
) -> Callable[..., Tensor]:
    r"""A function of **a batch** that returns the gradient output vectors of all its data: the fast one.

    `fn(outputs [N, *out], targets, generator=None) -> vectors [V, N, *out]`, as `make_grad_output_fn`, but without the
    cost of `vmap`, and with `L` the loss of the **whole batch**: for each `n`, the sum over `v` of
    `V[v, n] V[v, n]^T` is the `n`-th diagonal block of its Hessian. For `reduction="mean"` that includes the batch's
    `1 / N`, and for class weights and `ignore_index` the batch's own denominator.

    >>> import torch
    >>> outputs, targets = torch.zeros(5, 3), torch.tensor([0, 1, 2, 1, 0])
    >>> fn = make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), "type-2")
    >>> fn(outputs, targets).shape
    torch.Size([3, 5, 3])
    """
    fisher_type, entry, mc_samples = _check_request(loss_func, fisher_type, mc_samples)

    def fn(outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        return _vectors(loss_func, entry, outputs, targets, generator, fisher_type.value, mc_samples, batch=True)

    return fn


def make_grad_output_sampler(loss_func: torch.nn.Module) -> Callable[..., Tensor]:
    r"""A function that draws would-be gradients of one datum.

    `fn(output [*out], num_samples, target, generator=None) -> [num_samples, *out]` with `E[g g^T]` the Hessian of the
    loss of a batch of one: the `mc` vectors of `make_grad_output_fn`, not divided by `sqrt(num_samples)`.

    >>> import torch
    >>> sample = make_grad_output_sampler(torch.nn.MSELoss(reduction="sum"))
    >>> sample(torch.zeros(3), 10, torch.ones(3), torch.Generator().manual_seed(0)).shape
    torch.Size([10, 3])
    """
    _, entry, _ = _check_request(loss_func, FisherType.MC, 1)

    def sampler(output: Tensor, num_samples: int, target: Tensor, generator: Generator | None = None) -> Tensor:
        num_samples = _check_count("num_samples", num_samples)
        return _vectors(loss_func, entry, output, target, generator, "samples", num_samples, batch=False)

    return sampler


def loss_hessian_matrix_sqrt(output_one_datum: Tensor, target_one_datum: Tensor, loss_func: torch.nn.Module) -> Tensor:
    r"""The square root `S` of the Hessian of one datum's loss as a dense tensor, `[*out, *out]`.

    As a matrix (rows: the first `*out`), `S S^T` is the Hessian of `loss_func(output[None], target[None])`.

    >>> import torch
    >>> S = loss_hessian_matrix_sqrt(torch.zeros(2), torch.ones(2), torch.nn.MSELoss())
    >>> S @ S.T  # the mean of two squares: Hessian I
    tensor([[1.0000, 0.0000],
            [0.0000, 1.0000]])
    """
    columns = make_grad_output_fn(loss_func, FisherType.TYPE2)(output_one_datum, target_one_datum)
    shape, size = output_one_datum.shape, output_one_datum.numel()
    return columns.reshape(size, size).T.contiguous().reshape((*shape, *shape))


def _check_count(name: str, value: Any) -> int:
    if torch.compiler.is_compiling():
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least 1; got {value!r}.") from None
    if number < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {number}.")
    return number


def _check_request(loss_func: Any, fisher_type: Any, mc_samples: Any) -> tuple[FisherType, LossEntry, int]:
    fisher_type = FisherType(fisher_type)
    # Callers that choose the vectors later pass 0 for exact ones.
    mc_samples = _check_count("mc_samples", mc_samples) if fisher_type is FisherType.MC else 1
    entry = find_loss(loss_func)
    # JAX is not to be traced into a graph, where the operator checks the same.
    if not torch.compiler.is_compiling():
        check_loss(entry, loss_func, fisher_type)
    return fisher_type, entry, mc_samples


def _vectors(
    loss_func: torch.nn.Module,
    entry: LossEntry,
    output: Tensor,
    target: Tensor,
    generator: Generator | None,
    vectors: str,
    num: int,
    *,
    batch: bool,
) -> Tensor:
    name = "outputs" if batch else "output"
    _check_tensor(name, output)
    if not output.is_floating_point():
        raise TypeError(f"{name} must be floating; got {output.dtype}.")
    if vectors == "forward-only":
        return output.new_empty((0, *output.shape))
    if output.is_cuda and not torch.compiler.is_compiling():
        refuse_capture()  # before the generator is touched
    _check_tensor("targets" if batch else "target", target)
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {type(generator).__name__}.")
    loss, weights = entry.take_apart(loss_func)
    for other, what in [(target, "the target"), *[(weight, "a tensor of loss_func") for weight in weights]]:
        if other.device != output.device:
            raise ValueError(f"{what} is on {other.device}, but {name} on {output.device}: move one of them.")
    seed = draw_seed(output.device, generator) if vectors in ("mc", "samples") else None
    result = grad_output_vectors(
        Request(loss, vectors, num, batch),
        output.unsqueeze(0),
        target.unsqueeze(0),
        seed,
        [weight.unsqueeze(0) for weight in weights],
    )
    return result.squeeze(1)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}.")
