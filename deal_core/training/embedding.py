"""Embeddings of many texts by the frozen base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deal_core.lora.attach import base_only
from deal_core.models import Encoded, LanguageModel
from deal_core.training.batching import evaluation_batches


def base_embeddings(
    model: LanguageModel, data: Sequence[Encoded], layers: int = 1, alone: bool = False
) -> Tensor:
    """Return unit vectors ``(examples, size)`` in the order of the data, float32, on the CPU;
    whatever adapters the model holds. ``alone``: each text in a pass of its own."""
    parts: dict[int, Tensor] = {}
    with base_only(model.module):
        for batch in evaluation_batches(data, alone):
            vectors = model.embed([data[i] for i in batch], layers).float().cpu()
            parts.update(zip(batch, vectors, strict=True))
    return torch.stack([parts[i] for i in range(len(data))])
