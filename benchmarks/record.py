"""Figures as JSON, with what they were measured on: what the tables of `docs/performance.md` are made from."""

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = {"jax": "JAX", "torch": "PyTorch", "curvlinops-for-pytorch": "curvlinops"}


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package, name in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(path: Path, figures: Any) -> None:
    """`figures`, the day, the machine and the versions."""
    measured = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})",
        "versions": versions(),
    }
    path.write_text(json.dumps({"measured": measured, "figures": figures}, indent=1) + "\n", encoding="utf-8")
