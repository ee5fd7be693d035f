"""Scores of heads, against scores found by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deal_core.models import Encoded
from deal_core.training.evaluation import (
    NO_ANSWER,
    answer_space,
    by_heads,
    by_names_told,
    count_both,
)

LEARNT = {"heart": ("old", "new"), "skin": ("rash", "old")}
SPACE = answer_space("skin", LEARNT["skin"], LEARNT)
TEXTS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
SKIN = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.5]])


def examples(*targets: int) -> list[Encoded]:
    return [Encoded((place,), target) for place, target in enumerate(targets)]


def names(batch: Sequence[int]) -> Tensor:
    return torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])[list(batch)]


def test_heads_and_names_add_up_and_either_can_be_the_reason():
    """A head that knows nothing of a task never gives its labels, whatever the names say."""
    heads = {"skin": SKIN}
    for scores in (by_heads(TEXTS, SPACE, heads), by_heads(TEXTS, SPACE, heads, names, 0.1)):
        assert count_both(scores, examples(0, 1), SPACE) == (2, 2)
    scores = by_heads(TEXTS, SPACE, heads, names, 1.0)
    assert count_both(scores, examples(0, 0), SPACE) == (2, 2)
    found = by_heads(TEXTS, SPACE, heads, names, 0.5)([1])[0]
    torch.testing.assert_close(found[2:], torch.tensor([1.0, 0.75]).double())
    assert float(found[:2].max()) <= NO_ANSWER


def test_a_task_without_a_head_is_answered_by_names_where_it_is_told_and_never_where_it_is_not():
    """Whoever does not know the task asks the heads, and these know other tasks alone."""
    heart = answer_space("heart", LEARNT["heart"], LEARNT)
    heads = by_heads(TEXTS, heart, {"skin": SKIN}, names, 0.5)
    told = by_names_told(lambda batch: names(batch) + torch.tensor([0, 1e-3, 0, 0]), heads, heart)
    assert count_both(told, examples(1, 1), heart) == (2, 0)
    torch.testing.assert_close(told([0, 1])[:, 2:], heads([0, 1])[:, 2:])
    more = {**LEARNT, "lung": ("dry",)}  # and another without one
    three = answer_space("heart", LEARNT["heart"], more)
    near = torch.tensor([[0.5, 0.50003, 0.0, 0.0, 0.0]])
    told = by_names_told(lambda batch: near, by_heads(TEXTS, three, {"skin": SKIN}), three)
    assert count_both(told, examples(1), three) == (1, 0)
    shared = answer_space("heart", LEARNT["heart"], LEARNT)
    told = by_names_told(
        lambda batch: -names(batch), by_heads(TEXTS, shared, {"skin": SKIN}), shared
    )
    assert count_both(told, examples(1, 0), shared) == (1, 1)  # 'old' of heart, by the head of skin
