"""The site: Markdown pages, some of which are executed, and one page for each public object, from the docstrings."""

import hashlib
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

DOCS = Path(__file__).resolve().parent
PACKAGES = ("ggn_jax", "torch_bridge")
# The site is of these sources, also where another version is installed; pages are executed by other processes.
sys.path.insert(0, str(DOCS.parent))
os.environ["PYTHONPATH"] = os.pathsep.join([str(DOCS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])

project = "ggn_jax"
author = "The ggn_jax authors"
project_copyright = f"2026, {author}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "myst-nb"}
exclude_patterns = ["_build", "training/*.json", "performance/*.json"]
html_theme = "furo"
html_title = "ggn_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_dark_style = "github-dark"  # furo's underlines imported names, as if they were links
toc_object_entries_show_parents = "hide"  # beside a class, `mv`
python_maximum_signature_line_length = 80  # a longer one has a line for each argument
html_copy_source = False
default_role = "code"  # docstrings are Markdown, where this is a single backtick
myst_heading_anchors = 4
myst_enable_extensions = ["deflist", "fieldlist"]
nitpicky = False  # types of JAX and PyTorch are not looked up: the build needs no network
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures with jaxtyping's shapes are longer than what they say
# What a class has from those of this package is shown with it; what it has from others is theirs to document.
FOREIGN = "object, tuple, str, dict, Enum, BaseException, Module, AbstractLinearOperator, Optimizer"
autodoc_default_options = {"members": True, "inherited-members": FOREIGN, "show-inheritance": True}

COLON = "\N{MODIFIER LETTER COLON}"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Pages whose code is executed when the site is built, and shown with what it prints; an error fails the build.
EXECUTED = ("start", "fishers", "losses", "layers", "preconditioners", "training")
CELL = re.compile(r"^```python( continued)?$", re.MULTILINE)
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_merge_streams = True  # prints of one cell are one block
nb_execution_timeout = 600  # of a cell, on a machine that does other things
nb_output_stderr = "remove"  # of JAX about the accelerators that it does not find; warnings are errors in the tests
nb_ipywidgets_js: dict[str, Any] = {}  # nothing is loaded from elsewhere


def keep_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon, which takes what is before a colon in an attribute's first line for its type."""
    del app, name, obj, options
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(":", COLON)


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are Markdown of few forms: fences, lists, bold words and code."""
    del app, what, name, obj, options

    def block(match: re.Match[str]) -> str:
        body = "".join(f"   {line}\n" for line in match[2].splitlines())
        return f".. code-block:: {match[1] or 'text'}\n\n{body}"

    text = FENCE.sub(block, "\n".join(lines).replace(COLON, ":"))
    text = re.sub(r"^( *)\* ", r"\1- ", text, flags=re.MULTILINE)
    # A list begins after an empty line.
    text = re.sub(r"^((?! *- )\S.*)\n(- )", r"\1\n\n\2", text, flags=re.MULTILINE)
    # A letter after code would be part of it.
    text = re.sub(r"`([^`]+)`(?=(\w?))", lambda m: f"`{m[1]}`" + ("\\ " if m[2] else ""), text)
    lines[:] = text.split("\n")


def short(obj: Any) -> str:
    """The first sentence of a docstring."""
    first = (inspect.getdoc(obj) or "").partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<!\bal)\. ", first, maxsplit=1)[0].rstrip(".")


def page(package: str, name: str, obj: Any) -> str:
    # What both packages have is one object, with one page and one entry in the index.
    if not obj.__module__.startswith(package):
        return f"# {name}\n\nThis is {{py:obj}}`ggn_jax.{name}`.\n"
    kind = "autoclass" if inspect.isclass(obj) else "autofunction"
    return f"# {name}\n\n```{{eval-rst}}\n.. currentmodule:: {package}\n.. {kind}:: {name}\n```\n"


def write_api() -> None:
    """The pages of `docs/api`, anew where they differ."""
    for package in PACKAGES:
        module, folder = importlib.import_module(package), DOCS / "api" / package
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in sorted(module.__all__, key=str.lower):
            obj = getattr(module, name)
            put(folder / f"{name}.md", page(package, name, obj))
            rows.append(f"| [`{name}`]({package}/{name}.md) | {short(obj)} |")
        names = "\n".join(f"{package}/{name}" for name in sorted(module.__all__, key=str.lower))
        text = f"# {package}\n\n| name | what it is |\n|---|---|\n" + "\n".join(rows)
        put(DOCS / "api" / f"{package}.md", f"{text}\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n")


def owner(package: str, name: str) -> str | None:
    """The package whose page `name` has, or None: `package` itself where both have one."""
    for candidate in (package, *PACKAGES):
        module = importlib.import_module(candidate)
        if name in module.__all__:
            return getattr(module, name).__module__.partition(".")[0]
    return None


class LinkNames(SphinxTransform):
    """Code that is a public name, with or without its package, links to the name's page."""

    default_priority = 700

    def apply(self, **kwargs: Any) -> None:
        del kwargs
        here = self.env.docname
        for node in list(self.document.findall(nodes.literal)):
            found = re.fullmatch(r"(?:(\w+)\.)?(\w+)", node.astext())
            if found is None or found[1] not in (None, *PACKAGES):
                continue
            torch = here == "pytorch" or here.startswith("api/torch_bridge")
            package = owner(found[1] or ("torch_bridge" if torch else "ggn_jax"), found[2])
            inside = isinstance(node.parent, (nodes.reference, nodes.title, pending_xref))
            if package is None or inside or here == f"api/{package}/{found[2]}":
                continue
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=f"{package}.{found[2]}", refexplicit=True, refdoc=here
            )
            node.replace_self(link)
            link += node


def as_notebook(app: Any, docname: str, source: list[str]) -> None:
    """The pages that are executed are plain Markdown in the repository; here their blocks become cells."""
    del app
    if docname in EXECUTED:
        head = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n"
        source[0] = head + CELL.sub("```{code-cell} python", source[0])


def cache_outputs(app: Any, config: Any) -> None:
    """Outputs are kept for the same code of a page; they also depend on that of the packages."""
    files = (path for name in PACKAGES for path in sorted((DOCS.parent / name).rglob("*.py")))
    version = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    config.nb_execution_cache_path = str(Path(app.outdir) / ".jupyter_cache" / version)


def put(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app: Any) -> None:
    write_api()
    app.connect("config-inited", cache_outputs, priority=100)
    app.connect("source-read", as_notebook)
    app.add_transform(LinkNames)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)
    app.connect("autodoc-process-docstring", as_rst)
