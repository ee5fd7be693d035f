"""How much of a right answer is in what a model wrote.

Not by the package ``rouge_score``, to which words are runs of ASCII letters and digits: an answer
in another script would be empty. In ASCII the figures are its own, without stemming, but for the
underscore, which is a letter here, and for two texts without a word, which are equal here and
share nothing there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def rouge_l(written: str, right: Sequence[str]) -> float:
    """Return ROUGE-L, 0 to 1: the F measure of the longest common subsequence of words, which are
    runs of letters and digits in lower case; the best over several ``right`` answers. Source: Lin,
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


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def _overlap(first: Sequence[str], second: Sequence[str]) -> float:
    from rapidfuzz.distance import LCSseq

    if not first or not second:
        return float(first == second)
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second))


def _shared(first: Sequence[str], second: Sequence[str]) -> float:
    if not first or not second:
        return float(first == second)
    return 2 * (Counter(first) & Counter(second)).total() / (len(first) + len(second))
