"""Embeddings of many texts by the frozen base model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from deal_core.lora.attach import base_only
from deal_core.models import Encoded, LanguageModel
from deal_core.training.batching import evaluation_batches
from deal_core.training.containment import contained


def base_embeddings(model: LanguageModel, data: Sequence[Encoded], layers: int = 1) -> Tensor:
    """Return unit vectors ``(examples, size)`` in the order of the data, float32, on the CPU;
    whatever adapters the model holds."""
    parts: dict[int, Tensor] = {}
    with base_only(model.module):
        for batch in evaluation_batches(data):
            vectors = model.embed([data[i] for i in batch], layers).float().cpu()
            parts.update(zip(batch, vectors, strict=True))
    return torch.stack([parts[i] for i in range(len(data))])


def embeddings_alone(
    model: LanguageModel, data: Sequence[Encoded], layers: int, size: int
) -> Tensor:
    """Return the same where single records are protected: each text in a pass of its own, and the
    row of one that cannot be embedded is no number, so that no text changes the row of another.

    Args:
        model: of any family.
        data: the texts.
        layers: of how many of the last layers.
        size: of a row (:func:`deal_core.models.embedding_size`).
    """

    def embed(text: Encoded) -> Tensor:
        return model.embed([text], layers)[0].float().cpu()

    rows = torch.full((len(data), size), torch.nan)
    with base_only(model.module):
        for place, text in enumerate(data):
            row = contained(partial(embed, text), alone=True)
            if row is not None:
                rows[place] = row
    return rows
