"""Families that answer in words: ``causal-lm``, a decoder alone, and ``seq2seq-lm``, an encoder
that reads the prompt and a decoder that says the answer.

What is read twice is computed once. Prompts of a task begin alike, a text has several labels
(:mod:`deal_core.models.fast.prompt_forest`), and what lies below the first adapted layer never
changes (:mod:`deal_core.models.fast.lower_layers`); an encoder reads a text once, and what the
decoder takes from it is made once for all its labels.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import TaskType
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.models.fast.lower_layers import LowerLayers, first_adapted
from deal_core.models.fast.prompt_forest import (
    QUARTER,
    PromptForest,
    PromptRow,
    Tokens,
    decode,
    decode_layers,
    plant,
    quarter_layer,
)
from deal_core.models.generating import GeneratingModel
from deal_core.models.interface import Encoded, last_layers
from deal_core.models.prompt import PromptTokens, prompt_tokens

SCORING_TOKENS = 4096
"""Most tokens in one scoring pass, of an encoder-decoder those of texts once for every label:
bounds memory, not results."""


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
        for part in _rows_within(rows, SCORING_TOKENS):
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
        self, batch: Sequence[Encoded], answers: Sequence[Tokens], branches: tuple[Tokens, ...] = ()
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


def _rows_within(rows: Sequence[PromptRow], tokens: int) -> list[list[PromptRow]]:
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


ReadTexts = tuple[Tensor, Tensor]
"""States of texts after the encoder, ``(texts, longest, hidden)``, and which of them are of a
token, ``(texts, longest)``."""


class Seq2SeqLM(GeneratingModel):
    """Any Hugging Face encoder-decoder whose logits are a product with the decoder's states."""

    def __init__(self, base: Any, adapter: AdapterConfig, prompts: PromptTokens) -> None:
        super().__init__(base, adapter, TaskType.SEQ_2_SEQ_LM, prompts)
        self._encoder = base.get_encoder()
        known = inspect.signature(self._decoder.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self._factor = state_factor(base)
        self._bias: Tensor | None = getattr(base, "final_logits_bias", None)
        self._start = prompts.start

    def word_logits(self, states: Tensor) -> Tensor:
        """Return logits over the vocabulary, ``(..., vocabulary)``, float32."""
        logits = super().word_logits(states)
        return logits if self._bias is None else logits + self._bias[0].float()

    def likelihoods(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Return mean log-likelihood per answer token, ``(batch, answers)``, float32."""
        parts = _texts_within(batch, len(answers))
        return torch.cat([self._likelihoods(part, answers) for part in parts])

    def _likelihoods(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Mean log-likelihood of each answer to each prompt, ``(batch, answers)``."""
        texts = self._read(batch)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = self._decode(texts, [self._start] * len(batch), cache)[:, -1]
        firsts = [answer[0] for answer in answers]
        total = self.word_logits(start).log_softmax(dim=1)[:, firsts]
        lengths = torch.tensor([len(answer) for answer in answers], device=self.device)
        longest = int(lengths.max()) - 1
        if longest:
            cache.batch_repeat_interleave(len(answers))
            read, known = (each.repeat_interleave(len(answers), dim=0) for each in texts)
            rows = [answer[:-1] for answer in answers] * len(batch)
            states = self._decode((read, known), rows, cache)
            real = torch.arange(longest, device=self.device) < lengths[:, None] - 1
            cells = states.view(len(batch), len(answers), longest, -1)[:, real]
            later = [token for answer in answers for token in answer[1:]]
            logits = self.word_logits(cells)
            index = torch.tensor(later, device=self.device).expand(len(batch), -1)[:, :, None]
            found = logits.gather(2, index)[:, :, 0] - logits.logsumexp(dim=2)
            total = total.index_add(1, real.nonzero()[:, 0], found)
        return total / lengths

    def answer_states(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Return the states that predict the words of the answers, ``(words, hidden)``. An example
        is a row of the encoder and a row of the decoder: its gradient is its own."""
        rows = [self._start + answer[:-1] for answer in answers]
        states = self._decode(self._read(batch), rows)
        before = len(self._start) - 1
        return torch.cat(
            [row[before : before + len(a)] for row, a in zip(states, answers, strict=True)]
        )

    def pooled(self, batch: Sequence[Encoded], layers: int) -> list[Tensor]:
        """Return the mean states of the texts in the encoder's last layers, the last one first,
        ``(batch, hidden)`` each, float32."""
        states, _ = self._encoded(batch, layers)
        return [
            torch.stack([r[item.place].float().mean(0) for r, item in zip(s, batch, strict=True)])
            for s in states
        ]

    def _read(self, batch: Sequence[Encoded]) -> ReadTexts:
        states, real = self._encoded(batch, 1)
        return states[0], real

    def _encoded(self, batch: Sequence[Encoded], layers: int) -> tuple[list[Tensor], Tensor]:
        """Return the states of prompts after the encoder's last layers, the last one first,
        ``(batch, longest, hidden)`` each, and which of them are of a token."""
        ids, real = self._padded([item.tokens for item in batch])
        run = partial(self._encoder, input_ids=ids, attention_mask=real.long())
        if layers == QUARTER:
            return [quarter_layer(self._encoder, run)], real
        return last_layers(run(output_hidden_states=layers > 1), layers), real

    def _decode(self, texts: ReadTexts, rows: Sequence[Tokens], cache: Any = None) -> Tensor:
        """Return the states of these tokens, each row below one text, ``(rows, longest, hidden)``;
        those of the cache stand before them."""
        output = self._decoder(
            input_ids=self._padded(rows)[0],
            encoder_hidden_states=texts[0],
            encoder_attention_mask=texts[1].long(),
            use_cache=cache is not None,
            **({} if cache is None else {self._cache_name: cache}),
        )
        states: Tensor = output.last_hidden_state
        return states if self._factor == 1.0 else states * self._factor

    def own_logits(self, item: Encoded) -> Tensor:
        """Return the logits that the model itself gives to the words of an answer."""
        logits: Tensor = self._base(
            input_ids=torch.tensor([item.tokens], device=self.device),
            decoder_input_ids=torch.tensor([self._start + item.answer[:-1]], device=self.device),
            use_cache=False,
        ).logits
        return logits[0, len(self._start) - 1 :]

    def _continued(self, batch: Sequence[Encoded], least: int | None) -> Tensor:
        ids, real = self._padded([item.tokens for item in batch])
        whole: Tensor = self._base.generate(
            input_ids=ids,
            attention_mask=real.long(),
            min_new_tokens=least,
            decoder_input_ids=torch.tensor([self._start] * len(batch), device=self.device),
        )
        return whole[:, len(self._start) :]


def _texts_within(batch: Sequence[Encoded], labels: int) -> list[list[Encoded]]:
    parts: list[list[Encoded]] = []
    longest = 0
    for item in batch:
        longest = max(longest, len(item.tokens))
        if parts and (len(parts[-1]) + 1) * labels * longest <= SCORING_TOKENS:
            parts[-1].append(item)
        else:
            parts.append([item])
            longest = len(item.tokens)
    return parts


def seq2seq_prompts(
    tokenizer: Any, config: Any, model: ModelConfig, max_length: int
) -> PromptTokens:
    """Return what makes the prompts of ``model``; ``config`` knows what its decoder begins with."""
    opening, closing = special_tokens(tokenizer)
    prompts = prompt_tokens(tokenizer, model, max_length, (opening, closing), gap="")
    return replace(prompts, start=(config.decoder_start_token_id, *opening))


def special_tokens(tokenizer: Any) -> tuple[Tokens, Tokens]:
    """Return what the tokeniser puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def state_factor(base: Any) -> float:
    """Return what the decoder's states are multiplied by before the head: T5 with tied
    embeddings."""
    scaled = getattr(base.config, "scale_decoder_outputs", False)
    return float(base.config.d_model**-0.5) if scaled else 1.0
