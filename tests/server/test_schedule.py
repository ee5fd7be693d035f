from __future__ import annotations

from deal_core.methods import Phase
from server.plan import Step, schedule


def phase(name: str, rounds: int) -> Phase:
    return Phase(name, rounds, lambda *given: None)


def test_every_stage_has_its_rounds_then_its_end():
    assert schedule([2, 1]) == [
        Step("round", 0, 1, round=1),
        Step("zero-shot", -1, round=1),  # of the start; nobody waits for it
        Step("round", 0, 2, round=2),
        Step("end-stage", 0, round=2),
        Step("round", 1, 1, round=3),  # counted over the whole run
        Step("end-stage", 1, round=3),
    ]


def test_one_round_of_one_stage():
    assert schedule([1]) == [
        Step("round", 0, 1, round=1),
        Step("zero-shot", -1, round=1),
        Step("end-stage", 0, round=1),
    ]


def test_a_further_phase_is_laid_out_and_its_rounds_count_on():
    assert schedule([1], [phase("polish", 2)]) == [
        Step("round", 0, 1, round=1),
        Step("zero-shot", -1, round=1),
        Step("round", 0, 2, "polish", 2),
        Step("round", 0, 3, "polish", 3),
        Step("end-stage", 0, round=3),
    ]
