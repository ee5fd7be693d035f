"""Scores of names and of heads, and written texts: counted as by hand."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deal_core.models.interface import Encoded
from deal_core.training.evaluation import (
    NO_ANSWER,
    answer_space,
    by_heads,
    by_names_told,
    count_both,
)
from deal_core.training.loop import contained

LEARNT = {"heart": ("old", "new"), "skin": ("rash", "old")}


def examples(*targets: int) -> list[Encoded]:
    """Each has one token: its place."""
    return [Encoded((place,), target) for place, target in enumerate(targets)]


def scorer(rows: list[list[float]]):
    """A row for each example."""
    return lambda batch: torch.tensor([rows[i] for i in batch])


def test_a_task_that_is_not_learnt_yet_adds_its_own_labels():
    space = answer_space("eye", ("red", "blind"), LEARNT)
    assert space.columns[-2:] == (("eye", "red"), ("eye", "blind"))
    assert space.own == (4, 5)
    assert answer_space("skin", LEARNT["skin"], LEARNT).own == (2, 3)
    assert answer_space("eye", ("red", "blind"), {}).own == (0, 1)


def test_right_among_its_own_labels_may_be_wrong_among_all():
    space = answer_space("skin", LEARNT["skin"], LEARNT)
    rows = [
        [0.0, 0.0, 0.9, 0.1],  # right in both
        [0.0, 1.0, 0.9, 0.1],  # another task's label is better
        [0.0, 0.0, 0.9, 0.1],  # wrong in both
    ]
    assert count_both(scorer(rows), examples(0, 0, 1), space) == (2, 1)


def test_of_equal_scores_the_first_column_wins():
    space = answer_space("skin", LEARNT["skin"], LEARNT)
    assert count_both(scorer([[0.1, 0.5, 0.1, 0.5]]), examples(1), space) == (1, 0)
    own = answer_space("heart", LEARNT["heart"], LEARNT)
    assert count_both(scorer([[0.5, 0.1, 0.1, 0.5]]), examples(0), own) == (1, 1)


def test_scores_that_are_no_numbers_are_no_answer():
    """Else a model that gives none would be right wherever the first label is."""
    nan = float("nan")
    space = answer_space("heart", LEARNT["heart"], {})
    assert count_both(scorer([[nan, nan], [nan, nan]]), examples(0, 1), space) == (0, 0)
    assert count_both(scorer([[nan, 0.3], [0.3, nan]]), examples(1, 1), space) == (1, 1)


SPACE = answer_space("skin", LEARNT["skin"], LEARNT)
TEXTS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
SKIN = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.5]])


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


def test_a_failure_about_one_record_stands_in_the_sites_log_alone(caplog):
    def fail() -> int:
        raise IndexError("a text of 9 tokens")

    with caplog.at_level(logging.ERROR):
        assert contained(fail, alone=True) is None
    assert [r.exc_info is not None for r in caplog.records] == [True]
    with pytest.raises(IndexError, match="9 tokens"):
        contained(fail, alone=False)
