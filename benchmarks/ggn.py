"""The cost and the memory of one exact GGN product, against one gradient of the same model.

A product is one linearisation (a forward pass), one tangent and one cotangent pass, and the closed-form loss Hessian.
For a model of matrix multiplications that is 1 + 2 + 2 against the gradient's 1 + 2 matrix products per layer: the
bound is 5/3. Memory is XLA's own account of the compiled programs: temporaries and outputs.

    python benchmarks/ggn.py
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from record import write
from vectors import compare

import ggn_jax


def mlp(sizes: tuple[int, ...], batch: int) -> tuple:
    """A tanh network with a cross-entropy head."""
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    params = [jax.random.normal(k, (i, o)) / i**0.5 for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def model_fn(params: list, x: jax.Array) -> jax.Array:
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return x @ params[-1]

    inputs = jax.random.normal(jax.random.key(1), (batch, sizes[0]))
    targets = jax.random.randint(jax.random.key(2), (batch,), 0, sizes[-1])
    return model_fn, params, inputs, targets, ggn_jax.CrossEntropyLoss()


def convnet(batch: int) -> tuple:
    """Two convolutions and a linear head on 28 x 28 images."""
    k1, k2, k3, k4, k5 = jax.random.split(jax.random.key(0), 5)
    params = {
        "conv1": jax.random.normal(k1, (3, 3, 1, 16)) / 3,
        "conv2": jax.random.normal(k2, (3, 3, 16, 32)) / 12,
        "head": jax.random.normal(k3, (7 * 7 * 32, 10)) / 40,
    }

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(x)

    def model_fn(params: dict, x: jax.Array) -> jax.Array:
        x = conv(conv(x, params["conv1"]), params["conv2"])
        return x.reshape(x.shape[0], -1) @ params["head"]

    inputs = jax.random.normal(k4, (batch, 28, 28, 1))
    return model_fn, params, inputs, jax.random.randint(k5, (batch,), 0, 10), ggn_jax.CrossEntropyLoss()


def language_head(positions: int, width: int, classes: int) -> tuple:
    """A layer and a 50,000-class head on the positions of one sequence batch, classes last."""
    model_fn, params, inputs, targets, _ = mlp((width, width, classes), positions)
    loss = ggn_jax.CrossEntropyLoss(class_axis=-1)
    return model_fn, params, inputs.reshape(8, -1, width), targets.reshape(8, -1), loss


PROBLEMS = {
    "MLP 784-512-512-10, batch 512": lambda: mlp((784, 512, 512, 10), 512),
    "convnet 28x28, batch 128": lambda: convnet(128),
    "50,000-class head, 2,048 positions": lambda: language_head(2048, 128, 50_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    print(f"JAX on {jax.devices()[0].device_kind}, float32")
    print(f"{'model':<38}{'product ms':>12}{'gradient ms':>13}{'ratio':>8}{'MiB':>8}{'grad MiB':>10}{'ratio':>8}")
    rows = []
    for name, make in PROBLEMS.items():
        model_fn, params, inputs, targets, loss = make()

        def product(params, v, inputs, targets, model_fn=model_fn, loss=loss):
            return ggn_jax.GGNLinearOperator(model_fn, loss, params, (inputs, targets)).mv(v)

        def gradient(params, inputs, targets, model_fn=model_fn, loss=loss):
            return jax.grad(lambda params: loss(model_fn(params, inputs), targets))(params)

        compiled = jax.jit(product).lower(params, params, inputs, targets).compile()
        compiled_gradient = jax.jit(gradient).lower(params, inputs, targets).compile()
        figures = compare(
            lambda c=compiled, p=params, x=inputs, y=targets: jax.block_until_ready(c(p, p, x, y)),
            lambda c=compiled_gradient, p=params, x=inputs, y=targets: jax.block_until_ready(c(p, x, y)),
            args.rounds,
        )
        memory = [c.memory_analysis() for c in (compiled, compiled_gradient)]
        mib = [(m.temp_size_in_bytes + m.output_size_in_bytes) / 2**20 for m in memory]
        row = {
            "model": name,
            "product_ms": figures["ours_ms"],
            "gradient_ms": figures["peer_ms"],
            "time_ratio": 1 / figures["ratio"],
            "product_mib": mib[0],
            "gradient_mib": mib[1],
            "memory_ratio": mib[0] / mib[1],
        }
        rows.append(row)
        values = list(row.values())[1:]
        print(f"{name:<38}" + "".join(f"{v:>{w}.2f}" for v, w in zip(values, (12, 13, 8, 8, 10, 8), strict=True)))
    if args.json:
        write(args.json, rows)


if __name__ == "__main__":
    main()
