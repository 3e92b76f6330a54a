"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version


def find_version() -> str:
    """As in `pyproject.toml`; "0+unknown" where the package runs from its source alone."""
    try:
        return version("ggn-jax")
    except PackageNotFoundError:
        return "0+unknown"
