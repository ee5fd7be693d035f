from __future__ import annotations

from server.schedule import Step, schedule


def test_every_stage_has_its_rounds_then_its_end():
    assert schedule([2, 1]) == [
        Step("round", 0, 1),
        Step("zero-shot", -1),  # of the start; nobody waits for it
        Step("round", 0, 2),
        Step("end-stage", 0),
        Step("round", 1, 1),
        Step("end-stage", 1),
    ]


def test_one_round_of_one_stage():
    assert schedule([1]) == [Step("round", 0, 1), Step("zero-shot", -1), Step("end-stage", 0)]
