"""Randomness: it lives in torch, and reaches JAX as a seed that torch draws.

A seed is one float64 of a standard normal distribution, whose bits become a JAX key. Drawing it with torch's own
operator, outside of everything that JAX does, gives torch's semantics for free:

* one state gives one result, be it that of a `torch.Generator` or, without one, of `torch.manual_seed`, and each call
  advances it;
* `torch.vmap` draws one seed for each example (`randomness="different"`), one for all (`"same"`) or raises (`"error"`);
* traced graphs (`make_fx`, `torch.compile`) hold the draw, not its result. The backend inductor may draw other numbers
  for a state than torch does elsewhere, as it does for all random functions: `torch.normal` of float64 keeps its stream
  there until torch 2.13. In any version one state gives one result, and each call advances it.
"""

import jax
import jax.numpy as jnp
import torch


def draw_seed(device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """A seed `[1]` from the generator, or from the global one of the device."""
    # Of what gives enough bits in one cheap call, compiled graphs kept the stream of this one for longest.
    if generator is None:
        return torch.normal(torch.zeros(1, dtype=torch.float64, device=device), 1.0)
    mean = torch.zeros(1, dtype=torch.float64, device=generator.device)
    return torch.normal(mean, 1.0, generator=generator).to(device)


def key_from_seed(seed: jax.Array) -> jax.Array:
    """The JAX key of a seed, a float64 scalar."""
    bits = jax.lax.bitcast_convert_type(seed, jnp.uint32)
    # Named, since the default implementation is the user's to change.
    return jax.random.wrap_key_data(bits, impl="threefry2x32")
