"""How much of a right answer is in what a model wrote.

The longest common subsequence is rapidfuzz's; words are those of every script. The package
``rouge_score`` knows ASCII alone unless it is given a tokenizer, has had no release since 2022 and
brings NLTK. In ASCII the figures are its own, without stemming, but for the underscore, which is a
letter here, and for two texts without a word, which are equal here and share nothing there.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deal_core.config.data import ENTITY_F1

WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u31f0-\u31ff"  # Kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Han
)
"""Letters of scripts that put no space between words: each is a word here."""


def rouge_l(written: str, right: Sequence[str]) -> float:
    """Return ROUGE-L, 0 to 1: the F measure of the longest common subsequence of words (see
    :func:`words`); the best over several ``right`` answers. Source: Lin,
    ACL workshop 2004, with equal weight of precision and recall."""
    return max(_overlap(words(written), words(text)) for text in right)


def rouge_1(written: str, right: Sequence[str]) -> float:
    """Return ROUGE-1, 0 to 1: the same of the words that both have, whatever their order; a word
    counts as often as both have it. Source: as :func:`rouge_l`."""
    return max(_shared(words(written), words(text)) for text in right)


def exact_match(written: str, right: Sequence[str]) -> bool:
    """Return whether the words are those of a ``right`` answer, in its order; case, punctuation and
    white space do not matter."""
    return any(words(written) == words(text) for text in right)


@dataclass(frozen=True)
class TextMeasure:
    """Attributes: ``title``, for people; ``share``, of what was written and the right answers, 0 to
    1."""

    title: str
    share: Callable[[str, Sequence[str]], float]


TEXT_MEASURES: Mapping[str, TextMeasure] = {
    "rouge-l": TextMeasure("ROUGE-L", rouge_l),
    "rouge-1": TextMeasure("ROUGE-1", rouge_1),
    "exact-match": TextMeasure("exact match", exact_match),
}
TITLES = {name: measure.title for name, measure in TEXT_MEASURES.items()} | {
    "accuracy": "accuracy",
    ENTITY_F1: "entity F1",
}
"""Measure of answers of any kind to its name for people."""


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case: runs of letters, their marks and digits; in
    scripts that put no space between words every letter by itself."""
    found: list[str] = []
    goes_on = marked = False  # a word goes on; the last character was a letter
    for char in unicodedata.normalize("NFC", text.lower()):
        alone = WITHOUT_SPACES.match(char) is not None
        if unicodedata.category(char).startswith("M"):
            if marked:
                found[-1] += char  # a vowel sign, or an accent
            continue
        marked = char.isalnum() or char == "_"
        if not marked:
            goes_on = False
        elif alone or not goes_on:
            found.append(char)
            goes_on = not alone
        else:
            found[-1] += char
    return found


def _overlap(first: Sequence[str], second: Sequence[str]) -> float:
    from rapidfuzz.distance import LCSseq

    if not first or not second:
        return float(first == second)
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second))


def _shared(first: Sequence[str], second: Sequence[str]) -> float:
    if not first or not second:
        return float(first == second)
    return 2 * (Counter(first) & Counter(second)).total() / (len(first) + len(second))
