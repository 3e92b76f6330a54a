"""GPUs, with a device: memory that two allocators share, streams, graphs, and precision.

They run wherever PyTorch and JAX both have one; the mathematics is that of the CPU.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cuda_cases import step_of

import ggn_jax
import torch_bridge
from torch_bridge import _cuda, _op, tensors, to_jax, to_torch


def why_not() -> str:
    """What is missing here for tests of both libraries on one device, if anything is."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "needs a CUDA device, and a PyTorch that uses it"
    try:
        jax.devices("cuda")
    except RuntimeError:
        return f"needs a JAX that uses CUDA: {tensors._way_to_device('cuda')}"
    return ""


needs_cuda = pytest.mark.skipif(bool(why_not()), reason=why_not())
needs_jax_on_a_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU, and a JAX that uses it")


def slow_zero(matrix: torch.Tensor) -> torch.Tensor:
    """0, after some milliseconds of work on the current stream."""
    x = matrix
    for _ in range(6):
        x = x @ matrix / 100
    return x.sum() * 0


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    return torch.randn(4000, 4000, device="cuda")


def captured(call: Callable[[], Any]) -> None:
    with warnings.catch_warnings(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        warnings.simplefilter("ignore")  # torch's: the graph is empty
        call()


ROWS, CLASSES, REPEATS = 4096, 256, 170  # in six cases: a thousand results


@needs_cuda
class TestMemory:
    """Neither library reuses memory under the other's queued kernels."""

    @pytest.mark.parametrize("how", ["vectors", "gradient", "to_torch"])
    @pytest.mark.parametrize("side", [False, True], ids=["current stream", "side stream"])
    def test_results_that_are_dropped(self, how: str, side: bool, matrix: torch.Tensor) -> None:
        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        assert self.wrong_results(how, stream, matrix, REPEATS) == 0

    def test_results_that_are_dropped_by_threads(self, matrix: torch.Tensor) -> None:
        """Each on a stream of its own; streams and devices are those of a thread."""
        torch.cuda.synchronize()

        def work(how: str) -> int:
            return self.wrong_results(how, torch.cuda.Stream(), matrix, 40)

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(work, ["vectors", "gradient", "to_torch"])) == [0, 0, 0]

    @staticmethod
    def wrong_results(how: str, stream: torch.cuda.Stream, matrix: torch.Tensor, repeats: int) -> int:
        """How many are not what they are without other work, if they are dropped before torch has read them."""
        vectors = torch_bridge.make_batch_grad_output_fn(torch.nn.CrossEntropyLoss(), "empirical")
        fill = jax.jit(lambda value: jnp.full((1, ROWS, CLASSES), value, jnp.float32))
        fill(0.0).block_until_ready()
        wrong = 0
        with torch.cuda.stream(stream):
            targets = torch.randint(CLASSES, (ROWS,), device="cuda")

            def make(outputs: torch.Tensor) -> torch.Tensor:
                if how == "to_torch":
                    return to_torch(to_jax(outputs))
                if how == "vectors":
                    return vectors(outputs, targets)
                outputs = outputs.clone().requires_grad_()
                return torch.autograd.grad((vectors(outputs, targets) ** 2).sum(), outputs)[0]

            for _ in range(repeats):
                outputs = torch.randn(ROWS, CLASSES, device="cuda")
                stream.synchronize()
                right = make(outputs).abs().sum().item()
                result = make(outputs)
                late = (result + slow_zero(matrix)).abs().sum()  # queued behind it
                del result
                others = [fill(float(k + 3)) for k in range(4)]
                wrong += not abs(late.item() - right) <= 1e-3 * abs(right)  # NaN is wrong
                del others
        return wrong

    def test_inputs_that_are_overwritten_or_freed(self, matrix: torch.Tensor) -> None:
        for k in range(60):
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
        with pytest.raises(ValueError, match="target is on cpu, but output on cuda:0"):
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
        if not _op.TAGS:  # this PyTorch cannot be told to leave an operator out
            pytest.skip("this PyTorch has no tag for it; a capture is refused")
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

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")
    def test_a_step_of_a_module_waits_for_nothing(self) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)).cuda()
        batch = torch.randn(6, 4, device="cuda"), torch.randint(3, (6,), device="cuda")
        optimizer = torch_bridge.KFAC(module, torch.nn.CrossEntropyLoss(), lr=0.1)
        losses = [optimizer.step(batch) for _ in range(2)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            with jax.transfer_guard("disallow"):
                losses += [optimizer.step(batch) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert losses[-1] < losses[0]

    def test_operators_of_a_module(self) -> None:
        """Those on the device are those on the CPU, at the precision of its products."""
        torch.manual_seed(0)
        module, loss = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)), torch.nn.MSELoss()
        x, y = torch.randn(6, 4), torch.randn(6, 3)
        results = []
        for device in ("cpu", "cuda"):
            args = module.to(device), loss, list(module.parameters()), [(x.to(device), y.to(device))]
            kfac = torch_bridge.KFACLinearOperator(*args, fisher_type="type-2")
            vector = torch.linspace(-1, 1, kfac.shape[0], device=device)
            found = [torch_bridge.GGNLinearOperator(*args) @ vector, kfac @ vector, kfac.inverse(0.1) @ vector]
            assert all(result.device.type == device for result in found)
            results.append([result.detach().cpu() for result in found])
        for on_cpu, on_cuda in zip(*results, strict=True):
            torch.testing.assert_close(on_cuda, on_cpu, rtol=2e-2, atol=2e-3)


def test_a_step_transfers_nothing() -> None:
    """Not from the host either, which is seen without a GPU as well."""
    batch, params = (jnp.ones((4, 2)), jnp.zeros((4, 3))), {"w": jnp.ones((2, 3))}
    optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=batch[0])
    state, step = optimizer.init(params), jax.jit(step_of(optimizer))
    params, state, _ = step(params, state, batch)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            params, state, _ = step(params, state, batch)


@needs_jax_on_a_gpu
@pytest.mark.parametrize("method", ["exact", "heuristic"])
def test_inverses_have_full_precision(method: str) -> None:
    """Of single precision, where products have 11 bits: of given factors, whatever these were rounded to."""
    inverses_at(1200, method, rtol=1e-4)


@pytest.mark.sweep  # the same in double precision: that it is right
@pytest.mark.parametrize("method", ["exact", "heuristic"])
def test_what_is_compared_on_gpus(method: str) -> None:
    with jax.enable_x64(True):
        inverses_at(50, method, rtol=1e-9, dtype=jnp.float64)


def inverses_at(size: int, method: Any, rtol: float, dtype: Any = jnp.float32) -> None:
    x = np.random.default_rng(0).normal(size=(2 * size, size)) / size**0.5
    batch = jnp.asarray(x, dtype), jnp.zeros((2 * size, 1), dtype)
    params = {"kernel": jnp.zeros((size, 1), dtype)}
    operator = ggn_jax.KFACLinearOperator(
        lambda p, x: x @ p["kernel"], ggn_jax.MSELoss(reduction="sum"), params, batch, fisher_type="type-2"
    )
    (block,) = operator.factors().values()
    a, b, eye = np.asarray(block.a[0][0], float), float(block.b[0][0, 0, 0]), np.eye(size)
    ones = {"kernel": jnp.ones((size, 1), dtype)}
    with jax.default_matmul_precision("highest"):
        root = operator.inverse_sqrt(0.1)
        got = operator.inverse(0.1, method).mv(ones), root.mv(root.mv(ones))
    pi = (np.trace(a) / size / b) ** 0.5  # Martens & Grosse 2015, section 6.3
    exact = b * a + 0.1 * eye
    damped = exact if method == "exact" else (b + 0.1**0.5 / pi) * (a + pi * 0.1**0.5 * eye)
    for matrix, found in zip((damped, exact), got, strict=True):
        want = np.linalg.solve(matrix, np.ones((size, 1)))
        assert np.linalg.norm(np.asarray(found["kernel"]) - want) < rtol * np.linalg.norm(want)
    np.testing.assert_allclose(operator.logdet(0.1), np.linalg.slogdet(exact)[1], rtol=rtol)
