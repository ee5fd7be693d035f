"""Family ``own-loss``: a model that a program passes with two functions, one that trains and one
that answers. What lies between is not known: it has no logits to distil, no embedding for class
means, and nothing that keeps the loss of one record apart from others under a privacy mechanism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType
from torch import Tensor

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.models.given import given
from deal_core.models.interface import Encoded, ForwardOutput, LanguageModel
from deal_core.models.loading import load_base_model


@dataclass(frozen=True)
class OwnExample(Encoded):
    """An example as the functions get it; its tokens are for batches of similar length."""

    example: Example | None = None


class OwnLoss(LanguageModel):
    """A model with ``loss(model, examples)`` and ``predict(model, examples, labels)``."""

    has_label_logits = True

    def __init__(self, base: Any, model: ModelConfig, adapter: AdapterConfig, longest: int) -> None:
        super().__init__(base, adapter, TaskType.FEATURE_EXTRACTION)
        passed = given(model.name)
        assert passed.functions is not None
        self._loss, self._predict = passed.functions
        self._tokenizer, self._longest = passed.tokenizer, longest

    def encode(
        self, examples: Sequence[Example], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Tokenise, to know lengths."""
        texts = [example.text for example in examples]
        ids = self._tokenizer(texts, truncation=True, max_length=self._longest) if texts else {}
        return [
            OwnExample(tuple(tokens), labels.index(example.label), example=example)
            for tokens, example in zip(ids.get("input_ids", ()), examples, strict=True)
        ]

    def forward_train(
        self, batch: Sequence[Encoded], labels: Sequence[str], seen: Sequence[Sequence[str]]
    ) -> ForwardOutput:
        """Return the losses of the function."""
        losses = self._loss(self.module, _examples(batch))
        if losses.shape != (len(batch),):
            raise UserError(
                f"loss: gives a tensor of shape {tuple(losses.shape)} for {len(batch)} examples; "
                f"return one loss for each, ({len(batch)},)"
            )
        return ForwardOutput(losses, losses.new_zeros(len(batch), 0), [])

    def embed(self, batch: Sequence[Encoded], layers: int = 1) -> Tensor:
        """Return nothing: it has no embedding."""
        raise UserError("a model with a loss of its own has no embedding")

    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return 1 for the label that the function answers with, and 0 for the others."""
        answers = self._predict(self.module, _examples(batch), list(labels))
        rows = [[float(label == answer) for label in labels] for answer in answers]
        return torch.tensor(rows).reshape(len(batch), len(labels))


def _examples(batch: Sequence[Encoded]) -> list[Any]:
    return [item.example for item in batch if isinstance(item, OwnExample)]


def load_own_loss(
    model: ModelConfig, adapter: AdapterConfig, max_length: int, dtype: torch.dtype
) -> OwnLoss:
    """Return the model, with the attention that it came with; UserError where none was passed."""
    return OwnLoss(load_base_model(None, model, dtype), model, adapter, max_length)
