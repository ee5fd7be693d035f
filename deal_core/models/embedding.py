"""A text's embedding, made of mean states of a model's last layers: (M44) of docs/method.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.experiment import ModelConfig
from deal_core.models.interface import Encoded
from deal_core.models.loading import pretrained


def embedding_of(pooled: Sequence[Tensor]) -> Tensor:
    """Return unit vectors, ``(texts, parts * hidden)``: of each pair of neighbouring layers the
    mean, side by side.

    Args:
        pooled: mean states of the texts in each layer, the last layer first, ``(texts, hidden)``.
    """
    units = [normalize(layer, dim=1) for layer in pooled]
    if len(units) == 1:
        return units[0]
    pairs = [torch.stack(units[i : i + 2]).sum(0) for i in range(0, len(units), 2)]
    return torch.cat([normalize(pair, dim=1) for pair in pairs], dim=1) / math.sqrt(len(pairs))


def text_of(item: Encoded) -> slice:
    """Return where a text lies among the tokens of its prompt; of one without tokens, the place
    before the answer or the last one."""
    first = min(item.shared, len(item.tokens) - 1)
    return slice(first, first + max(1, len(item.text)))


def last_layers(output: Any, layers: int) -> list[Tensor]:
    """Return the states of the last ``layers`` layers, the last one first; of fewer where the model
    has no more."""
    if layers == 1:
        return [output.last_hidden_state]
    after_each = output.hidden_states[1:]  # the first are the embedded tokens
    return list(after_each[: -layers - 1 : -1])


def embedding_size(model: ModelConfig, layers: int = 1) -> int:
    """Return the length of a text's embedding of so many of the last layers, or of all where there
    are fewer; no weights are read. Of an encoder-decoder they are the encoder's.

    Raises:
        UserError: unknown name.
    """
    from transformers import AutoConfig

    whole = pretrained(AutoConfig, model.name)
    config = whole.get_text_config(encoder=True if whole.is_encoder_decoder else None)
    size: int = config.hidden_size * math.ceil(min(layers, config.num_hidden_layers) / 2)
    return size
