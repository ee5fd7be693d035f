from __future__ import annotations

from typing import get_args

from deal_core.config import StreamConfig
from deal_core.methods import LEARN, Phase
from server.schedule import SCHEDULES, Step, joint, synchronous


def phase(name: str, rounds: int) -> Phase:
    return Phase(name, rounds, lambda *given: None, lambda state: state, lambda state: True)


def test_every_task_has_its_rounds_then_its_end():
    assert synchronous(2, [phase(LEARN, 2)]) == [
        Step("round", 0, 1),
        Step("zero-shot", -1),  # of the start; nobody waits for it
        Step("round", 0, 2),
        Step("end-task", 0),
        Step("round", 1, 1),
        Step("round", 1, 2),
        Step("end-task", 1),
    ]


def test_one_round_of_one_task():
    steps = [Step("round", 0, 1), Step("zero-shot", -1), Step("end-task", 0)]
    assert synchronous(1, [phase(LEARN, 1)]) == steps


def test_a_further_phase_is_laid_out_and_its_rounds_count_on():
    assert synchronous(1, [phase(LEARN, 1), phase("polish", 2)]) == [
        Step("round", 0, 1),
        Step("zero-shot", -1),
        Step("begin-phase", 0, phase="polish"),
        Step("round", 0, 2, "polish"),
        Step("round", 0, 3, "polish"),
        Step("end-task", 0),
    ]


def test_jointly_there_is_one_stage_whatever_the_number_of_tasks():
    steps = [
        Step("round", 0, 1, together=True),
        Step("zero-shot", -1),
        Step("round", 0, 2, together=True),
        Step("end-task", 0),
    ]
    phases = [phase(LEARN, 2)]
    assert joint(1, phases) == joint(7, phases) == steps


def test_every_schedule_that_an_experiment_may_name_is_there():
    allowed = get_args(StreamConfig.model_fields["schedule"].annotation)
    assert set(SCHEDULES) == set(allowed)
