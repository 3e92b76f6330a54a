"""Every example of the docstrings and the README runs, with JAX as users have it: no 64-bit types or strict modes."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import figures_pages
import pytest
from compiling import flags

import ggn_jax

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

# One process for many: what is imported and compiled for one example serves the others.
EXAMPLES = """
import contextlib, doctest, importlib, io, json, pkgutil, sys, traceback
import ggn_jax, torch_bridge

packages = (ggn_jax, torch_bridge)
modules = [m.name for package in packages for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
modules += [package.__name__ for package in packages]
modules.remove("torch_bridge.laplace")  # needs laplace-torch, and has no examples

def docstrings():
    failed = attempted = 0
    for name in modules:
        result = doctest.testmod(importlib.import_module(name))
        failed += result.failed
        attempted += result.attempted
    return failed, attempted

def run(blocks):
    failed = 0
    for line, block in blocks:
        name, namespace = f"the block from line {line}", {"__name__": "__main__"}
        try:
            if block.startswith(">>>"):
                test = doctest.DocTestParser().get_doctest(block, namespace, name, name, line)
                failed += doctest.DocTestRunner().run(test).failed
            else:
                exec(compile(block, name, "exec"), namespace)
        except Exception:
            print(f"{name}:", traceback.format_exc(), block, sep="\\n")
            failed += 1
    return failed, len(blocks)

found = {}
for page, blocks in json.load(sys.stdin).items():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        failed, attempted = run(blocks) if blocks else docstrings()
    found[page] = [failed, attempted, printed.getvalue()]
print(json.dumps(found))
"""


Found = dict[str, tuple[int, int, str]]


def run_examples(pages: dict[str, list[tuple[int, str]]], cwd: Path) -> Found:
    """How many examples of each page fail, of how many, and what they print; a page of none is all docstrings.

    In a fresh interpreter that finds the same package, with warnings as errors.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    env |= {"PYTHONPATH": str(Path(ggn_jax.__path__[0]).parent), "MPLBACKEND": "Agg", "XLA_FLAGS": flags(1)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES],
        input=json.dumps(pages),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def readme() -> str:
    assert README.is_file(), f"{README} is missing"
    return README.read_text(encoding="utf-8")


def blocks_of(text: str) -> list[tuple[int, str]]:
    """The examples of a page, with their lines; "python continued" goes on from the block before."""
    found: list[tuple[int, str]] = []
    for fence in re.finditer(r"^```python( continued)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if fence[1]:
            line, block = found.pop()
            found.append((line, f"{block}\n{fence[2]}"))
        else:
            found.append((text.count("\n", 0, fence.start()) + 2, fence[2]))
    return found


GO_ON = ["preconditioners", "scaling"]  # pages whose blocks go on from each other


def blocks_of_page(path: Path) -> list[tuple[int, str]]:
    blocks = blocks_of(path.read_text(encoding="utf-8"))
    return [(blocks[0][0], "".join(block for _, block in blocks))] if path.stem in GO_ON else blocks


PAGES = [path for path in [README, *sorted((ROOT / "docs").glob("*.md"))] if blocks_of_page(path)]


def test_pages_have_examples() -> None:
    text = readme()
    assert README in PAGES, "README.md has no ```python block"
    assert len(blocks_of(text)) == text.count("```python"), "a block is indented or not closed"
    assert sum(len(blocks_of_page(path)) for path in PAGES) > 20


def check(found: Found) -> None:
    for page, (failed, attempted, printed) in found.items():
        assert attempted, page
        assert not failed, f"{page}: {printed}"


FIRST = ["README", "start"]


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.sweep)], ids=["first", "others"])
def test_examples(first: bool, tmp_path: Path) -> None:
    """Docstrings and what is read first by default, the other pages with `-m sweep`."""
    pages = {page.stem: blocks_of_page(page) for page in PAGES if (page.stem in FIRST) == first}
    check(run_examples({"docstrings": [], **pages} if first else pages, tmp_path))


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^(\w+)$", contents, flags=re.MULTILINE))
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} == listed


def test_executed_pages() -> None:
    """`docs/conf.py` names pages that exist, with a block of code that it makes a cell of."""
    conf = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    (names,) = re.findall(r"^EXECUTED = (\(.*\))$", conf, flags=re.MULTILINE)
    assert set(ast.literal_eval(names)) <= {page.stem for page in PAGES}


def test_tables_of_figures() -> None:
    """Made from JSON, and none is left out."""
    names = []
    for path in figures_pages.PAGES:
        page = path.read_text(encoding="utf-8")
        assert page == figures_pages.written(page), "run python tests/figures_pages.py"
        names += [match[2] for match in figures_pages.BLOCK.finditer(page)]
    assert sorted(names) == sorted(figures_pages.TABLES)


def test_readme_says_how_to_test() -> None:
    """`.ci/run` runs this very command."""
    commands = re.findall(r"^<!-- test-command -->\n+```\w*\n([^\n]+)\n```$", readme(), flags=re.MULTILINE)
    assert len(commands) == 1
    (constraints,) = re.findall(r"-c (\S+)", commands[0])
    assert (ROOT / constraints).is_file()
