"""Operators of PyTorch in JAX: values, dtypes and gradients are torch's, in float64 to rounding.

Many operators are outputs of one module, since it takes longer to export one than to run it.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's custom
from module_cases import INPUTS, Case, Layer, check, draw, on
from torch import nn

import torch_bridge

UNARY = (
    "acos asin atanh cos cosh erf exp exp2 expm1 log log10 log1p log2 logit reciprocal rsqrt sigmoid sin sinh sqrt tan"
)
EVERYWHERE = "abs acosh asinh atan ceil floor frac neg relu round sign square tanh trunc erfc digamma lgamma sgn isnan"

ELEMENTWISE: dict[str, Case] = {
    **{name: on("p", getattr(torch, name)) for name in UNARY.split()},
    **{name: on("x", getattr(torch, name)) for name in EVERYWHERE.split() if name != "acosh"},
    "acosh": lambda t: torch.acosh(t["p"] + 1.5),
    "of integers": lambda t: (torch.exp(t["i"]), torch.floor(t["i"]), torch.sigmoid(t["b"]), t["i"].abs()),
    "add": lambda t: (torch.add(t["x"], t["y"], alpha=0.5), t["i"] + t["x"], t["b"] + t["b"], t["i"] + 1.5, 2 - t["i"]),
    "sub": lambda t: (torch.sub(t["x"], t["y"], alpha=2), t["i"] - t["x"], 1 - t["x"]),
    "mul": lambda t: (t["x"] * t["i"], t["b"] * 2, t["x"][0, 0, 0] * t["i"]),
    "div": lambda t: (
        t["i"] / 2,
        torch.div(t["i"], 3, rounding_mode="floor"),
        torch.div(t["i"], 3, rounding_mode="trunc"),
        torch.div(t["x"], t["p"], rounding_mode="floor"),
        torch.div(t["x"], t["p"], rounding_mode="trunc"),
        t["i"] // 2,
        t["x"] / t["p"],
    ),
    "remainder": lambda t: (t["i"] % 3, t["x"] % -0.3, torch.fmod(t["i"], 3), torch.fmod(t["x"], 0.3)),
    "pow": lambda t: (
        t["x"] ** 2,
        t["x"] ** 3,
        t["p"] ** 0.5,
        t["p"] ** -1.5,
        t["p"] ** t["y"],
        2 ** t["x"],
        t["i"] ** 2,
    ),
    "maximum": lambda t: (torch.maximum(t["x"], t["y"]), torch.max(t["i"], t["x"]), torch.minimum(t["x"], t["y"])),
    "compared": lambda t: (t["x"] > t["y"], t["i"] == 1, t["i"] != t["x"], t["x"] <= 0, t["b"] < t["i"], t["x"] >= 0.1),
    "logical": lambda t: (
        t["b"] & t["b"],
        t["b"] | (t["x"] > 0),
        ~t["b"],
        ~t["i"],
        t["i"] ^ 3,
        torch.logical_not(t["i"]),
    ),
    "logical_and": lambda t: (torch.logical_and(t["i"], t["b"]), torch.logical_xor(t["b"], t["i"])),
    "where": lambda t: (
        torch.where(t["b"], t["x"], 0.0),
        torch.where(t["b"], t["i"], t["x"]),
        torch.where(t["b"], 1, t["y"]),
    ),
    "masked_fill": lambda t: (t["x"].masked_fill(t["b"], -1.0), t["i"].masked_fill(t["b"][:, :1], 2)),
    "clamp": lambda t: (t["e"].clamp(-1, 1), t["e"].clamp(min=0), t["x"].clamp(max=t["y"]), t["i"].clamp(0, 2)),
    "lerp": lambda t: (torch.lerp(t["x"], t["y"], 0.3), torch.lerp(t["x"], t["y"], t["p"])),
    "addcmul": lambda t: (torch.addcmul(t["x"], t["y"], t["p"], value=0.5), torch.addcdiv(t["x"], t["y"], t["p"])),
    "atan2": lambda t: torch.atan2(t["x"], t["y"]),
    "xlogy": lambda t: torch.xlogy(t["x"], t["p"]),
    "cosine_similarity": lambda t: F.cosine_similarity(t["x"], t["y"], dim=-1),
    "float32": lambda t: (t["x"].float() * 2.5, t["x"].float() + t["x"], t["x"].half() * t["i"], t["i"].bfloat16() / 3),
    "to": lambda t: (t["x"].long(), t["x"].bool(), t["i"].to(t["x"]), t["b"].type_as(t["i"]), t["x"].to(torch.int8)),
}

NONLINEAR = (
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU SiLU Sigmoid"
    " Softplus Softshrink Softsign Tanh Tanhshrink"
)

ACTIVATIONS: dict[str, Case] = {name: on("e", getattr(nn, name)()) for name in NONLINEAR.split()} | {
    "GELU tanh": on("e", nn.GELU("tanh")),
    "Threshold": on("e", nn.Threshold(0.5, 2.0)),
    "options": lambda t: (F.softplus(t["e"], 2, 1), F.elu(t["e"], 0.5), F.celu(t["e"], 0.5), F.hardtanh(t["e"], -1, 3)),
    "RReLU": on("e", F.rrelu),
    "GLU": on("x", nn.GLU(-1)),
    "Softmax": on("x", nn.Softmax(1)),
    "Softmin": on("x", nn.Softmin(-1)),
    "LogSoftmax": on("x", nn.LogSoftmax(-1)),
    "softmax dtype": on("x", F.softmax, dim=1, dtype=torch.float64),
    "PReLU": Layer(nn.PReLU(3), "x"),
    "Dropout": on("x", F.dropout, 0.5, False),
}

SHAPES: dict[str, Case] = {
    "view": lambda t: (t["x"].view(-1, 12), t["x"].reshape(2, 2, -1), t["x"].flatten(1), t["x"].unflatten(-1, (2, -1))),
    "squeeze": lambda t: (
        t["x"][:, :1].squeeze(1),
        t["x"].squeeze(1),
        t["x"][:, :1, :1].squeeze((1, 2)),
        t["x"].unsqueeze(-1),
    ),
    "expand": lambda t: (t["x"][:, :1].expand(-1, 5, 4), t["x"][0, 0].expand(2, 3, 4), t["x"][:, :1].expand_as(t["y"])),
    "permute": lambda t: (
        t["x"].permute(2, 0, -2),
        t["x"].transpose(-1, 0),
        t["x"].mT,
        t["x"][0].t(),
        t["x"].movedim(0, 2),
    ),
    "slice": lambda t: (
        t["x"][..., 1:3],
        t["x"][:, ::2],
        t["x"][:, -2:],
        t["x"][:, 1],
        t["x"][:, -1],
        t["x"].narrow(1, 1, 2),
    ),
    "split": lambda t: (
        t["x"].split(2, 1),
        t["x"].chunk(3, -1),
        t["x"].split([1, 3], 2),
        t["x"].unbind(1),
        t["x"].tensor_split(3, 2),
    ),
    "cat": lambda t: (
        torch.cat([t["x"], t["i"]], 1),
        torch.stack([t["x"], t["y"]], -1),
        torch.cat([t["b"], t["b"]], -1),
    ),
    "repeat": lambda t: (t["x"].repeat(1, 2, 1), t["x"].tile(2), t["x"].repeat_interleave(2, 1)),
    "flip": lambda t: (
        t["x"].flip(1, -1),
        t["x"].roll(1, 1),
        t["x"].roll((1, 2), (1, 2)),
        torch.rot90(t["x"], 1, (1, 2)),
    ),
    "unfold": lambda t: (t["x"].unfold(2, 2, 1), F.unfold(t["x"][:, None], 2, padding=1, stride=2)),
    "tril": lambda t: (t["x"].tril(), t["x"].triu(1), t["x"].diagonal(0, 1, 2), torch.diag_embed(t["x"], 1)),
    "pixels": lambda t: (
        F.pixel_shuffle(t["x"].reshape(2, 4, 1, 3), 2),
        F.pixel_unshuffle(t["x"].reshape(2, 1, 6, 2), 2),
    ),
    "channel_shuffle": lambda t: F.channel_shuffle(t["x"].reshape(2, 6, 2), 3),
    "detach": lambda t: t["x"] * t["x"].detach(),
    "index": lambda t: (
        t["x"][:, torch.tensor([0, 2, -1])],
        t["x"][:, [0, 1], [1, 2]],
        t["x"][torch.arange(2), :, t["k"][:, 0]],
    ),
    "gather": lambda t: (t["x"][:, 0].gather(1, t["k"]), t["x"].index_select(2, torch.tensor([1, 1]))),
    "scatter": lambda t: (
        t["x"][:, 0].scatter(1, t["k"][:, :2], t["y"][:, 0, :2]),
        t["x"][:, 0].scatter(1, t["k"][:, :2], 2.0),
        t["x"][:, 0].scatter_add(1, t["k"], t["y"][:, 0]),
        t["x"][:, 0].scatter_reduce(1, t["k"], t["y"][:, 0], "amax"),
        t["x"][:, 0].scatter_reduce(1, t["k"], t["y"][:, 0], "mean", include_self=False),
    ),
    "index_add": lambda t: (
        t["x"].index_add(2, torch.tensor([0, 0, 3]), t["y"][..., :3], alpha=2),
        t["x"].index_copy(1, torch.tensor([2]), t["y"][:, :1]),
        t["x"].index_fill(1, torch.tensor([1]), 3.0),
        t["x"].index_put((torch.tensor([0, 1]), torch.tensor([1, 1])), t["y"][:, 0], accumulate=True),
    ),
    "sort": lambda t: (
        t["x"].sort(-1),
        t["x"].topk(2, -1),
        t["x"].argsort(1, descending=True),
        t["x"].topk(1, 1, largest=False),
    ),
    "one_hot": lambda t: F.one_hot(t["k"], 5),
    "embedding": lambda t: F.embedding(t["k"], t["x"].reshape(6, 4), padding_idx=2),
    "meshgrid": lambda t: torch.meshgrid(t["x"][0, 0], t["y"][0, :, 0], indexing="ij"),
    "bucketize": lambda t: torch.bucketize(t["x"], torch.tensor([-1.0, 0.0, 1.0]).double()),
}

REDUCTIONS: dict[str, Case] = {
    "sum": lambda t: (
        t["x"].sum(),
        t["x"].sum((1, 2)),
        t["x"].sum(-1, keepdim=True),
        t["i"].sum(1),
        t["b"].sum(),
        t["i"].sum(dtype=torch.float64),
    ),
    "mean": lambda t: (t["x"].mean(), t["x"].mean(1), t["x"].mean((1, -1), keepdim=True)),
    "prod": lambda t: (t["x"].prod(1), t["i"].prod(-1)),
    "var": lambda t: (
        t["x"].var(1),
        t["x"].var(unbiased=False),
        t["x"].std((1, 2), correction=0),
        t["x"].std(-1),
        torch.var_mean(t["x"], 1),
    ),
    "std of equal entries": lambda t: (t["x"][:, :1] - t["x"][:, :1]).expand(-1, 3, -1).std(1),
    "amax": lambda t: (t["e"].relu().amax(-1), t["x"].amin((1, 2), keepdim=True), t["x"].max(), t["x"].min(1)),
    "max": lambda t: (
        t["e"].relu().max(-1),
        t["x"].max(1, keepdim=True),
        t["x"].argmax(1),
        t["x"].argmin(),
        t["i"].max(2),
    ),
    "any": lambda t: (t["b"].any(), t["b"].all(1), t["i"].any(-1), torch.count_nonzero(t["i"], 1)),
    "cumsum": lambda t: (
        t["x"].cumsum(1),
        t["i"].cumsum(-1),
        t["b"].cumsum(1),
        t["p"].cumprod(1),
        torch.diff(t["x"], dim=1),
    ),
    "logsumexp": lambda t: (torch.logsumexp(t["x"], 1), torch.logsumexp(t["x"], (1, 2), keepdim=True)),
    "norm": lambda t: (
        t["x"].norm(dim=1),
        (t["x"] * 0).norm(),
        torch.linalg.vector_norm(t["x"], 1, -1),
        torch.linalg.vector_norm(t["x"], 3),
        torch.linalg.vector_norm(t["x"], float("inf"), 1),
    ),
    "normalize": lambda t: F.normalize(t["x"], dim=1),
    "products": lambda t: (
        t["x"] @ t["y"].mT,
        torch.bmm(t["x"], t["y"].mT),
        torch.einsum("nij,nkj->nik", t["x"], t["y"]),
        torch.addmm(t["x"][:, 0, :3], t["x"][:, :, 0], t["y"][0, :, :3], beta=0.5, alpha=2),
        torch.baddbmm(t["p"][:, :, :3], t["x"], t["y"].mT),
        torch.outer(t["x"][0, 0], t["y"][0, 0]),
        torch.dot(t["x"][0, 0], t["y"][0, 0]),
        t["x"][0] @ t["y"][0, 0],
        torch.tensordot(t["x"], t["y"], ([1, 2], [1, 2])),
    ),
    "pad": lambda t: (
        F.pad(t["x"], (1, -1, 2, 0)),
        F.pad(t["x"], (1, 2), "reflect"),
        F.pad(t["x"], (1, 2), "replicate"),
        F.pad(t["x"], (1, 2), "circular"),
        F.pad(t["i"], (1, 1), value=7),
    ),
    "factories": lambda t: (
        torch.arange(5),
        torch.arange(1, 6, 2) * t["x"][0, 0, 0],
        torch.arange(0.0, 1.0, 0.3),
        torch.zeros_like(t["x"]),
        t["x"].new_ones(2),
        torch.full((2,), 3),
        torch.linspace(0, 1, 4),
        torch.eye(3),
        torch.arange(t["x"].shape[0]) + t["x"].shape[1] // 2,
    ),
}


@pytest.mark.parametrize(
    "cases", [ELEMENTWISE, ACTIVATIONS, SHAPES, REDUCTIONS], ids=["elementwise", "activations", "shapes", "reductions"]
)
@pytest.mark.by_default("shapes", "activations")
def test_operators(cases: dict[str, Case]) -> None:
    check(cases, INPUTS, dynamic=False)


LAYER_INPUTS = {
    "vec": draw(2, 6),
    "seq": draw(2, 4, 7),
    "img": draw(2, 4, 7, 6),
    "vol": draw(2, 2, 4, 5, 3),
    "tok": draw(2, 5, 6),
    "ids": torch.tensor([[0, 2, 1, 1, 4], [3, 0, 2, 1, 1]]),
}


def batch_norm(layer: Any) -> Any:
    with torch.no_grad():
        layer.running_mean.copy_(torch.linspace(-1, 1, layer.num_features))
        layer.running_var.copy_(torch.linspace(0.5, 2, layer.num_features))
    return layer


def layers() -> dict[str, Case]:
    torch.manual_seed(0)
    img = {
        "conv": nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=(2, 1), groups=2),
        "conv same": nn.Conv2d(4, 4, (2, 3), padding="same", dilation=2),
        "conv reflect": nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect", bias=False),
        "conv circular": nn.Conv2d(4, 2, 3, padding=(2, 1), padding_mode="circular"),
        "conv depthwise": nn.Conv2d(4, 8, 3, groups=4),
        "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        "max pool": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        "max pool dilated": nn.MaxPool2d(2, 1, dilation=2),
        "avg pool": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        "avg pool inside": nn.AvgPool2d((2, 3), (2, 1), (0, 1), count_include_pad=False),
        "avg pool divisor": nn.AvgPool2d(2, divisor_override=3),
        "adaptive": nn.AdaptiveAvgPool2d((3, 4)),
        "adaptive whole": nn.AdaptiveAvgPool2d(1),
        "adaptive max": nn.AdaptiveMaxPool2d((3, 4)),
        "lp pool": nn.LPPool2d(2, 2),
        "batch norm": batch_norm(nn.BatchNorm2d(4)),
        "batch norm without statistics": nn.BatchNorm2d(4, track_running_stats=False),
        "group norm": nn.GroupNorm(2, 4),
        "instance norm": nn.InstanceNorm2d(4, affine=True),
        "local response": nn.LocalResponseNorm(3),
        "nearest": nn.Upsample(scale_factor=1.7),
        "nearest exact": nn.Upsample((9, 4), mode="nearest-exact"),
        "bilinear": nn.Upsample(scale_factor=1.7, mode="bilinear"),
        "bilinear aligned": nn.Upsample((9, 4), mode="bilinear", align_corners=True),
        "bicubic": nn.Upsample((9, 4), mode="bicubic"),
        "pads": nn.Sequential(nn.ReflectionPad2d(1), nn.ReplicationPad2d((1, 0, 2, 1)), nn.ZeroPad2d(1)),
        "pixel shuffle": nn.PixelShuffle(2),
    }
    seq = {
        "conv1d": nn.Conv1d(4, 3, 3, padding=2),
        "transposed1d": nn.ConvTranspose1d(4, 3, 3, stride=2),
        "pool1d": nn.Sequential(nn.MaxPool1d(2), nn.AvgPool1d(2)),
        "adaptive1d": nn.AdaptiveAvgPool1d(3),
        "batch norm 1d": batch_norm(nn.BatchNorm1d(4)),
        "linear upsampling": nn.Upsample(scale_factor=2, mode="linear"),
        "instance norm 1d": nn.InstanceNorm1d(4),
    }
    vol = {
        "conv3d": nn.Conv3d(2, 3, 2),
        "transposed3d": nn.ConvTranspose3d(2, 2, 2),
        "pool3d": nn.AvgPool3d(2),
        "max pool3d": nn.MaxPool3d(2),
        "trilinear": nn.Upsample(scale_factor=2, mode="trilinear"),
    }
    tok = {
        "linear": nn.Linear(6, 4),
        "layer norm": nn.LayerNorm(6),
        "layer norm without": nn.LayerNorm((5, 6), elementwise_affine=False),
        "rms norm": nn.RMSNorm(6),
        "lstm": nn.LSTM(6, 3, num_layers=2, bidirectional=True, batch_first=True),
        "lstm projected": nn.LSTM(6, 4, proj_size=2, bias=False, batch_first=True),
        "gru": nn.GRU(6, 3, batch_first=True, bidirectional=True),
        "rnn": nn.RNN(6, 3, nonlinearity="relu", batch_first=True),
        "encoder": nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True),
    }
    vec = {"cell": nn.LSTMCell(6, 4), "gru cell": nn.GRUCell(6, 4), "rnn cell": nn.RNNCell(6, 4)}
    groups = {"img": img, "seq": seq, "vol": vol, "tok": tok, "vec": vec}
    found: dict[str, Case] = {name: Layer(layer, key) for key, group in groups.items() for name, layer in group.items()}
    return found | {
        "bilinear layer": Layer(nn.Bilinear(6, 6, 3), "vec", "vec"),
        "attention": Layer(nn.MultiheadAttention(6, 2, batch_first=True), "tok", "tok", "tok"),
        "decoder": Layer(nn.TransformerDecoderLayer(6, 2, 8, batch_first=True), "tok", "tok"),
        "embedding layer": Layer(nn.Embedding(5, 3, padding_idx=1), "ids"),
    }


def test_layers() -> None:
    check(layers(), LAYER_INPUTS)


def attention_cases() -> dict[str, Case]:
    def attend(**options: Any) -> Case:
        return lambda t: F.scaled_dot_product_attention(t["q"], t["k"], t["v"], **options)

    return {
        "plain": attend(),
        "causal": attend(is_causal=True),
        "scale": attend(scale=0.3),
        "mask": lambda t: F.scaled_dot_product_attention(t["q"], t["k"], t["v"], t["m"]),
        "added": lambda t: F.scaled_dot_product_attention(t["q"], t["k"], t["v"], t["a"]),
        "grouped": lambda t: F.scaled_dot_product_attention(t["q"], t["k"][:, :2], t["v"][:, :2], enable_gqa=True),
    }


def test_attention() -> None:
    mask = draw(2, 1, 3, 5) > -0.3
    mask[1, 0, 2] = False  # one that may look at nothing
    inputs = {"q": draw(2, 4, 3, 6), "k": draw(2, 4, 5, 6), "v": draw(2, 4, 5, 2), "m": mask, "a": draw(2, 1, 3, 5)}
    check(attention_cases(), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.by_default("dtype2")
def test_lower_precision(dtype: torch.dtype) -> None:
    """To a few units in the last place of torch's own results."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4), nn.Softmax(-1)).to(dtype)
    x = draw(3, 6).to(dtype)
    model_fn, params = torch_bridge.from_module(module, x)
    ours = model_fn(params, torch_bridge.to_jax(x))
    assert str(ours.dtype) == str(dtype).removeprefix("torch.")
    difference = np.abs(np.asarray(ours, np.float64) - module(x).detach().double().numpy()).max()
    assert difference < 8 * torch.finfo(dtype).eps
