"""Texts that are answered, where single records are protected."""

from __future__ import annotations

import pytest

from deal_core.models import Encoded
from deal_core.training.evaluation import count_texts
from deal_core.training.text_overlap import TEXT_MEASURES

DATA = [Encoded((1, number), -1, right=("yes",)) for number in range(3)]
EXACT = TEXT_MEASURES["exact-match"]


def answer(batch):
    if 1 in batch:
        raise RuntimeError("a record that cannot be answered")
    return ["yes"] * len(batch)


def test_a_record_that_cannot_be_answered_changes_no_other():
    assert count_texts(answer, DATA, EXACT, alone=True) == 2
    assert count_texts(answer, DATA, EXACT, [0.5, 1.0, 0.25], alone=True) == 0.75


def test_a_failure_about_several_records_is_one():
    with pytest.raises(RuntimeError, match="cannot be answered"):
        count_texts(answer, DATA, EXACT)
