"""Families ``token-labels``: each word of a text gets a tag, by the names of labels; and
``token-classification``: by a head.

Words lie between blanks. They (the states of their first tokens) and label names meet in one
embedding space, as in ``encoder-labels``. An example's loss is the mean over its words that are
read (``train.max_length``); those beyond are tagged ``O``.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from deal_core.config.experiment import AdapterConfig
from deal_core.data import Example
from deal_core.data.tags import OUTSIDE, tags_of
from deal_core.models.encoder import LOGIT_SCALE, EncoderLabels, output_of, with_head
from deal_core.models.fast.prompt_forest import Tokens
from deal_core.models.interface import Encoded, ForwardOutput, Memo

NAMES = {"O": "nothing", "B": "{}", "I": "rest of {}"}
"""Beginning of a tag to the words, with its label, whose vector stands for it."""


@dataclass(frozen=True)
class TaggedText(Encoded):
    """A text with a tag for each word; ``right`` are the true ones."""

    words: tuple[tuple[int, int, int], ...] = ()
    """Of each word that is read its place in the text, that of its first token, and that of its
    true tag among those of the task's labels."""


class TokenLabels(EncoderLabels):
    """Scores of tags are scaled cosines of words' states and vectors of label names."""

    def __init__(self, base: Any, tokenizer: Any, adapter: AdapterConfig, max_length: int) -> None:
        super().__init__(base, tokenizer, adapter, max_length)
        self._max_length = max_length
        self._read: Memo[str, tuple[Tokens, dict[int, int]]] = Memo(
            lambda texts: map(self._tokenized, texts)
        )

    def _tokenized(self, text: str) -> tuple[Tokens, dict[int, int]]:
        """Return the tokens of a text, and of each word that is read the place of its first."""
        found = self._tokenizer(
            text, truncation=True, max_length=self._max_length, return_offsets_mapping=True
        )
        starts, firsts = [word.start() for word in re.finditer(r"\S+", text)], dict[int, int]()
        for place, (start, end) in enumerate(found["offset_mapping"]):
            if start < end:  # its last character tells its word: a blank may stand before
                firsts.setdefault(bisect_right(starts, end - 1) - 1, place)
        return tuple(found["input_ids"]), firsts

    def encode(
        self, examples: Sequence[Example], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Tokenise; texts are cut at ``train.max_length``. One without tags has no entity."""
        place = {tag: position for position, tag in enumerate(tags_of(labels))}
        encoded: list[Encoded] = []
        texts = self._read([example.text for example in examples])
        for (ids, firsts), example in zip(texts, examples, strict=True):
            right = example.tags or (OUTSIDE,) * len(example.text.split())
            words = tuple((word, first, place[right[word]]) for word, first in firsts.items())
            encoded.append(TaggedText(ids, -1, right=right, words=words))
        return encoded

    def forward_train(
        self, batch: Sequence[Encoded], labels: Sequence[str], seen: Sequence[Sequence[str]]
    ) -> ForwardOutput:
        """Mean cross-entropy of an example's words; to distil, a row of logits for each word."""
        own, *others = (tags_of(space) for space in (labels, *seen))
        scores, words = self._tag_scores(batch, [*own, *chain.from_iterable(others)]), _words(batch)
        targets = torch.tensor([tag for text in words for _, _, tag in text], dtype=torch.long)
        each = cross_entropy(scores[:, : len(own)], targets.to(scores.device), reduction="none")
        rows = [len(text) for text in words]
        losses = torch.stack([part.sum() / max(1, len(part)) for part in torch.split(each, rows)])
        return ForwardOutput(losses, scores[:, len(own) :], [len(o) for o in others], rows)

    def _tag_scores(self, batch: Sequence[Encoded], tags: Sequence[str]) -> Tensor:
        """Return scores of the words that are read, ``(words, tags)``, float32."""
        ids, mask = self._padded([item.tokens for item in batch])
        states = self._encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        names = self.label_vectors([NAMES[tag[0]].format(tag[2:]) for tag in tags])
        return LOGIT_SCALE * normalize(_of_words(states, batch), dim=1) @ names.T

    def tagged(self, batch: Sequence[Encoded], labels: Sequence[str]) -> list[list[str]]:
        """Return the likeliest tag of every word of the texts; ``O`` where no score is a number."""
        tags, words = tags_of(labels), _words(batch)
        found = [[OUTSIDE] * len(item.right) for item in batch]
        with torch.no_grad():
            scores = self._tag_scores(batch, tags).nan_to_num(nan=-torch.inf)
        best = iter(scores.argmax(1).tolist())
        for text, own in zip(words, found, strict=True):
            for word, _, _ in text:
                own[word] = tags[next(best)]
        return found


class TokenClassifier(TokenLabels):
    """Family ``token-classification``: a transformers model whose head has an output for every tag
    of the stream, by the names in its configuration (``label2id``). Linear layers of the head are
    adapted beside those of the encoder."""

    def __init__(self, base: Any, tokenizer: Any, adapter: AdapterConfig, max_length: int) -> None:
        super().__init__(base, tokenizer, with_head(base, adapter), max_length)
        self._encoder = base.base_model
        self._outputs: dict[str, int] = dict(base.config.label2id)

    def _tag_scores(self, batch: Sequence[Encoded], tags: Sequence[str]) -> Tensor:
        ids, mask = self._padded([item.tokens for item in batch])
        logits: Tensor = self.module(input_ids=ids, attention_mask=mask.long()).logits
        return _of_words(logits, batch)[:, [output_of(tag, self._outputs) for tag in tags]]


def _of_words(states: Tensor, batch: Sequence[Encoded]) -> Tensor:
    """Return what the first tokens of the words have, ``(words, width)``, float32."""
    places = [(n, first) for n, text in enumerate(_words(batch)) for _, first, _ in text]
    rows, firsts = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T.to(states.device)
    return states[rows, firsts].float()


def _words(batch: Sequence[Encoded]) -> list[Sequence[tuple[int, int, int]]]:
    return [item.words for item in batch if isinstance(item, TaggedText)]
