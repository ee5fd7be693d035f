"""Scores of heads, against scores found by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deal_core.models import Encoded
from deal_core.training.evaluation import NO_ANSWER, answer_space, count_both
from deal_core.training.head_scores import by_heads, by_names_told

LEARNT = {"heart": ("old", "new"), "skin": ("rash", "old")}
SPACE = answer_space("skin", LEARNT["skin"], LEARNT, shared_labels=False)
TEXTS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
SKIN = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.5]])
HEART = torch.tensor([[0.2, 0.9, 0.0], [0.1, 0.8, 0.0]])


def examples(*targets: int) -> list[Encoded]:
    return [Encoded((place,), target) for place, target in enumerate(targets)]


def names(batch: Sequence[int]) -> Tensor:
    return torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])[list(batch)]


def two_steps(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=1)


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


def test_names_that_count_nothing_are_not_asked_for():
    def never(batch: Sequence[int]) -> Tensor:
        raise AssertionError

    assert by_heads(TEXTS, SPACE, {"skin": SKIN}, never, 0.0)([0]).shape == (1, 4)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_two_equal_rows_a_label_are_one(weight):
    once = by_heads(TEXTS, SPACE, {"heart": HEART, "skin": SKIN}, names, weight)
    both = {task: two_steps(head, head) for task, head in (("heart", HEART), ("skin", SKIN))}
    twice = by_heads(TEXTS, SPACE, both, names, weight)
    torch.testing.assert_close(once([0, 1]), twice([0, 1]))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_first_rows_tell_the_task_and_the_second_the_label(weight):
    """As probabilities: of the task by the first rows, times of the label in it by the second."""
    second = {"heart": HEART.flip(0), "skin": 3.0 * SKIN}
    heads = {"heart": two_steps(HEART, second["heart"]), "skin": two_steps(SKIN, second["skin"])}
    found = by_heads(TEXTS, SPACE, heads, names, weight)([0, 1]).softmax(1)
    beside = weight * names([0, 1]).double()
    tasks = by_heads(TEXTS, SPACE, {"heart": HEART, "skin": SKIN})([0, 1]) + beside
    labels = by_heads(TEXTS, SPACE, second)([0, 1]) + beside
    of_task = tasks.softmax(1).reshape(2, 2, 2).sum(2, keepdim=True)
    of_label = labels.reshape(2, 2, 2).softmax(2)
    torch.testing.assert_close(found, (of_task * of_label).reshape(2, 4))


def test_a_task_without_a_head_beside_one_of_two_steps_gives_no_answer():
    found = by_heads(TEXTS, SPACE, {"skin": two_steps(SKIN, SKIN)})([0, 1])
    assert float(found[:, :2].max()) <= NO_ANSWER
    assert count_both(
        by_heads(TEXTS, SPACE, {"skin": two_steps(SKIN, SKIN)}), examples(0, 1), SPACE
    ) == (2, 2)


def test_a_task_without_a_head_is_answered_by_names_where_it_is_told_and_never_where_it_is_not():
    """Whoever does not know the task asks the heads, and these know other tasks alone."""
    heart = answer_space("heart", LEARNT["heart"], LEARNT, shared_labels=False)
    heads = by_heads(TEXTS, heart, {"skin": SKIN}, names, 0.5)
    told = by_names_told(lambda batch: names(batch) + torch.tensor([0, 1e-3, 0, 0]), heads, heart)
    assert count_both(told, examples(1, 1), heart) == (2, 0)
    torch.testing.assert_close(told([0, 1])[:, 2:], heads([0, 1])[:, 2:])
    more = {**LEARNT, "lung": ("dry",)}  # and another without one
    three = answer_space("heart", LEARNT["heart"], more, shared_labels=False)
    near = torch.tensor([[0.5, 0.50003, 0.0, 0.0, 0.0]])
    told = by_names_told(lambda batch: near, by_heads(TEXTS, three, {"skin": SKIN}), three)
    assert count_both(told, examples(1), three) == (1, 0)
    shared = answer_space("heart", LEARNT["heart"], LEARNT, shared_labels=True)
    told = by_names_told(
        lambda batch: -names(batch), by_heads(TEXTS, shared, {"skin": SKIN}), shared
    )
    assert count_both(told, examples(1, 0), shared) == (1, 1)  # 'old' of heart, by the head of skin


def test_a_label_that_nobody_has_shown_takes_nothing_from_the_others():
    absent = two_steps(SKIN, SKIN).clone()
    absent[1, :, -1] = -1e9
    found = by_heads(TEXTS, SPACE, {"skin": absent})([0, 1])
    torch.testing.assert_close(found[:, 2], (TEXTS.double() @ SKIN[0, :2].double()))
    assert float(found[:, 3].max()) < -1e8
