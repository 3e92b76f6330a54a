"""How the curvature is followed: the options of `kfac` and `scale_by_kfac`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from ggn_jax._checks import Examples, check_choice, check_count, is_word
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.algebra import Block, decompose
from ggn_jax.kronecker.options import DEFAULTS as OF_FACTORS
from ggn_jax.kronecker.options import KroneckerOptions, Options
from ggn_jax.kronecker.split import invert_heuristically
from ggn_jax.optimizer.checks import FROM_0_TO_1, check_dtype, check_flag, check_mesh, check_number, check_static
from ggn_jax.optimizer.defaults import AUTO
from ggn_jax.optimizer.numbers import Number
from ggn_jax.optimizer.spread import Spread

INTERVALS = "factor_interval", "inverse_interval"
DampingMethod = Literal["heuristic", "exact"]


class KFACOptions(KroneckerOptions, total=False):
    """How curvature is followed: the options that `kfac` and `scale_by_kfac` share, with those of `KroneckerOptions`.

    Each is a keyword argument of these; a dict of some is passed to both by `**`. Type checkers know their names.

    Example:
        >>> import jax.numpy as jnp, ggn_jax
        >>> options: ggn_jax.KFACOptions = {"decay": 0.9, "inverse_interval": 20, "fisher_type": "type-2"}
        >>> model_fn, loss = lambda p, x: x @ p["w"], ggn_jax.CrossEntropyLoss()
        >>> optimizer = ggn_jax.kfac(model_fn, loss, 0.1, example_inputs=jnp.ones((8, 2)), **options)
    """

    decay: Number
    """The decay of the factors' averages, which are bias-corrected; 0.95 by default."""
    factor_interval: int | Literal["auto"]
    """How many steps pass between new factors: `"auto"` (default) is 1, or 5 for `kfac` with `SlopeDamping`, as with
    nothing set. Not more often at first: the averages would keep the first batches' curvature for longer."""
    inverse_interval: int | Literal["auto"]
    """How many steps pass between new inverses: `"auto"` (default) is 10, or 5 for `kfac` with a `QuadraticModel`, as
    without a learning rate. They are computed after 1, 2, 4, 8, ... steps as well, below the first interval, since the
    averages of few batches change fast."""
    staggered: bool
    """Whether to recompute a subset of the inverses at each step but the first, which computes all, so that no other
    step takes longer than the rest; False by default."""
    damping_method: DampingMethod
    """`"heuristic"` (default) adds `pi sqrt(damping)` and `sqrt(damping) / pi` to the factors, and needs Cholesky
    factorisations; `"exact"` adds the damping to the Kronecker product's eigenvalues, and needs eigendecompositions,
    about ten times the time. A sum of two Kronecker terms (a weight that is used twice) is inverted by `"heuristic"`
    without another approximation, see `KFACLinearOperator.inverse`, and a sum of more terms as two nearby ones;
    `"exact"`, and `ekfac`, use the nearest single term. `report` names such blocks."""
    ekfac: bool
    """Whether to average the GGN's diagonal in KFAC's eigenbases between new bases (its first step is KFAC's), with
    exact damping; False by default."""
    factor_dtype: Any
    """The dtype in which averages are kept; None (default) for that in which they are computed, in which inverses
    always are. With `"bfloat16"` averages take half the bytes of float32, and have an error of up to 2^-7 of each
    entry, rounded so that means over steps are right: choose a damping well above that part of the factors."""
    chunk_size: int | None
    """How many examples to process at once: the batch's loss, gradient and factors are summed over chunks, so that only
    the activations of one chunk are held. None (default) for all of them."""
    mesh: Mesh | None
    """A `jax.sharding.Mesh`: each of its devices holds, inverts and multiplies with some of the blocks, and all gather
    the preconditioned gradient. None by default."""
    full_params: PyTree | None
    """Under `optax.masked` or `multi_transform`, all parameters (or their shapes, which are what is kept); each update
    that has a batch needs their present values, `update(..., full_params=params)`. None by default."""
    has_aux: bool
    """Whether `model_fn` returns `(outputs, aux)`: new running statistics, metrics. As with `jax.value_and_grad`, the
    value of `value_and_grad_and_factors` is then a pair `(value, aux)`. False by default."""
    examples: Examples
    """`"independent"` (default), or `"coupled"` for a model whose examples depend on each other, as in
    `KFACLinearOperator`."""


@dataclass(frozen=True)
class Settings:
    """How the curvature is followed: `KFACOptions`, checked, with a value for each that is not about the model."""

    options: Options
    decay: Any = 0.95
    factor_interval: int = 1
    inverse_interval: int = 10
    staggered: bool = False
    damping_method: DampingMethod = "heuristic"
    ekfac: bool = False
    factor_dtype: Any = None
    chunk_size: int | None = None
    mesh: Mesh | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The settings among options."""
        for name, value in given.items():
            if name not in OF_MODEL and name != "decay":
                check_static(name, value)
        own = {field.name: given[field.name] for field in fields(cls) if field.name != "options"}
        for name in INTERVALS:
            if is_word(own[name], AUTO):
                del own[name]
        return cls(Options(**{name: given[name] for name in OF_FACTORS}), **own)

    def __post_init__(self) -> None:
        check_number("decay", self.decay, FROM_0_TO_1)
        for name in INTERVALS:
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", check_count("chunk_size", self.chunk_size))
        for name in ("staggered", "ekfac"):
            check_flag(name, getattr(self, name))
        check_choice("damping_method", self.damping_method, get_args(DampingMethod))
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


OF_MODEL: dict[str, Any] = {"full_params": None, "has_aux": False, "examples": "independent"}
DEFAULTS = {
    **{field.name: field.default for field in fields(Settings) if field.name != "options"},
    **dict.fromkeys(INTERVALS, AUTO),
    **OF_MODEL,
    **OF_FACTORS,
}
