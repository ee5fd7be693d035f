"""Families that score any number of labels in one forward pass: ``encoder-labels``,
``sequence-classification`` and ``own-loss``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import transformers
from peft import TaskType
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.lora.attach import base_only
from deal_core.lora.kinds import POOLED
from deal_core.models.fast.attention import register_attention
from deal_core.models.fast.prompt_forest import Tokens
from deal_core.models.interface import (
    Encoded,
    ForwardOutput,
    LanguageModel,
    Memo,
    embedding_of,
    last_layers,
    padded,
)
from deal_core.models.loading import given, load_base_model, pretrained
from deal_core.models.prompt import words

ALONE_TOLERANCE = 0.05
"""Relative difference of states that rounding may make."""
LOGIT_SCALE = 20.0
"""Multiplier of the cosine between text and label."""
MOST = 200_000
"""Texts whose vectors are kept in memory: 300 MB with 384 entries."""


class EncoderLabels(LanguageModel):
    """Family ``encoder-labels``: text and label names meet in one embedding space.

    ``score(text, label) = logit_scale * cos(pool(model(text)), pool(base(label)))`` (M2), with mean
    pooling over the real tokens of any Hugging Face encoder. The label side is the frozen base
    model without adapters, so all tasks share one label space, there is no head that grows, and
    accuracy before any training (zero-shot) is a fair start.
    """

    has_label_logits = True

    def __init__(self, base: Any, tokenizer: Any, adapter: AdapterConfig, max_length: int) -> None:
        super().__init__(base, adapter, TaskType.FEATURE_EXTRACTION)
        self._tokenizer, self._encoder = tokenizer, self.module
        self.tokens: Memo[str, list[int]] = Memo(
            lambda texts: tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        )
        self._pooled_map = dict(base.named_children()).get(POOLED)
        self._frozen: Memo[Tokens, Tensor] = Memo(self._each_alone, MOST)
        self._label_vectors: Memo[str, Tensor] = Memo(self._names_alone)
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
        return ForwardOutput(losses, scores[:, len(labels) :], spaces)

    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return scaled cosines, ``(batch, labels)``, float32."""
        return LOGIT_SCALE * self.embed(batch) @ self.label_vectors(labels).T

    def embed(self, batch: Sequence[Encoded], layers: int = 1) -> Tensor:
        """Return unit vectors of the texts, ``(batch, parts * hidden)``, float32: (M44). Where a
        map lies behind the pooling (M57) it alone learns, and the encoder's vectors are kept."""
        token_ids = [item.tokens for item in batch]
        if layers > 1 or self._pooled_map is None:
            return self._embed(token_ids, layers)
        vectors = torch.stack(self._frozen(token_ids)).to(self.device)
        # A text to a row: its gradient is its own.
        return normalize(self._pooled_map(vectors[:, None, :])[:, 0], dim=1)

    def _each_alone(self, token_ids: Sequence[Sequence[int]]) -> Iterable[Tensor]:
        """Return vectors, each made in a pass of its own: beside others it would be rounded
        otherwise, and depend on them."""
        with torch.no_grad():
            return [self._embed([ids])[0].float().cpu() for ids in token_ids]

    def _padded(self, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return padded(token_ids, self._tokenizer.pad_token_id or 0, self.device)

    def _embed(self, token_ids: Sequence[Sequence[int]], layers: int = 1) -> Tensor:
        """Return unit vectors of mean-pooled token states."""
        ids, mask = self._padded(token_ids)
        output = self._encoder(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=layers > 1
        )
        counts = mask.sum(1, keepdim=True)
        return embedding_of(
            [
                (states.float() * mask[:, :, None]).sum(1) / counts
                for states in last_layers(output, layers)
            ]
        )

    def label_vectors(self, labels: Sequence[str]) -> Tensor:
        """Return frozen unit vectors of the label names, ``(labels, hidden)``; each made by itself,
        so that it is the same to the bit whatever it is asked with. The matrix asked for last is
        kept."""
        wanted = tuple(labels)
        if self._label_matrix[0] != wanted:
            self._label_matrix = (wanted, torch.stack(self._label_vectors(wanted)))
        return self._label_matrix[1]

    def _names_alone(self, labels: Sequence[str]) -> Iterable[Tensor]:
        names = self._tokenizer([words(label) for label in labels])["input_ids"]
        with base_only(self.module):
            return [self._embed([ids])[0] for ids in names]


def load_encoder(
    model: ModelConfig,
    adapter: AdapterConfig,
    max_length: int,
    dtype: torch.dtype,
    make: type[EncoderLabels] = EncoderLabels,
    loader: str = "AutoModel",
) -> EncoderLabels:
    """Return the model, base and tokeniser loaded, with our attention, or, where it has one of its
    own that takes masks of another kind (MPNet), with that. ``loader``: class of transformers.

    Raises:
        UserError: the model cannot be loaded, or a text beside a longer one has other states than
            it has alone.
    """
    for attention in (register_attention(), "eager"):
        base = load_base_model(getattr(transformers, loader), model, dtype, attention)
        if reads_alone(base.base_model):
            tokenizer = pretrained(transformers.AutoTokenizer, model.name)
            return make(base, tokenizer, adapter, max_length)
    raise UserError(
        f"model.name '{model.name}': does not read a padded text as it reads it alone, which "
        f"{model.family} needs; choose an encoder, or another model.family"
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


class SequenceClassifier(EncoderLabels):
    """Family ``sequence-classification``: a transformers model whose head has an output for every
    label of the stream, by the names in its configuration (``label2id``). Linear layers of the head
    are adapted beside those of the encoder. Embeddings are the mean states below the head."""

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


@dataclass(frozen=True)
class OwnExample(Encoded):
    """An example as the functions get it; its tokens are for batches of similar length."""

    example: Example | None = None


class OwnLoss(LanguageModel):
    """Family ``own-loss``: a model that a program passes with ``loss(model, examples)`` and
    ``predict(model, examples, labels)``. What lies between is not known: it has no logits to
    distil, no embedding for class means, and nothing that keeps the loss of one record apart from
    others under a privacy mechanism."""

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
