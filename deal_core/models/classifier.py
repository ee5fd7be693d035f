"""Family ``sequence-classification``: a transformers model whose head has an output for every
label of the stream, by the names in its configuration (``label2id``).

The linear layers of the head are adapted beside those of the encoder, so that they learn, travel
and are retained as every adapted layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from deal_core.config.experiment import AdapterConfig
from deal_core.errors import UserError
from deal_core.models.encoder import EncoderLabels
from deal_core.models.interface import Encoded


class SequenceClassifier(EncoderLabels):
    """A classifier; its embeddings are the mean states of the encoder below the head."""

    def __init__(self, base: Any, tokenizer: Any, adapter: AdapterConfig, max_length: int) -> None:
        super().__init__(base, tokenizer, with_head(base, adapter), max_length)
        self._encoder = base.base_model
        self._outputs: dict[str, int] = dict(base.config.label2id)

    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return logits, ``(batch, labels)``, float32."""
        ids, mask = self._padded([item.tokens for item in batch])
        logits: Tensor = self.module(input_ids=ids, attention_mask=mask.long()).logits
        columns = [output_of(label, self._outputs) for label in labels]
        return logits.float()[:, columns]


def output_of(label: str, outputs: Mapping[str, int]) -> int:
    """Return the place of a label's output in the head; UserError where it has none."""
    if label not in outputs:
        raise UserError(
            f"label '{label}' has no output in the model's head ({', '.join([*outputs][:5])}, ...);"
            " load the model with label2id and id2label of all labels of the stream"
        )
    return outputs[label]


def with_head(base: Any, adapter: AdapterConfig) -> AdapterConfig:
    """Return the settings with the layers that are adapted by default, and those of the head."""
    usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type, ())
    chosen = adapter.target_modules or tuple(usual)
    inside = f"{base.base_model_prefix}."
    head = [
        name
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(inside)
    ]
    return adapter.model_copy(update={"target_modules": tuple(dict.fromkeys([*chosen, *head]))})
