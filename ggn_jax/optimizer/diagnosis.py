"""Why a run is slow: the damping, the step and the inverses of a state, measured on one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import are_known
from ggn_jax._eager import compiled
from ggn_jax._sharding import NOT_SHARDED, on_mesh
from ggn_jax.kronecker.algebra import Block, Kronecker, Spectral, is_diagonal
from ggn_jax.kronecker.linalg import eigh, norm, zero_below_resolution
from ggn_jax.kronecker.pairs import split_damping
from ggn_jax.kronecker.stacks import BlockSpec, unstack
from ggn_jax.layers.table import table
from ggn_jax.optimizer.advice import Finding, Numbers, findings
from ggn_jax.optimizer.checks import check_structure
from ggn_jax.optimizer.core import Core
from ggn_jax.optimizer.curvature import Curvature, precondition, precondition_stacks, with_new_inverses
from ggn_jax.optimizer.numbers import inner
from ggn_jax.optimizer.quadratic import loss_at, quadratic_model, reduction_ratio
from ggn_jax.optimizer.settings import Settings
from ggn_jax.optimizer.states import KFACState, check_rule, find_state
from ggn_jax.optimizer.step import StepRule
from ggn_jax.optimizer.storage import unpack


@dataclass(frozen=True)
class BlockDiagnosis:
    """One block of the curvature, in a `Diagnosis`.

    Eigenvalues of a sum of Kronecker terms are those of the nearest product.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.ones((8, 3)))
        >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=batch[0])
        >>> grads, key = {"w": jnp.ones((2, 3))}, jax.random.key(0)
        >>> _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params, batch=batch, key=key)
        >>> optimizer.diagnose(state, params, batch).blocks[0].parameters
        ("['w']",)
    """

    parameters: tuple[str, ...]
    """The paths of its parameters, as `jax.tree_util.keystr` writes them."""
    kind: str
    """What these are used as, as in `report`."""
    size: int
    """The number of their entries in the block."""
    mean_eigenvalue: float
    """The mean eigenvalue of the averaged block without damping: its trace divided by its size."""
    least_eigenvalue: float
    """The least eigenvalue of the damped block as it is inverted."""
    greatest_eigenvalue: float
    """The greatest eigenvalue of the damped block as it is inverted: with the damping split over the factors, unless
    damping is exact."""
    condition_number: float
    """The condition number of the damped block, the greatest among its groups; where damping is split over the factors,
    the product of theirs."""
    stale: float
    """The relative error of the gradient preconditioned with the inverse in use, compared with a new inverse: the norm
    of the difference divided by a norm."""


@dataclass(frozen=True)
class Diagnosis:
    """What `optimizer.diagnose(...)` returns: `print` it, read its numbers, or `plot` it.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.ones((8, 3)))
        >>> optimizer = ggn_jax.kfac(lambda p, x: x @ p["w"], ggn_jax.MSELoss(), 0.1, example_inputs=batch[0])
        >>> grads, key = {"w": jnp.ones((2, 3))}, jax.random.key(0)
        >>> _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params, batch=batch, key=key)
        >>> optimizer.diagnose(state, params, batch).steps
        1
    """

    steps: int
    """The number of updates so far."""
    damping: float
    """The damping in use."""
    loss: float
    """The loss of the batch."""
    cosine: float
    """The cosine between the gradient and the preconditioned one: near 1, the curvature changes nothing."""
    stale: float
    """`BlockDiagnosis.stale` for all blocks together."""
    clipped: float
    """The fraction of all steps that `kl_clip` made shorter; 0 for `scale_by_kfac`."""
    rejected: float
    """The fraction of updates that were rejected."""
    skipped: float
    """The fraction of batches that were left out of the averages."""
    predicted: float | None
    """The change of the batch's loss that the quadratic model, with the exact GGN and the damping, predicts for the
    next step; None for `scale_by_kfac`, which makes no steps."""
    reduction_ratio: float | None
    """The actual change divided by the predicted one; minus infinity if an increase is predicted."""
    best_scale: float | None
    """The factor by which the step would minimise the quadratic model: 1 if its length is right."""
    blocks: tuple[BlockDiagnosis, ...]
    """One for each block of the curvature."""
    findings: tuple[Finding, ...]
    """What slows the run, and what to do about it; empty if nothing was found."""

    def __str__(self) -> str:
        lines = [f"After {self.steps} steps: loss {self.loss:.4g} on this batch, damping {self.damping:.3g}."]
        if self.reduction_ratio is not None and np.isfinite(self.predicted or 0):
            achieved = f"{self.reduction_ratio:.2f} of it achieved"
            if not np.isfinite(self.reduction_ratio):
                achieved = "an increase"
            lines.append(
                f"The next step: change of the loss {self.predicted:.3g} predicted, {achieved}; the best length is"
                f" {self.best_scale:.2g} times this one."
            )
        lines.append(
            f"Steps clipped {self.clipped:.0%}, rejected {self.rejected:.0%}; batches skipped {self.skipped:.0%};"
            f" stale inverses change the direction by {self.stale:.0%}; cosine with the gradient {self.cosine:.2f}."
        )
        head = ("block", "kind", "mean eigenvalue", "damped: least", "greatest", "condition", "stale")
        lines += table(
            head,
            [
                (
                    ", ".join(b.parameters),
                    b.kind,
                    f"{b.mean_eigenvalue:.1e}",
                    f"{b.least_eigenvalue:.1e}",
                    f"{b.greatest_eigenvalue:.1e}",
                    f"{b.condition_number:.1e}",
                    f"{b.stale:.0%}",
                )
                for b in self.blocks
            ],
        )
        lines += [f"{found.name}: {found.text} {found.advice}" for found in self.findings]
        return "\n".join(lines if self.findings else [*lines, "Nothing was found that slows this run."])

    def plot(self, ax: Any) -> Any:
        """Draw each block's damped eigenvalues (lines), their mean before damping (points) and the damping.

        Args:
            ax: a Matplotlib axis: `diagnosis.plot(plt.figure().gca())`.

        Returns:
            `ax`.
        """
        for i, block in enumerate(self.blocks):
            ax.plot([i, i], [block.least_eigenvalue, block.greatest_eigenvalue], color="C0", linewidth=4, alpha=0.4)
        means = [block.mean_eigenvalue or np.nan for block in self.blocks]
        ax.plot(range(len(means)), means, "o", color="C0", label="mean eigenvalue")
        ax.axhline(self.damping, color="C1", label="damping")
        ax.set_xticks(range(len(means)), [", ".join(b.parameters) for b in self.blocks], rotation=90)
        ax.set(yscale="log", ylabel="eigenvalues of the blocks", title=f"after {self.steps} steps")
        ax.legend()
        return ax


class Diagnoser:
    """Makes diagnoses of one optimizer's states."""

    def __init__(self, core: Core, rule: StepRule | None):
        self.core, self.rule = core, rule
        self._measure = compiled(self._numbers)

    def __call__(self, state: Any, params: PyTree[Array], batch: Any, full_params: Any) -> Diagnosis:
        """What `optimizer.diagnose` returns."""
        found, curvature = find_state(state), self.core.curvature_in(state, params)
        if not are_known((curvature.weight, params, batch)):
            raise TypeError("diagnose needs values: call it outside of jit and other transformations.")
        if float(curvature.weight) == 0:
            raise ValueError("diagnose needs a state that has seen a batch: take some steps first.")
        check_rule(found, "" if self.rule is None else self.rule.ratio)
        velocity = None
        if isinstance(found, KFACState) and found.velocity is not None:
            velocity = check_structure("state.velocity", found.velocity, params)
        evaluate = on_mesh(self._evaluate, lambda *_: NOT_SHARDED)
        numbers, stacks = jax.device_get(evaluate(params, batch, curvature, velocity, full_params))
        blocks = self._blocks(params, stacks, float(curvature.damping))
        known: dict[str, Any] = {name: float(x) for name, x in numbers.items()}
        off, new = (np.concatenate([stack[name] for stack in stacks]) for name in ("off", "new"))
        steps = int(curvature.count)
        shares = {"rejected": found.rejected, "skipped": curvature.skipped}
        if isinstance(found, KFACState):
            shares["clipped"] = found.statistics.clipped
        known |= {name: int(jax.tree.leaves(x)[0]) / steps for name, x in shares.items()}
        known |= {"damping": float(curvature.damping), "stale": _relative(off, new)}
        known = {"clipped": 0.0, **dict.fromkeys(_STEP_NUMBERS), **known}
        of = Numbers(
            steps=steps,
            **{name: known[name] for name in Numbers._fields if name in known},
            sizes=[block.size for block in blocks],
            mean_eigenvalues=[block.mean_eigenvalue for block in blocks],
            condition_number=max((block.condition_number for block in blocks), default=1.0),
            resolution=max(float(jnp.finfo(dtype).eps) for dtype in self._dtypes(params)),
        )
        return Diagnosis(steps=steps, **known, blocks=blocks, findings=findings(of, self.rule))

    def _dtypes(self, params: PyTree[Array]) -> list[Any]:
        """The dtype in which each stack of blocks is inverted."""
        return [jax.tree.leaves(block)[0].dtype for block in self.core.known(params).factors.blocks]

    def _evaluate(self, params: Any, batch: Any, curvature: Curvature, velocity: Any, full_params: Any) -> Any:
        problem, _ = self.core.problem(params, batch, full_params, value=True)
        return self._measure(problem, curvature, velocity)

    def _numbers(self, problem: Any, curvature: Curvature, velocity: Any) -> tuple[dict[str, Array], list[Any]]:
        """Scalars, and arrays of each stack's groups."""
        params, settings = problem.params, self.core.settings.fixed
        stacks, dtypes = self.core.known(params).stacks, self._dtypes(params)
        loss, grads = jax.value_and_grad(lambda params: loss_at(problem, params))(params)
        direction = precondition(curvature, stacks, settings, grads)
        lengths = jnp.sqrt(inner(grads, grads)) * jnp.sqrt(inner(direction.entries, direction.entries))
        cosine = direction.slope / jnp.where(lengths > 0, lengths, 1)
        numbers = {"loss": loss, "cosine": cosine}
        if self.rule is not None:
            given = problem, grads, direction, velocity, params, curvature.count, curvature.damping
            step = self.rule.step(*given).update
            model = quadratic_model(problem, grads, [step], curvature.damping)
            whole, bend = jnp.ones(1, model.b.dtype), model.k[0, 0]
            best = jnp.where(bend > 0, -model.b[0] / jnp.where(bend > 0, bend, 1), 1)
            ratio = reduction_ratio(problem, model, whole, step)
            numbers |= {"predicted": model.change(whole), "reduction_ratio": ratio, "best_scale": best}
        fresh = with_new_inverses(curvature, dtypes, settings)
        old, new = (precondition_stacks(c, stacks, settings, grads)[0] for c in (curvature, fresh))
        blocks = [unpack(block, dtype) for block, dtype in zip(curvature.blocks, dtypes, strict=True)]
        spectra = _spectra(blocks, curvature.damping, settings)
        found = []
        for i, stack in enumerate(stacks):
            numbers_of = dict(spectra[i])
            if settings.ekfac and isinstance(fresh.inverses[i], Spectral):
                numbers_of = {"values": fresh.inverses[i].values.reshape(len(fresh.inverses[i].values), -1)}
            numbers_of |= {"trace": blocks[i].traces(), "off": _norms(new[i] - old[i]), "new": _norms(new[i])}
            found.append({name: x[: stack.shape[0]] for name, x in numbers_of.items()})
        return numbers, found

    def _blocks(self, params: PyTree[Array], stacks: Sequence[Any], damping: float) -> tuple[BlockDiagnosis, ...]:
        """Each block that has curvature, from the arrays of its stack."""
        split = not self.core.settings.keeps_spectra
        pairs = zip(self.core.known(params).stacks, stacks, strict=True)
        each = (pair for stack, found in pairs if not stack.unused for pair in unstack(stack, found))
        return tuple(_block(spec, found, damping, split) for spec, found in each)


_STEP_NUMBERS = "predicted", "reduction_ratio", "best_scale"


def _spectra(blocks: Sequence[Block], damping: Array, settings: Settings) -> list[dict[str, Float[Array, "G d"]]]:
    """The eigenvalues of the blocks, or of their factors, including damping that is split between factors."""
    near = [block.nearest() if isinstance(block, Kronecker) else block for block in blocks]
    named = [
        {"a": block.a[0], "b": block.b[0]} if isinstance(block, Kronecker) else {"values": jax.tree.leaves(block)[0]}
        for block in near
    ]
    dense = [x for one in named for x in one.values() if not is_diagonal(x)]
    pairs = (
        settings.spread.map_shards(lambda matrices: [tuple(pair) for pair in eigh(matrices)], dense) if dense else []
    )
    found = iter([zero_below_resolution(values) for values, _ in pairs])
    spectra = [{name: x if is_diagonal(x) else next(found) for name, x in one.items()} for one in named]
    return spectra if settings.keeps_spectra else [_shifted(spectrum, damping) for spectrum in spectra]


def _shifted(spectrum: dict[str, Float[Array, "G d"]], damping: Array) -> dict[str, Float[Array, "G d"]]:
    if "a" not in spectrum:
        return spectrum
    a, b = spectrum["a"], spectrum["b"]
    (shift_a,), (shift_b,) = split_damping([jnp.mean(a, axis=1)], [jnp.mean(b, axis=1)], damping)
    return {"a": a + shift_a[:, None], "b": b + shift_b[:, None]}


def _norms(x: Float[Array, "G ..."]) -> Float[Array, " G"]:
    return norm(x, tuple(range(1, x.ndim)))


def _relative(off: Any, new: Any) -> float:
    """The norm of a difference, in parts, relative to that of what it should be."""
    sizes = [float(np.sqrt(np.sum(np.asarray(x, np.float64) ** 2))) for x in (off, new)]
    return sizes[0] / sizes[1] if sizes[1] > 0 else 0.0


def _block(spec: BlockSpec, found: Any, damping: float, split: bool) -> BlockDiagnosis:
    wide = {name: np.maximum(np.asarray(x, np.float64), 0) for name, x in found.items()}
    if "a" in wide:
        a, b = wide["a"], wide["b"]
        rest = 0.0 if split else damping
        low, high = a.min(1) * b.min(1) + rest, a.max(1) * b.max(1) + rest
    else:
        low, high = wide["values"].min(1) + damping, wide["values"].max(1) + damping
    groups, out, inputs = spec.shape
    condition = np.divide(high, low, out=np.full_like(high, np.inf), where=low > 0)
    return BlockDiagnosis(
        spec.names,
        spec.kind,
        groups * out * inputs,
        float(wide["trace"].sum()) / (groups * out * inputs),
        float(low.min()),
        float(high.max()),
        float(condition.max()),
        _relative(found["off"], found["new"]),
    )
