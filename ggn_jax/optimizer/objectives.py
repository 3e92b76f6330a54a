"""One pass over the batches of an objective, as `Core` makes one for one function."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from ggn_jax._checks import Examples
from ggn_jax._sharding import vary_like
from ggn_jax._weights import weighted_sum
from ggn_jax.kronecker.checks import check_draw_key
from ggn_jax.kronecker.joined import JoinedLayout, add_sums
from ggn_jax.kronecker.layout import Layout
from ggn_jax.objective import Objective, array_weights, key_of
from ggn_jax.operators.problem import WeightedProblems
from ggn_jax.optimizer.core import Core, PassInputs, PassResult
from ggn_jax.optimizer.settings import Settings


class ObjectiveCore(Core):
    """An objective's functions, each with a `Core`, and the blocks of their weighted sum."""

    def __init__(
        self,
        objective: Objective,
        example_inputs: Any,
        settings: Settings,
        full_params: PyTree | None,
        has_aux: bool,
        examples: Examples,
    ):
        if has_aux:
            raise NotImplementedError(
                "has_aux=True is for one model_fn: an objective's functions return outputs alone; compute what else"
                " they return in a call of your own."
            )
        inputs = objective._for_each_term(
            "example_inputs", "inputs", example_inputs, lambda x: not isinstance(x, tuple | list)
        )
        pairs = zip(objective.terms, inputs, strict=True)
        rest = settings, full_params, has_aux, examples
        self._cores = [Core(term.model_fn, term.loss, x, *rest) for term, x in pairs]
        self._objective, self.has_aux = objective, False
        self.examples, self.coupled = examples, self._cores[0].coupled
        self._prepare(settings, self._cores[0].full_params)

    def _check(self, params: PyTree[Array]) -> None:
        for core in self._cores:
            core._check(params)

    def _check_examples(self, params: PyTree[Array]) -> None:
        for core in self._cores:
            core._check_examples(params)

    def _layout(self, params: PyTree) -> Layout:
        losses, traces = zip(*(core.traced(params) for core in self._cores), strict=True)
        return JoinedLayout(losses, traces, self.settings.options)

    def problem(
        self, params: PyTree[Array], batch: Any, full_params: PyTree[Array] | None, *, value: bool
    ) -> tuple[Any, Any]:
        batches = self._objective._batches(batch)
        found = [
            core.problem(params, one, full_params, value=value) for core, one in zip(self._cores, batches, strict=True)
        ]
        weights = vary_like(array_weights(self._objective), params)
        return WeightedProblems([problem for problem, _ in found], weights), [mask for _, mask in found]

    def _check_keys(self, problem: Any, key: Any) -> Any:
        return [check_draw_key(one, self.settings.options, key_of(key, i)) for i, one in enumerate(problem.problems)]

    def _layout_of(self, problem: Any) -> Any:
        layout = JoinedLayout.of_all(problem.problems, self.settings.options)
        self._check_layers(layout, problem.params, [one.inputs for one in problem.problems])
        return layout

    def _any_term_counts(self, problem: Any) -> Bool[Array, ""]:
        each = zip(problem.problems, problem.weights, strict=True)
        return jnp.any(jnp.stack([one.any_term_counts() & (weight > 0) for one, weight in each]))

    def _plain_gradient(self, problem: Any) -> tuple[Any, PyTree[Array]]:
        values, grads = zip(*map(super()._plain_gradient, problem.problems), strict=True)
        return weighted_sum(values, problem.weights), weighted_sum(grads, problem.weights)

    def _full_pass(self, given: PassInputs, *, gradient: bool) -> PassResult:
        layout, weights = given.layout, given.problem.weights
        each = zip(given.problem.problems, layout.functions, given.mask, given.key, strict=True)
        seen = [self._sums(PassInputs(*own, given.curvature, given.counts), layout, gradient) for own in each]
        values, grads, pairs = zip(*seen, strict=True)
        value = weighted_sum(values, weights) if gradient else None
        total = weighted_sum(grads, weights) if gradient else None
        added = [{**sums, "corrections": corrected} if corrected else sums for sums, corrected in pairs]
        joined = add_sums(layout, added, weights)
        return value, total, self._factors(layout, joined, joined.pop("corrections", ()), given.counts)


def core_of(model_fn: Any, loss: Any, example_inputs: Any, options: Mapping[str, Any]) -> Core:
    """The core of an objective, or of a model and a loss."""
    rest = Settings.of(options), options["full_params"], options["has_aux"], options["examples"]
    if not isinstance(model_fn, Objective):
        return Core(model_fn, loss, example_inputs, *rest)
    if loss is not None:
        raise TypeError(
            "an objective has its losses: pass kfac(objective, learning_rate=..., example_inputs=[...]), without loss,"
            " and learning_rate by name."
        )
    return ObjectiveCore(model_fn, example_inputs, *rest)
