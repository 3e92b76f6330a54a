"""KFAC in PyTorch: Kronecker factors of a digits classifier, from `torch.func` and `torch_bridge`.

A small PyTorch classifier is trained on scikit-learn's digits. For each linear layer with inputs `a` and output
gradients `g` (of the vectors that `torch_bridge` returns), KFAC approximates the layer's Gauss-Newton block by
`B (x) A`, `A` the mean of `a a^T` and `B` the sum of `g g^T`. The factors are compared with those of curvlinops'
`KFACLinearOperator`, and then, from one Monte-Carlo vector per example, turn gradients into training steps.

    pip install "ggn-jax[torch-examples]"
    python examples/torch_kfac.py
"""

import argparse
import math

import torch
from curvlinops import KFACLinearOperator
from sklearn.datasets import load_digits
from torch.func import functional_call, vjp, vmap
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh
from tqdm import tqdm

import torch_bridge

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
LOSS = CrossEntropyLoss()
DAMPING = 3e-2
ADAM_RATE = 1e-2


def make_model() -> Sequential:
    torch.manual_seed(0)
    return Sequential(Linear(64, 32), Tanh(), Linear(32, 10)).double()


def kfac_factors(model: Sequential, x: torch.Tensor, y: torch.Tensor, fisher_type: str, mc_samples: int = 1) -> Factors:
    """`A` (with a one for the bias as last input) and `B` of each linear layer, by name."""
    linears = {name: module for name, module in model.named_children() if isinstance(module, Linear)}
    params = {name: p.detach() for name, p in model.named_parameters()}
    inputs: dict[str, torch.Tensor] = {}

    def forward(shifts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The network with something added to each layer's output: the derivative in that is the layer's `g`."""
        f = x
        for name, module in model.named_children():
            own = {key.removeprefix(f"{name}."): p for key, p in params.items() if key.startswith(f"{name}.")}
            if name in linears:
                inputs[name] = f.detach()
            f = functional_call(module, own, (f,))
            f = f + shifts[name] if name in shifts else f
        return f

    shifts = {name: torch.zeros(len(x), linear.out_features, dtype=x.dtype) for name, linear in linears.items()}
    outputs, pull_back = vjp(forward, shifts)
    # All vectors of all data, with the loss's own reduction over the batch in them: [V, N, C].
    vectors = torch_bridge.make_batch_grad_output_fn(LOSS, fisher_type, mc_samples)(outputs.detach(), y)
    (gradients,) = vmap(pull_back)(vectors)  # each [V, N, d_out]
    factors = {}
    for name, g in gradients.items():
        a = torch.cat([inputs[name], torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        factors[name] = a.T @ a / len(x), torch.einsum("vni,vnj->ij", g, g)
    return factors


def largest_difference(factors: Factors, model: Sequential, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of our factors and curvlinops', relative to the largest entry of each factor."""
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False, "check_deterministic": False}
    peer = KFACLinearOperator(model, LOSS, list(model.parameters()), [(x, y)], **options)
    peer.compute_kronecker_factors()
    state = peer.state_dict()
    differences = []
    for name, pair in factors.items():
        theirs = state["input_covariances"][name], state["gradient_covariances"][name]
        # curvlinops' joint matrix has the bias last, as ours.
        differences += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(pair, theirs, strict=True)]
    return max(differences)


def natural_gradient(factors: Factors, model: Sequential, damping: float) -> Factors:
    """`(B + ...)^-1 G (A + ...)^-1` for weights and biases, the damping split as in Martens & Grosse (2015)."""
    steps = {}
    for name, (a, b) in factors.items():
        layer = model.get_submodule(name)
        gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
        pi = math.sqrt((a.trace() / len(a)) / (b.trace() / len(b)))
        damped_a = a + pi * math.sqrt(damping) * torch.eye(len(a), dtype=a.dtype)
        damped_b = b + math.sqrt(damping) / pi * torch.eye(len(b), dtype=b.dtype)
        step = torch.linalg.solve(damped_a, torch.linalg.solve(damped_b, gradient), left=False)
        steps[name] = step[:, :-1], step[:, -1]
    return steps


def train(x: torch.Tensor, y: torch.Tensor, steps: int, *, kfac: bool) -> list[float]:
    """The training losses of whole-batch steps, by KFAC or by Adam."""
    model = make_model()
    adam = torch.optim.Adam(model.parameters(), lr=ADAM_RATE)
    losses = []
    for _ in tqdm(range(steps), desc="KFAC" if kfac else "Adam", leave=False):
        model.zero_grad()
        value = LOSS(model(x), y)
        losses.append(value.item())
        value.backward()
        if kfac:
            factors = kfac_factors(model, x, y, "mc", mc_samples=1)
            with torch.no_grad():
                for name, (weight, bias) in natural_gradient(factors, model, DAMPING).items():
                    model.get_submodule(name).weight -= weight
                    model.get_submodule(name).bias -= bias
        else:
            adam.step()
    return [*losses, LOSS(model(x), y).item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 16), torch.from_numpy(digits.target).long()

    model = make_model()
    difference = largest_difference(kfac_factors(model, x, y, "type-2"), model, x, y)
    print(f"KFAC factors of {len(x)} digits: largest relative difference to curvlinops {difference:.1e}")
    if difference > 1e-10:
        raise SystemExit("The factors should agree to rounding.")

    kfac, adam = train(x, y, steps, kfac=True), train(x, y, steps, kfac=False)
    print(f"{'step':>6}{'KFAC':>10}{'Adam':>10}   training loss")
    for step in sorted({0, 1, 2, 5, 10, 20, steps // 2, steps}):
        if step <= steps:
            print(f"{step:>6}{kfac[step]:>10.4f}{adam[step]:>10.4f}")


if __name__ == "__main__":
    main()
