"""Strict JAX: 64-bit types, no implicit promotion, two fake CPU devices, and shapes checked at run time."""

import gc
import os
import tempfile
from pathlib import Path

# OpenBLAS is JAX's LAPACK on CPUs, and its threads wait for each other where other processes use the same cores: small
# factorisations take a hundred times longer. It is read when the library is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Several processes share a GPU, if there is one, with each other and with PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from compiling import flags

# XLA reads them when it is first used.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags(2)}"

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Each operation of a program would carry ten lines of Python's stack.
jax.config.update("jax_traceback_in_locations_limit", 0)

# What was forgotten (see below) is loaded again in a tenth of the time that it takes to compile. Each process has a
# folder of its own: JAX does not write files at one stroke, so that others might read the half of one.
CACHE = tempfile.TemporaryDirectory(prefix="ggn-jax-tests-")
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", CACHE.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

from jaxtyping import install_import_hook

# Shapes and dtypes are checked in all modules but those whose functions check their arguments themselves.
CHECKED = ["_draws", "term_hessian", "terms", "loss", "likelihood", "cross_entropy", "losses", "models"]
HOOK = install_import_hook([f"ggn_jax.{name}" for name in CHECKED], "beartype.beartype")

import hypothesis
import pytest

hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("ours")


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`@pytest.mark.by_default("id", ...)`: the test's other parameters run with `-m sweep` only."""
    missing = set()
    for item in items:
        for mark in item.iter_markers("by_default"):
            missing |= {(item.nodeid.split("[")[0], name) for name in mark.args}
            if item.callspec.id not in mark.args:
                item.add_marker("sweep")
    missing -= {(item.nodeid.split("[")[0], item.callspec.id) for item in items if hasattr(item, "callspec")}
    if missing and not any("::" in arg for arg in config.args):
        raise pytest.UsageError(f"by_default names parameters that do not exist: {sorted(missing)}")


def pytest_collection_finish() -> None:
    """Tracing makes many small objects: what is imported is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


LOOK_EVERY, MOST = 20, 30_000
finished = 0


def pytest_runtest_teardown() -> None:
    """Free compiled functions now and then: each maps memory, of which a process may have 65,530 pieces on Linux."""
    global finished
    finished += 1
    if finished % LOOK_EVERY == 0 and pieces_of_memory() > MOST:
        jax.clear_caches()


def pieces_of_memory() -> int:
    """How many this process has mapped; without a count of them, too many."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else MOST + 1


def pytest_unconfigure() -> None:
    CACHE.cleanup()
