"""More operators of PyTorch in JAX: losses, linear algebra, order statistics, Fourier transforms and other names."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's custom
from module_cases import INPUTS, Case, check, draw
from torch import nn

import torch_bridge

REDUCTIONS = ("none", "mean", "sum")
CLASSES = torch.tensor([1, 3])
IGNORED = torch.tensor([[0, -100, 1], [1, 1, 3]])
WEIGHT = torch.arange(1, 5).double()

LOSSES: dict[str, Case] = {
    "mse": lambda t: [F.mse_loss(t["x"], t["y"], reduction=r) for r in REDUCTIONS],
    "l1": lambda t: [F.l1_loss(t["x"], t["y"], reduction=r) for r in REDUCTIONS],
    "smooth_l1": lambda t: [F.smooth_l1_loss(t["x"], t["y"], beta=beta) for beta in (0.0, 0.5)],
    "huber": lambda t: F.huber_loss(t["x"], t["y"], delta=0.5),
    "bce": lambda t: [
        F.binary_cross_entropy(t["p"], t["p"].detach().round(), t["p"].detach(), reduction=r) for r in REDUCTIONS
    ],
    "bce with logits": lambda t: [
        F.binary_cross_entropy_with_logits(t["x"], t["p"].detach()),
        F.binary_cross_entropy_with_logits(t["x"], t["p"], t["p"].detach(), pos_weight=WEIGHT, reduction="sum"),
    ],
    "cross entropy": lambda t: [
        F.cross_entropy(t["x"][:, 0], CLASSES),
        F.cross_entropy(t["x"][0, 0], CLASSES[0]),
        *(F.cross_entropy(t["x"].mT, IGNORED, WEIGHT, reduction=r, label_smoothing=0.1) for r in REDUCTIONS),
        *(F.cross_entropy(t["x"].mT, IGNORED, reduction=r, label_smoothing=0.1) for r in REDUCTIONS),
        F.cross_entropy(t["x"].mT, IGNORED.clamp(min=0), ignore_index=1),
        *(F.cross_entropy(t["x"], t["p"].softmax(1), WEIGHT[:3], reduction=r, label_smoothing=0.1) for r in REDUCTIONS),
    ],
    "nll": lambda t: [
        F.nll_loss(t["x"][:, 0], CLASSES, WEIGHT),
        *(F.nll_loss(t["x"].mT, IGNORED, reduction=r) for r in REDUCTIONS),
    ],
    "kl": lambda t: [
        F.kl_div(t["x"], t["p"], reduction="batchmean"),
        F.kl_div(t["x"], t["y"], reduction="sum", log_target=True),
    ],
    "poisson": lambda t: [
        F.poisson_nll_loss(t["x"], t["p"]),
        F.poisson_nll_loss(t["p"], t["i"].abs().double(), log_input=False, full=True, reduction="none"),
    ],
    "hinge": lambda t: F.hinge_embedding_loss(t["x"], t["y"].detach().sign(), margin=0.5),
    "ranking": lambda t: F.margin_ranking_loss(t["x"], t["y"], t["p"].detach().sub(0.5).sign(), margin=0.1),
    "triplet": lambda t: [
        F.triplet_margin_loss(t["x"][0], t["x"][1], t["y"][0], swap=s, p=p) for s, p in ((False, 2), (True, 1))
    ],
    "cosine": lambda t: F.cosine_embedding_loss(t["x"][0], t["y"][0], torch.tensor([1, -1, 1]), 0.1),
    "soft margin": lambda t: F.soft_margin_loss(t["x"], t["y"].detach().sign()),
    "multi margin": lambda t: [
        F.multi_margin_loss(t["x"][:, 0], CLASSES, p=2, weight=WEIGHT),
        F.multi_margin_loss(t["x"][0, 0], CLASSES[0], margin=0.5),
    ],
    "multilabel soft": lambda t: F.multilabel_soft_margin_loss(t["x"][:, 0], t["p"][:, 0].round()),
}

SQUARE = draw(2, 3, 3)
MORE: dict[str, Case] = {
    "matrices": lambda t: [
        torch.matrix_exp(t["s"]),
        torch.linalg.inv(t["s"]),
        torch.linalg.det(t["s"]),
        torch.linalg.slogdet(t["s"]),
        torch.logdet(t["s"] @ t["s"].mT),
        torch.linalg.cholesky(t["s"] @ t["s"].mT),
        torch.cholesky_solve(t["x"], t["s"].tril(), upper=False),
        torch.linalg.solve(t["s"], t["x"]),
        torch.linalg.solve(t["s"], t["x"].mT, left=False),
        torch.linalg.solve_triangular(t["s"].triu(), t["x"], upper=True),
        torch.linalg.eigvalsh(t["s"]),
        torch.linalg.svdvals(t["x"]),
        torch.linalg.qr(t["s"]),
        torch.linalg.matrix_power(t["s"], 3),
    ],
    "products": lambda t: [
        t["s"][0].trace(),
        torch.linalg.multi_dot([t["x"][0], t["y"][0].T, t["s"][0]]),
        torch.kron(t["s"][0], t["x"][0]),
        torch.block_diag(t["s"][0], t["x"][0]),
        torch.linalg.vecdot(t["x"], t["y"], dim=1),
    ],
    "matrix norms": lambda t: [torch.linalg.matrix_norm(t["x"], o) for o in ("fro", "nuc", 1, float("inf"))],
    "norms": lambda t: [torch.linalg.norm(t["x"]), torch.linalg.norm(t["x"], 1, 1), torch.dist(t["x"], t["y"], 3)],
    "distances": lambda t: [
        torch.cdist(t["x"], t["x"][:, :2]),
        torch.cdist(t["x"], t["y"], p=1),
        F.pairwise_distance(t["x"], t["y"], keepdim=True),
        F.pdist(t["x"][0]),
    ],
    "order": lambda t: [
        t["x"].median(),
        t["e"].median(),
        t["x"].median(1),
        t["i"].median(2, keepdim=True),
        t["x"].kthvalue(2, 1),
        t["x"].quantile(0.3, dim=1),
        t["x"].quantile(torch.tensor([0.2, 0.9]).double(), dim=2, interpolation="lower"),
        t["x"].aminmax(dim=1),
        t["x"].msort(),
    ],
    "running": lambda t: [t["x"].cummax(1), t["i"].cummin(2), t["e"].clamp(-1, 1).cummax(1), t["x"].logcumsumexp(1)],
    "nan": lambda t: [
        torch.where(t["b"], t["x"], float("nan")).nansum(1),
        torch.where(t["b"], t["x"], float("nan")).nanmean(),
    ],
    "pairs": lambda t: [
        torch.hypot(t["x"], t["y"]),
        torch.logaddexp(t["x"], t["y"]),
        torch.logaddexp2(t["x"], t["y"]),
        torch.copysign(t["x"], t["y"]),
        torch.special.xlog1py(t["x"], t["p"]),
        torch.isclose(t["x"], t["x"] + 1e-9),
        torch.gcd(t["i"], t["i"] + 2),
    ],
    "special": lambda t: [
        torch.special.i0(t["x"]),
        torch.special.i0e(t["x"]),
        torch.special.i1(t["x"]),
        torch.special.i1e(t["x"]),
        torch.special.ndtr(t["x"]),
        torch.special.log_ndtr(t["x"]),
        torch.special.entr(t["p"]),
        torch.special.erfinv(t["p"]),
    ],
    "other names": lambda t: [
        *(getattr(torch, name)(t["x"]) for name in ["negative", "absolute", "fix", "arctan", "ravel", "signbit"]),
        *(getattr(torch, name)(t["p"]) for name in ["arccos", "arcsin", "arctanh", "isposinf"]),
        *(getattr(torch, name)(t["x"], t["y"]) for name in ["greater", "less_equal", "not_equal", "divide"]),
        *(getattr(torch.special, name)(t["p"]) for name in ["expit", "psi", "gammaln", "expm1", "sinc"]),
        t["x"].mH,
        t["x"].rad2deg(),
    ],
    "seldom": lambda t: [
        F.relu6(8 * t["x"]),
        torch.heaviside(t["x"].detach(), t["y"].detach()),
        t["x"].clamp_max(0.2),
        torch.where(t["b"], t["x"], float("nan")).nan_to_num(0.5),
        torch.addbmm(t["s"][0], t["s"], t["s"].mT, beta=0.5),
        torch.addr(t["s"][0], t["x"][0, :, 0], t["y"][0, :, 1], alpha=2),
        torch.linalg.cross(t["s"], t["s"].mT),
        torch.cross(t["s"][0], t["s"][1], dim=0),
        torch.cross(t["s"], t["s"].mT),
        F.instance_norm(t["x"], torch.arange(3).double(), torch.ones(3).double(), use_input_stats=False),
        *torch.std_mean(t["x"], 1),
        t["x"].norm(3),
        *(torch.linalg.vector_norm(t["x"], order, 1) for order in (1, 3, float("inf"), -float("inf"))),
    ],
    "constants": lambda t: [
        t["x"] * torch.ones_like(t["x"]) + torch.full_like(t["x"], 2) + torch.ones(4) * t["x"].clone().fill_(3),
        t["x"] * t["x"].new_full((4,), 3) + t["x"].new_zeros(4),
        torch.tril_indices(3, 4, 1),
        torch.triu_indices(3, 4, -1),
    ],
    "numbers without axes": lambda t: [
        t["x"].sum().median(0),
        t["x"].sum().kthvalue(1),
        t["x"].sum().cummax(0),
        t["x"].sum().min(0),
        t["x"].sum().sum(0),
    ],
    "put together": lambda t: [
        *(getattr(torch, name)([t["x"][0], t["i"][0]]) for name in ["hstack", "vstack", "dstack", "column_stack"]),
        torch.broadcast_tensors(t["x"], t["y"][:, :1])[1],
        torch.atleast_3d(t["x"][0]),
        torch.diag(t["x"][0, 0], 1),
        torch.diag(t["x"][0], 1),
        torch.diagflat(t["x"][:, 0]),
    ],
    "taken apart": lambda t: [
        t["x"].tensor_split([1, 3], 2),
        t["x"].tensor_split(2, 2),
        t["x"].chunk(2, -1),
        t["x"].movedim(0, -1),
        t["x"].view_as(t["y"]),
        torch.real(t["x"]),
        t["x"].hsplit(3),
        t["x"].dsplit([1]),
        t["x"].fliplr(),
        t["x"].flipud(),
        t["x"].unsafe_chunk(2, -1),
        t["x"].sum_to_size(3, 1),
        t["x"].repeat_interleave(torch.tensor([1, 0, 2]), 1, output_size=3),
    ],
    "places": lambda t: [
        t["x"].take(t["k"]),
        t["x"].take_along_dim(torch.zeros(2, 1, 4, dtype=torch.int64), 1),
        t["x"].index_reduce(1, torch.tensor([0, 0, 2]), t["y"], "mean"),
        torch.searchsorted(torch.arange(-1, 3).double(), t["x"], right=True),
        torch.searchsorted(t["x"].detach().sort(-1)[0], t["y"].detach()),
        torch.histc(t["x"].detach(), 4, -1.5, 1.5),
        torch.logspace(0, 1, 4),
        t["x"].clone().zero_() + 1,
    ],
    "fourier": lambda t: [
        torch.fft.rfft(t["x"]).abs(),
        torch.fft.irfft(torch.fft.rfft(t["x"], norm="ortho"), n=4),
        torch.fft.fft2(t["x"]).real,
        torch.fft.ifftn(t["x"], s=(3, 2), dim=(1, 2)).imag,
        torch.fft.fftshift(t["x"], 1),
    ],
    "complex": lambda t: [
        torch.view_as_real(torch.polar(t["p"], t["x"]) * torch.complex(t["x"], t["y"]).conj()),
        torch.view_as_complex(t["x"].reshape(2, 3, 2, 2)).angle(),
    ],
    "fold": lambda t: F.fold(t["x"].reshape(2, 4, 3)[..., :2].repeat(1, 1, 2), (3, 3), 2),
    "max pool": lambda t: F.max_pool1d(t["x"].round(), 3, 1, 1, return_indices=True),
    "adaptive max pool": lambda t: F.adaptive_max_pool2d(t["x"].round(), (2, 3), return_indices=True),
    "unpooling": lambda t: F.max_unpool1d(*F.max_pool1d(t["x"], 2, return_indices=True), 2),
    "unpooling3d": lambda t: F.max_unpool3d(*F.max_pool3d(t["x"][:, None, :, None], 1, return_indices=True), 1),
}

BAG = torch.tensor([[0, 2, 1], [1, 1, 0]])
BAGS: dict[str, Case] = {
    mode: lambda t, mode=mode: [
        F.embedding_bag(BAG, t["x"][0], mode=mode, padding_idx=2),
        F.embedding_bag(BAG.flatten(), t["x"][0], torch.tensor([0, 2, 2]), mode=mode),
    ]
    for mode in ("sum", "mean", "max")
} | {"weighted": lambda t: F.embedding_bag(BAG, t["x"][0], per_sample_weights=t["p"][:, 0, :3], mode="sum")}


@pytest.mark.parametrize("cases", [LOSSES, MORE | BAGS], ids=["losses", "more"])
@pytest.mark.by_default("losses")
def test_operators(cases: dict[str, Case]) -> None:
    check(cases, INPUTS | {"s": SQUARE}, dynamic=False)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.FractionalMaxPool2d(2, output_size=2), r"'0' is a FractionalMaxPool2d.*AdaptiveMaxPool2d"),
        (nn.CrossMapLRN2d(2), r"'0' is a CrossMapLRN2d.*LocalResponseNorm"),
    ],
)
def test_layers_that_are_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        torch_bridge.from_module(nn.Sequential(layer), draw(2, 3, 6, 6))
