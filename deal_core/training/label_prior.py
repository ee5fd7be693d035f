"""What a client's labels alone say: how often each of them is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deal_core.models import Encoded


def log_shares(data: Sequence[Encoded], labels: int) -> Tensor:
    """Return ``log((n_y + 1) / (n + K))`` of every label ``y``, ``(labels,)``.

    Added to the label scores of a loss it explains what the shares alone explain, so that the
    model need not: labels that are rare at a client are not pushed away, and clients of different
    labels are led apart less. Without it at prediction, all labels are equal again.

    Args:
        data: the client's examples; none: all labels are equal, and nothing changes.
        labels: ``K``; the 1 for each (Laplace) keeps a label that does not occur finite.

    Source: docs/method.md (M7); Menon et al., ICLR 2021, arXiv 2007.07314 (logit-adjusted loss);
    Zhang et al., ICML 2022, arXiv 2209.00189 (calibrated by each client's own labels).
    """
    targets = torch.tensor([example.target for example in data], dtype=torch.long)
    counts = torch.bincount(targets, minlength=labels) + 1.0
    return (counts / counts.sum()).log()
