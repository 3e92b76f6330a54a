"""What slows a run, from the numbers of a diagnosis: each finding with what to do about it."""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import NamedTuple

from ggn_jax.optimizer.step import StepRule

GOOD, BAD = 3 / 4, 1 / 4  # of reduction ratios, as in Levenberg and Marquardt's rule
MAX_DAMPING_RATIO = 10  # of a damping against a block's mean eigenvalue
LONG, SHORT = 1 / 2, 3  # of the best length of a step, in units of its own
MAJORITY = 1 / 2  # of clipped steps
SETTLED = 100  # steps, in which an adapted damping falls by a factor of 150
MIN_STEPS = 10  # steps that are too few to speak of shares
NOT_RARE = 1 / 100  # of rejected steps, and of skipped batches
MAX_STALE = 0.3
MAX_ROUNDING = 1e-2  # of a condition number times the resolution of its dtype


class Finding(NamedTuple):
    """One thing that slows a run, in a `Diagnosis`.

    Args:
        name: which one.
        text: what was found, with numbers.
        advice: what to do about it.

    Example:
        >>> from ggn_jax import Finding
        >>> Finding("stale-inverses", "The inverses are old.", "Lower inverse_interval.").name
        'stale-inverses'
    """

    name: str
    """"not-finite", "damping-large", "damping-small", "step-long", "step-short", "step-uphill", "clipped", "rejected",
    "skipped", "ill-conditioned" or "stale-inverses"."""
    text: str
    advice: str


class Numbers(NamedTuple):
    """What findings depend on; see `Diagnosis`."""

    steps: int
    loss: float
    cosine: float
    damping: float
    reduction_ratio: float | None
    best_scale: float | None
    clipped: float
    rejected: float
    skipped: float
    stale: float
    sizes: Sequence[int]
    mean_eigenvalues: Sequence[float]
    condition_number: float
    """The greatest."""
    resolution: float
    """Of the dtype that blocks are inverted in."""


def findings(of: Numbers, rule: StepRule | None) -> tuple[Finding, ...]:
    """What slows a run."""
    is_finite = isfinite(of.loss) and isfinite(of.cosine)
    parts = (_damping, _step, _counts, _inverses) if is_finite else (_values, _counts)
    return tuple(Finding(*found) for part in parts for found in part(of, rule))


def _values(of: Numbers, rule: StepRule | None) -> Iterator[tuple[str, str, str]]:
    what = f"The loss of this batch is {of.loss:.3g}" if not isfinite(of.loss) else "The gradient is not finite"
    advice = "Look for the first step whose loss is not finite, go back to parameters from before, and lower its step."
    yield "not-finite", f"{what} at these parameters: nothing else can be said of the next step.", advice


def _damping(of: Numbers, rule: StepRule | None) -> Iterator[tuple[str, str, str]]:
    pairs = zip(of.sizes, of.mean_eigenvalues, strict=True)
    swamped = sum(n for n, mean in pairs if of.damping > MAX_DAMPING_RATIO * mean)
    share, ratio = swamped / max(sum(of.sizes), 1), of.reduction_ratio
    if share > MAJORITY and (ratio is None or ratio > GOOD) and not _is_on_its_way(of, rule):
        text = (
            f"The damping {of.damping:.2g} is more than {MAX_DAMPING_RATIO} times the mean eigenvalue of the blocks of"
            f" {share:.0%} of the parameters"
        )
        text += (
            "." if ratio is None else f", and the loss falls by {ratio:.2f} times what the quadratic model predicts."
        )
        yield "damping-large", text, _lower_damping(of, rule)
    if ratio is not None and ratio < BAD and not _is_long(of):
        text = f"The loss changes by {ratio:.2f} times what the quadratic model predicts: it is trusted too far."
        advice = f"Raise damping, or adapt it, {_RULE}; larger batches help where their noise is what is fitted."
        yield "damping-small", text, advice


def _lower_damping(of: Numbers, rule: StepRule | None) -> str:
    if rule is None:
        return "Lower damping."
    if not rule.adapts_damping:
        return f"Lower damping, or adapt it, {_RULE}."
    kind = type(rule.damping).__name__
    if _is_least(of, rule):
        return f"Lower the minimum of {kind}, which it has reached."
    return f"{kind} lowers it step by step: start from a smaller damping, {kind}(initial=...)."


def _is_on_its_way(of: Numbers, rule: StepRule | None) -> bool:
    """Whether a rule is still lowering the damping from where it started."""
    return rule is not None and rule.adapts_damping and of.steps < SETTLED and not _is_least(of, rule)


def _is_least(of: Numbers, rule: StepRule) -> bool:
    """Whether an adapted damping has reached its minimum, but for rounding."""
    return of.damping <= 1.01 * float(rule.damping.minimum)


_RULE = "damping=ggn_jax.LevenbergMarquardt()"


def _is_long(of: Numbers) -> bool:
    return of.best_scale is not None and of.best_scale < LONG


def _step(of: Numbers, rule: StepRule | None) -> Iterator[tuple[str, str, str]]:
    best = of.best_scale
    if best is None or rule is None:
        return
    if best <= 0:
        text = "The next step goes uphill on this batch: momentum points another way than the gradient."
        yield "step-uphill", text, "Lower momentum or the learning rate, or raise the damping."
    elif best < LONG:
        text = f"The quadratic model is least at {best:.2g} times the next step."
        yield "step-long", text, "Lower the learning rate or kl_clip, or leave learning_rate out."
    elif best > SHORT:
        text = f"The quadratic model is least at {best:.2g} times the next step."
        way = "kl_clip, which shortens most steps" if of.clipped > MAJORITY else "the learning rate"
        yield "step-short", text, f"Raise {way}, or leave learning_rate out."


def _counts(of: Numbers, rule: StepRule | None) -> Iterator[tuple[str, str, str]]:
    if of.clipped > MAJORITY and of.steps >= MIN_STEPS:
        text = f"kl_clip shortened {of.clipped:.0%} of the steps: it sets their length, not the learning rate."
        yield "clipped", text, "Raise kl_clip if training is stable, else lower the learning rate until few are."
    if of.rejected > NOT_RARE:
        text = f"{of.rejected:.1%} of the updates were zero: gradient or step were not finite, or had no inverse."
        yield "rejected", text, "Look for NaN in the loss and its gradient; with damping=0, raise it."
    if of.skipped > NOT_RARE:
        text = f"{of.skipped:.1%} of the batches were left out of the curvature: their factors were not finite."
        yield "skipped", text, "Look for NaN and overflows in the model, as float16 has."


def _inverses(of: Numbers, rule: StepRule | None) -> Iterator[tuple[str, str, str]]:
    if of.condition_number * of.resolution > MAX_ROUNDING:
        text = f"A damped block has the condition number {of.condition_number:.1e}: rounding changes its inverse."
        yield "ill-conditioned", text, "Raise damping (or its minimum), or compute in float64."
    if of.stale > MAX_STALE:
        text = f"With inverses of today's averages, the preconditioned gradient would differ by {of.stale:.0%}."
        yield (
            "stale-inverses",
            text,
            "Lower inverse_interval, or raise decay: averages then move less.",
        )
