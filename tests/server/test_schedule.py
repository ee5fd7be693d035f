from __future__ import annotations

from typing import get_args

from deal_core.config import StreamConfig
from server.schedule import SCHEDULES, Step, joint, synchronous


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


def test_jointly_there_is_one_stage_whatever_the_number_of_tasks():
    steps = [
        Step("round", 0, 1, together=True),
        Step("zero-shot", -1),
        Step("round", 0, 2, together=True),
        Step("end-task", 0),
    ]
    assert joint(1, 2) == joint(7, 2) == steps


def test_every_schedule_that_an_experiment_may_name_is_there():
    allowed = get_args(StreamConfig.model_fields["schedule"].annotation)
    assert set(SCHEDULES) == set(allowed)
