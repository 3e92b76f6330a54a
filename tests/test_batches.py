"""KFAC and EKFAC of an iterable of batches are those of all data as one batch."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse.linalg
from designs import covering, swept
from jax.flatten_util import ravel_pytree
from oracles import dense_ggn

import ggn_jax

KFAC, EKFAC, KFOC = ggn_jax.KFACLinearOperator, ggn_jax.EKFACLinearOperator, ggn_jax.KFOCLinearOperator
CE = ggn_jax.CrossEntropyLoss()


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng([seed, *shape]).normal(size=shape) / 2)


def tanh_net(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["1"]["w"] + p["1"]["b"][None]) @ p["2"]["w"] + p["2"]["b"][None]


PARAMS = {"1": {"w": normal(3, 4), "b": normal(4)}, "2": {"w": normal(4, 2), "b": normal(2)}}
INPUTS, LABELS = normal(7, 3), jax.device_put(np.arange(7) % 2)


def as_batches(*sizes: int) -> list[tuple[jax.Array, jax.Array]]:
    ends = np.cumsum(sizes)
    return [(INPUTS[end - n : end], LABELS[end - n : end]) for n, end in zip(sizes, ends, strict=True)]


BIASES = [*range(4), 16, 17]  # among all parameters
LOSSES = {
    "mean": CE,
    "sum": ggn_jax.CrossEntropyLoss(reduction="sum"),
    "weights": ggn_jax.CrossEntropyLoss(weight=jnp.array([1.0, 3.0]), label_smoothing=0.2),
    "ignored": ggn_jax.CrossEntropyLoss(ignore_index=1),
}


FISHER_TYPES = ["type-2", "mc", "empirical"]
EACH = [(KFAC, "mean", "mc"), (KFAC, "sum", "empirical"), (KFAC, "weights", "type-2")]
EACH += [(EKFAC, "ignored", "type-2"), (EKFAC, "ignored", "empirical"), (EKFAC, "weights", "mc")]


@pytest.mark.parametrize(("cls", "name", "fisher_type"), swept([*product([KFAC, EKFAC], LOSSES, FISHER_TYPES)], EACH))
@pytest.mark.by_default("EKFACLinearOperator-weights-mc", "KFACLinearOperator-sum-empirical")
def test_batches_are_one_batch(cls: Any, name: str, fisher_type: str) -> None:
    """Of any sizes, and one where all that it holds is ignored; with the same draws."""
    loss = LOSSES[name]
    options: dict[str, Any] = {"fisher_type": fisher_type, "bias": "separate"}
    if fisher_type == "mc":
        options |= {"key": jax.random.key(1), "mc_samples": 2}
    whole = cls(tanh_net, loss, PARAMS, (INPUTS, LABELS), **options)
    operator = cls.from_batches(tanh_net, loss, PARAMS, as_batches(3, 1, 3), **options)
    assert jax.tree.structure(operator) == jax.tree.structure(whole)
    np.testing.assert_allclose(operator.as_matrix(), whole.as_matrix(), atol=1e-14)


@covering(1, name=["weights", "ignored"], fisher_type=["type-2", "mc"], bias=["joint", "separate"])
@pytest.mark.by_default("weights-type-2-joint")
def test_kfoc_of_batches_is_that_of_one_batch(name: str, fisher_type: str, bias: str) -> None:
    """By passes, which are few; what has no layer as well."""
    params = {**PARAMS, "s": normal(2, seed=1)}

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return tanh_net(p, x) * p["s"][None]

    options: dict[str, Any] = {"fisher_type": fisher_type, "bias": bias}
    if fisher_type == "mc":
        options |= {"key": jax.random.key(1), "mc_samples": 2}
    whole = KFOC(model_fn, LOSSES[name], params, (INPUTS, LABELS), **options)
    operator = KFOC.from_batches(model_fn, LOSSES[name], params, as_batches(3, 1, 3), progress=True, **options)
    assert jax.tree.structure(operator) == jax.tree.structure(whole)
    np.testing.assert_allclose(operator.as_matrix(), whole.as_matrix(), atol=1e-14)


@pytest.mark.sweep
def test_batches_of_masked_sequences_with_leftovers() -> None:
    """Scales have their own blocks; a chunk size does not matter, nor does a progress bar."""
    params = {"s": normal(3), "w": normal(3, 2)}
    inputs, mask = normal(6, 4, 3), jnp.arange(4)[None] < jnp.array([1, 4, 2, 3, 4, 1])[:, None]
    targets = jnp.where(mask, jnp.arange(24).reshape(6, 4) % 2, -100)

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x * p["s"][None, None]) @ p["w"]

    loss = ggn_jax.CrossEntropyLoss(class_axis=-1)
    options = {"fisher_type": "type-2", "key": jax.random.key(0)}
    whole = EKFAC(model_fn, loss, params, (inputs, targets), mask=mask, **options)
    batches = [(inputs[:4], targets[:4], mask[:4]), (inputs[4:], targets[4:], mask[4:])]
    operator = EKFAC.from_batches(model_fn, loss, params, batches, progress=True, chunk_size=3, **options)
    np.testing.assert_allclose(operator.as_matrix(), whole.as_matrix(), atol=1e-14)


def test_nothing_counts_in_any_batch() -> None:
    loss = ggn_jax.CrossEntropyLoss(ignore_index=0, reduction="mean")
    batches = [(INPUTS[:1], LABELS[:1]), (INPUTS[2:3], LABELS[2:3])]
    assert float(KFAC.from_batches(tanh_net, loss, PARAMS, batches, fisher_type="type-2").trace()) == 0


def test_errors_of_batches() -> None:
    def make(batches: Any, cls: Any = KFAC, **options: Any) -> Any:
        return cls.from_batches(tanh_net, CE, PARAMS, batches, **{"fisher_type": "type-2", **options})

    with pytest.raises(ValueError, match="at least one batch"):
        make([])
    with pytest.raises(TypeError, match="iterable"):
        make(3)
    with pytest.raises(TypeError, match="batch 1 must be"):
        make([(INPUTS, LABELS), INPUTS])
    with pytest.raises(TypeError, match="twice"):
        make(iter(as_batches(3, 4)), EKFAC)
    with pytest.raises(TypeError, match="KFOC goes over the batches many times, but list_iterator is an iterator"):
        make(iter(as_batches(3, 4)), KFOC)
    with pytest.raises(ValueError, match="at least one batch"):
        make([], KFOC)
    with pytest.raises(NotImplementedError, match="batch 0: KFOC does not use a mask"):
        make([(*as_batches(7)[0], jnp.ones((7, 2), bool))], KFOC)
    with pytest.raises(ValueError, match=r"batch 1: targets must be class indices from 0 to 1"):
        make([(INPUTS, LABELS), (INPUTS, LABELS + 5)], KFOC)
    with pytest.raises(TypeError, match=r"from_batches got an unexpected keyword argument 'mask'\. Masks are part"):
        make(as_batches(3, 4), KFOC, mask=None)
    with pytest.raises(TypeError, match="from_batches got an unexpected keyword argument 'mask'"):
        make(as_batches(3, 4), mask=None)
    with pytest.raises(ValueError, match="sharing must be"):
        make(as_batches(3, 4), sharing="both")
    with pytest.raises(NotImplementedError, match="forward-only"):
        make(as_batches(3, 4), EKFAC, fisher_type="forward-only")

    class Shrinking:
        def __init__(self) -> None:
            self.sizes = [(3, 4), (3,)]

        def __iter__(self) -> Any:
            return iter(as_batches(*self.sizes.pop(0)))

    with pytest.raises(ValueError, match="got sums over 7 examples and over 3"):
        make(Shrinking(), EKFAC)
    with pytest.raises(ValueError, match="two passes over the batches gave different data"):
        make(Shrinking(), KFOC)

    class Redrawn:
        def __iter__(self) -> Any:
            self.passes = getattr(self, "passes", 0) + 1
            return iter([(self.passes * x, y) for x, y in as_batches(3, 4)])

    with pytest.raises(ValueError, match="two passes over the batches gave different data: switch off what draws"):
        make(Redrawn(), EKFAC)


def test_errors_name_the_batch_and_what_differs_from_the_first() -> None:
    def make(second: Any, model_fn: Any = tanh_net) -> Any:
        batches = [(INPUTS[:3], LABELS[:3]), second]
        return KFAC.from_batches(model_fn, CE, PARAMS, batches, fisher_type="forward-only")

    x, y = INPUTS[3:], LABELS[3:]
    with pytest.raises(ValueError, match="batch 1: targets must be class indices from 0 to 1"):
        make((x, y + 5))
    with pytest.raises(TypeError, match=r"batch 1: inputs\['a'\] must be a JAX or NumPy array, or a number; got str"):
        make(({"a": "text"}, y))
    with pytest.raises(ValueError, match=r"batch 1: inputs must be like batch 0's, PyTreeDef\(\*\)"):
        make(({"a": x}, y))
    with pytest.raises(ValueError, match=r"batch 1: .* like .*float64 of shape \(3, 3\) but.*got float32 of"):
        make((x.astype("float32"), y))
    with pytest.raises(ValueError, match=r"batch 1: inputs must be like .*; got float64 of shape \(4, 1, 3\)"):
        make((x[:, None], y))
    with pytest.raises(TypeError, match=r"(?s)batch 1: .*sizes differ: inputs \(4, 2\), for batch 0 \(3, 3\)"):
        make((x[:, :2], y))
    with pytest.raises(ValueError, match=r"batch 1: mask of shape \(4, 5\) fits no layer"):
        make((x, y, jnp.ones((4, 5), bool)))
    with pytest.raises(TypeError, match=r"batch 1 must be .*; got a tuple of length 4"):
        make((x, y, y, y))
    with pytest.raises(ValueError, match=r"batch 1: the model's layers differ from those of .*: inputs \(4, 2\), for"):
        make((x[:, :2], y), lambda p, x: x @ p["1"]["w"][: x.shape[1], :2])

    class OwnError(ValueError):
        def __init__(self, number: int, text: str):
            super().__init__(number, text)

    def model_fn(p: Any, x: jax.Array) -> jax.Array:
        if x.shape[0] == 4:
            raise OwnError(1, "model")
        return tanh_net(p, x)

    with pytest.raises(OwnError):
        make((x, y), model_fn)


class Once:
    """A loader that is empty from its second pass on, or from a later one."""

    def __init__(self, passes: int = 1):
        self.left = passes

    def __iter__(self) -> Any:
        self.left -= 1
        return iter(as_batches(3, 4) if self.left >= 0 else [])


def test_a_loader_that_cannot_be_gone_over_again() -> None:
    """Where it is found, by the operators that need several passes; a function is not called."""
    options = {"fisher_type": "type-2"}
    jacobian = ggn_jax.JacobianLinearOperator.from_batches(tanh_net, PARAMS, Once())
    ggn = ggn_jax.GGNLinearOperator.from_batches(tanh_net, CE, PARAMS, Once())
    for call in (
        lambda: EKFAC.from_batches(tanh_net, CE, PARAMS, Once(), **options),
        lambda: KFOC.from_batches(tanh_net, CE, PARAMS, Once(2), **options),
        lambda: jacobian.mv(PARAMS),
        lambda: ggn.mv(PARAMS),
    ):
        with pytest.raises(ValueError, match="batches yielded none in a later pass; Once is empty then: pass a list"):
            call()
    with pytest.raises(TypeError, match="got function: pass what it returns, as a list or a loader"):
        ggn_jax.GGNLinearOperator.from_batches(tanh_net, CE, PARAMS, lambda: as_batches(7))


def test_an_iterator_that_was_used_is_empty() -> None:
    used = iter(as_batches(3, 4))
    list(used)
    with pytest.raises(ValueError, match="yielded none, as an iterator does that was used before"):
        KFAC.from_batches(tanh_net, CE, PARAMS, used, fisher_type="type-2")


def test_a_weight_for_each_datum_is_refused() -> None:
    """It would be used again for each batch; one for each output is not."""
    batches = [(INPUTS[:3], jnp.ones((3, 2))), (INPUTS[3:6], jnp.ones((3, 2)))]
    for weight in (jnp.ones((3, 2)), jnp.ones((3, 1))):
        loss = ggn_jax.BCEWithLogitsLoss(weight)
        with pytest.raises(ValueError, match=r"weight of shape .* chunk_size to bound the memory"):
            KFAC.from_batches(tanh_net, loss, PARAMS, batches, fisher_type="forward-only")
    loss = ggn_jax.BCEWithLogitsLoss(pos_weight=jnp.ones((1, 2)))
    KFAC.from_batches(tanh_net, loss, PARAMS, batches, fisher_type="forward-only")


PRODUCTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "GGN, drawn": (ggn_jax.GGNLinearOperator, {"mc_samples": 2, "key": jax.random.key(1)}),
    "EF": (ggn_jax.EFLinearOperator, {}),
    "Hessian": (ggn_jax.HessianLinearOperator, {"chunk_size": 2}),
    "diagonal, drawn": (ggn_jax.GGNDiagonalLinearOperator, {"mc_samples": 2, "key": jax.random.key(1)}),
}


@covering(1, name=PRODUCTS, ignored=[True, False])
@pytest.mark.by_default("EF-False", "diagonal, drawn-False")
def test_products_over_batches_are_those_of_one_batch(name: str, ignored: bool) -> None:
    """Of NumPy arrays, uneven sizes, and a batch where all is ignored."""
    cls, options = PRODUCTS[name]
    batches = [tuple(map(np.asarray, batch)) for batch in as_batches(1, 3, 3)]
    loss = ggn_jax.CrossEntropyLoss(weight=jnp.array([1.0, 3.0]), ignore_index=0) if ignored else CE
    whole = cls(tanh_net, loss, PARAMS, (INPUTS, LABELS), **options)
    operator = cls.from_batches(tanh_net, loss, PARAMS, batches, **options)
    matrix = np.asarray(whole.as_matrix())
    np.testing.assert_allclose(ravel_pytree(operator.mv(PARAMS))[0], matrix @ ravel_pytree(PARAMS)[0], atol=1e-14)
    np.testing.assert_allclose(operator.as_matrix(), matrix, atol=1e-14)
    np.testing.assert_allclose(operator.submatrix("*/b"), matrix[np.ix_(BIASES, BIASES)], atol=1e-14)
    assert lx.is_positive_semidefinite(operator) == lx.is_positive_semidefinite(whole)


def test_solving_over_batches_on_the_host() -> None:
    operator = ggn_jax.GGNLinearOperator.from_batches(tanh_net, CE, PARAMS, as_batches(4, 3), progress=True)
    exact = dense_ggn(tanh_net, CE, PARAMS, (INPUTS, LABELS))
    np.testing.assert_allclose(operator.as_matrix(), exact, atol=1e-14)
    matrix = exact + 0.1 * np.eye(operator.in_size())
    vector = np.ones(operator.in_size())
    solution, failed = scipy.sparse.linalg.cg(operator.damped(0.1).to_scipy(), vector, rtol=1e-13)
    assert not failed
    np.testing.assert_allclose(solution, np.linalg.solve(matrix, vector), rtol=1e-9)
    with pytest.raises(NotImplementedError, match=r"not inside of jit.*to_scipy"):
        lx.linear_solve(operator.damped(0.1), PARAMS, lx.CG(rtol=1e-6, atol=1e-6))


def test_what_products_over_batches_refuse() -> None:
    cls = ggn_jax.GGNLinearOperator
    with pytest.raises(TypeError, match="an iterator that is empty after one pass"):
        cls.from_batches(tanh_net, CE, PARAMS, iter(as_batches(7)))
    with pytest.raises(TypeError, match="batches must be an iterable"):
        cls.from_batches(tanh_net, CE, PARAMS, 3)
    with pytest.raises(ValueError, match="at least one batch"):
        cls.from_batches(tanh_net, CE, PARAMS, [])
    with pytest.raises(ValueError, match=r"batch 0: .*one common leading batch axis"):
        cls.from_batches(tanh_net, CE, PARAMS, [(INPUTS, LABELS[1:])])
    with pytest.raises(ValueError, match=r"batch 0: a mask"):
        cls.from_batches(tanh_net, CE, PARAMS, [(INPUTS, LABELS, np.ones((7, 2), bool))])
    weighted = ggn_jax.BCEWithLogitsLoss(weight=jnp.ones((7, 2)))
    with pytest.raises(ValueError, match=r"batch 0: the loss must be the same for each batch"):
        cls.from_batches(tanh_net, weighted, PARAMS, [(INPUTS, jnp.zeros((7, 2)))])
    operator = cls.from_batches(tanh_net, CE, PARAMS, [(INPUTS, LABELS), (INPUTS, LABELS + 5)])
    with pytest.raises(ValueError, match=r"batch 1: .*targets"):
        operator.mv(PARAMS)

    class Augmented:
        def __init__(self) -> None:
            self.random = np.random.default_rng(0)

        def __iter__(self) -> Any:
            yield self.random.normal(size=INPUTS.shape), LABELS

    operator = cls.from_batches(tanh_net, CE, PARAMS, Augmented())
    operator.mv(PARAMS)
    with pytest.raises(ValueError, match="different data"):
        operator.mv(PARAMS)

    class Shuffled:
        def __init__(self) -> None:
            self.turn = 0

        def __iter__(self) -> Any:
            self.turn += 1
            yield INPUTS[:: (-1) ** self.turn], LABELS[:: (-1) ** self.turn]

    operator = cls.from_batches(tanh_net, CE, PARAMS, Shuffled())
    first = operator.mv(PARAMS)["1"]["w"]
    np.testing.assert_allclose(operator.mv(PARAMS)["1"]["w"], first, atol=1e-15)
