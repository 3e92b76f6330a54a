"""KFAC as an optimizer of PyTorch: the step is one jitted function, the module's parameters are written in place."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import ggn_jax
from torch_bridge._check_module import check_initialised
from torch_bridge.batches import as_inputs, as_pair, check_tensors
from torch_bridge.losses import build_loss, find_loss
from torch_bridge.param_groups import USUAL_DAMPING, ParamGroup, split_rules, takes_a_module
from torch_bridge.tensors import jax_on, outside_graphs, to_jax, to_torch
from torch_bridge.trained import TrainedModule


class KFAC(torch.optim.Optimizer):
    """KFAC (Martens & Grosse 2015), or EKFAC, of a module: `ggn_jax.kfac` as a `torch.optim.Optimizer`.

    `step((inputs, targets))` computes loss, gradient and curvature of the batch, changes the module's parameters, and
    returns the loss before that; nothing is to be called before it, and the parameters' `grad` is neither read nor
    written. With the gradient `g` and the running average `F` of the batches' KFAC matrices, the step is
    `momentum * last step - lr * (F + damping I)^-1 g`; `ggn_jax.kfac` has it in full.

    A step compiles once for each shape of batch. `state_dict` holds everything but the module's: a run that is resumed
    with both, and torch's random state for dropout, goes on as if it had not stopped.

    Args:
        module: converted at the first step, in the mode that it is in, as by `from_module`; its parameters that require
            gradients are trained. In training mode, batch normalisation takes the batch's statistics, and new buffers
            are written into the module after the step, as its own forward pass does; dropout has a key for each
            example, from torch's generator. All else is constant: where another buffer or parameter, a part or its
            mode, an attribute that is a number, or a hook changes, parameters are replaced, or others require
            gradients, the next step raises.
        loss_func: a loss module as `make_grad_output_fn` takes it.
        lr: the learning rate, a number; or a `ggn_jax.QuadraticModel` (default), which chooses it and the momentum of
            each step, so that there is nothing to tune.
        damping: a number; or a rule that adapts it, `ggn_jax.LevenbergMarquardt` or `ggn_jax.SlopeDamping`. `"auto"`
            (default) is 1e-3 with a number as `lr`, else the rule that `ggn_jax.kfac` takes.
        weight_decay: a number; decoupled, as in `torch.optim.AdamW` (default 0). Like `lr` and `damping` where these
            are numbers, it is read from `param_groups` at each step, so that `torch.optim.lr_scheduler` works.
        seed: an integer, for what the curvature draws (default 0).
        **options: further arguments of `ggn_jax.kfac`, such as `momentum`, `kl_clip`, `fisher_type`,
            `inverse_interval`. `examples`, if not given, is `"coupled"` where a call of the module changes buffers.

    Raises:
        TypeError: for arguments of other kinds or names.
        ValueError: for numbers that are negative or not finite, here or in `param_groups` at a step, and for options
            that do not fit each other.
        RuntimeError: at a step, where the module has changed.
        NotImplementedError: at a step, for a module that is random in other ways than dropout.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(2, 3)
        >>> optimizer = KFAC(module, torch.nn.CrossEntropyLoss(), lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        >>> for batch in 3 * [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))]:
        ...     loss = optimizer.step(batch)
        ...     scheduler.step()
    """

    @takes_a_module
    def __init__(
        self,
        module: torch.nn.Module,
        loss_func: torch.nn.Module,
        lr: float | ggn_jax.QuadraticModel = ggn_jax.QuadraticModel(),
        *,
        damping: float | ggn_jax.LevenbergMarquardt | ggn_jax.SlopeDamping | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        seed: int = 0,
        **options: Any,
    ):
        check_initialised(module)
        if isinstance(damping, str) and damping == "auto" and not isinstance(lr, ggn_jax.QuadraticModel):
            damping = USUAL_DAMPING
        given: dict[str, Any] = {"lr": lr, "damping": damping, "weight_decay": weight_decay}
        numbers, self._rules = split_rules(given)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer; got {seed!r}.")
        # Refuses options that do not fit each other; the layers are found at the first step.
        nothing = np.zeros((1, 1), np.float32)
        ggn_jax.kfac(_no_model, ggn_jax.MSELoss(), given.pop("lr"), **given, example_inputs=nothing, **options)
        self._text, self._loss_tensors = find_loss(loss_func).serialise(loss_func)
        self._module, self._seed, self._options = module, seed, options
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        kinds = {(p.dtype, p.device) for p in self._trained.values()}
        if len(kinds) != 1:
            raise ValueError(
                "module must have parameters that require gradients, all of one dtype and device; got"
                f" {sorted(map(str, kinds))}."
            )
        ((_, self._device),) = kinds
        self._run: Callable[..., Any] | None = None
        self._kfac_state: Any = None
        self._saved: list[Tensor] | None = None  # a state that waits for the first step, which knows its structure
        self._count = 0
        super().__init__(list(self._trained.values()), numbers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group of parameters; the constructor adds the only one.

        Args:
            param_group: the group.

        Raises:
            NotImplementedError: for a second group.
        """
        if self.param_groups:
            raise NotImplementedError("KFAC has one group of parameters, all that the module has when it is made.")
        super().add_param_group(ParamGroup(param_group, self._rules))

    @outside_graphs
    @torch.no_grad()
    def step(self, batch: Any = None) -> Tensor:  # type: ignore[override]  # it needs no closure
        """Change the parameters by one step on a batch, and return its loss before that.

        Args:
            batch: a pair `(inputs, targets)`, or a mapping of tensors whose targets are its `labels`.

        Returns:
            The loss, a scalar tensor.

        Raises:
            ValueError, TypeError: for no batch, an empty one, one with targets outside of the loss's domain (on the
                CPU), and for others that do not fit.
            RuntimeError: where the module has changed since the first step.
            NotImplementedError: for a module that is random in other ways than dropout.
        """
        example, target = _checked(batch)
        with jax_on(self._device):
            params, inputs, targets = self._arrays(example, target)
            if self._run is None:
                self._start(example, inputs, params)
            assert self._run is not None
            self._check_unchanged()
            if self._device.type == "cpu":  # elsewhere this would wait for the device, and the loss is NaN
                self._check_targets(params, inputs, targets)
            batch = (inputs, self._module_fn.buffers(), self._module_fn.draw_seed()), targets
            numbers = {**self._numbers(), "seed": np.int64(self._seed), "count": np.int64(self._count)}
            # In one explicit transfer, which does not wait, and which guards against others let through.
            new, self._kfac_state, value, buffers = self._run(params, self._kfac_state, batch, jax.device_put(numbers))
            for name, parameter in self._trained.items():
                parameter.copy_(to_torch(new[name]))
            self._module_fn.write(buffers)
            self._count += 1
            return to_torch(value)

    def statistics(self) -> dict[str, Tensor]:
        """What there is to log of the last step, as scalar tensors by name: see `ggn_jax.StepStatistics`.

        Returns:
            `step`, `damping`, `step_norm`, `kl`, `learning_rate`, `momentum`, `clipped`, `rejected` and `skipped`, and
            the ratio that an adapted damping follows.

        Raises:
            RuntimeError: before the first step.

        Example:
            >>> import torch
            >>> optimizer = KFAC(torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss(), lr=0.1)
            >>> loss = optimizer.step((torch.randn(4, 2), torch.tensor([0, 1, 2, 0])))
            >>> float(optimizer.statistics()["step"])
            1.0
        """
        self._check_started("statistics")
        with jax_on(self._device):
            return {name: to_torch(x) for name, x in self._statistics(self._kfac_state).items()}

    @outside_graphs
    @torch.no_grad()
    def diagnose(self, batch: Any) -> ggn_jax.Diagnosis:
        """Why a run is slow: a report to print, with findings and advice, as `optimizer.diagnose` of `ggn_jax.kfac`.

        It takes as long as some steps with new inverses, and changes nothing, torch's random state included.

        Args:
            batch: as in `step`; one that the last steps have not seen tells more.

        Raises:
            RuntimeError: before the first step, and where the module has changed since.

        Example:
            >>> import torch
            >>> optimizer = KFAC(torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss(), lr=0.1)
            >>> batch = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
            >>> loss = optimizer.step(batch)
            >>> optimizer.diagnose(batch).steps
            1
        """
        self._check_started("diagnose")
        example, target = _checked(batch)
        self._check_unchanged()
        with jax_on(self._device):
            params, inputs, targets = self._arrays(example, target)
            examples = self._module_fn.arguments(inputs, self._module_fn.buffers(), _any_seed(self._module_fn))
            kfac = self._make(_shapes(examples), self._numbers())
            diagnosis: ggn_jax.Diagnosis = kfac.diagnose(self._kfac_state, params, (examples, targets))
            return diagnosis

    def _arrays(self, example: Any, target: Tensor) -> tuple[dict[str, jax.Array], Any, jax.Array]:
        """Parameters, inputs and targets."""
        inputs, targets = jax.tree.map(lambda tensor: to_jax(tensor.to(self._device)), (as_inputs(example), target))
        return {name: to_jax(parameter) for name, parameter in self._trained.items()}, inputs, targets

    def _check_started(self, caller: str) -> None:
        if self._kfac_state is None:
            raise RuntimeError(f"{caller} needs a state that has seen a batch: take a step first.")

    def _numbers(self) -> dict[str, Any]:
        """Those that may have changed."""
        return ParamGroup(self.param_groups[0], self._rules).numbers()

    def _start(self, example: Any, inputs: Any, params: dict[str, jax.Array]) -> None:
        """Convert the module and make the step's function and first state."""
        module_fn = TrainedModule(self._module, example, self._trained, self._options.get("examples"))
        loss = build_loss(self._text, [to_jax(tensor) for tensor in self._loss_tensors.values()])
        options = self._options | {"examples": module_fn.examples, "has_aux": module_fn.has_aux}

        def optimizer(examples: Any, numbers: dict[str, Any]) -> Any:
            """With numbers that may be traced, as functions of the count."""
            given: dict[str, Any] = {name: lambda _, value=value: value for name, value in numbers.items()}
            given |= self._rules
            rate = given.pop("lr")
            return ggn_jax.kfac(module_fn, loss, rate, **given, example_inputs=examples, **options)

        def run(params: Any, state: Any, batch: Any, numbers: dict[str, Any]) -> Any:
            key = jax.random.fold_in(jax.random.key(numbers.pop("seed")), numbers.pop("count"))
            batch = module_fn.arguments(*batch[0]), batch[1]
            kfac = optimizer(_shapes(batch[0]), numbers)
            value, grads, factors = kfac.value_and_grad_and_factors(params, batch, state, key=key)
            value, buffers = value if module_fn.has_aux else (value, {})
            updates, state = kfac.update(
                grads, state, params, factors=factors, key=key, batch=batch if kfac.needs_batch else None
            )
            return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), state, value, buffers

        examples = module_fn.arguments(inputs, module_fn.buffers(), _any_seed(module_fn))
        kfac = optimizer(examples, self._numbers())
        state = kfac.init(params)
        if self._saved is not None:
            state = self._restored(self._saved, state)

        def valid(params: Any, inputs: Any, targets: Any) -> Any:
            return jnp.all(loss.targets_valid(module_fn.zero_outputs(params, inputs), targets))

        def value(params: Any, inputs: Any, targets: Any) -> Any:
            return loss(module_fn.zero_outputs(params, inputs), targets)

        self._valid, self._value, self._make = jax.jit(valid), value, optimizer
        self._module_fn, self._kfac_state, self._saved = module_fn, state, None
        self._statistics, self._run = kfac.statistics, jax.jit(run, donate_argnums=1)

    def _check_targets(self, *args: Any) -> None:
        """Refuse targets outside of the loss's domain, if their values are known."""
        if not bool(self._valid(*args)):
            self._value(*args)  # raises, with the first place

    def _check_unchanged(self) -> None:
        """Refuse to go on with constants that are not the module's any more."""
        changed = self._module_fn.changed()
        changed += [n for n, p in self._module.named_parameters() if p.requires_grad != (n in self._trained)]
        if changed:
            raise RuntimeError(
                f"{', '.join(changed)} of the module changed or were replaced since the first step, which made them"
                " constants: make a new optimizer."
            )

    def _restored(self, saved: list[Tensor], fresh: Any) -> Any:
        """What was saved, as a state of the structure of a fresh one."""
        leaves, structure = jax.tree.flatten(fresh)
        fits = len(leaves) == len(saved) and all(
            tuple(tensor.shape) == leaf.shape for tensor, leaf in zip(saved, leaves, strict=True)
        )
        if not fits:
            raise ValueError(
                "the state that was loaded is that of another module or of other options: make the optimizer as it was"
                " made when the state was saved."
            )
        arrays = [to_jax(t.to(self._device)).astype(leaf.dtype) for t, leaf in zip(saved, leaves, strict=True)]
        return jax.tree.unflatten(structure, arrays)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as every optimizer does, with the curvature, momentum and the number of steps as `"kfac"`.

        Returns:
            A dict of tensors, numbers and strings.
        """
        tensors = self._saved
        if self._kfac_state is not None:
            with jax_on(self._device):
                tensors = [to_torch(leaf) for leaf in jax.tree.leaves(self._kfac_state)]
        own = {"state": tensors, "count": self._count, "seed": self._seed, "rules": self._rule_names()}
        return super().state_dict() | {"kfac": own}

    def __getstate__(self) -> Any:
        """Refuse to be pickled or copied: `torch.optim.Optimizer` would do so without the curvature and the module."""
        raise TypeError(
            "KFAC is not pickled or copied, since it holds a module and functions that are compiled for it: save"
            " state_dict() of it and of the module, and load them into a KFAC that is made as this one was."
        )

    def _rule_names(self) -> dict[str, str]:
        return {name: str(rule) for name, rule in self._rules.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer that was made with the same module and options.

        Args:
            state_dict: what its `state_dict` returned.

        Raises:
            ValueError: for the state of another kind of optimizer; at the next step, for that of other modules or
                options.
        """
        if "kfac" not in state_dict:
            raise ValueError("state_dict must be that of a torch_bridge.KFAC; it has no entry 'kfac'.")
        own = state_dict["kfac"]
        if own["rules"] != self._rule_names():
            raise ValueError(
                f"state_dict must be that of an optimizer with the same rules; it has {own['rules'] or 'numbers'}, and"
                f" this one has {self._rule_names() or 'numbers'}: make it as that one was made."
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "kfac"})
        self.param_groups = [ParamGroup(group, self._rules) for group in self.param_groups]
        self._count, self._seed = own["count"], own["seed"]
        self._saved = None if own["state"] is None else [tensor.clone() for tensor in own["state"]]
        self._run = self._kfac_state = None  # the next step starts from what was saved


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _checked(batch: Any) -> tuple[Any, Tensor]:
    """The inputs and targets of a batch of examples."""
    if batch is None or callable(batch):
        raise TypeError(
            f"batch must be a pair (inputs, targets); got {'none' if batch is None else 'a function'}: call"
            " step((inputs, targets)), which computes the loss and its gradient itself: no backward(), no closure."
        )
    example, target = as_pair("batch", batch)
    check_tensors("batch", batch)
    if not target.numel():
        raise ValueError("batch must hold at least one example; got none.")
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(as_inputs(example))]
    if any(shape[:1] != target.shape[:1] for shape in shapes):
        raise ValueError(
            f"inputs and targets must have one common leading batch axis; got inputs {', '.join(map(str, shapes))} and"
            f" targets {tuple(target.shape)}."
        )
    return example, target


def _any_seed(module_fn: TrainedModule) -> jax.Array | None:
    """One that is not torch's, where its draws are of no consequence."""
    return jnp.ones(1) if module_fn.random else None


def _no_model(params: Any, inputs: Any) -> Any:
    """In the place of a module that is not converted yet."""
    return inputs
