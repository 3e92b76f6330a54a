"""One pass over a batch: the loss, its gradient, and the factors; and where a model's blocks are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ggn_jax._checks import is_concrete
from ggn_jax._supported import check_exact, check_loss
from ggn_jax.fisher_type import FisherType
from ggn_jax.kronecker.checks import check_draws, check_independent, check_mask
from ggn_jax.kronecker.factors import assemble_blocks, captured_sums, check_mask_fits
from ggn_jax.kronecker.layout import Layout, Place, structure
from ggn_jax.kronecker.vectors import draws_signs
from ggn_jax.layers import capture, trace_model
from ggn_jax.layers.report import check_model
from ggn_jax.loss import Loss
from ggn_jax.operators.base import structure_of
from ggn_jax.operators.problem import Problem, pose
from ggn_jax.optimizer.curvature import Curvature, Factors, Settings, bases_of, initial


class Core:
    """A model and its loss, as an optimizer needs them; holds no arrays but those it was given."""

    def __init__(
        self, model_fn: Callable[[PyTree, PyTree], Array], loss: Loss, example_inputs: PyTree, settings: Settings
    ):
        check_loss(loss)
        if settings.options.fisher_type is FisherType.TYPE2:
            check_exact(loss)
        if not callable(model_fn):
            raise TypeError(f"model_fn must be a function of (params, inputs); got {type(model_fn).__name__}.")
        for path, leaf in jax.tree_util.tree_leaves_with_path(example_inputs):
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise TypeError(
                    f"example_inputs{jax.tree_util.keystr(path)} must be an array or a jax.ShapeDtypeStruct;"
                    f" got {type(leaf).__name__}."
                )
        self.model_fn, self.loss, self.settings = model_fn, loss, settings
        self.example_inputs = structure_of(example_inputs)
        self._values = example_inputs
        self._places: dict[Any, tuple[Place, ...]] = {}

    def start(self, params: PyTree[Array], damping: Array, full_params: PyTree[Array] | None) -> Curvature:
        """The state before the first step; refuses models whose examples depend on each other."""
        model_fn = self.model_of(params, full_params)
        check_model(model_fn, params, self.example_inputs)
        layout = self._layout(model_fn, params)
        leaves = jax.tree.leaves((self._values, params, full_params))
        if all(isinstance(leaf, jax.Array) and is_concrete(leaf) for leaf in leaves):
            check_independent(model_fn, params, self._values, layout.trace.outputs.dtype)
        return initial(layout, self.settings, damping)

    def model_of(self, params: PyTree[Array], full_params: PyTree[Array] | None) -> Callable[[PyTree, PyTree], Array]:
        """`model_fn`, as a function of the parameters that are not masked."""
        masked = any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
        if not masked:
            return self.model_fn
        if full_params is None:
            raise ValueError(
                "params hold optax.MaskedNode, as under optax.masked and optax.multi_transform, but model_fn needs all"
                " parameters: pass full_params=params to kfac (their values or shapes) and, as an extra argument, to"
                " each update; or close model_fn over those that are not trained."
            )

        def model_fn(params: PyTree, inputs: PyTree) -> Array:
            merged = jax.tree.map(lambda p, full: full if _is_masked(p) else p, params, full_params, is_leaf=_is_masked)
            return self.model_fn(merged, inputs)

        return model_fn

    def problem(self, params: PyTree[Array], batch: Any, full_params: PyTree[Array] | None) -> tuple[Problem, Any]:
        """The checked batch, and its mask."""
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
            raise TypeError(
                f"batch must be (inputs, targets) or (inputs, targets, mask); got {type(batch).__name__}"
                f"{f' of length {len(batch)}' if isinstance(batch, tuple | list) else ''}."
            )
        problem = pose(self.model_of(params, full_params), self.loss, params, tuple(batch[:2]))
        return problem, check_mask(batch[2] if len(batch) == 3 else None, problem)

    def places(self, params: PyTree[Array], full_params: PyTree[Array] | None) -> tuple[Place, ...]:
        """Where the blocks' entries are among the parameters."""
        shape = structure(params)
        if shape not in self._places:
            self._places[shape] = self._layout(self.model_of(params, full_params), params).places()
        return self._places[shape]

    def blank(self, params: PyTree[Array], full_params: PyTree[Array] | None) -> tuple[Layout, Curvature]:
        """The layout and an empty state, for the report."""
        layout = self._layout(self.model_of(params, full_params), params)
        return layout, jax.eval_shape(lambda: initial(layout, self.settings, jnp.zeros(())))

    def _layout(self, model_fn: Callable[[PyTree, PyTree], Array], params: PyTree) -> Layout:
        return Layout(self.loss, trace_model(model_fn, params, self.example_inputs), self.settings.options)

    def look(
        self, problem: Problem, mask: Any, key: Any, curvature: Curvature, *, gradient: bool
    ) -> tuple[Float[Array, ""] | None, PyTree[Array] | None, Factors]:
        """The loss, its gradient, and the factors if they are due: from one forward pass."""
        settings = self.settings
        layout = Layout.of(problem, settings.options)
        check_mask_fits(layout.trace, mask)
        keys = self._keys(problem, key)
        bases = bases_of(layout, curvature.inverses) if settings.ekfac else None
        counts = ~jnp.isinf(problem.reduction())

        def run(terms_at: Any, inputs: PyTree, operand: Any) -> Any:
            captured = None

            def see() -> Factors:
                seen = captured or capture(layout.trace, problem.params, inputs, layout.leaves)
                args = (layout, seen, terms_at, operand, keys, mask)
                blocks = assemble_blocks(layout, captured_sums(*args)).blocks
                blocks = jax.tree.map(lambda x: jnp.where(counts, x, 0), blocks)  # may be averaged with others'
                corrections: tuple[Array, ...] = ()
                if bases is not None:
                    corrected = captured_sums(*args, bases, leftovers=False)["corrected"]
                    corrections = tuple(value for values in corrected for value in values)
                return Factors(counts.astype(jnp.float32), blocks, corrections)

            value = grads = None
            if gradient:
                captured = capture(layout.trace, problem.params, inputs, layout.leaves, gradient=True)
                value, vector = jax.value_and_grad(lambda outputs: problem.loss(outputs, problem.targets))(
                    captured.outputs
                )
                grads = captured.gradient(vector)
            wanted = see() if settings.factor_interval == 1 else jax.eval_shape(see)
            _check_same(wanted, curvature, problem)
            if settings.factor_interval == 1:
                return value, grads, wanted
            due = (curvature.count % settings.factor_interval == 0) | (curvature.weight == 0)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), wanted)
            return value, grads, jax.lax.cond(due, see, lambda: nothing)

        result: tuple[Any, Any, Factors] = problem.sum_over_chunks(run)
        return result

    def _keys(self, problem: Problem, key: Any) -> Array | None:
        options = self.settings.options
        output = jax.ShapeDtypeStruct(problem.outputs.shape[1:], problem.outputs.dtype)
        signs = draws_signs(problem.loss, output, options.fisher_type, options.positions)
        # A training loop may pass a key whether one is needed or not.
        needed = options.fisher_type is FisherType.MC or signs
        return check_draws(problem, options, key if needed else None, 0)


def _check_same(wanted: Factors, curvature: Curvature, problem: Problem) -> None:
    if structure_of(wanted.blocks) != structure_of(curvature.blocks):
        raise ValueError(
            f"batch has inputs {structure_of(problem.inputs)}, for which the model's layers are others than for"
            " example_inputs; or the state is not this optimizer's."
        )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
