"""The linear layers of any JAX model, found by tracing it: their inputs, and their output gradients."""

from ggn_jax.layers.capture import Captured, capture
from ggn_jax.layers.plan import Layer, Plan, UnassignedParameter, UncoveredParametersWarning, join_traces, make_plan
from ggn_jax.layers.report import Report, ReportRow, report
from ggn_jax.layers.taps import Tap
from ggn_jax.layers.trace import Trace, trace_model
from ggn_jax.layers.uses import Use

__all__ = [
    "Captured",
    "Layer",
    "Plan",
    "Report",
    "ReportRow",
    "Tap",
    "Trace",
    "UnassignedParameter",
    "UncoveredParametersWarning",
    "Use",
    "capture",
    "join_traces",
    "make_plan",
    "report",
    "trace_model",
]
