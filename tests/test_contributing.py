"""What CONTRIBUTING says of the modules, and the picture of them, is what there is."""

import re

from test_project import ROOT, modules

MODULES = {
    name.removeprefix("ggn_jax.")
    for name, path in modules().items()
    if name.startswith("ggn_jax.") and path.name != "__init__.py"
}


def named(text: str) -> set[str]:
    """The modules in a list such as `operators.base`, `.problem`, where the package is that of the one before."""
    package, found = "", set()
    for name in re.findall(r"\.?[a-z_]+(?:\.[a-z_]+)?", text):
        if not name.startswith("."):
            package = name.partition(".")[0]
        found.add(package + name if name.startswith(".") else name)
    return found


def test_the_table_has_all_modules() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.split("| layer, from low to high")[1].split("\n\n")[0].splitlines()[2:]
    cells = [row.split("|")[1].replace("`", "").replace(" with ", " ") for row in rows]
    assert {name for cell in cells for name in named(cell)} == MODULES


def test_the_picture_has_no_others() -> None:
    picture = (ROOT / "docs" / "_static" / "architecture.svg").read_text(encoding="utf-8")
    drawn = re.findall(r'<text class="s"[^>]*>([a-z_]+\.[a-z_., ]+)</text>', picture)
    assert drawn
    assert {name for text in drawn for name in named(text)} <= MODULES
