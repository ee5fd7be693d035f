"""How much of a right answer is in what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence


def rouge_l(written: str, right: Sequence[str]) -> float:
    """Return ROUGE-L, 0 to 1: the F measure of the longest common subsequence of words, which are
    runs of letters and digits in lower case; the best over several ``right`` answers. Source: Lin,
    ACL workshop 2004, with equal weight of precision and recall."""
    return max(_overlap(words(written), words(text)) for text in right)


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def _overlap(first: Sequence[str], second: Sequence[str]) -> float:
    from rapidfuzz.distance import LCSseq

    if not first or not second:
        return float(first == second)
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second))
