"""Secure aggregation as values and bytes: sums without their summands; no Flower, no file."""
