"""The layers that tracing finds, in the open: what is captured at each, and parameters as matrices."""
