"""A solve with the damped GGN in function space, beside those in the space of the parameters.

    python benchmarks/gram.py

For N examples with C outputs and P parameters: `GramLinearOperator.solve_ggn` factorises a matrix of size N C, put
together layer by layer; the same from the rows of J (`jax.jacrev` of each example), whose products cost (N C)^2 P;
conjugate gradients on `GGNLinearOperator` from one linearisation, to a relative residual of 1e-3. Memory is XLA's own
account of temporaries, and ratios are those of alternating rounds.
"""

import argparse

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from ggn import mlp
from jax.flatten_util import ravel_pytree
from vectors import compare

import ggn_jax

PROBLEMS = {
    "MLP 64-256-256-10, batch 32": ((64, 256, 256, 10), 32),
    "MLP 784-256-256-10, batch 32": ((784, 256, 256, 10), 32),
    "MLP 256-256-256-1, batch 256": ((256, 256, 256, 1), 256),
}
DAMPING = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"JAX on {jax.devices()[0].device_kind}, float32, damping {DAMPING:g}")
    print(f"{'model':<32}{'N C':>6}{'P':>9}{'gram ms':>9}{'MiB':>7}", end="")
    print(f"{'J ms':>8}{'MiB':>7}{'ratio':>7}{'CG ms':>8}{'ratio':>7}")
    for name, (sizes, batch) in PROBLEMS.items():
        model_fn, params, inputs, targets, loss = mlp(sizes, batch)
        if sizes[-1] == 1:
            loss, targets = ggn_jax.BCEWithLogitsLoss(), (targets[:, None] % 2).astype(float)
        gradient = jax.grad(lambda params: loss(model_fn(params, inputs), targets))(params)

        def by_gram(params, v):
            options = {"loss": loss, "targets": targets}
            return ggn_jax.GramLinearOperator(model_fn, params, inputs, **options).solve_ggn(v, DAMPING)

        def by_rows(params, v):
            flat, unravel = ravel_pytree(params)
            outputs = model_fn(params, inputs)
            rows = jax.vmap(jax.jacrev(lambda flat, x: model_fn(unravel(flat), x[None])[0]), (None, 0))(flat, inputs)
            columns = ggn_jax.make_batch_grad_output_fn(loss, "type-2")(outputs, targets)  # of S, [V, N, C]
            x = jnp.einsum("vnc,ncp->nvp", columns, rows).reshape(-1, flat.size)
            v, _ = ravel_pytree(v)
            gram = x @ x.T + DAMPING * jnp.eye(len(x))
            return unravel((v - x.T @ jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram), x @ v)) / DAMPING)

        def by_cg(params, v):
            ggn = lx.linearise(ggn_jax.GGNLinearOperator(model_fn, loss, params, (inputs, targets)).damped(DAMPING))
            size = optax.tree.norm(v)
            scaled = jax.tree.map(lambda leaf: leaf / size, v)
            options = {
                "preconditioner": lx.TaggedLinearOperator(
                    1e6 * lx.IdentityLinearOperator(ggn.in_structure()), lx.positive_semidefinite_tag
                )
            }
            solver = lx.CG(rtol=1e-3, atol=1e-3, norm=optax.tree.norm, max_steps=500)
            return lx.linear_solve(ggn, scaled, solver, options=options, throw=False).value

        compiled = [jax.jit(fn).lower(params, gradient).compile() for fn in (by_gram, by_rows, by_cg)]
        gram, rows, cg = (lambda c=c: jax.block_until_ready(c(params, gradient)) for c in compiled)
        beside_rows, beside_cg = compare(gram, rows, args.rounds), compare(gram, cg, args.rounds)
        mib = [c.memory_analysis().temp_size_in_bytes / 2**20 for c in compiled]
        count = sum(leaf.size for leaf in params)
        print(
            f"{name:<32}{batch * sizes[-1]:>6}{count:>9}{beside_cg['ours_ms']:>9.1f}{mib[0]:>7.0f}"
            f"{beside_rows['peer_ms']:>8.1f}{mib[1]:>7.0f}{beside_rows['ratio']:>7.2f}"
            f"{beside_cg['peer_ms']:>8.1f}{beside_cg['ratio']:>7.2f}"
        )


if __name__ == "__main__":
    main()
