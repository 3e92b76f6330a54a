"""Strict JAX: 64-bit types, no implicit promotion, two fake CPU devices, and shapes checked at run time."""

import os

# Most of the time goes into compiling many small functions: let LLVM optimise less.
FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxtyping import install_import_hook

# Shapes and dtypes are checked in all modules but those whose functions check their arguments themselves.
CHECKED = ["_draws", "term_hessian", "terms", "loss", "likelihood", "losses", "models"]
HOOK = install_import_hook([f"ggn_jax.{name}" for name in CHECKED], "beartype.beartype")

import hypothesis

hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("ours")

FORGET_EVERY = 100
finished = 0


def pytest_runtest_teardown() -> None:
    """Free compiled functions now and then: each maps memory, of which a process may have 65,530 pieces on Linux."""
    global finished
    finished += 1
    if finished % FORGET_EVERY == 0:
        jax.clear_caches()
