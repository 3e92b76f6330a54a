"""Train a physics-informed network with KFAC, SOAP, Muon, AdamW and SGD: the Poisson equation of `pinn.py`.

    pip install "ggn-jax[examples]"
    python examples/training_pinn.py

The loss is an `Objective`: the equation's residual inside of the unit square, and the error at its edge, in float64.
All points are in each batch. `pinn.py` has the methods that are for such problems.
"""

from functools import partial

import jax
from pinn import network, poisson, value
from training_common import Task, main

import ggn_jax

WIDTHS = [64, 64, 48, 48]


def task() -> Task:
    problem = poisson(2, WIDTHS, (900, 120), jax.random.key(0))
    examples, options = [problem.inside[0], problem.edge[0]], {"fisher_type": "type-2", "tied": "concatenate"}
    return Task(
        problem.title,
        lambda key: network(key, [2, *WIDTHS, 1]),
        problem.objective,
        lambda key: problem.batches,
        jax.jit(lambda params: problem.objective(params, problem.batches)),
        partial(ggn_jax.kfac, problem.objective, example_inputs=examples, **options),
        ggn_jax.find_layers(jax.vmap(value, (None, 0)), problem.params, examples[1], bias="separate"),
        numbers={"grid": [0.01, 0.03, 0.1], "damping": 1e-3, "factor_interval": 5, "inverse_interval": 5},
        quadratic={"grid": [1e-3], "adapted": {"interval": 2, "minimum": 1e-12}, "inverse_interval": 2},
        block=10,
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(__doc__, "training_pinn", [task], steps=300)
