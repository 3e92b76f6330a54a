"""JAX does not survive `fork`: its threads do not exist in the child, which would wait for them forever."""

import os
from typing import Any

import jax

_used_in: int | None = None


def check_not_forked() -> None:
    """Refuse to call JAX in a process forked from one that had used it since this package was imported."""
    _note_use()
    if _used_in != os.getpid():
        raise RuntimeError(
            "JAX was used before this process was forked, and would hang here, since its threads do not outlive a fork:"
            " start the process with multiprocessing.get_context('spawn') or 'forkserver' (for a torch DataLoader:"
            " multiprocessing_context='spawn')."
        )


def _note_use() -> None:
    global _used_in
    if _used_in is None:
        _used_in = os.getpid()


def _on_event(event: str, duration_secs: float, **kwargs: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _note_use()


# Not only this package may have used JAX.
jax.monitoring.register_event_duration_secs_listener(_on_event)
