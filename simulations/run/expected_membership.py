"""What a class sum is expected to tell of who is in it, from its size and noise alone.

A sum of ``n`` records with covariance ``Sigma`` and noise of deviation ``tau`` is close to a
Gaussian around ``n mu``; with a given record in it, around ``n mu + x - mu``. The likelihood ratio
of the two separates members from others by ``d'^2 = sum_j lambda_j / (n lambda_j + tau^2)`` over
the eigenvalues of ``Sigma``, and its area under the ROC curve is ``Phi(d' / sqrt 2)``. Records of
real texts are no Gaussians: measured ``d'`` is 5 to 13 % smaller. Whoever has to estimate ``mu``
from ``m`` further records is off by ``n^2 / m`` times ``Sigma`` in the sum.
No array library loads here: ``deal check`` says the figure at once.

Source: Homer et al., PLoS Genetics 2008; Sankararaman et al., Nature Genetics 2009 (members of a
published mean).
"""

from __future__ import annotations

import math

SPREAD = 0.63
"""Sum of the eigenvalues: mean squared length, in units of length, of a record about its label's
mean (MedMCQA, in 256 public directions)."""
KNEE, SLOPE = 58.3, 1.89
"""Eigenvalue ``j`` is proportional to ``(j + KNEE) ** -SLOPE`` (the same records)."""

REACHED = 0.95
"""Of the separation of Gaussians, what is reached on records of texts; the largest measured."""


def expected_auc(
    records: float, directions: int, deviation: float, known: float = math.inf
) -> float:
    """Return the area under the ROC curve of the best attack on one label's sum; 0.5: chance.

    Args:
        records: of the label in the sum.
        directions: in which records are added up.
        deviation: of the noise in each entry, in units of what a record adds at most; a noise
            multiplier, against a server with as many sites as may collude.
        known: further records of the label that the attacker has; infinity: knows its mean.

    Raises:
        ValueError: no record, or no direction.
    """
    if records <= 0 or directions <= 0:
        raise ValueError(f"{records} records in {directions} directions")
    weights = [(place + KNEE) ** -SLOPE for place in range(1, directions + 1)]
    scale = SPREAD / sum(weights)
    uncertain = records + records**2 / known
    squared = sum(
        scale * weight / (uncertain * scale * weight + deviation**2) for weight in weights
    )
    return 0.5 * (1 + math.erf(0.5 * REACHED * math.sqrt(squared)))
