"""Probabilities that mean what they say: a temperature for each task, found on held-out rows with
right answers (Guo et al., arXiv 1706.04599). It stays beside the adapter, on the machine whose rows
they are: no export and no site is given it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deal_core.atomic_write import atomic_write
from deal_core.errors import UserError
from deal_core.inference.folder import AdapterFolder

BINS = 15
"""Of confidence, of equal width."""
TEMPERATURES = torch.logspace(-2, 4, 601, dtype=torch.float64).tolist()
"""Those that are tried: steps of 2.3 %."""


def confidences_and_hits(
    logits: Sequence[Sequence[float]], targets: Sequence[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return of each row the probability of its likeliest answer, and whether that is the right
    one; ``logits``: log probabilities of all answers, ``targets``: the place of the right one."""
    table = torch.tensor([*logits], dtype=torch.float64) / temperature
    confidences, places = table.softmax(1).max(1)
    return confidences, places == torch.tensor([*targets])


def gap(confidences: Tensor, hits: Tensor) -> float:
    """Return the expected calibration error (ECE), 0 to 1: how far, on average, confidence is from
    the share of right answers among those of like confidence."""
    bins = (confidences * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidences - hits.double())
    return float(sums.abs().sum()) / max(1, len(hits))


def best_temperature(logits: Sequence[Sequence[float]], targets: Sequence[int]) -> float:
    """Return the temperature under which the right answers are likeliest."""
    table, wanted = torch.tensor([*logits], dtype=torch.float64), torch.tensor([*targets])
    return min(TEMPERATURES, key=lambda t: float(cross_entropy(table / t, wanted)))


def calibrate(logits: list[list[float]], targets: list[int]) -> tuple[float, float, float]:
    """Return the temperature that is best for one half of the rows, and the calibration error of
    the other half without and with it."""
    found = best_temperature(logits[::2], targets[::2])
    before, after = (
        gap(*confidences_and_hits(logits[1::2], targets[1::2], each)) for each in (1.0, found)
    )
    return found, before, after


def read_temperatures(folder: AdapterFolder) -> Mapping[str, float]:
    """Return task to its temperature; none where there is no calibration.

    Raises:
        UserError: damaged.
    """
    if not folder.calibration.exists():
        return {}
    try:
        found = json.loads(folder.calibration.read_text(encoding="utf-8"))
        return {str(task): float(value) for task, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder.calibration}: cannot be read ({error}); remove it, and calibrate again"
        ) from None


def write_temperature(folder: AdapterFolder, task: str, temperature: float) -> None:
    """Keep the temperature of a task beside those of others."""
    kept = {**read_temperatures(folder), task: round(temperature, 6)}
    atomic_write(folder.calibration, json.dumps(kept, indent=1) + "\n")
