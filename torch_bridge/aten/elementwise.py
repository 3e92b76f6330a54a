"""Arithmetic, comparisons and elementwise functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from torch_bridge.aten.dtypes import as_dtype, as_floating, is_floating, promote, result_dtype, widened
from torch_bridge.aten.registry import aten

FLOATING: dict[str, Callable[[Array], Array]] = {
    "acos": jnp.arccos,
    "acosh": jnp.arccosh,
    "asin": jnp.arcsin,
    "asinh": jnp.arcsinh,
    "atan": jnp.arctan,
    "atanh": jnp.arctanh,
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "digamma": jax.scipy.special.digamma,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "erfinv": lax.erf_inv,
    "i0": jax.scipy.special.i0,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "lgamma": lax.lgamma,
    "log": jnp.log,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lax.rsqrt,
    "sigmoid": jax.nn.sigmoid,
    "sin": jnp.sin,
    "sinc": jnp.sinc,
    "sinh": jnp.sinh,
    "special_entr": jax.scipy.special.entr,
    "special_i0e": jax.scipy.special.i0e,
    "special_i1": jax.scipy.special.i1,
    "special_i1e": jax.scipy.special.i1e,
    "special_log_ndtr": jax.scipy.special.log_ndtr,
    "special_ndtr": jax.scipy.special.ndtr,
    "sqrt": jnp.sqrt,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
}
SAME = {
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctanh": "atanh",
    "special_digamma": "digamma",
    "special_erf": "erf",
    "special_erfc": "erfc",
    "special_erfinv": "erfinv",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_expm1": "expm1",
    "special_gammaln": "lgamma",
    "special_i0": "i0",
    "special_log1p": "log1p",
    "special_psi": "digamma",
    "special_sinc": "sinc",
}
FLOATING |= {name: FLOATING[like] for name, like in SAME.items()}
for _name, _fn in FLOATING.items():
    aten(_name)(widened(_fn))

KEEPING: dict[str, Callable[[Array], Array]] = {
    "abs": jnp.abs,
    "absolute": jnp.abs,
    "bitwise_not": jnp.bitwise_not,
    "ceil": jnp.ceil,
    "deg2rad": lambda x: as_floating(x) * (jnp.pi / 180),
    "fix": jnp.trunc,
    "floor": jnp.floor,
    "frac": lambda x: x - jnp.trunc(x),
    "isfinite": jnp.isfinite,
    "isinf": jnp.isinf,
    "isnan": jnp.isnan,
    "isneginf": jnp.isneginf,
    "isposinf": jnp.isposinf,
    "logical_not": jnp.logical_not,
    "neg": jnp.negative,
    "negative": jnp.negative,
    "positive": lambda x: x,
    "rad2deg": lambda x: as_floating(x) * (180 / jnp.pi),
    "relu": jax.nn.relu,
    "sgn": jnp.sign,
    "sign": lambda x: x if x.dtype == bool else jnp.sign(x),
    "signbit": lambda x: jnp.signbit(x) if is_floating(x.dtype) else x < 0,
    "square": jnp.square,
    "trunc": jnp.trunc,
}
for _name, _fn in KEEPING.items():
    # torch returns integers as they are, where JAX would make them floating.
    rounds = _name in ("ceil", "fix", "floor", "trunc")
    aten(_name)((lambda x, fn=_fn: fn(x) if is_floating(x.dtype) else x) if rounds else _fn)

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": jnp.equal,
    "ge": jnp.greater_equal,
    "gt": jnp.greater,
    "le": jnp.less_equal,
    "lt": jnp.less,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "ne": jnp.not_equal,
    "mul": jnp.multiply,
    "remainder": jnp.remainder,
    "fmod": jnp.fmod,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
    "bitwise_left_shift": jnp.left_shift,
    "bitwise_right_shift": jnp.right_shift,
    "__and__": jnp.bitwise_and,
    "__or__": jnp.bitwise_or,
    "__xor__": jnp.bitwise_xor,
    "gcd": jnp.gcd,
    "lcm": jnp.lcm,
    "fmax": jnp.fmax,
    "fmin": jnp.fmin,
}
ALIASES = {
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "max.other": "maximum",
    "min.other": "minimum",
    "multiply": "mul",
    "not_equal": "ne",
}
for _name, _binary in [*COMPARISONS.items(), *((name, COMPARISONS[like]) for name, like in ALIASES.items())]:
    aten(_name)(lambda x, y, fn=_binary: fn(*promote(x, y)))

LOGICAL: dict[str, Callable[[Array, Array], Array]] = {
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}
for _name, _binary in LOGICAL.items():
    aten(_name)(lambda x, y, fn=_binary: fn(*promote(x, y)))


PAIRS: dict[str, Callable[[Array, Array], Array]] = {
    "arctan2": jnp.arctan2,
    "atan2": jnp.arctan2,
    "hypot": jnp.hypot,
    "logaddexp": jnp.logaddexp,
    "logaddexp2": jnp.logaddexp2,
}
for _name, _binary in PAIRS.items():
    aten(_name)(lambda x, y, fn=_binary: fn(*promote(x, y, floating=True)))


@aten("copysign")
def copysign(x: Array, y: Any) -> Array:
    """Its derivative is that of the absolute value, by the sign of `y`; 0 at 0."""
    x, y = promote(x, y, floating=True)
    return jnp.abs(x) * lax.stop_gradient(jnp.copysign(jnp.ones_like(y), y))


@aten("heaviside")
def heaviside(x: Array, at_zero: Array) -> Array:
    x, at_zero = promote(x, at_zero)
    return lax.stop_gradient(jnp.where(x == 0, at_zero, (x > 0).astype(x.dtype)))


@aten("isclose")
def isclose(x: Array, y: Array, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Array:
    x, y = promote(x, y)
    return jnp.isclose(x, y, rtol, atol, equal_nan)


@aten("add")
def add(x: Any, y: Any, *, alpha: Any = 1) -> Array:
    x, y = promote(x, y)
    if x.dtype == bool:
        return jnp.logical_or(x, y)
    return x + (y if alpha == 1 else y * as_dtype(alpha, y.dtype))


@aten("sub", "subtract")
def sub(x: Any, y: Any, *, alpha: Any = 1) -> Array:
    x, y = promote(x, y)
    return x - (y if alpha == 1 else y * as_dtype(alpha, y.dtype))


@aten("rsub")
def rsub(x: Any, y: Any, alpha: Any = 1) -> Array:
    return sub(y, x, alpha=alpha)


@aten("div", "divide", "true_divide")
def div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Array:
    if rounding_mode == "floor":
        return floor_divide(x, y)
    if rounding_mode == "trunc":
        x, y = promote(x, y)
        return jnp.trunc(x / y) if is_floating(x.dtype) else lax.div(*jnp.broadcast_arrays(x, y))
    x, y = promote(x, y, floating=True)
    return x / y


@aten("floor_divide")
def floor_divide(x: Any, y: Any) -> Array:
    return jnp.floor_divide(*promote(x, y))


@aten("pow")
def power(x: Any, y: Any) -> Array:
    if isinstance(y, int | float) and not isinstance(y, bool):
        x = as_dtype(x, result_dtype(x, y))
        # An integer power is a few products, with exact derivatives of all orders, also at 0.
        if y == int(y) and abs(y) < 100 and (is_floating(x.dtype) or y >= 0):
            return lax.integer_pow(x, int(y))
        return jnp.sqrt(x) if y == 0.5 else x ** as_dtype(y, x.dtype)
    x, y = promote(x, y)
    return x**y


@aten("where")
def where(condition: Array, x: Any, y: Any) -> Array:
    condition, x, y = align_condition(condition, *promote(x, y))
    return jnp.where(condition, x, y)


def align_condition(condition: Array, *arrays: Array) -> list[Array]:
    rank = max(condition.ndim, *(array.ndim for array in arrays))
    return [a.reshape((1,) * (rank - a.ndim) + a.shape) for a in (condition, *arrays)]


@aten("masked_fill")
def masked_fill(x: Array, mask: Array, value: Any) -> Array:
    mask, filled, x = align_condition(mask, as_dtype(value, x.dtype), x)
    return jnp.where(mask, filled, x)


@aten("clamp", "clip")
def clamp(x: Array, min: Any = None, max: Any = None) -> Array:  # the schema's names
    """The derivative at the bounds is that inside of them, as in torch; `jnp.clip` would halve it."""
    x, *bounds = promote(x, *(bound for bound in (min, max) if bound is not None))
    if max is not None:
        upper = bounds.pop()
    if min is not None:
        x = jnp.where(x < bounds[0], bounds[0], x)
    return x if max is None else jnp.where(x > upper, upper, x)


@aten("clamp_min")
def clamp_min(x: Array, bound: Any) -> Array:
    return clamp(x, min=bound)


@aten("clamp_max")
def clamp_max(x: Array, bound: Any) -> Array:
    return clamp(x, max=bound)


@aten("lerp")
def lerp(x: Array, end: Array, weight: Any) -> Array:
    x, end, weight = promote(x, end, as_dtype(weight, x.dtype))
    return x + weight * (end - x)


@aten("addcmul")
def addcmul(x: Array, a: Array, b: Array, *, value: Any = 1) -> Array:
    x, a, b = promote(x, a, b)
    return x + as_dtype(value, x.dtype) * a * b


@aten("addcdiv")
def addcdiv(x: Array, a: Array, b: Array, *, value: Any = 1) -> Array:
    x, a, b = promote(x, a, b, floating=True)
    return x + as_dtype(value, x.dtype) * (a / b)


@aten("round")
def round_(x: Array, *, decimals: int = 0) -> Array:
    """Half to even."""
    return jnp.round(x, decimals) if is_floating(x.dtype) else x


@aten("special_xlog1py")
def xlog1py(x: Any, y: Any) -> Array:
    return jax.scipy.special.xlog1py(*jnp.broadcast_arrays(*promote(x, y, floating=True)))


@aten("xlogy", "special_xlogy")
def xlogy(x: Any, y: Any) -> Array:
    return jax.scipy.special.xlogy(*jnp.broadcast_arrays(*promote(x, y, floating=True)))


@aten("nan_to_num")
def nan_to_num(x: Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Array:
    return jnp.nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


@aten("logit", "special_logit")
@widened
def logit(x: Array, eps: float | None = None) -> Array:
    x = x if eps is None else clamp(x, eps, 1 - eps)
    return jnp.log(x / (1 - x))
