"""JAX does not survive `fork`: its threads do not exist in the child, which would wait for them forever."""

import os

_used_in: int | None = None


def check_not_forked() -> None:
    """Refuse to call JAX in a process forked from one where this package had called it."""
    global _used_in
    if _used_in is None:
        _used_in = os.getpid()
    elif _used_in != os.getpid():
        raise RuntimeError(
            "torch_bridge was used before this process was forked, and JAX would hang here, since its threads do not"
            " outlive a fork: start the process with multiprocessing.get_context('spawn') or 'forkserver' (for a torch"
            " DataLoader: multiprocessing_context='spawn')."
        )
