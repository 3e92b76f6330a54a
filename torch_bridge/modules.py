"""Modules of PyTorch as functions of JAX."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from torch_bridge._check_module import ModuleCallError, check_examples, check_module, explain_export_error
from torch_bridge._export import Program, export
from torch_bridge._graph_text import graph_hash
from torch_bridge._interpret import check_dtypes, check_operators, run
from torch_bridge.aten.dropout import NoKeyError
from torch_bridge.aten.dtypes import to_dtype
from torch_bridge.batches import Call, as_inputs, check_tensors, how_to_call
from torch_bridge.tensors import to_jax

ModelFn = Callable[..., Any]


def from_module(
    module: torch.nn.Module, example_inputs: Any, *, train: bool | None = False, dynamic_batch: bool = True
) -> tuple[ModelFn, dict[str, jax.Array]]:
    """Convert a module to a pure JAX function of its parameters and inputs, and its parameters to JAX arrays.

    `model_fn(params, inputs)` can be compiled, mapped and differentiated; `ggn_jax` finds its layers. The module is
    exported (`torch.export`, before any decomposition) and each operator runs as its JAX function. Shapes and dtypes
    are compared with torch's at each.

    `torch.export` drops some things silently. Torch runs the module and the graph on `example_inputs`, and where an
    output or a gradient differs by more than rounding, as with a `torch.autograd.Function`, the module is refused.

    Args:
        module: a `torch.nn.Module`, which is not changed. One of `torch.compile` is converted as if it were not
            compiled, one of `DistributedDataParallel` as the module in it; names of parameters are still the given
            module's. Forward hooks of its parts are in the function; hooks of gradients, of parameters and of all
            modules are refused.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments, of tensors
            and nested containers of them (for arguments that are not tensors, wrap the module). The mapping may be of
            any class, such as Hugging Face's `BatchEncoding`; where none of its keys is an argument of `forward`, it is
            the one argument. `inputs` has the same structure, with arrays, and any mapping for a mapping. Use values
            for which the module works. Every tensor whose first axis is as long as the first tensor's has a batch axis
            there.
        train: the mode to convert in: evaluation (False, default), training (True), or (None) the mode that each
            submodule is in, in which random operators and changes of buffers are refused. With True,
            `model_fn(params, inputs, key=None)` returns `(outputs, buffers)`: a dict of those that the call changed,
            such as running statistics, by torch's names, from the values in the module, or in `params` where that holds
            buffers beside the parameters. `key` is for dropout.
        dynamic_batch: whether one graph serves all sizes of batch (default). A batch of one runs the graph of larger
            ones. Where `forward` depends on the size, torch.export refuses: pass False, and a graph is made for each
            new size, from a copy of the module.

    Returns:
        `(model_fn, params)`. `params` is a dict by the names of `module.named_parameters()`, tied ones once. It holds
        copies, on which later changes of the module have no effect. Frozen ones (`requires_grad=False`) are among them,
        and have derivatives as all others; hold them fixed by closing over them, or by the masks of `ggn_jax.kfac`.
        Buffers are constants of `model_fn`. Its outputs are as the module's, with classes of mappings as dicts. 64-bit
        integers become 32-bit ones where JAX has no others, and are refused where `example_inputs` lead to larger
        values. Indices out of range give NaN, not an error.

    Raises:
        NotImplementedError: for operators that have no JAX function (see `register_operator`), naming all of them and
            their modules, and, unless `train=True`, for random operators and those that write into buffers.
        TypeError: for inputs that are not tensors, and for float64 where JAX has 64-bit types switched off.
        RuntimeError: where torch.export fails, or the module itself.

    Example:
        >>> import torch, jax, ggn_jax
        >>> module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 4))
        >>> model_fn, params = from_module(module, torch.ones(2, 2))
        >>> list(params)
        ['0.weight', '0.bias', '2.weight', '2.bias']
        >>> batch = jax.numpy.ones((8, 2)), jax.numpy.arange(8) % 4
        >>> kfac = ggn_jax.KFACLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), params, batch, fisher_type="type-2")
        >>> kfac.solve(params, damping=0.1)["0.weight"].shape
        (3, 2)
    """
    converted = convert(module, example_inputs, train=train, updates=train is True, dynamic_batch=dynamic_batch)
    if train:
        return converted.run, converted.params

    def model_fn(params: dict[str, jax.Array], inputs: Any, *, key: jax.Array | None = None) -> Any:
        return converted.run(params, inputs, key=key)[0]

    return model_fn, converted.params


class Conversion(NamedTuple):
    """A module as a JAX function, with all that a call of it does."""

    run: ModelFn
    """`run(params, inputs, key=None)` returns the outputs, and a dict of the buffers that the call changed."""
    params: dict[str, jax.Array]
    updated: tuple[str, ...]
    """The names of the buffers that a call changes."""
    random: bool
    """Whether it needs a key."""
    graph: str
    """A hash of its operators."""


def convert(
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    train: bool | None = None,
    updates: bool,
    dynamic_batch: bool = True,
) -> Conversion:
    """A module in a mode, as for `from_module`; what is random or changes buffers is refused but for `updates`."""
    check_module(module)
    check_tensors("example_inputs", example_inputs)
    call = how_to_call(module, example_inputs)
    leaves, structure = jax.tree.flatten(as_inputs(example_inputs))
    if not leaves:
        raise ValueError("example_inputs must hold at least one tensor: a module without inputs has no examples.")
    check_examples(leaves)
    leaves = [leaf.clone() if leaf.is_inference() else leaf.detach() for leaf in leaves]
    programs: dict[Any, Program] = {}
    source = module if dynamic_batch else copy.deepcopy(module)

    def program_for(shapes: tuple[tuple[int, ...], ...]) -> Program:
        key = None if dynamic_batch else shapes
        if key not in programs:
            examples = leaves
            if not dynamic_batch:
                examples = [_resized(leaf, shape) for leaf, shape in zip(leaves, shapes, strict=True)]
            program = _export(source, examples, structure, call, train, dynamic_batch, updates)
            check_operators(program)
            check_dtypes(program)
            programs[key] = program
        return programs[key]

    def model_fn(params: dict[str, jax.Array], inputs: Any, *, key: jax.Array | None = None) -> Any:
        arrays, given = jax.tree.flatten(as_inputs(inputs))
        if given != structure:  # type: ignore[operator]  # untyped in jaxlib
            raise ValueError(f"inputs must have the structure of example_inputs, {structure}; got {given}.")
        arrays = [jnp.asarray(array) for array in arrays]
        program = program_for(tuple(array.shape for array in arrays))
        _check_inputs(arrays, program, leaves)
        absent = [name for name in program.parameters.values() if name not in params]
        if absent:
            raise KeyError(f"params must hold all of the module's parameters; {', '.join(absent)} are missing.")
        return run(program, params, arrays, key)

    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    program = program_for(shapes)
    parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    like = [jax.ShapeDtypeStruct(shape, to_dtype(leaf.dtype)) for shape, leaf in zip(shapes, leaves, strict=True)]
    structs = {name: jax.ShapeDtypeStruct(tuple(p.shape), to_dtype(p.dtype)) for name, p in parameters.items()}
    random, inputs = False, jax.tree.unflatten(structure, like)
    try:
        jax.eval_shape(model_fn, structs, inputs)
    except NoKeyError:
        if not updates:
            raise
        random = True
        jax.eval_shape(lambda p, x: model_fn(p, x, key=jax.random.key(0)), structs, inputs)
    arrays = {name: to_jax(parameter) for name, parameter in parameters.items()}
    return Conversion(model_fn, arrays, program.updated, random, graph_hash(program))


def _resized(leaf: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The example inputs repeated up to another batch size: the module is known to accept these values."""
    if leaf.ndim and len(leaf) and leaf.shape[1:] == shape[1:]:
        return leaf[torch.arange(shape[0], device=leaf.device) % len(leaf)]
    return leaf.new_zeros(shape)


def _check_inputs(arrays: list[jax.Array], program: Program, leaves: list[torch.Tensor]) -> None:
    """Refuse inputs whose dtypes or shapes (except for the batch size) differ from those of the export."""
    batch = {array.shape[0] for array, sizes in zip(arrays, program.sizes, strict=True) if None in sizes and array.ndim}
    for array, sizes, leaf in zip(arrays, program.sizes, leaves, strict=True):
        fits = array.ndim == len(sizes) and all(w in (None, s) for w, s in zip(sizes, array.shape, strict=True))
        if not fits or array.dtype != to_dtype(leaf.dtype) or len(batch) > 1:
            shape = ", ".join("N" if size is None else str(size) for size in sizes)
            raise ValueError(
                f"inputs must be like example_inputs: wanted {to_dtype(leaf.dtype)} of shape [{shape}], got"
                f" {array.dtype} of shape {array.shape}.{_way_out(array.dtype, to_dtype(leaf.dtype))}"
            )


def _way_out(got: Any, wanted: Any) -> str:
    if got == wanted:
        return " For other sizes than the batch's, convert the module again."
    if got.kind == wanted.kind and got.kind in "iu" and got.itemsize == 8:
        return (
            f" As JAX's 64-bit types are switched off, the module's integers are of 32 bits: pass jnp.asarray(array,"
            f" jnp.{wanted}), or convert it and call model_fn inside of `with jax.enable_x64(True)`."
        )
    return f" Cast them to {wanted}, or convert the module again for others."


def _export(
    module: torch.nn.Module,
    leaves: list[Any],
    structure: Any,
    call: Call,
    train: bool | None,
    dynamic: bool,
    updates: bool,
) -> Program:
    with _in_mode(module, train):
        try:
            return export(module, leaves, structure, call, dynamic=dynamic, updates=updates)
        except (NotImplementedError, ModuleCallError):
            raise
        except Exception as error:
            raise explain_export_error(error, dynamic) from error


@contextlib.contextmanager
def _in_mode(module: torch.nn.Module, train: bool | None) -> Iterator[None]:
    """The module in evaluation or training mode; each submodule is put back into its own."""
    before = [(part, part.training) for part in module.modules()]
    try:
        if train is not None:
            module.train(train)
        yield
    finally:
        for part, training in before:
            part.training = training
