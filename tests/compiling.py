"""How tests compile: most of their time goes into many small functions that run once, so XLA optimises less."""

import jax

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # newer compilers do not know it, and end the process at unknown flags
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


def flags(devices: int) -> str:
    """For `XLA_FLAGS`: quick to compile, and as if there were several devices."""
    return f"--xla_force_host_platform_device_count={devices} {FLAGS}"
