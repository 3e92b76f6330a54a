"""The names of the curvature approximations."""

import enum


class FisherType(str, enum.Enum):
    """Which vectors stand for the loss in a curvature matrix.

    A `str` enum: members compare equal to their values, and every function of this package also takes the plain string,
    or a member of another library's `str` enum with the same value.

    Example:
        >>> FisherType("mc") is FisherType.MC
        True
    """

    TYPE2 = "type-2"
    """The columns of the loss Hessian's square root: the exact GGN."""
    MC = "mc"
    """Gradients at targets sampled from the model's predictive distribution: an unbiased estimate of the GGN."""
    EMPIRICAL = "empirical"
    """The gradient at the true target: the empirical Fisher."""
    FORWARD_ONLY = "forward-only"
    """Nothing is back-propagated (KFAC from layer inputs alone)."""

    @classmethod
    def _missing_(cls, value: object) -> "FisherType":
        options = ", ".join(repr(member.value) for member in cls)
        raise ValueError(f"fisher_type must be one of {options}; got {value!r}.")

    def __str__(self) -> str:
        return self.value
