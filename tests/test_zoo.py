"""What each kind of model has of curvature: nothing is refused, and all of it is right."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from oracles import dense_ggn
from zoo import ZOO
from zoo_layers import normal
from zoo_page import PAGE, page, usual_promotion

import ggn_jax

# What is peculiar runs by default; the others, or their layers, have tests of their own.
BY_DEFAULT = ["Dynamics, derivatives and densities", "Control flow and derivatives of one's own"]
ELSEWHERE = {  # where
    "Laplacian by jax.hessian": "test_objective.py",
    "second derivative by jvp of jvp": "test_objective.py",
    "contrastive towers, temperature": "test_coupled.py",
    "complex network": "test_complex.py",
    "lax.cond on data": "test_branches.py",
    "lax.cond on a loop's counter": "test_branches.py",
}
MODELS = {name: make for models in ZOO.values() for name, make in models.items()}
CASES = [
    pytest.param(name, marks=[] if title in BY_DEFAULT and name not in ELSEWHERE else [pytest.mark.sweep])
    for title, models in ZOO.items()
    for name in models
]


@pytest.fixture(autouse=True)
def as_users_have_it() -> Iterator[None]:
    with usual_promotion():
        yield


@pytest.mark.sweep
def test_page() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/zoo_page.py"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.by_default(
    "Fourier neural operator",
    "custom_vjp around a layer",
    "equilibrium, implicit derivative",
)
def test_curvature_is_exact(name: str) -> None:
    """Of one example: the whole block, but for layers with several positions or uses, whose gradient is looked at."""
    model = MODELS[name]()
    report = ggn_jax.report(model.fn, model.params, model.inputs)
    assert report.passed, str(report)
    one = jax.tree.map(lambda x: x[:1], model.inputs)
    batch = one, normal(*jax.eval_shape(model.fn, model.params, one).shape, seed=3)
    args = model.fn, ggn_jax.MSELoss(), model.params, batch
    found, exact = (
        np.asarray(ggn_jax.KFACLinearOperator(*args, fisher_type="type-2").as_matrix()),
        dense_ggn(*args),
    )
    tolerance, start = 1e-12 * np.abs(exact).max(), 0
    for row in report.rows:
        part = slice(start, start := start + int(np.prod(row.shape)))
        block, wanted = found[part, part], exact[part, part]
        if row.curvature == "Kronecker":
            if row.uses > 1 or np.prod(row.positions) > 1:
                continue
            # Groups share nothing.
            np.testing.assert_allclose(np.diag(block), np.diag(wanted), atol=tolerance)
            wanted = np.where(block == 0, 0, wanted)
        elif row.curvature == "diagonal":
            wanted = np.diag(np.diag(wanted))
        np.testing.assert_allclose(block, wanted, atol=tolerance, err_msg=row.parameter)
