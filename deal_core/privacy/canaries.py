"""Gradient canaries: made-up records that a mechanism must hide as well as any real one.

A canary is a random direction. Where its coin says so it takes part as a record would: sampled into
a step with the same probability, it adds a gradient of the largest norm that clipping lets through,
inside the clipped sum and before the noise. No text could do worse. It then shows in an update by
how far the update went along it.

Source: Steinke, Nasr & Jagielski, NeurIPS 2023, section 5.1; Andrew et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.attach import learning_factors
from deal_core.methods.interface import Objective
from deal_core.per_example import clipped_gradients
from deal_core.privacy.interface import ClippedSum
from deal_core.privacy.noise import NoiseSource
from deal_core.randomness import seeded


@dataclass(frozen=True)
class GradientCanaries:
    """``count`` directions with their coins; all from ``seed``, which whoever attacks knows (but
    for the coins)."""

    count: int
    seed: int

    @cached_property
    def included(self) -> NDArray[np.bool_]:
        """``(count,)``: which take part, each by a fair coin of its own."""
        return fair_coins(self.count, self.seed)

    def direction(self, number: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of norm 1 over all factors in ``like`` together; equal for equal names and shapes."""
        generator = seeded(self.seed, "canary", number)
        size = sum(like[name].numel() for name in like)
        flat = torch.randn(size, generator=generator)
        flat /= flat.norm()
        parts = torch.split(flat, [like[name].numel() for name in sorted(like)])
        return {
            name: part.view(like[name].shape)
            for name, part in zip(sorted(like), parts, strict=True)
        }

    def add(self, numbers: Sequence[int], factors: Mapping[str, nn.Parameter], norm: float) -> None:
        """Add these canaries to the factors' gradients, each with ``norm``."""
        for number in numbers:
            for name, part in self.direction(number, factors).items():
                gradient = norm * part.to(factors[name].device, factors[name].dtype)
                before = factors[name].grad
                factors[name].grad = gradient if before is None else before.add_(gradient)

    def sampled(self, rate: float, noise: NoiseSource) -> list[int]:
        """A step's Poisson sample of those that take part."""
        drawn = noise.uniform(self.count).numpy() <= rate
        numbers: list[int] = np.flatnonzero(drawn & self.included).tolist()
        return numbers

    def clipped_sum(self, rate: float, noise: NoiseSource) -> ClippedSum:
        """The clipped sum of a step with the canaries in it
        (:data:`~deal_core.privacy.interface.MakeSum`)."""

        def summed(
            module: nn.Module,
            objective: Objective,
            parts: Sequence[Sequence[int]],
            max_grad_norm: float,
        ) -> Tensor:
            norms = clipped_gradients(module, objective, parts, max_grad_norm)
            self.add(self.sampled(rate, noise), learning_factors(module), max_grad_norm)
            return norms

        return summed

    def scores(self, update: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """``(count,)``: how far an update (after minus before) went along every canary; steps go
        against the gradient."""
        return np.array([self._score(number, update) for number in range(self.count)])

    def _score(self, number: int, update: Mapping[str, Tensor]) -> float:
        direction = self.direction(number, update)
        return -sum(float((update[name].cpu() * part).sum()) for name, part in direction.items())


def fair_coins(count: int, *seed: int | str) -> NDArray[np.bool_]:
    """``(count,)`` fair coins that depend on the seed alone."""
    coins: NDArray[np.bool_] = (
        torch.rand(count, generator=seeded("coins", *seed), dtype=torch.float64).numpy() < 0.5
    )
    return coins
