"""Losses over words, a part of the words at a time: logits over a vocabulary are the largest
tensors that there are, and nobody needs those of all words at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WORDS = 64
"""In a part; of a vocabulary of 50,000 that is 13 MB in float32."""


def word_losses(losses: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Return ``losses(*rows)``, ``(words,)``, part by part where there are more than ``WORDS``.
    Backward computes a part once more, instead of keeping what it is made of.

    Args:
        losses: of some words, one each; it draws nothing at random.
        rows: each with a row for every word; their gradients are those of all at once.
    """
    if len(rows[0]) <= WORDS:
        return losses(*rows)
    parts = zip(*(torch.split(values, WORDS) for values in rows), strict=True)
    found = [
        checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return torch.cat(found)
