"""The page of first mistakes, made from their registry: `python tests/errors_page.py` writes it."""

from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
HEAD = """# First mistakes

Mistakes that are easy to make in the first hour, and what the error says. Each row is a test. An error names the
argument, what was passed, what is expected, and how to fix it; the table quotes its key words.

"""


def table(cases: dict[str, tuple[Any, type[Exception], tuple[str, ...]]]) -> str:
    """A row for each case: its name, and the words of its error."""
    rows = [f"| {name} | {', '.join(f'`{word}`' for word in words)} |" for name, (_, _, words) in cases.items()]
    return "\n".join(["| mistake | words of the error |", "|---|---|", *rows]) + "\n"


def page() -> str:
    from test_first_mistakes import EVERYWHERE, MORE, WITH_TARGETS

    parts = [
        ("## Model, parameters and inputs", EVERYWHERE),
        ("## Losses and targets", WITH_TARGETS),
        ("## Batches, states, single examples and operators", MORE),
    ]
    return HEAD + "\n".join(f"{title}\n\n{table(cases)}" for title, cases in parts)


if __name__ == "__main__":
    import conftest  # noqa: F401  # the strict modes of the tests

    PAGE.write_text(page(), encoding="utf-8")
