"""What a mechanism's noise becomes in the model, so that a filter can take it away again.

Noise on gradients reaches the factors through the optimiser, and Adam divides by the size of what
it sees: where noise is most of it, a step has one size whatever the noise multiplier. So the
spread of an entry of ``lora_B`` after a round is found by giving the optimiser noise alone. No
data is read. Where there is a signal its share of a step is not noise, so this is an upper end.

The mean over clients has the mean variance divided by their number; rounds, each with an optimiser
of its own, add up. A ``d_out x r`` matrix of such entries has singular values near
``sd sqrt(d_out)`` (its rank is small beside the layer), and the product with ``A`` those times the
size of ``A``'s.

Source: docs/method.md (M29) to (M31).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import median

import torch

from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import Adapter
from deal_core.randomness import seeded

ENTRIES = 20_000


@lru_cache(maxsize=256)
def entry_noise(steps: int, learning_rate: float) -> float:
    """Return the standard deviation of an entry after so many steps of AdamW on noise alone (M29).

    Args:
        steps: of one round.
        learning_rate: of every step; no weight decay.
    """
    return learning_rate * _at_rate_one(steps)


@lru_cache(maxsize=256)
def _at_rate_one(steps: int) -> float:
    """Adam's steps are proportional to its rate."""
    generator = seeded("noise floor", steps)
    entries = torch.zeros(ENTRIES, requires_grad=True)
    optimizer = torch.optim.AdamW([entries], lr=1.0, weight_decay=0.0)
    for _ in range(steps):
        entries.grad = torch.randn(ENTRIES, generator=generator)
        optimizer.step()
    return float(entries.detach().std())


def round_variance(floors: Sequence[float]) -> float:
    """Return the variance of an entry of the mean of clients whose entries have these standard
    deviations: a round's part of (M30).

    Clients say what theirs is, so the middle one speaks for all: less than half of them can do
    no more than choose among what the others say.
    """
    return median(floor**2 for floor in floors) / len(floors) if floors else 0.0


def singular_floor(current: Adapter, variance: float) -> float:
    """Return the singular values that noise of this variance in ``lora_B`` gives the update of a
    layer, mean over layers (M31).

    Args:
        current: the adapter at the end of the task: its ``lora_A`` did not learn.
        variance: of an entry of ``lora_B``, over all rounds.
    """
    sizes = [
        math.sqrt(f.B.shape[0]) * float(torch.linalg.svdvals(f.A.float()).mean())
        for f in current.layers.values()
    ]
    return current.scaling * math.sqrt(variance) * sum(sizes) / len(sizes)


def denoising(config: MethodConfig, floor: float) -> MethodConfig:
    """Return the settings with the floor for the retention filter, where one shrinks by a floor and
    was given none. Learned gains start from the floor that client and server both estimate.
    """
    retention = config.retention
    if floor == 0 or retention.noise or retention.filter != "wiener":
        return config
    changed = retention.model_copy(update={"noise": floor})
    return config.model_copy(update={"retention": changed})
