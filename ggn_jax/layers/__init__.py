"""The linear layers of any JAX model, found by tracing it: their inputs, and their output gradients."""

from ggn_jax.layers.capture import Captured, capture
from ggn_jax.layers.plan import Layer, Leftover, Plan, make_plan
from ggn_jax.layers.report import Report, Row, report
from ggn_jax.layers.taps import Tap
from ggn_jax.layers.trace import Trace, trace_model
from ggn_jax.layers.uses import Use

__all__ = [
    "Captured",
    "Layer",
    "Leftover",
    "Plan",
    "Report",
    "Row",
    "Tap",
    "Trace",
    "Use",
    "capture",
    "make_plan",
    "report",
    "trace_model",
]
