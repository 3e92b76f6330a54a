"""Batches as loaders of other libraries yield them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

T = TypeVar("T")


class MappedBatches(Generic[T]):
    """The iterable of `fn(batch)` for each batch; made by `map_batches`.

    Args:
        fn: returns `(inputs, targets)`, or these with a mask, of one batch.
        batches: an iterable that can be repeated.

    Example:
        >>> import ggn_jax
        >>> ggn_jax.map_batches(sum, [(1, 2), (3, 4)])
        MappedBatches(sum, list)
    """

    def __init__(self, fn: Callable[[Any], T], batches: Iterable[Any]):
        self._fn, self._batches = fn, batches

    def __repr__(self) -> str:
        return (
            f"MappedBatches({getattr(self._fn, '__name__', type(self._fn).__name__)}, {type(self._batches).__name__})"
        )

    def __iter__(self) -> Iterator[T]:
        return map(self._fn, self._batches)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # if they have a length


def map_batches(fn: Callable[[Any], T], batches: Iterable[Any]) -> "MappedBatches[T]":
    """Map a function over batches, as often as `batches` can be repeated; a generator could be used once.

    This is for loaders whose batches are not `(inputs, targets)`, as those of Hugging Face's `datasets`.

    Args:
        fn: a function of one batch that returns `(inputs, targets)`, or these with a mask.
        batches: a list or a loader.

    Returns:
        An iterable, with the length of `batches` if that has one.

    Raises:
        TypeError: for an `fn` that is not a function, or `batches` that are not an iterable that can be repeated.

    Example:
        >>> import numpy as np, jax.numpy as jnp, ggn_jax
        >>> rows = [{"image": np.ones((n, 2), np.float32), "label": np.arange(n) % 3} for n in (8, 5)]
        >>> batches = ggn_jax.map_batches(lambda batch: (batch["image"], batch["label"]), rows)
        >>> args = lambda p, x: x @ p, ggn_jax.CrossEntropyLoss(), jnp.ones((2, 3)), batches
        >>> len(batches), ggn_jax.EKFACLinearOperator.from_batches(*args, fisher_type="type-2")
        (2, EKFACLinearOperator(params=float32[2, 3], blocks=1))
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of one batch; got {type(fn).__name__}: it comes before the batches.")
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise TypeError(
            f"batches must be a list or a loader, which can be gone over again; got {type(batches).__name__}."
        )
    return MappedBatches(fn, batches)


def without_copies(tree: PyTree[Any]) -> PyTree[Any]:
    """Tensors of other libraries as arrays that share their memory (DLPack); what cannot be is left as it is."""
    return jax.tree.map(_shared, tree)


def _shared(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray) or not hasattr(leaf, "__dlpack__"):
        return leaf
    for convert in (np.from_dlpack, jnp.from_dlpack):  # on the host; elsewhere, and for dtypes that NumPy has not
        try:
            return convert(leaf)
        except Exception:  # of any library
            continue
    return leaf
