"""A model that answers in words: what the families share, whatever reads the prompt.

Training lowers the mean negative log-likelihood of the answer's own tokens and the end, per
example. Scoring is the length-normalised log-likelihood of each label as the answer: docs/method.md
(M3). Answers are written with the likeliest word each time, whatever habits a model comes with.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
import transformers
from peft import TaskType
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.models.fast.attention import register_attention
from deal_core.models.fast.prompt_forest import Tokens
from deal_core.models.interface import Encoded, ForwardOutput, LanguageModel, embedding_of, padded
from deal_core.models.loading import load_base_model, pretrained
from deal_core.models.prompt import PromptTokens


class GeneratingModel(LanguageModel):
    """A base model with a current adapter, asked by prompts: a decoder alone, or an encoder and
    one."""

    has_label_logits = False

    def __init__(
        self, base: Any, adapter: AdapterConfig, task_type: TaskType, prompts: PromptTokens
    ) -> None:
        super().__init__(base, adapter, task_type)
        self._base, self._decoder = base, base.get_decoder()
        self._head = base.get_output_embeddings()
        self._prompts = prompts
        greedy = greedy_settings(prompts)
        base.generation_config = transformers.GenerationConfig(**greedy)  # type: ignore[no-untyped-call]

    @abstractmethod
    def answer_states(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Return the states that predict the words of the answers, an answer to each prompt,
        ``(words, hidden)``."""

    @abstractmethod
    def likelihoods(self, batch: Sequence[Encoded], answers: Sequence[Tokens]) -> Tensor:
        """Return the mean log-likelihood of each answer's tokens to each prompt, ``(batch,
        answers)``, float32."""

    @abstractmethod
    def pooled(self, batch: Sequence[Encoded], layers: int) -> list[Tensor]:
        """Return the mean states of the texts, each read within its prompt, in the last layers, the
        last one first, ``(batch, hidden)`` each, float32."""

    @abstractmethod
    def own_logits(self, item: Encoded) -> Tensor:
        """Return the logits that the model itself gives to the words of an answer, ``(words,
        vocabulary)``: without anything of ours, to one prompt."""

    @abstractmethod
    def _continued(self, batch: Sequence[Encoded], least: int | None) -> Tensor:
        """Return the likeliest words after each prompt, ``(batch, words)``, ``least`` of them at
        least."""

    def word_logits(self, states: Tensor) -> Tensor:
        """Return logits over the vocabulary, ``(..., vocabulary)``, float32."""
        logits: Tensor = self._head(states).float()
        return logits

    def keep_nothing(self) -> None:
        """Keep nothing of a text when its pass is over: then memory does not depend on the texts
        before, of which single ones may be protected."""

    def encode(
        self, examples: Sequence[Example], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Return tokenised prompts, with what the tokeniser puts around a text; only the text is
        cut."""
        return self._prompts.encode(examples, labels, instruction)

    def forward_train(
        self, batch: Sequence[Encoded], labels: Sequence[str], seen: Sequence[Sequence[str]]
    ) -> ForwardOutput:
        """Return losses on the answer's tokens and the end; nothing is distilled here."""
        answers = [self._prompts.answer(item, labels) for item in batch]
        states, counts = self.answer_states(batch, answers), [len(answer) for answer in answers]
        targets = torch.tensor([*chain.from_iterable(answers)]).to(states.device)

        def losses(some: Tensor, wanted: Tensor) -> Tensor:
            return cross_entropy(self.word_logits(some), wanted, reduction="none")

        each = torch.split(word_losses(losses, states, targets), counts)
        means = torch.stack([part.mean() for part in each])
        return ForwardOutput(means, means.new_zeros(len(batch), 0), [])

    def word_states(
        self, batch: Sequence[Encoded], labels: Sequence[str]
    ) -> tuple[Tensor, list[int]]:
        """Return the states that predict the words of the answers, ends included, ``(words,
        hidden)``, and how many each example has."""
        answers = [self._prompts.answer(item, labels) for item in batch]
        return self.answer_states(batch, answers), [len(answer) for answer in answers]

    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return mean log-likelihood per answer token, ``(batch, labels)``, float32."""
        return self.likelihoods(batch, self._prompts.scored(labels))

    def log_likelihoods(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return log-likelihoods of whole labels, ``(batch, labels)``, float32."""
        lengths = torch.tensor([len(answer) for answer in self._prompts.scored(labels)])
        scores = self.scores(batch, labels)
        return scores * lengths.to(scores.device)

    def asked(
        self, batch: Sequence[Encoded], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Return the same texts under the prompt of another task; their answers are not known."""
        return [self._prompts.prompt(item.text, labels, instruction) for item in batch]

    def answered(
        self, batch: Sequence[Encoded], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Return the same texts under the prompt of another task, each with the answer that the
        model gives now, the end included: its best label; where there are none, what it writes."""
        asked = self.asked(batch, labels, instruction)
        if labels:
            with torch.no_grad():
                best = self.scores(asked, labels).argmax(dim=1).tolist()
            answers = [self._prompts.label(labels[n]) + self._prompts.end for n in best]
        else:
            answers = self.written(asked)
        return [replace(each, answer=answer) for each, answer in zip(asked, answers, strict=True)]

    def answer_length(self, label: str) -> int:
        """Return how many tokens a label has as an answer, without an end."""
        return len(self._prompts.label(label))

    def write(self, batch: Sequence[Encoded]) -> list[str]:
        """Return the answers as texts."""
        return [self._prompts.text(ids) for ids in self.written(batch)]

    def written(self, batch: Sequence[Encoded], to_the_end: bool = False) -> list[Tokens]:
        """Return the answers' tokens, the end included where there was one; ``to_the_end``: none
        before as many words as there may be."""
        least = self._base.generation_config.max_new_tokens if to_the_end else None
        with torch.no_grad():
            rows: list[list[int]] = self._continued(batch, least).tolist()
        return [self._prompts.until_end(row) for row in rows]

    def _padded(self, rows: Sequence[Tokens], *, left: bool = False) -> tuple[Tensor, Tensor]:
        return padded(rows, self._prompts.padding, self.device, left=left)

    def embed(self, batch: Sequence[Encoded], layers: int = 1) -> Tensor:
        """Return unit vectors of the texts, each read within its prompt, ``(batch, parts *
        hidden)``, float32: (M44)."""
        return embedding_of(self.pooled(batch, layers))


def load_generating(
    make: Callable[[Any, AdapterConfig, PromptTokens], GeneratingModel],
    loader: str,
    make_prompts: Callable[[Any, Any, ModelConfig, int], PromptTokens],
    model: ModelConfig,
    adapter: AdapterConfig,
    max_length: int,
    dtype: torch.dtype,
) -> GeneratingModel:
    """Return a model of a family, base and tokeniser loaded; ``loader``: class of transformers.

    Raises:
        UserError: it cannot be loaded, its attention cannot be replaced, or it reads prompts or
            scores words otherwise than the family does.
    """
    base = load_base_model(getattr(transformers, loader), model, dtype, register_attention())
    tokenizer = pretrained(transformers.AutoTokenizer, model.name)
    loaded = make(base, adapter, make_prompts(tokenizer, base.config, model, max_length))
    rough = 0.1 if model.bits else 0.05  # 0.06 was measured where weights have few bits
    require_same_logits(loaded, model, 1e-3 if dtype == torch.float32 else rough)
    return loaded


PROBES = (
    Encoded((0, 1, 3, 0), -1, shared=2, answer=(3, 0, 3)),
    Encoded((0, 1, 2, 0, 3), -1, shared=2, answer=(2, 3)),
)
"""Prompts that begin alike, and go on for different lengths."""
PLACES = (0, 1 / 8, 1 / 2)
"""Of the probes' words in the vocabulary. Some words upset a model so much that in bfloat16 it does
not agree with itself (measured: 13 % with 1.5 billion parameters); another reading upsets it with
all words."""


def require_same_logits(model: GeneratingModel, config: ModelConfig, tolerance: float) -> None:
    """Check that words have the logits that the model itself gives them to a prompt alone, beside
    another prompt too; ``tolerance``: relative difference that rounding may make.

    Raises:
        UserError: they have not.
    """
    size = int(cast(Any, model.module).get_input_embeddings().weight.shape[0])
    if not any(_difference(model, int(place * size)) < tolerance for place in PLACES):
        raise UserError(
            f"model.name '{config.name}': reads prompts, or scores words, in a way that "
            f"{config.family} cannot follow (its attention, or what follows its last product); "
            "choose another model (Llama, Qwen, Mistral, Gemma 3, GPT-2, T5, BART, ...)"
        )


def _difference(model: GeneratingModel, first: int) -> float:
    """Relative, of the logits of probes whose words begin at ``first``; infinite: none come."""
    probes = [
        replace(
            item,
            tokens=tuple(first + word for word in item.tokens),
            answer=tuple(first + word for word in item.answer),
        )
        for item in PROBES
    ]
    try:
        with torch.no_grad():
            ours = model.word_logits(model.word_states(probes, ())[0])
            theirs = torch.cat([model.own_logits(item) for item in probes]).float()
        return float((ours - theirs).norm() / theirs.norm())
    except Exception:
        return float("inf")


def greedy_settings(prompts: PromptTokens) -> dict[str, Any]:
    """Return settings of ``generate``: the likeliest word each time, until the answer ends or has
    as many tokens as it may. Those that a model is published with (beams, penalties of repetition,
    least lengths) would say something else than the scores do.
    """
    return {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": prompts.longest_answer,
        "eos_token_id": prompts.end[0] if prompts.end else None,
        "pad_token_id": prompts.padding,
        "decoder_start_token_id": prompts.start[0] if prompts.start else None,
        "forced_bos_token_id": prompts.start[1] if len(prompts.start) > 1 else None,
    }


WORDS = 64
"""In a part; of a vocabulary of 50,000 that is 13 MB in float32."""


def word_losses(losses: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Return ``losses(*rows)``, ``(words,)``, part by part where there are more than ``WORDS``:
    logits over a vocabulary are the largest tensors that there are, and nobody needs those of all
    words at once. Backward computes a part once more, instead of keeping what it is made of.

    Args:
        losses: of some words, one each; it draws nothing at random.
        rows: each with a row for every word; their gradients are those of all at once.
    """
    if len(rows[0]) <= WORDS:
        return losses(*rows)
    parts = zip(*(torch.split(values, WORDS) for values in rows), strict=True)
    found = [
        checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return torch.cat(found)
