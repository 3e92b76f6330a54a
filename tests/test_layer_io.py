"""The open layers against JAX's gradients, of the batch and of each example, and against KFAC's factors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import PROBLEMS, assert_close, integers, normal

import ggn_jax

N = 4


@dataclass(frozen=True, eq=False)
class Model:
    """A model, and what `find_layers` must find: for each name, `(kind, groups, out, in, uses, has_bias)`."""

    name: str
    fn: Callable[[Any, Any], jax.Array]
    params: Any
    inputs: Any
    found: dict[str, tuple[str, int, int, int, int, bool]]
    loss: ggn_jax.Loss
    targets: jax.Array
    rest: tuple[str, ...] = ()

    @property
    def batch(self) -> tuple[Any, jax.Array]:
        return self.inputs, self.targets

    @property
    @cache  # noqa: B019 (module-level constants)
    def layers(self) -> ggn_jax.Layers:
        return ggn_jax.find_layers(self.fn, self.params, self.inputs)


def slices() -> Model:
    """A fused array of two layers' weights, one of them used twice; a scale; an unused column."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        first = jnp.tanh(jnp.einsum("nd,de->ne", x, p["fused"][:, :3]) + p["b"][None])
        twice = jnp.tanh(jnp.einsum("nd,de->ne", first, p["fused"][:, 3:6]))
        return jnp.einsum("nd,de->ne", twice, p["fused"][:, 3:6]) * p["s"][None]

    params = {"fused": normal("f", 3, 7), "b": normal("b", 3), "s": normal("s", 3)}
    found = {"fused#1": ("linear", 1, 3, 4, 1, True), "fused#2": ("linear", 1, 3, 3, 2, False)}
    loss, targets = ggn_jax.CrossEntropyLoss(label_smoothing=0.1), jax.device_put(integers("y", 3, N))
    return Model("slices", fn, params, normal("x", N, 3), found, loss, targets, ("['s']",))


def scanned() -> Model:
    """Stacked layers with biases, over sequences of tokens whose embedding is the output layer as well."""

    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        def step(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return h + jnp.tanh(jnp.einsum("ntd,de->nte", h, layer["w"]) + layer["b"][None, None]), None

        h = jax.lax.scan(step, p["table"][tokens], p["stack"])[0]
        return jnp.einsum("ntd,vd->ntv", jnp.cumsum(h, axis=1), p["table"])

    params = {"table": normal("t", 5, 3), "stack": {"w": normal("w", 2, 3, 3), "b": normal("b", 2, 3)}}
    found = {"stack/w": ("linear", 2, 3, 4, 1, True), "table": ("embedding+linear", 1, 3, 5, 2, False)}
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1, ignore_index=1)
    tokens, targets = (jax.device_put(integers(name, 5, N, 3)) for name in ("tokens", "next"))
    return Model("scanned", fn, params, tokens, found, loss, targets)


def convolutions() -> Model:
    """Grouped, with a bias, channels last; then a layer whose bias is a part of an array."""

    def fn(p: Any, x: jax.Array) -> jax.Array:
        dims, groups = ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}
        x = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims, **groups)
        x = jnp.tanh(x + p["bias"][None, None, None])
        return jnp.einsum("nd,de->ne", x.reshape(len(x), -1), p["head"]) + p["places"][1][None]

    params = {"kernel": normal("k", 2, 2, 1, 4), "bias": normal("kb", 4), "head": normal("h", 24, 2)}
    params["places"] = normal("p", 3, 2)
    found = {"head": ("linear", 1, 2, 25, 1, True), "kernel": ("convolution", 2, 2, 5, 1, True)}
    args = params, normal("image", N, 2, 3, 2), found, ggn_jax.MSELoss(), normal("y", N, 2)
    return Model("convolutions", fn, *args)


MODELS = [slices(), scanned(), convolutions()]
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


@every_model
@pytest.mark.by_default("slices")
def test_layers_are_static_and_can_be_printed(model: Model) -> None:
    layers = model.layers
    got = {x.name: (x.kind, x.groups, x.out, x.in_, x.uses, x.has_bias) for x in layers}
    assert got == model.found
    assert hash(layers) == hash(layers)
    assert not jax.tree.leaves(layers)
    assert layers[layers.names[0]] is layers[0]
    assert all(name in str(layers) for name in (*layers.names, *model.rest))
    shapes = jax.eval_shape(lambda: (model.params, model.inputs))
    assert [x.shape for x in ggn_jax.find_layers(model.fn, *shapes)] == [x.shape for x in layers]


@partial(jax.jit, static_argnames="model")
def captured(model: Model) -> Any:
    """Everything of one empirical pass, with what JAX has for it."""
    io = ggn_jax.layer_io(model.layers, model.loss, model.params, model.batch, fisher_type="empirical")
    plain = {name: not any(use.swapped for use in layer.uses) for name, layer in io.items()}
    sums = {name: jnp.einsum("vgnso,gnsi->goi", io[name].output_grads, io[name].inputs) for name in io if plain[name]}
    value, grads = jax.value_and_grad(lambda p: model.loss(model.fn(p, model.inputs), model.targets))(model.params)

    def of_one(x: jax.Array, y: jax.Array) -> Any:
        return jax.grad(lambda p: sum_reduced(model)(model.fn(p, x[None]), y[None]))(model.params)

    each = jax.vmap(of_one)(model.inputs, model.targets)
    return io, sums, {name: io[name].per_example_grads() for name in io}, value, grads, each


def sum_reduced(model: Model) -> ggn_jax.Loss:
    options = {"label_smoothing": 0.1} if model.name == "slices" else {"class_axis": -1, "ignore_index": 1}
    if isinstance(model.loss, ggn_jax.MSELoss):
        return ggn_jax.MSELoss(reduction="sum")
    return ggn_jax.CrossEntropyLoss(reduction="sum", **options)


@every_model
@pytest.mark.by_default("slices")
def test_gradients(model: Model) -> None:
    io, sums, each, value, grads, each_grads = captured(model)
    scale, to_matrices = np.sqrt(io.reduction), jax.jit(partial(ggn_jax.to_matrices, model.layers))
    assert_close(io.value, value, 1e-14)
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-13), io.grads, grads)
    wanted, _ = to_matrices(grads)
    for name, total in sums.items():
        assert_close(scale * total, wanted[name], 1e-13)
    for n in range(N):
        own, _ = to_matrices(jax.tree.map(lambda leaf: np.asarray(leaf)[n], each_grads))  # noqa: B023
        for name, got in each.items():
            assert_close(np.asarray(got)[0, n], scale * own[name], 1e-13)


@every_model
def test_matrices_are_exact_and_go_back(model: Model) -> None:
    layers, params = model.layers, model.params
    to_matrices, from_matrices = (jax.jit(partial(fn, layers)) for fn in (ggn_jax.to_matrices, ggn_jax.from_matrices))
    matrices, rest = to_matrices(params)
    assert {name: m.shape for name, m in matrices.items()} == {x.name: x.shape for x in layers}
    back = from_matrices(matrices, rest)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    matrices = {name: normal(name, *m.shape) for name, m in matrices.items()}
    again, rest_again = to_matrices(from_matrices(matrices, rest))
    jax.tree.map(np.testing.assert_array_equal, (again, rest_again), (matrices, rest))


@pytest.mark.sweep
def test_matrices_are_the_weights() -> None:
    matrices, rest = ggn_jax.to_matrices(MODELS[0].layers, MODELS[0].params)
    p = MODELS[0].params
    np.testing.assert_array_equal(matrices["fused#1"][0], np.concatenate([p["fused"][:, :3], p["b"][None]]).T)
    np.testing.assert_array_equal(rest["fused"][:, 6], p["fused"][:, 6])
    assert not rest["fused"][:, :6].any()
    assert rest["b"] == optax.MaskedNode()
    scan, _ = ggn_jax.to_matrices(MODELS[1].layers, MODELS[1].params)
    np.testing.assert_array_equal(scan["stack/w"][..., 3], MODELS[1].params["stack"]["b"])
    np.testing.assert_array_equal(scan["table"][0], MODELS[1].params["table"].T)
    images, _ = ggn_jax.to_matrices(MODELS[2].layers, MODELS[2].params)
    kernel = np.asarray(MODELS[2].params["kernel"]).reshape(2, 2, 1, 2, 2)  # groups are of outputs, first
    np.testing.assert_array_equal(images["kernel"][..., :4], np.einsum("hwcgo->gohwc", kernel).reshape(2, 2, 4))


def test_matrices_keep_dtypes() -> None:
    """Momentum may be wider than the parameters, and a layer's parameters may have two dtypes."""
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.full(2, 1 / 3, jnp.float32)}
    layers = ggn_jax.find_layers(
        lambda p, x: x @ p["w"] + p["b"].astype(x.dtype)[None], params, jnp.ones((2, 3), jnp.bfloat16)
    )
    assert layers.names == ("w",)

    @jax.jit
    def there_and_back(params: Any) -> Any:
        return ggn_jax.from_matrices(layers, *ggn_jax.to_matrices(layers, params))

    back = there_and_back(params)
    assert {name: leaf.dtype for name, leaf in back.items()} == {"w": jnp.bfloat16, "b": jnp.float32}
    momentum = jax.tree.map(lambda leaf: np.full(leaf.shape, 1 / 3), params)
    again = there_and_back(momentum)
    jax.tree.map(np.testing.assert_array_equal, again, momentum)


@pytest.mark.parametrize(("number", "names"), [(0, ["fused#1"]), (1, ["stack/w"]), (2, ["kernel", "head"])])
@pytest.mark.by_default("1-names1")
def test_factors_are_kfacs(number: int, names: list[str]) -> None:
    model = MODELS[number]
    options: dict[str, Any] = {"fisher_type": "mc", "mc_samples": 2, "key": jax.random.key(0)}
    kfac = ggn_jax.KFACLinearOperator(model.fn, model.loss, model.params, model.batch, **options)

    @jax.jit
    def factors() -> Any:
        io = ggn_jax.layer_io(model.layers, model.loss, model.params, model.batch, grads=False, **options)
        pairs = {name: (io[name].inputs, io[name].output_grads) for name in names}
        return {
            name: (
                jnp.einsum("gnsi,gnsj->gij", a, a) / (a.shape[1] * a.shape[2]),
                jnp.einsum("vgnso,vgnsp->gop", g, g),
            )
            for name, (a, g) in pairs.items()
        }

    for name, (a, b) in factors().items():
        layer = model.layers[name]
        wanted = np.asarray(kfac.block(name if "#" not in name else "b"))
        wanted = wanted.reshape(layer.groups, layer.out * layer.in_, layer.groups, -1)
        for group in range(layer.groups):
            assert_close(np.kron(b[group], a[group]), wanted[group, :, group], 1e-12)


def test_type_2_vectors_make_the_ggn() -> None:
    """`sum_{v,n} vec(G) vec(G)^T` is the layer's block of the exact matrix."""
    problem = PROBLEMS[2]  # sequences, some tokens ignored
    layers = ggn_jax.find_layers(problem.model_fn, problem.params, problem.inputs)

    @jax.jit
    def blocks() -> Any:
        args = layers, problem.loss, problem.params, (problem.inputs, problem.targets)
        io = ggn_jax.layer_io(*args, fisher_type="type-2", positions="exact")
        return [
            jnp.einsum("vngoi,vngpj->iojp", io[name].per_example_grads(), io[name].per_example_grads()) for name in io
        ]

    start = 0
    for layer, block in zip(layers, blocks(), strict=True):
        size = layer.out * layer.in_  # the arrays are [in, out]
        assert_close(block.reshape(size, size), problem.ggn()[start : start + size, start : start + size])
        start += size


@pytest.mark.sweep
def test_sums_over_chunks() -> None:
    model = MODELS[1]
    options: dict[str, Any] = {"fisher_type": "mc", "mc_samples": 2, "key": jax.random.key(3)}
    options["mask"] = jnp.arange(3)[None] < jnp.array([3, 2, 1, 3])[:, None]

    def fn(io: ggn_jax.LayersIO) -> Any:
        layer = io["stack/w"]
        mask = layer.mask.astype(layer.inputs.dtype)
        masked = jnp.einsum("gnsi,gnsj,ns->gij", layer.inputs, layer.inputs, mask), jnp.sum(mask)
        each = io["table"].per_example_grads()
        return io.value, io.grads, masked, jnp.einsum("vngoi,vngpj->op", each, each), io["table"].uses[0].rows.sum()

    args = model.layers, model.loss, model.params, model.batch
    summed = jax.jit(lambda: ggn_jax.sum_layer_io(fn, *args, chunk_size=3, **options))()
    whole = jax.jit(lambda: fn(ggn_jax.layer_io(*args, **options)))()
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-12), summed, whole)
    kfac = ggn_jax.KFACLinearOperator(model.fn, model.loss, model.params, model.batch, **options)
    a = kfac.factors()["['stack']['w']"].a[0]  # of the layers' inputs that are not padding
    assert_close(summed[2][0] / summed[2][1], a, 1e-12)


def test_sums_of_16_bits_are_wide() -> None:
    """In bfloat16, a sum of ones stops at 256."""
    params, x = {"w": jnp.ones((1, 1), jnp.bfloat16)}, jnp.ones((512, 1), jnp.bfloat16)
    layers = ggn_jax.find_layers(lambda p, x: x @ p["w"], params, x[:1])
    fn = lambda io: jnp.sum(io["w"].inputs).astype(jnp.bfloat16)  # noqa: E731
    options: dict[str, Any] = {"chunk_size": 1, "fisher_type": "forward-only", "grads": False}
    total = ggn_jax.sum_layer_io(fn, layers, ggn_jax.MSELoss(), params, (x, None), **options)
    assert float(total) == 512


def test_io_is_a_pytree() -> None:
    model = MODELS[2]
    io = captured(model)[0]
    doubled = jax.jit(lambda io: jax.tree.map(lambda leaf: 2 * leaf, io))(io)
    assert_close(doubled["head"].output_grads, 2 * io["head"].output_grads)
    args = model.layers, model.loss, model.params, (model.inputs, None)
    forward = jax.jit(lambda: ggn_jax.layer_io(*args, fisher_type="forward-only", grads=False))()
    assert forward.value is None
    assert forward["head"].output_grads.shape == (0, 1, N, 1, 2)


def test_separate_biases_are_in_the_rest() -> None:
    model = MODELS[0]
    layers = ggn_jax.find_layers(model.fn, model.params, model.inputs, bias="separate")
    assert layers["fused#1"].in_ == 3
    matrices, rest = ggn_jax.to_matrices(layers, model.params)
    np.testing.assert_array_equal(rest["b"], model.params["b"])
    back = ggn_jax.from_matrices(layers, matrices, rest)
    jax.tree.map(np.testing.assert_array_equal, back, model.params)
    io = jax.jit(lambda: ggn_jax.layer_io(layers, model.loss, model.params, model.batch, fisher_type="empirical"))()
    assert_close(jnp.sqrt(io.reduction) * jnp.sum(io["fused#1"].output_grads, (0, 1, 2, 3)), io.grads["b"], 1e-13)


def test_errors() -> None:
    model = MODELS[0]
    layers, loss, params, batch = model.layers, model.loss, model.params, model.batch
    io = partial(ggn_jax.layer_io, fisher_type="empirical")
    with pytest.raises(ValueError, match="bias must be 'joint' or 'separate'; got 'none'"):
        ggn_jax.find_layers(model.fn, params, model.inputs, bias="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="couples examples"):
        ggn_jax.find_layers(
            lambda p, x: x @ p["w"] - (x @ p["w"]).mean(0, keepdims=True), {"w": normal("w", 3, 3)}, batch[0]
        )
    with pytest.raises(TypeError, match="layers must be what find_layers returned; got function"):
        io(model.fn, loss, params, batch)
    with pytest.raises(ValueError, match=r"params\['b'\] must be float64 of shape \(3,\).*got float64 of shape \(1,\)"):
        io(layers, loss, params | {"b": jnp.ones(1)}, batch)
    with pytest.raises(ValueError, match="batch must have inputs like those that the layers were found for"):
        io(MODELS[1].layers, MODELS[1].loss, MODELS[1].params, jax.tree.map(lambda x: x[:, :2], MODELS[1].batch))
    with pytest.raises(ValueError, match="key"):
        ggn_jax.layer_io(layers, loss, params, batch)
    with pytest.raises(KeyError, match="no layer 'w'; there are fused#1, fused#2"):
        captured(model)[0]["w"]
    with pytest.raises(KeyError, match="no layer 'w'"):
        layers["w"]
    table = captured(MODELS[1])[0]
    with pytest.raises(ValueError, match="layer 'table' has a use with inputs where another has outputs"):
        table["table"].inputs  # noqa: B018
    with pytest.raises(ValueError, match="rows are of embeddings; this is a linear layer"):
        table["stack/w"].rows  # noqa: B018
    matrices, rest = ggn_jax.to_matrices(layers, params)
    with pytest.raises(ValueError, match=r"matrices\['fused#1'\] must have shape \(1, 3, 4\)"):
        ggn_jax.from_matrices(layers, matrices | {"fused#1": jnp.ones((3, 4))}, rest)
    with pytest.raises(KeyError, match="matrices must be of the layers"):
        ggn_jax.from_matrices(layers, {}, rest)
    with pytest.raises(ValueError, match=r"rest\['s'\] must be an array of shape \(3,\)"):
        ggn_jax.from_matrices(layers, matrices, rest | {"s": optax.MaskedNode()})
    with pytest.raises(ValueError, match="rest must be a pytree like the parameters"):
        ggn_jax.from_matrices(layers, matrices, {})
    with pytest.raises(ValueError, match=r"tree\['b'\] must have the parameter's shape"):
        ggn_jax.to_matrices(layers, params | {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="tree must be like the parameters"):
        ggn_jax.to_matrices(layers, {})


@pytest.mark.sweep
def test_meshes() -> None:
    """Sums of a batch that is sharded over an explicit axis; and each shard's own, in `jax.shard_map`."""
    model = MODELS[0]
    layers, loss, params, batch = model.layers, model.loss, model.params, model.batch
    fn = lambda io: (io.value, jnp.einsum("vngoi->goi", io["fused#1"].per_example_grads()))  # noqa: E731
    options: dict[str, Any] = {"fisher_type": "empirical", "grads": False}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
    sharded = put(params, PartitionSpec()), put(batch, PartitionSpec("data"))
    io, sums, *_ = captured(model)
    value, total = jax.jit(lambda *args: ggn_jax.sum_layer_io(fn, layers, loss, *args, **options))(*sharded)
    assert_close(value, io.value, 1e-13)
    assert_close(total, sums["fused#1"], 1e-13)
    with pytest.raises(NotImplementedError, match="use sum_layer_io"):
        ggn_jax.layer_io(layers, loss, *sharded, **options)

    def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]

    def moments(io: Any) -> jax.Array:
        return jnp.einsum("gnsi,gnsj->gij", *[io[""].inputs] * 2)

    x = normal("x", 4, 3)
    with jax.set_mesh(mesh):  # layers that are found there, in a loop, outside of jit
        args = put(normal("w", 2, 3, 3), PartitionSpec()), put(x, PartitionSpec("data"))
        found = ggn_jax.find_layers(scanned, *args)
        options["fisher_type"] = "forward-only"
        summed = ggn_jax.sum_layer_io(moments, found, ggn_jax.MSELoss(), args[0], (args[1], None), **options)
    assert_close(summed[0], x.T @ x, 1e-13)
    options["fisher_type"] = "empirical"

    def shard(params: Any, batch: Any) -> jax.Array:
        io = ggn_jax.layer_io(layers, loss, params, batch, **options)
        return jax.lax.pmean(jnp.sqrt(io.reduction) * fn(io)[1], "d")

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec(), PartitionSpec("d")
    mean = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))(params, batch)
    assert_close(mean, ggn_jax.to_matrices(layers, io.grads)[0]["fused#1"], 1e-13)
