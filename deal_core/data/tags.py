"""Tags of words, and the entities that they mark. F1 is that of the package seqeval (by default),
and of the script of CoNLL-2000: an entity is right where its label and both of its ends are."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deal_core.errors import UserError

OUTSIDE = "O"
"""The tag of a word in no entity; others are ``B-LABEL``, of a first word, and ``I-LABEL``."""


def tags_of(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the tags that words have under the labels of a task."""
    return (OUTSIDE, *(f"{begins}-{label}" for label in labels for begins in "BI"))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return what the tags mark: label, place of the first word, place behind the last one.
    ``I-LABEL`` that continues nothing begins an entity."""
    found, start = set[tuple[str, int, int]](), -1
    for place, tag in enumerate([*tags, OUTSIDE]):
        if start >= 0 and tag != f"I-{tags[start][2:]}":
            found.add((tags[start][2:], start, place))
            start = -1
        if start < 0 and tag != OUTSIDE:
            start = place
    return found


def entity_f1(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float:
    """Return ``2 right / (predicted + true)`` over the entities of all texts, 0 to 1; ``pairs``:
    predicted and true tags of each. 1 where there is no entity in either."""
    found = [(entities(predicted), entities(true)) for predicted, true in pairs]
    total = sum(len(ours) + len(theirs) for ours, theirs in found)
    return 2 * sum(len(ours & theirs) for ours, theirs in found) / total if total else 1.0


def marked(text: str, tags: Sequence[str]) -> str:
    """Return the text with each entity as ``[words](label)``."""
    words = text.split()
    for label, start, end in entities(tags):
        words[start] = f"[{words[start]}"
        words[end - 1] += f"]({label})"
    return " ".join(words)


def read_tagged(words: Any, tags: Any, known: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return words as one text, a blank between them, and their tags; ``known``: of values that
    stand for another tag, or label of a tag.

    Raises:
        UserError: no lists of equal length, of words without blanks and of tags.
    """
    if not isinstance(words, list) or not isinstance(tags, list):
        raise UserError("words and tags should be two lists (columns tokens and tags)")
    text = " ".join(map(str, words))
    if not len(text.split()) == len(words) == len(tags):
        raise UserError(f"{len(words)} words and {len(tags)} tags; give a word one, and no blank")
    found = []
    for value in map(str, tags):
        tag = known.get(value, value)
        begins, label = tag[:2], tag[2:].strip()
        if tag != OUTSIDE and not (begins in ("B-", "I-") and label):
            raise UserError(f"'{tag}' is no tag; write O, B-LABEL or I-LABEL")
        found.append(begins + known.get(label, label).strip())
    return text, tuple(found)
