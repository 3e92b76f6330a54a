"""Kronecker-factored curvature: the factors of layers, and the algebra of their blocks."""
