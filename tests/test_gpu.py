"""GPUs, with a device: memory that two allocators share, streams, graphs, and precision.

They run wherever PyTorch and JAX both have one; the mathematics is that of the CPU.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cuda_cases import problem, step_of

import ggn_jax
import torch_bridge
from torch_bridge import _cuda, to_jax, to_torch

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and a PyTorch and a JAX that use it"
)


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
