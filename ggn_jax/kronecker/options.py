"""How Kronecker factors are made: the options that the operators and the optimizer share."""

from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from ggn_jax._checks import check_choice, check_count
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.vectors import Positions
from ggn_jax.layers.plan import MAX_SMALL_SIZE

Sharing = Literal["expand", "reduce"]
Bias = Literal["joint", "separate"]
Tied = Literal["sum", "concatenate"]
OnUncovered = Literal["auto", "error", "diagonal", "full"]
Small = Literal["full", "diagonal"]
Large = Literal["block", "diagonal"]


class KroneckerOptions(TypedDict, total=False):
    """How Kronecker factors are made: the options that `kfac`, `scale_by_kfac` and the Kronecker operators share.

    Each is a keyword argument of these; a dict of some is passed to all by `**`. Type checkers know their names.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> options: ggn_jax.KroneckerOptions = {"fisher_type": "type-2", "bias": "separate", "max_dense_size": 4096}
        >>> params, x, model_fn = {"w": jnp.ones((2, 3))}, jnp.ones((8, 2)), lambda p, x: x @ p["w"]
        >>> loss = ggn_jax.CrossEntropyLoss()
        >>> operator = ggn_jax.KFACLinearOperator(model_fn, loss, params, (x, jnp.arange(8) % 3), **options)
        >>> optimizer = ggn_jax.kfac(model_fn, loss, example_inputs=x, **options)
    """

    fisher_type: FisherType | str
    """Which vectors are back-propagated: `"mc"` (default), `"type-2"` (exact in the loss), `"empirical"`, or
    `"forward-only"` (`B = I`)."""
    mc_samples: int
    """How many targets `"mc"` samples for each example; 1 by default."""
    sharing: Sharing
    """Positions that share a weight: `"expand"` (default) treats them as separate examples, `"reduce"` averages inputs
    and adds gradients first (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636)."""
    bias: Bias
    """`"joint"` (default) makes a bias one more input of its layer, `"separate"` gives it the block `B`."""
    tied: Tied
    """The block of a weight that is used several times: `"sum"` (default) adds a Kronecker term for each use,
    `"concatenate"` makes one term of the positions of all uses."""
    positions: Positions
    """How type-2 treats outputs with several loss positions, such as tokens: `"signs"` (default) back-propagates all of
    them together with independent random signs (unbiased; needs a key), `"exact"` one by one."""
    on_uncovered: OnUncovered
    """The block of parameters that no layer covers: `"full"` the exact GGN block, `"diagonal"` the exact GGN diagonal;
    `"auto"` (default) the block up to `max_small_size` entries, else the diagonal, with one
    `UncoveredParametersWarning` that names them; `"error"` refuses them."""
    small: Small
    """The exact block of scales and shifts: `"full"` (default) or `"diagonal"`."""
    large: Large
    """Kronecker factors larger than `max_dense_size`: `"block"` (default) makes them block-diagonal, in
    parts of at most `block_size` and as even as possible, so that the layer's block is cut into Kronecker products of
    its own for each part; `"diagonal"` keeps their diagonal."""
    max_dense_size: int
    """The size of the largest dense factors; 8192 by default. Larger blocks of uncovered parameters are diagonal."""
    block_size: int
    """The size of the largest parts with `large="block"`; 1024 by default."""
    max_small_size: int
    """The size of the largest blocks of scales and shifts; 1024 by default. Larger ones are diagonal, and so are those
    with more entries than the model has parameters, and more than 128 x 128 (a position embedding that is added,
    say)."""
    vector_chunk_size: int
    """How many vectors are back-propagated at once; 1 by default. On a CPU, one by one is fastest except for tiny
    models, and takes the least memory."""


@dataclass(frozen=True)
class Options:
    """`KroneckerOptions`, checked, with a value for each."""

    fisher_type: FisherType = FisherType.MC
    mc_samples: int = 1
    sharing: Sharing = "expand"
    bias: Bias = "joint"
    tied: Tied = "sum"
    positions: Positions = "signs"
    on_uncovered: OnUncovered = "auto"
    small: Small = "full"
    large: Large = "block"
    max_dense_size: int = 8192
    block_size: int = 1024
    max_small_size: int = MAX_SMALL_SIZE
    vector_chunk_size: int = 1

    def __post_init__(self) -> None:
        given = self.fisher_type
        checked: dict[str, Any] = {
            "fisher_type": FisherType(given) if isinstance(given, str) else FisherType._missing_(given)
        }
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        draws = checked["fisher_type"] is FisherType.MC
        checked["mc_samples"] = check_count("mc_samples", self.mc_samples) if draws else 1
        for name in ("max_dense_size", "block_size", "max_small_size", "vector_chunk_size"):
            checked[name] = check_count(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)


CHOICES: dict[str, tuple[str, ...]] = {
    "sharing": get_args(Sharing),
    "bias": get_args(Bias),
    "tied": get_args(Tied),
    "positions": get_args(Positions),
    "on_uncovered": get_args(OnUncovered),
    "small": get_args(Small),
    "large": get_args(Large),
}

DEFAULTS = {field.name: field.default for field in fields(Options)}
