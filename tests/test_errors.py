"""Bad input is refused with an error that names the argument, what came and what was wanted."""

import enum
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import checkify

from ggn_jax import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    FisherType,
    LossHessian,
    MSELoss,
    make_batch_grad_output_fn,
    make_grad_output_fn,
    make_grad_output_sampler,
)

KEY = jax.random.key(0)


def raises(error: type[Exception], *words: str):
    """The message holds all the words, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(word) for word in words))


@pytest.mark.parametrize("make", [make_grad_output_fn, make_batch_grad_output_fn])
class TestRequests:
    def test_fisher_type(self, make) -> None:
        for bad in ("type2", "MC", "", None, 3, np.zeros(2)):
            with raises(ValueError, "fisher_type", "'type-2', 'mc', 'empirical', 'forward-only'", repr(bad)):
                make(MSELoss(), bad)

    def test_mc_samples(self, make) -> None:
        for bad in (0, -1, np.int64(0)):
            with raises(ValueError, "mc_samples", "at least 1", str(bad)):
                make(MSELoss(), "mc", bad)
        for bad in (1.0, "2", None, True, [1], jnp.ones(2)):
            with raises(TypeError, "mc_samples", "integer"):
                make(MSELoss(), "mc", bad)
        assert make(MSELoss(), "mc", np.int32(2))
        for kind in ("type-2", "empirical", "forward-only"):  # where nothing is drawn, it is not looked at
            assert make(MSELoss(), kind, 0)

    @pytest.mark.parametrize("vectors", ["type-2", "empirical", "forward-only"])
    def test_mc_samples_of_other_vectors(self, make, vectors: str) -> None:
        """Callers that choose between exact and drawn vectors pass 0 for the exact ones."""
        args = jnp.ones((2, 3)), jnp.zeros((2, 3))
        wanted = make(MSELoss(), vectors)(*args)
        for unused in (0, -1, None):
            assert jnp.array_equal(make(MSELoss(), vectors, unused)(*args), wanted)

    def test_loss(self, make) -> None:
        class Focal(CrossEntropyLoss):
            def __call__(self, outputs, targets):
                return 0.0

        for bad in (torch.nn.MSELoss(), "mse", None, lambda f, y: 0.0, CrossEntropyLoss):
            with raises(NotImplementedError, "loss", "LikelihoodLoss", repr(bad)[:20]):
                make(bad, "mc")
        with raises(NotImplementedError, "Focal", "CrossEntropyLoss", "LikelihoodLoss"):
            make(Focal(), "type-2")

    def test_key(self, make) -> None:
        fn, batch = make(MSELoss(), "mc"), make is make_batch_grad_output_fn
        args = (jnp.zeros((2, 3)), jnp.zeros((2, 3)))
        with raises(ValueError, "key", "jax.random.key"):
            fn(*args)
        with raises(ValueError, "key", "(5,)", "draws independently" if batch else "jax.vmap"):
            fn(*args, jax.random.split(KEY, 5))
        for bad in (0, "key", torch.Generator()):
            with raises(TypeError, "key", type(bad).__name__):
                fn(*args, bad)
        with raises(TypeError, "key", "float64"):
            fn(*args, jnp.zeros(2))
        with raises(TypeError, "key", "(3,)"):
            fn(*args, jnp.zeros(3, jnp.uint32))
        with raises(TypeError, "key", "object"):
            fn(*args, np.array([1, 2], object))

    def test_other_libraries_fisher_types(self, make) -> None:
        class Theirs(str, enum.Enum):
            TYPE2 = "type-2"
            SAMPLED = "mc"

        assert FisherType(Theirs.TYPE2) is FisherType.TYPE2
        assert FisherType(Theirs.SAMPLED) is FisherType.MC
        assert make(MSELoss(), Theirs.SAMPLED)
        assert FisherType.MC == "mc" == Theirs.SAMPLED
        assert str(FisherType.EMPIRICAL) == "empirical"


def test_shapes_are_never_broadcast() -> None:
    fn = make_grad_output_fn(MSELoss(), "type-2")
    for shape in ((), (1,), (3, 1), (1, 3), (4,)):
        with raises(ValueError, "targets", "(3,)", str(shape), "never broadcast"):
            fn(jnp.zeros(3), jnp.zeros(shape))
    with raises(ValueError, "targets", "(2, 3)", "(3,)"):
        BCEWithLogitsLoss()(jnp.zeros((2, 3)), jnp.zeros(3))


def test_cross_entropy_shapes() -> None:
    loss = CrossEntropyLoss()
    with raises(ValueError, "outputs", "class axis", "scalar", "BCEWithLogitsLoss"):
        make_grad_output_fn(loss, "mc")(jnp.zeros(()), jnp.asarray(0), KEY)
    with raises(ValueError, "outputs", "class axis"):
        loss(jnp.zeros(3), jnp.zeros(3, int))
    with raises(ValueError, "targets", "(2, 5)", "class_axis", "-1", "(2, 4)"):
        loss(jnp.zeros((2, 4, 5)), jnp.zeros((2, 4), int))
    with raises(ValueError, "floating", "probabilities", "(2, 4)", "indices must be integers"):
        loss(jnp.zeros((2, 4)), jnp.zeros(2))
    with raises(ValueError, "targets", "int", "(2,)", "(2, 4)", "One-hot targets", "floating"):
        loss(jnp.zeros((2, 4)), jnp.zeros((2, 4), int))
    with raises(TypeError, "targets", "bool"):
        loss(jnp.zeros((2, 4)), jnp.zeros(2, bool))
    with raises(ValueError, "class_axis=1", "(4,)"):
        CrossEntropyLoss(class_axis=1)(jnp.zeros((2, 4)), jnp.zeros(2, int))
    with raises(ValueError, "weight", "3 class weights", "4 classes", "class_axis"):
        CrossEntropyLoss(jnp.ones(3))(jnp.zeros((2, 4)), jnp.zeros(2, int))
    with raises(ValueError, "at least one class"):
        loss(jnp.zeros((2, 0)), jnp.zeros(2, int))
    with raises(ValueError, "ignore_index=0", "probabilities"):
        CrossEntropyLoss(ignore_index=0)(jnp.zeros((2, 4)), jnp.zeros((2, 4)))


# outputs, targets, whether they are class indices, class weights
UNCLEAR = [((6, 6), (6,), True, None), ((2, 2, 2), (2, 2), True, None), ((6, 6), (6,), True, 6)]
UNCLEAR += [((3, 2), (3, 2), False, None), ((2, 2), (2, 2), False, 2)]
CLEAR = [((6, 5), (5,), True, None), ((2, 3, 2), (3, 2), True, None), ((1, 1), (1,), True, None)]
CLEAR += [((3, 2), (3, 2), False, 3), ((3,), (3,), False, None)]


def of_shape(outputs: tuple[int, ...], targets: tuple[int, ...], indices: bool, weights: int | None):
    kwargs = {} if weights is None else {"weight": jnp.arange(1.0, weights + 1)}
    rng = np.random.default_rng(0)
    y = rng.integers(min(2, outputs[0]), size=(4, *targets)) if indices else rng.dirichlet([1.0] * 2, (4, *targets))
    return rng.normal(size=(4, *outputs)), y if indices else y[..., 0], kwargs


@pytest.mark.parametrize("shapes", UNCLEAR, ids=str)
@pytest.mark.by_default("((2, 2, 2), (2, 2), True, None)", "((3, 2), (3, 2), False, None)")
def test_a_class_axis_that_shapes_leave_open_must_be_given(shapes) -> None:
    f, y, kwargs = of_shape(*shapes)
    for call in (
        CrossEntropyLoss(**kwargs),
        make_batch_grad_output_fn(CrossEntropyLoss(**kwargs), "type-2"),
        jax.jit(CrossEntropyLoss(**kwargs).targets_valid),
        lambda f, y: make_grad_output_fn(CrossEntropyLoss(**kwargs), "empirical")(f[0], y[0]),
        lambda f, y: LossHessian(CrossEntropyLoss(**kwargs), f, y),
    ):
        with raises(ValueError, "outputs", "targets", "class_axis=0, as in torch", "class_axis=-1, as in Flax"):
            call(f, y)
    first, last = (CrossEntropyLoss(**kwargs, class_axis=axis)(f, y) for axis in (0, -1))
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in kwargs.items()}
    theirs = torch.nn.CrossEntropyLoss(**tensors)(torch.from_numpy(f), torch.from_numpy(y))
    np.testing.assert_allclose(first, theirs, rtol=1e-12)
    assert abs(first - last) > 1e-3  # so it matters


@pytest.mark.parametrize("shapes", CLEAR, ids=str)
@pytest.mark.by_default("((2, 3, 2), (3, 2), True, None)")
def test_a_class_axis_that_shapes_tell_is_the_first(shapes) -> None:
    f, y, kwargs = of_shape(*shapes)
    np.testing.assert_array_equal(CrossEntropyLoss(**kwargs)(f, y), CrossEntropyLoss(**kwargs, class_axis=0)(f, y))


def test_batch_axis() -> None:
    with raises(ValueError, "outputs", "batch axis", "scalar"):
        make_batch_grad_output_fn(MSELoss(), "type-2")(jnp.zeros(()), jnp.zeros(()))
    loss = BCEWithLogitsLoss(jnp.ones((4, 3)))
    with raises(ValueError, "weight", "(4, 3)", "(1, 3)", "make_batch_grad_output_fn"):
        make_grad_output_fn(loss, "type-2")(jnp.zeros(3), jnp.zeros(3))
    with raises(ValueError, "weight", "(4, 3)", "(5, 3)"):
        loss(jnp.zeros((5, 3)), jnp.zeros((5, 3)))
    with raises(ValueError, "pos_weight", "(2,)"):
        BCEWithLogitsLoss(pos_weight=jnp.ones(2))(jnp.zeros((5, 3)), jnp.zeros((5, 3)))


def test_dtypes() -> None:
    fn = make_grad_output_fn(MSELoss(), "type-2")
    for bad in (jnp.zeros(3, int), jnp.zeros(3, complex), jnp.zeros(3, jnp.float8_e4m3fn)):
        with raises(TypeError, "outputs", "float32", str(bad.dtype)):
            fn(bad, jnp.zeros(3))
    with raises(TypeError, "targets", "real", "complex"):
        fn(jnp.zeros(3), jnp.zeros(3, complex))
    with raises(TypeError, "outputs", "Tensor", "torch"):
        fn(torch.zeros(3), jnp.zeros(3))
    with raises(TypeError, "targets", "list"):
        fn(jnp.zeros(3), [0.0, 0.0, 0.0])


@pytest.mark.parametrize("dtype", [bool, "int8", "int32", "uint8", "float16", "float32"])
@pytest.mark.by_default("bool", "float16")
def test_targets_of_other_dtypes_are_cast(dtype) -> None:
    f, y = jnp.asarray([[0.3, -2.0]]), jnp.asarray([[1.0, 0.0]])
    for loss in (MSELoss(), BCEWithLogitsLoss(pos_weight=3)):
        fn = make_batch_grad_output_fn(loss, "empirical")
        np.testing.assert_array_equal(fn(f, y.astype(dtype)), fn(f, y))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.by_default("int8", "uint64")
def test_class_indices_of_every_integer_dtype(dtype: str) -> None:
    f = jax.device_put(np.random.default_rng(0).normal(size=(3, 200)))
    y = jnp.asarray([0, 100, 120])
    for ignore_index in (-100, 100):
        loss = CrossEntropyLoss(ignore_index=ignore_index, label_smoothing=0.1)
        np.testing.assert_array_equal(loss(f, y.astype(dtype)), loss(f, y))


def test_target_values() -> None:
    f = jnp.zeros((2, 3))
    for y in ([0, 3], [-1, 0], [0, -100]):
        with raises(ValueError, "targets", "0 to 2", "ignore_index=-5", str(min(y) if min(y) < 0 else 3)):
            CrossEntropyLoss(ignore_index=-5)(f, jnp.asarray(y))
    with raises(ValueError, "targets", "position (1, 0)", "1 of 4 terms"):
        CrossEntropyLoss()(jnp.zeros((2, 3, 2)), jnp.asarray([[0, 1], [3, 2]]))
    with raises(ValueError, "targets", "probabilities of at least 0"):
        CrossEntropyLoss()(f, jnp.asarray([[0.5, 0.5, 0.0], [1.1, -0.1, 0.0]]))
    for bad in (1.5, -0.1, np.nan):
        with raises(ValueError, "targets", "between 0 and 1", str(bad)):
            BCEWithLogitsLoss()(f, jnp.full((2, 3), bad))
    for fn in (
        make_batch_grad_output_fn(CrossEntropyLoss(), "mc"),
        make_batch_grad_output_fn(CrossEntropyLoss(), "type-2"),
    ):
        with raises(ValueError, "targets"):
            fn(f, jnp.asarray([0, 3]), KEY)
    with raises(ValueError, "targets"):
        LossHessian(CrossEntropyLoss(), f, jnp.asarray([0, 3]))


def test_target_values_under_jit_give_nan() -> None:
    """Where nobody can look at values, the result is loud; checkify finds it."""
    f, y = jnp.zeros((2, 3)), jnp.asarray([0, 3])
    for kind in ("type-2", "mc", "empirical"):
        fn = make_batch_grad_output_fn(CrossEntropyLoss(reduction="sum"), kind)
        vectors = jax.jit(fn)(f, y, KEY)
        assert jnp.isnan(vectors[:, 1]).any()
        assert jnp.isfinite(vectors[:, 0]).all()
        error, _ = checkify.checkify(jax.jit(fn), errors=checkify.nan_checks)(f, y, KEY)
        with raises(checkify.JaxRuntimeError, "nan"):
            error.throw()
        error, _ = checkify.checkify(jax.jit(fn), errors=checkify.nan_checks)(f, jnp.asarray([0, 2]), KEY)
        error.throw()
    assert jnp.isnan(jax.jit(CrossEntropyLoss())(f, y))
    assert jnp.isnan(jax.jit(BCEWithLogitsLoss())(f, f + 2))


def test_constructors() -> None:
    for cls in (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss):
        for bad in ("none", "batchmean", ""):
            with raises(ValueError, "reduction", "'mean' or 'sum'", repr(bad)):
                cls(reduction=bad)
    with raises(ValueError, "weight", "not negative"):
        CrossEntropyLoss(jnp.asarray([1.0, -1.0]))
    with raises(ValueError, "pos_weight", "not negative"):
        BCEWithLogitsLoss(pos_weight=-1.0)
    with raises(ValueError, "weight", "finite"):
        BCEWithLogitsLoss(np.inf)
    with raises(ValueError, "weight", "shape [C]"):
        CrossEntropyLoss(jnp.ones((2, 2)))
    with raises(TypeError, "weight", "PRNG key"):
        BCEWithLogitsLoss(KEY)
    for bad in (np.array(["a"]), np.array([None]), np.ma.masked_array([1.0], [True]), 10**400):
        with raises(TypeError, "weight", "numbers"):
            BCEWithLogitsLoss(bad)
    for bad in (-0.1, 1.1, float("nan")):
        with raises(ValueError, "label_smoothing", str(bad)):
            CrossEntropyLoss(label_smoothing=bad)
    with raises(TypeError, "ignore_index", "1.5"):
        CrossEntropyLoss(ignore_index=1.5)
    with raises(TypeError, "class_axis"):
        CrossEntropyLoss(class_axis=0.0)
    with pytest.raises(TypeError):  # keyword-only
        CrossEntropyLoss(None, -100)


def test_sampler() -> None:
    sample = make_grad_output_sampler(MSELoss())
    with raises(ValueError, "num_samples", "0"):
        sample(jnp.zeros(3), 0, jnp.zeros(3), KEY)
    with raises(TypeError, "num_samples", "1.5"):
        sample(jnp.zeros(3), 1.5, jnp.zeros(3), KEY)
    with raises(ValueError, "key"):
        sample(jnp.zeros(3), 1, jnp.zeros(3))
    with raises(NotImplementedError, "loss"):
        make_grad_output_sampler(torch.nn.CrossEntropyLoss())


def test_products() -> None:
    hessian = LossHessian(MSELoss(), jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    for product in (hessian.mv, hessian.sqrt_mv, hessian.sqrt_rmv):
        with raises(ValueError, "(2, 3)", "(3,)"):
            product(jnp.zeros(3))


def test_sixty_four_bits_are_never_narrowed() -> None:
    with jax.enable_x64(False):
        with raises(TypeError, "outputs", "float64", "float32", "enable_x64"):
            MSELoss()(np.zeros((2, 3)), np.zeros((2, 3)))
        f = np.zeros((2, 3), np.float32)
        for wraps in (2**32, 2**32 - 100, -(2**63)):
            with raises(TypeError, "targets", "int64", "int32"):
                CrossEntropyLoss()(f, np.array([0, wraps]))
        assert CrossEntropyLoss()(f, np.array([0, 2])) > 0  # those that fit are taken
    with jax.enable_x64(True):
        wide = jnp.array([0, 2]), jnp.array([0, 2**32])
    with jax.enable_x64(False):
        assert CrossEntropyLoss()(f, wide[0]) > 0
        with raises(TypeError, "targets", "int64", "int32"):
            CrossEntropyLoss()(f, wide[1])


def test_targets_valid_under_jit() -> None:
    """Where nothing can be raised, one can still ask."""
    loss = CrossEntropyLoss(ignore_index=-1)
    outputs, targets = jnp.zeros((2, 3, 4)), jnp.array([[0, 3, -1, 2], [-2, 1, 2, 0]])
    valid = [[True, False, True, True], [False, True, True, True]]
    for ask in (loss.targets_valid, jax.jit(loss.targets_valid)):
        assert ask(outputs, targets).tolist() == valid
    one = jax.vmap(lambda f, y: loss.targets_valid(f, y, batch=False))(outputs, targets)
    assert one.tolist() == valid
    with pytest.raises(ValueError, match="targets must have shape"):
        loss.targets_valid(outputs, targets[:, 0])
    probabilities = jnp.array([[0.5, 0.5], [1.5, -0.5]])
    assert CrossEntropyLoss().targets_valid(probabilities, probabilities).tolist() == [True, False]
    assert BCEWithLogitsLoss().targets_valid(probabilities, probabilities).tolist() == [[True] * 2, [False] * 2]
