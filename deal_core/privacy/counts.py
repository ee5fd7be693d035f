"""Counts of right answers as they may leave: with noise that hides what one test record changes,
and charged; or in the clear, and noted.

One record, added or removed, changes a task's number of right answers among its own labels, that
among all labels seen so far, and its number of examples by at most 1 each, in every task that it is
in: the vector of ``m`` counts of ``k`` tasks by at most ``sqrt(m k)``. Where groups are protected a
group counts as one example, by the share of its answers that is right, so the same holds of it.
What is made of the noisy numbers to look like counts again is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import run_name
from deal_core.privacy.events import CLEAR_COUNTS, unprotected_event
from deal_core.privacy.interface import Counts, Site, UpdateRequest
from deal_core.privacy.noise import NoiseSource
from deal_core.wire.records import EXAMPLES


def sensitivity(tasks: int, counts: int) -> float:
    """Return how far one record, or group, moves so many ``counts`` of so many tasks, which may all
    have it."""
    return math.sqrt(counts * tasks)


def noised_counts(counts: Counts, noise_multiplier: float, noise: NoiseSource) -> Counts:
    """Return whole numbers, none of right answers above that of examples, and at least one example
    a task, so that it does not show which tasks a site has.

    Args:
        counts: right answers and examples, an entry a task.
        noise_multiplier: standard deviation of the noise in units of :func:`sensitivity`.
        noise: where it comes from.
    """
    scale = noise_multiplier * sensitivity(len(counts[EXAMPLES]), len(counts))
    loud = {
        name: torch.tensor(counts[name], dtype=torch.float64)
        + scale * noise.normal(torch.Size([len(counts[name])]))
        for name in counts
    }
    examples = [max(1, round(n)) for n in loud.pop(EXAMPLES).tolist()]
    right = {
        name: [min(max(0, round(c)), n) for c, n in zip(values.tolist(), examples, strict=True)]
        for name, values in loud.items()
    }
    return {**right, EXAMPLES: examples}


def clear_counts(
    experiment: Experiment, ask: UpdateRequest, site: Site, make: Callable[[], Counts]
) -> Counts:
    """Counts as they are; a site notes that they have left."""
    counts = make()
    note_unprotected(experiment, ask, site, CLEAR_COUNTS)
    return counts


def note_unprotected(
    experiment: Experiment, ask: UpdateRequest, site: Site, mechanism: str
) -> None:
    """Write into a real site's ledger that something has left without protection: of its records
    no epsilon holds."""
    if site.simulated:
        return
    for task in ask.joint_tasks or (ask.task,):
        place = task, ask.phase, ask.stage, ask.server_round
        site.ledger().note(unprotected_event(site.run or run_name(experiment), mechanism, place))
