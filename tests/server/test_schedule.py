from __future__ import annotations

from server.schedule import Step, synchronous


def test_every_task_has_its_rounds_then_its_end():
    assert synchronous(2, 2) == [
        Step("round", 0, 1),
        Step("zero-shot", -1),  # of the start; nobody waits for it
        Step("round", 0, 2),
        Step("end-task", 0),
        Step("round", 1, 1),
        Step("round", 1, 2),
        Step("end-task", 1),
    ]


def test_one_round_of_one_task():
    assert synchronous(1, 1) == [Step("round", 0, 1), Step("zero-shot", -1), Step("end-task", 0)]
