"""Programs with CUDA's rounding, on a CPU: products of float32 in TensorFloat-32, and the branches for CUDA.

It is the rounding of what goes into a product that is emulated; sums are those of the CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ggn_jax.layers.jaxprs import CUSTOM_VJP, INLINED, REMAT, bind, inner_jaxpr, open_jaxpr, scan_sizes

PRODUCTS = {"dot_general", "conv_general_dilated"}
LAPACK = ("cholesky", "eigh", "triangular_solve")


def as_on_cuda(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with default products of float32 rounded to TensorFloat-32; `precision="highest"` is not."""

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _call(closed)(*jax.tree.leaves(args)))

    return run


def _call(jaxpr: Any) -> Callable[..., list[Any]]:
    opened, consts = open_jaxpr(jaxpr)

    def call(*values: Any) -> list[Any]:
        env = dict(zip((*opened.constvars, *opened.invars), (*consts, *values), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for eqn in opened.eqns:
            env.update(zip(eqn.outvars, _run(eqn, list(map(read, eqn.invars))), strict=True))
        return list(map(read, opened.outvars))

    return call


def _run(eqn: Any, values: list[Any]) -> Any:
    name, params = eqn.primitive.name, eqn.params
    if name in PRODUCTS and params["precision"] in (None, (jax.lax.Precision.DEFAULT,) * 2):
        return bind(eqn, [jax.lax.reduce_precision(x, 8, 10) if x.dtype == jnp.float32 else x for x in values])
    if name == "cond":
        branches = [_call(branch) for branch in params["branches"]]
        if params.get("branches_platforms") is not None:
            return branches[_branch(params)](*values[1:])
        return jax.lax.switch(values[0], branches, *values[1:])
    if name == "scan":
        return _scan(eqn, values)
    if name == "while":
        in_condition = params["cond_nconsts"]
        start = in_condition + params["body_nconsts"]
        condition, body = _call(params["cond_jaxpr"]), _call(params["body_jaxpr"])
        return jax.lax.while_loop(
            lambda carry: condition(*values[:in_condition], *carry)[0],
            lambda carry: body(*values[in_condition:start], *carry),
            values[start:],
        )
    if name in INLINED | CUSTOM_VJP | REMAT:
        return _call(inner_jaxpr(eqn))(*values)
    if name == "custom_vmap_call":
        return _call(params["call"])(*values)
    return bind(eqn, values)


def _branch(params: Any) -> int:
    """CUDA's, but for batches of LAPACK's calls, which can deadlock on CPUs."""
    platforms = [names or ("default",) for names in params["branches_platforms"]]

    def of(wanted: str) -> int:
        return next(i for name in (wanted, "default") for i, names in enumerate(platforms) if name in names)

    factorises = any(f"{name}[" in str(params["branches"][of("cuda")]) for name in LAPACK)
    return of("cpu" if factorises and any("cpu" in names for names in platforms) else "cuda")


def _scan(eqn: Any, values: list[Any]) -> list[Any]:
    params, (constants, num_carry) = eqn.params, scan_sizes(eqn)
    carried, body = constants + num_carry, _call(params["jaxpr"])

    def step(carry: Any, x: Any) -> Any:
        results = body(*values[:constants], *carry, *x)
        return results[:num_carry], results[num_carry:]

    carry, ys = jax.lax.scan(
        step, values[constants:carried], values[carried:], length=params["length"], reverse=params["reverse"]
    )
    return [*carry, *ys]
