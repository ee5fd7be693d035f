"""The sum of clients' updates, each clipped to a public bound, and its noisy mean.

The sum is divided by a number that was fixed before anybody answered: who drops out, or sends
nothing of use, counts as zero. So a client, whatever it sends, moves the sum by at most the bound.

Source: docs/method.md (M28); McMahan et al., "Learning differentially private recurrent language
models", ICLR 2018 (fixed denominator, flat clipping).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deal_core.aggregation.rule import LORA_A, LORA_B
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.privacy.mechanisms.noise import NoiseSource
from deal_core.privacy.mechanisms.sampled_units import BELOW

Change = Mapping[str, Tensor]
"""Name of a factor to how much it changed, float64."""


def clipped(change: Change, bound: float) -> dict[str, Tensor]:
    """Return a change scaled down to norm ``bound`` over all factors together, where it is larger,
    in float64, less the billionth that rounding here and in a sum of some hundred may add; one that
    is not finite, or too large for its norm to be, becomes zero."""
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in change.values()))
    factor = min(1.0, BELOW * bound / norm) if norm > 0 else 1.0
    if not math.isfinite(norm):
        return {name: torch.zeros_like(part, dtype=torch.float64) for name, part in change.items()}
    return {name: factor * part.double() for name, part in change.items()}


def noised(change: Change, scale: float, noise: NoiseSource) -> dict[str, Tensor]:
    """Add independent Gaussian noise of standard deviation ``scale`` to every entry."""
    return {name: change[name] + scale * noise.normal(change[name].shape) for name in change}


class ClippedSum:
    """Attributes: ``before``, the adapter that every client began from; ``trained``, the factors
    that may differ from it; ``bound``, of one client's change."""

    def __init__(self, before: Adapter, trained: frozenset[str], bound: float) -> None:
        self.before = before
        self.trained = trained
        self.bound = bound
        self._total = {
            name: torch.zeros_like(part, dtype=torch.float64)
            for name, part in factors_of(before, trained).items()
        }

    def add(self, adapter: Adapter) -> None:
        """Add one client's clipped change.

        Raises:
            ValueError: another shape than the round's.
        """
        start, now = factors_of(self.before, self.trained), factors_of(adapter, self.trained)
        if {n: t.shape for n, t in now.items()} != {n: t.shape for n, t in start.items()}:
            raise ValueError("an update of another shape than the round's cannot be clipped")
        change = {name: now[name].double() - start[name].double() for name in start}
        for name, part in clipped(change, self.bound).items():
            self._total[name] += part

    def noisy_mean(
        self, noise_multiplier: float, denominator: float, noise: NoiseSource
    ) -> dict[str, Tensor]:
        """``(sum + noise_multiplier * bound * normal) / denominator``, float64."""
        loud = noised(self._total, noise_multiplier * self.bound, noise)
        return {name: part / denominator for name, part in loud.items()}


def factors_of(adapter: Adapter, trained: frozenset[str]) -> dict[str, Tensor]:
    """Name (layer and factor) to factor, of those that are trained."""
    both = {
        f"{name}.{which}": tensor
        for name, f in adapter.layers.items()
        for which, tensor in ((LORA_A, f.A), (LORA_B, f.B))
    }
    return {name: tensor for name, tensor in both.items() if name.rpartition(".")[2] in trained}


def moved(before: Adapter, change: Mapping[str, Tensor]) -> Adapter:
    """The adapter after a change of some of its factors, float32."""

    def after(key: str, start: Tensor) -> Tensor:
        return (start.double() + change[key]).float() if key in change else start

    layers = {
        name: LoraFactors(after(f"{name}.{LORA_A}", f.A), after(f"{name}.{LORA_B}", f.B))
        for name, f in before.layers.items()
    }
    return Adapter(layers, before.scaling)
