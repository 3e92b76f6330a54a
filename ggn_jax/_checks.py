"""Checks of arguments: each names the argument, what came, what was wanted, and the way out."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ggn_jax._hints import tensor_hint

Shaped = Array | jax.ShapeDtypeStruct  # where only shape and dtype are needed
Examples = Literal["independent", "coupled"]
OUTPUT_DTYPES = ("float16", "bfloat16", "float32", "float64")


def as_array(name: str, value: Any) -> Array:
    """`value` as a JAX array; only arrays and numbers are accepted, so that nothing is converted by surprise."""
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} must be an array of numbers; got a PRNG key.")
        if value.dtype.kind not in "iu" or value.dtype == jax.dtypes.canonicalize_dtype(value.dtype):
            return value
        if not is_concrete(value):
            return value
        value = np.asarray(value)  # 64-bit integers where JAX has none, as torch_bridge.to_jax makes them
    if not isinstance(value, np.ndarray | np.generic | bool | int | float):
        raise TypeError(
            f"{name} must be a JAX or NumPy array, or a number; got {type(value).__name__}.{tensor_hint(value)}"
        )
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        kind = f"dtype {value.dtype}" if isinstance(value, np.ndarray | np.generic) else f"{str(value)[:20]}"
        raise TypeError(f"{name} must be an array of numbers that JAX can hold; got {kind}.") from None
    narrowed = isinstance(value, np.ndarray | np.generic) and array.dtype != value.dtype
    # Integers may be narrowed where they fit; floats would lose digits.
    if narrowed and (array.dtype.kind == "f" or np.any(np.asarray(value).astype(array.dtype) != value)):
        raise TypeError(
            f"{name} has dtype {np.asarray(value).dtype}, which JAX would narrow to {array.dtype}: cast it yourself, or"
            " enable 64-bit types with jax.enable_x64."
        )
    return array


def is_concrete(array: Array) -> bool:
    """Whether the values are known: not under `jit`, `vmap`, `grad`, or for arrays of other processes."""
    try:
        return array.is_fully_addressable
    except jax.errors.ConcretizationTypeError:
        return False


def are_known(tree: PyTree[Any]) -> bool:
    """Whether the values of all JAX arrays in a pytree are known; other leaves do not matter."""
    return all(is_concrete(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def have_values(tree: PyTree[Any]) -> bool:
    """Whether a pytree holds only arrays with known values: no `jax.ShapeDtypeStruct`s, and nothing traced."""
    return are_known(tree) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(tree))


def check_outputs(name: str, outputs: Array | jax.ShapeDtypeStruct) -> None:
    if outputs.dtype.name not in OUTPUT_DTYPES:
        way_out = ""
        if jnp.issubdtype(outputs.dtype, jnp.complexfloating):
            way_out = " Return real and imaginary parts as two outputs, one more axis of [N, ..., 2]."
        raise TypeError(f"{name} must have one of the dtypes {', '.join(OUTPUT_DTYPES)}; got {outputs.dtype}.{way_out}")


def as_outputs(name: str, outputs: Any, batch: bool) -> Array:
    """Outputs of a model as a floating array, with a leading batch axis or not."""
    outputs = as_array(name, outputs)
    check_outputs(name, outputs)
    if batch and outputs.ndim == 0:
        raise ValueError(f"{name} must have a leading batch axis, [N, *out]; got a scalar.")
    return outputs


def check_real(name: str, array: Array) -> None:
    if array.dtype.kind not in "biuf" and array.dtype.name not in OUTPUT_DTYPES:
        raise TypeError(f"{name} must hold real numbers; got dtype {array.dtype}.")


def compute_dtype(dtype: Any) -> Any:
    """The dtype of all internal computations: at least float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def wide_dtype(tree: PyTree[Array]) -> Any:
    """The widest compute dtype of the leaves."""
    dtypes = [compute_dtype(leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return jnp.dtype(jnp.float64) if jnp.dtype(jnp.float64) in dtypes else jnp.dtype(jnp.float32)


def check_weight(name: str, value: Array) -> Array:
    check_real(name, value)
    if is_concrete(value) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) < np.inf)):
        raise ValueError(
            f"{name} must be finite and not negative (a negative weight has no real square root); got {value}."
        )
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


def check_weight_number(name: str, value: Any) -> Array:
    """`check_weight` of one number, perhaps traced."""
    weight = check_weight(name, as_array(name, value))
    if weight.ndim:
        raise ValueError(f"{name} must be a number; got an array of shape {weight.shape}.")
    return weight


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as a Python int, of at least 1 unless stated."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least {least}; got {value!r}.") from None
    if number < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {number}.")
    return number


def is_word(value: Any, word: Any) -> bool:
    """Whether a value is a certain word; an array is none."""
    return isinstance(value, str) and value == word


def check_choice(name: str, value: Any, choices: Sequence[Any], note: str = "") -> None:
    """Refuse what is not one of a few words (or None), arrays among them, of which `in` cannot tell."""
    if not any(value is choice or is_word(value, choice) for choice in choices):
        *most, last = map(repr, choices)
        wanted = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"{name} must be {wanted}; got {value!r}.{note}")


def check_coupled(examples: Any, chunk_size: Any = None) -> bool:
    """Whether `examples` says that they depend on each other; then a batch cannot be cut into chunks."""
    check_choice("examples", examples, get_args(Examples))
    coupled: bool = examples == "coupled"
    if coupled and chunk_size is not None:
        raise ValueError("chunk_size cuts the batch into parts, and examples='coupled' has none: leave chunk_size out.")
    return coupled


def check_sampling(mc_samples: Any, key: Any, *, wanted_by: str) -> tuple[int, Array | None]:
    """`mc_samples`, 0 for none, and the key if one is needed."""
    if isinstance(mc_samples, int | np.integer) and not isinstance(mc_samples, bool) and mc_samples == 0:
        return 0, None  # a key is not needed, and not checked
    mc_samples = check_count("mc_samples", mc_samples)
    return mc_samples, check_key(key, wanted_by=f"{wanted_by} with mc_samples={mc_samples}", batch=True)


def check_key(key: Any, *, wanted_by: str, batch: bool) -> Array:
    """One PRNG key, typed or raw."""
    if key is None:
        raise ValueError(f"{wanted_by} draws random numbers and needs a key: pass key=jax.random.key(seed).")
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(f"key must be a JAX PRNG key, as made by jax.random.key(seed); got {type(key).__name__}.")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed:
        if key.dtype != jnp.uint32:
            raise TypeError(f"key must be a JAX PRNG key, as made by jax.random.key(seed); got dtype {key.dtype}.")
        key = jnp.asarray(key)
        try:
            jax.random.wrap_key_data(key)
        except TypeError:
            raise TypeError(
                f"key must be a JAX PRNG key, as made by jax.random.key(seed); got raw data of shape {key.shape}."
            ) from None
    if key.ndim != (0 if typed else 1):
        way_out = (
            "this function takes one key and draws independently for each example"
            if batch
            else "map over the data: jax.vmap(fn)(outputs, targets, jax.random.split(key, N))"
        )
        raise ValueError(f"key must be one key; got an array of keys of shape {key.shape}: {way_out}.")
    return key


@contextmanager
def errors_prefixed(text: str) -> Iterator[None]:
    """Prefix the messages of errors with `text`, which says what they are about."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if type(error) not in (TypeError, ValueError, NotImplementedError):
            raise  # a subclass, which may take other arguments than a message
        raise type(error)(f"{text}{error}") from error


def is_sum_start(value: Any) -> bool:
    """Whether a value is the 0 that Python's `sum` starts with."""
    return isinstance(value, int) and not isinstance(value, bool) and value == 0
