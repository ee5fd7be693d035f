"""Test examples taken out of a training file, where there is no file of them.

The split depends on what is in the rows and on no seed: it is the same on every machine, in every
run, and in any order of the rows. Rows alike in text and answer are on one side; where they have a
unit, those of one unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from deal_core.data.sampling import by_label
from deal_core.data.source import Example

Sides = tuple[tuple[Example, ...], tuple[Example, ...]]
"""Training and test examples, in their old order."""


def split_off(examples: Sequence[Example], share: float) -> Sides:
    """Return training and test examples: of every label, a ``share`` is for testing, and at least
    one of two. A text with several labels is placed for each of them, and may be on both sides.
    Where examples have a unit, all of a unit are on one side, and the share of a label is about
    right."""
    if any(example.unit for example in examples):
        return split_off_each(examples, share)
    test: set[int] = set()
    for indices in by_label(examples).values():
        order = sorted(indices, key=lambda index: _place(examples[index]))
        count = min(max(1, round(share * len(order))), len(order) - 1)
        while 0 < count < len(order) and _alike(examples, order, count):
            count += 1
        test.update(order[: count if count < len(order) else 0])
    return _sides(examples, lambda index: index in test)


def split_off_each(examples: Sequence[Example], share: float) -> Sides:
    """Return training and test examples, each where its own content, or its unit, says: about a
    ``share`` is for testing. Where records are protected no record may move another one."""
    return _sides(examples, lambda index: _place(examples[index]) < share)


def _alike(examples: Sequence[Example], order: Sequence[int], count: int) -> bool:
    return _place(examples[order[count]]) == _place(examples[order[count - 1]])


def _sides(examples: Sequence[Example], is_test: Callable[[int], bool]) -> Sides:
    sides: tuple[list[Example], list[Example]] = [], []
    for index, example in enumerate(examples):
        sides[is_test(index)].append(example)
    return tuple(sides[0]), tuple(sides[1])


def _place(example: Example) -> float:
    """Return a number in [0, 1) that depends on the record alone; of one of a group, on the group
    alone, so that it is on the same side in every task."""
    named = ("unit", example.unit) if example.unit else (example.text, example.target)
    digest = hashlib.sha256("\0".join(("split", *named)).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big") / 2**64
