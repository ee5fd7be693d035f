"""A model that answers in words: what the families share, whatever reads the prompt.

Training lowers the mean negative log-likelihood of the answer's own tokens and the end, per
example. Scoring is the length-normalised log-likelihood of each label as the answer: docs/method.md
(M3).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor

from deal_core.data import Example
from deal_core.models.embedding import embedding_of
from deal_core.models.interface import Encoded, ForwardOutput
from deal_core.models.prompt_forest import Tokens
from deal_core.models.prompt_tokens import PromptTokens, answer_losses


class Reader(Protocol):
    """Reads prompts and predicts the words of answers: a decoder alone, or an encoder and one."""

    module: PeftModel
    device: torch.device

    def answer_states(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Return the states that predict the words of the answers, an answer to each prompt,
        ``(words, hidden)``."""

    def word_logits(self, states: Tensor) -> Tensor:
        """Return logits over the vocabulary, ``(..., vocabulary)``, float32."""

    def likelihoods(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Return the mean log-likelihood of each answer's tokens to each prompt, ``(batch,
        answers)``, float32."""

    def keep_nothing(self) -> None:
        """Keep nothing of a prompt when its pass is over."""

    def continued(self, batch: Sequence[Encoded], to_the_end: bool = False) -> list[list[int]]:
        """Return the likeliest words after each prompt, as long as the longest answer may be;
        ``to_the_end``: as long as that, whatever the words."""

    def pooled(self, batch: Sequence[Encoded], layers: int) -> list[Tensor]:
        """Return the mean states of the texts, each read within its prompt, in the last layers, the
        last one first, ``(batch, hidden)`` each, float32."""


class GeneratingLM:
    """A base model with a current adapter, asked by prompts."""

    has_label_logits = False

    def __init__(self, reader: Reader, prompts: PromptTokens) -> None:
        self.reader, self.module, self.device = reader, reader.module, reader.device
        self._prompts = prompts
        self.tokens = prompts.texts

    def prepare(self, texts: Sequence[str], folder: Path | None) -> None:
        """Make or read token ids."""
        self.tokens.prepare(texts, folder)

    def encode(
        self, examples: Sequence[Example], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Return tokenised prompts, with what the tokeniser puts around a text; only the text is
        cut."""
        return self._prompts.encode(examples, labels, instruction)

    def forward_train(
        self, batch: Sequence[Encoded], labels: Sequence[str], seen: Sequence[Sequence[str]]
    ) -> ForwardOutput:
        """Return losses on the answer's tokens and the end; distillation is over the vocabulary at
        those tokens, so ``seen`` only decides whether there is anything to distil."""
        answers = self._answers(batch, labels)
        states = self.reader.answer_states(batch, answers)
        return answer_losses(self.word_logits, states, answers, seen)

    def word_states(
        self, batch: Sequence[Encoded], labels: Sequence[str]
    ) -> tuple[Tensor, list[int]]:
        """Return the states that predict the words of the answers, ends included, ``(words,
        hidden)``, and how many each example has."""
        answers = self._answers(batch, labels)
        return self.reader.answer_states(batch, answers), [len(answer) for answer in answers]

    def word_logits(self, states: Tensor) -> Tensor:
        """Return logits over the vocabulary, ``(..., vocabulary)``, float32."""
        return self.reader.word_logits(states)

    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return mean log-likelihood per answer token, ``(batch, labels)``, float32."""
        return self.reader.likelihoods(batch, self._prompts.scored(labels))

    def log_likelihoods(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return log-likelihoods of whole labels, ``(batch, labels)``, float32."""
        lengths = torch.tensor([len(answer) for answer in self._prompts.scored(labels)])
        scores = self.scores(batch, labels)
        return scores * lengths.to(scores.device)

    def answered(
        self, batch: Sequence[Encoded], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Return the same texts under the prompt of another task, each with the answer that the
        model gives now: its best label, and the end."""
        return self._prompts.answered(batch, labels, instruction, self.scores, self.written)

    def keep_nothing(self) -> None:
        """Keep nothing of a text when its pass is over: then memory does not depend on the texts
        before, of which single ones may be protected."""
        self.reader.keep_nothing()

    def answer_length(self, label: str) -> int:
        """Return how many tokens a label has as an answer, without an end."""
        return len(self._prompts.label(label))

    def write(self, batch: Sequence[Encoded]) -> list[str]:
        """Return the answers as texts."""
        return [self._prompts.text(ids) for ids in self.written(batch)]

    def written(self, batch: Sequence[Encoded], to_the_end: bool = False) -> list[Tokens]:
        """Return the answers' tokens, the end included where there was one; ``to_the_end``: none
        before as many words as there may be."""
        return [self._prompts.until_end(row) for row in self.reader.continued(batch, to_the_end)]

    def embed(self, batch: Sequence[Encoded], layers: int = 1) -> Tensor:
        """Return unit vectors of the texts, each read within its prompt, ``(batch, parts *
        hidden)``, float32: (M44)."""
        return embedding_of(self.reader.pooled(batch, layers))

    def _answers(self, batch: Sequence[Encoded], labels: Sequence[str]) -> list[Tokens]:
        return [self._prompts.answer(item, labels) for item in batch]
