"""Baseline ``replay``: the one that keeps texts of earlier tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from deal_core.baselines.sequential import Sequential
from deal_core.deal.interface import LocalTask, TaskHistory
from deal_core.deal.objective import Placed, losses_by_task, plain
from deal_core.lora.adapter import fingerprint
from deal_core.models.interface import LanguageModel
from deal_core.randomness import seeded
from deal_core.training.loop import Objective

SHARE = 0.1
"""Of a client's examples of every earlier task that it keeps, rounded up."""


@dataclass(frozen=True)
class Replay(Sequential):
    """One adapter that goes on practising examples of earlier tasks.

    **Not private**: the client keeps texts of earlier tasks, and trains on them again. An upper
    baseline for methods that keep none.

    Every new example of a batch brings one old example along, with the label space of its own task:
    ``CE(new) + CE(old)`` (M22). So a round has the steps of any other method (each of them twice as
    dear), and new and old examples have equal parts whatever the number of tasks. Source:
    experience replay (Robins 1995; Rolnick et al., NeurIPS 2019, arXiv 1811.11682); Chaudhry et al.
    2019, arXiv 1902.10486, draw a batch of new and as many old examples, as here.
    """

    share: float = SHARE
    """Of earlier examples that is kept."""

    def objective(self, task: LocalTask) -> Objective:
        """Return ``CE(new) + CE(old)``; plain in the first task, or where nothing is kept."""
        learning = plain(task)
        old = kept_examples(task.past, self.share) if task.past is not None else []
        if task.past is None or not old:
            return learning
        # Other partners in every round, also where what is learnt goes into the residual.
        moved = [each for each in (task.state.current, task.state.residual) if each is not None]
        generator = seeded("replay", *map(fingerprint, moved))
        partners = paired(old, len(task.data), generator)
        labels = [share().labels for share in task.past.shares]
        return Replayed(task.model, learning, labels, partners)


@dataclass(frozen=True)
class Replayed(Objective):
    """Cross-entropy of every new example and of its old partner; ``labels``: label spaces of the
    earlier tasks, by their position."""

    model: LanguageModel
    learning: Objective
    labels: Sequence[Sequence[str]]
    partners: Sequence[Placed]

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return ``CE(new) + CE(old)``, ``(batch,)``."""
        new = self.learning.example_losses(batch)
        old = losses_by_task(self.model, self.labels, [self.partners[i] for i in batch])
        return new + old


def kept_examples(past: TaskHistory, share: float) -> list[Placed]:
    """Return a part of every earlier task's examples, rounded up, the same in all later tasks."""
    kept: list[Placed] = []
    for position, read in enumerate(past.shares):
        data = read().data
        # Of the share as it is written: the float product of 0.07 and 100 is above 7.
        count = math.ceil(Fraction(str(share)) * len(data))
        order = torch.randperm(len(data), generator=seeded("kept", position)).tolist()
        kept += [(position, data[i]) for i in order[:count]]
    return kept


def paired(old: Sequence[Placed], count: int, generator: torch.Generator) -> list[Placed]:
    """Partners for ``count`` new examples: every old one equally often, give or take one."""
    rounds = math.ceil(count / len(old))
    orders = [torch.randperm(len(old), generator=generator) for _ in range(rounds)]
    return [old[i] for i in torch.cat(orders)[:count].tolist()]
