"""The environment of a process that a benchmark measures in: how many threads XLA and PyTorch have, and no caches."""

import os


def environment(threads: int) -> dict[str, str]:
    """One thread, or as many as there are cores; on one device, and compiling anew."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    if threads == 1:
        flags += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    ours = {"XLA_FLAGS": flags, "OMP_NUM_THREADS": str(threads), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {**os.environ, **ours}
