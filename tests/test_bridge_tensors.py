"""`to_jax` and `to_torch`: values, dtypes, views, aliasing and lifetime; and the façade on any layout."""

import gc
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given

import torch_bridge
from torch_bridge import tensors, to_jax, to_torch
from torch_bridge.tensors import DTYPES, jax_on

VIEWS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.T,
    "strided": lambda t: t[::2, 1::2],
    "expanded": lambda t: t[:1].expand(4, *t.shape[1:]),
    "flipped": lambda t: t.flip(0),
    "misaligned": lambda t: t.flatten()[1:],
    "0-d": lambda t: t[1, 1],
    "empty": lambda t: t[:0],
    "requires grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() or t.is_complex() else t,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "conjugate": lambda t: t.conj() if t.is_complex() else t,
    "negative": lambda t: t.conj().imag if t.is_complex() else t,
}


def tensor(dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.arange(24).reshape(4, 6)
    if dtype == torch.bool:
        return numbers % 3 == 0
    if dtype.is_complex:
        return (numbers * (1 - 2j)).to(dtype)
    return (numbers - 12 * dtype.is_signed).to(dtype)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(dtype: torch.dtype, view: str) -> None:
    original = VIEWS[view](tensor(dtype))
    array = to_jax(original)
    assert array.dtype == DTYPES[original.dtype]
    assert array.shape == tuple(original.shape)
    assert np.array_equal(
        np.asarray(array).astype(complex), original.detach().resolve_conj().resolve_neg().to(torch.complex128).numpy()
    )
    back = to_torch(array)
    assert torch.equal(back, original)
    assert back.dtype == original.dtype
    assert back.is_contiguous()
    assert not back.requires_grad
    back.copy_(torch.zeros_like(back))  # writable


@pytest.mark.parametrize("x64", [True, False])
def test_wide_types_are_never_narrowed(x64: bool) -> None:
    with jax.enable_x64(x64):
        array = to_jax(torch.tensor([2**40, -1]))
        assert array.dtype == np.int64
        assert to_torch(array).tolist() == [2**40, -1]
        assert to_jax(torch.tensor(1e300, dtype=torch.float64)).item() == 1e300


def test_no_aliasing() -> None:
    for size in (1, 7, 4096):  # JAX takes large, aligned memory over as it is
        source = torch.ones(size)
        array = to_jax(source)
        source.zero_()
        assert np.all(np.asarray(array) == 1)
        back = to_torch(array)
        back.zero_()
        assert np.all(np.asarray(array) == 1)


def test_lifetimes_are_independent() -> None:
    array = to_jax(torch.arange(1000.0))
    gc.collect()
    assert np.array_equal(array, np.arange(1000.0))
    back = to_torch(array)
    array.delete()
    assert torch.equal(back, torch.arange(1000.0))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.zeros(3), TypeError, "tensor must be a torch.Tensor; got ndarray"),
        (torch.zeros(3).to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn, which JAX does not have"),
        (torch.zeros(3, device="meta"), NotImplementedError, "on the CPU or a CUDA device; got one on meta"),
        (torch.eye(3).to_sparse(), NotImplementedError, "kind torch.sparse_coo: pass tensor.to_dense()"),
    ],
    ids=["not a tensor", "dtype", "meta", "sparse"],
)
def test_what_to_jax_refuses(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_jax(value)


def masked() -> Any:
    return torch.masked.masked_tensor(torch.eye(3), torch.eye(3) > 0)


def nested() -> Any:
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])


def jagged() -> Any:
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged)


class DTensor(torch.Tensor):
    """Takes the place of torch's, which needs a process group."""


NOT_DENSE = {
    "coo": (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo", "to_dense()"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr", "to_dense()"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "mkldnn", "to_dense()"),
    "nested": (nested, "nested", "unbind()"),
    "jagged": (jagged, "nested", "unbind()"),
    "masked": (masked, "MaskedTensor", "to_tensor(value)"),
    "distributed": (lambda: torch.eye(3).as_subclass(DTensor), "DTensor", "to_local()"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of prototypes
@pytest.mark.parametrize("name", NOT_DENSE)
def test_tensors_that_are_not_dense_are_refused_by_name(name: str) -> None:
    make, kind, way_out = NOT_DENSE[name]
    bad, dense = make(), torch.eye(3)
    calls = {
        "tensor": lambda: to_jax(bad),
        "outputs": lambda: torch_bridge.make_batch_grad_output_fn(torch.nn.MSELoss(), "forward-only")(bad, None),
        "targets": lambda: torch_bridge.make_batch_grad_output_fn(torch.nn.MSELoss(), "type-2")(dense, bad),
        "loss_func.weight": lambda: torch_bridge.make_grad_output_fn(torch.nn.BCEWithLogitsLoss(weight=bad), "mc"),
    }
    for argument, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"^{argument} must be an ordinary, dense tensor; got") as info:
            call()
        assert kind in str(info.value)
        assert f"{argument}.{way_out}" in str(info.value)


def test_to_jax_inside_of_a_transformation() -> None:
    with pytest.raises(NotImplementedError, match="inside of a torch transformation"):
        torch.func.vmap(lambda t: to_torch(to_jax(t)))(torch.zeros(3, 2))


def test_devices_that_jax_does_not_have() -> None:
    """Such a tensor needs a device that few have; what asks JAX for it does not."""
    with pytest.raises(RuntimeError, match=r"on cuda:77, which this JAX does not have: install jax\[cuda"):
        jax_on(torch.device("cuda", 77)).__enter__()


@pytest.mark.parametrize(
    ("cuda", "hip", "way_out"),
    [
        ("12.8", None, r"install jax\[cuda12\]"),
        ("13.0", None, r"install jax\[cuda13\]"),
        ("11.8", None, "this torch is for CUDA 11; install one for CUDA 12 or 13"),
        (None, "6.2", "this torch is for ROCm"),
    ],
)
def test_the_jax_that_fits_torch(
    cuda: str | None, hip: str | None, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(RuntimeError, match=f"on cuda:78, which this JAX does not have: {way_out}"):
        jax_on(torch.device("cuda", 78)).__enter__()


def test_the_extras_are_those_of_jax() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name.startswith("cuda")}
    assert extras == {f"cuda{version}": [f"jax[cuda{version}]"] for version in tensors.CUDA_OF_JAX}


def test_devices_have_torchs_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where JAX sees the second one only."""
    device = SimpleNamespace(local_hardware_id=1, memory_stats=dict)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    assert tensors._jax_device.__wrapped__("cuda", 1) is device
    with pytest.raises(RuntimeError, match="on cuda:0, which this JAX does not have"):
        tensors._jax_device.__wrapped__("cuda", 0)


def test_meshes_of_several_devices_are_refused() -> None:
    fn = torch_bridge.make_batch_grad_output_fn(torch.nn.MSELoss(), "type-2")
    with (
        jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices("cpu")[:2])),
        pytest.raises(RuntimeError, match=r"one device: call it outside of jax.set_mesh"),
    ):
        fn(torch.zeros(2, 3), torch.zeros(2, 3))


def test_what_to_torch_refuses() -> None:
    with pytest.raises(TypeError, match=r"array must be a jax.Array; got ndarray"):
        to_torch(np.zeros(3))
    with pytest.raises(TypeError, match="key<fry>, which torch does not have"):
        to_torch(jax.random.key(0))
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda x: jnp.zeros(3) if to_torch(x) is None else x)(jnp.zeros(3))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices("cpu")[:2])
    spread = jax.device_put(jnp.zeros(4), jax.NamedSharding(mesh, jax.P("data")))
    with pytest.raises(ValueError, match="spread over 2 devices"):
        to_torch(spread)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A loss with options, and one example of random shape, dtype and strides."""
    kind = draw(st.sampled_from(["mse", "bce", "ce", "ce-soft"]))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=kind.startswith("ce"), max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    reduction = draw(st.sampled_from(["mean", "sum"]))

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        layout = draw(st.sampled_from(["plain", "transposed", "strided", "misaligned"]))
        if layout == "strided":
            return torch.rand(*shape, 2, dtype=dtype, generator=generator)[..., 1]
        if layout == "transposed":
            return torch.rand(shape[::-1], dtype=dtype, generator=generator).permute(tuple(range(len(shape))[::-1]))
        size = int(np.prod(shape))
        return torch.rand(size + 1, dtype=dtype, generator=generator)[layout == "misaligned" :][:size].reshape(shape)

    output = 4 * random(shape) - 2
    if kind == "mse":
        return torch.nn.MSELoss(reduction=reduction), output, random(shape)
    if kind == "bce":
        weight, pos_weight = (random(shape) if draw(st.booleans()) else None for _ in range(2))
        loss: torch.nn.Module = torch.nn.BCEWithLogitsLoss(weight, reduction=reduction, pos_weight=pos_weight)
        return loss, output, random(shape)
    options = {
        "weight": random(shape[:1]) + 0.1 if draw(st.booleans()) else None,
        "label_smoothing": draw(st.sampled_from([0.0, 0.2])),
        "reduction": reduction,
    }
    if kind == "ce-soft":
        return torch.nn.CrossEntropyLoss(**options), output, random(shape).softmax(0)
    target = torch.randint(shape[0], shape[1:], generator=generator)
    # At least one class is kept: torch's mean over nothing is NaN.
    ignored = draw(st.integers(0, shape[0] - 1))
    if torch.all(target == ignored):
        ignored = -100
    return torch.nn.CrossEntropyLoss(ignore_index=ignored, **options), output, target


@given(arguments())
@pytest.mark.sweep
def test_any_loss_shape_and_layout(arguments: tuple[torch.nn.Module, torch.Tensor, torch.Tensor]) -> None:
    loss, output, target = arguments
    kept = output.clone(), target.clone()
    root = torch_bridge.loss_hessian_matrix_sqrt(output, target, loss).reshape(output.numel(), output.numel())
    flat, wide = output.double().flatten(), target.double() if target.is_floating_point() else target
    wide_loss = loss.double()
    hessian = torch.autograd.functional.hessian(lambda f: wide_loss(f.reshape(1, *output.shape), wide[None]), flat)
    tolerance = 1e-12 if output.dtype == torch.float64 else 1e-5
    torch.testing.assert_close((root @ root.T).double(), hessian, rtol=tolerance, atol=tolerance)
    assert torch.equal(output, kept[0])
    assert torch.equal(target, kept[1])
