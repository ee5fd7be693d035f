import pytest

from deal_core.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    in_turn,
    learning_accuracy,
    spans,
)

# rows: after task 1, 2, 3; columns: task 1, 2, 3
MATRIX = [[0.90, 0.40, 0.30], [0.80, 0.85, 0.35], [0.70, 0.95, 0.75]]
ZERO_SHOT = [0.50, 0.45, 0.20]
IN_TURN = [0, 1, 2]


def test_measures_on_a_matrix_made_by_hand():
    assert average_accuracy(MATRIX) == pytest.approx((0.70 + 0.95 + 0.75) / 3)
    assert backward_transfer(MATRIX, IN_TURN) == pytest.approx(((0.70 - 0.90) + (0.95 - 0.85)) / 2)
    assert forward_transfer(MATRIX, ZERO_SHOT, IN_TURN) == pytest.approx(
        ((0.40 - 0.45) + (0.35 - 0.20)) / 2
    )
    # task 2 was best at the end, so it was not forgotten
    assert forgetting(MATRIX, IN_TURN) == pytest.approx(((0.90 - 0.70) + 0.0) / 2)


def test_entries_that_no_measure_needs_may_be_missing():
    """All but the diagonal, the one right of it, and the last row."""
    sparse = [[0.90, 0.40, None], [None, 0.85, 0.35], [0.70, 0.95, 0.75]]
    assert average_accuracy(sparse) == average_accuracy(MATRIX)
    assert learning_accuracy(sparse, IN_TURN) == learning_accuracy(MATRIX, IN_TURN)
    assert backward_transfer(sparse, IN_TURN) == backward_transfer(MATRIX, IN_TURN)
    assert forward_transfer(sparse, ZERO_SHOT, IN_TURN) == forward_transfer(
        MATRIX, ZERO_SHOT, IN_TURN
    )
    assert forgetting(sparse, IN_TURN) == forgetting(MATRIX, IN_TURN)
    with pytest.raises(ValueError, match="task 0 was not measured after stage 1"):
        learning_accuracy(sparse, [1, 1, 2])


def test_what_was_just_learnt_is_the_row_of_the_last_learner():
    assert learning_accuracy(MATRIX, IN_TURN) == pytest.approx((0.90 + 0.85 + 0.75) / 3)
    assert learning_accuracy([[0.6, 0.8]], [0, 0]) == pytest.approx(0.7)


def test_a_single_task_has_nothing_to_forget():
    assert backward_transfer([[0.7]], [0]) == 0.0
    assert forward_transfer([[0.7]], [0.5], [0]) == 0.0
    assert forgetting([[0.7]], [0]) == 0.0


def test_a_task_lasts_from_its_first_learner_to_its_last():
    stages = [["a", "b"], ["a"], ["c", "b"]]
    assert spans(["a", "b", "c"], stages) == ([0, 0, 2], [1, 2, 2])
    assert not in_turn(["a", "b", "c"], stages)
    assert spans(["a", "b", "c"], [["a"], ["b"], ["c"]]) == (IN_TURN, IN_TURN)
    assert in_turn(["a", "b"], [["a"], ["b"]])
    assert not in_turn(["a", "b"], [["b"], ["a"]])


def test_measures_where_learners_of_a_task_come_at_several_times():
    begun, learnt = [0, 0, 2], [1, 2, 2]
    assert backward_transfer(MATRIX, learnt) == pytest.approx(0.70 - 0.80)
    assert forward_transfer(MATRIX, ZERO_SHOT, begun) == pytest.approx(0.35 - 0.20)
    assert forgetting(MATRIX, learnt) == pytest.approx(0.90 - 0.70)
    assert backward_transfer(MATRIX, [2, 2, 2]) == forgetting(MATRIX, [2, 2, 2]) == 0.0
    assert forward_transfer(MATRIX, ZERO_SHOT, [0, 0, 0]) == 0.0
