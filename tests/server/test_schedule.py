from __future__ import annotations

from server.schedule import Step, synchronous


def test_every_task_has_its_rounds_then_its_end():
    assert synchronous(2, 2) == [
        Step("zero-shot", -1),
        Step("round", 0, 1),
        Step("round", 0, 2),
        Step("end-task", 0),
        Step("round", 1, 1),
        Step("round", 1, 2),
        Step("end-task", 1),
    ]
