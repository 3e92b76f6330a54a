"""The benchmark that builds real models: its models are those of their papers, and it gives all figures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import ggn_jax

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PARAMETERS = {  # as published, or as torchvision, timm and the authors' own programs count them
    "mlp-10": 10 * 32 * 33 + 33 * 10,
    "resnet18": 11_173_962,
    "resnet50": 25_557_032,
    "vit-s16-token": 22_050_664,
    "vit-b16": 86_567_656 - 2 * 768,  # without a class token and its position
    "gpt2-small": 124_439_808,
    "gpt2-scan": 124_439_808,
    "unet": 35_746_307,
}
PROGRAMS = ["gradient", "sgd step", "factors", "one pass", "kfac step"]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import models

    return models


@pytest.fixture
def architectures(program: ModuleType) -> ModuleType:
    import architectures

    return architectures


def run_models(*args: str, tmp_path: Path) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """What the program prints, and its figures."""
    env = {**os.environ, "PYTHONPATH": str(Path(ggn_jax.__path__[0]).parent)}
    command = [sys.executable, str(FOLDER / "models.py"), "--tiny", "--json", str(tmp_path / "found.json"), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=True, timeout=600)
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert set(report) == {"measured", "figures"}
    return done.stdout, report["figures"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_sizes(architectures: ModuleType, name: str) -> None:
    problem = architectures.MODELS[name]()
    shapes = jax.eval_shape(problem.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


def test_equations_are_counted_inside_of_equations(program: ModuleType) -> None:
    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(x) * x, None

    def fn(x: jax.Array) -> jax.Array:
        x = jax.lax.scan(body, x, length=3)[0]
        return jax.lax.cond(x > 0, jnp.cos, lambda x: jnp.exp(x) + x, x)

    # A loop with 2; a comparison, a conversion of it, and a choice of 1 or 2.
    assert program.count_equations(jax.make_jaxpr(fn)(1.0)) == 3 + 2 + 1 + 3


SLOW = {
    "unet",
    "vit-s16",
    "vit-s16-token",
    "vit-b16",
    "resnet18",
    "resnet50",
    "gpt2-small",
    "gpt2-scan",
    "mlp-20",
    "mlp-40",
    "mlp-100",
}
NAMES = "mlp-10 mlp-20 mlp-40 mlp-100 resnet18 resnet50 vit-s16 vit-s16-token vit-b16 gpt2-small gpt2-scan llama unet"


def test_all_models_have_a_tiny_one(architectures: ModuleType) -> None:
    assert list(architectures.MODELS) == list(architectures.TINY) == NAMES.split()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] if name in SLOW else []) for name in NAMES.split()]
)
@pytest.mark.by_default("mlp-10")
def test_layers_explain_the_gradient(program: ModuleType, architectures: ModuleType, name: str) -> None:
    problem = architectures.TINY[name](batch=3)
    inputs, _ = program.random_batch(problem)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params = problem.init(jax.random.key(0))
        outputs = jax.jit(problem.model_fn)(params, inputs)
        report = ggn_jax.report(problem.model_fn, params, inputs)
    assert outputs.dtype == jnp.float64
    assert jnp.isfinite(outputs).all()
    assert 1e-3 < jnp.std(outputs) < 1e3
    assert report.passed
    assert set(report.uncovered) <= {"['token']"}


@pytest.mark.sweep
def test_figures(tmp_path: Path) -> None:
    printed, found = run_models("--model", "mlp-10", "--options", "max_dense_size=4", tmp_path=tmp_path)
    rows = {row["row"]: row for row in found["mlp-10"]}
    assert sorted(rows) == sorted([*PROGRAMS, "model", "process"])
    assert "error" not in str(rows)
    for program in PROGRAMS:
        assert program in printed
        assert all(rows[program][f"{what}_s"] > 0 for what in ("trace", "lower", "compile"))
        assert rows[program]["equations"] >= rows["gradient"]["equations"] > 10
        assert rows[program]["gflop"] >= rows["gradient"]["gflop"] > 0
        assert rows[program]["instructions"] > 10
        assert rows[program]["temporary_mib"] > 0
    model = rows["model"]
    assert model["parameters"] == 2 * 20 + 15
    assert model["state_bytes"] == model["state_entries"] > 2  # averages and inverses, and momentum
    assert model["init_s"] > 0
    assert model["init_shapes_s"] > 0
    assert list(model["reduced"]) == ["a factor of size 5 is more than max_dense_size = 4: 2 blocks on its diagonal"]
    assert model["uncovered"] == {}


@pytest.mark.sweep
def test_a_step_with_values(tmp_path: Path) -> None:
    printed, found = run_models("--run", "--model", "mlp-10", tmp_path=tmp_path)
    (row,) = found["mlp-10"]
    assert row["loss_after"] < row["loss_before"]
    assert row["rejected"] == 0
    assert "one step: loss" in printed


def test_what_fails_says_why(tmp_path: Path) -> None:
    printed, found = run_models("--model", "mlp-10", "--options", "damping=no", tmp_path=tmp_path)
    assert [row["row"] for row in found["mlp-10"]] == ["gradient", "sgd step", "model"]
    assert found["mlp-10"][-1]["error"].startswith("ValueError: damping must be")
    assert "ValueError: damping must be" in printed


@pytest.mark.sweep
def test_the_limit_leaves_the_other_models(tmp_path: Path) -> None:
    _, found = run_models("--model", "mlp-10", "mlp-20", "--limit", "0.01", tmp_path=tmp_path)
    ended = [{"row": "process", "error": "it ended after 0.01 s, the limit"}]
    assert found == {"mlp-10": ended, "mlp-20": ended}


PART = """
import json, sys, time
for row in range(2):
    print(json.dumps({f"row {row}": {"ms": row / 2}}), flush=True)
print('{"half a r', end="", flush=True)
time.sleep(60 if sys.argv[1] == "slow" else 0)
sys.exit(3)
"""


def test_parts_that_are_stopped_keep_what_they_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    (tmp_path / "part.py").write_text(PART, encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "part.py"))
    rows = {"row 0": {"ms": 0.0}, "row 1": {"ms": 0.5}}
    results: dict[str, Any] = {}
    for part, status in (("slow", "stopped after 3 s"), ("fast", "failed: exit status 3")):
        results[part] = gpu.run_part(part, 3, tmp_path / "log.txt")
        assert (results[part]["status"], results[part]["rows"]) == (status, rows)
        gpu.write(tmp_path, results, gpu.show(part, results[part]))
        assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    assert "row 1" in (tmp_path / "results.txt").read_text(encoding="utf-8")


@pytest.mark.sweep
def test_figures_of_a_gpu_without_one(tmp_path: Path) -> None:
    """Each part of `gpu.py` that can say something does, in time or not."""
    command = [
        sys.executable,
        str(FOLDER / "gpu.py"),
        "--quick",
        "--out",
        str(tmp_path),
        "memory",
        "facade",
        "inverse:512",
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(ggn_jax.__path__[0]).parent)}
    subprocess.run(command, check=True, timeout=600, env=env, capture_output=True)
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [found[part]["status"] for part in ("memory", "facade", "inverse:512")] == ["done"] * 3
    assert found["facade"]["rows"]["mc 32 x 10"]["batch"] > 0
    assert found["inverse:512"]["rows"]["heuristic"]["build s"] > 0
