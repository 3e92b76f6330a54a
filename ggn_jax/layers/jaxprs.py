"""Everything that handles JAX's intermediate representation: the one module to repair when it changes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Literal

# Sets, never one name: JAX has renamed its primitives before.
CUSTOM_JVP = frozenset({"custom_jvp_call"})
INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"}) | CUSTOM_JVP
REMAT = frozenset({"remat", "remat2", "checkpoint"})
SCAN = frozenset({"scan"})
CUSTOM_VJP = frozenset({"custom_vjp_call", "custom_vjp_call_jaxpr"})
BRANCHES = frozenset({"cond"})
NONLINEAR = frozenset(
    {"abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "digamma"}
)
NONLINEAR |= {
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "max",
    "min",
    "pow",
}
NONLINEAR |= {
    "integer_pow",
    "rsqrt",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "random_bits",
    "threefry2x32",
}

Path = tuple[int, ...]
"""Which equation of a jaxpr: its index, after those of the equations (and branches) that it is nested in."""
Location = tuple[str, str]
"""A line of the user's, and a path of modules."""


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a literal, a constant without a variable."""
    return isinstance(atom, Literal)


def is_floating(var: Any) -> bool:
    """Whether a variable has derivatives, by its dtype."""
    return bool(jnp.issubdtype(var.aval.dtype, jnp.inexact))


def has_complex(eqn: Any) -> bool:
    """Whether an equation has complex inputs or results."""
    return any(jnp.issubdtype(var.aval.dtype, jnp.complexfloating) for var in (*eqn.invars, *eqn.outvars))


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr, closed or not, and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def live_equations(jaxpr: Any, outvars: Sequence[Any]) -> list[bool]:
    """For each equation, whether one of these values depends on it."""
    needed = {atom for atom in outvars if not is_literal(atom)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        live.append(any(var in needed for var in eqn.outvars))
        if live[-1]:
            needed.update(atom for atom in eqn.invars if not is_literal(atom))
    return live[::-1]


def varying_axes(jaxpr: Any, atom: Any) -> frozenset[int]:
    """The axes along which the entries of a value may differ, as far as the equation that makes it tells."""
    shape, axes = atom.aval.shape, range(len(atom.aval.shape))
    made = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
    if made is not None and made.primitive.name == "broadcast_in_dim":
        own = dict(zip(made.params["broadcast_dimensions"], made.invars[0].aval.shape, strict=True))
        return frozenset(axis for axis in axes if own.get(axis, 1) > 1)
    return frozenset(axis for axis in axes if shape[axis] > 1)


def inner_jaxpr(eqn: Any) -> Any:
    """The jaxpr that an equation of `INLINED`, `CUSTOM_VJP`, `REMAT` or `SCAN` calls."""
    return next(eqn.params[name] for name in ("call_jaxpr", "fun_jaxpr", "jaxpr") if name in eqn.params)


def called_by(eqn: Any) -> list[Any]:
    """The jaxprs that an equation calls."""
    params = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else (value,))]
    return [opened for opened, _ in map(open_jaxpr, params) if hasattr(opened, "eqns")]


def holds(eqn: Any, names: frozenset[str]) -> bool:
    """Whether an equation, or one inside of it, is of a primitive with one of these names."""
    return eqn.primitive.name in names or any(holds(inner, names) for jaxpr in called_by(eqn) for inner in jaxpr.eqns)


def narrowed_dtypes(jaxpr: Any) -> set[Any]:
    """The dtypes that a jaxpr, or what it calls, rounds wider floating numbers to, and their gradients with them."""
    opened, _ = open_jaxpr(jaxpr)
    found: set[Any] = set()
    for eqn in opened.eqns:
        if eqn.primitive.name == "convert_element_type":
            before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
            if all(jnp.issubdtype(x, jnp.floating) for x in (before, after)) and after.itemsize < before.itemsize:
                found.add(after)
        found = found.union(*map(narrowed_dtypes, called_by(eqn)))
    return found


def nonlinear_functions(jaxpr: Any) -> set[str]:
    """The names of the functions of single entries, and of draws, in a jaxpr and in what it calls.

    Sums, products and what moves entries are left out: which of them there are may depend on sizes.
    """
    eqns = open_jaxpr(jaxpr)[0].eqns
    own = {eqn.primitive.name for eqn in eqns} & NONLINEAR
    return own.union(*(nonlinear_functions(inner) for eqn in eqns for inner in called_by(eqn)))


def is_reverse_only(jaxpr: Any) -> bool:
    """Whether a function has a custom derivative rule for reverse mode only (`jax.custom_vjp`).

    JAX itself says so only when a forward-mode derivative is compiled, too late for a helpful message.
    """
    opened, _ = open_jaxpr(jaxpr)
    return any(holds(eqn, CUSTOM_VJP) for eqn in compress(opened.eqns, live_equations(opened, opened.outvars)))


def source_of(eqn: Any) -> str:
    """The user's line, `file:line:column (function)`."""
    return source_info_util.summarize(eqn.source_info)


def as_written(eqn: Any) -> AbstractContextManager[None]:
    """Inside, what is traced gets the equation's line and module, so that messages point into the user's code."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)


def module_of(eqn: Any) -> str:
    """The path of modules or named scopes, as Flax and `jax.named_scope` write it."""
    return str(eqn.source_info.name_stack)


def location_of(eqn: Any) -> Location:
    """The user's line and module, for messages."""
    return source_of(eqn), module_of(eqn)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of the equation itself, with its custom derivative rules."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # JAX before 0.10 returned the functions to call apart.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


Step = Callable[[Any, Path, list[Any]], list[Any]]


def run_jaxpr(jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], path: Path, step: Step) -> list[Any]:
    """Evaluate a jaxpr, each equation by `step(eqn, path, inputs)`.

    A path is how all of `layers` names an equation: found in one walk over a jaxpr, it is found again in another, which
    opens the same calls or fewer.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else env[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        results = step(eqn, (*path, index), [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def scan_sizes(eqn: Any) -> tuple[int, int]:
    """How many inputs of a loop are constants, and how many are carried; the rest is looped over.

    From the shapes, which are the same under every version of JAX, as the equation's parameters are not: what is
    looped over has one more axis outside.
    """
    inner, _ = open_jaxpr(eqn.params["jaxpr"])
    num_carry = sum(o.aval.shape == i.aval.shape for o, i in zip(eqn.outvars, inner.outvars, strict=True))
    looped = sum(o.aval.shape != i.aval.shape for o, i in zip(eqn.invars, inner.invars, strict=True))
    return len(eqn.invars) - num_carry - looped, num_carry


def run_remat(eqn: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, rematerialised as the equation is."""
    return jax.checkpoint(fn, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*args)


def run_scan(eqn: Any, fn: Callable[..., Any], values: list[Any], extra: Any) -> tuple[list[Any], Any]:
    """The equation's loop, with `fn(inputs, extra) -> (results, more)` for its body.

    `extra` is looped over as well, beside the equation's own arrays. Returns the results, and `more` stacked.
    """
    params = eqn.params
    num_consts, num_carry = scan_sizes(eqn)
    consts, carry, xs = (
        values[:num_consts],
        values[num_consts : num_consts + num_carry],
        values[num_consts + num_carry :],
    )

    def body(carry: list[Any], x: Any) -> Any:
        results, more = fn([*consts, *carry, *x[0]], x[1])
        return results[:num_carry], (results[num_carry:], more)

    carry, (ys, more) = jax.lax.scan(
        body, carry, (xs, extra), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *ys], more


def run_branches(eqn: Any, fn: Callable[[int, Any, list[Any]], Any], values: list[Any]) -> Any:
    """The equation's choice among its branches, each run by `fn(number, jaxpr, inputs)`."""
    numbered = enumerate(eqn.params["branches"])
    branches = [lambda *inputs, i=i, jaxpr=jaxpr: fn(i, jaxpr, list(inputs)) for i, jaxpr in numbered]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return jax.lax.switch(values[0], branches, *values[1:])
    named = {name: branch for names, branch in zip(platforms, branches, strict=True) for name in names or ("default",)}
    return jax.lax.platform_dependent(*values[1:], **named)
