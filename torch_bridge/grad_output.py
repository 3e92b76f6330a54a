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
from torch_bridge.losses import check_loss, find_loss
from torch_bridge.tensors import check_tensor

OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def make_grad_output_fn(
    loss_func: torch.nn.Module, fisher_type: FisherType | str, mc_samples: int = 1
) -> Callable[..., Tensor]:
    """Make a function of **one example** that returns its gradient output vectors.

    With `L` the loss of a **batch of one**, `loss_func(output[None], target[None])`, including its reduction, weights
    and all other options, the vectors are:

    ============== ======================================================= ================
    `fisher_type`  vectors                                                 V
    ============== ======================================================= ================
    `type-2`       columns of `S`, `S S^T` the Hessian of `L`              `output.numel()`
    `mc`           sampled gradients / sqrt(mc_samples); the sum of their  `mc_samples`
                   outer products is the Hessian in expectation
    `empirical`    `sqrt(r)` times the gradient of the sum-reduced `L`     1
    `forward-only` none; the target is not used                            0
    ============== ======================================================= ================

    where `r` is the reduction: 1 for `"sum"`, 1 / (sum of the terms' counts) for `"mean"`; see
    `ggn_jax.make_grad_output_fn`, which computes them.

    The function works under `torch.func.vmap` and the other transformations of `torch.func`, under `make_fx`,
    `torch.compile` and `torch.export` (which, of any function, exports `vmap` with `out_dims=0` only, unless
    `strict=True`), and is differentiable once in `output`, by reverse mode; other derivatives, and derivatives under
    `functionalize`, raise NotImplementedError. *Inside* of a compiled region there is `backward` only:
    `torch.func.grad` raises, and forward mode, which cannot be detected there, gives zeros, so detach outputs first. It
    can be pickled, and copied with its loss.

    Under `vmap` with random vectors, `randomness="different"` gives each example draws of its own. For a whole batch,
    `make_batch_grad_output_fn` is faster, and knows the batch's reduction.

    Args:
        loss_func: a `torch.nn.MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss` module, or one of a class added with
            `register_loss`. Its options are read at each call.
        fisher_type: a `FisherType` or its value, `"type-2"`, `"mc"`, `"empirical"` or `"forward-only"`; curvlinops'
            `FisherType` is accepted as well.
        mc_samples: the number of Monte-Carlo vectors, at least 1 (default); used for `"mc"` only.

    Returns:
        `fn(output [*out], target, generator=None) -> vectors [V, *out]`. The vectors have the output's dtype and
        device, are contiguous, and may be written to. They are computed in the dtype to which torch promotes output,
        target and the tensors of the loss, at least float32, and rounded once. `generator` is for `"mc"`; None stands
        for torch's global generator (and is what `torch.compile` can trace; one state then gives one result again, but
        from torch 2.14 on not that of the function that is not compiled).

    Raises:
        NotImplementedError: for a loss that is not supported, or may compute something else than its class says (hooks,
            a replaced `forward`), and for tensors that are not dense.
        ValueError: for an unknown fisher type, `mc_samples` below 1 with `"mc"`, options such as `reduction="none"`,
            shapes that do not fit, and targets outside of the loss's domain (on the CPU; on a GPU they give NaN).
        TypeError: for a dtype that does not fit.

    Example:
        >>> import torch
        >>> outputs, targets = torch.zeros(5, 3), torch.tensor([0, 1, 2, 1, 0])  # 5 examples, 3 classes
        >>> fn = make_grad_output_fn(torch.nn.CrossEntropyLoss(), "mc", mc_samples=2)
        >>> torch.func.vmap(fn, in_dims=(0, 0, None), out_dims=1, randomness="different")(outputs, targets, None).shape
        torch.Size([2, 5, 3])
    """
    return ExampleGradOutputFn(loss_func, fisher_type, mc_samples)


def make_batch_grad_output_fn(
    loss_func: torch.nn.Module, fisher_type: FisherType | str, mc_samples: int = 1
) -> Callable[..., Tensor]:
    """Make a function of **a batch** that returns the gradient output vectors of all its examples: the fast one.

    As with `make_grad_output_fn`, but without the cost of `vmap`, and with `L` the loss of the **whole batch**: for
    each `n`, the sum over `v` of `V[v, n] V[v, n]^T` is the `n`-th diagonal block of its Hessian. For
    `reduction="mean"` that includes the batch's `1 / N`, and for class weights and `ignore_index` the batch's own
    denominator.

    Args:
        loss_func: a `torch.nn.MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss` module, or one of a class added with
            `register_loss`. Its options are read at each call.
        fisher_type: a `FisherType` or its value, `"type-2"`, `"mc"`, `"empirical"` or `"forward-only"`; curvlinops'
            `FisherType` is accepted as well.
        mc_samples: the number of Monte-Carlo vectors, at least 1 (default); used for `"mc"` only.

    Returns:
        `fn(outputs [N, *out], targets, generator=None) -> vectors [V, N, *out]`. The vectors have the outputs' dtype
        and device. `generator` is for `"mc"`; None stands for torch's global generator.

    Raises:
        NotImplementedError: for a loss that is not supported.
        ValueError: for an unknown fisher type, or `mc_samples` below 1 with `"mc"`; from `fn`, for shapes that do not
            fit, and targets outside of the loss's domain (on the CPU; on a GPU they give NaN).
        TypeError: from `fn`, for a dtype that does not fit.

    Example:
        >>> import torch
        >>> outputs, targets = torch.zeros(5, 3), torch.tensor([0, 1, 2, 1, 0])
        >>> fn = make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), "type-2")
        >>> fn(outputs, targets).shape
        torch.Size([3, 5, 3])
    """
    return BatchGradOutputFn(loss_func, fisher_type, mc_samples)


def make_grad_output_sampler(loss_func: torch.nn.Module) -> Callable[..., Tensor]:
    """Make a function that samples gradients of one example.

    Args:
        loss_func: a `torch.nn.MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss` module, or one of a class added with
            `register_loss`.

    Returns:
        `fn(output_one_datum [*out], num_samples, target_one_datum, generator=None) -> [num_samples, *out]` with
        `E[g g^T]` the Hessian of the loss of a batch of one: the `"mc"` vectors of `make_grad_output_fn`, not divided
        by `sqrt(num_samples)`. With `num_samples=0` nothing is sampled, and the target is not used.

    Raises:
        NotImplementedError: for a loss that is not supported.
        ValueError: from the function, for shapes that do not fit, and targets outside of the loss's domain (on the
            CPU).
        TypeError: from the function, for a dtype that does not fit.

    Example:
        >>> import torch
        >>> sample = make_grad_output_sampler(torch.nn.MSELoss(reduction="sum"))
        >>> sample(torch.zeros(3), 10, torch.ones(3), torch.Generator().manual_seed(0)).shape
        torch.Size([10, 3])
    """
    return GradOutputSampler(loss_func)


def loss_hessian_matrix_sqrt(output_one_datum: Tensor, target_one_datum: Tensor, loss_func: torch.nn.Module) -> Tensor:
    """Compute the square root `S` of the Hessian of one example's loss as a dense tensor.

    As a matrix (rows: the first `*out`), `S S^T` is the Hessian of `loss_func(output[None], target[None])`.

    Args:
        output_one_datum: one example's output, floating, `[*out]`.
        target_one_datum: its target.
        loss_func: a `torch.nn.MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss` module, or one of a class added with
            `register_loss`.

    Returns:
        `S`, a tensor `[*out, *out]`.

    Raises:
        NotImplementedError: for a loss that is not supported.
        ValueError, TypeError: for an output and a target that do not fit the loss.

    Example:
        >>> import torch
        >>> S = loss_hessian_matrix_sqrt(torch.zeros(2), torch.ones(2), torch.nn.MSELoss())
        >>> S @ S.T  # the mean of two squares: Hessian I
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000]])
    """
    columns = make_grad_output_fn(loss_func, FisherType.TYPE2)(output_one_datum, target_one_datum)
    shape, size = output_one_datum.shape, output_one_datum.numel()
    return columns.reshape(size, size).T.contiguous().reshape((*shape, *shape))


class _Function:
    """What the functions above return: an object rather than a closure, so that it can be pickled and copied."""

    def __init__(self, loss_func: torch.nn.Module, fisher_type: Any, mc_samples: Any = 1):
        self.fisher_type = FisherType(fisher_type)
        # Callers that choose the vectors later pass 0 for exact ones.
        draws = self.fisher_type is FisherType.MC
        self.mc_samples = _check_count("mc_samples", mc_samples, 1) if draws else 1
        self.loss_func = loss_func
        self.entry = find_loss(loss_func)
        # `torch.vmap` asks for the text, also where `torch.compile` traces it and takes the number for a dynamic size.
        self._options = f"{self.fisher_type.value!r}, {self.mc_samples}"
        # JAX is not to be traced into a graph, where the operator checks the same.
        if not torch.compiler.is_compiling():
            check_loss(self.entry, loss_func, self.fisher_type)

    def __reduce__(self) -> tuple[Any, ...]:
        # The entry is that of the process, and of the time, in which the copy is made.
        return type(self), (self.loss_func, self.fisher_type.value, self.mc_samples)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.loss_func}, {self._options})"


class ExampleGradOutputFn(_Function):
    """What `make_grad_output_fn` returns."""

    def __call__(self, output: Tensor, target: Tensor, generator: Generator | None = None) -> Tensor:
        return _vectors(self, output, target, generator, self.fisher_type.value, self.mc_samples)


class BatchGradOutputFn(_Function):
    """What `make_batch_grad_output_fn` returns."""

    def __call__(self, outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        return _vectors(self, outputs, targets, generator, self.fisher_type.value, self.mc_samples, batch=True)


class GradOutputSampler(_Function):
    """What `make_grad_output_sampler` returns."""

    def __init__(self, loss_func: torch.nn.Module):
        super().__init__(loss_func, FisherType.MC)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.loss_func,)

    def __call__(
        self, output_one_datum: Tensor, num_samples: int, target_one_datum: Tensor, generator: Generator | None = None
    ) -> Tensor:
        num_samples = _check_count("num_samples", num_samples, 0)
        vectors = "samples" if num_samples else "forward-only"
        return _vectors(self, output_one_datum, target_one_datum, generator, vectors, num_samples)


def _check_count(name: str, value: Any, least: int) -> int:
    if torch.compiler.is_compiling():
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least {least}; got {value!r}.") from None
    if number < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {number}.")
    return number


def _vectors(
    fn: _Function,
    output: Tensor,
    target: Tensor,
    generator: Generator | None,
    vectors: str,
    num: int,
    *,
    batch: bool = False,
) -> Tensor:
    name, target_name = ("outputs", "targets") if batch else ("output", "target")
    check_tensor(name, output)
    if output.dtype not in OUTPUT_DTYPES:
        raise TypeError(
            f"{name} must be floating; got {output.dtype}: cast it to float16, bfloat16, float32 or float64."
        )
    if vectors == "forward-only":
        return output.new_empty((0, *output.shape))
    if output.is_cuda and not torch.compiler.is_compiling():
        refuse_capture()  # before the generator is touched
    check_tensor(target_name, target)
    if fn.entry.floating_targets and not target.is_floating_point():
        raise TypeError(
            f"{target_name} must be floating for {type(fn.loss_func).__name__}, as in torch; got {target.dtype}: cast"
            f" it, {target_name}.to({name}.dtype)."
        )
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {type(generator).__name__}.")
    loss, weights = fn.entry.serialise(fn.loss_func)
    for what, weight in weights.items():
        check_tensor(f"loss_func.{what}", weight)
    for what, other in [(target_name, target), *[(f"loss_func.{what}", weight) for what, weight in weights.items()]]:
        if other.device != output.device:
            raise ValueError(f"{what} is on {other.device}, but {name} on {output.device}: move one of them.")
    seed = draw_seed(output.device, generator) if vectors in ("mc", "samples") else None
    result = grad_output_vectors(
        Request(loss, vectors, num, batch),
        output.unsqueeze(0),
        target.unsqueeze(0),
        seed,
        [weight.unsqueeze(0) for weight in weights.values()],
    )
    return result.squeeze(1)
