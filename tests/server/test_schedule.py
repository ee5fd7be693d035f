from __future__ import annotations

from deal_core.methods import Phase
from server.schedule import Step, schedule


def phase(name: str, rounds: int) -> Phase:
    return Phase(name, rounds, lambda *given: None, lambda state: state, lambda state: True)


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


def test_a_further_phase_is_laid_out_and_its_rounds_count_on():
    assert schedule([1], [phase("polish", 2)]) == [
        Step("round", 0, 1),
        Step("zero-shot", -1),
        Step("begin-phase", 0, phase="polish"),
        Step("round", 0, 2, "polish"),
        Step("round", 0, 3, "polish"),
        Step("end-stage", 0),
    ]
