"""Embeddings of many texts by the model as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deal_core.models import Encoded, LanguageModel
from deal_core.training.batching import evaluation_batches


def embeddings(model: LanguageModel, data: Sequence[Encoded]) -> Tensor:
    """Return unit vectors ``(examples, size)`` in the order of the data, float32, on the CPU.

    Raises:
        ValueError: the family has none.
    """
    found = torch.empty(len(data), model.embedding_size)
    with torch.no_grad():
        for batch in evaluation_batches(data):
            found[batch] = model.embed([data[i] for i in batch]).float().cpu()
    return found
