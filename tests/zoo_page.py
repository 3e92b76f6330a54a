"""The page of architectures, made from their registry: `python tests/zoo_page.py` writes it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

import ggn_jax

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
HEAD = """# Which models are covered

Any function of parameters and inputs: what has no Kronecker form has the exact block of the GGN, or its exact diagonal
(above `max_small_size`, with one warning), so that nothing is wrong, and nothing is refused unless
`on_uncovered="error"` asks for it. This page says which is which for the kinds of models that people write. Each row is
a test, of a model of a few lines in `tests/zoo_*.py`, which has the parameters that are named here; its blocks are
compared with dense `J^T H J`. [How layers are found](layers.md) has the rules: a bias is its layer's where it is added
to the output of each of its uses, and to nothing else, as that of an LSTM's one product is; else it is a shift, with
its exact block.

*Kronecker* are the weights of layers and their biases; *scales and shifts* have their exact block, or a diagonal where
that would be large; what has *no Kronecker form* has the same, by automatic differentiation of each example. What no
output depends on is left out.

"""


@contextmanager
def usual_promotion() -> Iterator[None]:
    """What users have; the models are written as they write them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def static_report(model: Any) -> Any:
    """Of shapes alone: nothing is compiled."""
    return ggn_jax.report(model.fn, *jax.eval_shape(lambda *args: args, model.params, model.inputs))


def columns(rows: Any) -> list[str]:
    """Whether all or some have a Kronecker form; the names of the scales and shifts, and of the rest."""

    def names(wanted: Any) -> str:
        found = [re.findall(r"\['([^]]+)'\]|\.(\w+)|\[(\d+)\]", row.parameter) for row in rows if wanted(row)]
        return ", ".join(f"`{'.'.join(''.join(part) for part in parts)}`" for parts in found)

    rows = [row for row in rows if row.kind != "unused"]
    kronecker = [row.curvature == "Kronecker" for row in rows]
    return [
        "all" if all(kronecker) else "all others" if any(kronecker) else "",
        names(lambda row: row.kind in ("scale", "shift")),
        names(lambda row: row.kind == "uncovered"),
    ]


def line(cells: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def table(models: dict[str, Any]) -> str:
    heads = [line(["model", "Kronecker", "scales and shifts", "no Kronecker form"]), "|---|---|---|---|"]
    rows = [line([name, *columns(static_report(make()).rows)]) for name, make in models.items()]
    return "\n".join([*heads, *rows]) + "\n"


def page() -> str:
    from zoo import ZOO

    with usual_promotion():
        return HEAD + "\n".join(f"## {title}\n\n{table(models)}" for title, models in ZOO.items())


if __name__ == "__main__":
    import conftest  # noqa: F401  # the strict modes of the tests

    PAGE.write_text(page(), encoding="utf-8")
