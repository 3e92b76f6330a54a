"""How Kronecker factors are made: the options that the operators and the optimizer share."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ggn_jax._checks import check_count
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.vectors import Positions
from ggn_jax.layers.plan import MAX_SMALL_SIZE

Sharing = Literal["expand", "reduce"]
Bias = Literal["joint", "separate"]
Tied = Literal["sum", "concatenate"]
OnUncovered = Literal["auto", "error", "diagonal", "full"]
Small = Literal["full", "diagonal"]
Large = Literal["block", "diagonal"]


@dataclass(frozen=True)
class Options:
    """How the factors are made; see `KFACLinearOperator`."""

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
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {wanted}; got {getattr(self, name)!r}.")
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
