from __future__ import annotations

import pytest

from deal_core.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)

# rows: after task 1, 2, 3; columns: task 1, 2, 3
MATRIX = [[0.90, 0.40, 0.30], [0.80, 0.85, 0.35], [0.70, 0.95, 0.75]]
ZERO_SHOT = [0.50, 0.45, 0.20]


def test_measures_on_a_matrix_made_by_hand():
    assert average_accuracy(MATRIX) == pytest.approx((0.70 + 0.95 + 0.75) / 3)
    assert backward_transfer(MATRIX) == pytest.approx(((0.70 - 0.90) + (0.95 - 0.85)) / 2)
    assert forward_transfer(MATRIX, ZERO_SHOT) == pytest.approx(((0.40 - 0.45) + (0.35 - 0.20)) / 2)
    # task 2 was best at the end, so it was not forgotten
    assert forgetting(MATRIX) == pytest.approx(((0.90 - 0.70) + 0.0) / 2)


def test_what_was_just_learnt_is_the_diagonal_or_the_only_row():
    assert learning_accuracy(MATRIX) == pytest.approx((0.90 + 0.85 + 0.75) / 3)
    assert learning_accuracy([[0.6, 0.8]]) == pytest.approx(0.7)


def test_a_single_task_has_nothing_to_forget():
    assert backward_transfer([[0.7]]) == 0.0
    assert forward_transfer([[0.7]], [0.5]) == 0.0
    assert forgetting([[0.7]]) == 0.0
