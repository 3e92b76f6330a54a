"""Every example of the docstrings and the README runs, with JAX as users have it: no 64-bit types or strict modes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import flags

import ggn_jax

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

DOCTESTS = """
import doctest, importlib, pkgutil, sys
import ggn_jax, torch_bridge

packages = (ggn_jax, torch_bridge)
modules = [m.name for package in packages for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
modules += [package.__name__ for package in packages]
modules.remove("torch_bridge.laplace")  # needs laplace-torch, and has no examples
failed = attempted = 0
for name in modules:
    result = doctest.testmod(importlib.import_module(name))
    failed += result.failed
    attempted += result.attempted
print(f"{len(modules)} modules, {attempted} examples, {failed} failed")
sys.exit(bool(failed or not attempted))
"""

BLOCKS = """
import doctest, json, sys, traceback

failed = 0
for line, block in json.load(sys.stdin):
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
sys.exit(bool(failed))
"""


def run(script: str, cwd: Path, stdin: str | None = None) -> None:
    """Run `script` in a fresh interpreter that finds the same package, with warnings as errors."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    env |= {"PYTHONPATH": str(Path(ggn_jax.__path__[0]).parent), "MPLBACKEND": "Agg", "XLA_FLAGS": flags(1)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        input=stdin or "",
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def readme() -> str:
    assert README.is_file(), f"{README} is missing"
    return README.read_text(encoding="utf-8")


def test_docstrings(tmp_path: Path) -> None:
    run(DOCTESTS, tmp_path)


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


def test_pages(tmp_path: Path) -> None:
    """All others, in one process."""
    pages = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in GO_ON]
    blocks = [block for path in pages for block in blocks_of(path.read_text(encoding="utf-8"))]
    assert len(blocks) > 20
    run(BLOCKS, tmp_path, json.dumps(blocks))


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^(\w+)$", contents, flags=re.MULTILINE))
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} == listed


@pytest.mark.parametrize("page", GO_ON)
def test_pages_whose_blocks_go_on_from_each_other(tmp_path: Path, page: str) -> None:
    blocks = blocks_of((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    run(BLOCKS, tmp_path, json.dumps([(blocks[0][0], "".join(block for _, block in blocks))]))


def test_readme(tmp_path: Path) -> None:
    text = readme()
    blocks = blocks_of(text)
    assert blocks, "README.md has no ```python block"
    assert len(blocks) == text.count("```python"), "a block is indented or not closed"
    run(BLOCKS, tmp_path, json.dumps(blocks))


def test_readme_says_how_to_test() -> None:
    """`.ci/run` runs this very command."""
    commands = re.findall(r"^<!-- test-command -->\n+```\w*\n([^\n]+)\n```$", readme(), flags=re.MULTILINE)
    assert len(commands) == 1
    (constraints,) = re.findall(r"-c (\S+)", commands[0])
    assert (ROOT / constraints).is_file()
