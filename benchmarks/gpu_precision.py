"""What fewer bits in products do to results: relative errors against float64, for `gpu.py`.

`python benchmarks/gpu.py precision` runs it: on a GPU with JAX's default, TensorFloat-32, and with precisions that ask
for more; elsewhere with float32 and with TensorFloat-32 as `tests/cuda_emulation.py` emulates it.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kfac
import numpy as np
import optax

import ggn_jax

DAMPINGS = (1e-1, 1e-3, 1e-5)
PRECISIONS = ("default", "BF16_BF16_F32_X6", "highest")  # the second needs a GPU of compute capability 8.0
LOSS = ggn_jax.CrossEntropyLoss()


def model_fn(params: Any, x: jax.Array) -> jax.Array:
    for p in params[:-1]:
        x = jnp.tanh(kfac.apply(p, x))
    return kfac.apply(params[-1], x)


def problem(width: int, examples: int) -> Any:
    """Three layers of one width, so that there are few shapes to build, and inputs of different sizes; float64."""
    rng = np.random.default_rng(0)
    params = [
        {"kernel": rng.normal(size=(width, width)) / width**0.5, "bias": rng.normal(size=width) / 10} for _ in range(3)
    ]
    inputs = rng.normal(size=(examples, width)) * np.geomspace(1e-2, 3, width)
    return params, (inputs, rng.integers(0, width, examples).astype(np.int32))


def products(params: Any, batch: Any) -> dict[str, Any]:
    gradient = jax.grad(lambda p: LOSS(model_fn(p, batch[0]), batch[1]))(params)
    made = _operators(params, batch)
    return {
        "gradient": gradient,
        "GGN product": ggn_jax.GGNLinearOperator(model_fn, LOSS, params, batch).mv(gradient),
        "KFAC's factors": [(block.a, block.b) for block in made["KFAC"].factors().values() if hasattr(block, "a")],
        **{f"{name} product": operator.mv(gradient) for name, operator in made.items()},
    }


def functions(params: Any, batch: Any) -> dict[str, Any]:
    made, found = _operators(params, batch), {}
    vector = jax.grad(lambda p: LOSS(model_fn(p, batch[0]), batch[1]))(params)
    for damping in DAMPINGS:
        found |= {
            f"KFAC inverse, exact, {damping:g}": made["KFAC"].inverse(damping, "exact").mv(vector),
            f"KFAC inverse, heuristic, {damping:g}": made["KFAC"].inverse(damping, "heuristic").mv(vector),
            f"KFAC inverse root, {damping:g}": made["KFAC"].inverse_sqrt(damping).mv(vector),
            f"KFAC logdet, {damping:g}": made["KFAC"].logdet(damping),
            f"EKFAC inverse, {damping:g}": made["EKFAC"].inverse(damping).mv(vector),
            f"EKFAC logdet, {damping:g}": made["EKFAC"].logdet(damping),
        }
    return found


def _operators(params: Any, batch: Any) -> dict[str, Any]:
    kinds = {"KFAC": ggn_jax.KFACLinearOperator, "EKFAC": ggn_jax.EKFACLinearOperator}
    return {name: kind(model_fn, LOSS, params, batch, fisher_type="empirical") for name, kind in kinds.items()}


def training(rate: Any, wrap: Callable[..., Any], params: Any, batch: Any) -> dict[str, Any]:
    """The loss and the parameters after 60 steps."""
    own = {"damping": 1e-2, "momentum": 0.9} if isinstance(rate, float) else {}
    optimizer = ggn_jax.kfac(model_fn, LOSS, rate, **own, example_inputs=batch[0], fisher_type="empirical")

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads, factors = optimizer.value_and_grad_and_factors(params, batch, state)
        more = {"batch": batch} if optimizer.needs_batch else {}
        updates, state = optimizer.update(grads, state, params, factors=factors, **more)
        return optax.apply_updates(params, updates), state, value

    compiled, state = jax.jit(wrap(step)), optimizer.init(params)
    for _ in range(60):
        params, state, value = compiled(params, state, batch)
    return {"loss after 60 steps": value, "parameters after 60 steps": params}


def stages(wrap: Callable[..., Any], quick: bool) -> dict[str, Callable[..., Any]]:
    steps = {"rate 0.05": 0.05} | ({} if quick else {"default rate": ggn_jax.QuadraticModel()})
    named = {name: partial(training, rate, wrap) for name, rate in steps.items()}
    return {"products": jax.jit(wrap(products)), "functions": jax.jit(wrap(functions)), **named}


def relative_error(got: Any, want: Any) -> float:
    pairs = [(np.asarray(a, float), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True)]
    return float((sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)) ** 0.5)


def variants(on_gpu: bool) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """A name, JAX's precision, and what functions are wrapped in."""
    if on_gpu:
        yield from ((precision, precision, lambda fn: fn) for precision in PRECISIONS)
        return
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from cuda_emulation import as_on_cuda

    yield "float32", "default", lambda fn: fn
    yield "TensorFloat-32, emulated", "default", as_on_cuda


def rows(quick: bool) -> Iterator[tuple[str, dict[str, float | str]]]:
    """Errors by stage and variant, as soon as there are any."""
    given = problem(12, 20) if quick else problem(128, 512)
    cpu, on_gpu = jax.devices("cpu")[0], jax.default_backend() == "gpu"
    with jax.enable_x64(True), jax.default_device(cpu):
        exact = {name: _values(fn(*jax.device_put(given, cpu))) for name, fn in stages(lambda fn: fn, quick).items()}
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype), given)
    for variant, precision, wrap in variants(on_gpu):
        for stage, fn in stages(wrap, quick).items():
            try:
                with jax.default_matmul_precision(precision):
                    got = _values(fn(*narrow))
            except Exception as error:  # such as a precision that this GPU does not have
                yield f"{stage}, {variant}", {"error": str(error).splitlines()[0]}
                continue
            yield f"{stage}, {variant}", {name: relative_error(got[name], exact[stage][name]) for name in got}


def _values(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)
