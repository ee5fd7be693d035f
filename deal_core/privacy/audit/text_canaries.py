"""Text canaries: real training examples of a site with random labels, there or not.

What a model says of a label that nobody could have guessed tells whether it was trained on it.
Where groups are protected a canary is one of the site's groups, with all of its records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from deal_core.data import Example, TaskData
from deal_core.lora.attach import base_only
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.audit.canaries import fair_coins
from deal_core.randomness import seeded
from deal_core.training.batching import evaluation_batches

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Planted:
    """One site's share of one task.

    Attributes:
        canaries: examples with random labels.
        numbers: of each of them, which canary it is, or is of, from 0.
        included: ``(canaries,)``, fair coins.
        others: what is trained on beside them.
    """

    canaries: tuple[Example, ...]
    numbers: tuple[int, ...]
    included: NDArray[np.bool_]
    others: tuple[Example, ...]


@dataclass(frozen=True)
class TextCanaries:
    """Plants them.

    Attributes:
        client: number of the audited site. count: at most so many a task, and half of the site's
            examples (or groups). seed: of choice, labels and coins.
    """

    client: int
    count: int
    seed: int

    def planted(self, share: TaskData) -> Planted:
        """Choose canaries among the training examples of a share, and throw the coins."""
        generator = seeded(self.seed, "text canaries", share.name)
        units = members_of(share.train)
        order = torch.randperm(len(units), generator=generator).tolist()
        count = min(self.count, len(order) // 2)
        chosen = [(number, i) for number in range(count) for i in units[order[number]]]
        labels = torch.randint(len(share.labels), (len(chosen),), generator=generator).tolist()
        return Planted(
            tuple(
                replace(share.train[i], label=share.labels[k])
                for (_, i), k in zip(chosen, labels, strict=True)
            ),
            tuple(number for number, _ in chosen),
            fair_coins(count, self.seed, share.name),
            tuple(share.train[i] for i in sorted(i for n in order[count:] for i in units[n])),
        )

    def prepare(self, shares: list[TaskData]) -> list[TaskData]:
        """Return the clients' shares with the canaries whose coin says so, and without the
        others."""
        own = self.planted(shares[self.client])
        there = [e for e, k in zip(own.canaries, own.numbers, strict=True) if own.included[k]]
        changed = replace(shares[self.client], train=(*own.others, *there))
        return [changed if k == self.client else share for k, share in enumerate(shares)]


def members_of(examples: Sequence[Example]) -> list[list[int]]:
    """Return the positions of what is protected together: of each group, or of each example."""
    found: dict[str | int, list[int]] = {}
    for position, example in enumerate(examples):
        found.setdefault(example.unit or position, []).append(position)
    return list(found.values())


def mean_scores(scores: Scores, members: Sequence[Sequence[int]]) -> Scores:
    """Return the mean over each unit's examples, ``(units,)``."""
    return np.array([scores[list(positions)].mean() for positions in members], np.float64)


def learnt_scores(
    model: LanguageModel, examples: Sequence[Example], labels: Sequence[str]
) -> Scores:
    """Return by how much the loss of each example is below the base model's, ``(examples,)``.

    An example that is easy for a model that never saw it says nothing; so the loss is compared
    with that of the frozen base model, which is public.
    """
    encoded = model.encode(examples, labels)
    after = _losses(model, encoded, labels)
    with base_only(model.module):
        before = _losses(model, encoded, labels)
    return before - after


def _losses(model: LanguageModel, encoded: Sequence[Encoded], labels: Sequence[str]) -> Scores:
    losses = np.zeros(len(encoded))
    for batch in evaluation_batches(encoded):
        with torch.no_grad():
            own = [encoded[i] for i in batch]
            logits = model.scores(own, labels).double().cpu()
            targets = torch.tensor([e.target for e in own])
            losses[list(batch)] = cross_entropy(logits, targets, reduction="none").numpy()
    return losses
