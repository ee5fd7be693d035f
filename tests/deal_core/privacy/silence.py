"""A source of noise that is silent, for tests of what is left."""

from __future__ import annotations

import torch


class Silence:
    """No noise, and every record in every batch: what is left is the clipped sum."""

    simulation_only = True

    def normal(self, shape):
        return torch.zeros(shape, dtype=torch.float64)

    def uniform(self, count):
        return torch.zeros(count, dtype=torch.float64)
