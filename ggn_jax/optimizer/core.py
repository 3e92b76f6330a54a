"""One pass over a batch: the loss, its gradient, and the factors; and what is static of a model."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jaxtyping import Array, Bool, Float, PyTree

from ggn_jax._checks import Examples, check_coupled, have_values
from ggn_jax._draws import example_keys
from ggn_jax._eager import compiled
from ggn_jax._hints import check_model_fn, example_inputs_named, model_errors_explained
from ggn_jax._model import Model
from ggn_jax._sharding import compiler_sharded, explicit_mesh, mesh_of, vary_like
from ggn_jax._supported import check_exact, check_supported
from ggn_jax._unbatched import map_batched
from ggn_jax.fisher_type import FisherType
from ggn_jax.joint import flatten_problem
from ggn_jax.kronecker.checks import check_draw_key, check_mask
from ggn_jax.kronecker.factors import assemble_blocks, captured_sums, check_mask_fits
from ggn_jax.kronecker.layout import Layout
from ggn_jax.kronecker.stacks import Stack, params_structure
from ggn_jax.kronecker.use_factors import find_taps, find_use_factors, mean_weights
from ggn_jax.layers import Trace, capture, trace_model
from ggn_jax.layers.check import COUPLED_WAY_OUT, NUM_CHECKED_EXAMPLES, check_independent
from ggn_jax.layers.report import check_model
from ggn_jax.likelihood import LikelihoodLoss, indefinite_error
from ggn_jax.loss import Loss
from ggn_jax.operators.base import structure_of
from ggn_jax.operators.examples import unpack_batch
from ggn_jax.operators.problem import Problem, make_problem
from ggn_jax.optimizer.checks import as_arrays, check_flag, check_static, check_structure
from ggn_jax.optimizer.curvature import (
    Curvature,
    Factors,
    bases_of,
    block_shapes,
    find_curvature,
    initial_curvature,
    zero_factors,
)
from ggn_jax.optimizer.masked import check_full, floating_part, is_masked, model_of_part
from ggn_jax.optimizer.numbers import zeros_like
from ggn_jax.optimizer.settings import Settings
from ggn_jax.optimizer.storage import as_plain
from ggn_jax.terms import split_terms

TARGETS = 64  # that a user's loss draws for each of a few examples, to check its curvature

Sums = tuple[dict[str, Any], Sequence[Sequence[Array]]]
"""A chunk's summands of the factors, and of EKFAC's eigenvalues."""

PassResult = tuple[Any, PyTree[Array] | None, Factors]
"""The loss, its gradient, and the factors."""


class PassInputs(NamedTuple):
    """What a pass over a batch is made of; for an objective, with a list for each of its functions."""

    problem: Any
    layout: Any
    mask: Any
    key: Any
    curvature: Curvature
    counts: Bool[Array, ""]
    """Whether some target is not ignored."""


class StaticInfo(NamedTuple):
    """What the shapes of parameters and example inputs determine."""

    stacks: tuple[Stack, ...]
    """Which parameter entries the blocks act on."""
    curvature: Curvature
    factors: Factors
    """As `jax.ShapeDtypeStruct`s."""


class Core:
    """A model and its loss, as an optimizer needs them; holds no arrays but the example inputs."""

    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], Array],
        loss: Loss,
        example_inputs: PyTree,
        settings: Settings,
        full_params: PyTree | None,
        has_aux: bool,
        examples: Examples,
    ):
        check_static("has_aux", has_aux)
        check_flag("has_aux", has_aux)
        check_static("examples", examples)
        self.examples, self.coupled = examples, check_coupled(examples, settings.chunk_size)
        check_static("model_fn", model_fn)
        check_static("loss", loss)
        check_model_fn(model_fn)
        check_supported(loss)
        if settings.options.fisher_type is FisherType.TYPE2:
            check_exact(loss)
        self.model_fn, self.loss, self.has_aux = model_fn, loss, has_aux
        self._inputs = as_arrays("example_inputs", example_inputs)
        self.example_inputs = structure_of(self._inputs)
        full_params = as_arrays("full_params", full_params)
        self._prepare(settings, structure_of(full_params))
        if full_params is not None:
            # Later on, parameters have values for a part of the model only.
            part = floating_part(full_params)
            self._check_independent(model_of_part(model_fn, part, full_params), part, full_params)

    def _prepare(self, settings: Settings, full_params: PyTree | None) -> None:
        self.settings, self.full_params = settings, full_params
        self._static_infos: dict[Any, StaticInfo] = {}
        self._compiled_pass = compiled(self._compute_pass)

    def start(self, params: PyTree[Array], damping: Array) -> Curvature:
        """The state before the first step; refuses models whose examples depend on each other.

        Without values, as under `jit`, that cannot be seen.
        """
        if not jax.tree.leaves(params):
            # `optax.tree.map_params` asks for the state of a stand-in to learn where parameters are: nowhere in here.
            count, skipped, blocks, inverses = (jnp.zeros((), jnp.int32) for _ in range(4))
            return Curvature(count, skipped, jnp.zeros((), jnp.float32), damping, blocks, inverses)
        self._check(params)
        layout = self._layout(params)
        layout.warn()
        if not is_masked(params):
            self._check_examples(params)
        curvature = initial_curvature(layout, self.settings, damping)
        self._remember(params, layout, curvature)
        return self._placed(as_plain(curvature), params)

    def placed(self, state: PyTree[Array], params: PyTree[Array], spec: PartitionSpec | None = None) -> PyTree[Array]:
        """The state on all devices of the mesh, as steps return it; else the second step would be recompiled."""
        explicit, spec = explicit_mesh(params), spec or PartitionSpec()
        if any(map(_is_traced, jax.tree.leaves((state, params)))):
            return state if explicit is None else reshard(state, NamedSharding(explicit, spec))
        mesh = self.settings.mesh or mesh_of(params)
        return state if mesh is None else jax.device_put(state, NamedSharding(mesh, spec))

    def _placed(self, curvature: Curvature, params: PyTree[Array]) -> Curvature:
        """Blocks and inverses sharded over the devices of `mesh`, and all else replicated."""
        cut = self.settings.spread.spec
        blocks, inverses = (self.placed(tree, params, cut) for tree in (curvature.blocks, curvature.inverses))
        rest = self.placed(curvature._replace(blocks=(), inverses=()), params)
        return rest._replace(blocks=blocks, inverses=inverses)

    def _check(self, params: PyTree[Array]) -> None:
        check_model(self.model_fn, params, self.example_inputs)

    def _check_examples(self, params: PyTree[Array]) -> None:
        self._check_independent(self.model_fn, params)

    def known(self, params: PyTree[Array]) -> StaticInfo:
        self._check(params)
        shape = params_structure(params)
        if shape not in self._static_infos:
            layout = self._layout(params)
            self._remember(
                params, layout, jax.eval_shape(lambda: initial_curvature(layout, self.settings, jnp.zeros(())))
            )
        return self._static_infos[shape]

    def _remember(self, params: PyTree[Array], layout: Layout, curvature: Curvature) -> None:
        factors = jax.eval_shape(lambda: zero_factors(block_shapes(layout), self.settings))
        self._static_infos[params_structure(params)] = StaticInfo(layout.stacks, structure_of(curvature), factors)

    def curvature_in(self, state: Any, params: PyTree[Array]) -> Curvature:
        """The curvature in a state that may be wrapped, also array by array."""
        try:
            return check_structure("the state's Curvature", find_curvature(state), self.known(params).curvature)
        except ValueError as error:
            if self.full_params is None or is_masked(params):
                raise
            raise ValueError(
                "params must be masked as the optimizer's are, whose state is that of fewer parameters: pass"
                " jax.tree.map(lambda keep, p: p if keep else optax.MaskedNode(), mask, params), and all of them as"
                " full_params=params."
            ) from error

    def problem(
        self, params: PyTree[Array], batch: Any, full_params: PyTree[Array] | None, *, value: bool
    ) -> tuple[Problem, Any]:
        """The checked batch, and its mask; `value` says whether the loss's value is needed, and so its targets."""
        pair, mask = unpack_batch("batch", batch)
        if full_params is not None:
            full_params = check_full(full_params, self.full_params)
        model_fn = model_of_part(self.model_fn, params, full_params)
        fisher_type = None if value else self.settings.options.fisher_type
        args = model_fn, self.loss, params, pair, self.settings.chunk_size, fisher_type
        with example_inputs_named(pair, self.example_inputs):
            problem = make_problem(*args, has_aux=self.has_aux, examples=self.examples)
        problem.check_chunks()
        return problem, check_mask(mask, problem)

    def blank(self, params: PyTree[Array]) -> tuple[Layout, Curvature]:
        """The layout and an empty state, for the report."""
        return self._layout(params), self.known(params).curvature

    def _layout(self, params: PyTree) -> Layout:
        return Layout(*self.traced(params), self.settings.options)

    def traced(self, params: PyTree) -> tuple[Loss, Trace]:
        """The loss of one array of outputs, and the layers."""
        model_fn = model_of_part(self.model_fn, params, self.full_params)
        like = structure_of(params)
        with model_errors_explained(params, self.example_inputs, one_example=not self.coupled):
            model_fn, loss = flatten_problem(model_fn, self.loss, like, self.example_inputs, self.has_aux)
            trace = trace_model(Model(model_fn, self.has_aux), like, self.example_inputs, coupled=self.coupled)
        return loss, trace

    def run_pass(self, problem: Problem, mask: Any, key: Any, curvature: Curvature, *, gradient: bool) -> PassResult:
        """The loss, with aux if the model has some, its gradient, and the factors if they are due: from one pass."""
        return self._compiled_pass(problem, mask, self._check_keys(problem, key), curvature, gradient)

    def _compute_pass(self, problem: Any, mask: Any, key: Any, curvature: Curvature, gradient: bool) -> PassResult:
        counts = self._any_term_counts(problem)
        given = PassInputs(problem, self._layout_of(problem), mask, key, curvature, counts)
        if self.settings.factor_interval == 1:
            return self._full_pass(given, gradient=gradient)
        # Between factors, a step costs what the gradient costs: the model is neither mapped over examples nor asked for
        # what factors would be made of, which would be computed for the branch that is not taken. So factors have a
        # forward pass of their own. The gradient stays outside of the branches, where XLA compiles convolutions well.
        value, grads = self._plain_gradient(problem) if gradient else (None, None)

        def factors() -> Factors:
            return vary_like(self._full_pass(given, gradient=False)[2], problem)

        def none() -> Factors:
            zeros = zeros_like(jax.eval_shape(factors))
            return vary_like(zeros._replace(batches=counts.astype(jnp.float32)), problem)

        due = (curvature.count % self.settings.factor_interval == 0) | (curvature.weight == 0)
        return value, grads, jax.lax.cond(due, factors, none)

    def _check_keys(self, problem: Any, key: Any) -> Any:
        return check_draw_key(problem, self.settings.options, key)

    def _layout_of(self, problem: Any) -> Any:
        layout = Layout.of(problem, self.settings.options)
        self._check_layers(layout, problem.params, problem.inputs)
        return layout

    def _any_term_counts(self, problem: Any) -> Bool[Array, ""]:
        counts: Bool[Array, ""] = problem.any_term_counts()
        return counts

    def _full_pass(self, given: PassInputs, *, gradient: bool) -> PassResult:
        value, grads, sums = self._sums(given, given.layout, gradient)
        return value, grads, self._factors(given.layout, *sums, given.counts)

    def _plain_gradient(self, problem: Any) -> tuple[Any, PyTree[Array]]:
        """The loss, with aux if the model has some, and its gradient: no more than `jax.value_and_grad`."""

        def run(terms_at: Any, inputs: PyTree, operand: Any) -> Any:
            def value(params: PyTree[Array]) -> Any:
                outputs, aux = problem.model_fn.with_aux(params, inputs)
                return terms_at(outputs, operand).loss_value(), aux

            return jax.value_and_grad(value, has_aux=True)(problem.params)

        (value, aux), grads = problem.sum_over_chunks(run)
        return (value, aux) if self.has_aux else value, grads

    def _sums(self, given: PassInputs, whole: Layout, gradient: bool) -> tuple[Any, Any, Sums]:
        """A function's loss, gradient, and the sums that give the factors; `whole` has all blocks of the state."""
        problem, layout, mask, key, curvature, counts = given
        settings = self.settings
        check_mask_fits(layout.trace, mask)
        bases = bases_of(whole, curvature.inverses) if settings.ekfac else None
        size = problem.outputs.shape[0]
        weights = mean_weights(layout, mask, size, counts)

        def run(terms_at: Any, inputs: PyTree, operand: Any, extra: dict[str, Any]) -> Any:
            use_factors = find_use_factors(layout, extra["mask"], weights)
            # EKFAC's corrections need the gradient of each example.
            taps = {} if settings.ekfac else find_taps(use_factors)
            captured = capture(layout.trace, problem.params, inputs, layout.leaves, gradient=gradient, taps=taps)
            value = grads = None
            if gradient:
                value, vector = jax.value_and_grad(lambda outputs: terms_at(outputs, operand).loss_value())(
                    captured.outputs
                )
                grads = captured.gradient(vector)
            args = (layout, use_factors, captured, terms_at, operand, extra["keys"])
            sums, corrected = captured_sums(*args), ()
            if bases is not None:
                corrected = captured_sums(*args, bases, unassigned=False)["corrections"]
            return value, captured.aux if gradient else None, grads, vary_like((sums, corrected), problem)

        extra = {"keys": None if key is None else example_keys(key, 0, size), "mask": mask}
        value, aux, grads, sums = problem.sum_over_chunks(run, extra)
        if grads is not None:
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, problem.params)
            if self.has_aux:
                # A model that is mapped over examples gives the aux of each of them. That of the batch needs another
                # call, of which the compiler keeps what aux depends on.
                value = value, aux if self.coupled else problem.model_fn.with_aux(problem.params, problem.inputs)[1]
        return value, grads, sums

    def _factors(self, layout: Layout, sums: dict[str, Any], corrected: Any, counts: Bool[Array, ""]) -> Factors:
        if "unassigned" in sums:  # factors have their weight already; 0 for a batch in which no term counts
            sums["unassigned"] = [jnp.where(counts, x, 0) for x in sums["unassigned"]]
        blocks = assemble_blocks(layout, sums).blocks
        batches = counts.astype(jnp.float32)
        factors: Factors = as_plain(Factors(batches, batches, blocks, _stacked_corrections(layout, corrected)))
        return factors

    def _check_layers(self, layout: Layout, params: PyTree[Array], inputs: Any) -> None:
        """Refuse a batch for which the layers have other blocks than the state."""
        if layout.stacks != self.known(params).stacks:
            raise ValueError(
                f"batch has inputs {structure_of(inputs)}, for which the model's layers have other factors than"
                " for example_inputs."
            )

    def _check_independent(self, model_fn: Any, params: PyTree, full_params: PyTree | None = None) -> None:
        if have_values((self._inputs, params, full_params)):
            params = jax.tree.map(jnp.asarray, params)
            model_fn, _ = flatten_problem(model_fn, self.loss, params, self._inputs, self.has_aux)
            model_fn = Model(model_fn, self.has_aux)
            outputs = jax.eval_shape(compiler_sharded(model_fn), params, self._inputs)
            if not self.coupled:
                check_independent(model_fn, params, self._inputs, outputs.dtype, COUPLED_WAY_OUT)
            self._check_curvature(model_fn, params)

    def _check_curvature(self, model_fn: Any, params: PyTree) -> None:
        """Refuse a user's loss whose Hessians are indefinite, at targets that it draws for a few examples."""
        fisher_type = self.settings.options.fisher_type
        if isinstance(self.loss, LikelihoodLoss) and fisher_type in (FisherType.TYPE2, FisherType.MC):
            inputs = self._inputs if self.coupled else map_batched(lambda x: x[:NUM_CHECKED_EXAMPLES], self._inputs)
            part = float(_indefinite_part(model_fn, self.loss, params, inputs))
            if part:
                raise indefinite_error(self.loss, f"{part:.1%} of the targets that it draws for a few examples")


@eqx.filter_jit
@compiler_sharded
def _indefinite_part(model_fn: Any, loss: LikelihoodLoss, params: PyTree, inputs: PyTree) -> Float[Array, ""]:
    """The fraction of drawn targets for which the loss's Hessian has a negative eigenvalue, for a few examples."""
    outputs = model_fn(params, inputs)

    def indefinite(key: Array) -> Array:
        terms = split_terms(loss, outputs, loss.draw_targets(key, outputs, batch=True), batch=True)
        return terms.map(loss._indefiniteness) < 0

    return jnp.mean(jax.vmap(indefinite)(jax.random.split(jax.random.key(0), TARGETS)))


def _stacked_corrections(layout: Layout, corrected: Sequence[Sequence[Array]]) -> tuple[Array, ...]:
    """The corrections of all layers' blocks, stacked like the blocks."""
    members: list[Any] = [value for values in corrected for value in values]
    stacked = layout.stack_all([*members, *[()] * (len(layout.members) - len(members))])
    return tuple(value for value in stacked if isinstance(value, jax.Array))


def _is_traced(leaf: Any) -> bool:
    try:
        return isinstance(leaf, jax.Array) and leaf.is_fully_addressable is None
    except jax.errors.ConcretizationTypeError:
        return True
