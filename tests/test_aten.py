"""Operators of the table, called as PyTorch calls them: forms that few modules have, or torch.export takes apart."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch

from torch_bridge.aten import find_operator, register_operator
from torch_bridge.aten.dtypes import result_dtype

RNG = np.random.default_rng(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape))


X, IMAGES, SQUARE, MASK = draw(4, 3), draw(2, 4, 5, 5), draw(2, 3, 3), torch.tensor([True, False, False, True])
MEAN, VAR = draw(4), draw(4).exp()
RNN = [draw(5, 3), draw(5, 5), draw(5), draw(5)]

# An operator, its arguments, and those by keyword.
FORMS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "one axis": ("prelu.default", (draw(4), draw(1)), {}),
    "of a number": ("prelu.default", (torch.tensor(-2.0).double(), draw(1)), {}),
    "no scalar": ("flatten.using_ints", (torch.tensor(2.0).double(),), {}),
    "nothing kept": ("dropout.default", (X, 1.0, True), {}),
    "alpha": ("alpha_dropout.default", (X, 0.5, False), {}),
    "a mask of rows": ("index_put.default", (X, [MASK], torch.tensor(7.0).double()), {}),
    "every other row": ("slice_scatter.default", (X, draw(2, 3), 0, 0, 4, 2), {}),
    "entries of all": ("take_along_dim.default", (X, torch.tensor([0, 11, 5])), {}),
    "sorter": ("searchsorted.Tensor", (X[:, 0], X), {"sorter": X[:, 0].argsort()}),
    "vectors": ("linalg_solve.default", (SQUARE, draw(2, 3)), {}),
    "two axes": ("linalg_norm.default", (IMAGES, 1, [1, 2]), {}),
    "valid": ("conv2d.padding", (IMAGES, draw(3, 4, 2, 2), None, [1, 1], "valid"), {}),
    "plain": ("convolution.default", (IMAGES, draw(3, 4, 2, 2), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {}),
    "transposed": (
        "convolution.default",
        (IMAGES, draw(4, 3, 2, 2), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1),
        {},
    ),
    "of a whole run": ("instance_norm.default", (IMAGES, None, None, MEAN, VAR, False, 0.1, 1e-5, False), {}),
    "norms": ("norm_except_dim.default", (SQUARE, 2, 1), {}),
    "integers": ("median.default", (torch.tensor([3, 1, 2, 4]),), {}),
    "all entries": ("min.default", (X,), {}),
    "steps first": ("rnn_tanh.input", (draw(6, 2, 3), draw(1, 2, 5), RNN, True, 1, 0.0, False, False, False), {}),
}


def of_numpy(value: Any) -> Any:
    return jax.tree.map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, value)


def operator(name: str) -> Callable[..., Any]:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def test_forms_of_operators() -> None:
    """All of them are one compiled program."""
    tensors, structure = jax.tree.flatten({name: (args, kwargs) for name, (_, args, kwargs) in FORMS.items()})
    places = [i for i, x in enumerate(tensors) if isinstance(x, torch.Tensor)]

    @jax.jit
    def run(arrays: Any) -> Any:
        filled = dict(enumerate(tensors)) | dict(zip(places, arrays, strict=True))
        forms = jax.tree.unflatten(structure, list(filled.values()))
        found = {}
        for name, (args, kwargs) in forms.items():
            key = {"dropout_key": jax.random.key(0)} if name == "nothing kept" else {}
            function = find_operator(f"aten.{FORMS[name][0]}")
            assert function is not None, name
            found[name] = function(*args, **kwargs, **key)
        return found

    found = run([tensors[i].numpy() for i in places])
    for name, (kind, args, kwargs) in FORMS.items():
        wanted = of_numpy(operator(kind)(*args, **kwargs))
        for got, want in zip(jax.tree.leaves(found[name]), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13, err_msg=name)
            assert got.dtype == want.dtype, name


def test_statistics_that_are_read() -> None:
    """In evaluation mode the running statistics are those that were given."""
    name = "_native_batch_norm_legit_functional.default"
    args = IMAGES, None, None, MEAN, VAR, False, 0.1, 1e-5
    got, wanted = find_operator(f"aten.{name}")(*of_numpy(args)), operator(name)(*args)  # type: ignore[misc]
    for i in (0, 3, 4):
        np.testing.assert_allclose(got[i], wanted[i], rtol=1e-12)


@pytest.mark.parametrize("number", [True, 3, 0.5, 1j], ids=str)
def test_dtypes_of_numbers(number: Any) -> None:
    for dtype in (torch.bool, torch.int32, torch.float16, torch.float32, torch.float64, torch.complex64):
        # JAX has no complex numbers of 32 bits.
        if (dtype, number) != (torch.float16, 1j):
            x = torch.ones(2, dtype=dtype)
            wanted = torch.ones(2, dtype=torch.result_type(x, number)).numpy().dtype
            assert result_dtype(x.numpy(), number) == wanted, dtype


ROWS, IDS = X.numpy(), np.array([0, 2])
REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "embedding": ("embedding", (ROWS, IDS, -1, True), "scale_grad_by_freq=True is not a gradient of a function"),
    "bags": ("embedding_bag", (ROWS, IDS, IDS, True), "scale_grad_by_freq=True is not a gradient of a function"),
    "classes": ("one_hot", (IDS,), "the number of classes depends on data: pass num_classes"),
    "range": ("histc", (ROWS,), "its range depends on data: pass min and max"),
    "bits": ("view.dtype", (ROWS, np.dtype("int64")), "it reads bits as another dtype: use x.to"),
    "repeats": ("repeat_interleave.self_Tensor", (ROWS, IDS), "depends on data: pass output_size"),
    "order": ("norm_except_dim", (ROWS, 3), "only the norm of order 2 is supported; got 3"),
    "alpha dropout": ("alpha_dropout", (ROWS, 0.5, True), "alpha dropout is not supported in training mode"),
    "instance norm": (
        "instance_norm",
        (IMAGES.numpy(), None, None, MEAN.numpy(), VAR.numpy(), True, 0.1, 1e-5),
        "it changes its running statistics in training mode: use train=False",
    ),
    "batch norm": (
        "batch_norm",
        (IMAGES.numpy(), None, None, MEAN.numpy(), VAR.numpy(), True, 0.1, 1e-5),
        "changes its running statistics in training mode: use train=True",
    ),
    "packed": ("gru.data", (ROWS, IDS, ROWS, [ROWS]), "packed sequences are not supported: pad them"),
    "qr": ("linalg_qr", (ROWS, "complete"), "only mode='reduced'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    kind, args, message = REFUSED[name]
    function = find_operator(f"aten.{kind}")
    assert function is not None
    with pytest.raises(NotImplementedError, match=message):
        function(*args)


def test_sizes_that_a_module_requires() -> None:
    function = find_operator("aten._assert_scalar")
    assert function is not None
    assert function(True, "at least 2 rows") is None
    with pytest.raises(ValueError, match="the module requires other sizes: at least 2 rows"):
        function(False, "at least 2 rows")


def test_a_function_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="function must be a function of JAX arrays; got int"):
        register_operator(torch.ops.aten.relu, 3)  # type: ignore[arg-type]
