"""Family ``encoder-labels``: text and label names meet in one embedding space.

``score(text, label) = logit_scale * cos(pool(model(text)), pool(base(label)))`` (M2). The label
side is the frozen base model without adapters, so all tasks share one label space, there is
no head that grows, and accuracy before any training (zero-shot) is a fair start.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.lora.attach import attach, base_only, lora_layers
from deal_core.lora.kinds import POOLED
from deal_core.lora.packing import Packing, packed, packing_of, packs
from deal_core.models.fast.attention import NAME as ATTENTION
from deal_core.models.fast.attention import register_attention
from deal_core.models.fast.text_cache import FrozenVectors, TokenCache, tokeniser_name, weights_name
from deal_core.models.interface import (
    Encoded,
    ForwardOutput,
    LabelVectors,
    embedding_of,
    last_layers,
)
from deal_core.models.loading import best_device, load_base_model, pretrained
from deal_core.models.prompt import words

LONGEST_LABEL = 128
"""Tokens of a text for a model that reads names of labels alone."""
ALONE_TOLERANCE = 0.05
"""Relative difference of states that rounding may make."""
LOGIT_SCALE = 20.0
"""Multiplier of the cosine between text and label."""


class EncoderLabels:
    """Any Hugging Face encoder with mean pooling over the real tokens."""

    has_label_logits = True

    def __init__(
        self, base: Any, tokenizer: Any, model: ModelConfig, adapter: AdapterConfig, max_length: int
    ) -> None:
        self.device = best_device()
        self.module: PeftModel = attach(base.to(self.device), adapter, TaskType.FEATURE_EXTRACTION)
        self.module.eval()
        self.module.packs_texts = (
            self.device.type == "cpu"
            and base.config.model_type == "bert"
            and base.config._attn_implementation == ATTENTION
        )
        self._tokenizer = tokenizer
        self._scale = LOGIT_SCALE
        self.tokens = TokenCache(
            lambda texts: tokenizer(texts, truncation=True, max_length=max_length)["input_ids"],
            tokeniser_name(tokenizer, max_length),
        )
        self._longest = "word " * max_length
        self._pooled_map = dict(base.named_children()).get(POOLED)
        self._frozen = None
        if self._pooled_map is not None:
            self._frozen = FrozenVectors(self._embed, lambda: _encoder_name(base))
        self._label_cache: dict[str, Tensor] = {}
        self._label_matrix: tuple[tuple[str, ...], Tensor] = ((), torch.empty(0))

    def encode(
        self, examples: Sequence[Example], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Tokenise; texts are cut at ``train.max_length`` tokens. There is no prompt."""
        ids = self.tokens([example.text for example in examples])
        index = {label: position for position, label in enumerate(labels)}
        return [
            Encoded(tuple(tokens), index[example.label])
            for tokens, example in zip(ids, examples, strict=True)
        ]

    def forward_train(
        self, batch: Sequence[Encoded], labels: Sequence[str], seen: Sequence[Sequence[str]]
    ) -> ForwardOutput:
        """One forward; cross-entropy over ``labels``, logits over the spaces of ``seen``."""
        scores = self.scores(batch, [*labels, *chain.from_iterable(seen)])
        targets = torch.tensor([item.target for item in batch], device=self.device)
        own = scores[:, : len(labels)]
        losses = cross_entropy(own, targets, reduction="none")
        spaces = [len(space) for space in seen]
        return ForwardOutput(losses, scores[:, len(labels) :], [1] * len(batch), spaces)

    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return scaled cosines, ``(batch, labels)``, float32."""
        return self._scale * self.embed(batch) @ self.label_vectors(labels).T

    def embed(self, batch: Sequence[Encoded], layers: int = 1) -> Tensor:
        """Unit vectors of the texts, ``(batch, parts * hidden)``, float32: (M44)."""
        token_ids = [item.tokens for item in batch]
        if layers == 1 and self._frozen is not None:
            return self._mapped(self._frozen(token_ids).to(self.device))
        return self._embed(token_ids, layers)

    def _mapped(self, vectors: Tensor) -> Tensor:
        """Return what the map behind the pooling makes of unit vectors, a text to a row: (M57)."""
        assert self._pooled_map is not None
        return normalize(self._pooled_map(vectors[:, None, :])[:, 0], dim=1)

    def prepare(self, texts: Sequence[str], folder: Path | None) -> None:
        """Make or read token ids, and where the encoder never changes its vectors as well: of the
        longest text that there may be first, so that no text decides whether memory suffices."""
        self.tokens.prepare(texts, folder)
        if self._frozen is not None and folder is not None:
            with torch.no_grad():
                self._embed(self.tokens([self._longest]))
            self._frozen.prepare([tuple(ids) for ids in self.tokens(texts)], folder)

    def _embed(self, token_ids: Sequence[Sequence[int]], layers: int = 1) -> Tensor:
        """Return unit vectors of mean-pooled token states."""
        packing = packing_of(token_ids) if packs(self.module) else None
        pooled = self._pooled_packed(token_ids, packing, layers) if packing is not None else None
        if pooled is None:
            pooled = self._pooled(token_ids, layers)
        return embedding_of(pooled)

    def _pooled(self, token_ids: Sequence[Sequence[int]], layers: int) -> list[Tensor]:
        """Mean states of the last layers, the last one first."""
        longest = max(len(ids) for ids in token_ids)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in token_ids])
        lengths = torch.tensor([len(ids) for ids in token_ids])
        mask = (torch.arange(longest)[None, :] < lengths[:, None]).to(self.device)
        output = self.module(
            input_ids=ids.to(self.device),
            attention_mask=mask.long(),
            output_hidden_states=layers > 1,
        )
        counts = mask.sum(1, keepdim=True)
        return [
            (states.float() * mask[:, :, None]).sum(1) / counts
            for states in last_layers(output, layers)
        ]

    def _pooled_packed(
        self, token_ids: Sequence[Sequence[int]], packing: Packing, layers: int
    ) -> list[Tensor]:
        """The same of texts that lie end to end in one row."""
        ids, lengths = torch.tensor([list(chain.from_iterable(token_ids))]), list(packing.lengths)
        with packed(lora_layers(self.module).values(), packing):
            output = self.module(
                input_ids=ids,
                position_ids=packing.positions,
                packing=packing,
                output_hidden_states=layers > 1,
            )
        return [
            torch.stack([text.mean(0) for text in torch.split(states[0].float(), lengths)])
            for states in last_layers(output, layers)
        ]

    def label_vectors(self, labels: Sequence[str]) -> Tensor:
        """Return frozen unit vectors of the label names, ``(labels, hidden)``; each made once, and
        by itself, so that it is the same to the bit whatever it is asked with. The matrix asked for
        last is kept."""
        wanted = tuple(labels)
        if self._label_matrix[0] != wanted:
            missing = [label for label in dict.fromkeys(labels) if label not in self._label_cache]
            if missing:
                names = self._tokenizer([words(label) for label in missing])["input_ids"]
                with base_only(self.module):
                    for label, ids in zip(missing, names, strict=True):
                        self._label_cache[label] = self._embed([ids])[0]
            matrix = torch.stack([self._label_cache[label] for label in labels])
            self._label_matrix = (wanted, matrix)
        return self._label_matrix[1]


def _encoder_name(base: Any) -> str:
    """Return a digest of an encoder's weights and device, without the map behind it, which
    learns."""
    weights = {k: v for k, v in base.state_dict().items() if not k.startswith(f"{POOLED}.")}
    return weights_name(weights, next(iter(weights.values())).device.type)


def load_encoder(
    model: ModelConfig, adapter: AdapterConfig, max_length: int, dtype: torch.dtype
) -> EncoderLabels:
    """Return the model, base and tokeniser loaded.

    Raises:
        UserError: the model cannot be loaded, or is none that reads a text as it stands.
    """
    from transformers import AutoTokenizer

    base = pretrained_encoder(model, dtype)
    return EncoderLabels(base, pretrained(AutoTokenizer, model.name), model, adapter, max_length)


def encoder_label_vectors(model: ModelConfig) -> LabelVectors:
    """Return what names of labels are to a model: its frozen unit vectors of them, ``(labels,
    hidden)``, float32.

    Raises:
        UserError: as :func:`load_encoder`.
    """
    encoder = load_encoder(model, AdapterConfig(rank=1), LONGEST_LABEL, torch.float32)
    return lambda labels: encoder.label_vectors(labels).cpu()


def pretrained_encoder(model: ModelConfig, dtype: torch.dtype) -> Any:
    """Return the base model with our attention, or, where it has one of its own that takes masks of
    another kind (MPNet), with that.

    Raises:
        UserError: the model cannot be loaded, or a text beside a longer one has other states than
            it has alone.
    """
    from transformers import AutoModel

    for attention in (register_attention(), "eager"):
        base = load_base_model(AutoModel, model, dtype, attention)
        if reads_alone(base):
            return base
    raise UserError(
        f"model.name '{model.name}': does not read a padded text as it reads it alone, which "
        "encoder-labels needs; choose an encoder, or another model.family"
    )


def reads_alone(base: Any) -> bool:
    """Return whether a text beside a longer one has the states that it has alone."""
    ids = torch.tensor([[2, 3, 0, 0], [2, 3, 4, 3]]).to(base.device)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).to(base.device)
    try:
        with torch.no_grad():
            beside = base(input_ids=ids, attention_mask=mask).last_hidden_state[0, :2].float()
            alone = base(input_ids=ids[:1, :2], attention_mask=mask[:1, :2]).last_hidden_state[0]
    except Exception:
        return False
    error = (beside - alone).norm(dim=1) / alone.float().norm(dim=1)
    return bool(error.max() < ALONE_TOLERANCE)
