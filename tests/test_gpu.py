"""GPUs: memory that two allocators share, streams, graphs, and programs for CUDA.

What needs a device runs wherever PyTorch and JAX both have one; the mathematics is that of the CPU.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import ggn_jax
import torch_bridge
from ggn_jax.kronecker.inverse import inverse_by_halves, inverse_by_solves
from torch_bridge import _cuda, to_jax, to_torch

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and a PyTorch and a JAX that use it"
)


# Without a device.


class FakeEvent:
    """Of a stream on which nothing has run yet."""

    made: list["FakeEvent"]

    def __init__(self) -> None:
        self.recorded = self.done = False
        FakeEvent.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.done


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    FakeEvent.made = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(_cuda, "PENDING_COPIES", _cuda.PendingCopies())
    return FakeEvent.made


def test_memory_is_lent_until_the_copy_has_run(events: list[FakeEvent]) -> None:
    """Whatever the order in which copies on several streams end."""
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = [jnp.full(3, float(i)) for i in range(3)]
    places = [array.unsafe_buffer_pointer() for array in arrays]
    results = [_cuda.copy_to_torch(array) for array in arrays]
    del arrays

    def lent() -> list[int]:
        return [source.data_ptr() for _, source in _cuda.PENDING_COPIES.copies]

    assert [event.recorded for event in events] == [True] * 3
    assert lent() == places
    events[1].done = True
    _cuda.PENDING_COPIES.release_finished()
    assert lent() == [places[0], places[2]]
    for event in events:
        event.done = True
    _cuda.PENDING_COPIES.release_finished()
    assert lent() == []
    for i, result in enumerate(results):  # memory of its own
        assert result.data_ptr() not in places
        assert torch.equal(result, torch.full((3,), float(i), dtype=torch.float64))


def test_a_copy_gives_back_what_earlier_ones_lent(events: list[FakeEvent]) -> None:
    for _ in range(10):
        _cuda.copy_to_torch(jnp.zeros(3))
        for event in events:
            event.done = True
    assert len(_cuda.PENDING_COPIES.copies) == 1


def test_captures_are_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        _cuda.refuse_capture()


def test_compiled_graphs_leave_the_operators_out() -> None:
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this PyTorch has no tag that says so; a capture is refused")
    for op in (torch.ops.torch_bridge.grad_output_vectors, torch.ops.torch_bridge.grad_output_vectors_vjp):
        assert torch.Tag.cudagraph_unsafe in op.default.tags


@pytest.mark.parametrize("name", [None, *_cuda.SETTINGS])
def test_who_says_how_much_memory_jax_takes(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in _cuda.SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")  # for it to be put back
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    if name is not None:
        monkeypatch.setenv(name, "true")
    before = dict(os.environ)
    assert _cuda.disable_preallocation() is (name is None)
    changed = {key: value for key, value in os.environ.items() if before.get(key) != value}
    assert changed == ({} if name else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})


class FakeDevice:
    def __init__(self, **stats: int) -> None:
        self.memory_stats = lambda: stats or None

    def __str__(self) -> str:
        return "cuda:0"


def test_who_started_jax_too_early_is_told() -> None:
    gib = 2**30
    with pytest.warns(UserWarning, match="holds 60 GiB of the memory of cuda:0.*import torch_bridge before"):
        _cuda.warn_if_preallocated(FakeDevice(pool_bytes=60 * gib, bytes_limit=60 * gib, peak_bytes_in_use=gib))
    _cuda.warn_if_preallocated(
        FakeDevice(pool_bytes=40 * gib, bytes_limit=60 * gib, peak_bytes_in_use=30 * gib)
    )  # in use
    _cuda.warn_if_preallocated(FakeDevice(pool_bytes=2**26, bytes_limit=60 * gib, peak_bytes_in_use=2**20))
    _cuda.warn_if_preallocated(FakeDevice())


@pytest.mark.parametrize("invert", [inverse_by_halves, inverse_by_solves])
@pytest.mark.by_default("inverse_by_halves")
def test_inverses_from_triangular_factors(invert: Callable[[jax.Array], jax.Array]) -> None:
    size = 1500  # cut in halves once
    x = np.random.default_rng(0).normal(size=(size, 2 * size)) / size**0.5
    matrix = x @ x.T
    got = jax.jit(invert)(jnp.linalg.cholesky(jnp.asarray(matrix)))
    np.testing.assert_allclose(got, np.linalg.inv(matrix), rtol=1e-9, atol=1e-11)


def problem() -> tuple[Any, Any, Any, Any]:
    """A convolution, an embedding, a scan and a head; a loss of three terms for each example."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    params = {
        "table": jax.random.normal(next(keys), (5, 4)),
        "conv": jax.random.normal(next(keys), (3, 3, 1, 2)),
        "loop": jax.random.normal(next(keys), (2, 8, 8)),
        "scale": jnp.ones(8),
        "head": {"kernel": jax.random.normal(next(keys), (8, 3)), "bias": jnp.zeros(3)},
    }

    def model_fn(params: Any, x: Any) -> jax.Array:
        image, words = x
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(image, params["conv"], (1, 1), "VALID", dimension_numbers=numbers)
        y = y.reshape(y.shape[0], 1, -1) + jnp.concatenate([params["table"][words]] * 2, axis=-1)
        y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y * params["scale"][None, None], params["loop"])
        return y @ params["head"]["kernel"] + params["head"]["bias"][None, None]

    inputs = jax.random.normal(next(keys), (6, 4, 4, 1)), jax.random.randint(next(keys), (6, 3), 0, 5)
    targets = jax.random.randint(next(keys), (6, 3), 0, 3)
    return model_fn, ggn_jax.CrossEntropyLoss(class_axis=-1), params, (inputs, targets)


def step_of(optimizer: Any) -> Callable[[Any, Any, Any], Any]:
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state, key=jax.random.key(1))
        updates, state = optimizer.update(grads, state, params, factors=factors)
        return optax.apply_updates(params, updates), state, value

    return step


@cache
def programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The public functions, each on a small case."""
    model_fn, loss, params, batch = problem()
    key = jax.random.key(2)
    args = params, batch

    def operator(cls: Any, use: Callable[[Any, Any], Any], **options: Any) -> Any:
        return lambda params, batch: use(cls(model_fn, loss, params, batch, **options), params)

    def apply(op: Any, v: Any) -> Any:
        return op.mv(v)

    outputs, targets = jnp.zeros((6, 3)), jnp.zeros(6, jnp.int32)
    ce = ggn_jax.CrossEntropyLoss()
    found: dict[str, Any] = {
        f"vectors {kind}": (
            lambda o, t, kind=kind: ggn_jax.make_batch_grad_output_fn(ce, kind)(o, t, key if kind == "mc" else None),
            (outputs, targets),
        )
        for kind in ("type-2", "mc", "empirical")
    }
    found["loss Hessian"] = lambda o, t: ggn_jax.LossHessian(ce, o, t).mv(o), (outputs, targets)
    for cls in ("GGN", "Hessian", "EF", "GGNDiagonal"):
        found[cls] = operator(getattr(ggn_jax, f"{cls}LinearOperator"), apply), args
    for cls in ("KFAC", "EKFAC"):
        made = getattr(ggn_jax, f"{cls}LinearOperator")
        options = {"fisher_type": "mc", "key": key}
        found[cls] = operator(made, apply, **options), args
        found[f"{cls} inverse"] = operator(made, lambda op, v: op.inverse(1e-2).mv(v), **options), args
        found[f"{cls} logdet"] = operator(made, lambda op, v: op.logdet(1e-2), **options), args
    for options in ({}, {"ekfac": True}, {"damping_method": "exact"}):
        optimizer = ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=batch[0], **options)
        state = jax.eval_shape(optimizer.init, params)
        found[f"step {options}"] = step_of(optimizer), (params, state, batch)
    return found


FIRST = {"vectors type-2", "GGN", "KFAC inverse", "step {}"}


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.sweep)], ids=["first", "others"])
def test_programs_for_cuda(first: bool) -> None:
    """They can be lowered, without a product in full precision, which takes XLA seconds to build for each shape."""
    found = programs()
    for name in FIRST if first else found.keys() - FIRST:
        fn, args = found[name]
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert "HIGHEST" not in text, name
        assert "dot_general" in text or name.startswith(("vectors", "loss Hessian")), name


# With a device.


def slow_zero(matrix: torch.Tensor) -> torch.Tensor:
    """0, after some milliseconds of work on the current stream."""
    x = matrix
    for _ in range(6):
        x = x @ matrix / 100
    return x.sum() * 0


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    return torch.randn(6000, 6000, device="cuda")


def captured(call: Callable[[], Any]) -> None:
    with warnings.catch_warnings(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        warnings.simplefilter("ignore")  # torch's: the graph is empty
        call()


ROWS, CLASSES, REPEATS = 4096, 256, 60


@needs_cuda
class TestMemory:
    """Neither library reuses memory under the other's queued kernels."""

    @pytest.mark.parametrize("how", ["vectors", "gradient", "to_torch"])
    @pytest.mark.parametrize("side", [False, True], ids=["current stream", "side stream"])
    def test_results_that_are_dropped(self, how: str, side: bool, matrix: torch.Tensor) -> None:
        targets = torch.randint(CLASSES, (ROWS,), device="cuda")
        vectors = torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), "empirical")
        fill = jax.jit(lambda value: jnp.full((1, ROWS, CLASSES), value, jnp.float32))

        def make(outputs: torch.Tensor) -> torch.Tensor:
            if how == "to_torch":
                return to_torch(to_jax(outputs))
            if how == "vectors":
                return vectors(outputs, targets)
            outputs = outputs.clone().requires_grad_()
            return torch.autograd.grad((vectors(outputs, targets) ** 2).sum(), outputs)[0]

        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        wrong = 0
        with torch.cuda.stream(stream):
            for _ in range(REPEATS):
                outputs = torch.randn(ROWS, CLASSES, device="cuda")
                torch.cuda.synchronize()
                right = make(outputs).abs().sum().item()
                result = make(outputs)
                late = (result + slow_zero(matrix)).abs().sum()  # queued behind it
                del result
                others = [fill(float(k + 3)) for k in range(4)]
                wrong += abs(late.item() - right) > 1e-3 * abs(right)
                del others
        assert not wrong

    def test_inputs_that_are_overwritten_or_freed(self, matrix: torch.Tensor) -> None:
        for k in range(REPEATS):
            x = torch.full((ROWS, CLASSES), float(k), device="cuda")
            x += slow_zero(matrix)
            array = to_jax(x)
            x.fill_(-1.0)
            del x
            other = torch.full((ROWS, CLASSES), -2.0, device="cuda")
            assert float(jnp.sum(array)) == k * ROWS * CLASSES
            del other

    def run(self, *lines: str) -> str:
        env = {k: v for k, v in os.environ.items() if k not in _cuda.SETTINGS}
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    CALL = (
        "outputs, targets = torch.randn(256, 1000, device='cuda'), torch.randint(1000, (256,), device='cuda')",
        "fn = torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), 'mc')",
        "fn(outputs, targets)",
        "torch.cuda.synchronize()",
    )

    def test_the_first_call_leaves_the_card_to_torch(self) -> None:
        out = self.run(
            "import torch, torch_bridge",
            "torch.zeros(1, device='cuda'); before = torch.cuda.mem_get_info()[0]",
            *self.CALL,
            "print((before - torch.cuda.mem_get_info()[0]) / 2**30)",
        )
        assert float(out.split()[-1]) < 1

    def test_a_jax_that_was_started_before(self) -> None:
        out = self.run(
            "import jax; jax.numpy.zeros(3).block_until_ready()",
            "import torch, torch_bridge",
            *self.CALL,
            "fn(outputs, targets)",
        )
        assert out.count("JAX was started before torch_bridge was imported") == 1


@needs_cuda
class TestStreams:
    """Order, graphs, and no wait for the device."""

    def test_round_trip(self) -> None:
        source = torch.arange(10.0, device="cuda")
        array = to_jax(source)
        assert array.devices().pop().platform == "gpu"
        source.zero_()
        assert torch.equal(to_torch(array), torch.arange(10.0, device="cuda"))

    def test_views(self) -> None:
        x = torch.randn(4, 6, device="cuda", dtype=torch.complex64)
        for view in (x.T, x[:, ::2], x.conj(), x.conj().imag, x[:1].expand(3, 6)):
            np.testing.assert_array_equal(np.asarray(to_jax(view)), view.resolve_conj().resolve_neg().cpu().numpy())

    def test_pending_work_is_waited_for(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            matrix = torch.randn(2000, 2000, device="cuda")
            for _ in range(20):
                matrix = matrix @ matrix / matrix.norm()
            array = to_jax(matrix)
            matrix.zero_()
        torch.cuda.synchronize()
        assert np.any(np.asarray(array))

    @pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
    def test_facade(self, fisher_type: str) -> None:
        outputs, targets = torch.randn(5, 3, device="cuda"), torch.tensor([0, 1, 2, 1, 0], device="cuda")
        loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3], device="cuda"))
        generator = torch.Generator(device="cuda").manual_seed(0)
        vectors = torch_bridge.make_batch_grad_output_fn(loss, fisher_type)(outputs, targets, generator)
        assert vectors.device == outputs.device
        if fisher_type != "mc":
            on_cpu = torch_bridge.make_batch_grad_output_fn(loss.cpu(), fisher_type)(outputs.cpu(), targets.cpu())
            torch.testing.assert_close(vectors.cpu(), on_cpu)
        vectors.mul_(2)

    def test_devices_are_not_mixed(self) -> None:
        fn = torch_bridge.make_grad_output_fn(torch.nn.MSELoss(), "type-2")
        with pytest.raises(ValueError, match="the target is on cpu, but output on cuda:0"):
            fn(torch.zeros(3, device="cuda"), torch.zeros(3))

    def test_captures_are_refused_and_the_process_goes_on(self) -> None:
        fn = torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), "mc")
        outputs, targets = torch.randn(5, 3, device="cuda"), torch.tensor([0, 1, 2, 1, 0], device="cuda")
        array = to_jax(outputs)
        calls = (lambda: fn(outputs, targets), lambda: to_jax(outputs), lambda: to_torch(array))
        for call in calls:
            torch.cuda.manual_seed(0)
            call()
            state = torch.cuda.get_rng_state()
            torch.cuda.manual_seed(0)
            with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
                captured(call)
            call()
            assert torch.equal(torch.cuda.get_rng_state(), state)  # advanced once
        assert torch.randn(3, device="cuda").isfinite().all()

    @pytest.mark.filterwarnings("ignore")  # torch.compile's own
    def test_compiled_for_little_overhead(self) -> None:
        fn = torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), "empirical")
        outputs, targets = torch.randn(5, 3, device="cuda"), torch.tensor([0, 1, 2, 1, 0], device="cuda")

        def around(outputs: torch.Tensor) -> torch.Tensor:
            return (fn(outputs * 2, targets) * 3).sin()

        compiled = torch.compile(around, mode="reduce-overhead")
        for _ in range(4):
            outputs = torch.randn(5, 3, device="cuda")
            torch.testing.assert_close(compiled(outputs), around(outputs))

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")
    def test_nothing_waits_for_the_device(self) -> None:
        outputs, targets = torch.randn(5, 3, device="cuda"), torch.tensor([0, 1, 2, 1, 0], device="cuda")
        fns = [
            torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), kind)
            for kind in ("type-2", "mc", "empirical")
        ]

        def work() -> None:
            for fn in fns:
                fn(outputs, targets)
            x = outputs.clone().requires_grad_()
            fns[0](x, targets).sum().backward()
            to_torch(to_jax(outputs))

        work()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with jax.transfer_guard("disallow"):
                work()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_step_transfers_nothing(self) -> None:
        model_fn, loss, params, batch = problem()
        optimizer = ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=batch[0])
        state, step = optimizer.init(params), jax.jit(step_of(optimizer))
        params, state, _ = step(params, state, batch)
        with jax.transfer_guard("disallow"):
            for _ in range(3):
                params, state, _ = step(params, state, batch)


@needs_cuda
def test_inverses_have_full_precision() -> None:
    """Of single precision, where products have 10 bits."""
    x = np.random.default_rng(0).normal(size=(1200, 2400)) / 1200**0.5
    w = {"kernel": jnp.zeros((1200, 3), jnp.float32)}
    batch = jnp.asarray(x.T, jnp.float32), jnp.zeros((2400, 3), jnp.float32)
    operator = ggn_jax.KFACLinearOperator(
        lambda p, x: x @ p["kernel"], ggn_jax.MSELoss("sum"), w, batch, fisher_type="type-2"
    )
    with jax.default_matmul_precision("highest"):
        vector = {"kernel": jnp.ones((1200, 3), jnp.float32)}
        got = operator.inverse(1e-1, "exact").mv(vector)["kernel"]
    dense = 2 * x @ x.T + 0.1 * np.eye(1200)
    np.testing.assert_allclose(got, np.linalg.solve(dense, np.ones((1200, 3))), rtol=1e-3, atol=1e-4)
