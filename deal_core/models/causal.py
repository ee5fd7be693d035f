"""Family ``causal-lm``: a prompt with the options, the answer's tokens, a likelihood per label.

Training lowers the mean negative log-likelihood of the answer's own tokens, per example.
Scoring is the length-normalised log-likelihood of each label as the answer: docs/method.md (M3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor
from torch.nn.functional import cross_entropy

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.data.tokens import TokenCache, tokeniser_name
from deal_core.lora.attach import attach
from deal_core.models.attention import register_attention
from deal_core.models.interface import Encoded, ForwardOutput
from deal_core.models.loading import best_device, pretrained

SCORING_TOKENS = 8192
"""Most tokens (padding included) in one scoring pass: bounds memory, not results."""


class CausalLM:
    """Any Hugging Face decoder-only model."""

    has_label_logits = False

    def __init__(
        self, base: Any, tokenizer: Any, model: ModelConfig, adapter: AdapterConfig, max_length: int
    ) -> None:
        self.device = best_device()
        self.module: PeftModel = attach(base.to(self.device), adapter, TaskType.CAUSAL_LM)
        self.module.eval()
        self._tokenizer = tokenizer
        self._instruction = model.instruction
        self.tokens = TokenCache(
            lambda texts: [self._ids(text)[:max_length] for text in texts],
            tokeniser_name(tokenizer, "text alone", max_length),
        )

    def encode(self, examples: Sequence[Example], labels: Sequence[str]) -> list[Encoded]:
        """Return tokenised prompts; only the text is cut, so that the prompt with its options,
        whatever the length of the text, ends in ``Answer:``."""
        index = {label: position for position, label in enumerate(labels)}
        options = ", ".join(_words(label) for label in labels)
        head = self._ids(f"{self._instruction}\nOptions: {options}\nText: ")
        if self._tokenizer.bos_token_id is not None:
            head = [self._tokenizer.bos_token_id, *head]
        tail = self._ids("\nAnswer:")
        texts = self.tokens([example.text for example in examples])
        return [
            Encoded((*head, *ids, *tail), index[example.label])
            for ids, example in zip(texts, examples, strict=True)
        ]

    def forward_train(
        self,
        batch: Sequence[Encoded],
        labels: Sequence[str],
        seen: Sequence[Sequence[str]],
        log_prior: Tensor | None = None,
    ) -> ForwardOutput:
        """Return losses on the answer's tokens; distillation is over the vocabulary at those
        tokens, so ``seen`` only decides whether there is anything to distil.

        Raises:
            ValueError: ``log_prior`` is given.
        """
        if log_prior is not None:
            raise ValueError("losses are over words: labels have no prior")
        answers = [self._answer(labels[item.target]) for item in batch]
        logits, targets, counts = self._answer_logits([item.tokens for item in batch], answers)
        token_losses = cross_entropy(logits, targets, reduction="none")
        losses = torch.stack([part.mean() for part in torch.split(token_losses, counts)])
        kept = logits if seen else logits[:, :0]
        return ForwardOutput(losses, kept, counts, [kept.shape[1]])

    def embed(self, batch: Sequence[Encoded], layers: int = 1) -> Tensor:
        """Raise ``ValueError``: there is no embedding of a text."""
        raise ValueError("a causal model has no embedding of a text")

    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return mean log-likelihood per answer token, ``(batch, labels)``, float32."""
        answers = [self._answer(label) for label in labels]
        pairs = [(item.tokens, answer) for item in batch for answer in answers]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        step = max(1, SCORING_TOKENS // longest)
        parts: list[Tensor] = []
        for start in range(0, len(pairs), step):
            prompts, chosen = zip(*pairs[start : start + step], strict=True)
            logits, targets, counts = self._answer_logits(prompts, chosen)
            likelihood = -cross_entropy(logits, targets, reduction="none")
            parts.extend(part.mean() for part in torch.split(likelihood, counts))
        return torch.stack(parts).view(len(batch), len(labels))

    def _answer_logits(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return logits ``(answer tokens of all, vocabulary)``, their targets, tokens per
        example."""
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(len(row) for row in rows)
        kept = max(len(answer) for answer in answers) + 1
        # Padding on the left: all answers end together, so only the last logits are computed.
        ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(longest)[None, :] >= longest - lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.module(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            logits_to_keep=kept,
            use_cache=False,
        ).logits
        # the logits before a token predict it; the last column predicts what follows the answer
        where = [
            (row, kept - 1 - len(answer) + step)
            for row, answer in enumerate(answers)
            for step in range(len(answer))
        ]
        row_index, step_index = torch.tensor(where).T
        targets = torch.tensor([token for answer in answers for token in answer])
        counts = [len(answer) for answer in answers]
        return logits[row_index, step_index].float(), targets.to(self.device), counts

    def _answer(self, label: str) -> list[int]:
        return self._ids(f" {_words(label)}")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _words(label: str) -> str:
    return label.replace("_", " ")


def load_causal(
    model: ModelConfig, adapter: AdapterConfig, max_length: int, dtype: torch.dtype
) -> CausalLM:
    """Return the model, base and tokeniser loaded.

    Raises:
        UserError: the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = pretrained(
        AutoModelForCausalLM, model.name, dtype=dtype, attn_implementation=register_attention()
    )
    return CausalLM(base, pretrained(AutoTokenizer, model.name), model, adapter, max_length)


def causal_skeleton(model: ModelConfig) -> Any:
    """Return the base model without weights (meta device): enough to know its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = pretrained(AutoConfig, model.name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
