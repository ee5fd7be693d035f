"""Accuracy against the privacy budget, on the machinery of studies."""
