"""The façade over time: threads, forks, memory, and inputs that change right after the call."""

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import CrossEntropyLoss, MSELoss

import torch_bridge

ROOT = Path(torch_bridge.__path__[0]).parent


def test_results_do_not_depend_on_what_happens_to_inputs_later() -> None:
    fn = torch_bridge.make_batch_grad_output_fn(CrossEntropyLoss(), "empirical")
    clean_outputs, clean_targets = torch.randn(2000, 50), torch.randint(50, (2000,))
    expected = fn(clean_outputs, clean_targets)
    for _ in range(30):
        outputs, targets = clean_outputs.clone(), clean_targets.clone()
        vectors = fn(outputs, targets)
        outputs.fill_(float("nan"))
        targets.zero_()
        assert torch.equal(vectors, expected)


def test_results_are_the_callers_own() -> None:
    """MSE's vectors are constants: none of the calls may see what a caller writes into them."""
    fn = torch_bridge.make_batch_grad_output_fn(MSELoss(), "type-2")
    outputs, targets = torch.zeros(64, 64), torch.zeros(64, 64)
    expected = fn(outputs, targets).clone()
    for _ in range(5):
        vectors = fn(outputs, targets)
        assert torch.equal(vectors, expected)
        vectors.fill_(7)
    assert torch.equal(outputs, targets)


def test_threads() -> None:
    """Four threads, each with a dtype and sizes of its own: 64-bit types are switched on in each thread alone."""
    failures = []

    def work(number: int) -> None:
        try:
            dtype = torch.float64 if number % 2 else torch.float32
            fn = torch_bridge.make_batch_grad_output_fn(CrossEntropyLoss(), "mc", 2)
            outputs, targets = torch.randn(8 + number, 5, dtype=dtype), torch.randint(5, (8 + number,))
            expected = fn(outputs, targets, torch.Generator().manual_seed(number))
            for _ in range(100):
                vectors = fn(outputs, targets, torch.Generator().manual_seed(number))
                assert vectors.dtype == dtype
                assert torch.equal(vectors, expected)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    assert not failures


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


@pytest.mark.sweep
def test_memory_does_not_grow() -> None:
    if not Path("/proc/self/statm").exists():  # pragma: no cover
        return
    outputs, targets = torch.randn(16, 64), torch.randint(64, (16,))
    batched = torch_bridge.make_batch_grad_output_fn(CrossEntropyLoss(torch.rand(64)), "mc", 2)
    mapped = torch.func.vmap(torch_bridge.make_grad_output_fn(CrossEntropyLoss(), "mc"), randomness="different")
    for calls in (500, 3000):  # first what is allocated once
        before = resident()
        for i in range(calls):
            batched(outputs, targets)
            if i % 10 == 0:
                mapped(outputs, targets)
        grown = resident() - before
    # 3,000 results are 25 MB, and as much in inputs.
    assert grown < 4e6


CHILDREN = """
import multiprocessing, os, sys, warnings
import jax, torch, torch_bridge

def vectors():
    fn = torch_bridge.make_grad_output_fn(torch.nn.MSELoss(), "type-2")
    return fn(torch.zeros(2), torch.zeros(2)).sum().item()

def forked():
    pid = os.fork()
    if pid == 0:
        try:
            vectors()
            os._exit(0)
        except RuntimeError as error:
            os._exit(42 if "forked" in str(error) and "spawn" in str(error) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def in_child(queue):
    queue.put(vectors())

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX's own, of forks
    print(forked())
    jax.numpy.ones(3) + 1
    print(forked())
    print(vectors())
    print(forked())
    if "spawn" in sys.argv:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=in_child, args=(queue,))
        child.start()
        print(queue.get(timeout=100))
        child.join(timeout=60)
        raise SystemExit(child.exitcode)
"""


@pytest.mark.parametrize("more", [(), pytest.param(("spawn",), marks=pytest.mark.sweep)], ids=["forked", "spawned"])
def test_forked_children_are_told_and_spawned_ones_work(more: tuple[str, ...], tmp_path: Path) -> None:
    """JAX hangs in a fork of a process that has used it: before that, after JAX was used, and after our own function.

    A script of its own: a spawned child imports the module it comes from, and tests are not a package.
    """
    script = tmp_path / "children.py"
    script.write_text(CHILDREN)
    done = subprocess.run(
        [sys.executable, str(script), *more],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    unused, jax_used, parent, used, *spawned = map(float, done.stdout.split())
    assert (unused, jax_used, used) == (0, 42, 42), done.stderr
    assert abs(parent - 2) < 1e-6
    assert spawned == [parent] * len(more)
