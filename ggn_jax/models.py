"""`(model_fn, params)` from the modules of Flax, Equinox and Haiku; the only place that knows these libraries."""

import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from ggn_jax._frozen import Frozen


class ModelFn(eqx.Module):
    """A model as a function, `model_fn(params, inputs) -> outputs`; a pytree of the arrays that are not parameters.

    Made by `from_nnx`, `from_linen`, `from_equinox` and `from_haiku`. Two of the same model compare equal except for
    their leaves, so that nothing is retraced.

    Example:
        >>> import equinox as eqx, jax
        >>> model_fn, params = from_equinox(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
        >>> model_fn
        ModelFn(Linear)
    """

    size: int = eqx.field(static=True)
    """The number of arrays in its parameters."""

    def __repr__(self) -> str:
        return f"ModelFn({self._name()})"

    @abc.abstractmethod
    def _name(self) -> str:
        """The class of the module."""

    def __call__(self, params: PyTree[Array], inputs: PyTree) -> Array:
        """Compute the outputs of a batch.

        Args:
            params: a pytree like the parameters that were returned with the function.
            inputs: a batch of inputs.

        Returns:
            The outputs, `[N, *out]`.

        Raises:
            ValueError: for parameters with another number of arrays.
        """
        found = len(jax.tree.leaves(params))
        if found != self.size:
            raise ValueError(
                f"params must hold all {self.size} arrays that came with model_fn; got {found}. To vary some of them"
                " only, close over the others: pass the params 'some' and a model_fn like"
                " lambda some, inputs: model_fn({**params, 'head': some}, inputs)."
            )
        return self._run(params, inputs)

    @abc.abstractmethod
    def _run(self, params: PyTree[Array], inputs: PyTree) -> Array:
        """The outputs at all parameters."""


def from_nnx(module: Any, *, method: str = "__call__") -> tuple[ModelFn, PyTree[Array]]:
    """Convert a Flax NNX module to a function of its `nnx.Param`s.

    Everything else (batch statistics, random streams) is held at its present value: changes made by a call are
    discarded. Call `module.eval()` first if it has dropout or batch normalisation. `model_fn` is a pytree: pass it to a
    jitted function like an array, not as a static argument.

    Args:
        module: an `nnx.Module`.
        method: the name of the method that is called with the inputs; `"__call__"` by default.

    Returns:
        `(model_fn, params)`, the parameters as nested dicts of arrays; write new ones back with
        `nnx.update(module, params)`.

    Raises:
        TypeError: for anything but an NNX module.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model_fn, params = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> model_fn(params, jnp.ones((5, 3))).shape
        (5, 2)
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be a flax.nnx.Module; got {type(module).__name__}.")
    graph, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]  # its overloads hide the length
    # Plain dicts of arrays: the states hold the module's own variables, which change with it.
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    return _NNX(_size(params), graph, rest, method, type(module).__name__), params


class _NNX(ModelFn):
    graph: Any
    rest: PyTree[Array]
    method: str = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def _name(self) -> str:
        return self.name

    def _run(self, params: PyTree[Array], inputs: PyTree) -> Array:
        from flax import nnx

        return getattr(nnx.merge(self.graph, params, self.rest), self.method)(inputs)


def from_linen(module: Any, variables: Any, **kwargs: Any) -> tuple[ModelFn, PyTree[Array]]:
    """Convert a Flax linen module to a function of `variables["params"]`.

    Other collections (batch statistics) are held fixed.

    Args:
        module: a `flax.linen.Module`.
        variables: what `module.init` returned.
        **kwargs: passed on to each `module.apply`, such as `train=False` or `rngs={"dropout": key}` (the same key at
            each call); not `mutable`.

    Returns:
        `(model_fn, params)`.

    Raises:
        TypeError: for anything but a linen module.
        ValueError: for `mutable`, and for variables without `"params"`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> module = nn.Dense(2)
        >>> model_fn, params = from_linen(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
        >>> model_fn(params, jnp.ones((5, 3))).shape
        (5, 2)
    """
    from flax import linen

    if not isinstance(module, linen.Module):
        raise TypeError(f"module must be a flax.linen.Module; got {type(module).__name__}.")
    if "mutable" in kwargs:
        raise ValueError(
            "mutable makes module.apply return a pair: leave it out, as changed collections are not kept; or pass a"
            " model_fn of your own that returns (outputs, collections), and has_aux=True."
        )
    if "params" not in variables:
        raise ValueError(f"variables must have a collection 'params'; got {sorted(variables)}.")
    rest = {name: collection for name, collection in variables.items() if name != "params"}
    return _Linen(_size(variables["params"]), module, rest, Frozen(kwargs)), variables["params"]


class _Linen(ModelFn):
    module: Any = eqx.field(static=True)
    rest: PyTree[Array]
    kwargs: Frozen

    def _name(self) -> str:
        return type(self.module).__name__

    def _run(self, params: PyTree[Array], inputs: PyTree) -> Array:
        return self.module.apply({"params": params, **self.rest}, inputs, **self.kwargs.thaw())


def from_equinox(module: Any, *, batched: bool = False) -> tuple[ModelFn, PyTree[Array]]:
    """Convert an Equinox module to a function of its floating arrays.

    Args:
        module: an `equinox.Module`.
        batched: whether the module takes a batch; False (default) for one that takes one example, as is Equinox's
            convention, and is mapped over the batch.

    Returns:
        `(model_fn, params)`; `equinox.combine(params, module)` is the module with new parameters.

    Raises:
        TypeError: for anything but an Equinox module.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> model_fn, params = from_equinox(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
        >>> model_fn(params, jnp.ones((5, 3))).shape
        (5, 2)
    """
    if not isinstance(module, eqx.Module):
        raise TypeError(f"module must be an equinox.Module; got {type(module).__name__}.")
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    return _Equinox(_size(params), Frozen(rest), batched), params


class _Equinox(ModelFn):
    rest: Frozen
    batched: bool = eqx.field(static=True)

    def _name(self) -> str:
        return type(self.rest.thaw()).__name__

    def _run(self, params: PyTree[Array], inputs: PyTree) -> Array:
        module = eqx.combine(params, self.rest.thaw())
        return module(inputs) if self.batched else jax.vmap(module)(inputs)


def from_haiku(
    transformed: Any, params: PyTree[Array], state: Any = None, *, rng: Any = None, **kwargs: Any
) -> tuple[ModelFn, PyTree[Array]]:
    """Convert a function transformed by Haiku to a function of its parameters.

    Args:
        transformed: what `haiku.transform` or `haiku.transform_with_state` returned.
        params: the parameters that its `init` returned.
        state: the state that its `init` returned, with `transform_with_state` only. It is held fixed: changes made by a
            call are discarded. None by default.
        rng: the key that is passed to each call, the same one; None by default.
        **kwargs: passed on to each call, such as `is_training=False`.

    Returns:
        `(model_fn, params)`.

    Raises:
        TypeError: for anything but a transformed function, and for a state that is missing or superfluous.

    Example:
        >>> from typing import NamedTuple
        >>> import jax.numpy as jnp
        >>> class Transformed(NamedTuple):  # as haiku.transform(forward) is
        ...     init: object
        ...     apply: object
        >>> forward = Transformed(None, lambda params, rng, x: x @ params["linear"]["w"])
        >>> model_fn, params = from_haiku(forward, {"linear": {"w": jnp.ones((3, 2))}})
        >>> model_fn(params, jnp.ones((5, 3))).shape
        (5, 2)
    """
    kind = type(transformed).__name__
    if kind not in ("Transformed", "TransformedWithState") or not callable(getattr(transformed, "apply", None)):
        raise TypeError(
            f"transformed must be what haiku.transform or haiku.transform_with_state returns; got {kind}. Others, as of"
            " multi_transform, have several functions: write model_fn(params, inputs) with the one that you want."
        )
    stateful = kind == "TransformedWithState"
    if stateful != (state is not None):
        raise TypeError(
            f"state must be {'what init returned beside the parameters' if stateful else 'left out'} for {kind}; got"
            f" {type(state).__name__}."
        )
    return _Haiku(_size(params), transformed.apply, state, rng, Frozen(kwargs)), params


class _Haiku(ModelFn):
    apply: Any = eqx.field(static=True)
    state: PyTree[Array]
    rng: Any
    kwargs: Frozen

    def _name(self) -> str:
        return getattr(self.apply, "__name__", "apply")

    def _run(self, params: PyTree[Array], inputs: PyTree) -> Array:
        kwargs = self.kwargs.thaw()
        if self.state is None:
            return self.apply(params, self.rng, inputs, **kwargs)
        return self.apply(params, self.state, self.rng, inputs, **kwargs)[0]


def _size(params: PyTree[Array]) -> int:
    return len(jax.tree.leaves(params))
