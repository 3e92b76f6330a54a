"""How the curvature is followed; which of a function's arguments belong where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, TypeVar, get_args

from jax.sharding import Mesh
from jaxtyping import Array

from ggn_jax._checks import check_count
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block, decompose
from ggn_jax.kronecker.options import Options
from ggn_jax.kronecker.split import invert_heuristically
from ggn_jax.optimizer.checks import FROM_0_TO_1, check_dtype, check_flag, check_mesh, check_number, check_static
from ggn_jax.optimizer.spread import Spread

DampingMethod = Literal["heuristic", "exact"]
T = TypeVar("T")


def pick(cls: type[T], given: Mapping[str, Any]) -> T:
    """A dataclass made of those arguments that are its fields."""
    return cls(**{field.name: given[field.name] for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Settings:
    """How the curvature is followed; see `kfac`."""

    options: Options
    decay: Any
    factor_interval: int
    inverse_interval: int
    staggered: bool
    damping_method: DampingMethod
    ekfac: bool
    factor_dtype: Any
    chunk_size: int | None
    mesh: Mesh | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The settings among a function's arguments."""
        for field in (*fields(Options), *fields(cls)):
            if field.name not in ("options", "decay"):
                check_static(field.name, given[field.name])
        return pick(cls, {**given, "options": pick(Options, given)})

    def __post_init__(self) -> None:
        check_number("decay", self.decay, FROM_0_TO_1)
        for name in ("factor_interval", "inverse_interval"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", check_count("chunk_size", self.chunk_size))
        for name in ("staggered", "ekfac"):
            check_flag(name, getattr(self, name))
        if self.damping_method not in get_args(DampingMethod):
            raise ValueError(f"damping_method must be 'heuristic' or 'exact'; got {self.damping_method!r}.")
        object.__setattr__(self, "factor_dtype", check_dtype("factor_dtype", self.factor_dtype))
        check_mesh(self.mesh)
        if self.ekfac and self.options.fisher_type is FisherType.FORWARD_ONLY:
            raise NotImplementedError("ekfac corrects with gradients, of which fisher_type 'forward-only' has none.")

    @property
    def fixed(self) -> Self:
        """All but the decay, which may be an array: hashable."""
        return replace(self, decay=1.0)

    @property
    def spread(self) -> Spread:
        """Which device has which blocks."""
        return Spread(self.mesh)

    @property
    def keeps_spectra(self) -> bool:
        """Whether damping is applied to eigenvalues, at each step anew."""
        return self.ekfac or self.damping_method == "exact"

    @property
    def most_terms(self) -> int:
        """How many Kronecker terms of a block are inverted as they are; more of them as so many that are near."""
        return 1 if self.keeps_spectra else 2

    def invert(self, blocks: Sequence[Block], damping: Array) -> list[Any]:
        """What is kept of blocks to multiply by their inverses."""
        if self.keeps_spectra:
            return list(decompose(blocks))
        return invert_heuristically(blocks, damping)
