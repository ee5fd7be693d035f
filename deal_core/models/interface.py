"""What the rest of the project needs of a language model, and no more; and a text's embedding, made
of mean states of a model's last layers: (M44) of docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.data import Example
from deal_core.models.fast.text_cache import TokenCache


@dataclass(frozen=True)
class Encoded:
    """One tokenised example.

    Attributes:
        tokens: ids of the text (encoder) or of the prompt (generating model).
        target: index of the label in the task's labels; -1: the answer is a text.
        shared: so many tokens of a prompt, the first ones, are those of all prompts of the task.
        text: ids of the text alone, without the prompt around it.
        answer: ids of the answer, its end included, where it is a text.
        right: texts that are right answers, where it is one.
    """

    tokens: tuple[int, ...]
    target: int
    shared: int = 0
    text: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    right: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForwardOutput:
    """What one forward pass gives the local objective.

    Attributes:
        example_losses: ``(batch,)``, one loss per example, independent of its batch-mates.
        distillation_logits: ``(rows, classes)``; what a teacher hands to a student. Encoder: a
            row per example over the labels of other tasks. Generating model: a row per answer
            token over the vocabulary. No classes: nothing to distil.
        rows: how many of these rows each example has; their sum is the number of rows.
        spaces: how many classes, from the left, are one choice: a softmax is over one space.
            Their sum is the number of classes.
    """

    example_losses: Tensor
    distillation_logits: Tensor
    rows: Sequence[int]
    spaces: Sequence[int]


LabelVectors = Callable[[Sequence[str]], Tensor]
"""Names of labels to their vectors in the frozen model, ``(labels, size)``."""


class LanguageModel(Protocol):
    """A frozen base model with a current adapter (see ``deal_core.lora.attach``)."""

    @property
    def module(self) -> PeftModel:
        """The PEFT model."""

    @property
    def device(self) -> torch.device:
        """Where the module lives."""

    @property
    def has_label_logits(self) -> bool:
        """Whether losses and distillation are over the labels that are asked about; otherwise they
        are over one space, whatever is asked (a generating model's vocabulary)."""

    @property
    def tokens(self) -> TokenCache:
        """Token ids of texts."""

    def prepare(self, texts: Sequence[str], folder: Path | None) -> None:
        """Make or read what is made of a text once, token ids above all, of many texts.

        Args:
            texts: those that will be asked about.
            folder: of files for the next process; None: none are read or written.
        """

    def encode(
        self, examples: Sequence[Example], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Tokenise once.

        Args:
            examples: texts and their labels.
            labels: of the task; none: answers are texts.
            instruction: what its prompt asks for; empty: the usual. Encoders have no
                prompt.

        Raises:
            ValueError: an example's label is not in ``labels``.
        """

    def forward_train(
        self, batch: Sequence[Encoded], labels: Sequence[str], seen: Sequence[Sequence[str]]
    ) -> ForwardOutput:
        """Forward for training: losses over ``labels``, distillation over each space of ``seen``;
        a label may be in several.

        Args:
            batch: examples that were encoded with ``labels``.
            labels: of the task.
            seen: label spaces of other tasks, earlier or future.
        """

    def embed(self, batch: Sequence[Encoded], layers: int = 1) -> Tensor:
        """Return the texts' embeddings, unit vectors ``(batch, size)``, float32; see
        :func:`deal_core.models.embedding_size`.

        Args:
            batch: the texts.
            layers: of how many of the last layers they are made: (M44) of docs/method.md.
        """

    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return ``(batch, len(labels))``; the largest score is the answer."""


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
