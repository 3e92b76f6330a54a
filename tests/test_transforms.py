"""jit, vmap, grad, export to other platforms, sharding: the public functions under every transformation."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ggn_jax
from ggn_jax import BCEWithLogitsLoss, CrossEntropyLoss, LossHessian, MSELoss

N, C = 6, 5
CE = CrossEntropyLoss(np.linspace(0.5, 2, C), label_smoothing=0.1, ignore_index=1)
BCE = BCEWithLogitsLoss(pos_weight=np.linspace(0.5, 2, C))
# name: loss, outputs, targets
PROBLEMS = {
    "ce-sequence": (CE, (N, C, 3), "indices"),
    "ce-last": (CrossEntropyLoss(class_axis=-1), (N, 3, C), "last"),
    "bce": (BCE, (N, C), "same"),
    "mse": (MSELoss(), (N, 2, C), "same"),
}


def problem(name: str):
    loss, shape, kind = PROBLEMS[name]
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(size=shape), jnp.float32)
    if kind == "same":
        return loss, outputs, jnp.asarray(rng.uniform(size=shape), jnp.float32)
    positions = shape[:-1] if kind == "last" else (shape[0], *shape[2:])
    return loss, outputs, jnp.asarray(rng.integers(C, size=positions), jnp.int32)


def functions(loss):
    """Every public function of one problem, as `fn(outputs, targets, key)`."""
    make = ggn_jax.make_batch_grad_output_fn
    yield "type-2", make(loss, "type-2")
    yield "mc", make(loss, "mc", 2)
    yield "empirical", make(loss, "empirical")
    yield "value", lambda f, y, key: loss(f, y)
    yield "hessian", lambda f, y, key: LossHessian(loss, f, y).mv(f)
    yield "sqrt", lambda f, y, key: LossHessian(loss, f, y).sqrt_mv(f)
    yield "sqrt^T", lambda f, y, key: LossHessian(loss, f, y).sqrt_rmv(f)
    yield "diagonal", lambda f, y, key: LossHessian(loss, f, y).diagonal()


def operator_functions(loss):
    def model_fn(params, x):
        return jnp.tanh(x * params["scale"] + params["shift"])

    def params_like(f):
        return {"scale": jnp.ones((1, *f.shape[1:]), f.dtype), "shift": jnp.zeros((1, *f.shape[1:]), f.dtype)}

    def solve(make):
        def fn(f, y, key):
            params = params_like(f)
            operator = make(model_fn, loss, params, (f, y), key)
            return lx.linear_solve(operator.damped(0.1), params, lx.CG(1e-4, 1e-4), throw=False).value["scale"]

        return fn

    yield "ggn", solve(lambda *args: ggn_jax.GGNLinearOperator(*args[:4]))
    yield "ggn-mc", solve(lambda *args: ggn_jax.GGNLinearOperator(*args[:4], mc_samples=2, key=args[4]))
    yield "ef", solve(lambda *args: ggn_jax.EFLinearOperator(*args[:4]))

    def products(f, y, key):
        args = model_fn, loss, params_like(f), (f, y)
        diagonal = ggn_jax.GGNDiagonalLinearOperator(*args, chunk_size=2)
        return ggn_jax.HessianLinearOperator(*args).mv(args[2]), diagonal.mv(args[2])

    yield "hessian and diagonal", products


def together(*named):
    """Functions with names as one function, which is one program to compile."""
    return lambda *args: {label: fn(*args) for label, fn in named}


@functools.cache
def compiled(name: str):
    loss = PROBLEMS[name][0]
    return jax.jit(together(*functions(loss), *operator_functions(loss)))


def assert_close(got, want, tol: float) -> None:
    """Of two pytrees; the error says where."""

    def check(path, got, want):
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, got, want)


@pytest.mark.parametrize("name", ["ce-sequence", "bce"])  # `test_vectors.py` compiles and maps those of all losses
@pytest.mark.by_default("bce")
def test_jit_and_vmap(name: str) -> None:
    """Compiled and mapped over, functions are what they are eagerly."""
    loss, outputs, targets = problem(name)
    key = jax.random.key(0)
    eager = together(*functions(loss))
    want = eager(outputs, targets, key)
    got = compiled(name)(outputs, targets, key)
    assert_close({label: got[label] for label in want}, want, 2e-6)
    keys = jax.random.split(key, 2)
    stacked = jax.jit(jax.vmap(eager))(jnp.stack([outputs, outputs + 1]), jnp.stack([targets, targets]), keys)
    for label, mapped in stacked.items():
        assert mapped.shape == (2, *want[label].shape), label
    assert_close(jax.tree.map(lambda x: x[0], stacked), eager(outputs, targets, keys[0]), 2e-6)
    kinds = ("type-2", "mc", "empirical", "forward-only")
    single = together(*((kind, ggn_jax.make_grad_output_fn(loss, kind, 2)) for kind in kinds))
    keys = jax.random.split(key, N)
    got = jax.jit(jax.vmap(single, out_axes=1))(outputs, targets, keys)
    want = [single(*args) for args in zip(outputs, targets, keys, strict=True)]
    assert_close(got, jax.tree.map(lambda *each: np.stack(each, axis=1), *want), 2e-6)


def test_losses_are_pytrees() -> None:
    """Weights are leaves: traced, differentiated and mapped over; options are static."""
    f, y = jnp.zeros((N, C)), jnp.arange(N) % C

    def value(loss: CrossEntropyLoss) -> jax.Array:
        return loss(f + jnp.arange(C, dtype=float)[None], y)

    loss = CrossEntropyLoss(jnp.ones(C), reduction="sum")
    gradient = jax.jit(jax.grad(value))(loss)
    assert isinstance(gradient, CrossEntropyLoss)
    step = 1e-6
    bumped = CrossEntropyLoss(jnp.ones(C).at[2].add(step), reduction="sum")
    np.testing.assert_allclose(gradient.weight[2], (value(bumped) - value(loss)) / step, rtol=1e-6)
    many = jax.vmap(lambda w: CrossEntropyLoss(w)(f, y))(jnp.ones((3, C)))
    np.testing.assert_allclose(many, np.full(3, np.log(C)))
    np.testing.assert_allclose(jax.jit(loss)(f, y), loss(f, y))  # arrays and all
    assert hash(loss) == hash(CrossEntropyLoss(jnp.ones(C), reduction="sum"))
    assert loss == CrossEntropyLoss(jnp.ones(C), reduction="sum") != CrossEntropyLoss(jnp.zeros(C), reduction="sum")
    assert loss != CrossEntropyLoss(jnp.ones(C))
    assert MSELoss() == MSELoss() != MSELoss(reduction="sum")
    assert jax.tree.structure(CrossEntropyLoss()) != jax.tree.structure(CrossEntropyLoss(class_axis=-1))


def test_no_retrace_for_new_values() -> None:
    name = "bce"
    _, outputs, targets = problem(name)
    # A user's loss, so that its methods can count how often they are traced.
    traces = []

    class Counted(ggn_jax.LikelihoodLoss):
        curvature = "hessian"

        def nll(self, f, y):
            traces.append(1)
            return (f - y) ** 2

        def sample(self, key, f):
            return f

    outputs32 = outputs.astype(jnp.float32)
    for make in (ggn_jax.make_batch_grad_output_fn, ggn_jax.make_grad_output_fn):
        for kind in ("type-2", "mc", "empirical"):
            make(Counted(), kind)(outputs32, outputs32, jax.random.key(0))
            before = len(traces)
            # A new function of an equal loss, and new values.
            make(Counted(), kind)(outputs32 + 1, outputs32 - 1, jax.random.key(1))
            assert len(traces) == before, kind

    jitted, sizes = compiled(name), []
    for seed in range(3):
        jitted(outputs + seed, targets, jax.random.key(seed))
        sizes.append(jitted._cache_size())
    assert sizes[0] == sizes[2]


@pytest.mark.parametrize("name", ["ce-sequence", "bce"])
@pytest.mark.by_default("bce")
def test_cross_lowering(name: str) -> None:
    """All public functions lower for CPU, CUDA and TPU, with nothing that only one of them has."""
    loss, outputs, targets = problem(name)
    everything = together(*functions(loss), *operator_functions(loss))
    key = jax.random.key(0)
    # Raw key data: exported functions take no typed keys.
    wrapped = jax.jit(lambda f, y, data: everything(f, y, jax.random.wrap_key_data(data)))
    args = outputs, targets, jax.random.key_data(key)
    exported = jax.export.export(wrapped, platforms=("cpu", "cuda", "tpu"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert_close(exported.call(*args), compiled(name)(outputs, targets, key), 1e-6)


def test_export_with_a_symbolic_batch() -> None:
    loss, outputs, targets = problem("ce-sequence")
    (n,) = jax.export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, *outputs.shape[1:]), outputs.dtype), jax.ShapeDtypeStruct((n, 3), targets.dtype)
    fn = ggn_jax.make_batch_grad_output_fn(loss, "type-2")
    exported = jax.export.export(jax.jit(fn))(*shapes)
    for size in (1, 4):
        np.testing.assert_allclose(
            exported.call(outputs[:size], targets[:size]), fn(outputs[:size], targets[:size]), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("name", ["ce-sequence", "bce"])
@pytest.mark.by_default("bce")
def test_sharded_batch_is_the_same(name: str) -> None:
    """Data parallel on two devices: the reduction and the draws are those of one device."""
    assert jax.device_count() >= 2
    loss, outputs, targets = problem(name)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    shard = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    key = jax.random.key(0)
    assert_close(compiled(name)(shard(outputs), shard(targets), key), compiled(name)(outputs, targets, key), 1e-5)
    eager = ggn_jax.make_batch_grad_output_fn(loss, "type-2")(shard(outputs), shard(targets))
    np.testing.assert_allclose(
        eager, ggn_jax.make_batch_grad_output_fn(loss, "type-2")(outputs, targets), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.by_default("ce-sequence")
def test_explicit_mesh(name: str) -> None:
    """The vectors and the loss also take arrays of an explicit mesh, `jax.make_mesh`'s default."""
    loss, outputs, targets = problem(name)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    shard = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    for kind in ("type-2", "mc", "empirical"):
        fn = ggn_jax.make_batch_grad_output_fn(loss, kind, 2)
        want = fn(outputs, targets, jax.random.key(0))
        with jax.set_mesh(mesh):
            got = jax.jit(fn)(shard(outputs), shard(targets), jax.random.key(0))
        assert got.sharding.spec[1] == "data"
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss(shard(outputs), shard(targets)), loss(outputs, targets), rtol=1e-5)


def test_empty_batches_and_positions() -> None:
    for shape in ((0, C), (2, C, 0)):
        f, y = jnp.zeros(shape), jnp.zeros((shape[0], *shape[2:]), int)
        assert CrossEntropyLoss()(f, y) == 0
        size = int(np.prod(shape[1:]))
        for kind, num in (("type-2", size), ("mc", 3), ("empirical", 1), ("forward-only", 0)):
            fn = ggn_jax.make_batch_grad_output_fn(CrossEntropyLoss(), kind, 3)
            assert fn(f, y, jax.random.key(0)).shape == (num, *shape)
        assert LossHessian(CrossEntropyLoss(), f, y).mv(f).shape == shape


def test_structured_hessian_is_a_pytree() -> None:
    loss, outputs, targets = problem("ce-sequence")
    hessian = jax.jit(lambda f, y: LossHessian(loss, f, y))(outputs, targets)
    want = LossHessian(loss, outputs, targets).mv(outputs)
    np.testing.assert_allclose(jax.jit(lambda h, v: h.mv(v))(hessian, outputs), want, rtol=1e-6, atol=1e-7)
    single = jax.vmap(lambda f, y: LossHessian(loss, f, y, batch=False).trace())(outputs, targets)
    assert single.shape == (N,)
