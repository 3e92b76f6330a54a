"""Train a character-level transformer on the source of Python's standard library with KFAC, SOAP, Muon, AdamW and SGD.

    pip install "ggn-jax[examples]"
    python examples/training_text.py

Two layers of width 64 with four heads, contexts of 64 characters, learned positions, layer normalisation first. All of
it has curvature: embeddings a diagonal factor of counts, normalisation and positions their exact blocks.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from training_common import Task, main, supervised

import ggn_jax

MODULES = ("argparse", "ast", "datetime", "difflib", "doctest", "inspect", "pathlib", "pickle", "random", "typing")
LENGTH, WIDTH, HEADS, LAYERS, BATCH, EVALUATED = 64, 64, 4, 2, 64, 256
LOSS = ggn_jax.CrossEntropyLoss(class_axis=-1)


class Transformer(linen.Module):
    """Logits of the next character."""

    characters: int

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(self.characters, WIDTH)(tokens)
        x = x + self.param("positions", linen.initializers.normal(0.02), (LENGTH, WIDTH))[None]
        causal = linen.make_causal_mask(tokens)
        for _ in range(LAYERS):
            h = linen.LayerNorm()(x)
            q, k, v = (linen.Dense(WIDTH)(h).reshape(*h.shape[:2], HEADS, -1) for _ in range(3))
            h = linen.dot_product_attention(q, k, v, mask=causal).reshape(h.shape)
            x = x + linen.Dense(WIDTH)(h)
            h = linen.Dense(4 * WIDTH)(linen.LayerNorm()(x))
            x = x + linen.Dense(WIDTH)(linen.gelu(h))
        return linen.Dense(self.characters)(linen.LayerNorm()(x))


def load_text() -> tuple[np.ndarray, int]:
    """The modules' characters as numbers, and how many different ones there are."""
    text = ""
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        text += Path(spec.origin).read_text(encoding="utf-8")
    text = "".join(c for c in text if c.isascii())
    characters, numbers = np.unique(list(text), return_inverse=True)
    return numbers.astype(np.int32), len(characters)


def task() -> Task:
    numbers, characters = load_text()
    text = jnp.asarray(numbers)

    def cut(starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        windows = text[starts[:, None] + jnp.arange(LENGTH + 1)[None]]
        return windows[:, :-1], windows[:, 1:]

    def batch_of(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cut(jax.random.randint(key, (BATCH,), 0, text.size - LENGTH - 1))

    fixed = cut(jax.random.randint(jax.random.key(1), (EVALUATED,), 0, text.size - LENGTH - 1))
    module = Transformer(characters)
    return supervised(
        "standard library, transformer",
        lambda params, tokens: module.apply({"params": params}, tokens),
        LOSS,
        lambda key: module.init(key, fixed[0][:1])["params"],
        batch_of,
        fixed,
        numbers={
            "grid": [0.003, 0.01, 0.03],
            "damping": 0.001,
            "kl_clip": 0.01,
            "decay": 0.9,
            "factor_interval": 2,
            "inverse_interval": 2,
        },
        quadratic={"grid": [1.0, 10.0], "adapted": {"interval": 5}, "factor_interval": 5, "small": "diagonal"},
        warmup=50,
        block=10,
    )


if __name__ == "__main__":
    main(__doc__, "training_text", [task], steps=600)
