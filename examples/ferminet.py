"""A small FermiNet (Pfau et al. 2020): the logarithm of a wave function, and the energy of its electrons."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]


# Values that carry their derivatives in the electrons' coordinates: the forward Laplacian (Li et al. 2023).


@jax.tree_util.register_dataclass
@dataclass
class Carried:
    """A value, its slopes `[coordinates, ...]`, and its Laplacian, the sum of second derivatives."""

    value: jax.Array
    slopes: jax.Array
    laplacian: jax.Array


def apply(f: Callable[..., jax.Array], *xs: Any, affine: bool = False) -> Any:
    """`f` of arrays, or of values that carry derivatives; those of second order of an affine function are 0."""
    if not isinstance(xs[0], Carried):
        return f(*xs)
    values, slopes = tuple(x.value for x in xs), tuple(x.slopes for x in xs)
    value, laplacian = jax.jvp(f, values, tuple(x.laplacian for x in xs))

    def along(*directions: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = lambda *xs: jax.jvp(f, xs, directions)[1]  # noqa: E731
        return (first(*values), jnp.zeros_like(value)) if affine else jax.jvp(first, values, directions)

    slopes, second = jax.vmap(along)(*slopes)
    return Carried(value, slopes, laplacian + second.sum(0))


@dataclass(frozen=True)
class System:
    """Nuclei with their charges, and how many electrons have which spin; `energy` is known from other methods."""

    title: str
    places: tuple[tuple[float, float, float], ...]
    charges: tuple[int, ...]
    spins: tuple[int, int]
    energy: float

    def potential(self, r: jax.Array) -> jax.Array:
        """The Coulomb energy of electrons at `r` `[n, 3]` and of the nuclei."""
        nuclei, charges = jnp.asarray(self.places, r.dtype), jnp.asarray(self.charges, r.dtype)
        bodies, charges = jnp.concatenate([r, nuclei]), jnp.concatenate([-jnp.ones(len(r), r.dtype), charges])
        i, j = np.triu_indices(len(charges), 1)
        return jnp.sum(charges[i] * charges[j] / jnp.linalg.norm(bodies[i] - bodies[j], axis=1))


SYSTEMS = {
    "helium": System("Helium", ((0.0, 0.0, 0.0),), (2,), (1, 1), -2.903724),
    "lithium": System("Lithium", ((0.0, 0.0, 0.0),), (3,), (2, 1), -7.478060),
    "lih": System("Lithium hydride", ((0.0, 0.0, 0.0), (3.015, 0.0, 0.0)), (3, 1), (2, 2), -8.070548),
}


@dataclass(frozen=True)
class FermiNet:
    """`log |psi|` as a sum of determinants, whose orbitals are a network's; every electron sees all others."""

    system: System
    widths: tuple[int, int] = (32, 8)
    """Of the streams of electrons and of pairs."""
    layers: int = 3
    determinants: int = 4

    def init(self, key: jax.Array) -> Params:
        atoms, electrons = len(self.system.charges), sum(self.system.spins)
        keys = iter(jax.random.split(key, 2 * self.layers + 4))

        def dense(size: int, out: int) -> dict[str, jax.Array]:
            return {"w": jax.random.normal(next(keys), (size, out)) / size**0.5, "b": jnp.zeros(out)}

        one, two, streams, pairs = 4 * atoms, 4, [], []
        for layer in range(self.layers):
            streams.append(dense(3 * one + 2 * two, self.widths[0]))
            if layer + 1 < self.layers:  # the last layer's pairs would be read nowhere
                pairs.append(dense(two, self.widths[1]))
            one, two = self.widths
        orbitals = [dense(one, self.determinants * electrons) for _ in self.system.spins]
        shape = atoms, self.determinants * electrons
        envelopes = [{"pi": jnp.ones(shape), "sigma": jnp.ones(shape)} for _ in self.system.spins]
        return {"streams": streams, "pairs": pairs, "orbitals": orbitals, "envelopes": envelopes}

    def log_psi(self, params: Params, r: Any) -> Any:
        """`log |psi|` at the places `r` `[n, 3]` of one set of electrons."""
        up, electrons = self.system.spins[0], sum(self.system.spins)
        spins = slice(0, up), slice(up, electrons)
        nuclei, eye = jnp.asarray(self.system.places), jnp.eye(electrons)[:, :, None]

        def to_atoms(r: jax.Array) -> jax.Array:
            return jnp.linalg.norm(r[:, None] - nuclei.astype(r.dtype), axis=2)

        def of_electrons(r: jax.Array, distances: jax.Array) -> jax.Array:
            vectors = (r[:, None] - nuclei.astype(r.dtype)).reshape(electrons, -1)
            return jnp.concatenate([vectors, distances], 1)

        def of_pairs(r: jax.Array) -> jax.Array:
            apart = r[:, None] - r[None]
            far = jnp.linalg.norm(apart + eye.astype(r.dtype), axis=2, keepdims=True)  # finite derivatives at i = j
            return jnp.concatenate([apart, far * (1 - eye.astype(r.dtype))], 2)

        def mixed(h: jax.Array, g: jax.Array) -> jax.Array:
            means = [jnp.broadcast_to(h[spin].mean(0, keepdims=True), h.shape) for spin in spins]
            return jnp.concatenate([h, *means, *(g[:, spin].mean(1) for spin in spins)], 1)

        def dense(layer: dict[str, jax.Array], x: Any) -> Any:
            return apply(lambda x: x @ layer["w"] + layer["b"], x, affine=True)

        def block(layer: dict[str, jax.Array], x: Any, before: Any) -> Any:
            new = apply(jnp.tanh, dense(layer, x))
            return apply(jnp.add, before, new, affine=True) if shape(before) == shape(new) else new

        distances = apply(to_atoms, r)
        h, g = apply(of_electrons, r, distances, affine=True), apply(of_pairs, r)
        for layer, pairs in zip(params["streams"], [*params["pairs"], None], strict=True):
            h, g = block(layer, apply(mixed, h, g, affine=True), h), g if pairs is None else block(pairs, g, g)

        def orbitals(h: jax.Array, distances: jax.Array, envelope: dict[str, jax.Array]) -> jax.Array:
            decay = jnp.exp(-jnp.abs(envelope["sigma"]) * distances[:, :, None])
            made = h * jnp.sum(envelope["pi"] * decay, axis=1)
            return made.reshape(len(h), self.determinants, electrons).swapaxes(0, 1)

        def combined(*parts: jax.Array) -> jax.Array:
            signs, logs = jnp.linalg.slogdet(jnp.concatenate(parts, 1))
            most = jax.lax.stop_gradient(logs.max())
            return jnp.log(jnp.abs(jnp.sum(signs * jnp.exp(logs - most)))) + most

        parts = []
        for spin, layer, envelope in zip(spins, params["orbitals"], params["envelopes"], strict=True):
            own = [apply(lambda x, spin=spin: x[spin], x, affine=True) for x in (h, distances)]
            parts.append(apply(partial(orbitals, envelope=envelope), dense(layer, own[0]), own[1]))
        return apply(combined, *parts)

    def batched(self, params: Params, r: jax.Array) -> jax.Array:
        """`log |psi|` `[N, 1]` of samples `[N, n, 3]`, as `ggn_jax` takes it."""
        return jax.vmap(self.log_psi, (None, 0))(params, r)[:, None]

    def local_energy(self, params: Params, r: jax.Array) -> jax.Array:
        """`(H psi) / psi` at `r` `[n, 3]`: `-1/2 (Laplacian log |psi| + |slopes|^2)` and the potential."""
        start = Carried(r, jnp.eye(r.size, dtype=r.dtype).reshape(r.size, *r.shape), jnp.zeros_like(r))
        found = self.log_psi(params, start)
        return -(found.laplacian + jnp.sum(found.slopes**2)) / 2 + self.system.potential(r)


def shape(x: Any) -> tuple[int, ...]:
    return (x.value if isinstance(x, Carried) else x).shape
