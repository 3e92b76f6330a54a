#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2024.10"]
# ///
"""The checks of `.ci/run`, one at a time: `nox -s tests`, `nox -l` lists them."""

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True

PINS = (".ci/constraints-3.11.txt",)
NEWEST = (".ci/constraints-latest.txt",)
QUIET = {"OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def install(session: nox.Session, extras: str, pins: tuple[str, ...] = PINS, *more: str) -> None:
    session.install(f".[{extras}]", *more, *(arg for pin in pins for arg in ("-c", pin)))


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    install(session, "test", PINS, "ruff", "mypy")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The README's test command, with the pinned versions; `nox -s tests -- tests/test_losses.py` for a part."""
    install(session, "test")
    session.run("pytest", *session.posargs, env=QUIET)


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """The tests with the newest versions of everything."""
    install(session, "test", NEWEST)
    session.run("pytest", *session.posargs, env=QUIET)


@nox.session(default=False)
def sweep(session: nox.Session) -> None:
    """More combinations of options, and of models."""
    install(session, "test")
    session.run("pytest", "-m", "sweep", *session.posargs, env=QUIET)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """All tests, those of the sweep too, with branch coverage: fails below 95 %."""
    install(session, "test", PINS, "coverage>=7.10", "pytest-cov>=6")
    reports = ["--cov-report=term", "--cov-fail-under=95"]
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        reports.append(f"--cov-report=markdown-append:{summary}")
    session.run("pytest", "-m", "sweep or not sweep", "--cov", *reports, *session.posargs, env=QUIET)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The documentation, in `docs/_build`."""
    install(session, "docs")
    session.run("sphinx-build", "-W", "--keep-going", "docs", "docs/_build")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """The source archive and the wheel, in `dist/`."""
    session.install("build", "twine")
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, sorted(Path("dist").iterdir())))


if __name__ == "__main__":
    nox.main()
