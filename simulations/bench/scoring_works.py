"""Contestants of ``deal bench scoring``: shared prompts and branches, or whole sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.models.loading import pretrained
from deal_core.models.prompt import words
from deal_core.training.allocator import keep_memory
from simulations.bench.causal_deal import new_model
from simulations.bench.causal_trainer import plain_model
from simulations.bench.prompts import prompted, questions

ACTIONS = ("activate", "change", "find out about", "lose", "pay with", "receive", "return")
OBJECTS = (
    "a bank card",
    "an account",
    "the exchange rate",
    "a direct debit",
    "the pin",
    "a cash withdrawal",
    "a top up",
    "the verification code",
    "a transfer abroad",
    "the app",
    "a refund",
)


def label_names(count: int) -> tuple[str, ...]:
    """Return up to 77 different requests to a bank, of a few words each."""
    named = [f"{action}_{thing}" for thing in OBJECTS for action in ACTIONS]
    return tuple(name.replace(" ", "_") for name in named[:count])


def asked(count: int, tokens: int, labels: Sequence[str]) -> list[Example]:
    """Return so many texts; which label is right does not matter."""
    return [Example(each.text, labels[0]) for each in questions(count, tokens).train]


class DealScoring:
    """All texts at once, as in an evaluation."""

    def __init__(self, labels: int, tokens: int, texts: int, precision: str, name: str) -> None:
        keep_memory()
        self._labels = label_names(labels)
        dtype = getattr(torch, precision)
        self._model = new_model(name, AdapterConfig(), tokens, dtype)
        self._batch = self._model.encode(asked(texts, tokens, self._labels), self._labels)
        self.scores = torch.empty(0)
        self.window()

    def window(self) -> Mapping[str, float]:
        """Score all texts."""
        with torch.no_grad():
            self.scores = self._model.scores(self._batch, self._labels)
        return {"work": len(self._batch)}

    def report(self) -> Mapping[str, float]:
        """Threads, and the mean score of the first text: equal for all contestants."""
        return {"threads": torch.get_num_threads(), "score": float(self.scores[0].mean())}


class PlainScoring:
    """Every option's whole sequence through the plain model: alone, or those of a text padded."""

    def __init__(
        self, labels: int, tokens: int, texts: int, precision: str, name: str, batched: bool
    ) -> None:
        names = label_names(labels)
        tokenizer = pretrained(AutoTokenizer, name)
        self._model = plain_model(name, precision).eval()
        items = prompted(tokenizer, ModelConfig(), asked(texts, tokens, names), names, tokens)
        self._prompts = [item.prompt for item in items]
        self._answers = [
            tuple(tokenizer(f" {words(label)}", add_special_tokens=False)["input_ids"])
            for label in names
        ]
        self._batched = batched
        alone_scores(self._model, self._prompts[0], self._answers[:1])
        self.scores = torch.empty(0)

    def window(self) -> Mapping[str, float]:
        """Score all texts."""
        score = batched_scores if self._batched else alone_scores
        rows = [score(self._model, prompt, self._answers) for prompt in self._prompts]
        self.scores = torch.stack(rows)
        return {"work": len(rows)}

    def report(self) -> Mapping[str, float]:
        """Threads, and the mean score of the first text: equal for all contestants."""
        return {"threads": torch.get_num_threads(), "score": float(self.scores[0].mean())}


def alone_scores(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Tensor:
    """Return mean log-likelihoods of the answers' tokens, ``(answers,)``, a pass for each."""
    found = []
    for answer in answers:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        found.append(_likelihood(logits, len(prompt), answer))
    return torch.stack(found)


def batched_scores(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Tensor:
    """Return the same from one pass over all answers, padded on the right."""
    longest = max(map(len, answers))
    padded = [[*prompt, *answer, *[0] * (longest - len(answer))] for answer in answers]
    real = [[1] * (len(prompt) + len(a)) + [0] * (longest - len(a)) for a in answers]
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(real, device=model.device),
        ).logits
    pairs = zip(logits, answers, strict=True)
    return torch.stack([_likelihood(each, len(prompt), answer) for each, answer in pairs])


def _likelihood(logits: Tensor, prompt: int, answer: Sequence[int]) -> Tensor:
    """Of an answer behind so many tokens of a prompt."""
    rows = logits[prompt - 1 : prompt - 1 + len(answer)].float().log_softmax(dim=1)
    return rows[torch.arange(len(answer)), torch.tensor(answer)].mean()


def deal_scoring(labels: int, tokens: int, texts: int, precision: str, name: str) -> DealScoring:
    """Set up in a process of its own."""
    return DealScoring(labels, tokens, texts, precision, name)


def plain_scoring(
    labels: int, tokens: int, texts: int, precision: str, name: str, batched: bool
) -> PlainScoring:
    """Set up in a process of its own."""
    return PlainScoring(labels, tokens, texts, precision, name, batched)
