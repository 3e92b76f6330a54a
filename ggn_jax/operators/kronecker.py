"""Kronecker-factored approximations of the generalized Gauss-Newton matrix."""

from ggn_jax.operators.base import register
from ggn_jax.operators.factored import FactoredLinearOperator


class KFACLinearOperator(FactoredLinearOperator):
    """KFAC: for each layer, the GGN's block as a Kronecker product `B (x) A` (Martens & Grosse 2015).

    Layers are found by tracing `model_fn` (`ggn_jax.report` shows them). With layer inputs `a`, output gradients `g` of
    the loss's gradient output vectors, `N` examples and `S` positions that share the weight (Eschenhagen et al. 2023):

    ```
    A = sum_{n,s} a a^T / (N S)        B = sum_{v,n,s} g g^T        block = B (x) A on row-major [out, in]
    ```

    `g` carries the loss's reduction and weights. It equals the GGN's block for deep linear networks with squared error,
    and for one example with one position. Grouped convolutions have a factor pair per group; weights used several times
    have a sum of Kronecker terms; embeddings a diagonal `A` of counts. Parameters that scale or shift entry by entry
    (normalisation layers) have their exact GGN block.

    The operator is a pytree: build it inside `jax.jit`, differentiate what is computed from it (`logdet`, `solve`,
    roots, traces) in parameters, inputs or damping. Its leaves are the factors and the exact blocks, so `jax.tree.map`
    acts on `A` *and* `B`: three times each leaf is nine times the operator. Use `3 * operator`, `a + b`,
    `ggn_jax.average_operators`, or `ggn_jax.average_factors` for the means of the factors.

    As a preconditioner of conjugate gradients on the damped GGN, pass `kfac.inverse(damping)`. In float32, use
    `lineax.CG(rtol, atol, stabilise_every=None)`: by default lineax replaces the residual by `b - A x` every ten steps
    without restarting the search directions. Near the smallest residual that float32 allows, that is rounding error,
    which the preconditioner multiplies by up to `1 / damping`, and the iteration diverges. Where lineax mistakes
    curvature for a breakdown (see `GGNLinearOperator`), pass `1e3 * kfac.inverse(damping)`: the factor cancels.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`, whose layers are found by tracing it.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Inputs may be a pytree of arrays and of PRNG keys (one for each example, for
            dropout); every leading axis is the batch's, except in `ggn_jax.Unbatched` inputs. Targets may be None where
            the loss's curvature and weights depend on none (no class weights, no `pos_weight`): nothing is ignored
            then.
        key: a PRNG key for sampling: of the targets of `"mc"`, and of the signs of `"type-2"` with several loss
            positions. Ignored where nothing is sampled.
        mask: `[N, *positions]`, true for real inputs; None (default) for no padding. Layers with these sharing
            positions leave the others out of `A`. A layer has them if the lengths of its position axes are the mask's,
            in any order; axes of equal length are in the order in which the inputs have them, and refused where the
            trace does not tell it. Axes of length 1, and those that weights made, such as heads, do not count. Position
            `i` of the mask is position `i` of the layer: a model that flips or shuffles positions needs a mask that is
            flipped as well. All other layers use all inputs.
        chunk_size: how many examples to process at once; None (default) for all. For a sharded batch it counts the
            examples of all devices together: pass a multiple of their number, and each device processes some of its
            own.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
        examples: `"independent"` (default): `model_fn` is traced on one example, and treats each as if it were alone.
            `"coupled"`, for batch normalisation in training mode, attention within a batch, contrastive losses, or a
            graph as a batch: it is traced on the whole batch, which then is one example with the positions of all
            examples. `A` and `B` are sums over all of these, a gradient is the batch's, for each vector, and sampling
            is per example. With `"type-2"`, `positions="exact"` back-propagates each example's vectors separately,
            `"signs"` those of all examples together. `chunk_size` is refused.
        **options: options of `KroneckerOptions`, whose page has their values and defaults: `fisher_type` and
            `mc_samples` (which vectors are back-propagated), `positions`, `vector_chunk_size`, `sharing`, `bias` and
            `tied` (how factors are made), `on_uncovered`, `small` and `max_small_size` (parameters without a layer),
            `large`, `max_dense_size` and `block_size` (factors that are too large).

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them; for a model whose
            examples depend on each other (checked on four, outside of `jit`); for parameters that are not covered, with
            `on_uncovered="error"`.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params = {"w": jnp.ones((2, 3)) / 2, "b": jnp.zeros(3), "v": jnp.ones((3, 4)) / 3}
        >>> model_fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
        >>> batch = jnp.ones((8, 2)), jnp.arange(8) % 4
        >>> kfac = KFACLinearOperator(model_fn, ggn_jax.CrossEntropyLoss(), params, batch, key=jax.random.key(0))
        >>> step = kfac.inverse(damping=1e-3).mv(params)
        >>> kfac.block("w").shape  # (3 outputs) x (2 inputs and the bias)
        (9, 9)

    References:
        - Martens and Grosse (2015), *Optimizing neural networks with Kronecker-factored approximate curvature*:
          https://arxiv.org/abs/1503.05671
        - Eschenhagen, Immer, Turner, Schneider and Hennig (2023), *Kronecker-factored approximate curvature for modern
          neural network architectures*: https://arxiv.org/abs/2311.00636
    """

    _method = "kfac"


class EKFACLinearOperator(FactoredLinearOperator):
    """EKFAC: KFAC's eigenbases, with the GGN's own diagonal in them (George et al. 2018).

    `(Q_B (x) Q_A) diag(E) (Q_B (x) Q_A)^T` with `Q` the eigenvectors of KFAC's factors and
    `E = sum_{v,n} (Q_B^T (sum_s g a^T) Q_A)^2` from each example's weight gradients: no other diagonal in this basis is
    nearer to the GGN's block in Frobenius norm, so it is never farther than KFAC's.

    Two of them have different eigenbases, so their leaves cannot be averaged: use `ggn_jax.average_operators` or
    `(a + b) / 2`. Eigenvectors have derivatives where eigenvalues of a factor differ, or are both 0; where other
    eigenvalues are equal, EKFAC depends on which eigenvectors the decomposition chose, and derivatives leave that out.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`, whose layers are found by tracing it.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Inputs may be a pytree of arrays and of PRNG keys (one for each example, for
            dropout); every leading axis is the batch's, except in `ggn_jax.Unbatched` inputs. Targets may be None where
            the loss's curvature and weights depend on none (no class weights, no `pos_weight`): nothing is ignored
            then.
        key: a PRNG key for sampling: of the targets of `"mc"`, and of the signs of `"type-2"` with several loss
            positions. Ignored where nothing is sampled.
        mask: `[N, *positions]`, true for real inputs; None (default) for no padding. Layers with these sharing
            positions leave the others out of `A`. A layer has them if the lengths of its position axes are the mask's,
            in any order; axes of equal length are in the order in which the inputs have them, and refused where the
            trace does not tell it. Axes of length 1, and those that weights made, such as heads, do not count. Position
            `i` of the mask is position `i` of the layer: a model that flips or shuffles positions needs a mask that is
            flipped as well. All other layers use all inputs.
        chunk_size: how many examples to process at once; None (default) for all. For a sharded batch it counts the
            examples of all devices together: pass a multiple of their number, and each device processes some of its
            own.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
        examples: `"independent"` (default): `model_fn` is traced on one example, and treats each as if it were alone.
            `"coupled"`, for batch normalisation in training mode, attention within a batch, contrastive losses, or a
            graph as a batch: it is traced on the whole batch, which then is one example with the positions of all
            examples. `A` and `B` are sums over all of these, a gradient is the batch's, for each vector, and sampling
            is per example. With `"type-2"`, `positions="exact"` back-propagates each example's vectors separately,
            `"signs"` those of all examples together. `chunk_size` is refused.
        **options: options of `KroneckerOptions`, whose page has their values and defaults: `fisher_type` and
            `mc_samples` (which vectors are back-propagated), `positions`, `vector_chunk_size`, `sharing`, `bias` and
            `tied` (how factors are made), `on_uncovered`, `small` and `max_small_size` (parameters without a layer),
            `large`, `max_dense_size` and `block_size` (factors that are too large). The fisher type `"forward-only"`
            has no gradients for the diagonal and is refused.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them; for a model whose
            examples depend on each other (checked on four, outside of `jit`); for parameters that are not covered, with
            `on_uncovered="error"`.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> loss = ggn_jax.CrossEntropyLoss()
        >>> ekfac = EKFACLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
        >>> ekfac.solve(params, damping=0.1)["w"].shape
        (2, 3)

    References:
        - George, Laurent, Bouthillier, Ballas and Vincent (2018), *Fast approximate natural gradient descent in a
          Kronecker-factored eigenbasis*: https://arxiv.org/abs/1806.03884
    """

    _method = "ekfac"


class KFOCLinearOperator(FactoredLinearOperator):
    """KFOC: for each layer the Kronecker product nearest to the GGN's own block (Koroko et al. 2022).

    It minimises `|B (x) A - sum_{v,n} vec(G) vec(G)^T|` in Frobenius norm over all `A` and `B`, with each example's
    weight gradients `G = sum_s g a^T`: the leading singular pair of the rearranged block, by power iterations that keep
    both factors positive semi-definite. It is never farther from the block than KFAC.

    All vectors of all examples are kept at once; with `from_batches`, those of one batch, and each iteration goes over
    the batches twice.

    Args:
        model_fn: the model, `model_fn(params, inputs) -> outputs [N, *out]`, whose layers are found by tracing it.
        loss: a `Loss`, such as `CrossEntropyLoss()`, with its reduction and weights.
        params: the parameters, a pytree of floating arrays.
        batch: a pair `(inputs, targets)`. Inputs may be a pytree of arrays and of PRNG keys (one for each example, for
            dropout); every leading axis is the batch's, except in `ggn_jax.Unbatched` inputs. Targets may be None where
            the loss's curvature and weights depend on none (no class weights, no `pos_weight`): nothing is ignored
            then.
        key: a PRNG key for sampling: of the targets of `"mc"`, and of the signs of `"type-2"` with several loss
            positions. Ignored where nothing is sampled.
        mask: must be None, which is the default: KFOC has no use for a mask.
        chunk_size: must be None, which is the default: all examples are processed at once.
        has_aux: whether `model_fn` returns `(outputs, aux)`, of which only the outputs are used; False by default.
        examples: `"independent"` (default): `model_fn` is traced on one example, and treats each as if it were alone.
            `"coupled"`, for batch normalisation in training mode, attention within a batch, contrastive losses, or a
            graph as a batch: it is traced on the whole batch, which then is one example with the positions of all
            examples. `A` and `B` are sums over all of these, a gradient is the batch's, for each vector, and sampling
            is per example. With `"type-2"`, `positions="exact"` back-propagates each example's vectors separately,
            `"signs"` those of all examples together. `chunk_size` is refused.
        **options: options of `KroneckerOptions`, whose page has their values and defaults: `fisher_type` and
            `mc_samples` (which vectors are back-propagated), `positions`, `vector_chunk_size`, `sharing`, `bias` and
            `tied` (how factors are made), `on_uncovered`, `small` and `max_small_size` (parameters without a layer),
            `large`, `max_dense_size` and `block_size` (factors that are too large). `sharing` and `tied` have no effect
            on KFOC and are refused, as is the fisher type `"forward-only"`.

    Raises:
        ValueError, TypeError, NotImplementedError: for arguments that do not fit, naming them; for a model whose
            examples depend on each other (checked on four, outside of `jit`); for parameters that are not covered, with
            `on_uncovered="error"`.

    Example:
        >>> import jax, jax.numpy as jnp, ggn_jax
        >>> params, batch = {"w": jnp.ones((2, 3))}, (jnp.ones((8, 2)), jnp.arange(8) % 3)
        >>> loss = ggn_jax.CrossEntropyLoss()
        >>> kfoc = KFOCLinearOperator(lambda p, x: x @ p["w"], loss, params, batch, fisher_type="type-2")
        >>> kfoc.solve(params, damping=0.1)["w"].shape
        (2, 3)

    References:
        - Koroko et al. (2022), *Efficient approximations of the Fisher matrix in neural networks using Kronecker
          product singular value decomposition*: https://arxiv.org/abs/2201.10285
    """

    _method = "kfoc"


register(KFOCLinearOperator, positive_semidefinite=True)
register(KFACLinearOperator, positive_semidefinite=True)
register(EKFACLinearOperator, positive_semidefinite=True)
