"""Family ``causal-lm``: a prompt with the options, the answer's tokens, a likelihood per label.

Prompts of a task begin alike: that is computed once for all of them, and a text once for all its
labels (:mod:`deal_core.models.fast.prompt_forest`); what lies below the first adapted layer once a
text (:mod:`deal_core.models.fast.lower_layers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import TaskType
from torch import Tensor

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.models.fast.lower_layers import LowerLayers, first_adapted
from deal_core.models.fast.prompt_forest import (
    PromptForest,
    PromptRow,
    Tokens,
    decode,
    decode_layers,
    plant,
)
from deal_core.models.generating import GeneratingModel
from deal_core.models.interface import Encoded
from deal_core.models.prompt import PromptTokens, prompt_tokens

SCORING_TOKENS = 4096
"""Most tokens in one scoring pass: bounds memory, not results."""


def causal_prompts(
    tokenizer: Any, config: Any, model: ModelConfig, max_length: int
) -> PromptTokens:
    """Return what makes the prompts of ``model``, whose own settings, ``config``, do not matter."""
    mark = tokenizer.bos_token_id
    opening = () if mark is None else (mark,)
    return prompt_tokens(tokenizer, model, max_length, (opening, ()), gap=" ")


class CausalLM(GeneratingModel):
    """A Hugging Face decoder-only model whose attention can be replaced."""

    def __init__(self, base: Any, adapter: AdapterConfig, prompts: PromptTokens) -> None:
        super().__init__(base, adapter, TaskType.CAUSAL_LM, prompts)
        self._head.register_forward_pre_hook(_without_gaps)
        layers, below = first_adapted(self.module)
        self._lower = LowerLayers(self._decoder, layers, below) if below else None

    def own_logits(self, item: Encoded) -> Tensor:
        """Return the logits that the model itself gives to the words of an answer."""
        ids = torch.tensor([[*item.tokens, *item.answer[:-1]]], device=self.device)
        logits: Tensor = self._base(input_ids=ids, use_cache=False).logits
        return logits[0, len(item.tokens) - 1 :]

    def _continued(self, batch: Sequence[Encoded], least: int | None) -> Tensor:
        ids, real = self._padded([item.tokens for item in batch], left=True)
        whole: Tensor = self._base.generate(
            input_ids=ids, attention_mask=real.long(), min_new_tokens=least
        )
        return whole[:, ids.shape[1] :]

    def likelihoods(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Return mean log-likelihood per answer token, ``(batch, answers)``, float32."""
        branches = tuple(answer[:-1] for answer in answers)
        rows = self._rows(batch, [()] * len(batch), branches)
        parts: list[Tensor] = []
        for part in _within(rows, SCORING_TOKENS):
            forest, place = plant(part)
            states = self._states(forest)
            parts += [self._likelihoods(states, forest, row, answers) for row in place]
        return torch.stack(parts)

    def _likelihoods(
        self, states: Tensor, forest: PromptForest, row: int, answers: Sequence[Tokens]
    ) -> Tensor:
        """Mean log-likelihood of each answer below one text, ``(answers,)``."""
        places = [forest.predicting(row, branch) for branch in range(len(answers))]
        first = places[0][0]  # the end of the body; its branches follow
        below = states[first : first + 1 + sum(map(len, forest.rows[row].branches))]
        logits = self.word_logits(below)
        index = torch.tensor([place - first for each in places for place in each])
        tokens = torch.tensor([token for answer in answers for token in answer])
        likelihood = logits[index, tokens] - logits.logsumexp(dim=1)[index]
        parts = torch.split(likelihood, [len(answer) for answer in answers])
        return torch.stack([part.mean() for part in parts])

    def keep_nothing(self) -> None:
        """Keep nothing of a prompt when its pass is over."""
        if self._lower is not None:
            self._lower.keeps = False

    def answer_states(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Return the states that predict the words of the answers, ``(words, hidden)``."""
        rows = self._rows(batch, [answer[:-1] for answer in answers])
        forest, place = plant(rows)
        states = self._states(forest)
        index: list[int] = []
        for row, answer in zip(place, answers, strict=True):
            end = forest.starts[row] + forest.rows[row].below
            index += range(end - len(answer), end)
        return states[torch.tensor(index, device=states.device)]

    def _rows(
        self,
        batch: Sequence[Encoded],
        answers: Sequence[Tokens],
        branches: tuple[Tokens, ...] = (),
    ) -> list[PromptRow]:
        """Lay out prompts; one alone shares nothing."""
        rows = []
        for item, answer in zip(batch, answers, strict=True):
            shared = min(item.shared, len(item.tokens) - 1) if len(batch) > 1 else 0
            rest = (*item.tokens[shared:], *answer)
            rows.append(PromptRow(item.tokens[:shared], rest, branches))
        return rows

    def pooled(self, batch: Sequence[Encoded], layers: int) -> list[Tensor]:
        """Return the mean states of the texts in the last layers, the last one first, ``(batch,
        hidden)`` each, float32. Nothing that follows a text changes its states. They are asked for
        once, so the layers below the first adapted one keep nothing of them."""
        forest, place = plant(self._rows(batch, [()] * len(batch)))
        parts = []
        for row, item in zip(place, batch, strict=True):
            start = forest.starts[row] - len(forest.rows[row].head)
            parts.append(slice(start + item.place.start, start + item.place.stop))
        found = decode_layers(self._decoder, forest, layers)
        return [torch.stack([s[0, part].float().mean(0) for part in parts]) for s in found]

    def _states(self, forest: PromptForest) -> Tensor:
        """Return the last states of all tokens of a forest, ``(tokens, hidden)``."""
        if self._lower is None:
            return decode(self._decoder, forest)[0]
        with self._lower.replaced(self._lower.states(forest)):
            return decode(self._decoder, forest)[0]


def _without_gaps(head: Any, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the states, laid out anew where they are a view with gaps. The last ones of prompts
    are, which an answer is written to: the product would take a copy of the head for each."""
    return tuple(each.contiguous() for each in states)


def _within(rows: Sequence[PromptRow], tokens: int) -> list[list[PromptRow]]:
    """Rows in parts of so many tokens."""
    parts: list[list[PromptRow]] = []
    taken = 0
    for row in rows:
        if parts and taken + row.below <= tokens:
            parts[-1].append(row)
            taken += row.below
        else:
            parts.append([row])
            taken = len(row.head) + row.below
    return parts
