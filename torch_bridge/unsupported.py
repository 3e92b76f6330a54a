"""What to use instead of the losses of `torch.nn` that have no entry of their own."""

import types
from typing import Any

import torch

_LIKELIHOOD = "write its likelihood as a ggn_jax.LikelihoodLoss, and add it with torch_bridge.register_loss"
_LINEAR = (
    "it is piecewise linear, so that its Hessian is 0 wherever there is one: use a loss with curvature, such as"
    " CrossEntropyLoss or MSELoss"
)
_SEVERAL = "it compares outputs with each other: this package takes losses of one output and its target"

WAYS_OUT = {
    "NLLLoss": "its outputs are log-probabilities, in which it is linear: pass logits to CrossEntropyLoss, which has"
    " its options",
    "KLDivLoss": "its outputs are log-probabilities: pass logits to CrossEntropyLoss, with the same probabilities as"
    " targets. It differs by a constant, and its 'mean' is KLDivLoss's 'batchmean'",
    "BCELoss": "its outputs are probabilities: pass logits to BCEWithLogitsLoss",
    "SoftMarginLoss": "it is BCEWithLogitsLoss with targets (target + 1) / 2",
    "MultiLabelSoftMarginLoss": "with reduction='mean' it is BCEWithLogitsLoss, with the same weight",
    "LinearCrossEntropyLoss": "it has the last layer in it: pass the output of that to CrossEntropyLoss",
    "AdaptiveLogSoftmaxWithLoss": "it has layers in it: use a linear layer and CrossEntropyLoss",
    "PoissonNLLLoss": _LIKELIHOOD,
    "GaussianNLLLoss": f"with variances known beforehand it is a weighted MSELoss; else {_LIKELIHOOD}, with"
    " curvature='fisher' and outputs that hold mean and variance",
    "L1Loss": f"{_LINEAR}; or take Laplace's distribution: {_LIKELIHOOD}, with curvature='fisher'",
    "HuberLoss": _LIKELIHOOD,
    "SmoothL1Loss": _LIKELIHOOD,
    "MultiMarginLoss": "it is not a negative log-likelihood: use CrossEntropyLoss",
    "MultiLabelMarginLoss": "it is not a negative log-likelihood: use BCEWithLogitsLoss",
    "HingeEmbeddingLoss": _LINEAR,
    "MarginRankingLoss": _SEVERAL,
    "CosineEmbeddingLoss": _SEVERAL,
    "TripletMarginLoss": _SEVERAL,
    "TripletMarginWithDistanceLoss": _SEVERAL,
    "CTCLoss": "it sums over alignments of log-probabilities, and is not a sum of terms of one position each",
}


def way_out(loss_func: Any) -> str:
    """What a user of this can do, as sentences."""
    if isinstance(loss_func, types.FunctionType):
        if torch.compiler.is_compiling():
            return (
                "torch.compile makes a function of a CrossEntropyLoss that is made in a compiled region: make it"
                " outside of it."
            )
        return "Pass the module of a function, such as torch.nn.CrossEntropyLoss()."
    if isinstance(loss_func, type):
        return f"Make a module of the class: {loss_func.__name__}()."
    for cls in type(loss_func).__mro__:
        if cls.__name__ in WAYS_OUT and cls.__module__.startswith("torch.nn."):
            return f"About {cls.__name__}: {WAYS_OUT[cls.__name__]}."
    return ""
