"""Baseline ``replay``: one adapter that goes on practising examples of earlier tasks.

**Not private**: the client keeps texts of earlier tasks, and trains on them again. An upper
baseline for methods that keep none.

As ``sequential``, and every new example of a batch brings one old example along, with the label
space of its own task: ``CE(new) + weight * CE(old)`` (M22). So a round has the steps of any other
method (each of them twice as dear), and new and old examples have equal parts whatever the number
of tasks. Source: experience replay (Robins 1995; Rolnick et al., NeurIPS 2019, arXiv 1811.11682);
Chaudhry et al. 2019, arXiv 1902.10486, draw a batch of new and as many old examples, as here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from deal_core.baselines.sequential import Sequential
from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.deal.interface import LocalTask, TaskDataset, TaskHistory
from deal_core.deal.objective import Placed, losses_by_task, plain
from deal_core.lora.adapter import fingerprint
from deal_core.lora.state import State
from deal_core.models import Encoded, LanguageModel
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.training.loop import Objective

SHARE = 0.1
"""Of a client's examples of every earlier task that it keeps, rounded up."""


@dataclass(frozen=True)
class Replay(Sequential):
    """Attributes: ``share``: of earlier examples that is kept; ``weight``: of an old example's loss
    beside that of a new one."""

    share: float = SHARE
    weight: float = 1.0

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Return ``CE(new) + weight * CE(old)``; plain in the first task, or where nothing is
        kept."""
        learning = plain(model, task, data)
        if task.past is None or self.weight == 0:
            return learning
        old = kept_examples(task.past, self.share)
        if not old:
            return learning
        # Other partners in every round, also where what is learnt goes into the residual.
        moved = [each for each in (state.current, state.residual) if each is not None]
        generator = seeded("replay", *map(fingerprint, moved))
        partners = paired(old, len(data), generator)
        labels = [share().labels for share in task.past.shares]
        return Replayed(model, learning, labels, partners, self.weight)


@dataclass(frozen=True)
class Replayed(Objective):
    """Cross-entropy of every new example and of its old partner.

    Attributes:
        learning: the objective on new examples.
        labels: label spaces of the earlier tasks, by their position.
        partners: one old example per new one.
    """

    model: LanguageModel
    learning: Objective
    labels: Sequence[Sequence[str]]
    partners: Sequence[Placed]
    weight: float

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return ``CE(new) + weight * CE(old)``, ``(batch,)``."""
        new = self.learning.example_losses(batch)
        old = losses_by_task(self.model, self.labels, [self.partners[i] for i in batch])
        return new + self.weight * old


def kept_examples(past: TaskHistory, share: float) -> list[Placed]:
    """Return a part of every earlier task's examples, rounded up, the same in all later tasks."""
    kept: list[Placed] = []
    for position, task in enumerate(past.shares):
        kept += [(position, example) for example in _sample(task(), share, position)]
    return kept


def _sample(task: TaskDataset, share: float, position: int) -> list[Encoded]:
    # Of the share as it is written: the float product of 0.07 and 100 is above 7.
    count = math.ceil(Fraction(str(share)) * len(task.data))
    order = torch.randperm(len(task.data), generator=seeded("kept", position))
    return [task.data[i] for i in order[:count].tolist()]


def paired(old: Sequence[Placed], count: int, generator: torch.Generator) -> list[Placed]:
    """Partners for ``count`` new examples: every old one equally often, give or take one."""
    rounds = math.ceil(count / len(old))
    orders = [torch.randperm(len(old), generator=generator) for _ in range(rounds)]
    return [old[i] for i in torch.cat(orders)[:count].tolist()]


def make_replay(method: MethodConfig, adapter: AdapterConfig) -> Replay:
    """Build from the experiment."""
    return Replay(adapter)
