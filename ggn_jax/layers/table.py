"""Tables of text."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table: columns as wide as their longest cell, two spaces apart, with a rule below the head."""
    cells = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width for width in widths]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (head, rule, *cells[1:])]


def dimensions(shape: Sequence[int]) -> str:
    """A shape as a cell: `3 x 4`, and `()` for a scalar."""
    return " x ".join(map(str, shape)) or "()"
