"""Membership inference: how well an attacker tells training records from records that were away.

Of adapters the score is how far the loss on a record fell below the frozen base model's. Of a
class sum it is the likelihood ratio of two Gaussians, with the record in the sum and without; the
attacker knows the label, how many records are in the sum, how much noise is in it, and other
records that are in no sum.

Sources: Carlini et al., "Membership inference attacks from first principles", S&P 2022 (likelihood
ratios, and why the true positive rate at a small false positive rate counts); Sankararaman et al.,
Nature Genetics 2009 (sums).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch.nn.functional import cross_entropy

from deal_core.data import Example
from deal_core.lora.attach import base_only
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.audit.canaries import Scores
from deal_core.training.batching import evaluation_batches

Rows = NDArray[np.float64]
FALSE_POSITIVES = 1e-3
"""Rate at which true positives are told; of 1,000 others or more."""
TINY = 1e-6
"""Variance of a sum without noise at least, as a share of the mean variance."""


def area(members: Scores, others: Scores) -> float:
    """Area under the ROC curve: probability that a member scores above another (ties half)."""
    n, k = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * k))


def true_positive_rate(members: Scores, others: Scores) -> float | None:
    """Return the share of members above a threshold that at most 0.1 % of the others pass; None of
    fewer than a thousand others, whose 0.1 % is unknown."""
    if len(others) < 1 / FALSE_POSITIVES:
        return None
    allowed = int(FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[len(others) - allowed - 1]
    return float((members > threshold).mean())


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


@dataclass(frozen=True)
class Known:
    """What the attacker knows of a label's records.

    Attributes:
        mean: ``(size,)``.
        covariance: within the label, ``(size, size)``.
        records: from so many the mean is estimated.
    """

    mean: Rows
    covariance: Rows
    records: int


def known_of(own: Rows, others: Rows) -> Known:
    """Return what follows from records that are in no sum; the more of them there are for each
    direction, the more the label's own covariance counts.

    Args:
        own: of the label, two or more, ``(records, size)``.
        others: covariance within other labels, ``(size, size)``.
    """
    weight = len(own) / (len(own) + own.shape[1])
    covariance = weight * np.cov(own, rowvar=False) + (1 - weight) * others
    return Known(own.mean(axis=0), covariance, len(own))


def as_added(vectors: Rows, bound: float, count_weight: float) -> Rows:
    """Return what each record adds to a class sum, its count left out: clipped with that."""
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True) + count_weight**2)
    clipped: Rows = vectors * (bound / np.maximum(lengths, bound))
    return clipped


def sum_scores(records: Rows, total: Rows, members: int, deviation: float, known: Known) -> Scores:
    """Score records by the likelihood ratio of a class sum.

    Args:
        records: as they are added, ``(records, size)``.
        total: the sum, ``(size,)``.
        members: records in it.
        deviation: of its noise in each entry.
        known: what the attacker knows; its mean is uncertain, too.

    Returns:
        For each record the logarithm of how much likelier the sum is with it than without, but for
        a constant.
    """
    spread = (members + members**2 / known.records) * known.covariance
    noise = max(deviation**2, TINY * np.trace(spread) / len(spread))
    away = records - known.mean
    weighted = np.linalg.solve(spread + noise * np.eye(len(spread)), away.T).T
    own = (weighted * away).sum(axis=1)
    scores: Scores = weighted @ (total - members * known.mean) - 0.5 * own
    return scores
