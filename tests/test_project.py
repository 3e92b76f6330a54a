"""Rules of the project: the direction of imports, public interfaces only, documented names, a light import."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ggn_jax
import torch_bridge

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {package.__name__: Path(package.__path__[0]) for package in (ggn_jax, torch_bridge)}

# From low to high: a module imports from lower layers only, and all modules are here.
GGN_JAX = [
    {"_hints", "_keywords", "_repr", "_version"},
    {"fisher_type", "_checks", "_draws", "_frozen", "_fusion", "_outputs", "_precision", "_sharding", "_unbatched"}
    | {"_weights"},
    {"_eager", "_model", "_sums", "term_hessian"},
    {
        "layers.dot",
        "layers.index_map",
        "layers.jaxprs",
        "layers.noise",
        "layers.pooling",
        "layers.ragged",
        "layers.table",
        "layers.taps",
        "terms",
    },
    {"layers.convolution", "layers.uses", "layers.weights", "loss"},
    {"layers.products", "layers.rules"},
    {"layers.custom_rules"},
    {"layers.distribute"},
    {"layers.run", "layers.labels", "cross_entropy", "joint", "losses", "likelihood"},
    {"layers.findings"},
    {"layers.analysis"},
    {"layers.trace"},
    {"layers.provenance", "layers.capture", "layers.plan", "_supported"},
    {"layers.check"},
    {"layers.report"},
    {"layers"},
    {"grad_output", "loss_check", "loss_hessian", "models"},
    {"operators.errors", "operators.flat", "operators.loaders"},
    {"operators.damping", "operators.examples"},
    {"objective", "operators.base", "operators.problem"},
    {"operators.jacobian", "operators.rectangular", "operators.weighted"},
    {"operators.batches"},
    {"operators.partial"},
    {"operators.ordered_passes", "operators.unordered_passes"},
    {"operators.passes"},
    {"operators.outputs"},
    {"operators.ggn", "operators.ef", "operators.hessian"},
    {"kronecker.inverse"},
    {"kronecker.linalg"},
    {"kronecker", "kronecker.algebra", "kronecker.outer_products", "kronecker.chunked", "kronecker.vectors"},
    {"kronecker.functions", "kronecker.pairs", "kronecker.refine"},
    {"kronecker.split", "kronecker.sums"},
    {"kronecker.convolution", "kronecker.options", "kronecker.stacks"},
    {"kronecker.layout"},
    {"kronecker.checks"},
    {"kronecker.head", "kronecker.inputs", "kronecker.masks"},
    {"kronecker.unnormalised", "kronecker.use_factors"},
    {"kronecker.factors"},
    {"layerwise", "layerwise.found"},
    {"layerwise.io", "layerwise.matrices"},
    {"layerwise.run"},
    {"layerwise.dots"},
    {"layerwise.space"},
    {"layerwise.batches"},
    {"layerwise.gram"},
    {"kronecker.joined"},
    {"kronecker.optimal", "kronecker.diagonal"},
    {"operators.block_functions", "operators.entrywise", "operators.squares"},
    {"operators.block_damping"},
    {"operators.blocks"},
    {"layerwise.given", "operators.averages", "operators.diagonal", "operators.nearest", "operators.solver"},
    {"operators.compiled"},
    {"operators.factored"},
    {"operators.kronecker"},
    {"operators"},
    {"optimizer.numbers", "optimizer.spread", "optimizer.storage"},
    {"optimizer.checks"},
    {"optimizer.masked", "optimizer.rules"},
    {"optimizer.defaults"},
    {"optimizer.settings"},
    {"optimizer.by_layer", "optimizer.inverse_updates"},
    {"optimizer.curvature", "optimizer.quadratic"},
    {"optimizer.states"},
    {"optimizer.core", "optimizer.step", "optimizer.summary"},
    {"optimizer.advice"},
    {"optimizer.diagnosis"},
    {"optimizer.methods", "optimizer.objectives"},
    {"optimizer.transformation"},
    {"optimizer.multi_steps"},
    {"optimizer"},
    {""},
]
TORCH_BRIDGE = [
    {"_cuda", "_fork", "errors", "param_groups", "unsupported"},
    {"tensors", "generators"},
    {"batches", "losses"},
    {"_compute"},
    {"_op"},
    {"grad_output"},
    {"aten.dtypes", "aten.registry"},
    {"aten.dropout"},
    {"aten.activations", "aten.attention", "aten.elementwise", "aten.factories", "aten.fourier", "aten.indexing"},
    {"aten.linear", "aten.norms", "aten.reductions", "aten.shapes"},
    {"aten.linalg", "aten.metric", "aten.pooling", "aten.recurrent"},
    {"aten.losses"},
    {"aten"},
    {"_check_export", "_check_module"},
    {"_export"},
    {"_graph_text", "_interpret"},
    {"modules"},
    {"converted"},
    {"problem"},
    {"operators"},
    {"states"},
    {"structured"},
    {"trained"},
    {"laplace", "optimizer"},
    {""},
]
OPTIONS = {*ggn_jax.KFACOptions.__annotations__}
LAYERS = {"ggn_jax": GGN_JAX, "torch_bridge": TORCH_BRIDGE}
LEVEL = {
    f"{package}.{name}".removesuffix("."): level
    for package, layers in LAYERS.items()
    for level, names in enumerate(layers)
    for name in names
}
LIBRARIES = {
    "ggn_jax": {"jax", "numpy", "scipy", "equinox", "lineax", "jaxtyping", "optax"},
    "torch_bridge": {"jax", "numpy", "torch", "scipy"},
}
# Nothing below these (parts, so that this file does not name them).
PRIVATE = [("jax", "core"), ("jax", "interpreters"), ("jaxlib",), ("equinox", "internal"), ("torch", "_functorch")]
WITHOUT_EXAMPLE = {"Loss"}  # abstract
# Functions make these, and their fields have docstrings; or they are names of options or vectors.
WITHOUT_ARGUMENTS = {
    *("BatchesGramLinearOperator", "BatchesJacobianLinearOperator", "BatchesLinearOperator", "BlockDiagnosis"),
    *("BlockLinearOperator", "Curvature", "CurvatureReport", "CurvatureRow", "Diagnosis", "Factors", "FisherType"),
    *(
        "JacobianTransposeLinearOperator",
        "KFACOptions",
        "KFACState",
        "KFACTransformation",
        "KroneckerOptions",
    ),
    *("LayerIO", "LayerInfo", "Layers", "LayersIO", "ModelFn", "MultiStepsState", "PartialSums", "Report", "ReportRow"),
    *("ScaleByKFACState", "ScaleByLayersState", "StackedJacobianLinearOperator", "StepStatistics"),
    *("UncoveredParametersWarning", "UseIO", "WeightedSumLinearOperator"),
}


def modules() -> dict[str, Path]:
    """All modules of the packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def sources() -> list[Path]:
    """All Python files of the project."""
    rest = [path for folder in ("tests", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*modules().values(), *rest]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(the module, what is taken from it or "", the name it is bound to) of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            for alias in node.names:
                yield node.module or "", alias.name, alias.asname or alias.name


class WithoutFunctions(ast.NodeTransformer):
    """What is left runs when the module is imported."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None


def uses(tree: ast.AST) -> set[str]:
    """The dotted names of everything that is imported, and of all attributes looked up on it."""
    names, bound = set(), {}
    for module, taken, name in imports(tree):
        full = f"{module}.{taken}" if taken else module
        names.add(full)
        bound[name] = full if taken or name not in full.split(".")[:1] else name
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in bound:
            names.add(".".join([bound[node.id], *reversed(parts)]))
    return names


def is_private(name: str) -> bool:
    """Whether a dotted name is not of another project's public interface."""
    parts = name.split(".")
    if parts[0] in PACKAGES:
        return False
    hidden = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return hidden or any(tuple(parts[: len(start)]) == start for start in PRIVATE)


def test_layers_are_the_modules() -> None:
    assert set(LEVEL) == set(modules())
    assert sum(len(names) for layers in LAYERS.values() for names in layers) == len(LEVEL)


@pytest.mark.parametrize("name", modules())
def test_imports(name: str) -> None:
    package = name.partition(".")[0]
    tree = parse(modules()[name])
    at_import = {module for module, _, _ in imports(WithoutFunctions().visit(parse(modules()[name])))}
    for module in {module for module, _, _ in imports(tree)}:
        top = module.partition(".")[0]
        if top == package:
            assert LEVEL[module] < LEVEL[name], f"{name} imports {module}"
            assert name != "ggn_jax.models" or module == "ggn_jax._frozen", "models is separate from the rest"
        elif top == "ggn_jax":
            assert module == "ggn_jax", "the bridge uses the public face only"
        elif top == "flax":
            assert name == "ggn_jax.models"
            assert module not in at_import
        elif top == "laplace":
            assert name == "torch_bridge.laplace", "for those who have laplace-torch"
        elif top == "tqdm":
            assert module not in at_import, "a progress bar is an extra"
        else:
            assert top in LIBRARIES[package] | sys.stdlib_module_names, module


@pytest.mark.parametrize("path", sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_public_interfaces_only(path: Path) -> None:
    assert not [name for name in uses(parse(path)) if is_private(name)]


def test_the_search_for_private_names_finds_them() -> None:
    code = """
import jax, lineax as lx
import jax._src.core
import equinox.internal as eqxi
import torch._functorch.apis
from jax import core
from jax.interpreters import ad
def f(x):
    return jax.core.Tracer, lx._solve.x, jax.numpy.sum, x._ours, lx.CG.__init__, jax.extend.core.Literal
"""
    assert {name for name in uses(ast.parse(code)) if is_private(name)} == {
        "jax._src.core",
        "equinox.internal",
        "torch._functorch.apis",
        "jax.core",
        "jax.core.Tracer",
        "jax.interpreters.ad",
        "lineax._solve",
        "lineax._solve.x",
    }


# JAX's memory is set once, as it starts, and by nothing else than the environment.
# torch.export warns of torch's own modules.
ALLOWED = {
    "ggn_jax.kronecker.layout": {"warnings.warn"},
    "torch_bridge._cuda": {"os.environ", "warnings.warn"},
    "torch_bridge._export": {"warnings.catch_warnings", "warnings.simplefilter"},
    "torch_bridge._check_module": {"warnings.catch_warnings", "warnings.simplefilter"},
}


@pytest.mark.parametrize("name", modules())
def test_no_global_switches(name: str) -> None:
    for used in set(uses(parse(modules()[name]))) - ALLOWED.get(name, set()):
        assert not used.startswith(("jax.config", "os.environ", "warnings.")), used


@pytest.mark.parametrize("package", [ggn_jax, torch_bridge])
def test_all(package: ModuleType) -> None:
    public = {name for name, value in vars(package).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert set(package.__all__) == public
    assert package.__all__ == sorted(package.__all__)


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in (ggn_jax, torch_bridge) for name in package.__all__]
)
def test_documented(package: ModuleType, name: str) -> None:
    value = getattr(package, name)
    doc = value.__doc__ or ""
    assert len(doc) > 40
    assert not doc.startswith(f"{name}("), "a dataclass's own"
    if name in WITHOUT_EXAMPLE:
        assert inspect.isabstract(value)
    else:
        assert re.search(r"^ *Example:\n(.|\n)* >>> ", doc, flags=re.MULTILINE)
    for member, of in members(name, value):
        check_sections(member, of)


def members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A public object, and of a class its public methods and properties."""
    yield name, value
    for attribute in dir(value) if inspect.isclass(value) else ():
        member = getattr(value, attribute)
        function = member.fget if isinstance(member, property) else member
        ours = str(getattr(function, "__module__", "")).partition(".")[0] in PACKAGES
        if not attribute.startswith("_") and ours and inspect.isroutine(function) and function.__name__[0] != "_":
            yield f"{name}.{attribute}", member


def check_sections(name: str, value: Any) -> None:
    """A summary, and sections as Google's style has them, which name every parameter."""
    doc = f"{inspect.getdoc(value)}\n"
    assert re.match(r"[^\n]+\.\n(\n|$)", doc), f"{name}: a summary of one line"
    assert not re.search(r"^\*\*(Arguments|Calling|Raises|Returns)", doc, flags=re.MULTILINE), name
    sections = dict(re.findall(r"^(\w+):\n((?:    .*\n|\n)+)", doc, flags=re.MULTILINE))
    first = sections.get("Returns", "").partition("\n")[0]
    assert ":" not in first, f"{name}: napoleon takes what is before the colon for a type"
    if isinstance(value, property) or name in WITHOUT_ARGUMENTS:
        return
    arguments = sections.get("Args", "") + sections.get("Attributes", "")
    named = set(re.findall(r"^    \*{0,2}(\w+):", arguments, flags=re.MULTILINE))
    if "options" in named:  # those of a typed dict are named in one entry
        named |= set(re.findall(r"`(\w+)`", arguments)) & OPTIONS
    assert set(inspect.signature(value).parameters) - named <= {"self"}, name


def test_import_is_light(tmp_path: Path) -> None:
    code = """
import sys, jax
import ggn_jax
print(*sorted({"torch", "flax", "sklearn", "matfree", "matplotlib", "beartype"} & set(sys.modules)))
"""
    env = {**os.environ, "PYTHONPATH": str(PACKAGES["ggn_jax"].parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=True, timeout=300
    )
    assert not done.stdout.split()


@pytest.mark.parametrize("folder", PACKAGES.values(), ids=PACKAGES)
def test_typed(folder: Path) -> None:
    assert (folder / "py.typed").is_file()


@pytest.mark.parametrize("folder", ["ggn_jax", "torch_bridge", "tests", "examples", "benchmarks"])
def test_files_are_small(folder: str) -> None:
    """One idea each."""
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {name: number for name, number in lines.items() if number > 400} == {}


@pytest.mark.skipif(not (ROOT / ".ci" / "run").exists(), reason="a source archive has no .ci")
def test_the_second_leg_has_the_tests_that_it_names() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    listed = [name for names in ("tests", "swept") for name in script.split(f"{names}=(")[1].split(")")[0].split()]
    for name, _, function in (entry.partition("::") for entry in listed):
        text = (ROOT / "tests" / f"test_{name}.py").read_text()
        assert not function or f"def {function}(" in text, function


@pytest.mark.skipif("GGN_JAX_TEST_INSTALLED" not in os.environ, reason="asks for the installed package, as CI does")
def test_the_installed_package_is_tested() -> None:
    assert all("site-packages" in folder.parts for folder in PACKAGES.values())
