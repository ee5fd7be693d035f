"""Two protocols from one score matrix, against answers found by hand."""

from __future__ import annotations

import torch

from deal_core.models import Encoded
from deal_core.training.evaluation import answer_space, count_both

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
